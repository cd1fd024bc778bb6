"""``mope_fast::layer_prompts`` and its backward: a layer's router, its mixture, and the prompts beside it in one buffer."""

import torch
from torch import Tensor

from .._autocast import cast, without_autocast
from ..reference.layer_prompts import router_logits
from ..reference.route_and_mix import accumulator_dtype
from . import route_and_mix as mixing
from ._registration import apply, define, once_differentiable
from ._triton import INTERPRETED, castable, not_empty


def _lengths(before: Tensor | None, experts: Tensor, after: Tensor | None) -> tuple[int, int, int]:
    return 0 if before is None else before.shape[1], experts.shape[1], 0 if after is None else after.shape[1]


def _fake_forward(feature, cross, weight, keys, experts, before, after, gram, shift, top_k, renormalize, eps, out_dtype):
    batch, dtype = feature.shape[0], accumulator_dtype(cross, experts)
    rows = experts.new_empty((batch, sum(_lengths(before, experts, after)), experts.shape[2]), dtype=out_dtype)
    rstd = cross.new_empty((0,) if gram is None else (batch, experts.shape[1]), dtype=dtype)
    return rows, cross.new_empty(cross.shape, dtype=dtype), rstd


def _flops(feature, cross, weight, keys, experts):
    router = 2 * feature[0] * (weight[0] * weight[1] + keys[0] * keys[1])
    return router + mixing.flops(cross, experts)


def _assembled(mixed, before, after, shift, out_dtype):
    routed = mixed if shift is None else mixed + cast(shift, out_dtype)
    parts = [part for part in (before, routed, after) if part is not None]
    if len(parts) == 1:
        return routed.contiguous()
    return torch.cat([cast(part, out_dtype).expand(mixed.shape[0], -1, -1) for part in parts], dim=1)


def _reference_forward(feature, cross, weight, keys, experts, before, after, gram, shift, top_k, renormalize, eps, out_dtype):
    logits = router_logits(feature, cross, weight, keys, accumulator_dtype(cross, experts))
    by_row = None if gram is None else gram.transpose(0, 1)
    mixed, scores, rstd = mixing._reference_forward(logits, experts, None, by_row, 1.0, top_k, renormalize, eps, out_dtype)
    return _assembled(mixed, before, after, shift, out_dtype), scores, rstd


def _triton_forward(feature, cross, weight, keys, experts, before, after, gram, shift, top_k, renormalize, eps, out_dtype):
    arguments = (feature, cross, weight, keys, experts, before, after, gram, shift)
    rows, scores, rstd = _fake_forward(*arguments, top_k, renormalize, eps, out_dtype)
    by_row = None if gram is None else gram.transpose(0, 1)
    layer = mixing.LayerInputs(feature, weight, keys, not_empty(before), not_empty(after), shift)
    settings = {"temperature": 1.0, "top_k": top_k, "renormalize": renormalize, "eps": eps}
    mixing.launch_mixture(cross, experts, None, by_row, layer, rows, scores, rstd, **settings)
    return rows, scores, rstd


def _fake_backward(
    grad_rows, grad_scores, feature, cross, weight, keys, experts, before, after, gram, shift, scores, rstd,
    top_k, renormalize, eps, needs,
):  # fmt: skip
    tensors = (feature, cross, weight, keys, experts, before, after, gram, shift)
    return tuple(
        scores.new_empty((0,)) if tensor is None or not need else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip(tensors, needs, strict=True)
    )


def _backward(mix_backward):
    """By a backward of ``mope_fast::route_and_mix``."""

    def backward(
        grad_rows, grad_scores, feature, cross, weight, keys, experts, before, after, gram, shift, scores, rstd,
        top_k, renormalize, eps, needs,
    ):  # fmt: skip
        to_feature, to_cross, to_weight, to_keys, to_experts, to_before, to_after, to_gram, to_shift = needs
        dtype, grads = scores.dtype, [None] * len(needs)
        grad_before = grad_routed = grad_after = None
        if grad_rows is not None:
            grad_before, grad_routed, grad_after = grad_rows.split(_lengths(before, experts, after), dim=1)
        to_logits = to_feature or to_cross or to_weight or to_keys
        # behind a gate whose scores don't add up to one the softmax is taken again; else only its shape is asked for
        gated = top_k is not None and not renormalize
        logits = router_logits(feature, cross, weight, keys, dtype) if gated else scores
        grad_logits, grads[4], grads[7] = mix_backward(
            grad_routed, grad_scores, logits, experts, None, None if gram is None else gram.transpose(0, 1), scores, rstd,
            1.0, top_k, renormalize, eps, [to_logits, to_experts, to_gram],
        )  # fmt: skip
        if to_gram:
            grads[7] = grads[7].transpose(0, 1).contiguous()
        if to_cross:
            grads[1] = grad_logits.to(cross.dtype, copy=True)
        if to_feature or to_weight:
            to_query = grad_logits @ cast(keys, dtype).T
            if to_feature:
                grads[0] = cast(to_query @ cast(weight, dtype), feature.dtype)
            if to_weight:
                grads[2] = cast(to_query.T @ cast(feature, dtype), weight.dtype)
        if to_keys:
            grads[3] = cast((cast(feature, dtype) @ cast(weight, dtype).T).T @ grad_logits, keys.dtype)
        if to_before:
            grads[5] = _summed(grad_before, before)
        if to_after:
            grads[6] = _summed(grad_after, after)
        if to_shift:
            grads[8] = torch.zeros_like(shift) if grad_routed is None else cast(grad_routed.sum((0, 1), dtype=dtype), shift.dtype)
        return tuple(grad if need else scores.new_empty((0,)) for grad, need in zip(grads, needs, strict=True))

    return backward


