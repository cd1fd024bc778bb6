"""FewShotRecipe: training of MoPE-BAF on a few samples, with the meaning and source of each setting."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .._modes import evaluating
from .._progress import tracked
from .._settings import Settings, check_types, setting

Batch = Callable[[Tensor], Mapping[str, Any]]

_PAPER = "MoPE-BAF (arXiv 2403.11311), from a summary of it"
_VLMO = "VLMo's official fine-tuning default; not known of MoPE-BAF"
_OURS = "ours; not known of MoPE-BAF"
_READ_EVERY = 10
"""Steps between two reads of the loss; each read waits for the device."""


@dataclass(frozen=True, eq=False)
class FewShotRun:
    """Result of :meth:`FewShotRecipe.fit`.

    Attributes:
        losses: (steps,) float32 on the CPU, the loss of each step.
        best_accuracy: accuracy on dev of the model's final state; None without dev.
        best_step: step after which the model had that state; None without dev.
    """

    losses: Tensor
    best_accuracy: float | None = None
    best_step: int | None = None


@dataclass(kw_only=True, unsafe_hash=True)
class FewShotRecipe(Settings):
    """Settings of few-shot training; ``FewShotRecipe.describe()`` prints them with meaning and source.

    Raises:
        TypeError, ValueError: a setting has a wrong type or is out of range.

    Examples:
        >>> split = FewShotSplit(labels, shots=32, seed=0)
        >>> run = FewShotRecipe(evaluate_every=20).fit(model, batch, split.train, dev=split.dev)
        >>> classification_metrics(predict(model, batch, split.rest), labels[split.rest], num_classes=2)
    """

    lr: float = setting(3e-5, "peak learning rate", _PAPER)
    batch_size: int = setting(8, "samples per step", _PAPER)
    steps: int = setting(200, "total optimizer steps, whatever the size of the set", _PAPER)
    betas: tuple[float, float] = setting((0.9, 0.98), "AdamW's betas", _VLMO)
    eps: float = setting(1e-8, "AdamW's eps", _VLMO)
    weight_decay: float = setting(0.01, "AdamW's weight decay, not applied to biases and norms", _VLMO)
    warmup: float = setting(0.1, "share of the steps in which the rate rises from 0; then it falls linearly to 0", _VLMO)
    head_lr_multiplier: float = setting(1.0, "the head's rate is lr times this; VLMo has such a factor for its heads", _OURS)
    max_grad_norm: float | None = setting(None, "gradients are clipped to this norm; None: no clipping", _OURS)
    evaluate_every: int | None = setting(None, "steps between evaluations on dev; None: only after the last step", _OURS)

    def __post_init__(self):
        check_types(self)
        for name in (
            "lr",
            "batch_size",
            "steps",
            "eps",
            "weight_decay",
            "warmup",
            "head_lr_multiplier",
            "max_grad_norm",
            "evaluate_every",
        ):
            value, zero_is_fine = getattr(self, name), name in ("weight_decay", "warmup")
            if value is not None and (not (value >= 0 if zero_is_fine else value > 0) or not value < math.inf):
                raise ValueError(f"FewShotRecipe.{name} must be {'>= 0' if zero_is_fine else '> 0'} and finite, got {value}")
        numbers = isinstance(self.betas, (tuple, list)) and all(isinstance(beta, (int, float)) for beta in self.betas)
        if not numbers or len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"FewShotRecipe.betas must be two numbers in [0, 1), got {self.betas!r}")
        if self.warmup > 1:
            raise ValueError(f"FewShotRecipe.warmup is a share of the steps, at most 1, got {self.warmup}")

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Build AdamW over the parameters that require grad.

        A model's own ``parameter_groups(lr, weight_decay, head_lr_multiplier)`` decides which parameters decay and which are the
        head. Without this method, biases and parameters with less than two dimensions don't decay, and ``model.head``, if it
        exists, is the head.

        Raises:
            ValueError: nothing requires grad, or ``head_lr_multiplier`` isn't 1 and the model has no known head.
        """
        own = getattr(model, "parameter_groups", None)
        asked = {"lr": self.lr, "weight_decay": self.weight_decay, "head_lr_multiplier": self.head_lr_multiplier}
        if own is not None and asked.keys() <= inspect.signature(own).parameters.keys():
            groups = own(**asked)
        else:
            groups = self._parameter_groups(model)
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError(f"no parameter of {type(model).__name__} requires grad: there is nothing to train")
        return torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas), eps=self.eps, weight_decay=self.weight_decay)

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        head = getattr(model, "head", None)
        head = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        if not head and self.head_lr_multiplier != 1:
            raise ValueError(
                f"head_lr_multiplier is {self.head_lr_multiplier}, but {type(model).__name__} has no module named head: "
                "set it to 1, or give the model parameter_groups(lr, weight_decay, head_lr_multiplier)"
            )
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decays = parameter.dim() >= 2 and not name.endswith("bias")
                lr = self.lr * (self.head_lr_multiplier if id(parameter) in head else 1)
                groups.setdefault((lr, self.weight_decay if decays else 0.0), []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Build linear warm-up from 0 and linear decay to 0, to be stepped after each step: transformers' polynomial, power 1."""
        warm = int(self.warmup * self.steps)

        def factor(step: int) -> float:
            return step / warm if step < warm else max(0.0, (self.steps - step) / max(1, self.steps - warm))

        return LambdaLR(optimizer, factor)

    def fit(
        self,
        model: nn.Module,
        batch: Batch,
        index: Tensor | Sequence[int],
        *,
        dev: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> FewShotRun:
        """Train ``model`` in place and leave it in eval mode.

        ``index`` is reshuffled for each epoch and the epochs are concatenated, so that every step has a full batch. With ``dev``
        the model ends in the state with the best dev accuracy. The accuracy is measured after every ``evaluate_every`` steps and
        after the last step; among equal ones the latest wins. The host waits for the device only in every tenth step and in
        evaluations.

        Args:
            model: called as ``model(**batch(index))``; returns an output with a scalar ``loss`` and (B, C) ``logits``.
            batch: maps (B,) int64 indices to the model's keyword arguments, on its device, including ``labels`` (B,).
            index: (N,) integer indices of training samples, such as ``FewShotSplit.train``.
            dev: (M,) integer indices for model selection, such as ``FewShotSplit.dev``; None keeps the last state.
            seed: of the sample order. Dropout, noise and a new head draw from torch's global generator: call ``torch.manual_seed``
                too.
            progress: show a progress bar.

        Raises:
            TypeError: ``batch`` doesn't return a dict, the model returns no loss or logits, or indices are not integers.
            ValueError: there are no indices, ``evaluate_every`` is set without ``dev``, or nothing is trainable.
            FloatingPointError: a loss was NaN or infinite. It is detected within ten steps; the parameters are unusable by then.
        """
        index = _indices("index", index)
        if dev is not None:
            dev = _indices("dev", dev)
        elif self.evaluate_every is not None:
            raise ValueError(f"evaluate_every={self.evaluate_every} needs dev to evaluate on: pass dev, or set it to None")
        optimizer = self.optimizer(model)
        scheduler = self.schedule(optimizer)
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        losses, pending = torch.empty(0), []
        best: tuple[float, int] | None = None
        state: dict[str, Tensor] = {}
        bar = tracked(self._order(index, seed), "few-shot", "step", shown=progress)
        model.train()
        try:
            for step, chosen in enumerate(bar, 1):
                loss = _loss(model(**_arguments(batch, chosen)))
                optimizer.zero_grad()
                loss.backward()
                if self.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(trained, self.max_grad_norm)
                optimizer.step()
                scheduler.step()
                pending.append(loss.detach().float())
                evaluates = dev is not None and (step == self.steps or step % (self.evaluate_every or self.steps) == 0)
                if evaluates or step % _READ_EVERY == 0 or step == self.steps:
                    losses = torch.cat([losses, torch.stack(pending).cpu()])
                    pending.clear()
                    _check_finite(losses)
                    bar.set_postfix(loss=f"{losses[-1].item():.4f}", **({"dev": f"{best[0]:.4f}"} if best else {}))
                if evaluates:
                    accuracy = _accuracy(model, batch, dev, self.batch_size)
                    if best is None or accuracy >= best[0]:
                        best = (accuracy, step)
                        # no copy after the last step: that state is in the model itself
                        last = step == self.steps
                        state = {} if last else {name: t.detach().to("cpu", copy=True) for name, t in _trained(model)}
            with torch.no_grad():
                for name, tensor in _trained(model) if state else ():
                    tensor.copy_(state[name])
        finally:
            bar.close()
            model.eval()
        return FewShotRun(losses, *(best or ()))

    def _order(self, index: Tensor, seed: int) -> Sequence[Tensor]:
        """Return the indices of each step, ``batch_size`` of them."""
        generator = torch.Generator().manual_seed(seed)
        count = self.steps * self.batch_size
        epochs = [torch.randperm(len(index), generator=generator) for _ in range(-(-count // len(index)))]
        return index[torch.cat(epochs)[:count]].split(self.batch_size)


def predict(model: nn.Module, batch: Batch, index: Tensor | Sequence[int], batch_size: int = 64) -> Tensor:
    """Return logits (N, C) in the order of ``index``, without gradient; the model runs in eval mode and is never given ``labels``.

    Its training flags are restored afterwards.

    Args:
        model: called as ``model(**batch(index))`` without ``labels``; returns an output with (B, C) ``logits``.
        batch: maps (B,) int64 indices to the model's keyword arguments, on its device.
        index: (N,) integer indices.
        batch_size: samples per batch; the last batch may be smaller.

    Raises:
        TypeError: ``batch`` doesn't return a dict, the model returns no logits, or indices are not integers.
        ValueError: there are no indices, or ``batch_size`` < 1.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
    return _predict(model, batch, _indices("index", index), batch_size)[0]


def _predict(model: nn.Module, batch: Batch, index: Tensor, batch_size: int) -> tuple[Tensor, list[Tensor]]:
    """Return logits (N, C), and the labels of the batches that have them."""
    logits, labels = [], []
    with torch.inference_mode(), evaluating(model):
        for chosen in index.split(batch_size):
            arguments = dict(_arguments(batch, chosen))
            if (given := arguments.pop("labels", None)) is not None:
                labels.append(given)
            output = getattr(model(**arguments), "logits", None)
            if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != len(chosen):
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise TypeError(f"{type(model).__name__} must give logits ({len(chosen)}, C) for {len(chosen)} samples, got {got}")
            logits.append(output)
    # outside of inference_mode, so that the result can be used in training
    return torch.cat(logits), labels


def _accuracy(model: nn.Module, batch: Batch, index: Tensor, batch_size: int) -> float:
    logits, labels = _predict(model, batch, index, batch_size)
    if not labels or (truth := torch.cat(labels)).shape != logits.shape[:1]:
        got = tuple(truth.shape) if labels else None
        raise TypeError(f"batch(index) must give labels (B,) to evaluate on dev, got {got} for {len(index)} samples")
    return (logits.argmax(1) == truth).float().mean().item()


def _arguments(batch: Batch, index: Tensor) -> Mapping[str, Any]:
    arguments = batch(index)
    if not isinstance(arguments, Mapping):
        raise TypeError(f"batch(index) must give a dict of keyword arguments for the model, got {type(arguments).__name__}")
    return arguments


def _loss(output: object) -> Tensor:
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.dim():
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"the model must give an output with a scalar loss, got {got}: does batch(index) have labels?")
    return loss


def _check_finite(losses: Tensor) -> None:
    if not (finite := losses.isfinite()).all():
        step = int(finite.int().argmin())
        raise FloatingPointError(
            f"the loss was {losses[step].item()} in step {step + 1} and the model's parameters are unusable: create the model "
            "again, check that inputs are finite, and use a lower lr or max_grad_norm"
        )


def _trained(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    yield from model.named_buffers()


def _indices(name: str, index: Tensor | Sequence[int]) -> Tensor:
    """Return indices as int64 (N,)."""
    try:
        index = torch.as_tensor(index).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be (N,) integers, got {index!r:.80}") from error
    if index.dim() != 1 or not len(index):
        raise ValueError(f"{name} must be (N,) indices of at least one sample, got {tuple(index.shape)}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {index.dtype}")
    return index.long()
