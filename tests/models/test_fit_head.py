"""The head alone."""

import copy

import pytest
import torch
from tiny_fusion import CLASSES, close, make_bert, make_fusion, make_images, make_text

from mope_fast import MoPEConfig, MoPEFusion, PromptTuned, fit_head


def batches(sizes=(16, 16, 9)):
    """Texts whose class is told by their first word, with pictures."""
    made = []
    for size in sizes:
        text, labels = make_text(size), torch.arange(size) % CLASSES
        text["input_ids"][:, 1] = 10 + labels
        text["attention_mask"][:, 1] = 1
        made.append({"main_inputs": text, "complementary_inputs": make_images(size), "labels": labels})
    return made


@pytest.mark.parametrize("settings", [{}, {"head_inputs": "main"}])
def test_it_learns_and_nothing_else_changes(settings):
    model, samples = make_fusion(**settings).train(), batches()
    before = copy.deepcopy(model.state_dict())
    losses = fit_head(model, samples, epochs=30, lr=1e-2, progress=False)
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.2
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert model.training, "modes are as before"
    assert not model.main.encoder.training
    assert all(parameter.grad is None for parameter in model.parameters()), "no gradient is left for the next step"


def test_the_head_is_fitted_to_what_it_reads_in_eval_mode():
    model, samples = make_fusion(head_inputs="both", dropout=0.5, noise_std=1.0).train(), batches((8, 4))
    read = []

    class Watching(torch.nn.Linear):
        def forward(self, x):
            read.append(x.detach().clone())
            return super().forward(x)

    model.head = Watching(model.head.in_features, CLASSES).double()
    fit_head(model, samples, epochs=1, batch_size=12, progress=False)
    *given, fitted = read
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fitted, torch.cat(given)[order])
    model.eval()
    close(given[0], torch.cat([model(**samples[0]).features, model.complementary_feature(samples[0]["complementary_inputs"])], 1))


def test_its_order_is_the_seeds():
    def fitted(seed):
        torch.manual_seed(0)
        model = make_fusion()
        torch.manual_seed(1)
        fit_head(model, batches(), epochs=2, seed=seed, progress=False)
        return model.head.weight

    assert torch.equal(fitted(0), fitted(0))
    assert not torch.equal(fitted(0), fitted(1))


def test_other_models_and_kinds_of_labels():
    tuned = PromptTuned(make_bert(), 2, 1, problem_type="regression").double()
    pairs = [{"inputs": make_text(6), "labels": torch.randn(6, dtype=torch.float64)} for _ in range(2)]
    assert fit_head(tuned, iter(pairs), epochs=3, progress=False)[0] > 0
    several = MoPEFusion(
        make_bert(), None, 3, MoPEConfig(cross_dim=4), head=None, problem_type="multi_label_classification"
    ).double()
    batch = {"main_inputs": make_text(6), "complementary_inputs": torch.randn(6, 4).double(), "labels": torch.ones(6, 3)}
    losses = fit_head(several, [batch], epochs=20, lr=1e-2, progress=False)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches is empty"),
        ({"batches": [torch.ones(2)]}, TypeError, "must yield dicts of the model's keyword arguments, got Tensor"),
        ({"batches": [{"main_inputs": make_text(2)}]}, ValueError, "a batch has no labels"),
        ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
        ({"lr": 1e30}, FloatingPointError, "the head's loss became"),
    ],
)
def test_what_can_not_be_fitted_is_refused(change, error, message):
    model = make_fusion()
    with pytest.raises(error, match=message):
        fit_head(model, **{"batches": batches((8, 8)), "progress": False, "batch_size": 8, **change})
    assert not model.training
    assert not model.head._forward_pre_hooks


def test_a_model_without_a_head_is_told():
    with pytest.raises(ValueError, match="this MoPEFusion has no head to fit: create it with num_classes or head"):
        fit_head(make_fusion(num_classes=None), batches(), progress=False)


def test_what_is_no_model_with_a_head_to_train_is_refused():
    compiled = torch.compile(make_fusion(), backend="eager")
    frozen = make_fusion()
    frozen.head.requires_grad_(False)
    twice = make_fusion(num_classes=None, head=Twice())
    for model, error, message in (
        (compiled, TypeError, "neither compiled nor in DDP, got OptimizedModule"),
        (torch.nn.Linear(2, 2), TypeError, "got Linear"),
        (frozen, ValueError, "the head, Linear, has no parameters to train"),
        (twice, ValueError, "read 32 rows for 16 samples"),
    ):
        with pytest.raises(error, match=message):
            fit_head(model, batches((8, 8)), progress=False)


class Twice(torch.nn.Linear):
    def __init__(self):
        super().__init__(32, CLASSES)

    def __call__(self, x):
        return super().__call__(super().__call__(x) @ self.weight)


def test_without_gradients_around_it_fits_too():
    model = make_fusion()
    with torch.no_grad():
        losses = fit_head(model, batches((8, 8)), epochs=2, progress=False)
    assert len(losses) == 2
