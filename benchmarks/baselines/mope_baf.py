"""Providers for MoPE-BAF: a plain VLMo, and one with prompts in several forms and attention kernels; all have the same weights."""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import attention as kernels
from benchmarks.baselines import models
from benchmarks.baselines.models import Inputs, compile_model, is_compiled
from benchmarks.cases.models import INFERENCE
from benchmarks.cases.mope_baf import CLASSES, TRAINING_FROZEN, BAFCase
from mope_fast import VLMo, VLMoConfig, _implementations
from mope_fast.models import MoPEBAF
from mope_fast.models.vlmo.layers import Visibility

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of one layer from q, k, v and the relative bias; masks are made ahead."""


@dataclass(frozen=True)
class Form:
    """One way to run a case."""

    attention: str = "auto"
    """An implementation of mope_fast, or one of ``KERNELS``."""
    prompts: bool = True
    settings: tuple[tuple[str, Any], ...] = ()
    """MoPE-BAF settings that differ from the default."""

    @property
    def truth(self) -> "Form":
        """The same form with an explicit mask."""
        return replace(self, attention="sdpa-mask")


PLAIN = "plain"
"""The baseline: time and memory of the other providers are divided by its."""
PROVIDERS = {
    PLAIN: Form(prompts=False),
    "plain-compiled": Form(prompts=False),
    "mope_fast": Form(),
    "mope_fast-compiled": Form(),
    "triton": Form("triton"),
    "xformers": Form("xformers"),
    "sdpa-mask": Form("sdpa-mask"),
    "flex": Form("flex"),
    "xformers-bias": Form("xformers-bias"),
    "unrestricted": Form(settings=(("restricted", False),)),
    "one-block": Form(settings=(("num_blocks", 1),)),
}
OURS = ("mope_fast", "mope_fast-compiled", "triton", "xformers", "unrestricted", "one-block")


class PlainVLMo(models.Headed):
    """The joint pass, VLMo's pooler and a linear head. If it is frozen, gradients flow down to the embedding."""

    has_unused = True

    def __init__(self, vlmo: VLMo, head: nn.Module, mode: str, compiled: bool):
        super().__init__(vlmo, head)
        first, frozen = vlmo.transformer.blocks[0], mode == TRAINING_FROZEN
        vlmo.requires_grad_(not frozen)
        self.start = models.EmbeddingGradient(first) if frozen and not compiled else None
        if frozen and compiled:
            self.model.anchor = models.anchored(first, vlmo.config.hidden_size, next(vlmo.parameters()))

    def features(self, inputs: Inputs) -> Tensor:
        return self.model["encoder"](**inputs.main).pooled

    def trained(self) -> dict[str, Tensor]:
        return self.parameters if self.start is None else {**self.parameters, "embedding": self.start.embedding}


class WithPrompts(models.Provider):
    """``MoPEBAF``. It doesn't use VLMo's pooler, nor in fusion layers the single-modality experts."""

    has_unused = True

    def __init__(self, model: MoPEBAF):
        self.model = model

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        output = self.model(**inputs.main, labels=inputs.labels if training else None)
        return output.logits, output.loss


class Elsewhere:
    """``VLMoAttention.attend`` on a kernel from ``KERNELS``, made in the first call, because all batches have the same padding."""

    def __init__(self, make: Callable[[Visibility, Tensor], Kernel], made: dict[tuple, Kernel]):
        self.make, self.made, self.run = make, made, None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sees: Visibility) -> Tensor:
        if self.run is None:
            key = sees.field, q.shape[2]
            if key not in self.made:  # layers with the same visibility share a kernel
                self.made[key] = self.make(sees, q)
            self.run = self.made[key]
        return self.run(q, k, v, sees.bias)


def visible(sees: Visibility, q: Tensor) -> Tensor:
    """Return a mask (B, 1, S, S), bool, True where a query sees a key."""
    rows = q.shape[2]
    mask = q.new_ones(rows, rows, dtype=torch.bool) if sees.field is None else sees.field.mask(q.device)
    return mask & sees.key_padding_mask[:, None, None]


def _sdpa_mask(sees: Visibility, q: Tensor) -> Kernel:
    mask = visible(sees, q)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return kernels.masked_sdpa(q, k, v, mask if bias is None else bias.masked_fill(~mask, float("-inf")))

    return attention


