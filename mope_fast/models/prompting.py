"""A bank as the source of an encoder's prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..encoders import Pool, PromptedEncoder, PromptedLayer
from ..modules import FoldedBank, PromptBank
from ..modules.folded import FoldedContext
from ..modules.prompts import PromptContext
from ..modules.rows import Prefix

Inputs = Tensor | dict[str, Any]


@dataclass  # not frozen: torch 2.11 can't compile a call of a frozen one
class BankPrompts:
    """One forward's prompts out of a bank, for :class:`PromptedEncoder`."""

    bank: PromptBank | FoldedBank
    context: PromptContext | FoldedContext
    layers: Sequence[PromptedLayer]

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a layer's prompts are random beyond what is in the context."""
        return self.bank.training and self.bank.config.dynamic_dropout > 0

    def __call__(self, index: int, hidden_states: Tensor, pool: Pool) -> tuple[Sequence[Prefix], Tensor | None]:
        # who doesn't route doesn't look: any token tells batch and dtype
        feature = pool(hidden_states) if self.bank.config.use_dynamic else hidden_states.flatten(1, -2)[:, 0]
        return self.bank.prefixes(index, self.layers[index], feature, self.context)


def run_prompted(
    encoder: PromptedEncoder, bank: PromptBank | FoldedBank | None, inputs: Inputs, cross: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The encoder's feature (B, D), and the routing scores (N, B, K) or None."""
    if bank is None:
        with torch.no_grad():
            return encoder(inputs)[0], None
    layers = encoder.layers
    if isinstance(bank, PromptBank):
        context = bank.prepare(cross, layers, encoder.dtype)
        if encoder.gradient_checkpointing:
            context.compute_shared()
    else:
        context = bank.prepare(cross)
    feature, scores = encoder(inputs, BankPrompts(bank, context, layers))
    return feature, torch.stack(scores) if bank.config.use_dynamic else None
