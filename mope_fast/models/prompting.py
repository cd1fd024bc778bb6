"""A bank as the source of an encoder's prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..encoders import Pool, PromptedEncoder, PromptedLayer
from ..modules import FoldedBank, PromptBank
from ..modules.rows import Prefix

Inputs = Tensor | dict[str, Any]


class Bank(Protocol):
    """:class:`PromptBank`, :class:`FoldedBank`, or another source of prefixes."""

    routes: bool

    def prefixes(self, index: int, layer: PromptedLayer, feature: Tensor, context: Any) -> tuple[Sequence[Prefix], Tensor | None]:
        """See :meth:`PromptBank.prefixes`."""


@dataclass  # not frozen: torch 2.11 can't compile a call of a frozen one
class BankPrompts:
    """One forward's prompts out of a bank, for :class:`PromptedEncoder`."""

    bank: Bank
    context: Any
    layers: Sequence[PromptedLayer]

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a layer's prompts are random beyond what is in the context."""
        return getattr(self.bank, "draws_random_numbers", False)

    def __call__(self, index: int, hidden_states: Tensor, pool: Pool) -> tuple[Sequence[Prefix], Tensor | None]:
        # who doesn't route doesn't look: any token tells batch and dtype
        feature = pool(hidden_states) if self.bank.routes else hidden_states.flatten(1, -2)[:, 0]
        return self.bank.prefixes(index, self.layers[index], feature, self.context)


class Run(NamedTuple):
    """One forward of a prompted encoder."""

    features: Tensor
    """(B, D)"""
    scores: Tensor | None
    """(N, B, K)"""
    feature_maps: tuple[Tensor, ...] | None


def run_prompted(
    encoder: PromptedEncoder,
    bank: PromptBank | FoldedBank | None,
    inputs: Inputs,
    cross: Tensor | None = None,
    *,
    feature_maps: bool = False,
) -> Run:
    """An encoder's forward with a bank's prompts; without gradient if there is none."""
    if bank is None:
        with torch.no_grad():
            encoded = encoder(inputs, feature_maps=feature_maps)
        return Run(encoded.feature, None, encoded.feature_maps)
    layers = encoder.layers
    if isinstance(bank, PromptBank):
        context = bank.prepare(cross, layers, encoder.dtype)
        if encoder.gradient_checkpointing:
            context.compute_shared()
    else:
        context = bank.prepare(cross)
    encoded = encoder(inputs, BankPrompts(bank, context, layers), feature_maps=feature_maps)
    return Run(encoded.feature, torch.stack(encoded.scores) if bank.routes else None, encoded.feature_maps)
