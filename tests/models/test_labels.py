"""Labels: what a loss takes, what it refuses by name, and what it is where no value can be looked at."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_fusion import close, make_bert, make_fusion, make_images, make_text
from torch import nn

from mope_fast import PromptTuned
from mope_fast.models.task import NOT_A_LABEL, TASK_LOSSES, check_labels

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("problem", "shape", "labels", "error", "message"),
    [
        (SINGLE, (2, 3), [0, 1], TypeError, "labels must be a tensor, got list"),
        (SINGLE, (2, 3), torch.tensor([[0], [2]]), ValueError, r"\(2,\), got torch.int64 \(2, 1\): .*squeeze\(1\)"),
        (SINGLE, (2, 3), torch.tensor([[0, 1, 0], [1, 0, 0]]), ValueError, r"got torch.int64 \(2, 3\): for one-hot.*argmax"),
        (SINGLE, (2, 3), torch.tensor([0.0, 2.0]), ValueError, r"probabilities \(2, 3\), or integer.*got torch.float32 \(2,\)"),
        (SINGLE, (2, 3), torch.tensor([0, 1, 2]), ValueError, r"\(2,\), got torch.int64 \(3,\)"),
        (SINGLE, (2, 3), torch.tensor([True, False]), TypeError, r"can't be torch.bool: call .long\(\)"),
        (SINGLE, (2, 3), torch.tensor([0, 3]), ValueError, "must be classes 0 to 2, or -100 to ignore a sample, got 3"),
        (SINGLE, (2, 3), torch.tensor([-1, 0]), ValueError, "or -100 to ignore a sample, got -1"),
        (SINGLE, (2, 3), torch.tensor([156, 0], dtype=torch.uint8), ValueError, "got 156"),
        (SINGLE, (1, 2), torch.tensor([[NAN, 1.0]]), ValueError, "must be in 0..1, got nan"),
        (SINGLE, (1, 2), torch.tensor([[-100.0, 1.0]]), ValueError, "must be in 0..1, got -100"),
        (SINGLE, (1, 2), torch.tensor([[2.0, -1.0]]), ValueError, r"must be in 0\.\.1, got 2"),
        (REGRESSION, (2,), torch.zeros(2), ValueError, r"need logits \(B, num_classes\), the head returned \(2,\)"),
        (SINGLE, (2, 1), torch.tensor([0, 0]), ValueError, "at least 2 classes: with one class the loss is always 0"),
        (SINGLE, (2, 3, 4), torch.tensor([0, 1]), ValueError, r"integer classes \(2, 4\), got"),
        (
            MULTI,
            (2, 3),
            torch.tensor([0, 1]),
            ValueError,
            r"shape of logits \(2, 3\), got.*one number for each class",
        ),
        (MULTI, (1, 3), torch.tensor([[0, NOT_A_LABEL, 1]]), ValueError, "must be in 0..1, got -100"),
        (MULTI, (1, 3), torch.tensor([[0, 1.5, 1]]), ValueError, "must be in 0..1, got 1.5"),
        (MULTI, (1, 3), torch.tensor([[0, NAN, 1]]), ValueError, "must be in 0..1, got nan"),
        (MULTI, (1, 1), torch.tensor([[1j]]), TypeError, "can't be torch.complex64"),
        (REGRESSION, (2, 1), torch.tensor([0.5, -INF]), ValueError, "must be finite, got -inf"),
        (REGRESSION, (6, 3), torch.zeros(3, 6), ValueError, r"must have the shape of logits \(6, 3\), got"),
        (REGRESSION, (6, 3), torch.zeros(6), ValueError, r"must have the shape of logits \(6, 3\), got"),
        (REGRESSION, (2, 1), torch.zeros(2, device="meta"), ValueError, r"labels are on meta, the model on cpu"),
    ],
)
def test_labels_that_are_none_of_a_problems_are_refused(problem, shape, labels, error, message):
    with pytest.raises(error, match=message):
        check_labels(problem, torch.zeros(shape), labels)


@pytest.mark.parametrize("problem", [SINGLE, MULTI, REGRESSION])
def test_values_on_a_device_are_not_looked_at(problem):
    logits = torch.zeros(2, 3, device="meta")  # whoever looks gets an error
    check_labels(problem, logits, torch.zeros(2, 3, device="meta"))
    if problem == SINGLE:
        check_labels(problem, logits, torch.zeros(2, device="meta", dtype=torch.long))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64])
def test_labels_may_be_integers_of_any_width(dtype):
    logits, labels = torch.randn(3, 4), torch.tensor([3, 0, 1])
    check_labels(SINGLE, logits, labels.to(dtype))
    assert TASK_LOSSES[SINGLE](logits, labels.to(dtype)) == F.cross_entropy(logits, labels)
    ones = torch.eye(3, 4)
    check_labels(MULTI, logits, ones.to(dtype))
    assert TASK_LOSSES[MULTI](logits, ones.to(dtype)) == F.binary_cross_entropy_with_logits(logits, ones)
    with pytest.raises(ValueError, match=r"must be in 0..1, got 3"):
        check_labels(MULTI, logits, 3 * ones.to(torch.int64).to(dtype))


@pytest.mark.parametrize(
    ("problem", "labels", "settings", "autocast"),
    [
        (REGRESSION, torch.tensor([[1000.5, 2.0], [-3.1, 0.0]]), {}, True),
        (MULTI, torch.tensor([[0.3, 0.9], [0.7, 0.1]]), {}, True),
        (SINGLE, torch.tensor([[0.3, 0.7], [0.9, 0.1]]).half(), {"label_smoothing": 0.1}, False),
    ],
)
def test_a_loss_has_no_less_than_float32_whatever_logits_and_labels_have(problem, labels, settings, autocast):
    model = PromptTuned(make_bert(), 2, 2, dropout=0.0, problem_type=problem, **settings).float().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(make_text(2), labels)
    truth = TASK_LOSSES[problem](output.logits.double(), labels.double(), **settings)
    close(output.loss.double(), truth, 1e-6)
    output.loss.backward()


def test_probabilities_pixels_and_numbers_are_labels_too():
    logits = torch.randn(2, 3)
    probabilities = torch.rand(2, 3)
    check_labels(SINGLE, logits, probabilities)
    assert TASK_LOSSES[SINGLE](logits, probabilities) == F.cross_entropy(logits, probabilities)
    check_labels(SINGLE, torch.zeros(2, 3, 4, 5), torch.full((2, 4, 5), NOT_A_LABEL))
    check_labels(MULTI, logits, torch.tensor([[True, False, False]] * 2))
    check_labels(REGRESSION, torch.zeros(2, 1), torch.tensor([3, 4]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("joint", [False, True])
def test_where_no_sample_counts_the_loss_is_0_without_a_gradient(joint, smoothing):
    model = PromptTuned(make_bert(), 2, 3, dropout=0.0, label_smoothing=smoothing).double().train()
    if joint:
        model.use_joint_batch()
    text, labels = make_text(3), torch.full((3,), NOT_A_LABEL)
    loss = model(text, labels).loss
    loss.backward()
    assert loss == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)
    labels[1] = 2
    output = model(text, labels)
    close(output.loss, F.cross_entropy(output.logits[1:2], labels[1:2], label_smoothing=smoothing))


def test_what_can_not_be_looked_at_makes_the_loss_nan():
    loss = torch.compile(TASK_LOSSES[MULTI], fullgraph=True, backend="eager")
    logits, labels = torch.randn(2, 3), torch.tensor([[0, 1, 1], [0, 0, 0]])
    assert loss(logits, labels) == F.binary_cross_entropy_with_logits(logits, labels.float())
    labels[1, 1] = NOT_A_LABEL
    assert loss(logits, labels).isnan()


def test_a_forward_compiles_with_labels_and_looks_at_no_value():
    model = PromptTuned(make_bert(), 2, 3, dropout=0.0).double()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    text, labels = make_text(3), torch.tensor([2, NOT_A_LABEL, 0])
    close(compiled(text, labels).loss, model(text, labels).loss)


def test_gradients_of_single_samples_are_taken_with_labels():
    model = PromptTuned(make_bert(), 2, 3, dropout=0.0).double()
    ids, labels = make_text(3)["input_ids"], torch.tensor([2, 0, 1])
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, ids, label):
        return torch.func.functional_call(model, parameters, ({"input_ids": ids[None]}, label[None])).loss

    got = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, ids, labels)
    for index in range(3):
        close({name: g[index] for name, g in got.items()}, torch.func.grad(loss)(parameters, ids[index], labels[index]))


@pytest.mark.parametrize("joint", [False, True])
def test_label_smoothing_is_part_of_the_loss_and_of_a_save(joint, tmp_path):
    model = make_fusion(importance_weight=100.0, importance_threshold=0.0, dropout=0.0, noise_std=0.0)
    model.label_smoothing = 0.1
    if joint:
        model.train().use_joint_batch()
    labels = torch.tensor([0, 4, 2])
    output = model(make_text(3), make_images(3), labels)
    close(output.task_loss, F.cross_entropy(output.logits, labels, label_smoothing=0.1))
    close(output.loss, output.task_loss + 100 * output.importance_loss)
    model.save_pretrained(tmp_path)
    model.unwrap()
    main, side = model.main.encoder, model.complementary.main.encoder
    assert type(model).from_pretrained(tmp_path, main, side).label_smoothing == 0.1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"label_smoothing": 0.1, "problem_type": MULTI}, ValueError, "label_smoothing is for single_label_classification"),
        ({"label_smoothing": 1.1}, ValueError, "in 0..1, got 1.1"),
        ({"label_smoothing": True}, TypeError, "must be a number, got True"),
    ],
)
def test_a_smoothing_that_is_none_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        PromptTuned(nn.Linear(2, 2), 2, 3, **settings)
