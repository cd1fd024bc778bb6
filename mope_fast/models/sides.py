"""The complementary side of a fusion."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..encoders import PromptedEncoder
from ..modules import MoPEConfig, MoPELayer, PromptBank, PromptMapper
from ..modules.block_fusion import PromptFusion
from ..modules.prompts import check_input
from .prompting import Inputs
from .task import TaskModel


def complementary_feature(complementary: nn.Module | Callable[..., Tensor] | None, inputs: Inputs | None) -> Tensor:
    """psi_y (B, cross_dim): a prompted model's features, what a callable gives, or the inputs themselves.

    Raises:
        ValueError: there are no inputs.
    """
    if inputs is None:
        raise ValueError(
            "complementary_inputs is None, but prompts or head depend on the complementary modality; if transformers' Trainer has "
            "dropped its columns: remove_unused_columns=False"
        )
    if complementary is None:
        return inputs
    if is_prompted_model(complementary):
        return complementary(inputs).features
    with torch.no_grad() if isinstance(complementary, nn.Module) else nullcontext():
        return complementary(**inputs) if isinstance(inputs, Mapping) else complementary(inputs)


def check_holds_no_prompts(complementary: nn.Module) -> None:
    """Raises ValueError for a module that would be frozen with prompts in it that are to be trained."""
    kinds = (TaskModel, PromptBank, MoPELayer, PromptMapper, PromptFusion)
    for name, part in complementary.named_modules():
        if isinstance(part, kinds) and any(parameter.requires_grad for parameter in part.parameters()):
            raise ValueError(
                f"complementary is a {type(complementary).__name__}, which would be held frozen, but has a {type(part).__name__} "
                f"{f'at {name!r} ' if name else ''}that is to be trained: pass the PromptTuned itself as complementary; if "
                "it is trained already, call .requires_grad_(False) on it first; or pass its features to forward, with "
                "complementary=None"
            )


def check_trains_nothing(complementary: object, inputs: Inputs, feature: Tensor) -> None:
    """Raises ValueError for a function whose features depend on parameters that nobody would save."""
    if complementary is None or isinstance(complementary, nn.Module) or not getattr(feature, "requires_grad", False):
        return
    given = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
        raise ValueError(
            "complementary is a function whose features ask for a gradient: what is trained in it would not be saved. Call "
            ".requires_grad_(False) on the module in it; pass a PromptTuned, whose prompts are trained and saved; or train it "
            "yourself and pass its features to forward, with complementary=None"
        )


def is_prompted_model(complementary: object) -> bool:
    """Whether it is a model of ours: its output has ``features``."""
    return isinstance(getattr(complementary, "main", None), PromptedEncoder)


def head_inputs(config: MoPEConfig, features: Tensor, cross: Tensor | None) -> list[Tensor]:
    """What a fusion's head reads, side by side: (B, D), and (B, cross_dim) where ``config.head_inputs`` is "both"."""
    if config.head_inputs != "both":
        return [features]
    check_input("the complementary feature", cross, config.cross_dim, features.shape[0])
    return [features, cross]


def check_same_batch(main: PromptedEncoder, main_inputs: Inputs, cross: Tensor) -> None:
    """Raises ValueError if the two sides have different numbers of samples, or none."""
    batch = main.family.batch_size(main.family.keyword_arguments(main_inputs))
    if isinstance(cross, Tensor) and cross.dim() and batch is not None and cross.shape[0] != batch:
        raise ValueError(f"the two sides differ in batch length: main has {batch} samples, complementary {cross.shape[0]}")
