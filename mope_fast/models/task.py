"""What trained models share: a head and its loss, optimiser groups, saving, checkpointing, giving encoders back."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders import PromptedEncoder
from . import checkpoint


def _regression_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape not in (logits.shape, logits.squeeze(-1).shape):
        raise ValueError(f"regression labels must have the shape of logits {tuple(logits.shape)}, got {tuple(labels.shape)}")
    return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))


TASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "single_label_classification": F.cross_entropy,
    "multi_label_classification": lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)),
    "regression": _regression_loss,
}


def check_head(num_classes: int | None, head: nn.Module | None, problem_type: str) -> None:
    """Raises ValueError for settings of a head that don't go together."""
    if problem_type not in TASK_LOSSES:
        raise ValueError(f"problem_type must be one of {list(TASK_LOSSES)}, got {problem_type!r}")
    if head is not None and num_classes is not None:
        raise ValueError("give num_classes for a linear head or head for one of your own, not both")
    if num_classes is not None and (not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1):
        raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")


def apply_head(head: nn.Module | None, features: Tensor) -> Tensor | None:
    """Logits, in the head's dtype; None without a head."""
    if head is None:
        return None
    return head(features.to(next((p.dtype for p in head.parameters() if p.is_floating_point()), features.dtype)))


def make_head(main: PromptedEncoder, num_classes: int | None, head: nn.Module | None) -> nn.Module | None:
    """The linear head, the given one, or None; raises ValueError if that is a part of the frozen encoder."""
    if num_classes is not None:
        return nn.Linear(main.feature_width, num_classes)
    check_is_trained(head, main)
    return head


def check_is_trained(head: nn.Module | None, frozen: nn.Module) -> None:
    """Raises ValueError for a head that shares parameters with a frozen encoder."""
    parameters = {id(parameter) for parameter in frozen.parameters()}
    if head is not None and any(id(parameter) in parameters for parameter in head.parameters()):
        raise ValueError("head is a part of the frozen encoder and would not be trained: pass copy.deepcopy(head)")


def prompted(encoder: nn.Module) -> PromptedEncoder:
    """The encoder wrapped, or itself if several models share it as a :class:`PromptedEncoder`."""
    return encoder if isinstance(encoder, PromptedEncoder) else PromptedEncoder(encoder)


class TaskModel(nn.Module, ABC):
    """A prompted encoder with a head. ``head`` and ``problem_type`` are set by the subclass, after :func:`check_head`."""

    head: nn.Module | None
    problem_type: str

    def task_loss(self, logits: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """None without labels."""
        if labels is None:
            return None
        if logits is None:
            raise ValueError(f"labels need a head: give num_classes or head to {type(self).__name__}")
        return TASK_LOSSES[self.problem_type](logits, labels)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What has to match when the trained parts are loaded; plain values."""

    def trained_state_dict(self) -> dict[str, Tensor]:
        """All that isn't a frozen encoder's."""
        frozen = tuple(f"{name}." for name in self.frozen_parts())
        return {key: value for key, value in self.state_dict().items() if not key.startswith(frozen)}

    def frozen_parts(self) -> list[str]:
        """Names of the modules that are held and not trained."""
        modules = self.named_modules(remove_duplicate=False)
        return [name for name, module in modules if isinstance(module, PromptedEncoder)]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Keep one layer's input in place of its activations, and compute layer and prompts again in the backward pass.

        It holds for all models that share the encoder. ``torch.compile`` needs
        ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.

        Args:
            gradient_checkpointing_kwargs: for transformers' Trainer; ``{"use_reentrant": False}`` is what is done.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True is not supported: with frozen encoders it would lose the prompts' gradients")
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, PromptedEncoder):
                module.gradient_checkpointing = value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Not possible: raises NotImplementedError."""
        raise NotImplementedError(
            f"{type(self).__name__} can't generate: prompts depend on the whole input and are seen by every token, so the encoder "
            "is not causal any more; it classifies (logits, features)"
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the trained parts only: ``mope_fast.json`` and a safetensors file beside it.

        Killed at any moment, the folder holds the old save or the new one, each whole.
        """
        checkpoint.save(path, self.trained_state_dict(), self.description())

    def _load(self, path: str | os.PathLike[str], description: dict[str, Any]) -> None:
        try:
            checkpoint.load(path, self, description)
        except BaseException:
            self.unwrap()
            raise
        self.eval()

    def _head_description(self) -> dict[str, Any]:
        weight = getattr(self.head, "weight", None)
        return {
            "head": None if self.head is None else type(self.head).__name__,
            "num_classes": None if weight is None else weight.shape[0],
            "problem_type": self.problem_type,
        }

    @abstractmethod
    def unwrap(self) -> Any:
        """Give the encoders back as they were; this model can't be used afterwards."""


def describe_encoder(encoder: PromptedEncoder) -> dict[str, Any]:
    """Family and widths."""
    return {"family": encoder.family.name, "widths": encoder.widths}
