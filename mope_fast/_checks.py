"""Argument checks of the public functions: an error says what was got, what was expected and what to do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._settings import LARGEST
from .receptive_field import ReceptiveField

MAX_EXPERTS = 1024
MAX_HEAD_DIM = 256
SMALLEST_EPS = 1e-25
"""Chosen so that the third power of a norm's reciprocal is finite in float32."""


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(str(size) for size in tensor.shape)})"


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _check_float(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {tensor.dtype}: call .float() on it")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_kind(value)}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        hint = ": reading a tensor would wait for the device" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a Python float, got {_kind(value)}{hint}")


def _check_same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.device != b.device:
        raise ValueError(f"{first} is on {a.device} and {second} on {b.device}: move them to one device")


def check_route_and_mix(
    logits: Tensor,
    experts: Tensor,
    temperature: float,
    noise: Tensor | None,
    top_k: int | None,
    renormalize: bool,
    gram: Tensor | None,
    eps: float,
) -> None:
    """Check the arguments of :func:`mope_fast.functional.route_and_mix`."""
    _check_float("logits", logits)
    _check_float("experts", experts)
    if logits.dim() != 2:
        raise ValueError(f"logits must be (B, K), got {_shape(logits)}")
    if experts.dim() != 3:
        raise ValueError(f"experts must be (K, L, M), got {_shape(experts)}")
    num_experts = logits.shape[1]
    if experts.shape[0] != num_experts:
        raise ValueError(f"logits {_shape(logits)} and experts {_shape(experts)} must have the same K, in dimensions 1 and 0")
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"the number of experts K must be 1 to {MAX_EXPERTS}, got {num_experts}")
    if experts.shape[1] == 0 or experts.shape[2] == 0:
        raise ValueError(f"experts must have prompt length L >= 1 and width M >= 1, got {_shape(experts)}")
    _check_same_device("logits", logits, "experts", experts)
    _check_number("temperature", temperature)
    if not 1e-30 < temperature <= LARGEST:
        raise ValueError(f"temperature must be > 1e-30 and finite in float32, got {temperature}")
    if noise is not None:
        _check_float("noise", noise)
        if noise.shape != logits.shape:
            raise ValueError(f"noise must have the shape of logits {_shape(logits)}, got {_shape(noise)}")
        if noise.requires_grad:
            raise ValueError("noise is a constant and gets no gradient, but it requires grad: pass noise.detach()")
        _check_same_device("logits", logits, "noise", noise)
    if top_k is not None and (
        isinstance(top_k, bool) or not isinstance(top_k, (int, torch.SymInt)) or not 1 <= top_k <= num_experts
    ):
        raise ValueError(f"top_k must be 1 to the number of experts {num_experts}, or None for all; got {top_k!r}")
    _check_flag("renormalize", renormalize)
    if renormalize and top_k is None:
        raise ValueError("renormalize=True needs top_k, got top_k=None: without top_k the scores already add up to 1")
    if gram is not None:
        _check_float("gram", gram)
        expected = (experts.shape[1], num_experts, num_experts)
        if gram.shape != expected:
            raise ValueError(f"gram must be (L, K, K) = {expected}, got {_shape(gram)}")
        _check_number("eps", eps)
        if not SMALLEST_EPS <= eps <= LARGEST:
            raise ValueError(f"eps must be >= {SMALLEST_EPS} and finite in float32, got {eps}")
        _check_same_device("logits", logits, "gram", gram)


def check_importance_loss(scores: Tensor, threshold: float) -> None:
    """Check the arguments of :func:`mope_fast.functional.importance_loss`."""
    _check_float("scores", scores)
    if scores.dim() not in (2, 3):
        raise ValueError(f"scores must be (B, K) or (N, B, K), got {_shape(scores)}")
    if scores.shape[-1] == 0 or (scores.dim() == 3 and scores.shape[0] == 0):
        raise ValueError(f"scores must have at least one layer and one expert, got {_shape(scores)}")
    _check_number("threshold", threshold)
    if not 0 <= threshold <= LARGEST:
        raise ValueError(f"threshold must be >= 0 and finite in float32, got {threshold}")


