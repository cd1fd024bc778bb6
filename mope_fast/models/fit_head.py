"""The head alone: trained in seconds on what it reads, before prompts are."""

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
    """Train a model's head alone, on what it reads while all else is as it is; then train the whole model.

    Encoders see each batch once, in eval mode and without gradient, and the head is trained on what it read of them: seconds, where
    epochs through the encoders take minutes. A fused model with ``head_inputs="both"`` so begins where a network on frozen features
    of both sides ends, and no head that knows nothing leads the first steps of the prompts (linear probing before fine-tuning,
    arXiv 2202.10054). By AdamW with a warm-up over a tenth of the steps and linear decay.

    Args:
        model: any of this library's with a head. Before it is compiled, or wrapped by DDP or FSDP; with several processes every one
            calls this with the same batches, and so has the same head.
        batches: keyword arguments of the model, with ``labels`` (B, ...). What the head reads of all of them is kept in memory.
        epochs: over the samples.
        lr, weight_decay: of AdamW.
        batch_size: of the head's steps; a last batch that is smaller is left out, where there are others.
        seed: of the order. Dropout in the head draws from torch's global generator.
        progress: show a bar.

    Returns:
        The mean loss of each epoch.

    Raises:
        TypeError: it is another model, or ``batches`` gives no dicts.
        ValueError: the model has no head, or one without trained parameters; there are no batches, or one has no labels.
        FloatingPointError: a loss was NaN or infinite.

    Example:
        >>> fit_head(model, loader)
        >>> for batch in loader: ...                            # as ever
    """
    if not isinstance(model, TaskModel):
        raise TypeError(f"fit_head takes a model of this library, neither compiled nor in DDP, got {type(model).__name__}")
    if model.head is None:
        raise ValueError(f"this {type(model).__name__} has no head to fit: give it num_classes or head")
    if model.problem_type == DENSE:
        raise ValueError("the head reads feature maps, of which too many would be kept: train it with the prompts")
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
    """:func:`fit_head` of any head on features (N, D) at hand, which it leaves in training mode.

    ``loss_of`` is called with logits and labels, ``each_epoch`` behind each epoch.
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
                    f"the head's loss became {losses[-1]}: look for inputs that aren't finite, or take a lower lr"
                )
            each_epoch()
    finally:
        head.train()
        optimizer.zero_grad()  # else the next loop's first step would have it
    return losses


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Warm-up over a tenth of the steps, then down to zero in a line; to be stepped after each step."""
    warm_up = max(1, steps // 10)
    return LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, max(0.0, (steps - step) / max(1, steps - warm_up))))


@contextmanager
def read_by(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what a head is called with in the block."""
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0].detach().clone()))
    try:
        yield read
    finally:
        hook.remove()


def _read(model: TaskModel, batches: Iterable[Mapping[str, Any]], progress: bool) -> tuple[Tensor, Tensor]:
    """What the head reads of all samples, and their labels."""
    labels: list[Tensor] = []
    with torch.no_grad(), evaluating(model), read_by(model.head) as read:
        for batch in tracked(batches, "features for the head", "batch", shown=progress):
            if not isinstance(batch, Mapping):
                raise TypeError(f"batches must give dicts of the model's keyword arguments, got {type(batch).__name__}")
            arguments = dict(batch)
            given = arguments.pop("labels", None)
            if given is None:
                raise ValueError(f"a batch has no labels, only {list(arguments)}: the head is fitted to them")
            model(**arguments)
            labels.append(given)
    if not labels:
        raise ValueError("batches gave none: it needs at least one (an iterator can be used only once)")
    features, targets = torch.cat(read), torch.cat(labels)
    if len(features) != len(targets):
        raise ValueError(f"the head read {len(features)} rows for {len(targets)} samples: it has to be called once a forward")
    return features, targets
