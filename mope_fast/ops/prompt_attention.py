"""``mope_fast::prompt_attention`` and its backward: CPU maths, Triton launches and the autograd function on top.

One op for prefixes, windows, padding, bias and receptive fields. ``field`` is ``ReceptiveField.lowered``; ``left`` and ``right``
are a window's, None for no limit (a causal one has none on the left and 0 on the right). ``key_padding_mask`` is about tokens, or
about both prefixes and tokens. ``scale`` is not negative.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._autocast import without_autocast
from ..reference.attention import UNLIMITED, Window, all_rows, masked_weights, softmax_or_zero, window_mask
from ._registration import apply, define, once_differentiable
from ._triton import INTERPRETED, castable, kernels_of, launch_kernel, not_empty, prefix_targets, strides, sum_parts

if TYPE_CHECKING:
    from ..kernels.launch import AttentionLaunch

LOG2_E = math.log2(math.e)
_LEAST_SCALE = 1e-30
"""Exponents are multiplied by it where scale is 0: 0 times -inf is no number."""


class _Tensors(NamedTuple):
    """What both ops are given, in the order of their schemas."""

    q: Tensor
    k: Tensor
    v: Tensor
    pk0: Tensor | None
    pv0: Tensor | None
    pk1: Tensor | None
    pv1: Tensor | None
    field: Tensor | None
    padding: Tensor | None
    bias: Tensor | None

    @property
    def prefix_keys(self) -> list[Tensor]:
        return [keys for keys in (self.pk0, self.pk1) if keys is not None]

    @property
    def prefix_values(self) -> list[Tensor]:
        return [values for values in (self.pv0, self.pv1) if values is not None]


def _of_forward(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the schema of the forward op calls it."""
    count = len(_Tensors._fields)
    return lambda *args: function(_Tensors(*args[:count]), *args[count:])


def _of_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """As that of the backward op does, whose first argument is the output's gradient."""
    count = 1 + len(_Tensors._fields)
    return lambda *args: function(args[0], _Tensors(*args[1:count]), *args[count:])


def _empty_tokens(like: Tensor) -> Tensor:
    """(B, H, S, Dh) laid out as (B, S, H, Dh), the order in which encoders go on."""
    _, heads, tokens, head_dim = like.shape
    # not a transposed view: autograd forbids in-place operations on a view that comes out of a custom function
    return like.new_empty_strided(like.shape, (tokens * heads * head_dim, head_dim, heads * head_dim, 1))


