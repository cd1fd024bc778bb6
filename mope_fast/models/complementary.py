"""One complementary side of a fusion model: the accepted feature sources, and how the feature is computed."""

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..encoders import PromptedEncoder
from ..modules import MoPEConfig, MoPELayer, PromptBank, PromptMapper
from ..modules.block_fusion import PromptFusion
from ..modules.prompts import check_input
from .prompting import Inputs
from .task import TaskModel


class FeatureSource(NamedTuple):
    """The source of one side's feature, as stored in a model."""

    path: str
    """Module path within the model."""
    value: nn.Module | Callable[..., Tensor] | None
    """A ``PromptTuned`` or ``FoldedModel``, another module, a function, or None where features are passed in."""
    trained: bool = False
    """For a module that is not a ``PromptTuned`` or ``FoldedModel``: whether its parameters are trained with the model."""

    @property
    def is_tuned(self) -> bool:
        """Return whether the source is a ``PromptTuned``."""
        return isinstance(self.value, TaskModel)

    @property
    def is_held(self) -> bool:
        """Return whether the source is a module that is kept frozen."""
        return isinstance(self.value, nn.Module) and not self.is_tuned and not self.trained

    def feature(self, inputs: Inputs, *, training: bool = False) -> Tensor:
        """Return psi_y (B, width): a prompted model's features, the result of a callable, or the inputs themselves.

        Raises:
            ValueError: ``training`` is set and a function's features depend on trainable parameters, which would not be saved.
        """
        value = self.value
        if value is None:
            return inputs
        if is_prompted_model(value):
            return value(inputs).features
        with torch.no_grad() if self.is_held else nullcontext():
            feature = value(**inputs) if isinstance(inputs, Mapping) else value(inputs)
        if training and not isinstance(value, nn.Module):
            _check_trains_nothing(self.path, inputs, feature)
        return feature

    def folded(self) -> nn.Module | Callable[..., Tensor] | None:
        """Return the source for inference: a tuned model folded, a trained module as a frozen copy, any other source shared."""
        if self.is_tuned:
            return self.value.fold()
        return copy.deepcopy(self.value).requires_grad_(False).eval() if self.trained else self.value


def check_holds_no_prompts(name: str, module: nn.Module) -> None:
    """Raise ValueError for a module that would be frozen although it contains trainable prompts."""
    kinds = (TaskModel, PromptBank, MoPELayer, PromptMapper, PromptFusion)
    for path, part in module.named_modules():
        if isinstance(part, kinds) and any(parameter.requires_grad for parameter in part.parameters()):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which would be held frozen, but has a {type(part).__name__} "
                f"{f'at {path!r} ' if path else ''}that is to be trained: pass the PromptTuned itself; or have the "
                'module trained, {"name": Side(module, trainable=True)}; if it is trained already, call .requires_grad_(False) '
                "on it first; or pass its features to forward, with complementary=None"
            )


def check_can_be_trained(name: str, module: object) -> None:
    """Raise TypeError or ValueError for a source that ``Side(..., trainable=True)`` does not support."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: trainable=True needs a module, got {type(module).__name__}, whose parameters would not be saved")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{name}: trainable=True, but no parameter of the {type(module).__name__} requires a gradient")
    for path, part in module.named_modules():
        if isinstance(part, PromptBank) and part.routes:
            raise ValueError(
                f"{name}: the {type(module).__name__} has routed prompts at {path!r}, whose importance loss would not be counted: "
                "train that model by itself, and pass a function that returns its features"
            )


def _check_trains_nothing(name: str, inputs: Inputs, feature: Tensor) -> None:
    if not getattr(feature, "requires_grad", False):
        return
    given = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
        raise ValueError(
            f"{name} is a function whose features require a gradient: parameters trained in it would not be saved. Call "
            ".requires_grad_(False) on its module; pass a PromptTuned, whose prompts are trained and saved; pass the module "
            'itself as {"name": Side(module, trainable=True)}; or train it yourself and pass its features to forward, with '
            "complementary=None"
        )


def is_prompted_model(complementary: object) -> bool:
    """Return whether it is a prompted model of this library, whose output has ``features``."""
    return isinstance(getattr(complementary, "main", None), PromptedEncoder)


def head_inputs(config: MoPEConfig, own: Tensor | tuple[Tensor, ...], cross: Tensor | None) -> list[Tensor | tuple[Tensor, ...]]:
    """Return the head's inputs: the feature (B, D) or maps, and psi_y (B, cross_dim) if ``config.head_inputs`` is "both"."""
    if config.head_inputs != "both":
        return [own]
    check_input("the complementary feature", cross, config.cross_dim, (own if isinstance(own, Tensor) else own[0]).shape[0])
    return [own, cross]


def batch_of(main: PromptedEncoder, main_inputs: Any) -> int | None:
    """Return the main side's number of samples, or None if its family can't tell."""
    return main.family.batch_size(main.family.keyword_arguments(main_inputs))
