"""What can be done with one frozen encoder: run it, fuse it by MoPE in several forms, tune it otherwise.

All have the same weights and the same linear head. Encoders are in eval mode always: they have no dropout.
"""

import copy
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import models
from benchmarks.baselines.models import compile_model, is_compiled
from benchmarks.cases.fused_encoders import CLASSES, SIDES, Encoder, FusedCase
from benchmarks.cases.models import INFERENCE, MODES, TRAINING
from mope_fast import MoPEConfig, MoPEFusion, PromptBank, reference
from mope_fast.encoders import family_of
from mope_fast.models.folded import FoldedModel

FROZEN = "frozen"
"""What the others' time and memory are divided by."""
FROZEN_WITH_SDPA = "frozen-sdpa"
"""Where it isn't so without being asked."""


@dataclass(frozen=True)
class Inputs(models.Inputs):
    """With the complementary features."""

    cross: Tensor

    @classmethod
    def random(cls, case: FusedCase, device: torch.device) -> "Inputs":
        main = case.inputs(device)
        cross = torch.randn(case.batch, case.encoder.cross_dim, device=device)
        return cls(main, torch.randint(CLASSES, (case.batch,), device=device), cross)

    def to(self, dtype: torch.dtype) -> "Inputs":
        return dataclasses.replace(super().to(dtype), cross=self.cross.to(dtype))


@dataclass(frozen=True)
class Parts:
    """The weights that all providers share: ``of`` gives copies."""

    encoder: nn.Module
    bank: PromptBank
    head: nn.Module

    @classmethod
    def of(cls, case: FusedCase, device: torch.device, dtype: torch.dtype | None = None) -> "Parts":
        """The encoder as the case has it and trained parts in float32; all of them in ``dtype`` if one is given."""
        parts = copy.deepcopy(_random_parts(case.encoder))
        encoder = parts.encoder.to(device, case.dtype).requires_grad_(False).eval()
        modules = (encoder, parts.bank.to(device), parts.head.to(device))
        return cls(*(module if dtype is None else module.to(dtype) for module in modules))


@functools.lru_cache(maxsize=2)  # the main encoder and its complementary one
def _random_parts(encoder: Encoder) -> Parts:
    torch.manual_seed(0)
    model = encoder.make()
    layers = family_of(model).layers(model)
    config = MoPEConfig(cross_dim=encoder.cross_dim)
    bank = PromptBank([layer.width for layer in layers], encoder.cross_dim, config)
    return Parts(model, bank, nn.Linear(family_of(model).feature_width(model), CLASSES))


class FusedProvider(models.Provider):
    truth: str | None = FROZEN
    """The provider whose numbers it has to give, to rounding; None if it has none to give."""
    bank: PromptBank | None = None

    @contextmanager
    def without_randomness(self) -> Iterator[None]:
        """Dropout and routing noise off."""
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
    """The encoder as its library runs it, and the head. As it is, what trains is what requires a gradient."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__(encoder, head)
        self.family = family_of(encoder)

    def features(self, inputs: Inputs) -> Tensor:
        return self.family.encode(self.model["encoder"], inputs.main)


class Frozen(Plain):
    """Gradients go from the head through every layer down to the embedding, and to no weight of the encoder."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        super().__init__(encoder, head)
        self.start = models.EmbeddingGradient(self.family.layers(encoder)[0].module)

    def trained(self) -> dict[str, Tensor]:
        return {**self.parameters, "embedding": self.start.embedding}


class CompiledFrozen(Plain):
    """The same, compiled."""

    def __init__(self, encoder: nn.Module, head: nn.Module, mode: str):
        super().__init__(encoder, head)
        first = self.family.layers(encoder)[0]
        if mode == TRAINING:
            self.model.anchor = models.anchored(first.module, first.width, next(encoder.parameters()))
        self.logits_and_loss = compile_model(super().logits_and_loss)


def _frozen_with_sdpa(parts: "Parts", case: FusedCase, mode: str) -> Frozen:
    """timm has the switch, and leaves it off for attention in windows."""
    for module in parts.encoder.modules():
        if hasattr(module, "relative_position_bias_table"):
            module.fused_attn = True
    return Frozen(parts.encoder, parts.head)