def _summed(grad: Tensor | None, like: Tensor) -> Tensor:
    """Of rows that samples may share."""
    if grad is None:
        return torch.zeros_like(like, memory_format=torch.contiguous_format)
    if like.shape[0] == grad.shape[0]:
        return grad.to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    return cast(grad.sum(0, keepdim=True, dtype=torch.promote_types(like.dtype, torch.float32)), like.dtype)


_ARGUMENTS = (
    "Tensor feature, Tensor cross, Tensor weight, Tensor keys, Tensor experts, Tensor? before, Tensor? after, Tensor? gram, "
    "Tensor? shift"
)
layer_prompts_forward = define(
    f"layer_prompts({_ARGUMENTS}, SymInt? top_k, bool renormalize, float eps, ScalarType out_dtype) "
    "-> (Tensor rows, Tensor scores, Tensor rstd)",
    cpu=_triton_forward if INTERPRETED else _reference_forward,
    cuda=_triton_forward,
    fake=_fake_forward,
    flops=lambda *arguments: _flops(*arguments[:5]),
    use="MoPELayer or PromptBank",
)
layer_prompts_backward = define(
    f"layer_prompts_backward(Tensor? grad_rows, Tensor? grad_scores, {_ARGUMENTS}, Tensor scores, Tensor rstd, SymInt? top_k, "
    "bool renormalize, float eps, bool[] needs) -> (Tensor grad_feature, Tensor grad_cross, Tensor grad_weight, Tensor grad_keys, "
    "Tensor grad_experts, Tensor grad_before, Tensor grad_after, Tensor grad_gram, Tensor grad_shift)",
    cpu=_backward(mixing._triton_backward if INTERPRETED else mixing._reference_backward),
    cuda=_backward(mixing._triton_backward),
    fake=_fake_backward,
    flops=lambda grad_rows, grad_scores, *arguments: 2 * _flops(*arguments[:5]),
    use="MoPELayer or PromptBank",
)


class _LayerPrompts(torch.autograd.Function):
    """Gradients for all tensors, each only if asked for."""

    @staticmethod
    def forward(feature, cross, weight, keys, experts, before, after, gram, shift, top_k, renormalize, eps, out_dtype):
        tensors = (feature, cross, weight, keys, experts, before, after, gram, shift)
        return layer_prompts_forward(*tensors, top_k, renormalize, eps, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.top_k, ctx.renormalize, ctx.eps, _ = inputs
        _, scores, rstd = output
        ctx.save_for_backward(*tensors, scores, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_scores, _):
        if grad_rows is None and grad_scores is None:
            return (None,) * 13
        needs = list(ctx.needs_input_grad[:9])
        settings = (ctx.top_k, ctx.renormalize, ctx.eps)
        with without_autocast(ctx.saved_tensors[0].device.type):
            computed = layer_prompts_backward(grad_rows, grad_scores, *ctx.saved_tensors, *settings, needs)
        return (*(grad if need else None for grad, need in zip(computed, needs, strict=True)), None, None, None, None)


def layer_prompts(
    feature: Tensor,
    cross: Tensor,
    weight: Tensor,
    keys: Tensor,
    experts: Tensor,
    before: Tensor | None,
    after: Tensor | None,
    gram: Tensor | None,
    shift: Tensor | None,
    *,
    top_k: int | None,
    renormalize: bool,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Differentiable ``mope_fast::layer_prompts``; see :func:`mope_fast.reference.layer_prompts`."""
    tensors, out_dtype = (feature, cross, weight, keys, experts, before, after, gram, shift), dtype
    if INTERPRETED and accumulator_dtype(cross, experts) == torch.float64:
        out_dtype, tensors = torch.float64, castable(torch.float64, *tensors)
    rows, scores, _ = apply(_LayerPrompts, *tensors, top_k, renormalize, eps, out_dtype)
    return cast(rows, dtype), scores
