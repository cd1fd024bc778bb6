"""``window_prompt_attention`` on torch's own attention kernels."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.window_attention import present, window_bias, windows_of, with_prompts
from .cpu_window_attention import KEY_MULTIPLE, seam_of
from .sdpa_attention import in_range, prefix_mask_of, readable


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
    """scaled_dot_product_attention on windows cut out of the packed projection, their keys [tokens | prompts | nothing].

    Windows are samples; where a mask differs between them, heads of their image: it is the same for all images.
    """
    batch, height, width, _, heads, head_dim = qkv.shape
    q, k, v = _in_windows(qkv, pad_qkv, window_size, shift_size).unbind()
    windows, area = q.shape[1], q.shape[3]
    prompts = sum(prefix[0].shape[2] for prefix in prefixes)
    spare = -(area + prompts) % KEY_MULTIPLE
    mask = _mask(qkv, prefixes, relative_position_bias, window_size, shift_size, spare)
    if prompts or spare:
        nothing = qkv.new_zeros(1, heads, spare, head_dim)
        k = with_prompts(k, [*(present(prefix, 0) for prefix in prefixes), nothing])
        v = with_prompts(v, [*(present(prefix, 1) for prefix in prefixes), nothing])
    fully_masked = None
    if not any(len(prefix) == 2 and prefix[0].shape[2] for prefix in prefixes):  # then a bias can hide all keys there are
        fully_masked = (mask == -math.inf).all(-1, keepdim=True)
        mask = mask.masked_fill(fully_masked, 0.0)
    first = 0
    if len(mask) > 1 or mask.shape[1] > 1:
        first, mask = 1, mask.expand(-1, windows, -1, -1, -1)
    q, k, v = readable(*(part.flatten(first, first + 1) for part in (q, k, v)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.flatten(first, first + 1), scale=scale)
    out = out.view(batch, windows, heads, area, head_dim)
    if fully_masked is not None:
        out = out.masked_fill(fully_masked, 0.0)
    return _in_image(out, (height, width), window_size, shift_size)


def _padded_size(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // window[0]) * window[0], -(-size[1] // window[1]) * window[1]


def _in_windows(qkv: Tensor, pad_qkv: Tensor | None, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(B, Hi, Wi, 3, H, Dh) -> (3, B, windows, H, W, Dh)."""
    if any(shift):
        qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
    # not len(): that makes an int of a batch that is a symbol
    batch, height, width = qkv.shape[:3]
    rows, columns = _padded_size((height, width), window)
    if (rows, columns) != (height, width):
        padding = qkv.new_zeros(qkv.shape[3:]) if pad_qkv is None else pad_qkv.to(qkv.dtype)
        below = padding.expand(batch, rows - height, width, -1, -1, -1)
        right = padding.expand(batch, rows, columns - width, -1, -1, -1)
        qkv = torch.cat([torch.cat([qkv, below], dim=1), right], dim=2)
    cut = qkv.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, rows, h, columns, w, 3, H, Dh)
    return cut.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(2, 3).flatten(4, 5)


def _in_image(out: Tensor, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """(B, windows, H, W, Dh) -> (B, Hi, Wi, H * Dh)."""
    rows, _ = _padded_size(size, window)
    cut = out.unflatten(3, window).unflatten(1, (rows // window[0], -1))  # (B, rows, columns, H, h, w, Dh)
    image = cut.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 2).flatten(2, 3).flatten(3)[:, : size[0], : size[1]]
    return image.roll(shift, (1, 2)) if any(shift) else image.contiguous()


def _mask(
    qkv: Tensor, prefixes: Sequence, relative_position_bias: Tensor, window: tuple[int, int], shift: tuple[int, int], spare: int
) -> Tensor:
    """What is added to the products with [tokens | prompts | nothing], (1 or B, 1 or windows, H, W, keys)."""
    bias = relative_position_bias[None]
    if any(shift):
        _, regions = windows_of(qkv.shape[1], qkv.shape[2], window, shift, qkv.device)
        bias = window_bias(relative_position_bias, regions, seam_of(qkv))
    bias = in_range(bias, qkv.dtype)[None]
    prompts = sum(prefix[0].shape[2] for prefix in prefixes)
    prefix_mask = prefix_mask_of(prefixes, qkv)
    if prefix_mask is None:
        bias = F.pad(bias, (0, prompts)) if prompts else bias
    else:
        to_prompts = torch.where(prefix_mask[:, None, None, None], 0.0, -math.inf).to(qkv.dtype)
        sizes = (qkv.shape[0], *bias.shape[1:4], -1)
        bias = torch.cat([bias.expand(sizes), to_prompts.expand(sizes)], dim=-1)
    return F.pad(bias, (0, spare), value=-math.inf) if spare else bias
