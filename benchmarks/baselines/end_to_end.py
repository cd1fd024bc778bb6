"""Providers on one frozen encoder: the encoder alone, MoPE in several forms, and other tuning methods."""

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import models
from benchmarks.baselines.encoders import FROZEN, FusedProvider, Inputs, Parts, Plain
from benchmarks.baselines.models import compile_model, is_compiled
from benchmarks.baselines.paper_literal import PaperLiteral, PaperLiteralInWindows
from benchmarks.baselines.prompt_tokens import DeepTokens, DeepTokensInWindows, RoutedTokens, RoutedTokensInWindows
from benchmarks.cases.end_to_end import SIDES, FusedCase
from benchmarks.cases.models import INFERENCE, MODES, TRAINING
from mope_fast import MoPEFusion
from mope_fast.models import segmentation_loss
from mope_fast.models.folded import FoldedModel

FROZEN_WITH_SDPA = "frozen-sdpa"
"""For encoders that don't use SDPA by default."""
PAPER_LITERAL = "paper-literal"
Make = Callable[[Parts, FusedCase, str], FusedProvider]
"""Makes a provider from its own copy of the weights, for a case and mode."""


class Frozen(Plain):
    """The frozen encoder. Gradients flow from the head through every layer down to the embedding, but to no encoder weight."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__(encoder, head)
        self.start = models.EmbeddingGradient(self.family.layers(encoder)[0].module)

    def trained(self) -> dict[str, Tensor]:
        return {**self.parameters, "embedding": self.start.embedding}


class FrozenSegmenting(Frozen):
    """A timm ViT with SETR's head on its patches."""

    def __init__(self, encoder: nn.Module, head: nn.Module, mode: str):
        super().__init__(encoder, head.train(mode == TRAINING))

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        encoder, head = self.model["encoder"], self.model["head"]
        patches = encoder.forward_features(**inputs.main)[:, encoder.num_prefix_tokens :]
        side = math.isqrt(patches.shape[1])
        logits = head([patches.transpose(1, 2).unflatten(2, (side, side)).to(head.weight.dtype)])
        return logits, segmentation_loss(logits, inputs.labels) if training else None


class CompiledFrozen(Plain):
    """The frozen encoder, compiled."""

    def __init__(self, encoder: nn.Module, head: nn.Module, mode: str):
        super().__init__(encoder, head)
        first = self.family.layers(encoder)[0]
        if mode == TRAINING:
            self.model.anchor = models.anchored(first.module, first.width, next(encoder.parameters()))
        self.logits_and_loss = compile_model(super().logits_and_loss)


def _frozen(parts: Parts, case: FusedCase, mode: str) -> Frozen:
    return FrozenSegmenting(parts.encoder, parts.head, mode) if case.dense else Frozen(parts.encoder, parts.head)


def _frozen_with_sdpa(parts: Parts, case: FusedCase, mode: str) -> Frozen:
    """Enable SDPA for timm's window attention, which has it off by default."""
    for module in parts.encoder.modules():
        if hasattr(module, "relative_position_bias_table"):
            module.fused_attn = True
    return Frozen(parts.encoder, parts.head)


class HeadOnly(Plain):
    """The encoder without gradient: nothing flows back into it, so it solves a smaller task than the other providers."""

    def features(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return super().features(inputs)


class Fused(FusedProvider):
    """``MoPEFusion`` with precomputed features of the complementary side."""

    def __init__(self, model: MoPEFusion, mode: str, compiled: bool = False):
        self.model, self.bank = model.train(mode == TRAINING), model.bank
        self.truth = "mope_fast" if model.is_dense else "concatenated"
        self.run = compile_model(model) if compiled else model

    @classmethod
    def of(cls, parts: Parts, mode: str, **settings: Any) -> "Fused":
        task = {} if isinstance(parts.head, nn.Linear) else {"problem_type": "segmentation"}
        model = MoPEFusion(parts.encoder, None, None, parts.bank.config, head=parts.head, **task).to(parts.head.weight.device)
        model.bank.load_state_dict(parts.bank.state_dict())
        return cls(model, mode, **settings)

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        output = self.run(inputs.main, inputs.cross, inputs.labels if training else None)
        return output.logits, output.loss


class Folded(FusedProvider):
    """``MoPEFusion.fold()``, for inference."""

    def __init__(self, model: FoldedModel, compiled: bool = False):
        self.model, self.truth = model, "mope_fast" if model.is_dense else "concatenated"
        self.run = compile_model(model) if compiled else model

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        return self.run(inputs.main, inputs.cross).logits, None


class Side(Plain):
    """A complementary encoder of a usual size, alone and without gradient: the cost that it would add to a fused model."""

    truth = None

    def __init__(self, case: FusedCase, device: torch.device):
        case = dataclasses.replace(case, encoder=SIDES[case.encoder.side])
        parts = Parts.of(case, device)
        super().__init__(parts.encoder, parts.head)
        self.inputs = Inputs.random(case, device)

    def step(self, inputs: Inputs, mode: str) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"features": self.features(self.inputs)}


