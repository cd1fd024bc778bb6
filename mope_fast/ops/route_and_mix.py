"""``mope_fast::route_and_mix`` and its backward: CPU maths, Triton launches and the autograd function on top."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._autocast import cast, without_autocast
from ..reference.route_and_mix import accumulator_dtype, gated_softmax, routing_logits, squared_norm
from ..reference.route_and_mix import route_and_mix as reference_route_and_mix
from ._registration import apply, define, once_differentiable
from ._triton import INTERPRETED, castable, kernels_of, launch_kernel, not_empty, strides


def _empty_rstd(logits: Tensor, experts: Tensor, gram: Tensor | None) -> Tensor:
    shape = (0,) if gram is None else (logits.shape[0], experts.shape[1])
    return logits.new_empty(shape, dtype=accumulator_dtype(logits, experts))


def _empty_outputs(logits: Tensor, experts: Tensor, gram: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_experts = logits.shape
    mixed = experts.new_empty((batch, *experts.shape[1:]), dtype=out_dtype)
    scores = logits.new_empty((batch, num_experts), dtype=accumulator_dtype(logits, experts))
    return mixed, scores, _empty_rstd(logits, experts, gram)


def flops(logits, experts):
    """Of the mixture; its backward pass makes two products as large."""
    return 2 * logits[0] * experts[0] * experts[1] * experts[2]


def _fake_forward(logits, experts, noise, gram, temperature, top_k, renormalize, eps, out_dtype):
    return _empty_outputs(logits, experts, gram, out_dtype)


def _fake_backward(
    grad_mixed, grad_scores, logits, experts, noise, gram, scores, rstd, temperature, top_k, renormalize, eps, needs
):
    return _empty_grads(logits, experts, gram, needs)


def _empty_grads(logits: Tensor, experts: Tensor, gram: Tensor | None, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients; a tensor of no elements stands for one that nobody asked for."""
    return (
        logits.new_empty(logits.shape if needs[0] else (0,)),
        experts.new_empty(experts.shape if needs[1] else (0,)),
        experts.new_empty((0,)) if gram is None or not needs[2] else gram.new_empty(gram.shape),
    )


def _reference_forward(logits, experts, noise, gram, temperature, top_k, renormalize, eps, out_dtype):
    mixed, scores = reference_route_and_mix(
        logits,
        experts,
        temperature=temperature,
        noise=noise,
        top_k=top_k,
        renormalize=renormalize,
        gram=gram,
        eps=eps,
        dtype=out_dtype,
    )
    if gram is None:
        return mixed.contiguous(), scores.contiguous(), _empty_rstd(logits, experts, None)
    norm_sq = squared_norm(scores, gram)
    rstd = torch.rsqrt(norm_sq.clamp_min(0.0) + eps)
    return mixed.contiguous(), scores.contiguous(), torch.where(norm_sq < 0, -rstd, rstd).contiguous()


def _reference_backward(
    grad_mixed, grad_scores, logits, experts, noise, gram, scores, rstd, temperature, top_k, renormalize, eps, needs
):
    """The formulas in the docstring of ``kernels/route_and_mix.py``, line by line."""
    grad_logits, grad_experts, grad_gram = _empty_grads(logits, experts, gram, needs)
    ds = torch.zeros_like(scores) if grad_scores is None else grad_scores.to(scores.dtype)
    if grad_mixed is not None:
        g = grad_mixed.to(scores.dtype)
        du = torch.einsum("blm,klm->blk", g, experts.to(scores.dtype))
        if gram is not None:
            clamped, rstd = rstd < 0, rstd.abs()
            d_norm_sq = -0.5 * rstd.pow(3) * torch.einsum("bk,blk->bl", scores, du)
            d_norm_sq = d_norm_sq.masked_fill(clamped, 0.0)
            symmetric = (gram + gram.mT).to(scores.dtype)
            ds = ds + torch.einsum("bl,lij,bj->bi", d_norm_sq, symmetric, scores)
            du = du * rstd[..., None]
            g = g * rstd[..., None]
            if needs[2]:
                grad_gram.copy_(torch.einsum("bl,bi,bj->lij", d_norm_sq, scores, scores))
        ds = ds + du.sum(1)
        if needs[1]:
            grad_experts.copy_(torch.einsum("bk,blm->klm", scores, g))
    else:
        grad_experts.zero_()
        grad_gram.zero_()
    if needs[0]:
        total = (scores * ds).sum(-1, keepdim=True)
        if top_k is None or renormalize:
            dx = scores * (ds - total)
        else:
            p = gated_softmax(routing_logits(logits, noise, temperature, scores.dtype), None, False)
            dx = p * (torch.where(scores == 0, 0.0, ds) - total)
        grad_logits.copy_(dx / temperature)
    return grad_logits, grad_experts, grad_gram


