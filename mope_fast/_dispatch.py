"""Unchecked functions behind :mod:`mope_fast.functional`: choose an implementation and call it.

The library's own modules call them with arguments that are valid by construction; the public functions check arguments first.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._autocast import autocast_dtype, cast, without_autocast
from ._implementations import Problem, choose
from .ops import sdpa_attention, sdpa_window_attention, xformers_attention
from .ops.layer_prompts import layer_prompts as layer_prompts_op
from .ops.prompt_attention import prompt_attention as _prompt_attention_op
from .ops.route_and_mix import route_and_mix as _route_and_mix_op
from .ops.window_attention import window_prompt_attention as _window_prompt_attention_op
from .receptive_field import ReceptiveField
from .reference.attention import CAUSAL, UNLIMITED, Window, window_of

Prefixes = Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]]


def route_and_mix(
    logits: Tensor,
    experts: Tensor,
    *,
    temperature: float,
    noise: Tensor | None,
    top_k: int | None,
    renormalize: bool,
    gram: Tensor | None,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`mope_fast.functional.route_and_mix`."""
    dtype = autocast_dtype(experts)
    problem = Problem(logits.device, torch.promote_types(logits.dtype, experts.dtype))
    if choose("route_and_mix", impl, problem) == "triton":
        return _route_and_mix_op(logits, experts, noise, gram, temperature, top_k, renormalize, eps, dtype)
    gate: dict[str, Any] = {"top_k": top_k, "renormalize": renormalize}
    with without_autocast(logits.device.type):
        return reference.route_and_mix(
            logits, experts, temperature=temperature, noise=noise, gram=gram, eps=eps, dtype=dtype, **gate
        )  # fmt: skip


def layer_prompts(experts: Tensor, cross: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the implementation of :func:`mope_fast.reference.layer_prompts` for such tensors, chosen once for many layers.

    Its rows have the autocast dtype if autocast is on now, else that of the experts. It must be called with autocast off.
    """
    problem = Problem(experts.device, torch.promote_types(cross.dtype, experts.dtype))
    mix = layer_prompts_op if choose("route_and_mix", "auto", problem) == "triton" else reference.layer_prompts
    return functools.partial(mix, dtype=autocast_dtype(experts))


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Prefixes = (),
    *,
    is_causal: bool = False,
    window: Window | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """See :func:`mope_fast.functional.prompt_attention`."""
    pairs: Sequence[Any] = prefixes
    if any(len(prefix) == 3 for prefix in prefixes):
        tokens = (k, v) if key_padding_mask is None else (k, v, key_padding_mask)
        key_padding_mask = sdpa_attention.prefix_mask_of([*prefixes, tokens], k)
        pairs = [prefix[:2] for prefix in prefixes]
    window = window_of(window, is_causal)
    if window != UNLIMITED:
        window = _limiting(window, q.shape[2], k.shape[2])
    keys = k.shape[2] + sum([prefix[0].shape[2] for prefix in pairs])
    triangle = window == CAUSAL and q.shape[2] == keys
    masked = key_padding_mask is not None or bias is not None or (window != UNLIMITED and not triangle)
    dtype = autocast_dtype(q)
    impl = choose("prompt_attention", impl, Problem(q.device, dtype, keys, masked))
    masking: dict[str, Any] = {"window": window, "key_padding_mask": key_padding_mask, "bias": bias, "scale": scale}
    if impl == "reference":
        with without_autocast(q.device.type):
            out = reference.prompt_attention(q, k, v, pairs, **masking)
        return out.to(dtype)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    if impl == "triton":
        return _prompt_attention_op(q, k, v, pairs, field=None, **masking)
    backend = sdpa_attention if impl == "sdpa" else xformers_attention
    return backend.prompt_attention(q, k, v, pairs, **masking)


def _limiting(window: Window, queries: int, tokens: int) -> Window:
    """Drop limits of a window that mask out nothing; while a graph is made they are kept, because it may serve several lengths."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return window
    left, right = window
    return (None if left is None or left >= tokens - 1 else left, None if right is None or right >= queries - 1 else right)


def receptive_field_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: ReceptiveField,
    *,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """See :func:`mope_fast.functional.receptive_field_attention`."""
    masking: dict[str, Any] = {"key_padding_mask": key_padding_mask, "bias": bias, "scale": scale}
    dtype = autocast_dtype(q)
    impl = choose("receptive_field_attention", impl, Problem(q.device, dtype, k.shape[2], masked=True))
    if impl == "reference":
        with without_autocast(q.device.type):
            out = reference.receptive_field_attention(q, k, v, field, **masking)
        return out.to(dtype)
    q, k, v = cast(q, dtype), cast(k, dtype), cast(v, dtype)
    if impl == "triton":
        return _prompt_attention_op(q, k, v, (), field=field.lowered(q.device), window=UNLIMITED, **masking)
    backend = sdpa_attention if impl == "sdpa" else xformers_attention
    return backend.receptive_field_attention(q, k, v, field, **masking)


def window_prompt_attention(
    qkv: Tensor,
    prefixes: Prefixes,
    relative_position_bias: Tensor,
    *,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """See :func:`mope_fast.functional.window_prompt_attention`."""
    if relative_position_bias.dtype == torch.float64 != qkv.dtype:
        relative_position_bias = sdpa_attention.in_range(relative_position_bias, torch.float32)
    settings: dict[str, Any] = {"window_size": window_size, "shift_size": shift_size, "pad_qkv": pad_qkv, "scale": scale}
    keys = window_size[0] * window_size[1] + sum(prefix[0].shape[2] for prefix in prefixes)
    dtype = autocast_dtype(qkv)
    impl = choose("window_prompt_attention", impl, Problem(qkv.device, dtype, keys, head_dim=qkv.shape[-1]))
    if impl == "reference":
        with without_autocast(qkv.device.type):
            out = reference.window_prompt_attention(qkv, prefixes, relative_position_bias, **settings)
        return out.to(dtype)
    qkv = cast(qkv, dtype)
    if impl in ("triton", "cpu"):
        return _window_prompt_attention_op(qkv, prefixes, relative_position_bias, **settings)
    return sdpa_window_attention.window_prompt_attention(qkv, prefixes, relative_position_bias, **settings)
