"""The training procedure, the same for every method of the study."""

import copy
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.study.data import Batches, Samples, Split, Task
from benchmarks.study.methods import METHODS, Majority, Model, Recipe
from mope_fast.analysis import record
from mope_fast.models.fit_head import fit_on_features, read_by, warm_up_and_decay

TEST_BATCH = 64
HEAD_LR = 1e-3
"""Learning rate when the head is trained alone."""


@dataclass(frozen=True)
class Routing:
    """Routing statistics over test samples, as fractions of log K (``mope_fast.analysis``)."""

    entropy: list[float]  # of each layer
    information: list[float]
    class_information: list[float]
    layer: int  # the layer with the largest class information
    class_names: tuple[str, ...]
    by_class: list[list[float]]  # that layer's mean scores (C, K), zeros for a class without test samples


@dataclass(frozen=True)
class Trained:
    """Results of a run, of the best epoch on dev, the latest of equal ones."""

    dev: float
    test: float | None
    """None if the test split was not used."""
    epoch: int  # from 1; 0 for the head alone
    losses: list[float]  # of each epoch
    trained_parameters: int
    step_ms: float  # the median
    seconds: float
    routing: Routing | None = None  # of the test samples


@torch.inference_mode()
def predict(model: Model, batches: Batches, samples: Samples) -> Tensor:
    """Predict class indices (n,) in the order of samples."""
    model.eval()
    predicted = torch.empty(len(samples), dtype=torch.long)
    for index in batches.in_order(samples, TEST_BATCH):
        predicted[index] = model(batches.batch(samples[index]))[0].argmax(-1)
    return predicted


def accuracy(model: Model, batches: Batches, samples: Samples) -> float:
    return (predict(model, batches, samples) == samples.labels).double().mean().item()


def tested(model: Model, batches: Batches, samples: Samples, class_names: tuple[str, ...]) -> tuple[float, Routing | None]:
    """Return the accuracy on the test split, which is used here only, and its routing statistics."""
    if model.routed is None:
        return accuracy(model, batches, samples), None
    with record(model.routed, top=1) as recorder:
        found = accuracy(model, batches, samples)
    informed = recorder.class_information
    layer = int(informed.argmax())
    lists = (values.tolist() for values in (recorder.entropy, recorder.information, informed))
    return found, Routing(*lists, layer, class_names, recorder.by_class[layer].nan_to_num().double().round(decimals=4).tolist())


def train_head(model: Model, batches: Batches, split: Split, recipe: Recipe, seed: int) -> float:
    """Train the head alone on its inputs from the untrained rest; keep its best epoch on dev and return that accuracy."""
    read = []
    for samples in (split.train, split.dev):
        with read_by(model.head) as rows:
            predict(model, batches, samples)
        features = torch.empty(len(samples), rows[0].shape[1])
        features[torch.cat(list(batches.in_order(samples, TEST_BATCH)))] = torch.cat(rows)
        read.append(features)
    best, kept = -1.0, {}

    @torch.inference_mode()
    def judge() -> None:
        nonlocal best, kept
        right = (model.head.eval()(read[1]).argmax(-1) == split.dev.labels).double().mean().item()
        if right >= best:
            best, kept = right, copy.deepcopy(model.head.state_dict())

    fit_on_features(
        model.head, read[0], split.train.labels, functools.partial(F.cross_entropy, label_smoothing=recipe.label_smoothing),
        epochs=recipe.head_epochs, lr=HEAD_LR, weight_decay=recipe.weight_decay, batch_size=recipe.batch_size, seed=seed,
        progress=False, each_epoch=judge,
    )  # fmt: skip
    model.head.load_state_dict(kept)
    return best


def train(
    task: Task,
    split: Split,
    name: str,
    main: str,
    recipe: Recipe,
    seed: int,
    *,
    test: bool,
    progress: Callable[[str], None] = lambda note: None,
) -> Trained:
    """Train a method and evaluate it on dev; with ``test`` also evaluate the state selected on dev on the test split."""
    start = time.perf_counter()
    if len(split.train) < recipe.batch_size:
        raise ValueError(f"{task.name} has {len(split.train)} training samples, fewer than a batch of {recipe.batch_size}")
    torch.manual_seed(seed)
    batches = Batches(task, split.train)
    model = METHODS[name].make(task, main, recipe)
    some = batches.in_order(split.train, TEST_BATCH)[::8]
    model.start(batches.batch(split.train[index]) for index in some)
    if isinstance(model, Majority):
        model.counts = split.train.labels.bincount(minlength=model.classes).float()
        dev, found = accuracy(model, batches, split.dev), accuracy(model, batches, split.test) if test else None
        return Trained(dev, found, 1, [], 0, 0.0, time.perf_counter() - start)
    head = list(model.head.parameters())
    own = {id(parameter) for parameter in head}
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
    groups = [{"params": head, "lr": recipe.head_lr}, *([{"params": others, "lr": recipe.lr}] if others else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    steps = recipe.epochs * (len(split.train) // recipe.batch_size)
    schedule = warm_up_and_decay(optimizer, steps)
    best, kept, epoch_kept, losses, times = -1.0, None, 0, [], []
    if recipe.head_epochs:
        best, kept = train_head(model, batches, split, recipe, seed), _state(model)
        progress(f"head alone, dev {100 * best:.1f} %")
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        total, count = torch.zeros(()), 0
        for index in batches.epoch(split.train, recipe.batch_size, generator):
            began = time.perf_counter()
            batch = batches.batch(split.train[index])
            logits, more = model(batch)
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=recipe.label_smoothing) + more
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*head, *others], 1.0)
            optimizer.step()
            schedule.step()
            total, count = total + loss.detach(), count + 1
            times.append(time.perf_counter() - began)
        losses.append((total / count).item())
        dev = accuracy(model, batches, split.dev)
        progress(f"epoch {epoch}/{recipe.epochs}, loss {losses[-1]:.3f}, dev {100 * dev:.1f} %")
        if dev >= best:
            best, epoch_kept, kept = dev, epoch, _state(model)
    _restore(model, kept)
    found, routing = tested(model, batches, split.test, task.class_names) if test else (None, None)
    parameters = sum(parameter.numel() for parameter in (*head, *others))
    step_ms, seconds = statistics.median(times) * 1e3, time.perf_counter() - start
    return Trained(best, found, epoch_kept, losses, parameters, step_ms, seconds, routing)


def _own(model: Model) -> dict[str, Tensor]:
    """Return the tensors that training changes: parameters that require grad, and buffers of norms."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _state(model: Model) -> dict[str, Tensor]:
    return copy.deepcopy({name: value.detach() for name, value in _own(model).items()})


def _restore(model: Model, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in _own(model).items():
            value.copy_(state[name])
