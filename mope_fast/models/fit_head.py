"""The head alone: trained in seconds on what it reads, before prompts are."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._modes import evaluating
from .._progress import tracked
from .task import TaskModel


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
        model: any of this library's with a head; not compiled yet.
        batches: keyword arguments of the model, with ``labels`` (B, ...). What the head reads of all of them is kept in memory.
        epochs: over the samples.
        lr, weight_decay: of AdamW.
        batch_size: of the head's steps; a last batch that is smaller is left out, where there are others.
        seed: of the order. Dropout in the head draws from torch's global generator.
        progress: show a bar.

    Returns:
        The mean loss of each epoch.

    Raises:
        TypeError: ``batches`` gives no dicts.
        ValueError: the model has no head, there are no batches, or one has no labels.
        FloatingPointError: a loss was NaN or infinite.

    Example:
        >>> fit_head(model, loader)
        >>> for batch in loader: ...                            # as ever
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if model.head is None:
        raise ValueError(f"this {type(model).__name__} has no head to fit: give it num_classes or head")
    features, labels = _read(model, batches, progress)
    parameters = [parameter for parameter in model.head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    count = max(1, len(labels) // batch_size)
    steps, generator = epochs * count, torch.Generator().manual_seed(seed)
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    losses = []
    with evaluating(model):
        model.head.train()
        for _ in tracked(range(epochs), "fitting the head", "epoch", shown=progress):
            total = torch.zeros((), device=labels.device)
            for index in torch.randperm(len(labels), generator=generator).split(batch_size)[:count]:
                index = index.to(labels.device)
                loss = model.task_loss(model.head(features[index]), labels[index])
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
    return losses


def _read(model: TaskModel, batches: Iterable[Mapping[str, Any]], progress: bool) -> tuple[Tensor, Tensor]:
    """What the head reads of all samples, and their labels."""
    read: list[Tensor] = []
    labels: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0].detach().clone()))
    try:
        with torch.no_grad(), evaluating(model):
            for batch in tracked(batches, "features for the head", "batch", shown=progress):
                if not isinstance(batch, Mapping):
                    raise TypeError(f"batches must give dicts of the model's keyword arguments, got {type(batch).__name__}")
                arguments = dict(batch)
                given = arguments.pop("labels", None)
                if given is None:
                    raise ValueError(f"a batch has no labels, only {list(arguments)}: the head is fitted to them")
                model(**arguments)
                labels.append(given)
    finally:
        hook.remove()
    if not labels:
        raise ValueError("batches gave none: it needs at least one (an iterator can be used only once)")
    return torch.cat(read), torch.cat(labels)
