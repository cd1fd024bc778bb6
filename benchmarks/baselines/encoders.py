"""Shared by all providers on one frozen encoder: the batch, the weights, and the plain encoder.

All have the same linear head. Encoders are always in eval mode, without dropout.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.baselines import models
from benchmarks.cases.end_to_end import CLASSES, Encoder, FusedCase, segmenting_head
from benchmarks.cases.models import TRAINING
from mope_fast import MoPEConfig, PromptBank
from mope_fast.encoders import family_of

FROZEN = "frozen"
"""The baseline: time and memory of the other providers are divided by its."""


@dataclass(frozen=True)
class Inputs(models.Inputs):
    """A batch with complementary features ``cross``, (B, cross_dim)."""

    cross: Tensor

    @classmethod
    def random(cls, case: FusedCase, device: torch.device) -> "Inputs":
        main = case.inputs(device)
        cross = torch.randn(case.batch, case.encoder.cross_dim, device=device)
        if case.dense:
            return cls(main, torch.randint(2, (case.batch, *next(iter(main.values())).shape[-2:]), device=device), cross)
        return cls(main, torch.randint(CLASSES, (case.batch,), device=device), cross)

    def to(self, dtype: torch.dtype) -> "Inputs":
        return dataclasses.replace(super().to(dtype), cross=self.cross.to(dtype))


@dataclass(frozen=True)
class Parts:
    """The weights that all providers share; ``of`` returns copies."""

    encoder: nn.Module
    bank: PromptBank
    head: nn.Module

    @classmethod
    def of(cls, case: FusedCase, device: torch.device, dtype: torch.dtype | None = None) -> "Parts":
        """Return the encoder in the case's dtype and trained parts in float32; all of them in ``dtype`` if one is given."""
        parts = copy.deepcopy(_random_parts(case.encoder, case.experts, case.length, case.dense))
        encoder = parts.encoder.to(device, case.dtype).requires_grad_(False).eval()
        modules = (encoder, parts.bank.to(device), parts.head.to(device))
        return cls(*(module if dtype is None else module.to(dtype) for module in modules))


@functools.lru_cache(maxsize=2)  # for the main and the complementary encoder
def _random_parts(encoder: Encoder, experts: int, length: int, dense: bool) -> Parts:
    torch.manual_seed(0)
    model = encoder.make()
    layers = family_of(model).layers(model)
    config = MoPEConfig(cross_dim=encoder.cross_dim, num_experts=experts, prompt_length=length, head_inputs="main")
    bank = PromptBank([layer.width for layer in layers], encoder.cross_dim, config)
    head = segmenting_head(layers[-1].width) if dense else nn.Linear(family_of(model).feature_width(model), CLASSES)
    return Parts(model, bank, head)


class FusedProvider(models.Provider):
    truth: str | None = FROZEN
    """The provider whose outputs it must reproduce up to rounding; None if there is none."""
    alone = False
    """True if it reproduces them only for a batch of one."""
    bank: PromptBank | None = None

    def is_random(self, mode: str) -> bool:
        """Return True if dropout or routing noise makes steps differ."""
        return mode == TRAINING and self.bank is not None

    @contextmanager
    def without_randomness(self) -> Iterator[None]:
        """Turn off dropout and routing noise."""
        if self.bank is None:
            yield
            return
        config = self.bank.config
        self.bank.config = dataclasses.replace(config, dropout=0.0, noise_std=0.0)
        try:
            yield
        finally:
            self.bank.config = config


class Plain(models.Headed, FusedProvider):
    """The encoder as its library runs it, and the head. Every parameter that requires grad is trained."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__(encoder, head)
        self.family = family_of(encoder)

    def features(self, inputs: Inputs) -> Tensor:
        return self.family.encode(self.model["encoder"], inputs.main)
