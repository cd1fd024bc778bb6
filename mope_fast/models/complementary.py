"""One complementary side of a fusion: what may stand for it, and its feature."""

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
    """What gives the feature of one side, as a model holds it."""

    path: str
    """In the model."""
    value: nn.Module | Callable[..., Tensor] | None
    """A ``PromptTuned`` or ``FoldedModel``, another module, a function, or None where features are passed in."""
    trained: bool = False
    """Of another module: whether its parameters are the model's."""

    @property
    def is_tuned(self) -> bool:
        """Whether it is a ``PromptTuned``."""
        return isinstance(self.value, TaskModel)

    @property
    def is_held(self) -> bool:
        """Whether it is a module that is kept frozen."""
        return isinstance(self.value, nn.Module) and not self.is_tuned and not self.trained

    def feature(self, inputs: Inputs, *, training: bool = False) -> Tensor:
        """psi_y (B, width): a prompted model's features, what a callable gives, or the inputs themselves.

        Raises:
            ValueError: in training, a function's features depend on parameters that nobody would save.
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
        """For inference: folded, or a frozen copy of what is trained; what is held is shared."""
        if self.is_tuned:
            return self.value.fold()
        return copy.deepcopy(self.value).requires_grad_(False).eval() if self.trained else self.value


def check_holds_no_prompts(name: str, module: nn.Module) -> None:
    """Raises ValueError for a module that would be frozen with prompts in it that are to be trained."""
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
    """Raises TypeError or ValueError for what ``Side(..., trainable=True)`` can't be asked for."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: trainable=True is for a module, got {type(module).__name__}, whose parameters nobody would save")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{name}: trainable=True, but no parameter of the {type(module).__name__} asks for a gradient")
    for path, part in module.named_modules():
        if isinstance(part, PromptBank) and part.routes:
            raise ValueError(
                f"{name}: the {type(module).__name__} has routed prompts at {path!r}, whose importance loss would not be counted: "
                "train that model by itself, and pass a function of its features"
            )


def _check_trains_nothing(name: str, inputs: Inputs, feature: Tensor) -> None:
    if not getattr(feature, "requires_grad", False):
        return
    given = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
        raise ValueError(
            f"{name} is a function whose features ask for a gradient: what is trained in it would not be saved. Call "
            ".requires_grad_(False) on the module in it; pass a PromptTuned, whose prompts are trained and saved; pass the module "
            'itself as {"name": Side(module, trainable=True)}; or train it yourself and pass its features to forward, with '
            "complementary=None"
        )


def is_prompted_model(complementary: object) -> bool:
    """Whether it is a model of ours: its output has ``features``."""
    return isinstance(getattr(complementary, "main", None), PromptedEncoder)


def head_inputs(config: MoPEConfig, own: Tensor | tuple[Tensor, ...], cross: Tensor | None) -> list[Tensor | tuple[Tensor, ...]]:
    """What a fusion's head reads: its feature (B, D) or its maps, and (B, cross_dim) where ``config.head_inputs`` is "both"."""
    if config.head_inputs != "both":
        return [own]
    check_input("the complementary feature", cross, config.cross_dim, (own if isinstance(own, Tensor) else own[0]).shape[0])
    return [own, cross]


def batch_of(main: PromptedEncoder, main_inputs: Any) -> int | None:
    """How many samples the main side has, as far as its family knows."""
    return main.family.batch_size(main.family.keyword_arguments(main_inputs))