class HeadOnly(Plain):
    """The encoder without gradient: nothing flows back into it. Not the same task as the others'."""

    def features(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return super().features(inputs)


class Concatenated(FusedProvider):
    """As the paper writes it: prompts are tokens, put before those of every layer and cut off behind it; experts by einsum."""

    truth = "concatenated"

    def __init__(self, encoder: nn.Module, bank: PromptBank, head: nn.Module, mode: str):
        self.plain = Plain(encoder, head)
        self.bank = bank.train(mode == TRAINING)
        self.model = nn.ModuleDict({"bank": bank, "head": head})
        # of each layer among those of its width
        self.positions = [bank.dims[:index].count(width) for index, width in enumerate(bank.dims)]
        for index, layer in enumerate(self.plain.family.layers(encoder)):
            self.attach(index, layer.module)

    def attach(self, index: int, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(functools.partial(self._put_prompts, index), with_kwargs=True)
        layer.register_forward_hook(self._cut_prompts)

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        config, family = self.bank.config, self.plain.family
        self.pool = family.pool(self.plain.model["encoder"], inputs.main)
        self.scores = []
        query = self.bank.cross_proj(inputs.cross)
        self.queries = query.unflatten(1, (len(self.bank.dims), -1)).unbind(1)
        mapped = self.bank.mapper(inputs.cross)
        self.mapped = {width: F.dropout(row, config.dropout, self.bank.training) for width, row in mapped.items()}
        logits, loss = self.plain.logits_and_loss(inputs, training)
        if training:
            importance = reference.importance_loss(torch.stack(self.scores), threshold=config.importance_threshold)
            loss = loss + config.importance_weight * importance
        return logits, loss

    def prompts(self, index: int, x: Tensor) -> Tensor:
        """(B, P, D), in the order [static | dynamic | mapped]."""
        config, training = self.bank.config, self.bank.training
        width, position = self.bank.dims[index], self.positions[index]
        stack = self.bank.stacks[str(width)]
        own = self.pool(x).to(stack.inter_weight.dtype) @ stack.inter_weight[position].T + stack.inter_bias[position]
        logits = torch.cat([own, self.queries[index]], dim=1) @ self.bank.keys[index].T / config.temperature
        if training and config.noise_std:
            logits = logits + torch.randn_like(logits) * config.noise_std
        self.scores.append(torch.softmax(logits, dim=-1))
        static = F.dropout(stack.static_prompt[position], config.dropout, training)
        dynamic = reference.dynamic_prompt(self.scores[-1], stack.experts[position])
        return torch.cat([static.expand(len(x), -1, -1), dynamic, self.mapped[width][:, None]], dim=1).to(x.dtype)

    def _put_prompts(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        prompts = self.prompts(index, args[0])
        self.length = prompts.shape[1]
        args = (torch.cat([prompts, args[0]], dim=1), *map(self._extended_mask, args[1:]))
        return args, {name: self._extended_mask(value) for name, value in kwargs.items()}

    def _extended_mask(self, argument: Any) -> Any:
        """Prompts are seen by all: a boolean (B, 1, S, S) gets as many rows and columns more."""
        if not isinstance(argument, Tensor) or argument.dim() != 4:
            return argument
        return F.pad(argument, (self.length, 0, self.length, 0), value=True)

    def _cut_prompts(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output[:, self.length :]


class ConcatenatedInWindows(Concatenated):
    """The same for a Swin Transformer: prompts are tokens of every window of their image, which puts them together by their mean.

    As the released code, but for the order of windows: there most windows get prompts of another image.
    """

    def attach(self, index: int, layer: nn.Module) -> None:
        layer.forward = functools.partial(self._block, index, layer)
        layer.attn.forward = functools.partial(self._window_attention, layer.attn)

    def _block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        """timm's, prompts before the tokens of the image."""
        prompts, size = self.prompts(index, x), x.shape[1:3]
        length = prompts.shape[1]
        sequence = torch.cat([prompts, x.flatten(1, 2)], dim=1)
        normed = block.norm1(sequence)
        self.normed = normed[:, :length]
        image = block._attn(normed[:, length:].unflatten(1, size)).flatten(1, 2)
        sequence = sequence + torch.cat([self.attended, image], dim=1)
        sequence = sequence + block.mlp(block.norm2(sequence))
        return sequence[:, length:].unflatten(1, size)

    def _window_attention(self, attention: nn.Module, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = self.normed.shape
        prompts = self.normed[:, None].expand(-1, len(windows) // batch, -1, -1).flatten(0, 1)
        sequence = torch.cat([prompts, windows], dim=1)
        q, k, v = attention.qkv(sequence).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * attention.scale) @ k.mT + F.pad(attention._get_rel_pos_bias(), (length, 0, length, 0))
        if mask is not None:
            weights = weights.unflatten(0, (-1, len(mask))) + F.pad(mask, (length, 0, length, 0))[:, None]
            weights = weights.flatten(0, 1)
        out = attention.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))
        self.attended = out[:, :length].unflatten(0, (batch, -1)).mean(1)
        return out[:, length:]


class Fused(FusedProvider):
    """``MoPEFusion``. Features of the complementary side are given."""

    truth = "concatenated"

    def __init__(self, model: MoPEFusion, mode: str, compiled: bool = False):
        self.model, self.bank = model.train(mode == TRAINING), model.bank
        self.run = compile_model(model) if compiled else model

    @classmethod
    def of(cls, parts: Parts, mode: str, **settings: Any) -> "Fused":
        model = MoPEFusion(parts.encoder, None, CLASSES, parts.bank.config).to(parts.head.weight.device)
        model.bank.load_state_dict(parts.bank.state_dict())
        model.head.load_state_dict(parts.head.state_dict())
        return cls(model, mode, **settings)

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        output = self.run(inputs.main, inputs.cross, inputs.labels if training else None)
        return output.logits, output.loss


class Folded(FusedProvider):
    """``MoPEFusion.fold()``, for inference."""

    truth = "concatenated"

    def __init__(self, model: FoldedModel, compiled: bool = False):
        self.model = model
        self.run = compile_model(model) if compiled else model

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        return self.run(inputs.main, inputs.cross).logits, None


class Side(Plain):
    """A complementary encoder of a usual size, alone and without gradient: what a fused model's own side would add."""

    truth = None

    def __init__(self, case: FusedCase, device: torch.device):
        case = dataclasses.replace(case, encoder=SIDES[case.encoder.side])
        parts = Parts.of(case, device)
        super().__init__(parts.encoder, parts.head)
        self.inputs = Inputs.random(case, device)

    def step(self, inputs: Inputs, mode: str) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"features": self.features(self.inputs)}


def _concatenated(parts: Parts, case: FusedCase, mode: str) -> Concatenated:
    return (ConcatenatedInWindows if case.encoder.window else Concatenated)(parts.encoder, parts.bank, parts.head, mode)


def _lora(parts: Parts, case: FusedCase, mode: str) -> FusedProvider:
    """Rank 8, not merged, in the encoder's dtype. Where q, k and v are one projection, one adapter is for all three."""
    from peft import LoraConfig, inject_adapter_in_model

    provider = Plain(parts.encoder, parts.head)
    inject_adapter_in_model(LoraConfig(r=8, target_modules=list(case.encoder.lora)), parts.encoder)
    parts.encoder.to(parts.head.weight.device, case.dtype).eval()
    return provider


def _full(parts: Parts, case: FusedCase, mode: str) -> FusedProvider:
    for name, parameter in parts.encoder.named_parameters():
        # Whisper's positions are sinusoids that nobody trains
        parameter.requires_grad_("embed_positions" not in name)
    return Plain(parts.encoder, parts.head)


def _checkpointed(parts: Parts, case: FusedCase, mode: str) -> FusedProvider:
    provider = Fused.of(parts, mode)
    provider.model.gradient_checkpointing_enable()
    return provider


PROVIDERS: dict[str, tuple[Sequence[str], Callable[[Parts, FusedCase, str], FusedProvider]]] = {
    FROZEN: (MODES, lambda parts, case, mode: Frozen(parts.encoder, parts.head)),
    "frozen-compiled": (MODES, lambda parts, case, mode: CompiledFrozen(parts.encoder, parts.head, mode)),
    FROZEN_WITH_SDPA: (MODES, _frozen_with_sdpa),
    "concatenated": (MODES, _concatenated),
    "mope_fast": (MODES, lambda parts, case, mode: Fused.of(parts, mode)),
    "mope_fast-compiled": (MODES, lambda parts, case, mode: Fused.of(parts, mode, compiled=True)),
    "folded": ((INFERENCE,), lambda parts, case, mode: Folded(Fused.of(parts, mode).model.fold())),
    "folded-compiled": ((INFERENCE,), lambda parts, case, mode: Folded(Fused.of(parts, mode).model.fold(), compiled=True)),
    "checkpointed": ((TRAINING,), _checkpointed),
    "head-only": ((TRAINING,), lambda parts, case, mode: HeadOnly(parts.encoder, parts.head)),
    "lora": (MODES, _lora),
    "full": ((TRAINING,), _full),
    "side": (MODES, lambda parts, case, mode: Side(case, parts.head.weight.device)),
}
"""The modes in which each makes sense, and what makes it of weights of its own."""


def build(name: str, case: FusedCase, device: torch.device, mode: str, dtype: torch.dtype | None = None) -> FusedProvider:
    """``dtype`` as for :meth:`Parts.of`. A size's compiled providers are kept for its other timing."""
    if is_compiled(name):
        return _build_compiled(name, case, device, mode)
    return PROVIDERS[name][1](Parts.of(case, device, dtype), case, mode)


@functools.lru_cache(maxsize=3)
def _build_compiled(name: str, case: FusedCase, device: torch.device, mode: str) -> FusedProvider:
    return PROVIDERS[name][1](Parts.of(case, device), case, mode)


def why_not(name: str, case: FusedCase, device: torch.device, smoke: bool) -> str | None:
    """Why a provider isn't measured here; None if it is."""
    side = SIDES[case.encoder.side].library
    for library in (case.encoder.library, *(["peft"] if name == "lora" else []), *([side] if name == "side" else [])):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed"
    return None
