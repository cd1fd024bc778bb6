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


def window_bias(relative_position_bias: Tensor, regions: Tensor, seam: float | None = None) -> Tensor:
    """Relative position bias (H, W, W) with the seams of ``windows_of``, SEAM unless told: (windows, H, W, W)."""
    seam = SEAM if seam is None else seam
    apart = regions[:, :, None] != regions[:, None, :]
    return relative_position_bias + torch.zeros_like(apart, dtype=relative_position_bias.dtype).masked_fill(apart, seam)[:, None]


def in_windows(image: Tensor, padding: Tensor | None, tokens: Tensor) -> Tensor:
    """(B, Hi, Wi, N, H, Dh) -> (N, B, windows, H, W, Dh); padding holds (N, H, Dh), None for zeros."""
    padding = image.new_zeros(image.shape[3:]) if padding is None else padding.to(image.dtype)
    with_padding = torch.cat([image.flatten(1, 2), padding.expand(len(image), 1, *padding.shape)], dim=1)
    return with_padding[:, tokens].permute(3, 0, 1, 4, 2, 5)


def in_image(windows: Tensor, tokens: Tensor, height: int, width: int) -> Tensor:
    """(N, B, windows, H, W, Dh) -> (B, Hi, Wi, N, H, Dh), without what padding gives."""
    # padding has the largest number: the other positions, in the order of their tokens
    back = tokens.flatten().argsort()[: height * width]
    return windows.permute(1, 2, 4, 0, 3, 5).flatten(1, 2)[:, back].unflatten(1, (height, width))


def window_weights(
    q: Tensor, k: Tensor, prefixes: Sequence, relative_position_bias: Tensor, regions: Tensor, scale: float
) -> Tensor:
    """Products before the softmax with [tokens | prompts], (B, windows, H, W, W + P); q and k (B, windows, H, W, Dh)."""
    weights = [scale * q @ k.mT + window_bias(relative_position_bias, regions)]
    for pk, _, *prefix_mask in prefixes:
        to_prompts = scale * q @ pk.to(q.dtype)[:, None].mT
        weights.append(to_prompts.masked_fill(~prefix_mask[0][:, None, None, None], -math.inf) if prefix_mask else to_prompts)
    return torch.cat(weights, dim=-1)


def present(prefix: Sequence[Tensor], side: int) -> Tensor:
    """Keys (side 0) or values (1) of a prefix; zeros where there is none, whatever is there."""
    return prefix[side] if len(prefix) == 2 else prefix[side].masked_fill(~prefix[2][:, None, :, None], 0.0)


def with_prompts(tokens: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """Keys or values of windows (B, windows, H, W, Dh), then those of prompts (B or 1, H, P, Dh)."""
    others = [rows.to(tokens.dtype)[:, None].expand(*tokens.shape[:3], -1, -1) for rows in prompts]
    return torch.cat([tokens, *others], dim=-2)


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
    height, width = qkv.shape[1:3]
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    tokens, regions = windows_of(height, width, window_size, shift_size, qkv.device)
    q, k, v = in_windows(qkv, pad_qkv, tokens).to(torch.promote_types(qkv.dtype, torch.float32))
    weights = window_weights(q, k, prefixes, relative_position_bias, regions, scale)
    out = softmax_or_zero(weights) @ with_prompts(v, [present(prefix, 1) for prefix in prefixes])
    return in_image(out[None], tokens, height, width).flatten(3).to(qkv.dtype)
