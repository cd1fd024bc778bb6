"""``prompt_attention`` and ``receptive_field_attention`` on torch's own attention kernels."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import cast
from .._values import can_be_looked_at
from ..receptive_field import ReceptiveField
from ..reference.attention import CAUSAL, UNLIMITED, Window, window_mask


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    *,
    window: Window,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """scaled_dot_product_attention on concatenated keys; a mask tensor only where one is needed."""
    if prefixes and q.requires_grad and _is_part(q):
        q = q.contiguous()  # else the whole packed projection is kept for the backward pass, beside keys and values
    if window == UNLIMITED and key_padding_mask is None and bias is None:
        return _attended(q, *concatenated(k, v, prefixes), scale, fresh=len(prefixes) > 0)
    queries, tokens = q.shape[2], k.shape[2]
    prefix_length = sum(pk.shape[2] for pk, _ in prefixes)
    # torch's own triangle gives NaN for scales that are not positive
    plain = key_padding_mask is None and bias is None and (scale is None or scale > 0)
    if window == CAUSAL and queries == tokens and not prefix_length and plain:
        return _call(*readable(q, k, v), masked=False, is_causal=True, scale=scale)
    hidden = _hidden_keys(k, prefix_length + tokens) if prefix_length else 0
    if hidden:
        rows = k.new_zeros(1, k.shape[1], hidden, k.shape[3])
        prefixes = [(rows, rows), *prefixes]
    k, v = concatenated(k, v, prefixes)
    # a triangle aligned to the last key would do for prefixes too, but torch's object for it (CausalBias) doesn't compile in 2.15
    visible = None if window == UNLIMITED else window_mask(queries, tokens, window, q.device)
    return _attention(q, k, v, visible, key_padding_mask, bias, prefix_length, scale, hidden)


def _call(q: Tensor, k: Tensor, v: Tensor, *, masked: bool, **settings: Any) -> Tensor:
    """torch's attention; where its fast kernels don't take heads that share keys, these are repeated."""
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, **settings)
    if masked or (q.device.type == "cuda" and q.dtype.itemsize > 2):
        return F.scaled_dot_product_attention(q, *repeated(q, k, v), **settings)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **settings)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with a head for each of q's."""
    if q.shape[1] == k.shape[1]:
        return k, v
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return k, v


def _attended(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None, *, fresh: bool) -> Tensor:
    """``fresh``: keys and values are concatenations, whose rows don't overlap."""
    q, k, v = (*readable(q), k, v) if fresh else readable(q, k, v)
    return _call(q, k, v, masked=mask is not None, attn_mask=mask, scale=scale)


def _is_part(tensor: Tensor) -> bool:
    """Whether its memory is a part of more; not asked while it compiles, when a compiler decides what is kept."""
    if type(tensor) is not Tensor or tensor.device.type == "meta" or torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def receptive_field_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: ReceptiveField,
    *,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """scaled_dot_product_attention with a mask tensor: on a CPU faster than one call for each block of an interval field."""
    return _attention(q, k, v, field.kept_mask(q.device), key_padding_mask, bias, 0, scale)


def readable(*tensors: Tensor) -> list[Tensor]:
    """Queries, keys or values as they are, or copied where torch's kernels give garbage for them.

    Those do so where the last stride is 1 and two rows share memory, as after ``unfold``. A stride of 0 is no such case.
    """
    return [tensor.contiguous() if _rows_overlap(tensor.stride(), tensor.shape[-1]) else tensor for tensor in tensors]


def _rows_overlap(strides: Sequence[int], width: int) -> bool:
    batch, heads, rows, last = strides
    return last == 1 and (0 < batch < width or 0 < heads < width or 0 < rows < width)


def concatenated(k: Tensor, v: Tensor, prefixes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, P + Sk, Dh) in the tokens' dtype, prefixes first."""
    if not prefixes:
        return k, v
    keys, values = zip(*prefixes, strict=True)
    return _joined(keys, k), _joined(values, v)


def _joined(prefixes: Sequence[Tensor], tokens: Tensor) -> Tensor:
    batch = tokens.shape[0]
    parts = [cast(rows, tokens.dtype) for rows in prefixes]
    parts = [rows if rows.shape[0] == batch else rows.expand(batch, -1, -1, -1) for rows in parts]
    return torch.cat([*parts, tokens], dim=2)


