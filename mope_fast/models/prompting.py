"""A frozen encoder's forward with the prompts of a bank."""

from typing import Any

import torch
from torch import Tensor

from ..encoders import Encoded, PromptedEncoder
from ..modules import FoldedBank, PromptBank

Inputs = Tensor | dict[str, Any]


def run_prompted(
    encoder: PromptedEncoder,
    bank: PromptBank | FoldedBank | None,
    inputs: Inputs,
    cross: Tensor | None = None,
    *,
    feature_maps: bool = False,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """The feature (B, D), routing scores (N, B, K) or None, and feature maps; without gradient if there is no bank."""
    if bank is None:
        with torch.no_grad():
            encoded = encoder(inputs, feature_maps=feature_maps)
        return encoded.feature, None, encoded.feature_maps
    # a layer that is computed again projects its prompts again, in place of keeping them
    prompts = bank.prepare(cross, encoder.layers, encoder.dtype, ahead=not encoder.gradient_checkpointing)
    encoded = encoder(inputs, prompts, feature_maps=feature_maps)
    return encoded.feature, stacked_scores(encoded), encoded.feature_maps


def stacked_scores(encoded: Encoded) -> Tensor | None:
    """(N, B, K); None where no layer routes."""
    return torch.stack(encoded.scores) if encoded.scores and encoded.scores[0] is not None else None
