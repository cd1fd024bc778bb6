"""Measures against cases done by hand and against all scores at once, however they are cut into batches."""

import math

import pytest
import torch
from safetensors.torch import load_file

from mope_fast.analysis import Recorder, Thresholds, TopSample

LAYERS, SAMPLES, EXPERTS, CLASSES = 3, 50, 6, 4
NAMES = [f"class {c}" for c in range(CLASSES)]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def random_scores(dtype=torch.float64):
    return (torch.randn(LAYERS, SAMPLES, EXPERTS, dtype=dtype) * 3).softmax(-1)


def entropy(shares):
    terms = shares * shares.clamp(min=1e-300).log()
    return -terms.sum(-1) / math.log(shares.shape[-1])


def test_one_expert_a_sample_both_used_alike():
    recorder = Recorder(class_names=["a", "b"])
    recorder.update(torch.eye(2).repeat(2, 1), labels=[0, 1, 0, 1])
    assert recorder.samples == 4
    close(recorder.importance, torch.tensor([[0.5, 0.5]]).double())
    for measure, value in (("entropy", 0.0), ("balance", 1.0), ("information", 1.0), ("class_information", 1.0)):
        close(getattr(recorder, measure), torch.tensor([value]).double())
    close(recorder.by_class, torch.eye(2)[None].double())
    assert recorder.alarms == []


def test_undecided_scores_say_nothing_about_the_sample():
    recorder = Recorder(class_names=["a", "b"])
    recorder.update(torch.full((1, 4, 5), 0.2, dtype=torch.float64), labels=[0, 1, 0, 1])
    for measure, value in (("entropy", 1.0), ("balance", 1.0), ("information", 0.0), ("class_information", 0.0)):
        close(getattr(recorder, measure), torch.tensor([value]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measures_are_those_of_all_scores_at_once(dtype):
    scores, labels = random_scores(dtype), torch.randint(CLASSES, (SAMPLES,))
    recorder = Recorder(class_names=NAMES)
    for index in torch.arange(SAMPLES).split(7):
        recorder.update(scores[:, index], labels[index])
    shares = scores.double() / scores.double().sum(-1, keepdim=True)
    importance = shares.mean(1)
    close(recorder.importance, importance)
    close(recorder.entropy, entropy(shares).mean(1))
    close(recorder.balance, entropy(importance))
    # the mean divergence of a sample's scores from all samples'
    divergence = (shares * (shares / importance[:, None]).log()).sum(-1).mean(1) / math.log(EXPERTS)
    close(recorder.information, divergence)
    by_class = torch.stack([shares[:, labels == c].mean(1) for c in range(CLASSES)], dim=1)
    close(recorder.by_class, by_class)
    counts = labels.bincount(minlength=CLASSES).double()
    close(recorder.class_counts, counts)
    divergence = (by_class * (by_class / importance[:, None]).log()).sum(-1) @ (counts / SAMPLES) / math.log(EXPERTS)
    close(recorder.class_information, divergence)
    assert (recorder.class_information <= recorder.information).all()


@pytest.mark.parametrize("batch", [1, 7, SAMPLES])
def test_top_samples_are_the_same_however_samples_are_batched(batch):
    scores = random_scores().round(decimals=1)  # with ties
    ids = torch.randperm(1000)[:SAMPLES]
    recorder = Recorder(top=5)
    for index in torch.arange(SAMPLES).split(batch):
        recorder.update(scores[:, index], ids=ids[index])
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            order = sorted(range(SAMPLES), key=lambda i: -scores[layer, i, expert])
            expected = [TopSample(int(ids[i]), float(scores[layer, i, expert])) for i in order[:5]]
            assert recorder.top_samples(layer, expert) == expected


def test_negative_scores_count_as_none():
    recorder = Recorder()
    recorder.update(torch.tensor([[0.5, 0.5], [1.5, -0.5]]))
    assert (recorder.samples, recorder.not_finite) == (1, 1)
    assert torch.equal(recorder.importance, torch.tensor([[0.5, 0.5]]).double())


def test_a_sample_that_comes_again_counts_with_its_last_score():
    recorder = Recorder(top=3)
    recorder.update(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.4, 0.6]]), ids=[3, 5, 7, 7])
    recorder.update(torch.tensor([[0.3, 0.7]]), ids=[3])
    assert recorder.top_samples(0, 0) == [(7, pytest.approx(0.4)), (3, pytest.approx(0.3)), (5, pytest.approx(0.2))]
    with pytest.raises(IndexError, match="expert must be 0 to 1, got 2"):
        recorder.top_samples(0, 2)


