"""How tokens become one feature: for the router's view of a layer's input, and for what the whole encoder gives."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Pool = Callable[[Tensor], Tensor]
"""Tokens (B, S, D), or (B, H, W, D) of an image, -> (B, D)."""


def first_token(x: Tensor) -> Tensor:
    """The class token."""
    return x[:, 0]


def token_mean(x: Tensor) -> Tensor:
    """The mean over all tokens."""
    return x.flatten(1, -2).mean(1)


def patch_mean(class_tokens: int) -> Pool:
    """The mean over an image's patches, behind so many tokens that stand for the whole image."""
    return functools.partial(_patch_mean, class_tokens)


def masked_mean(mask: Tensor | None) -> Pool:
    """The mean over real tokens, mask (B, S) nonzero there; zero for a sample without one. None: all are real."""
    return token_mean if mask is None else functools.partial(_masked_mean, mask.bool())


def token_at(index: Tensor) -> Pool:
    """Each sample's token at index (B,)."""
    return functools.partial(_token_at, index)


def last_real_token(mask: Tensor | None) -> Pool:
    """The last token whose mask (B, S) is nonzero, wherever the padding is; None: the last one."""
    if mask is None:
        return _last_token
    positions = torch.arange(mask.shape[1], device=mask.device)
    return token_at(torch.where(mask.bool(), positions, 0).amax(1))


def _last_token(x: Tensor) -> Tensor:
    return x[:, -1]


def _patch_mean(class_tokens: int, x: Tensor) -> Tensor:
    return x[:, class_tokens:].mean(1)


def _masked_mean(mask: Tensor, x: Tensor) -> Tensor:
    # padding is left out, not multiplied by zero: whatever it holds, NaN included, stays out
    total = torch.where(mask[..., None], x, 0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


def _token_at(index: Tensor, x: Tensor) -> Tensor:
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
