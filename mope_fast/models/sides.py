"""The complementary side of a fusion."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..encoders import PromptedEncoder
from .prompting import Inputs


def complementary_feature(complementary: nn.Module | Callable[..., Tensor] | None, inputs: Inputs | None) -> Tensor:
    """psi_y (B, cross_dim): a prompted model's features, what a callable gives, or the inputs themselves.

    Raises:
        ValueError: there are no inputs.
    """
    if inputs is None:
        raise ValueError("complementary_inputs is None, but the prompts depend on the complementary modality")
    if complementary is None:
        return inputs
    if is_prompted_model(complementary):
        return complementary(inputs).features
    # a black-box module is frozen; a plain function may train parameters of its own
    with torch.no_grad() if isinstance(complementary, nn.Module) else nullcontext():
        return complementary(**inputs) if isinstance(inputs, Mapping) else complementary(inputs)


def is_prompted_model(complementary: object) -> bool:
    """Whether it is a model of ours: its output has ``features``."""
    return isinstance(getattr(complementary, "main", None), PromptedEncoder)


def check_same_batch(main: PromptedEncoder, main_inputs: Inputs, cross: Tensor) -> None:
    """Raises ValueError if the two sides have different numbers of samples, or none."""
    batch = main.family.batch_size(main.family.keyword_arguments(main_inputs))
    if isinstance(cross, Tensor) and cross.dim() and batch is not None and cross.shape[0] != batch:
        raise ValueError(f"the two sides differ in batch length: main has {batch} samples, complementary {cross.shape[0]}")