def test_gated_scores_are_shares_of_their_sum_but_top_samples_keep_them():
    recorder = Recorder()
    recorder.update(torch.tensor([[0.6, 0.0], [0.0, 0.8], [0.7, 0.0], [0.0, 0.9]], dtype=torch.float64))
    close(recorder.importance, torch.tensor([[0.5, 0.5]]).double())
    close(recorder.entropy, torch.zeros(1).double())
    assert recorder.top_samples(0, 0) == [(2, 0.7), (0, 0.6), (1, 0.0), (3, 0.0)]


def test_a_sample_counts_for_each_of_its_labels_by_its_weight():
    scores, labels = random_scores(), torch.rand(SAMPLES, CLASSES) * (torch.rand(SAMPLES, CLASSES) < 0.5)
    labels[:, 3] = 0
    recorder = Recorder()
    for index in torch.arange(SAMPLES).split(8):
        recorder.update(scores[:, index], labels[index])
    weights = labels.double()
    close(recorder.class_counts, weights.sum(0))
    close(recorder.by_class[:, :3], torch.einsum("bc,nbk->nck", weights, scores)[:, :3] / weights.sum(0)[:3, None])
    assert recorder.by_class[:, 3].isnan().all()
    assert recorder.class_information.isfinite().all()


def test_weights_that_are_not_finite_are_in_no_class_and_counted():
    recorder, labels = Recorder(class_names=NAMES), torch.ones(4, CLASSES)
    labels[1, 2] = math.nan
    recorder.update(random_scores()[:, :4], labels)
    assert recorder.class_counts.tolist() == [3] * CLASSES
    assert (recorder.samples, recorder.without_class) == (4, 1)
    assert recorder.by_class.isfinite().all()


def test_labels_out_of_range_are_in_no_class_and_counted():
    recorder = Recorder(class_names=NAMES)
    recorder.update(random_scores()[:, :4], labels=[0, -100, 4, 2])
    assert recorder.class_counts.tolist() == [1, 0, 1, 0]
    assert (recorder.samples, recorder.without_class) == (4, 2)


