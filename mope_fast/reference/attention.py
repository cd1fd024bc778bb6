"""Attention with key/value prefixes in plain PyTorch: what ``functional.prompt_attention`` means."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, _, queries, head_dim = q.shape
    tokens = k.shape[-2]
    scale = head_dim**-0.5 if scale is None else scale

    visible = torch.ones(queries, tokens, dtype=torch.bool, device=q.device)
    if is_causal:
        visible = visible.tril(tokens - queries)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None, :]
    weights = scale * q.to(dtype) @ k.to(dtype).transpose(-1, -2)
    if bias is not None:
        weights = weights + bias
    weights = weights.masked_fill(~visible, float("-inf"))

    prefix_weights = [scale * q.to(dtype) @ pk.to(dtype).transpose(-1, -2) for pk, _ in prefixes]
    weights = torch.cat([*prefix_weights, weights], dim=-1)
    values = torch.cat([*(pv.to(dtype).expand(batch, -1, -1, -1) for _, pv in prefixes), v.to(dtype)], dim=-2)

    # a query that sees no key has only -inf: it takes weight 0 everywhere, and so do its gradients
    blind = (weights == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(weights.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return (weights @ values).to(q.dtype)