def check_prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, ...]],
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window: object,
) -> None:
    """Check the arguments of :func:`mope_fast.functional.prompt_attention`."""
    _check_attention(q, k, v, key_padding_mask, bias, scale, is_causal)
    check_prefixes(prefixes, q, "q", q.shape[0], k.shape[1], q.shape[3])
    check_window(window)


def check_window(window: object) -> None:
    """Raise TypeError or ValueError unless ``window`` is None or a pair (left, right)."""
    if window is None:
        return
    if not isinstance(window, (list, tuple)) or len(window) != 2 or not all(map(_is_limit, window)):
        raise TypeError(f"window must be a pair (left, right) of integers or None for no limit, got {_kind(window)}")
    if any(limit is not None and limit < 0 for limit in window):
        raise ValueError(f"window must have limits >= 0, or None for no limit, got {tuple(window)}")


def _is_limit(value: object) -> bool:
    return value is None or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool))


def check_window_prompt_attention(
    qkv: Tensor,
    prefixes: Sequence,
    relative_position_bias: Tensor,
    window_size: object,
    shift_size: object,
    pad_qkv: Tensor | None,
    scale: float | None,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Check the arguments of :func:`mope_fast.functional.window_prompt_attention` and return window and shift as pairs."""
    _check_float("qkv", qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be (B, Hi, Wi, 3, H, Dh), got {_shape(qkv)}: unflatten the last dimension of the projection")
    batch, height, width, _, heads, head_dim = qkv.shape
    if height == 0 or width == 0 or heads == 0:
        raise ValueError(f"qkv must have at least one token and one head, got {_shape(qkv)}")
    _check_head_dim(head_dim)
    window, shift = _pair("window_size", window_size), _pair("shift_size", shift_size)
    if min(window) < 1:
        raise ValueError(f"window_size must be >= 1, got {window_size}")
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift_size must be >= 0 and less than window_size {window}, got {shift_size}")
    check_prefixes(prefixes, qkv, "qkv", batch, heads, head_dim)
    _check_float("relative_position_bias", relative_position_bias)
    area = window[0] * window[1]
    if relative_position_bias.shape != (heads, area, area):
        raise ValueError(
            f"relative_position_bias must be (H, W, W) = ({heads}, {area}, {area}), where W is the number of tokens in a window; "
            f"got {_shape(relative_position_bias)}"
        )
    _check_same_device("qkv", qkv, "relative_position_bias", relative_position_bias)
    if pad_qkv is not None:
        _check_float("pad_qkv", pad_qkv)
        if pad_qkv.shape != (3, heads, head_dim):
            raise ValueError(f"pad_qkv must be (3, {heads}, {head_dim}), the projection's bias; got {_shape(pad_qkv)}")
        _check_same_device("qkv", qkv, "pad_qkv", pad_qkv)
    _check_scale(scale)
    return window, shift


def _pair(name: str, value: object) -> tuple[int, int]:
    """Return (height, width) from an int for both axes or from a pair."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2 or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in pair):
        raise TypeError(f"{name} must be an integer or a pair (height, width), got {_kind(value)}")
    return pair


def check_number_of_prefixes(prefixes: object) -> None:
    """Raise TypeError or ValueError unless ``prefixes`` is a sequence of at most two pairs or triples."""
    members = (2, 3)
    if not isinstance(prefixes, (list, tuple)) or not all(isinstance(p, (list, tuple)) and len(p) in members for p in prefixes):
        raise TypeError("prefixes must be a sequence of (key, value) pairs or (key, value, mask) triples, () for none")
    if len(prefixes) > 2:
        raise ValueError(f"prefixes must hold at most two (key, value) pairs, got {len(prefixes)}: concatenate some of them")


def check_prefixes(prefixes: Any, tokens: Tensor, name: str, batch: int, heads: int, head_dim: int) -> None:
    """Check prefixes, which must be on the device of ``tokens``; messages call that tensor ``name``."""
    check_number_of_prefixes(prefixes)
    for i, (pk, pv, *masks) in enumerate(prefixes):
        for tensor in (pk, pv):
            _check_float(f"prefix {i}", tensor)
            _check_same_device(name, tokens, f"prefix {i}", tensor)
        fits = pk.dim() == 4 and pk.shape[0] in (1, batch) and pk.shape[1] == heads and pk.shape[3] == head_dim
        if not fits or pk.shape != pv.shape:
            expected = f"({batch} or 1, {heads}, P, {head_dim})"
            raise ValueError(f"prefix {i} must be two tensors {expected}, got {_shape(pk)} and {_shape(pv)}")
        if pk.dtype != pv.dtype:
            raise TypeError(f"key and value of prefix {i} must have one dtype, got {pk.dtype} and {pv.dtype}")
        for mask in masks:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"the mask of prefix {i} must be a bool tensor, got {got}")
            if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != pk.shape[2]:
                raise ValueError(
                    f"the mask of prefix {i} must be ({batch} or 1, {pk.shape[2]}), True = present; got {_shape(mask)}"
                )
            _check_same_device(name, tokens, f"the mask of prefix {i}", mask)


