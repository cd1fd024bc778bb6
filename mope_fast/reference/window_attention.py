"""Attention in shifted windows of an image, with prefixes, in plain PyTorch: what the public function means."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import softmax_or_zero

SEAM = -100.0
"""Added between tokens of a window that the shift brought together from different sides of the image; Swin's own value."""


def windows_of(
    height: int, width: int, window_size: tuple[int, int], shift_size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """How timm's Swin cuts an image into windows: rolled up and left by the shift, then padded at the bottom and right.

    Returns:
        Two int64 tensors (windows, W), W the positions of a window in row order: the token there (``height * width`` for
        padding), and the region it belongs to: between regions of one window lies a seam.
    """
    rows, row_regions = _axis(height, window_size[0], shift_size[0], device)
    columns, column_regions = _axis(width, window_size[1], shift_size[1], device)
    padded = (rows == height)[:, None, :, None] | (columns == width)[None, :, None, :]
    tokens = rows[:, None, :, None] * width + columns[None, :, None, :]
    regions = row_regions[:, None, :, None] * 3 + column_regions[None, :, None, :]
    return tokens.masked_fill(padded, height * width).flatten(2).flatten(0, 1), regions.flatten(2).flatten(0, 1)


def _axis(size: int, window: int, shift: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(windows, window) along one axis: positions in the image (``size`` for padding) and regions."""
    padded = -(-size // window) * window
    index = torch.arange(padded, device=device)
    positions = torch.where(index < size, (index + shift) % size, size)
    regions = (index >= padded - window).long() + (index >= padded - shift)
    return positions.unflatten(0, (-1, window)), regions.unflatten(0, (-1, window))


def window_bias(relative_position_bias: Tensor, regions: Tensor, seam: float = SEAM) -> Tensor:
    """Relative position bias (H, W, W) with the seams of ``windows_of``: (windows, H, W, W)."""
    apart = regions[:, :, None] != regions[:, None, :]
    return relative_position_bias + torch.zeros_like(apart, dtype=relative_position_bias.dtype).masked_fill(apart, seam)[:, None]


def window_prompt_attention(
    qkv: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]],
    relative_position_bias: Tensor,
    *,
    window_size: tuple[int, int],
    shift_size: tuple[int, int],
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See :func:`mope_fast.functional.window_prompt_attention`. Softmax and sums in float32 (float64 for float64)."""
    batch, height, width, _, heads, head_dim = qkv.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    scale = head_dim**-0.5 if scale is None else scale
    tokens, regions = windows_of(height, width, window_size, shift_size, qkv.device)
    padding = qkv.new_zeros(3, heads, head_dim) if pad_qkv is None else pad_qkv.to(qkv.dtype)
    with_padding = torch.cat([qkv.flatten(1, 2), padding.expand(batch, 1, 3, heads, head_dim)], dim=1).to(dtype)
    q, k, v = with_padding[:, tokens].permute(3, 0, 1, 4, 2, 5)  # (B, windows, H, W, Dh) each

    weights = [scale * q @ k.mT + window_bias(relative_position_bias, regions)]
    values = [v]
    for pk, pv, *there in prefixes:
        to_prompts = scale * q @ pk.to(dtype)[:, None].mT
        weights.append(to_prompts.masked_fill(~there[0][:, None, None, None], -math.inf) if there else to_prompts)
        values.append(pv.to(dtype)[:, None].expand(batch, len(tokens), -1, -1, -1))
    out = softmax_or_zero(torch.cat(weights, dim=-1)) @ torch.cat(values, dim=-2)
    # padding has the largest number: the other positions, in the order of their tokens
    back = tokens.flatten().argsort()[: height * width]
    return out.transpose(2, 3).flatten(3).flatten(1, 2)[:, back].unflatten(1, (height, width)).to(qkv.dtype)