def _flex(compiled: Callable, sees: Visibility, q: Tensor) -> Kernel:
    from torch.nn.attention.flex_attention import create_block_mask

    sees_token, padding = kernels.sees_token(sees.field, False, q.device), sees.key_padding_mask

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees_token(query, key) & padding[b, key]

    batch, rows = len(q), q.shape[2]
    mask = create_block_mask(mask_mod, batch, None, rows, rows, device=q.device)
    return lambda q, k, v, bias: compiled(q, k, v, block_mask=mask)


@functools.lru_cache(maxsize=1)
def _compiled_flex(case: BAFCase, device: torch.device) -> Callable:
    """Return one compiled function for all layers, cached for the case's other timing."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return compile_model(flex_attention)


def _xformers_bias(sees: Visibility, q: Tensor) -> Kernel:
    biased = kernels.biased_xformers(visible(sees, q), *q.shape[:2], q.dtype)
    return lambda q, k, v, bias: biased(q, k, v)


KERNELS: dict[str, Callable[[BAFCase, torch.device], Callable[[Visibility, Tensor], Kernel]]] = {
    "sdpa-mask": lambda case, device: _sdpa_mask,
    "flex": lambda case, device: functools.partial(_flex, _compiled_flex(case, device)),
    "xformers-bias": lambda case, device: _xformers_bias,
}


def _choose_attention(vlmo: VLMo, name: str, case: BAFCase, device: torch.device) -> None:
    maker, made = KERNELS[name](case, device) if name in KERNELS else None, {}
    for block in vlmo.transformer.blocks:
        if maker is None:
            block.attn.impl = name
        else:
            block.attn.attend = Elsewhere(maker, made)


@functools.lru_cache(maxsize=1)
def _random_vlmo(config: VLMoConfig) -> VLMo:
    """Return a random VLMo whose attention is as sharp as a trained one's; with flat attention a wrong mask hardly shows."""
    torch.manual_seed(0)
    vlmo = VLMo(config)
    with torch.no_grad():
        for block in vlmo.transformer.blocks:
            block.attn.qkv.weight *= 3
            block.attn.proj.weight *= 3
    return vlmo


def make(
    form: Form, case: BAFCase, device: torch.device, mode: str, dtype: torch.dtype | None = None, compiled: bool = False
) -> models.Provider:
    """Make a provider with the backbone in the case's dtype and new parts in float32; all of it in ``dtype`` if one is given."""
    vlmo = copy.deepcopy(_random_vlmo(case.vlmo)).to(device, case.dtype)
    _choose_attention(vlmo, form.attention, case, device)
    torch.manual_seed(0)
    if form.prompts:
        config = case.config(freeze_backbone=mode == TRAINING_FROZEN, **dict(form.settings))
        provider = WithPrompts(MoPEBAF(vlmo, CLASSES, config))
    else:
        provider = PlainVLMo(vlmo, nn.Linear(case.vlmo.hidden_size, CLASSES), mode, compiled)
    provider.model.to(device, dtype).train(mode != INFERENCE)
    if compiled:
        provider.logits_and_loss = compile_model(provider.logits_and_loss)
    return provider


def build(name: str, case: BAFCase, device: torch.device, mode: str) -> models.Provider:
    """Build a provider; compiled ones are cached for the case's other timing."""
    return _build_compiled(name, case, device, mode) if is_compiled(name) else make(PROVIDERS[name], case, device, mode)


@functools.lru_cache(maxsize=2)
def _build_compiled(name: str, case: BAFCase, device: torch.device, mode: str) -> models.Provider:
    return make(PROVIDERS[name], case, device, mode, compiled=True)


def why_not(name: str, case: BAFCase, device: torch.device, smoke: bool) -> str | None:
    """Return why a provider isn't measured here; None if it is."""
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed"
    if name in ("flex", "xformers-bias") and not case.vlmo.absolute_positions:
        return "its mask is made once, but a relative bias changes in every step"
    if name == "flex" and (reason := kernels.why_not_flex(device, smoke)):
        return reason
    needed = kernels.NEEDS.get(name)
    return needed and _implementations.why_not("receptive_field_attention", problem(case, device))[needed]


def problem(case: BAFCase, device: torch.device) -> _implementations.Problem:
    """Describe the first layer's attention for :mod:`mope_fast._implementations`."""
    return _implementations.Problem(device, case.dtype, case.tokens + sum(case.prompts[:2]), masked=True)