class LayerInputs(NamedTuple):
    """What a layer has beside its logits and experts, see :func:`mope_fast.reference.layer_prompts`."""

    feature: Tensor | None = None
    weight: Tensor | None = None
    keys: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    shift: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, int]:
        """Prompts before and behind the routed ones."""
        before, after = (0 if part is None else part.shape[1] for part in (self.before, self.after))
        return before, after


def _triton_forward(logits, experts, noise, gram, temperature, top_k, renormalize, eps, out_dtype):
    mixed, scores, rstd = _empty_outputs(logits, experts, gram, out_dtype)
    launch_mixture(
        logits, experts, noise, gram, LayerInputs(), mixed, scores, rstd, None,
        temperature=temperature, top_k=top_k, renormalize=renormalize, eps=eps,
    )  # fmt: skip
    return mixed, scores, rstd


def launch_mixture(
    logits: Tensor,
    experts: Tensor,
    noise: Tensor | None,
    gram: Tensor | None,
    layer: LayerInputs,
    mixed: Tensor,
    scores: Tensor,
    rstd: Tensor,
    query: Tensor | None,
    *,
    temperature: float,
    top_k: int | None,
    renormalize: bool,
    eps: float,
) -> None:
    """Write all prompts (B, P, M), scores (B, K), with ``gram`` ``rstd`` (B, L), and a layer's query (B, d_i), in one launch."""
    kernels, launches = kernels_of("route_and_mix"), kernels_of("launch")
    (batch, num_experts), (_, rows, width) = logits.shape, experts.shape
    if batch == 0:
        return
    own, feature_width = (1, 1) if layer.weight is None else layer.weight.shape
    before, after = (t if t is None or t.shape[0] == batch else t.expand(batch, -1, -1) for t in (layer.before, layer.after))
    kind = {"gram": gram is not None, "layer": layer.feature is not None}
    launch = launches.mix_launch(batch, num_experts, width, experts.element_size(), **kind)
    programs = -(-batch // launch.block_b) * mixed.shape[1] * -(-width // launch.block_m)
    launch_kernel(
        kernels.mix_kernel, programs,
        logits_ptr=logits, noise_ptr=noise, feature_ptr=layer.feature, weight_ptr=layer.weight, keys_ptr=layer.keys,
        experts_ptr=experts, before_ptr=before, after_ptr=after, gram_ptr=gram, shift_ptr=layer.shift,
        mixed_ptr=mixed, scores_ptr=scores, rstd_ptr=not_empty(rstd), query_ptr=query,
        B=batch, K=num_experts, L=rows, M=width, D=feature_width, OWN=own, P_BEFORE=layer.lengths[0], P_AFTER=layer.lengths[1],
        inv_temperature=1.0 / temperature, eps=eps,
        logits_strides=logits.stride(), noise_strides=strides(noise), feature_strides=strides(layer.feature),
        weight_strides=strides(layer.weight), keys_strides=strides(layer.keys), experts_strides=experts.stride(),
        before_strides=strides(before), after_strides=strides(after), gram_strides=strides(gram),
        shift_stride=None if layer.shift is None else layer.shift.stride(0),
        TOP_K=top_k or 0, RENORMALIZE=renormalize,
        BLOCK_B=launch.block_b, BLOCK_K=launch.block_k, BLOCK_M=launch.block_m, BLOCK_D=launches.FEATURE_BLOCK,
        K_PADDED=launch.k_padded, OWN_PADDED=launches.MAX_OWN, num_warps=launch.num_warps,
    )  # fmt: skip


class Gradients(NamedTuple):
    """Where gradients are to be written, None for one that nobody asked for; ``before`` and ``after`` of prompts of all samples."""

    logits: Tensor | None
    experts: Tensor | None
    gram: Tensor | None
    feature: Tensor | None = None
    weight: Tensor | None = None
    keys: Tensor | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    shift: Tensor | None = None

    @property
    def behind_du(self) -> bool:
        """Whether anything is asked for that follows from the gradients of mixtures by their experts."""
        return any(grad is not None for grad in (self.logits, self.gram, self.feature, self.weight, self.keys))


def _triton_backward(
    grad_mixed, grad_scores, logits, experts, noise, gram, scores, rstd, temperature, top_k, renormalize, eps, needs
):
    grads = _empty_grads(logits, experts, gram, needs)
    launch_gradients(
        grad_mixed, grad_scores, logits, experts, noise, gram, LayerInputs(), scores, rstd, None,
        Gradients(*map(not_empty, grads)), temperature=temperature, recompute_softmax=top_k is not None and not renormalize,
    )  # fmt: skip
    return grads


def launch_gradients(
    grad_rows: Tensor | None,
    grad_scores: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    noise: Tensor | None,
    gram: Tensor | None,
    layer: LayerInputs,
    scores: Tensor,
    rstd: Tensor,
    query: Tensor | None,
    grads: Gradients,
    *,
    temperature: float,
    recompute_softmax: bool,
) -> None:
    """Write what was asked for, in two launches; of large batches parts are summed behind them."""
    if logits.shape[0] == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    du = None
    if grad_rows is None:
        for grad in (grads.experts, grads.gram, grads.before, grads.after, grads.shift):
            if grad is not None:
                grad.zero_()
        grads = grads._replace(gram=None)
    else:
        du = _launch_mixture_grads(grad_rows, experts, layer, scores, rstd, grads)
    if grads.behind_du:
        _launch_router_grads(
            du, grad_scores, logits, noise, gram, experts, layer, scores, rstd, query, grads,
            temperature=temperature, recompute_softmax=recompute_softmax,
        )  # fmt: skip


def _launch_mixture_grads(
    grad_rows: Tensor, experts: Tensor, layer: LayerInputs, scores: Tensor, rstd: Tensor, grads: Gradients
) -> Tensor | None:
    """All that is a sum of the gradient of prompts; du (L, B, K) if anything asked for needs it."""
    kernels, launches = kernels_of("route_and_mix"), kernels_of("launch")
    (batch, num_experts), (_, rows, width) = scores.shape, experts.shape
    launch = launches.mixture_grads_launch(batch, num_experts, rows, width, grad_rows.element_size())
    du = scores.new_empty((rows, batch, num_experts)) if grads.behind_du else None
    sums = (grads.experts, grads.before, grads.after, grads.shift)
    parts = [_parts(grad, launch.splits, scores) for grad in sums]
    m_tiles, k_tiles = -(-width // launch.block_m), -(-num_experts // launch.block_k)
    before, after = layer.lengths
    row_tiles = (rows * k_tiles, before, after, 1)
    of_sums = [0 if grad is None else count * m_tiles * launch.splits for grad, count in zip(sums, row_tiles, strict=True)]
    of_du = 0 if du is None else -(-batch // launches.SAMPLE_BLOCK) * rows * k_tiles
    if programs := of_du + sum(of_sums):
        launch_kernel(
            kernels.mixture_grads_kernel, programs,
            grad_ptr=grad_rows, scores_ptr=scores, rstd_ptr=not_empty(rstd), experts_ptr=experts, du_ptr=du,
            grad_experts_ptr=parts[0], grad_before_ptr=parts[1], grad_after_ptr=parts[2], grad_shift_ptr=parts[3],
            B=batch, K=num_experts, L=rows, M=width, P_BEFORE=before, P_AFTER=after, splits=launch.splits,
            du_programs=of_du, experts_programs=of_sums[0], before_programs=of_sums[1], after_programs=of_sums[2],
            grad_strides=grad_rows.stride(), experts_strides=experts.stride(),
            BLOCK_B=launch.block_b, BLOCK_K=launch.block_k, BLOCK_M=launch.block_m, SAMPLES=launches.SAMPLE_BLOCK,
            SUMMED=launches.SUM_BLOCK, num_warps=launch.num_warps,
        )  # fmt: skip
    _sum_parts(sums, parts)
    return du


def _launch_router_grads(
    du: Tensor | None,
    grad_scores: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    gram: Tensor | None,
    experts: Tensor,
    layer: LayerInputs,
    scores: Tensor,
    rstd: Tensor,
    query: Tensor | None,
    grads: Gradients,
    *,
    temperature: float,
    recompute_softmax: bool,
) -> None:
    """All that comes behind du."""
    kernels, launches = kernels_of("route_and_mix"), kernels_of("launch")
    (batch, num_experts), rows = scores.shape, experts.shape[1]
    launch = launches.router_grads_launch(batch, num_experts)
    own, feature_width = (1, 1) if layer.weight is None else layer.weight.shape
    sample_tiles, d_tiles = -(-batch // launches.SAMPLE_BLOCK), -(-feature_width // launches.GRADS_BLOCK)
    sums = (grads.weight, grads.keys, grads.gram)
    weight, keys, to_gram = parts = [_parts(grad, launch.splits, scores) for grad in sums]
    of_samples = 0
    if grads.feature is not None or grads.logits is not None:
        of_samples = sample_tiles * (1 if grads.feature is None else d_tiles)
    of_weight = 0 if weight is None else d_tiles * launch.splits
    of_keys = 0 if keys is None else launch.splits
    of_gram = 0 if to_gram is None else rows * -(-num_experts // launch.block_i) * launch.splits
    launch_kernel(
        kernels.router_grads_kernel, of_samples + of_weight + of_keys + of_gram,
        du_ptr=du, grad_scores_ptr=grad_scores, logits_ptr=logits, noise_ptr=noise, scores_ptr=scores,
        rstd_ptr=not_empty(rstd), gram_ptr=gram,
        feature_ptr=layer.feature, weight_ptr=layer.weight, keys_ptr=layer.keys, query_ptr=query,
        grad_logits_ptr=grads.logits, grad_gram_ptr=to_gram,
        grad_feature_ptr=grads.feature, grad_weight_ptr=weight, grad_keys_ptr=keys,
        B=batch, K=num_experts, L=rows, D=feature_width, OWN=own, splits=launch.splits,
        sample_programs=of_samples, weight_programs=of_weight, keys_programs=of_keys, inv_temperature=1.0 / temperature,
        grad_scores_strides=strides(grad_scores), logits_strides=logits.stride(), noise_strides=strides(noise),
        gram_strides=strides(gram), feature_strides=strides(layer.feature), weight_strides=strides(layer.weight),
        keys_strides=strides(layer.keys), grad_gram_strides=strides(grads.gram),
        RECOMPUTE_SOFTMAX=recompute_softmax, BLOCK_B=launches.SAMPLE_BLOCK, BLOCK_D=launches.GRADS_BLOCK,
        BLOCK_I=launch.block_i, K_PADDED=launch.k_padded, OWN_PADDED=launches.MAX_OWN, num_warps=launch.num_warps, num_stages=1,
    )  # fmt: skip
    _sum_parts(sums, parts)


def _parts(grad: Tensor | None, splits: int, like: Tensor) -> Tensor | None:
    """Where the parts of a sum are written, (splits, ...), each laid out as the gradient: itself if there is one."""
    if grad is None or splits == 1:
        return grad
    return like.new_empty_strided((splits, *grad.shape), (grad.numel(), *grad.stride()))


def _sum_parts(grads: Sequence[Tensor | None], parts: Sequence[Tensor | None]) -> None:
    for grad, part in zip(grads, parts, strict=True):
        if part is not grad and part is not None and grad is not None:
            grad.copy_(part.sum(0))


route_and_mix_forward = define(
    "route_and_mix(Tensor logits, Tensor experts, Tensor? noise, Tensor? gram, float temperature, SymInt? top_k, bool renormalize, "
    "float eps, ScalarType out_dtype) -> (Tensor mixed, Tensor scores, Tensor rstd)",
    cpu=_triton_forward if INTERPRETED else _reference_forward,
    cuda=_triton_forward,
    fake=_fake_forward,
    flops=lambda logits, experts, *others: flops(logits, experts),
    use="mope_fast.functional.route_and_mix",
)
route_and_mix_backward = define(
    "route_and_mix_backward(Tensor? grad_mixed, Tensor? grad_scores, Tensor logits, Tensor experts, Tensor? noise, Tensor? gram, "
    "Tensor scores, Tensor rstd, float temperature, SymInt? top_k, bool renormalize, float eps, bool[] needs) "
    "-> (Tensor grad_logits, Tensor grad_experts, Tensor grad_gram)",
    cpu=_triton_backward if INTERPRETED else _reference_backward,
    cuda=_triton_backward,
    fake=_fake_backward,
    flops=lambda grad_mixed, grad_scores, logits, experts, *others: 2 * flops(logits, experts),
    use="mope_fast.functional.route_and_mix",
)


class _RouteAndMix(torch.autograd.Function):
    """Gradients for logits, experts and gram, each only if asked for. Noise and hyper-parameters take none."""

    @staticmethod
    def forward(logits, experts, noise, gram, temperature, top_k, renormalize, eps, out_dtype):
        return route_and_mix_forward(logits, experts, noise, gram, temperature, top_k, renormalize, eps, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, experts, noise, gram, ctx.temperature, ctx.top_k, ctx.renormalize, ctx.eps, _ = inputs
        _, scores, rstd = output
        ctx.save_for_backward(logits, experts, noise, gram, scores, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_mixed, grad_scores, _):
        if grad_mixed is None and grad_scores is None:
            return (None,) * 9
        logits, experts, noise, gram, scores, rstd = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]]
        with without_autocast(scores.device.type):
            computed = route_and_mix_backward(
                grad_mixed, grad_scores, logits, experts, noise, gram, scores, rstd,
                ctx.temperature, ctx.top_k, ctx.renormalize, ctx.eps, needs,
            )  # fmt: skip
        grads = [grad if need else None for grad, need in zip(computed, needs, strict=True)]
        return grads[0], grads[1], None, grads[2], None, None, None, None, None


def route_and_mix(
    logits: Tensor,
    experts: Tensor,
    noise: Tensor | None,
    gram: Tensor | None,
    temperature: float,
    top_k: int | None,
    renormalize: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Differentiable ``mope_fast::route_and_mix``, without checks: see :func:`mope_fast.functional.route_and_mix`."""
    dtype = out_dtype
    if INTERPRETED and accumulator_dtype(logits, experts) == torch.float64:
        out_dtype = torch.float64
        logits, experts, noise, gram = castable(torch.float64, logits, experts, noise, gram)
    mixed, scores, _ = apply(_RouteAndMix, logits, experts, noise, gram, temperature, top_k, renormalize, eps, out_dtype)
    return cast(mixed, dtype), scores