def check_receptive_field_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: object,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> None:
    """Check the arguments of :func:`mope_fast.functional.receptive_field_attention`."""
    _check_attention(q, k, v, key_padding_mask, bias, scale)
    if not isinstance(field, ReceptiveField):
        raise TypeError(f"field must be a mope_fast.ReceptiveField, got {type(field).__name__}")
    if not q.shape[2] == k.shape[2] == field.size:
        lengths = " + ".join(map(str, field.lengths))
        raise ValueError(
            f"the field has {lengths} = {field.size} positions, but q has {q.shape[2]} and k {k.shape[2]}: make them equal"
        )


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    is_causal: bool = False,
) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_float(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (B, H, S, Dh), got {_shape(tensor)}")
        _check_same_device("q", q, name, tensor)
    batch, heads, queries, head_dim = q.shape
    tokens = k.shape[2]
    key_heads = k.shape[1]
    if v.shape[1] != key_heads or (heads % key_heads if key_heads else heads):
        raise ValueError(
            f"k and v must have as many heads as q, or a divisor of that number: q has {heads} heads, k {key_heads}, v {v.shape[1]}"
        )
    if k.shape != v.shape or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k and v must be ({batch}, Hkv, Sk, {head_dim}) to fit q {_shape(q)}; got k {_shape(k)}, v {_shape(v)}")
    _check_head_dim(head_dim)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    _check_flag("is_causal", is_causal)
    _check_scale(scale)
    if key_padding_mask is not None:
        mask = key_padding_mask
        if not isinstance(mask, Tensor):
            raise TypeError(f"key_padding_mask must be a bool tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool or mask.shape != (batch, tokens):
            raise ValueError(
                f"key_padding_mask must be bool ({batch}, {tokens}), True = a real token; got {mask.dtype} {_shape(mask)}"
            )
        _check_same_device("q", q, "key_padding_mask", mask)
    if bias is not None:
        _check_float("bias", bias)
        fits = bias.dim() == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
        if not fits or bias.shape[2:] != (queries, tokens):
            raise ValueError(f"bias must be ({batch} or 1, {heads} or 1, {queries}, {tokens}), got {_shape(bias)}")
        _check_same_device("q", q, "bias", bias)


def _check_head_dim(head_dim: int) -> None:
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension Dh must be 1 to {MAX_HEAD_DIM}, got {head_dim}")


def _check_scale(scale: Any) -> None:
    if scale is None:
        return
    _check_number("scale", scale)
    if not -LARGEST <= scale <= LARGEST:
        raise ValueError(f"scale must be finite in float32, got {scale}")
