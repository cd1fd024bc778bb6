"""Attention with key/value prefixes and restricted receptive fields in plain PyTorch: what the public functions mean."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..receptive_field import ReceptiveField

Window = tuple[int | None, int | None]
"""How many keys before a query's place, and behind it, it sees; None for no limit."""
UNLIMITED: Window = (None, None)
CAUSAL: Window = (None, 0)


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
    """Scaled products (B, H, Sq, P + Sk) before the softmax, in float32 (float64 for float64); -inf where nothing is seen.

    ``visible`` and ``bias`` are about tokens, ``key_padding_mask`` about tokens or all keys.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    weights = scale * q.to(dtype) @ all_rows(k, prefix_keys, q, dtype).mT
    tokens = (weights.shape[-1] - k.shape[2], 0)
    if bias is not None:
        weights = weights + F.pad(bias, tokens)
    if key_padding_mask is not None:
        padding = key_padding_mask if key_padding_mask.shape[1] > k.shape[2] else F.pad(key_padding_mask, tokens, value=True)
        weights = weights.masked_fill(~padding[:, None, None, :], float("-inf"))
    return weights if visible is None else weights.masked_fill(~F.pad(visible, tokens, value=True), float("-inf"))


def softmax_or_zero(weights: Tensor) -> Tensor:
    """Softmax over the last dimension; a query that sees no key has only -inf: it takes 0 everywhere, and so do its gradients."""
    fully_masked = (weights == float("-inf")).all(-1, keepdim=True)
    return torch.softmax(weights.masked_fill(fully_masked, 0.0), dim=-1).masked_fill(fully_masked, 0.0)


def window_of(window: Window | None, is_causal: bool) -> Window:
    """The window that both settings mean: a causal one ends at a query's own place."""
    left, right = UNLIMITED if window is None else window
    return (left, 0) if is_causal else (left, right)


def window_mask(queries: int, tokens: int, window: Window, device: torch.device) -> Tensor:
    """bool (Sq, Sk): query i has the place i + Sk - Sq among the keys."""
    left, right = window
    ahead = torch.arange(tokens, device=device) - (torch.arange(queries, device=device)[:, None] + tokens - queries)
    visible = torch.ones(queries, tokens, dtype=torch.bool, device=device) if left is None else ahead >= -left
    return visible if right is None else visible & (ahead <= right)


def all_rows(tokens: Tensor, prefixes: Sequence[Tensor], q: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values (B, H, P + Sk, Dh), prefixes first; a head that several heads of q share is repeated for them."""
    parts = [rows.to(dtype).expand(tokens.shape[0], -1, -1, -1) for rows in (*prefixes, tokens)]
    rows = torch.cat(parts, dim=-2) if prefixes else parts[0]
    heads, key_heads = q.shape[1], tokens.shape[1]
    return rows if heads == key_heads else rows.repeat_interleave(heads // key_heads, dim=1)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    is_causal: bool = False,
    window: Window | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`mope_fast.functional.prompt_attention`. Softmax and sums in float32 (float64 for float64).

    ``key_padding_mask`` may be about all keys, (B, P + Sk).
    """
    window = window_of(window, is_causal)
    visible = None if window == UNLIMITED else window_mask(q.shape[2], k.shape[2], window, q.device)
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
    return (softmax_or_zero(weights) @ all_rows(v, values, q, weights.dtype)).to(q.dtype)
