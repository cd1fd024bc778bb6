"""``mope_fast::layer_prompts`` and its backward: a layer's router, its mixture, and the prompts beside it in one buffer."""

from typing import Any

import torch
from torch import Tensor

from .._autocast import cast, without_autocast
from ..reference.layer_prompts import router_logits
from ..reference.route_and_mix import accumulator_dtype
from . import route_and_mix as mixing
from ._registration import apply, define, once_differentiable
from ._triton import INTERPRETED, castable, kernels_of, not_empty


def _lengths(before: Tensor | None, experts: Tensor, after: Tensor | None) -> tuple[int, int, int]:
    return 0 if before is None else before.shape[1], experts.shape[1], 0 if after is None else after.shape[1]


def _fake_forward(feature, cross, weight, keys, experts, before, after, gram, shift, top_k, renormalize, eps, out_dtype):
    batch, dtype = feature.shape[0], accumulator_dtype(cross, experts)
    rows = experts.new_empty((batch, sum(_lengths(before, experts, after)), experts.shape[2]), dtype=out_dtype)
    rstd = cross.new_empty((0,) if gram is None else (batch, experts.shape[1]), dtype=dtype)
    return rows, cross.new_empty(cross.shape, dtype=dtype), rstd, cross.new_empty((batch, weight.shape[0]), dtype=dtype)


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
    logits, query = router_logits(feature, cross, weight, keys, accumulator_dtype(cross, experts))
    mixed, scores, rstd = mixing._reference_forward(logits, experts, None, _by_row(gram), 1.0, top_k, renormalize, eps, out_dtype)
    return _assembled(mixed, before, after, shift, out_dtype), scores, rstd, query


def _triton_forward(feature, cross, weight, keys, experts, before, after, gram, shift, top_k, renormalize, eps, out_dtype):
    arguments = (feature, cross, weight, keys, experts, before, after, gram, shift)
    rows, scores, rstd, query = _fake_forward(*arguments, top_k, renormalize, eps, out_dtype)
    layer = mixing.LayerInputs(feature, weight, keys, not_empty(before), not_empty(after), shift)
    written = query
    if _routes_by_products(weight, experts):
        cross, query = router_logits(feature, cross, weight, keys, scores.dtype)
        layer, written = layer._replace(feature=None, weight=None, keys=None), None
    settings = {"temperature": 1.0, "top_k": top_k, "renormalize": renormalize, "eps": eps}
    mixing.launch_mixture(cross, experts, None, _by_row(gram), layer, rows, scores, rstd, written, **settings)
    return rows, scores, rstd, query


def _routes_by_products(weight: Tensor, experts: Tensor) -> bool:
    """Whether a layer's own router is too large for its kernels, and torch makes its products."""
    launches = kernels_of("launch")
    return weight.shape[0] > launches.MAX_OWN or experts.shape[0] > launches.MAX_ROUTED


def _by_row(gram: Tensor | None) -> Tensor | None:
    """(K, L, K), or a gradient of that, as ``route_and_mix`` has it."""
    return None if gram is None else gram.transpose(0, 1)


def _of_each_sample(part: Tensor | None, cross: Tensor) -> bool:
    """Whether a gradient of prompts is a part of that of the rows, which the autograd function takes; else it is a sum."""
    return part is not None and part.shape[0] == cross.shape[0]


def _fake_backward(
    grad_rows, grad_scores, feature, cross, weight, keys, experts, before, after, gram, shift, scores, rstd, query,
    top_k, renormalize, eps, needs,
):  # fmt: skip
    tensors = (feature, cross, weight, keys, experts, before, after, gram, shift)
    skipped = (*[False] * 5, _of_each_sample(before, cross), _of_each_sample(after, cross), False, False)
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if tensor is not None and need and not skip
        else scores.new_empty((0,))
        for tensor, need, skip in zip(tensors, needs, skipped, strict=True)
    )


def _triton_backward(
    grad_rows, grad_scores, feature, cross, weight, keys, experts, before, after, gram, shift, scores, rstd, query,
    top_k, renormalize, eps, needs,
):  # fmt: skip
    given = (feature, cross, weight, keys, experts, before, after, gram, shift, scores, rstd, query, top_k, renormalize, eps, needs)
    if _routes_by_products(weight, experts):
        return _backward(mixing._triton_backward)(grad_rows, grad_scores, *given)
    grads = _fake_backward(grad_rows, grad_scores, *given)
    to_feature, to_cross, to_weight, to_keys, to_experts, to_before, to_after, to_gram, to_shift = map(not_empty, grads)
    mixing.launch_gradients(
        grad_rows, grad_scores, cross, experts, None, _by_row(gram),
        mixing.LayerInputs(feature, weight, keys, before, after, shift), scores, rstd, query,
        mixing.Gradients(
            to_cross, to_experts, _by_row(to_gram), to_feature, to_weight, to_keys, to_before, to_after, to_shift
        ),
        temperature=1.0, recompute_softmax=top_k is not None and not renormalize,
    )  # fmt: skip
    return grads


