"""The forward pass of a frozen encoder with the prompts of a bank."""

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
    **wanted: bool,
) -> Encoded:
    """Return the encoder's output, without gradient if there is no bank; ``wanted`` selects feature maps and tokens."""
    if bank is None:
        with torch.no_grad():
            return encoder(inputs, **wanted)
    # with gradient checkpointing each layer projects its prompts again instead of storing them
    prompts = bank.prepare(cross, encoder.layers, encoder.dtype, ahead=not encoder.gradient_checkpointing)
    return encoder(inputs, prompts, **wanted)


def stacked_scores(encoded: Encoded) -> Tensor | None:
    """Return routing scores (N, B, K); None if no layer routes."""
    return torch.stack(encoded.scores) if encoded.scores and encoded.scores[0] is not None else None
