import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mope_fast.data import FewShotSplit, classification_metrics, multi_label_metrics, summarize


@st.composite
def splits(draw):
    """Labels that are enough for the shots, in any order."""
    shots = draw(st.integers(1, 6))
    classes = draw(st.lists(st.integers(-(2**40), 2**40), min_size=2, max_size=4, unique=True))
    labels = [c for c in classes for _ in range(draw(st.integers(2 * shots, 2 * shots + 5)))]
    return draw(st.permutations(labels)), shots, draw(st.integers(0, 2**63 - 1))


@given(splits())
def test_balanced_disjoint_and_complete(case):
    labels, shots, seed = case
    split = FewShotSplit(labels, shots, seed)
    values = torch.tensor(labels)
    assert split.classes == sorted(set(labels))
    for part in (split.train, split.dev):
        assert part.dtype == torch.int64
        assert [int((values[part] == c).sum()) for c in split.classes] == [shots] * len(split.classes)
    assert torch.cat([split.train, split.dev, split.rest]).sort().values.tolist() == list(range(len(labels)))
    assert split.rest.tolist() == sorted(split.rest.tolist())


@given(splits())
def test_nested_in_shots(case):
    labels, shots, seed = case
    large = FewShotSplit(labels, shots, seed)
    for fewer in range(1, shots):
        small = FewShotSplit(labels, fewer, seed)
        assert set(small.train.tolist()) < set(large.train.tolist())
        assert set(small.dev.tolist()) < set(large.dev.tolist())


@given(splits())
def test_the_seed_alone_decides(case):
    labels, shots, seed = case
    first = FewShotSplit(labels, shots, seed)
    torch.rand(3)
    state = torch.get_rng_state()
    again = FewShotSplit(torch.tensor(labels), shots, seed)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("train", "dev", "rest"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_a_seed_names_the_same_split_in_every_version():
    split = FewShotSplit([0, 1] * 6, shots=2, seed=3)
    assert (split.train.tolist(), split.dev.tolist()) == ([1, 0, 3, 8], [10, 2, 5, 11])
    assert not torch.equal(split.train, FewShotSplit([0, 1] * 6, shots=2, seed=4).train)


def test_train_is_shuffled_over_classes():
    labels = torch.arange(200) // 100
    assert labels[FewShotSplit(labels).train][:32].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([3, 1] * 4, dtype=torch.uint8),
        np.array([3, 1] * 4, dtype=np.int16),
        [np.int64(3), torch.tensor(1)] * 4,
        (label for label in [3, 1] * 4),
    ],
)
def test_integers_of_any_kind(labels):
    split = FewShotSplit(labels, 2)
    assert split.classes == [1, 3]
    assert torch.equal(split.train, FewShotSplit([3, 1] * 4, 2).train)


def test_texts():
    for labels in (["yes", "no"] * 4, np.array(["yes", "no"] * 4)):
        split = FewShotSplit(labels, 2)
        assert split.classes == ["no", "yes"]
        assert repr(split) == "FewShotSplit(shots=2, seed=0; 2 classes, train: 4, dev: 4, rest: 0)"


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (torch.tensor([0.0, 1.0] * 4), "float"),
        ([0, math.nan] * 4, "float, int"),
        ([True, False] * 4, "bool"),
        (torch.tensor([True, False] * 4), "bool"),
        ([0, True] * 4, "bool, int"),
        ([0, "1"] * 4, "int, str"),
        ([0, None] * 4, "NoneType, int"),
        (torch.zeros(4, 2, dtype=torch.int64), "list: flatten them"),
        (torch.tensor(1), "Tensor"),
        ("abab", "str 'abab'"),
        (None, "NoneType"),
    ],
)
def test_labels_of_a_wrong_kind(labels, got):
    with pytest.raises(TypeError, match=f"labels must be 1-D.*{got}"):
        FewShotSplit(labels, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0] * 9 + [1] * 3, 2), ValueError, r"2 shots need 2 \* 2 = 4 samples of each class, .* but class 1 has 3: take fewer"),
        ((["a"] * 3 + ["b"] * 2 + ["c"] * 4, 2), ValueError, "but class 'a' has 3, class 'b' has 2: take"),
        (([5] * 9, 2), ValueError, r"at least two classes, got \[5\] in 9 samples"),
        (([], 2), ValueError, r"at least two classes, got \[\] in 0 samples"),
        (([0, 1], 0), ValueError, "shots must be at least 1, got 0"),
        (([0, 1], 1.0), TypeError, r"shots must be an integer, got 1\.0"),
        (([0, 1], True), TypeError, "shots must be an integer, got True"),
        (([0, 1], 1, "3"), TypeError, "seed must be an integer, got '3'"),
        (([0, 1], 1, -1), ValueError, r"seed must be 0 to 2\*\*63 - 1, got -1"),
    ],
)
def test_splits_that_cant_be(arguments, error, message):
    with pytest.raises(error, match=message):
        FewShotSplit(*arguments)