_VECTOR = 16
"""Floats of the widest vector that torch's kernel for CPUs works with; it takes what is left of a row of products one by one."""


def _hidden_keys(k: Tensor, keys: int) -> int:
    """How many hidden keys make attention with a mask faster."""
    if k.device.type != "cpu" or k.dtype.itemsize > 4 or torch.compiler.is_compiling():
        return 0
    rest = keys % _VECTOR
    # a few are sooner done than a whole vector more
    return _VECTOR - rest if rest >= _VECTOR // 2 else 0


def prefix_mask_of(prefixes: Sequence, like: Tensor) -> Tensor | None:
    """Which keys of all prefixes are there, bool (B, P) with the batch of ``like``; None if no prefix has a mask."""
    if all(len(prefix) == 2 for prefix in prefixes):
        return None
    masks = [prefix[2] if len(prefix) == 3 else like.new_ones((1, prefix[0].shape[2]), dtype=torch.bool) for prefix in prefixes]
    return torch.cat([mask.expand(like.shape[0], -1) for mask in masks], dim=1)


def in_range(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in ``dtype``; what is finite stays so: only -inf itself hides a key."""
    if torch.finfo(dtype).max >= torch.finfo(bias.dtype).max:
        return bias.to(dtype)
    limits = torch.finfo(dtype)
    return torch.where(bias.isinf(), bias, bias.clamp(limits.min, limits.max)).to(dtype)


def over_all_keys(
    visible: Tensor | None, key_padding_mask: Tensor | None, bias: Tensor | None, prefix_length: int, tokens: int, hidden: int = 0
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Which keys a query sees (None: all), the bias, and which queries see nothing at all (None: there is none).

    ``visible`` and ``bias`` are about tokens, ``key_padding_mask`` about tokens or all keys but the hidden ones. Keys are: hidden
    ones, which nobody sees; those of prefixes, which everybody sees; those of tokens.
    """
    padding, is_sure = None, prefix_length > 0
    if key_padding_mask is not None:
        masked_prefixes = key_padding_mask.shape[1] > tokens
        is_sure = is_sure and not masked_prefixes
        padding = _behind(key_padding_mask, 0 if masked_prefixes else prefix_length, hidden, seen=True, unseen=False)
        padding = padding[:, None, None, :]
    if bias is not None:
        bias = _behind(bias, prefix_length, hidden, seen=0.0, unseen=float("-inf"))
    if visible is not None:
        visible = _behind(visible, prefix_length, hidden, seen=True, unseen=False)
    visible = padding if visible is None else visible if padding is None else visible & padding
    if is_sure or (visible is None and bias is None):
        return visible, bias, None
    parts = [*([] if visible is None else [visible]), *([] if bias is None else [bias != float("-inf")])]
    fully_masked = ~functools.reduce(torch.logical_and, parts).any(-1, keepdim=True)
    # where looking costs no wait for a device, it saves a pass over the output
    return visible, bias, None if can_be_looked_at(fully_masked) and not fully_masked.any() else fully_masked


def _behind(mask: Tensor, prefix_length: int, hidden: int, *, seen: float, unseen: float) -> Tensor:
    """A mask behind what ``prefix_length`` and ``hidden`` keys before it have in it."""
    mask = F.pad(mask, (prefix_length, 0), value=seen) if prefix_length else mask
    return F.pad(mask, (hidden, 0), value=unseen) if hidden else mask


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    prefix_length: int,
    scale: float | None,
    hidden: int = 0,
) -> Tensor:
    """See :func:`over_all_keys`, for the order of keys in k and v too."""
    bias = None if bias is None else in_range(bias, q.dtype)
    tokens = k.shape[2] - prefix_length - hidden
    visible, bias, fully_masked = over_all_keys(visible, key_padding_mask, bias, prefix_length, tokens, hidden)
    mask: Tensor | None
    if bias is not None:
        mask = bias if visible is None else bias.masked_fill(~visible, float("-inf"))
        # a softmax over nothing is undefined: let such a query see everything, then take its output away
        mask = mask if fully_masked is None else mask.masked_fill(fully_masked, 0.0)
    else:
        mask = visible if fully_masked is None or visible is None else visible | fully_masked
    out = _attended(q, k, v, scale, mask, fresh=prefix_length + hidden > 0)
    return out if fully_masked is None else out.masked_fill(fully_masked, 0.0)
