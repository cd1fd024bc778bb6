"""What timm's Swin block computes when each of its windows also sees prompts: its own methods on concatenated windows."""

import pytest
import torch
import torch.nn.functional as F

swin_transformer = pytest.importorskip("timm").models.swin_transformer


def shifted_windows(block, x, prompts):
    """``SwinTransformerBlock._attn``: roll, pad, partition, attend, reverse, cut, roll back."""
    height, width = x.shape[1:3]
    shifted = torch.roll(x, [-s for s in block.shift_size], dims=(1, 2))
    shifted = F.pad(shifted, (0, 0, 0, -width % block.window_size[1], 0, -height % block.window_size[0]))
    windows = swin_transformer.window_partition(shifted, block.window_size).flatten(1, 2)
    mask = block.get_attn_mask(shifted) if block.dynamic_mask else block.attn_mask
    windows = _eager_window_attention(block.attn, windows, prompts, mask)
    windows = windows.unflatten(1, block.window_size)
    shifted = swin_transformer.window_reverse(windows, block.window_size, *shifted.shape[1:3])[:, :height, :width]
    return torch.roll(shifted, block.shift_size, dims=(1, 2))


def _eager_window_attention(attention, windows, prompts, mask):
    """``WindowAttention.forward`` without fused kernels on [prompts | window]; outputs of prompts are cut."""
    length, per_image = prompts.shape[1], windows.shape[0] // prompts.shape[0]
    sequence = torch.stack([torch.cat([prompts[i // per_image], window]) for i, window in enumerate(windows)])
    q, k, v = attention.qkv(sequence).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights = attention.scale * q @ k.mT + F.pad(attention._get_rel_pos_bias(), (length, 0, length, 0))
    if mask is not None:
        weights = weights.unflatten(0, (-1, mask.shape[0])) + F.pad(mask, (length, 0, length, 0))[:, None]
        weights = weights.flatten(0, 1)
    return attention.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))[:, length:]
