"""``mope_fast::window_prompt_attention`` and its backward: CPU maths, Triton launches and the autograd function on top."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autocast import without_autocast
from . import cpu_window_attention
from ._registration import apply, define, once_differentiable
from ._triton import INTERPRETED, castable, kernels_of, launch_kernel, not_empty, prefix_targets, strides, sum_parts
from .sdpa_attention import prefix_mask_of

LOG2_E = math.log2(math.e)


class _Arguments(NamedTuple):
    """What both ops are given, in the order of their schemas."""

    qkv: Tensor
    pk0: Tensor | None
    pv0: Tensor | None
    pk1: Tensor | None
    pv1: Tensor | None
    prefix_mask: Tensor | None
    bias: Tensor
    pad_qkv: Tensor | None
    window_size: Sequence[int]
    shift_size: Sequence[int]
    scale: float


def _fake_forward(*arguments: Any) -> Tensor:
    qkv = _Arguments(*arguments).qkv
    batch, height, width, _, heads, head_dim = qkv.shape
    return qkv.new_empty((batch, height, width, heads * head_dim))


def _empty_grads(given: _Arguments, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Of qkv, both prefixes (2, B or 1, H, P, Dh) with keys before values, bias, padding; without elements if not asked for."""
    qkv, pk0, _, pk1, _, _, bias, pad_qkv, *_ = given
    prefixes = [None if pk is None else (2, *pk.shape) for pk in (pk0, pk1)]
    shapes = (qkv.shape, *prefixes, bias.shape, None if pad_qkv is None else pad_qkv.shape)
    return tuple(
        qkv.new_empty((0,)) if shape is None or like is None or not need else like.new_empty(shape)
        for like, shape, need in zip((qkv, pk0, pk1, bias, pad_qkv), shapes, needs, strict=True)
    )


def _fake_backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *given, needs = arguments
    return _empty_grads(_Arguments(*given), needs)