def _tokens(plain: Callable[[Parts, str], FusedProvider], in_windows: Callable[[Parts, str], FusedProvider]) -> Make:
    """Select one of two providers by the encoder's attention: plain or in windows."""
    return lambda parts, case, mode: (in_windows if case.encoder.window else plain)(parts, mode)


def _lora(parts: Parts, case: FusedCase, mode: str) -> FusedProvider:
    """LoRA of rank 8, not merged, in the encoder's dtype. If q, k and v are one projection, one adapter serves all three."""
    from peft import LoraConfig, inject_adapter_in_model

    provider = Plain(parts.encoder, parts.head)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=list(case.encoder.lora)), parts.encoder)
    parts.encoder.to(parts.head.weight.device, case.dtype).eval()
    return provider


def _full(parts: Parts, case: FusedCase, mode: str) -> FusedProvider:
    for name, parameter in parts.encoder.named_parameters():
        # Whisper's positions are fixed sinusoids
        parameter.requires_grad_("embed_positions" not in name)
    return Plain(parts.encoder, parts.head)


def _checkpointed(parts: Parts, case: FusedCase, mode: str) -> FusedProvider:
    provider = Fused.of(parts, mode)
    provider.model.gradient_checkpointing_enable()
    return provider


PROVIDERS: dict[str, tuple[Sequence[str], Make]] = {
    FROZEN: (MODES, _frozen),
    "frozen-compiled": (MODES, lambda parts, case, mode: CompiledFrozen(parts.encoder, parts.head, mode)),
    FROZEN_WITH_SDPA: (MODES, _frozen_with_sdpa),
    PAPER_LITERAL: (MODES, _tokens(PaperLiteral, PaperLiteralInWindows)),
    "concatenated": (MODES, _tokens(RoutedTokens, RoutedTokensInWindows)),
    "mope_fast": (MODES, lambda parts, case, mode: Fused.of(parts, mode)),
    "mope_fast-compiled": (MODES, lambda parts, case, mode: Fused.of(parts, mode, compiled=True)),
    "folded": ((INFERENCE,), lambda parts, case, mode: Folded(Fused.of(parts, mode).model.fold())),
    "folded-compiled": ((INFERENCE,), lambda parts, case, mode: Folded(Fused.of(parts, mode).model.fold(), compiled=True)),
    "checkpointed": ((TRAINING,), _checkpointed),
    "head-only": ((TRAINING,), lambda parts, case, mode: HeadOnly(parts.encoder, parts.head)),
    "vpt-deep": (MODES, _tokens(DeepTokens, DeepTokensInWindows)),
    "lora": (MODES, _lora),
    "full": ((TRAINING,), _full),
    "side": (MODES, lambda parts, case, mode: Side(case, parts.head.weight.device)),
}
"""Provider -> (modes in which it makes sense, function that makes it)."""
SEGMENTING = (FROZEN, "mope_fast", "folded")
"""Providers that are measured with a segmenting head."""
OURS = ("mope_fast", "mope_fast-compiled", "folded", "folded-compiled", "checkpointed")


def build(name: str, case: FusedCase, device: torch.device, mode: str, dtype: torch.dtype | None = None) -> FusedProvider:
    """Build a provider; ``dtype`` as for :meth:`Parts.of`. Compiled providers are cached for the case's other timing."""
    if is_compiled(name):
        return _build_compiled(name, case, device, mode)
    return PROVIDERS[name][1](Parts.of(case, device, dtype), case, mode)


@functools.lru_cache(maxsize=3)
def _build_compiled(name: str, case: FusedCase, device: torch.device, mode: str) -> FusedProvider:
    return PROVIDERS[name][1](Parts.of(case, device), case, mode)


def why_not(name: str, case: FusedCase, device: torch.device, smoke: bool) -> str | None:
    """Return why a provider isn't measured here; None if it is."""
    side = SIDES[case.encoder.side].library
    for library in (case.encoder.library, *(["peft"] if name == "lora" else []), *([side] if name == "side" else [])):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
    return None