def _backward(mix_backward):
    """By a backward of ``mope_fast::route_and_mix`` and products."""

    def backward(
        grad_rows, grad_scores, feature, cross, weight, keys, experts, before, after, gram, shift, scores, rstd, query,
        top_k, renormalize, eps, needs,
    ):  # fmt: skip
        tensors = (feature, cross, weight, keys, experts, before, after, gram, shift, scores, rstd, query)
        grads = _fake_backward(grad_rows, grad_scores, *tensors, top_k, renormalize, eps, needs)
        to_feature, to_cross, to_weight, to_keys, to_experts, to_before, to_after, to_gram, to_shift = map(not_empty, grads)
        grad_before = grad_routed = grad_after = None
        if grad_rows is not None:
            grad_before, grad_routed, grad_after = grad_rows.split(_lengths(before, experts, after), dim=1)
        # behind a gate whose scores don't add up to one the softmax is taken again; else only its shape is asked for
        gated, dtype = top_k is not None and not renormalize, scores.dtype
        logits = router_logits(feature, cross, weight, keys, dtype)[0] if gated else scores
        grad_logits, grad_experts, grad_gram = mix_backward(
            grad_routed, grad_scores, logits, experts, None, _by_row(gram), scores, rstd, 1.0, top_k, renormalize, eps,
            [any(needs[:4]), needs[4], needs[7]],
        )  # fmt: skip
        if to_experts is not None:
            to_experts.copy_(grad_experts)
        if to_gram is not None:
            to_gram.copy_(grad_gram.transpose(0, 1))
        if to_cross is not None:
            to_cross.copy_(grad_logits)
        if to_feature is not None:
            to_feature.copy_(grad_logits @ cast(keys, dtype).T @ cast(weight, dtype))
        if to_weight is not None:
            to_weight.copy_(cast(keys, dtype) @ grad_logits.T @ cast(feature, dtype))
        if to_keys is not None:
            to_keys.copy_(query.T @ grad_logits)
        for to, grad, summed in ((to_before, grad_before, (0,)), (to_after, grad_after, (0,)), (to_shift, grad_routed, (0, 1))):
            if to is not None:
                to.zero_() if grad is None else to.copy_(grad.sum(summed, dtype=dtype))
        return grads

    return backward


_ARGUMENTS = (
    "Tensor feature, Tensor cross, Tensor weight, Tensor keys, Tensor experts, Tensor? before, Tensor? after, Tensor? gram, "
    "Tensor? shift"
)
layer_prompts_forward = define(
    f"layer_prompts({_ARGUMENTS}, SymInt? top_k, bool renormalize, float eps, ScalarType out_dtype) "
    "-> (Tensor rows, Tensor scores, Tensor rstd, Tensor query)",
    cpu=_triton_forward if INTERPRETED else _reference_forward,
    cuda=_triton_forward,
    fake=_fake_forward,
    flops=lambda *arguments: _flops(*arguments[:5]),
    use="MoPELayer or PromptBank",
)
layer_prompts_backward = define(
    f"layer_prompts_backward(Tensor? grad_rows, Tensor? grad_scores, {_ARGUMENTS}, Tensor scores, Tensor rstd, Tensor query, "
    "SymInt? top_k, bool renormalize, float eps, bool[] needs) "
    "-> (Tensor grad_feature, Tensor grad_cross, Tensor grad_weight, Tensor grad_keys, Tensor grad_experts, "
    "Tensor grad_before, Tensor grad_after, Tensor grad_gram, Tensor grad_shift)",
    cpu=_triton_backward if INTERPRETED else _backward(mixing._reference_backward),
    cuda=_triton_backward,
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
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_scores, *_):
        if grad_rows is None and grad_scores is None:
            return (None,) * 13
        needs = list(ctx.needs_input_grad[:9])
        settings = (ctx.top_k, ctx.renormalize, ctx.eps)
        saved = ctx.saved_tensors  # once: with checkpointing each reading unpacks anew
        _, cross, _, _, experts, before, after, *_ = saved
        with without_autocast(cross.device.type):
            grads = list(layer_prompts_backward(grad_rows, grad_scores, *saved, *settings, needs))
        parts = (None, None, None) if grad_rows is None else grad_rows.split(_lengths(before, experts, after), dim=1)
        for index, part, of_rows in ((5, before, parts[0]), (6, after, parts[2])):
            if _of_each_sample(part, cross):
                grads[index] = torch.zeros_like(part) if of_rows is None else cast(of_rows, part.dtype)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None, None)


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
    tensors: list[Any] = [feature, cross, weight, keys, experts, before, after, gram, shift]
    out_dtype = dtype
    if INTERPRETED and accumulator_dtype(cross, experts) == torch.float64:
        out_dtype, tensors = torch.float64, castable(torch.float64, *tensors)
    rows, scores, *_ = apply(_LayerPrompts, *tensors, top_k, renormalize, eps, out_dtype)
    return cast(rows, dtype), scores
