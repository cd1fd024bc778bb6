"""Pool tokens into one feature: a layer's input for its router, and the output of the whole encoder."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Pool = Callable[[Tensor], Tensor]
"""Maps tokens (B, S, D), or (B, H, W, D) of an image, to a feature (B, D)."""


def first_token(x: Tensor) -> Tensor:
    """Return the class token."""
    return x[:, 0]


def token_mean(x: Tensor) -> Tensor:
    """Return the mean over all tokens."""
    return x.flatten(1, -2).mean(1)


def patch_mean(class_tokens: int) -> Pool:
    """Return a pool that takes the mean over an image's patches and skips the first ``class_tokens`` tokens."""
    return functools.partial(_patch_mean, class_tokens)


def masked_mean(mask: Tensor | None) -> Pool:
    """Return a pool that takes the mean over real tokens, where mask (B, S) is nonzero.

    A sample without real tokens gives zeros. With mask None all tokens are real.
    """
    return token_mean if mask is None else functools.partial(_masked_mean, mask.bool())


def token_at(index: Tensor) -> Pool:
    """Return a pool that takes each sample's token at ``index``, (B,) integers."""
    return functools.partial(_token_at, index)


def last_real_token(mask: Tensor | None) -> Pool:
    """Return a pool that takes the last token whose mask (B, S) is nonzero, wherever the padding is; with None the last token."""
    if mask is None:
        return _last_token
    positions = torch.arange(mask.shape[1], device=mask.device)
    return token_at(torch.where(mask.bool(), positions, 0).amax(1))


def _last_token(x: Tensor) -> Tensor:
    return x[:, -1]


def _patch_mean(class_tokens: int, x: Tensor) -> Tensor:
    return x[:, class_tokens:].mean(1)


def _masked_mean(mask: Tensor, x: Tensor) -> Tensor:
    # padding is replaced by zeros, not multiplied by zero: its values, NaN included, must not reach the sum
    total = torch.where(mask[..., None], x, 0).sum(1, dtype=torch.promote_types(x.dtype, torch.float32))
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


def _token_at(index: Tensor, x: Tensor) -> Tensor:
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