def _flops(given: _Arguments, products: int) -> int:
    batch, height, width, _, heads, head_dim = given.qkv
    windows = -(-height // given.window_size[0]) * -(-width // given.window_size[1])
    area = given.window_size[0] * given.window_size[1]
    keys = area + sum(prefix[2] for prefix in (given.pk0, given.pk1) if prefix is not None)
    return 2 * products * batch * windows * heads * area * keys * head_dim


def _on_cpu(given: _Arguments) -> cpu_window_attention.Call:
    pairs = [(pk, pv) for pk, pv in ((given.pk0, given.pv0), (given.pk1, given.pv1)) if pk is not None and pv is not None]
    return cpu_window_attention.Call(given.qkv, pairs, *given[5:])


def _cpu_forward(*arguments: Any) -> Tensor:
    given = _Arguments(*arguments)
    with without_autocast("cpu"):
        return cpu_window_attention.forward(_on_cpu(given)).to(given.qkv.dtype)


def _cpu_backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *others, needs = arguments
    given = _Arguments(*others)
    qkv, pk0, _, pk1, _, _, bias, pad_qkv, *_ = given
    asked = {"of_tokens": needs[0], "of_bias": needs[3], "of_padding": pad_qkv is not None and needs[4]}
    got = cpu_window_attention.backward(grad_out, _on_cpu(given), **asked)
    of_prefixes = iter(got.prefixes)
    prefixes = [None if pk is None else _summed(next(of_prefixes), pk) for pk in (pk0, pk1)]
    grads = (got.qkv, *prefixes, got.bias, got.padding)
    return tuple(
        qkv.new_empty((0,)) if grad is None or like is None or not need else grad.to(like.dtype)
        for grad, like, need in zip(grads, (qkv, pk0, pk1, bias, pad_qkv), needs, strict=True)
    )


def _summed(grads: Tensor, prefix: Tensor) -> Tensor:
    """(2, B, H, P, Dh), summed over images that share the prefix; not a view of other gradients."""
    return grads.sum(1, keepdim=True) if prefix.shape[0] != grads.shape[1] else grads.clone(memory_format=torch.contiguous_format)


def _for_each_image(tensor: Tensor | None, batch: int) -> Tensor | None:
    """A stride of zero where images share the tensor."""
    return tensor if tensor is None or tensor.shape[0] == batch else tensor.expand(batch, *tensor.shape[1:])


def _in_tiles(bias: Tensor, rows: int, keys: int) -> Tensor:
    """(H, W, W) with zeros around: (H, rows, keys)."""
    tiles = bias.new_zeros((bias.shape[0], rows, keys))
    tiles[:, : bias.shape[1], : bias.shape[2]] = bias
    return tiles


def _common_arguments(given: _Arguments) -> tuple[dict[str, Any], int]:
    """What the kernels share, by the names of their parameters, and how many windows a program takes."""
    launches = kernels_of("launch")

    qkv, pk0, pv0, pk1, pv1, prefix_mask, bias, pad_qkv, window_size, shift_size, scale = given
    batch, height, width, _, heads, head_dim = qkv.shape
    area, windows = window_size[0] * window_size[1], -(-height // window_size[0]) * -(-width // window_size[1])
    lengths = tuple(0 if pk is None else pk.shape[2] for pk in (pk0, pk1))
    launch = launches.window_launch(area, area + sum(lengths), windows, head_dim, qkv.element_size())
    rows, keys = -(-area // launch.block_q) * launch.block_q, sum(launch.tiles[-1])
    pk0, pv0, pk1, pv1, prefix_mask = (not_empty(_for_each_image(t, batch)) for t in (pk0, pv0, pk1, pv1, prefix_mask))
    padded = height % window_size[0] or width % window_size[1]
    pad_qkv = pad_qkv if padded else None
    arguments = {
        "qkv_ptr": qkv, "pk0_ptr": pk0, "pv0_ptr": pv0, "pk1_ptr": pk1, "pv1_ptr": pv1, "mask_ptr": prefix_mask,
        "bias_ptr": _in_tiles(bias, rows, keys), "pad_ptr": pad_qkv,
        "H": heads, "windows": windows,
        "image_size": (height, width), "shift": tuple(shift_size), "lengths": lengths,
        "roll": (shift_size[0] % height, shift_size[1] % width), "scale_log2": scale * LOG2_E,
        "qkv_strides": qkv.stride(), "pk0_strides": strides(pk0), "pv0_strides": strides(pv0),
        "pk1_strides": strides(pk1), "pv1_strides": strides(pv1), "mask_strides": strides(prefix_mask),
        "pad_strides": strides(pad_qkv),
        "WINDOW": tuple(window_size), "AREA": area, "SHIFTED": any(shift_size),
        "HEAD_DIM": head_dim, "BLOCK_D": launches.padded_head_dim(head_dim),
        "BLOCK_Q": launch.block_q, "ROWS": rows, "KEYS": keys, "TILES": launch.tiles,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
    return arguments, launch.windows


def _triton_forward(*arguments: Any) -> Tensor:
    kernels, launches = kernels_of("window_attention"), kernels_of("launch")
    given, out = _Arguments(*arguments), _fake_forward(*arguments)
    if out.numel() == 0:
        return out
    common, per_chunk = _common_arguments(given)
    windows, images_and_heads = common["windows"], given.qkv.shape[0] * common["H"]
    per_chunk = launches.forward_windows(per_chunk, images_and_heads * windows)
    chunks = -(-windows // per_chunk)
    launch_kernel(
        kernels.window_attention_kernel,
        chunks * images_and_heads,
        **common,
        out_ptr=out,
        out_strides=out.stride(),
        chunks=chunks,
        per_chunk=per_chunk,
    )
    return out


def _triton_backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    kernels = kernels_of("window_attention")
    *others, needs = arguments
    given = _Arguments(*others)
    grad_qkv, grads0, grads1, grad_bias, grad_pad = grads = _empty_grads(given, needs)
    qkv, batch, scale = given.qkv, given.qkv.shape[0], given.scale
    if qkv.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    common, per_chunk = _common_arguments(given)
    common |= {"grad_out_ptr": grad_out, "grad_out_strides": grad_out.stride()}
    heads, block_d, windows = common["H"], common["BLOCK_D"], common["windows"]
    chunks = -(-windows // per_chunk)
    acc = torch.promote_types(qkv.dtype, torch.float32)
    targets = prefix_targets((grads0, grads1), batch, chunks, acc)
    padding = None
    if needs[4]:
        padding = qkv.new_empty((batch * chunks, heads, 2, block_d), dtype=acc) if common["pad_ptr"] is not None else None
    if needs[0] or targets[0] is not None or targets[1] is not None or padding is not None:
        launch_kernel(
            kernels.window_grads_kernel, chunks * heads * batch,
            **common, grad_qkv_ptr=not_empty(grad_qkv), grads0_ptr=targets[0], grads1_ptr=targets[1], grad_pad_ptr=padding,
            chunks=chunks, per_chunk=per_chunk, scale=scale, grad_qkv_strides=strides(not_empty(grad_qkv)),
            grads0_strides=strides(targets[0]), grads1_strides=strides(targets[1]),
        )  # fmt: skip
    sum_parts((grads0, grads1), targets)
    if needs[4]:
        grad_pad.zero_()
        if padding is not None:
            grad_pad[1:] = padding.sum(0).transpose(0, 1)[..., : qkv.shape[-1]]
    if needs[3]:
        _bias_gradient(common, batch * windows, grad_bias)
    return grads


def _bias_gradient(arguments: dict[str, Any], units: int, grad_bias: Tensor) -> None:
    """Of all ``units`` windows of all images, parts of the sum side by side."""
    kernels, launches = kernels_of("window_attention"), kernels_of("launch")
    qkv, (heads, rows, keys) = arguments["qkv_ptr"], arguments["bias_ptr"].shape
    programs = heads * rows // arguments["BLOCK_Q"]
    splits = launches.window_splits(units, programs)
    parts = qkv.new_empty((splits, heads, rows, keys), dtype=torch.promote_types(qkv.dtype, torch.float32))
    launch_kernel(
        kernels.window_bias_grads_kernel,
        splits * programs,
        **arguments,
        grad_bias_ptr=parts,
        units=units,
        per_split=-(-units // splits),
    )
    area = arguments["AREA"]
    grad_bias.copy_(parts.sum(0)[:, :area, :area])


_TENSORS = (
    "Tensor qkv, Tensor? prefix_k0, Tensor? prefix_v0, Tensor? prefix_k1, Tensor? prefix_v1, Tensor? prefix_mask, "
    "Tensor relative_position_bias, Tensor? pad_qkv, int[] window_size, int[] shift_size, float scale"
)
window_attention_forward = define(
    f"window_prompt_attention({_TENSORS}) -> Tensor",
    cpu=_triton_forward if INTERPRETED else _cpu_forward,
    cuda=_triton_forward,
    fake=_fake_forward,
    flops=lambda *arguments: _flops(_Arguments(*arguments), 2),
    use="mope_fast.functional.window_prompt_attention",
)
window_attention_backward = define(
    f"window_prompt_attention_backward(Tensor grad_out, {_TENSORS}, bool[] needs) "
    "-> (Tensor grad_qkv, Tensor grad_prefix0, Tensor grad_prefix1, Tensor grad_bias, Tensor grad_pad_qkv)",
    cpu=_triton_backward if INTERPRETED else _cpu_backward,
    cuda=_triton_backward,
    fake=_fake_backward,
    flops=lambda grad_out, *arguments: _flops(_Arguments(*arguments[:-1]), 5),
    use="mope_fast.functional.window_prompt_attention",
)


class _WindowAttention(torch.autograd.Function):
    """Gradients for qkv, prefixes, bias and padding, each only if asked for. The arguments are all that is kept."""

    @staticmethod
    def forward(*inputs):
        return window_attention_forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.window_size, ctx.shift_size, ctx.scale = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        if grad_out is None:
            return (None,) * 11
        asked = ctx.needs_input_grad
        needs = [asked[0], asked[1] or asked[2], asked[3] or asked[4], asked[6], asked[7]]
        with without_autocast(grad_out.device.type):
            grad_qkv, grads0, grads1, grad_bias, grad_pad = window_attention_backward(
                grad_out, *ctx.saved_tensors, ctx.window_size, ctx.shift_size, ctx.scale, needs
            )
        both = [grads.unbind(0) if need else (None, None) for grads, need in ((grads0, needs[1]), (grads1, needs[2]))]
        grads = (grad_qkv, *both[0], *both[1], None, grad_bias, grad_pad, None, None, None)
        return tuple(grad if need else None for grad, need in zip(grads, asked, strict=True))


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
    """Differentiable ``mope_fast::window_prompt_attention``, without checks: see :mod:`mope_fast.functional`."""
    pairs: list[Tensor | None] = [t for prefix in prefixes for t in prefix[:2]]
    pairs += [None] * (4 - len(pairs))
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    bias = relative_position_bias
    if INTERPRETED:
        *pairs, bias, pad_qkv = castable(qkv.dtype, *pairs, bias, pad_qkv)
    return apply(
        _WindowAttention, qkv, *pairs, prefix_mask_of(prefixes, qkv), bias, pad_qkv, list(window_size), list(shift_size), scale
    )