@given(st.integers(2, 5).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.tuples(*[st.integers(0, c - 1)] * 2), min_size=1))))
def test_metrics_by_hand(case):
    num_classes, pairs = case
    guess, truth = (torch.tensor(column) for column in zip(*pairs, strict=True))
    f1, count = torch.zeros(num_classes).double(), torch.zeros(num_classes).double()
    for c in range(num_classes):
        hits, count[c] = int(((guess == c) & (truth == c)).sum()), int((truth == c).sum())
        f1[c] = 2 * hits / max(1, int((guess == c).sum() + count[c]))
    expected = {
        "accuracy": sum(g == t for g, t in pairs) / len(pairs),
        "f1_macro": f1.mean().item(),
        "f1_weighted": (f1 * count).sum().item() / len(pairs),
    } | ({"f1_binary": f1[1].item()} if num_classes == 2 else {})
    logits = torch.nn.functional.one_hot(guess, num_classes) * 3.0 - 1
    for predictions in (guess, logits, logits.to(torch.bfloat16).requires_grad_()):
        assert classification_metrics(predictions, truth, num_classes) == pytest.approx(expected)


def test_multi_label_metrics_by_hand():
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    logits = torch.tensor([[2.0, -1, -3], [1, -1, -3], [-1, -1, -3], [0.1, 3, -3]])
    # class 0: 2 right, 1 too many; class 1: 1 right, 1 missed; class 2: never there, never predicted
    f1 = [2 * 2 / (2 * 2 + 1), 2 * 1 / (2 * 1 + 1), 0.0]
    expected = {"accuracy": 2 / 4, "f1_macro": sum(f1) / 3, "f1_micro": 2 * 3 / (2 * 3 + 2)}
    assert multi_label_metrics(logits, labels) == pytest.approx(expected)
    assert multi_label_metrics(logits, labels.float(), threshold=0.6)["accuracy"] == pytest.approx(3 / 4)


def test_a_score_at_the_threshold_is_not_above_it():
    assert multi_label_metrics(torch.zeros(1, 2), torch.zeros(1, 2))["accuracy"] == 1


def test_multi_label_metrics_of_one_class():
    logits, labels = torch.tensor([[1.0], [-1], [1], [-1]]), torch.tensor([[1], [0], [0], [0]])
    expected = {"accuracy": 0.75, "f1_macro": 2 / 3, "f1_micro": 2 / 3}
    assert multi_label_metrics(logits, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 2), ValueError, r"got \(2, 3\) and \(2, 2\)"),
        (torch.zeros(0, 3), torch.zeros(0, 3), ValueError, "N >= 1"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), TypeError, "logits must be floating-point"),
        (torch.full((2, 3), float("nan")), torch.zeros(2, 3), ValueError, "2 of 2 samples have NaN"),
        (torch.zeros(2, 3), torch.full((2, 3), 2), ValueError, "labels must be 0 or 1"),
    ],
)
def test_multi_label_metrics_of_nonsense(logits, labels, error, message):
    with pytest.raises(error, match=message):
        multi_label_metrics(logits, labels)


