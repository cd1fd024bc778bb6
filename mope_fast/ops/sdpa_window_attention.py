"""``window_prompt_attention`` on torch's own attention kernels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.window_attention import window_bias, windows_of
from .sdpa_attention import in_range


def window_prompt_attention(
    qkv: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]],
    relative_position_bias: Tensor,
    *,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float | None,
) -> Tensor:
    """scaled_dot_product_attention, windows as heads: the bias with its seams is the same for every image."""
    batch, height, width, _, heads, head_dim = qkv.shape
    tokens, regions = windows_of(height, width, window_size, shift_size, qkv.device)
    flat = qkv.flatten(1, 2)
    if tokens.numel() > height * width:
        padding = qkv.new_zeros(3, heads, head_dim) if pad_qkv is None else pad_qkv.to(qkv.dtype)
        flat = torch.cat([flat, padding.expand(batch, 1, 3, heads, head_dim)], dim=1)
    # (B, windows * H, W, Dh) each
    q, k, v = flat[:, tokens].permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
    windows = len(tokens)
    keys, values, masks = [], [], []
    for pk, pv, *there in prefixes:
        keys.append(pk.to(qkv.dtype)[:, None].expand(batch, windows, -1, -1, -1).flatten(1, 2))
        values.append(pv.to(qkv.dtype)[:, None].expand(batch, windows, -1, -1, -1).flatten(1, 2))
        mask = there[0] if there else torch.ones(1, pk.shape[2], dtype=torch.bool, device=qkv.device)
        masks.append(torch.zeros_like(mask, dtype=qkv.dtype).masked_fill(~mask, float("-inf"))[:, None, None])
    bias = in_range(window_bias(relative_position_bias, regions).flatten(0, 1)[None], qkv.dtype)
    if prefixes:
        k, v = torch.cat([*keys, k], dim=2), torch.cat([*values, v], dim=2)
        samples = max(len(mask) for mask in masks)
        parts = [mask.expand(samples, *bias.shape[1:3], -1) for mask in masks]
        bias = torch.cat([*parts, bias.expand(samples, -1, -1, -1)], dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    out = out.unflatten(1, (windows, heads)).transpose(2, 3).flatten(3).flatten(1, 2)
    return out[:, tokens.flatten().argsort()[: height * width]].unflatten(1, (height, width))