def _statistics_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _fake_forward(given: _Tensors, scale: float, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
    q = given.q
    return _empty_tokens(q), q.new_empty((*q.shape[:3], 2), dtype=_statistics_dtype(q))


def _empty_grads(given: _Tensors, needs: list[bool]) -> list[Tensor]:
    """Of q, k, v, both prefixes (2, B or 1, H, P, Dh) with keys before values, and bias; without elements if not asked for."""
    q, k, bias = given.q, given.k, given.bias

    def empty(tensor: Tensor | None, needed: bool) -> Tensor:
        return q.new_empty((0,)) if tensor is None or not needed else _empty_tokens(tensor)

    tokens = needs[1] or needs[2]
    return [
        empty(q, needs[0]),
        empty(k, tokens),
        empty(k, tokens),
        *(
            q.new_empty((0,)) if pk is None or not need else pk.new_empty((2, *pk.shape))
            for pk, need in zip((given.pk0, given.pk1), needs[3:5], strict=True)
        ),
        q.new_empty((0,)) if bias is None or not needs[5] else bias.new_empty(bias.shape),
    ]


def _fake_backward(grad_out, given: _Tensors, out, statistics, scale, left, right, needs):
    return tuple(_empty_grads(given, needs))


def _flops(given: _Tensors, products: int) -> int:
    (batch, heads, queries, head_dim), keys = given.q, given.k[2] + sum(prefix[2] for prefix in given.prefix_keys)
    return 2 * products * batch * heads * queries * keys * head_dim


def _visible(given: _Tensors, window: Window) -> Tensor | None:
    """bool (Sq, Sk) or None for all."""
    q, k, field = given.q, given.k, given.field
    if window != UNLIMITED:
        return window_mask(q.shape[2], k.shape[2], window, q.device)
    if field is None:
        return None
    index = torch.arange(k.shape[2], device=q.device)
    visible = (index >= field[0][:, None]) & (index < field[1][:, None])
    if field.shape[0] == 6:
        visible &= (field[5][:, None] >> field[4]) & 1 != 0
    return visible


def _reference_weights(given: _Tensors, scale: float, window: Window) -> Tensor:
    masking = {"visible": _visible(given, window), "key_padding_mask": given.padding, "bias": given.bias}
    return masked_weights(given.q, given.k, given.prefix_keys, scale=scale, **masking)


def _reference_forward(given: _Tensors, scale: float, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
    q = given.q
    out, statistics = _fake_forward(given, scale, left, right)
    weights = _reference_weights(given, scale, (left, right))
    out.copy_(softmax_or_zero(weights) @ all_rows(given.v, given.prefix_values, q, weights.dtype))
    fully_masked = (weights == float("-inf")).all(-1)
    largest = weights.amax(-1) if weights.shape[-1] else weights.new_zeros(q.shape[:3])
    largest = largest.masked_fill(fully_masked, 0.0)
    statistics[..., 0] = largest * LOG2_E
    sums = (weights - largest[..., None]).exp().sum(-1)
    statistics[..., 1] = sums.log2().masked_fill(fully_masked, float("inf"))
    return out, statistics


def _reference_backward(grad_out, given: _Tensors, out, statistics, scale, left, right, needs):
    """The formulas in the docstring of ``kernels/prompt_attention.py``, line by line."""
    q, bias = given.q, given.bias
    grad_q, grad_k, grad_v, grads0, grads1, grad_bias = grads = _empty_grads(given, needs)
    weights = _reference_weights(given, scale, (left, right))
    dtype = weights.dtype
    p = softmax_or_zero(weights)
    keys = all_rows(given.k, given.prefix_keys, q, dtype)
    values = all_rows(given.v, given.prefix_values, q, dtype)
    g = grad_out.to(dtype)
    ds = p * (g @ values.mT - (g * out).sum(-1, keepdim=True))
    if needs[0]:
        grad_q.copy_(scale * ds @ keys)
    key_heads = (given.k.shape[1], q.shape[1] // max(given.k.shape[1], 1))
    to_keys, to_values = (t.unflatten(1, key_heads).sum(2) for t in (scale * ds.mT @ q.to(dtype), p.mT @ g))
    start = 0
    for pk, grad, need in ((given.pk0, grads0, needs[3]), (given.pk1, grads1, needs[4])):
        if pk is not None:
            end = start + pk.shape[2]
            if need:
                both = torch.stack([to_keys[:, :, start:end], to_values[:, :, start:end]])
                grad.copy_(both.sum(1, keepdim=True) if pk.shape[0] == 1 else both)
            start = end
    if needs[1] or needs[2]:
        grad_k.copy_(to_keys[:, :, start:])
        grad_v.copy_(to_values[:, :, start:])
    if bias is not None and needs[5]:
        grad_bias.copy_(ds[..., start:].sum_to_size(bias.shape))
    return tuple(grads)


def _for_each_sample(tensor: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """A stride of zero where samples or heads share the tensor."""
    return tensor if tensor is None or tensor.shape[:2] == (batch, heads) else tensor.expand(batch, heads, -1, -1)


def _common_arguments(given: _Tensors, scale: float, left: int | None, right: int | None) -> dict[str, Any]:
    """What the kernels share, by the names of their parameters."""
    kernels, launches = kernels_of("prompt_attention"), kernels_of("launch")
    q, k, v, pk0, pv0, pk1, pv1, field, padding, bias = given
    (batch, heads, queries, head_dim), (_, key_heads, keys, _) = q.shape, k.shape
    lengths = [0 if pk is None else pk.shape[2] for pk in (pk0, pk1)]
    pk0, pv0, pk1, pv1 = (not_empty(_for_each_sample(t, batch, key_heads)) for t in (pk0, pv0, pk1, pv1))
    bias = _for_each_sample(bias, batch, heads)
    pk0, pv0, pk1, pv1 = (rows if rows is None or rows.dtype == q.dtype else rows.to(q.dtype) for rows in (pk0, pv0, pk1, pv1))
    if padding is not None and padding.stride(1) != 1:
        padding = padding.contiguous()
    by_tokens = kernels.WINDOW if left is not None else kernels.FULL if right is None else kernels.CAUSAL
    by_rows = {0: by_tokens, 4: kernels.INTERVALS, 6: kernels.GROUPS}
    no_limit = queries + keys
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "pk0_ptr": pk0, "pv0_ptr": pv0, "pk1_ptr": pk1, "pv1_ptr": pv1,
        "field_ptr": field, "padding_ptr": padding, "bias_ptr": bias,
        "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
        "pk0_strides": strides(pk0), "pv0_strides": strides(pv0),
        "pk1_strides": strides(pk1), "pv1_strides": strides(pv1),
        "bias_strides": strides(bias),
        "H": heads, "Sq": queries, "Sk": keys, "P0": lengths[0], "P1": lengths[1],
        "left": no_limit if left is None else min(left, no_limit), "right": no_limit if right is None else min(right, no_limit),
        "padding_row": 0 if padding is None else padding.stride(0),
        "scale_log2": max(scale, _LEAST_SCALE) * LOG2_E,
        "VISIBILITY": by_rows[0 if field is None else field.shape[0]].value,
        "MASKED_PREFIXES": padding is not None and padding.shape[1] > keys, "GROUP": heads // max(key_heads, 1),
        "HEAD_DIM": head_dim, "BLOCK_D": launches.padded_head_dim(head_dim),
    }  # fmt: skip


def _tiles(launch: "AttentionLaunch") -> dict[str, int]:
    block_q, block_k, num_warps, num_stages = launch
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages}


def _triton_forward(given: _Tensors, scale: float, left: int | None, right: int | None) -> tuple[Tensor, Tensor]:
    kernels, launches = kernels_of("prompt_attention"), kernels_of("launch")
    q = given.q
    out, statistics = _fake_forward(given, scale, left, right)
    if out.numel() == 0:
        return out, statistics
    tiles = launches.attention_launch(q.shape[2], q.shape[3], q.element_size())
    launch_kernel(
        kernels.attention_kernel, -(-q.shape[2] // tiles.block_q) * q.shape[0] * q.shape[1],
        **_common_arguments(given, scale, left, right),
        out_ptr=out, statistics_ptr=statistics, out_strides=out.stride(), **_tiles(tiles),
    )  # fmt: skip
    return out, statistics


def _triton_backward(grad_out, given: _Tensors, out, statistics, scale, left, right, needs):
    kernels, launches = kernels_of("prompt_attention"), kernels_of("launch")
    q, bias = given.q, given.bias
    grad_q, grad_k, grad_v, grads0, grads1, grad_bias = grads = _empty_grads(given, needs)
    (batch, heads, queries, head_dim), keys = q.shape, given.k.shape[2]
    if out.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    delta = statistics.new_empty(statistics.shape[:3])
    arguments = {
        **_common_arguments(given, scale, left, right),
        "grad_out_ptr": grad_out, "grad_out_strides": grad_out.stride(), "statistics_ptr": statistics, "delta_ptr": delta,
    }  # fmt: skip
    tiles = launches.query_grads_launch(head_dim, q.element_size())
    launch_kernel(
        kernels.query_grads_kernel, -(-queries // tiles.block_q) * batch * heads,
        **arguments, out_ptr=out, grad_q_ptr=not_empty(grad_q), scale=scale,
        out_strides=out.stride(), grad_q_strides=strides(not_empty(grad_q)), **_tiles(tiles),
    )  # fmt: skip
    _key_gradients(arguments, not_empty(grad_k), not_empty(grad_v), (grads0, grads1), scale)
    if bias is not None and needs[5]:
        bias_batch, bias_heads = bias.shape[:2]
        programs = bias_batch * bias_heads * -(-queries // tiles.block_q) * -(-keys // tiles.block_k)
        launch_kernel(
            kernels.bias_grads_kernel, programs,
            **arguments, grad_bias_ptr=grad_bias,
            batches=batch // bias_batch, heads=heads // bias_heads, bias_heads=bias_heads, **_tiles(tiles),
        )  # fmt: skip
    return tuple(grads)


def _key_gradients(
    arguments: dict[str, Any], grad_k: Tensor | None, grad_v: Tensor | None, grads: tuple[Tensor, Tensor], scale: float
) -> None:
    """Gradients of token keys and values and of both prefixes, those asked for, in one launch."""
    kernels, launches = kernels_of("prompt_attention"), kernels_of("launch")
    q, keys = arguments["q_ptr"], arguments["Sk"]
    batch, heads, queries, head_dim = q.shape
    tiles = launches.key_grads_launch(head_dim, q.element_size())
    token_tiles = -(-keys // tiles.block_k) if grad_k is not None else 0
    splits = launches.prefix_splits(queries)
    targets = prefix_targets(grads, batch, splits, arguments["statistics_ptr"].dtype)
    lengths = [0 if target is None else target.shape[4] for target in targets]
    blocks = [launches.prefix_block(length) for length in (arguments["P0"], arguments["P1"])]
    parts = [-(-length // block) * splits if length else 0 for length, block in zip(lengths, blocks, strict=True)]
    programs = (token_tiles + sum(parts)) * batch * (heads // arguments["GROUP"])
    if programs:
        launch_kernel(
            kernels.key_grads_kernel, programs,
            **arguments, grad_k_ptr=grad_k, grad_v_ptr=grad_v, grads0_ptr=targets[0], grads1_ptr=targets[1],
            token_tiles=token_tiles, parts0=parts[0], parts1=parts[1], splits=splits, scale=scale,
            grad_k_strides=strides(grad_k), grad_v_strides=strides(grad_v),
            grads0_strides=strides(targets[0]), grads1_strides=strides(targets[1]),
            BLOCK_P0=blocks[0], BLOCK_P1=blocks[1], **_tiles(tiles),
        )  # fmt: skip
    sum_parts(grads, targets)


_PREFIXES = "Tensor? prefix_k0, Tensor? prefix_v0, Tensor? prefix_k1, Tensor? prefix_v1"
prompt_attention_forward = define(
    f"prompt_attention(Tensor q, Tensor k, Tensor v, {_PREFIXES}, Tensor? field, Tensor? key_padding_mask, Tensor? bias, "
    "float scale, SymInt? left, SymInt? right) -> (Tensor out, Tensor statistics)",
    cpu=_of_forward(_triton_forward if INTERPRETED else _reference_forward),
    cuda=_of_forward(_triton_forward),
    fake=_of_forward(_fake_forward),
    flops=_of_forward(lambda given, *settings: _flops(given, 2)),
    use="mope_fast.functional.prompt_attention",
)
prompt_attention_backward = define(
    f"prompt_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_PREFIXES}, Tensor? field, "
    "Tensor? key_padding_mask, Tensor? bias, Tensor out, Tensor statistics, float scale, SymInt? left, SymInt? right, "
    "bool[] needs) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_prefix0, Tensor grad_prefix1, Tensor grad_bias)",
    cpu=_of_backward(_triton_backward if INTERPRETED else _reference_backward),
    cuda=_of_backward(_triton_backward),
    fake=_of_backward(_fake_backward),
    flops=_of_backward(lambda grad_out, given, *others: _flops(given, 5)),
    use="mope_fast.functional.prompt_attention",
)


class _PromptAttention(torch.autograd.Function):
    """Gradients for q, k, v, prefixes and bias, each only if asked for."""

    @staticmethod
    def forward(*inputs):
        return prompt_attention_forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.left, ctx.right = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return (None,) * 13
        asked = ctx.needs_input_grad
        needs = [*asked[:3], asked[3] or asked[4], asked[5] or asked[6], asked[9]]
        with without_autocast(grad_out.device.type):
            grad_q, grad_k, grad_v, grads0, grads1, grad_bias = prompt_attention_backward(
                grad_out, *ctx.saved_tensors, ctx.scale, ctx.left, ctx.right, needs
            )
        both = [grads.unbind(0) if need else (None, None) for grads, need in ((grads0, needs[3]), (grads1, needs[4]))]
        grads = (grad_q, grad_k, grad_v, *both[0], *both[1], None, None, grad_bias, None, None, None)
        return tuple(grad if need else None for grad, need in zip(grads, asked, strict=True))


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    *,
    field: Tensor | None,
    window: Window,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Differentiable ``mope_fast::prompt_attention``, without checks: see the functions of :mod:`mope_fast.functional`."""
    flat = [t for pair in prefixes for t in pair] + [None] * (4 - 2 * len(prefixes))
    if INTERPRETED:
        *flat, bias = castable(q.dtype, *flat, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if scale < 0:
        q, scale = -q, -scale
    return apply(_PromptAttention, q, k, v, *flat, field, key_padding_mask, bias, scale, *window)[0]
