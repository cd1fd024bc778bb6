"""Attention with key/value prefixes and restricted receptive fields in plain PyTorch: what the public functions mean."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..receptive_field import ReceptiveField


def masked_weights(
    q: Tensor,
    k: Tensor,
    prefix_keys: Sequence[Tensor],
    *,
    scale: float,
    visible: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Scaled products (B, H, Sq, P + Sk) before the softmax, in float32 (float64 for float64); -inf where nothing is seen."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = scale * q.to(dtype) @ k.to(dtype).transpose(-1, -2)
    if bias is not None:
        weights = weights + bias
    if key_padding_mask is not None:
        weights = weights.masked_fill(~key_padding_mask[:, None, None, :], float("-inf"))
    if visible is not None:
        weights = weights.masked_fill(~visible, float("-inf"))
    prefix_weights = [scale * q.to(dtype) @ pk.to(dtype).transpose(-1, -2) for pk in prefix_keys]
    return torch.cat([*prefix_weights, weights], dim=-1)


def softmax_or_zero(weights: Tensor) -> Tensor:
    """Softmax over the last dimension; a query that sees no key has only -inf: it takes 0 everywhere, and so do its gradients."""
    fully_masked = (weights == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(weights.masked_fill(fully_masked, 0.0), dim=-1).masked_fill(fully_masked, 0.0)


def causal_mask(queries: int, tokens: int, device: torch.device) -> Tensor:
    """bool (Sq, Sk): query i sees the keys up to i + Sk - Sq."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)


def all_values(v: Tensor, prefix_values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(B, H, P + Sk, Dh), in the order of :func:`masked_weights`."""
    return torch.cat([*(pv.to(dtype).expand(v.shape[0], -1, -1, -1) for pv in prefix_values), v.to(dtype)], dim=-2)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`mope_fast.functional.prompt_attention`. Softmax and sums in float32 (float64 for float64)."""
    visible = causal_mask(q.shape[-2], k.shape[-2], q.device) if is_causal else None
    return _attention(q, k, v, prefixes, visible, key_padding_mask, bias, scale)


def receptive_field_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: ReceptiveField,
    *,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`mope_fast.functional.receptive_field_attention`. Softmax and sums in float32 (float64 for float64)."""
    return _attention(q, k, v, (), field.mask(q.device), key_padding_mask, bias, scale)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    visible: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, values = [pk for pk, _ in prefixes], [pv for _, pv in prefixes]
    weights = masked_weights(q, k, keys, scale=scale, visible=visible, key_padding_mask=key_padding_mask, bias=bias)
    return (softmax_or_zero(weights) @ all_values(v, values, weights.dtype)).to(q.dtype)