def test_samples_that_are_not_finite_or_not_routed_count_nowhere_else():
    scores = random_scores()
    expected = Recorder(class_names=NAMES, top=3)
    expected.update(scores[:, 2:6], labels=[0, 1, 2, 3], ids=[2, 3, 4, 5])
    recorder = Recorder(class_names=NAMES, top=3)
    scores[1, 0, 2], scores[0, 1, 0], scores[2, 6] = math.nan, math.inf, 0
    recorder.update(scores[:, :7], labels=[0, 0, 0, 1, 2, 3, 3])
    assert (recorder.samples, recorder.not_finite, recorder.not_routed) == (4, 2, 1)
    for name, value in expected.tensors().items():
        torch.testing.assert_close(recorder.tensors()[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert [alarm.kind for alarm in recorder.alarms] == ["not finite"]
    assert "2 samples have scores that are NaN, infinite or negative" in str(recorder.alarms[0])


def test_curves_keep_their_length_and_lose_no_step():
    scores = torch.stack([random_scores()[:, :4] for _ in range(37)])
    recorder, exact = Recorder(windows=8), Recorder()
    for step in scores:
        recorder.update(step)
        exact.update(step)
    assert exact.curves.edges.tolist() == list(range(38))
    close(exact.curves.importance, scores.mean(2))
    close(exact.curves.entropy, entropy(scores).mean(2))
    curves = recorder.curves
    assert curves.edges.tolist() == [0, 8, 16, 24, 32, 37]
    for window, (start, stop) in enumerate(zip(curves.edges, curves.edges[1:], strict=False)):
        importance = scores[start:stop].mean((0, 2))
        close(curves.importance[window], importance)
        close(curves.balance[window], entropy(importance))
        close(curves.entropy[window], entropy(scores[start:stop]).mean((0, 2)))


def test_every_third_step_is_recorded_and_positions_go_on():
    scores = torch.stack([random_scores()[:, :4] for _ in range(20)])
    recorder = Recorder(every=3, windows=4, top=100)
    for step in scores:
        recorder.update(step)
    close(recorder.importance, scores[::3].mean((0, 2)))
    assert recorder.samples == 28
    assert {sample.id // 4 for sample in recorder.top_samples(0, 0)} == set(range(0, 20, 3))
    curves = recorder.curves
    assert curves.edges.tolist() == [0, 6, 12, 18, 20]
    close(curves.importance[1], scores[[6, 9]].mean((0, 2)))


def test_processes_together_are_as_one(monkeypatch):
    """The second one has seen less, and so has shorter windows; the third nothing."""
    scores, labels, ids = random_scores(), torch.randint(CLASSES, (SAMPLES,)), torch.randperm(SAMPLES)
    one = Recorder(class_names=NAMES, windows=4, top=5)
    ranks = [Recorder(class_names=NAMES, windows=4, top=5) for _ in range(3)]
    for index in torch.arange(SAMPLES).split(5):
        halves = index.split(3) if ranks[1].steps < 3 else (index,)
        for rank, half in zip(ranks, halves, strict=False):
            rank.update(scores[:, half], labels[half], ids[half])
        one.update(scores[:, index], labels[index], ids[index])
    assert ranks[0]._stride > ranks[1]._stride

    def gather(states, own, group):
        settings = [{"top": r._top, "every": r._every, "windows": r._windows} for r in ranks]
        recorded = [(r._sums and r._sums.cpu(), r._stride, r.steps, r.training_steps) for r in ranks]
        states[:] = [(*each, own) for each, own in zip(recorded, settings, strict=True)]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    before = ranks[1].tensors()
    for rank in ranks:
        total = rank.gather()
        assert (total.steps, total.samples) == (one.steps, SAMPLES)
        for name, value in one.tensors().items():
            torch.testing.assert_close(total.tensors()[name], value, rtol=1e-12, atol=1e-12, equal_nan=True)
    for name, value in before.items():
        torch.testing.assert_close(ranks[1].tensors()[name], value, rtol=0, atol=0, equal_nan=True)
    ranks[2].update(torch.ones(LAYERS, 2, EXPERTS + 1))
    with pytest.raises(
        ValueError, match=rf"processes recorded with different experts \[{EXPERTS}, {EXPERTS}, {EXPERTS + 1}\]: create"
    ):
        ranks[0].gather()
    ranks[2] = Recorder(windows=4, top=6)
    with pytest.raises(ValueError, match=r"processes recorded with different top \[5, 5, 6\]"):
        ranks[0].gather()


@pytest.mark.parametrize("shape", [(1, 1, 1), (48, 3, 256)])
def test_from_one_expert_to_many(shape):
    recorder = Recorder()
    recorder.update(torch.rand(shape))
    for name in ("entropy", "balance", "information"):
        assert ((getattr(recorder, name) >= 0) & (getattr(recorder, name) <= 1)).all()
    assert [alarm for alarm in recorder.alarms if shape[2] == 1] == []


def test_alarms_say_what_is_wrong_in_which_layer():
    def layer(*rows):
        return torch.tensor(rows).repeat(2, 1)

    # the last expert has less than a hundredth of all scores, but more than a hundredth of its fair share
    healthy = layer([0.8, 0.194, 0.006], [0.1, 0.894, 0.006], [0.3, 0.694, 0.006])
    dominated = layer([0.99, 0.005, 0.005], [0.98, 0.01, 0.01], [0.9, 0.05, 0.05])
    same = layer(*[[0.5, 0.3, 0.2]] * 3)
    dead = layer([0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.5, 0.5, 0.0])
    recorder = Recorder()
    recorder.update(torch.stack([healthy, dead, same, dominated]))
    assert [(alarm.kind, alarm.layer, alarm.experts) for alarm in recorder.alarms] == [
        ("dominance", 3, (0,)),
        ("same for all", 2, ()),
        ("dead", 1, (2,)),
    ]
    assert str(recorder.alarms[0]) == "layer 3: expert 0 takes 95.7% of all scores"
    assert str(recorder.alarms[2]) == "layer 1: expert 2 of 3 nearly never used (less than 1% of 1/K)"
    strict = Recorder(thresholds=Thresholds(dominance=0.5, information=1.0, dead=1.0))
    strict.update(torch.stack([healthy, dead, same, dominated]))
    assert {alarm.layer for alarm in strict.alarms} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match=r"Thresholds.dead must be in \[0, 1\], got 2"):
        Thresholds(dead=2)


def test_saved_measures_are_read_back(tmp_path):
    recorder = Recorder(class_names=NAMES)
    recorder.update(random_scores(), torch.randint(CLASSES, (SAMPLES,)))
    recorder.save(tmp_path / "new" / "routing.safetensors")
    loaded = load_file(tmp_path / "new" / "routing.safetensors")
    assert loaded.keys() == recorder.tensors().keys() >= {"importance", "by_class", "curves.edges", "top_samples.ids"}
    for name, value in recorder.tensors().items():
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("measure", ["samples", "importance", "entropy", "by_class", "curves", "alarms"])
def test_nothing_recorded_is_a_clear_error(measure):
    with pytest.raises(RuntimeError, match=r"nothing was recorded: call the model in the block of record\(\)"):
        getattr(Recorder(), measure)
    recorder = Recorder()
    recorder.update(torch.full((1, 3, 2), math.nan))
    with pytest.raises(RuntimeError, match="of 3 samples 3 had scores that are NaN, infinite or negative"):
        getattr(recorder, measure)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores": torch.ones(2, 2, dtype=torch.long)}, ValueError, r"scores must be .* got torch.int64 \(2, 2\)"),
        ({"scores": torch.ones(2)}, ValueError, r"scores must be .* got torch.float32 \(2,\)"),
        ({"scores": torch.ones(4, 2), "ids": [1, 2]}, ValueError, r"one integer for each of 4 samples, got \(2,\)"),
        ({"scores": torch.ones(4, 2), "ids": [1.0] * 4}, TypeError, "ids must be integers, got torch.float32"),
        ({"scores": torch.ones(4, 2), "labels": [0] * 4}, ValueError, "the number of classes is not known"),
        ({"scores": torch.ones(4, 2), "labels": [0.5] * 4}, ValueError, r"labels must be \(4,\) integers or \(4, C\) weights"),
        ({"scores": torch.ones(1, 4, 3)}, ValueError, "scores have .* but earlier ones had"),
    ],
)
def test_what_can_not_be_counted_is_refused(arguments, error, message):
    recorder = Recorder()
    recorder.update(torch.ones(4, 2))
    with pytest.raises(error, match=message):
        recorder.update(**arguments)


def test_labels_of_other_classes_are_refused():
    recorder = Recorder()
    recorder.update(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match="labels have 5 classes, but earlier ones had 4"):
        recorder.update(torch.ones(3, 2), torch.ones(3, 5))
