"""``prompt_attention`` on torch's own attention kernels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    *,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """torch's scaled_dot_product_attention on concatenated keys; a mask tensor only where one is needed."""
    batch, _, queries, _ = q.shape
    tokens = k.shape[2]
    prefix_length = sum(pk.shape[2] for pk, _ in prefixes)
    if prefix_length:
        k = torch.cat([*(pk.to(k.dtype).expand(batch, -1, -1, -1) for pk, _ in prefixes), k], dim=2)
        v = torch.cat([*(pv.to(v.dtype).expand(batch, -1, -1, -1) for _, pv in prefixes), v], dim=2)

    visible = None
    if key_padding_mask is not None:
        visible = key_padding_mask[:, None, None, :]
    if is_causal:
        causal = torch.ones(queries, tokens, dtype=torch.bool, device=q.device).tril(tokens - queries)
        visible = causal if visible is None else visible & causal
    if bias is not None:
        mask = bias.to(q.dtype) if visible is None else bias.to(q.dtype).masked_fill(~visible, float("-inf"))
        mask = F.pad(mask, (prefix_length, 0))
    else:
        mask = None if visible is None else F.pad(visible, (prefix_length, 0), value=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if prefix_length or visible is None:
        return out
    # without a prefix a query may see no key; softmax leaves that undefined
    return torch.where(visible.any(-1, keepdim=True), out, 0.0)
