"""Quick training of the head alone on cached inputs, before the prompts are trained."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .._distributed import is_sharded
from .._modes import evaluating
from .._progress import tracked
from .task import DENSE, TaskModel


def fit_head(
    model: TaskModel,
    batches: Iterable[Mapping[str, Any]],
    *,
    epochs: int = 40,
    lr: float = 1e-3,
    weight_decay: float = 0.01,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> list[float]:
    """Train only a model's head on its current inputs, with everything else fixed; train the whole model afterwards.

    Encoders run once on each batch, in eval mode and without gradient, and the head is trained on its recorded inputs. This takes
    seconds, whereas epochs through the encoders take minutes. A fused model with ``head_inputs="both"`` then starts where a network
    on frozen features of both sides ends, and no untrained head leads the first steps of the prompts (linear probing before
    fine-tuning, arXiv 2202.10054). The optimiser is AdamW with a warm-up over a tenth of the steps and linear decay.

    Args:
        model: any model of this library with a head. Call this before the model is compiled, or wrapped by DDP or FSDP. With
            several processes every one must call this with the same batches, so that all have the same head.
        batches: keyword arguments of the model, with ``labels`` (B, ...). The head's inputs for all of them are kept in memory.
        epochs: number of passes over the samples.
        lr, weight_decay: learning rate and weight decay of AdamW.
        batch_size: number of samples per step of the head; a smaller last batch is left out unless it is the only one.
        seed: seed of the sample order. Dropout in the head draws from torch's global generator.
        progress: show a progress bar.

    Returns:
        The mean loss of each epoch.

    Raises:
        TypeError: the model is not one of this library, or ``batches`` doesn't yield dicts.
        ValueError: the model has no head, or one without trained parameters; there are no batches, or one has no labels.
        FloatingPointError: a loss was NaN or infinite.

    Examples:
        >>> fit_head(model, loader)
        >>> for batch in loader: ...                            # train as usual
    """
    if not isinstance(model, TaskModel):
        raise TypeError(f"fit_head takes a model of this library, neither compiled nor in DDP, got {type(model).__name__}")
    if model.head is None:
        raise ValueError(f"this {type(model).__name__} has no head to fit: create it with num_classes or head")
    if model.problem_type == DENSE:
        raise ValueError("the head reads feature maps, which are too large to keep in memory: train it with the prompts")
    if not any(parameter.requires_grad for parameter in model.head.parameters()):
        raise ValueError(f"the head, {type(model.head).__name__}, has no parameters to train")
    if any(is_sharded(parameter) for parameter in model.head.parameters()):
        raise ValueError("the head is sharded: call fit_head before fully_shard, with the same batches on every rank")
    features, labels = _read(model, batches, progress)
    with evaluating(model):
        return fit_on_features(
            model.head, features, labels, model.task_loss, epochs=epochs, lr=lr, weight_decay=weight_decay,
            batch_size=batch_size, seed=seed, progress=progress,
        )  # fmt: skip


@torch.enable_grad()
def fit_on_features(
    head: nn.Module,
    features: Tensor,
    labels: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    lr: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
    progress: bool,
    each_epoch: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train any head as :func:`fit_head` does, on given features (N, D); the head is left in training mode.

    ``loss_of`` is called with logits and labels, ``each_epoch`` after each epoch.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    count = max(1, len(labels) // batch_size)
    steps, generator = epochs * count, torch.Generator().manual_seed(seed)
    schedule = warm_up_and_decay(optimizer, steps)
    losses = []
    try:
        for _ in tracked(range(epochs), "fitting the head", "epoch", shown=progress):
            head.train()
            total = torch.zeros((), device=labels.device)
            for index in torch.randperm(len(labels), generator=generator).split(batch_size)[:count]:
                index = index.to(labels.device)
                loss = loss_of(head(features[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
            losses.append(total.item() / count)
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the head's loss became {losses[-1]}: look for inputs that aren't finite, or use a lower lr"
                )
            each_epoch()
    finally:
        head.train()
        optimizer.zero_grad()  # otherwise the next loop's first step would include this gradient
    return losses


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Build a schedule that warms up over a tenth of the steps and decays linearly to zero; step it after each optimiser step."""
    warm_up = max(1, steps // 10)
    return LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up))))


@contextmanager
def read_by(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first input of each call of a head within the block."""
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0].detach().clone()))
    try:
        yield read
    finally:
        hook.remove()


def _read(model: TaskModel, batches: Iterable[Mapping[str, Any]], progress: bool) -> tuple[Tensor, Tensor]:
    """Return the head's inputs for all samples, and their labels."""
    labels: list[Tensor] = []
    with torch.no_grad(), evaluating(model), read_by(model.head) as read:
        for batch in tracked(batches, "features for the head", "batch", shown=progress):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches must yield dicts of the model's keyword arguments, got {type(batch).__name__}")
            arguments = dict(batch)
            given = arguments.pop("labels", None)
            if given is None:
                raise ValueError(f"a batch has no labels, only {list(arguments)}: the head is fitted to them")
            model(**arguments)
            labels.append(given)
    if not labels:
        raise ValueError("batches is empty: it needs at least one batch (an iterator can be used only once)")
    features, targets = torch.cat(read), torch.cat(labels)
    if len(features) != len(targets):
        raise ValueError(f"the head read {len(features)} rows for {len(targets)} samples: it has to be called once per forward")
    return features, targets