def test_binary_f1_is_scikit_learns():
    guess, truth = [1, 0, 1, 1, 0], [1, 1, 0, 1, 0]
    assert classification_metrics(guess, truth, 2)["f1_binary"] == pytest.approx(f1_score(truth, guess))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor([], dtype=torch.int64), [], 2), ValueError, r"same N >= 1 samples, got \(0,\) and \(0,\)"),
        (([0, 1], [0], 2), ValueError, r"got \(2,\) and \(1,\)"),
        (([[0, 1]], [[0, 1]], 2), ValueError, r"got \(1, 2\) and \(1, 2\)"),
        ((torch.zeros(2, 3), [0, 1], 2), ValueError, r"logits must be \(N, 2\), got \(2, 3\)"),
        (([0.0, 1.0], [0, 1], 2), ValueError, r"logits must be \(N, 2\), got \(2,\); predicted classes are integers"),
        ((torch.tensor([[0.0, math.nan], [0, 1]]), [0, 1], 2), ValueError, "logits of 1 of 2 samples have NaN"),
        (([0, 1], [0, 2], 2), ValueError, "labels must be 0 to 1 for 2 classes, got 0 to 2"),
        (([0, -1], [0, 1], 2), ValueError, "predictions must be 0 to 1 for 2 classes, got -1 to 0"),
        (([0, 1], [0.0, 1.0], 2), TypeError, r"labels must be integer classes, got torch\.float32"),
        (([0, 1], [False, True], 2), TypeError, r"labels must be integer classes, got torch\.bool"),
        (([0, 1], ["no", "yes"], 2), TypeError, "labels must be a tensor, array or list of numbers, got"),
        (([0, 0], [0, 0], 1), ValueError, "num_classes must be an integer >= 2, got 1"),
    ],
)
def test_nothing_to_measure(arguments, error, message):
    with pytest.raises(error, match=message):
        classification_metrics(*arguments)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"classification_metrics needs scikit-learn: pip install 'mope_fast\[few-shot\]'"):
        classification_metrics([0], [0], 2)


def test_summary():
    summary = summarize(
        [{"accuracy": 0.5, "f1_macro": 0.25}, {"f1_macro": 0.75, "accuracy": 0.5}, {"accuracy": 0.8, "f1_macro": 0.5}]
    )
    assert summary.runs == 3
    assert summary.mean == pytest.approx({"accuracy": 0.6, "f1_macro": 0.5})
    assert summary.std == pytest.approx({"accuracy": 0.03**0.5, "f1_macro": 0.25})
    assert str(summary).splitlines() == [
        "          mean ± std of 3 runs",
        "accuracy  0.6000 ± 0.1732",
        "f1_macro  0.5000 ± 0.2500",
    ]


def test_one_run_has_no_spread():
    summary = summarize([{"accuracy": 1}])
    assert math.isnan(summary.std["accuracy"])
    assert str(summary).endswith("of 1 run\naccuracy  1.0000 ± nan")


@pytest.mark.parametrize(
    ("runs", "error", "message"),
    [
        ([], ValueError, "nothing to summarize"),
        ([{}], ValueError, "nothing to summarize"),
        ({"accuracy": 1.0}, TypeError, "runs must be a list of dicts"),
        ([0.5], TypeError, "runs must be a list of dicts"),
        ([{"a": 1.0}, {"b": 1.0}], ValueError, r"run 0 has \['a'\] and run 1 \['b'\]"),
        ([{"a": math.nan}], ValueError, "a of run 0 is nan"),
        ([{"a": "1"}], TypeError, "a of run 0 must be a number, got str"),
    ],
)
def test_nothing_to_summarize(runs, error, message):
    with pytest.raises(error, match=message):
        summarize(runs)
