from dataclasses import FrozenInstanceError, fields
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, get_polynomial_decay_schedule_with_warmup

from mope_fast import MoPEConfig, MoPEFusion
from mope_fast.data import FewShotRecipe, FewShotSplit, classification_metrics, predict, summarize

CLASSES, WIDTH = 2, 6
INPUTS, LABELS = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(60) % CLASSES
INPUTS[:, 0] += LABELS * 4 - 2


class Classifier(nn.Module):
    """Keeps which samples it saw, and in which mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.seen, self.modes, self.given = [], [], []

    def forward(self, x, index, labels=None):
        self.seen.append(index.tolist())
        self.modes.append(self.training)
        self.given.append(labels is not None)
        logits = self.head(self.norm(self.frozen(x)))
        return SimpleNamespace(logits=logits, loss=None if labels is None else nn.functional.cross_entropy(logits, labels))


def batch(index):
    return {"x": INPUTS[index], "index": index, "labels": LABELS[index]}


def make_recipe(**settings):
    return FewShotRecipe(**{"lr": 1e-2, "steps": 20, **settings})


def fit(model, index=range(24), recipe=None, **settings):
    return (recipe or make_recipe()).fit(model, batch, index, progress=False, **settings)


def test_defaults_and_their_sources():
    text = FewShotRecipe.describe().splitlines()
    assert len(text) == len(fields(FewShotRecipe))
    assert text[:3] == [
        "lr = 3e-05: peak learning rate [MoPE-BAF (arXiv 2403.11311), from a summary of it]",
        "batch_size = 8: samples per step [MoPE-BAF (arXiv 2403.11311), from a summary of it]",
        "steps = 200: total optimizer steps, whatever the size of the set [MoPE-BAF (arXiv 2403.11311), from a summary of it]",
    ]
    with pytest.raises(FrozenInstanceError):
        FewShotRecipe().lr = 1.0


@pytest.mark.parametrize(
    ("setting", "value", "error"),
    [
        ("lr", 0.0, ValueError),
        ("lr", float("nan"), ValueError),
        ("lr", float("inf"), ValueError),
        ("lr", "1e-3", TypeError),
        ("lr", True, TypeError),
        ("lr", None, TypeError),
        ("batch_size", 0, ValueError),
        ("batch_size", 8.0, TypeError),
        ("steps", 0, ValueError),
        ("betas", (0.9, 1.0), ValueError),
        ("betas", (0.9,), ValueError),
        ("betas", ("0.9", "0.98"), ValueError),
        ("betas", 0.9, ValueError),
        ("eps", 0.0, ValueError),
        ("weight_decay", -0.1, ValueError),
        ("warmup", 1.5, ValueError),
        ("warmup", -0.1, ValueError),
        ("head_lr_multiplier", 0.0, ValueError),
        ("max_grad_norm", 0.0, ValueError),
        ("evaluate_every", 0, ValueError),
    ],
)
def test_settings_out_of_range(setting, value, error):
    with pytest.raises(error, match=rf"FewShotRecipe.{setting} "):
        FewShotRecipe(**{setting: value})


def by_name(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_optimizer_groups_of_any_model():
    model = Classifier()
    model.stacked_bias = nn.Parameter(torch.zeros(2, 3))
    model.scale = nn.Parameter(torch.tensor(1.0))
    optimizer = make_recipe(head_lr_multiplier=50, weight_decay=0.3).optimizer(model)
    assert by_name(model, optimizer) == {
        "norm.weight": (1e-2, 0.0),
        "norm.bias": (1e-2, 0.0),
        "head.weight": (0.5, 0.3),
        "head.bias": (0.5, 0.0),
        "stacked_bias": (1e-2, 0.0),
        "scale": (1e-2, 0.0),
    }
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.98), 1e-8)


def test_a_models_own_groups_are_taken_if_they_fit():
    class Own(Classifier):
        def parameter_groups(self, lr, weight_decay, head_lr_multiplier):
            return [
                {"params": [self.head.weight], "lr": lr * head_lr_multiplier, "weight_decay": weight_decay},
                {"params": [], "lr": lr},
            ]

    class Other(Classifier):
        def parameter_groups(self, main_lr, weight_decay=0.1):
            raise AssertionError("not for this recipe")

    model, other, recipe = Own(), Other(), make_recipe(head_lr_multiplier=3)
    assert by_name(model, recipe.optimizer(model)) == {"head.weight": (3e-2, 0.01)}
    assert len(by_name(other, recipe.optimizer(other))) == 4


def test_nothing_to_train_or_no_head():
    with pytest.raises(ValueError, match="no parameter of Classifier requires grad"):
        make_recipe().optimizer(Classifier().requires_grad_(False))
    with pytest.raises(ValueError, match=r"head_lr_multiplier is 2\.0, but Linear has no module named head"):
        make_recipe(head_lr_multiplier=2.0).optimizer(nn.Linear(2, 2))


@pytest.mark.parametrize(("steps", "warmup"), [(200, 0.1), (7, 0.5), (5, 0.0), (5, 0.8), (1, 0.1)])
def test_schedule_is_transformers(steps, warmup):
    recipe = FewShotRecipe(steps=steps, warmup=warmup, lr=0.5)
    rates = []
    for oracle in (False, True):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
        if oracle:
            schedule = get_polynomial_decay_schedule_with_warmup(optimizer, int(warmup * steps), steps, lr_end=0.0, power=1.0)
        else:
            schedule = recipe.schedule(optimizer)
        rates.append([])
        for _ in range(steps + 1):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates[0] == pytest.approx(rates[1])


def test_warm_up_alone():
    factor = FewShotRecipe(steps=4, warmup=1.0).schedule(torch.optim.SGD([nn.Parameter(torch.ones(1))])).lr_lambdas[0]
    assert [factor(step) for step in range(5)] == [0, 0.25, 0.5, 0.75, 0]


def test_steps_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    model, twin = Classifier(), Classifier()
    twin.load_state_dict(model.state_dict())
    recipe = make_recipe(max_grad_norm=0.1)
    run = fit(model, recipe=recipe)
    optimizer = recipe.optimizer(twin)
    schedule = recipe.schedule(optimizer)
    losses = []
    for index in model.seen:
        loss = twin(**batch(torch.tensor(index))).loss
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(run.losses, torch.tensor(losses))
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    assert (run.best_accuracy, run.best_step) == (None, None)
    assert not model.training


@pytest.mark.parametrize("size", [1, 5, 8, 24])
def test_every_step_is_full_and_every_epoch_has_each_sample_once(size):
    model = Classifier()
    fit(model, range(30, 30 + size))
    assert [len(index) for index in model.seen] == [8] * 20
    seen = list(chain(*model.seen))
    epochs = [seen[start : start + size] for start in range(0, len(seen) - size + 1, size)]
    assert all(sorted(epoch) == list(range(30, 30 + size)) for epoch in epochs)
    assert size < 5 or len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_is_that_of_the_seed_whatever_the_global_generator():
    orders = []
    for seed in (1, 1, 2):
        model = Classifier()
        fit(model, seed=seed)
        orders.append(model.seen)
    assert orders[0] == orders[1] != orders[2]


class Scripted(nn.Module):
    """Right on dev as often as the script says; its parameter and buffer count the steps."""

    def __init__(self, script):
        super().__init__()
        self.script = iter(script)
        self.count = nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("hidden", torch.tensor(0), persistent=False)
        self.modes = []

    def forward(self, x, labels=None, index=None):
        self.modes.append(self.training)
        if self.training:
            self.steps += 1
            self.hidden += 1
            return SimpleNamespace(loss=self.count * -1.0, logits=None)
        right = torch.arange(len(x)) < next(self.script)
        return SimpleNamespace(
            loss=None, logits=nn.functional.one_hot(torch.where(right, LABELS[index], 1 - LABELS[index])).float()
        )


@pytest.mark.parametrize(
    ("script", "best_step", "accuracy"),
    [([3, 5, 4, 2], 6, 5 / 6), ([3, 5, 5, 2], 9, 5 / 6), ([6, 0, 0, 0], 3, 1.0), ([0, 0, 0, 0], 11, 0.0), ([0, 1, 2, 6], 11, 1.0)],
)
def test_ends_in_the_best_state_and_the_later_of_equal_ones(script, best_step, accuracy):
    model = Scripted(script)
    recipe = FewShotRecipe(lr=1.0, warmup=0.0, steps=11, evaluate_every=3, batch_size=6, weight_decay=0.0)
    run = fit(model, recipe=recipe, dev=range(6))
    assert (run.best_step, run.best_accuracy) == (best_step, pytest.approx(accuracy))
    assert model.steps == model.hidden == best_step
    # before step n the parameter had the value of the state after step n - 1
    values = (-run.losses).tolist()
    assert best_step == 11 or model.count.item() == values[best_step]
    assert model.modes == [*[*[True] * 3, False] * 3, True, True, False]
    assert not model.training


def test_dev_without_evaluate_every_is_measured_at_the_end():
    model = Classifier()
    run = fit(model, dev=range(24, 60))
    logits = predict(model, batch, range(24, 60))
    assert run.best_step == 20
    assert run.best_accuracy == pytest.approx(classification_metrics(logits, LABELS[24:], CLASSES)["accuracy"])


def test_learns_and_summarizes():
    metrics = []
    for seed in range(2):
        torch.manual_seed(seed)
        model, split = Classifier(), FewShotSplit(LABELS, shots=8, seed=seed)
        make_recipe(steps=60, evaluate_every=20).fit(model, batch, split.train, dev=split.dev, seed=seed, progress=False)
        metrics.append(classification_metrics(predict(model, batch, split.rest), LABELS[split.rest], CLASSES))
    assert summarize(metrics).mean["accuracy"] > 0.8


@pytest.mark.parametrize(("bad", "step"), [(3, 3), (10, 10), (11, 11), (20, 20)])
def test_a_loss_that_isnt_finite_stops_within_ten_steps(bad, step):
    model = Classifier()

    def spoiled(index):
        inputs = batch(index)
        return inputs | {"x": inputs["x"] * (float("nan") if len(model.seen) + 1 == bad else 1.0)}

    with pytest.raises(FloatingPointError, match=f"the loss was nan in step {step} and the model.s parameters are unusable"):
        make_recipe().fit(model, spoiled, range(24), progress=False)
    assert len(model.seen) <= bad + 9
    assert not model.training


def test_the_bar(capsys):
    make_recipe().fit(Classifier(), batch, range(24))
    assert "few-shot: 100%" in (shown := capsys.readouterr().err)
    assert "loss=" in shown
    fit(Classifier())
    assert not capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_predict_keeps_the_order_and_the_model(batch_size):
    model = Classifier()
    model.frozen.eval()
    index = torch.randperm(60)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = predict(model, batch, index, batch_size=batch_size)
    modes = [(m.training, name) for name, m in model.named_modules()]
    assert [mode for mode, name in modes if name != "frozen"] == [True, True, True]
    assert not model.frozen.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(model.modes)
    assert not any(model.given)
    assert list(chain(*model.seen)) == index.tolist()
    torch.testing.assert_close(logits, model.eval()(**batch(index)).logits.detach())
    # not an inference tensor: a distillation may train on it
    nn.Linear(CLASSES, 1)(logits).sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fit(m, []), ValueError, r"index must be \(N,\) indices of at least one sample, got \(0,\)"),
        (lambda m: fit(m, [[0, 1]]), ValueError, r"index must be \(N,\).*got \(1, 2\)"),
        (lambda m: fit(m, [0.5]), TypeError, r"index must be integers, got torch\.float32"),
        (lambda m: fit(m, LABELS > 0), TypeError, r"index must be integers, got torch\.bool"),
        (lambda m: fit(m, ["a"]), TypeError, r"index must be \(N,\) integers, got \['a'\]"),
        (lambda m: fit(m, dev=[]), ValueError, "dev must be"),
        (lambda m: fit(m, recipe=make_recipe(evaluate_every=5)), ValueError, "evaluate_every=5 needs dev"),
        (lambda m: make_recipe().fit(m, lambda i: (1, 2), [0]), TypeError, r"batch\(index\) must give a dict .* got tuple"),
        (
            lambda m: make_recipe().fit(m, lambda i: {"x": INPUTS[i], "index": i}, range(8)),
            TypeError,
            "must give an output with a scalar loss, got NoneType: does batch",
        ),
        (lambda m: predict(m, batch, []), ValueError, "index must be"),
        (lambda m: predict(m, batch, [0], batch_size=0), ValueError, "batch_size must be an integer >= 1, got 0"),
        (lambda m: predict(m, lambda i: None, [0]), TypeError, "must give a dict .* got NoneType"),
        (lambda m: predict(nn.Identity(), lambda i: {"input": INPUTS[i]}, [0]), TypeError, r"give logits \(1, C\) for 1 samples"),
    ],
)
def test_clear_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(Classifier())


def test_dev_needs_labels():
    class OwnLoss(Classifier):
        def forward(self, x, index, labels=None):
            return super().forward(x, index, LABELS[index])

    def unlabelled(index):
        return {"x": INPUTS[index], "index": index}

    with pytest.raises(TypeError, match=r"must give labels \(B,\) to evaluate on dev, got None for 6 samples"):
        make_recipe(steps=1).fit(OwnLoss(), unlabelled, range(8), dev=range(6), progress=False)


def test_a_fused_model_is_trained_and_its_encoder_is_not():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=50, max_position_embeddings=12, **sizes)
    model = MoPEFusion(BertModel(config), None, num_classes=CLASSES, config=MoPEConfig(num_experts=3, cross_dim=WIDTH))
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    ids = torch.randint(1, 50, (60, 7))

    def fused(index):
        return {"main_inputs": ids[index], "complementary_inputs": INPUTS[index], "labels": LABELS[index]}

    recipe = FewShotRecipe(lr=5e-3, steps=40, head_lr_multiplier=2.0, evaluate_every=8)
    run = recipe.fit(model, fused, range(32), dev=range(32, 60), progress=False)
    assert run.losses[-8:].mean() < run.losses[:8].mean()
    after = dict(model.named_parameters())
    assert frozen
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())
