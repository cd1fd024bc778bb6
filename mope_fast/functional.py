"""Public functions: check the arguments, choose an implementation, call it.

Letters in shapes: B batch, S tokens, H heads, Dh head dim, D model dim, K experts, L prompt length, M table width, N layers,
P prefix length.
``impl``: "auto" takes the best implementation that can run, a name takes that one or raises an error saying why it can't.
"""

from collections.abc import Sequence

import torch
import torch.distributed
from torch import Tensor

from . import reference
from ._autocast import autocast_dtype, without_autocast
from ._checks import check_importance_loss, check_prompt_attention, check_route_and_mix
from ._implementations import choose
from .ops.prompt_attention import sdpa
from .ops.route_and_mix import route_and_mix as _route_and_mix_op
from .reference.importance import importance_loss_of_sums

__all__ = ["importance_loss", "prompt_attention", "route_and_mix"]


def route_and_mix(
    logits: Tensor,
    experts: Tensor,
    *,
    temperature: float = 0.1,
    noise: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = False,
    gram: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Route every sample over K prompt experts and mix them (MoPE, arXiv 2403.10568, equations 3 and 4).

    ``scores = gate(softmax(logits / temperature + noise))`` and ``mixed[b, l] = sum_k scores[b, k] experts[k, l]``,
    with ``gram`` divided by ``sqrt(scores' gram[l] scores + eps)``: the mixture of experts that a layer norm and a projection
    have already been through (K/V-space mixing, see :class:`mope_fast.PromptBank`). Nothing of shape (B, K, L, M) is ever made.

    Args:
        logits: (B, K), any float dtype; softmax and sums are taken in float32 (float64 for float64). B may be 0, K is 1 to 1024.
        experts: (K, L, M), any float dtype, any strides.
        temperature: tau > 0.
        noise: (B, K), added after the temperature; a constant, it gets no gradient.
        top_k: keep the k largest scores of each sample (ties: the lower index) and set the others to zero; None keeps all.
        renormalize: divide the kept scores by their sum.
        gram: (L, K, K) or None.
        eps: added below the root, > 0; only used with ``gram``.
        impl: "auto", "triton" or "reference".

    Returns:
        mixed (B, L, M) in the autocast dtype if autocast is on, else in the experts' dtype, and the scores (B, K) after the gate
        in float32 (float64 for float64). Both are differentiable in logits, experts and gram. A NaN stays in its own sample.

    Raises:
        TypeError, ValueError: an argument has a wrong type, rank, size or value.
        RuntimeError: ``impl`` can't run here.
    """
    check_route_and_mix(logits, experts, temperature, noise, top_k, renormalize, gram, eps)
    dtype = autocast_dtype(experts)
    if choose("route_and_mix", impl, logits.device, torch.promote_types(logits.dtype, experts.dtype)) == "triton":
        return _route_and_mix_op(logits, experts, noise, gram, temperature, top_k, renormalize, eps, dtype)
    with without_autocast(logits.device.type):
        return reference.route_and_mix(
            logits,
            experts,
            temperature=temperature,
            noise=noise,
            top_k=top_k,
            renormalize=renormalize,
            gram=gram,
            eps=eps,
            dtype=dtype,
        )


def importance_loss(
    scores: Tensor, *, threshold: float = 0.1, process_group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """How unevenly a batch uses its experts (MoPE, arXiv 2403.10568, equation 5): squared coefficient of variation.

    ``Imp_k = sum_b scores[b, k]``, ``loss = var(Imp) / mean(Imp)^2`` with the unbiased variance; 0 without gradient for a layer
    where that is <= ``threshold``; averaged over layers. It lies between 0 (even use) and K (one expert takes all).
    The threshold meets the squared value, as in the released code.

    Args:
        scores: (B, K) or (N, B, K), any float dtype; sums are taken in float32 (float64 for float64). K = 1 or B = 0 gives 0.
        threshold: >= 0.
        process_group: sum the importance over its ranks first (one differentiable all-reduce of (N, K) numbers). Each rank then
            returns the loss of the whole batch, with a gradient that is already summed over the ranks' losses, so that DDP's
            average over ranks is exactly the gradient of one such loss: multiply it by nothing.

    Returns:
        A scalar. It never waits for the device.
    """
    check_importance_loss(scores, threshold)
    if process_group is None:
        return reference.importance_loss(scores, threshold=threshold)
    from torch.distributed.nn.functional import all_reduce

    sums = scores.to(torch.promote_types(scores.dtype, torch.float32)).sum(-2)
    return importance_loss_of_sums(all_reduce(sums, group=process_group), threshold=threshold)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]] = (),
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Self-attention whose queries also see up to two key/value prefixes: prompts that are keys and values only.

    Every query sees every prefix key; padding, causality and bias are about token keys. There is no attention dropout: frozen
    encoders are in eval mode.

    Args:
        q: (B, H, Sq, Dh).
        k, v: (B, H, Sk, Dh).
        prefixes: up to two pairs of keys and values, each (B or 1, H, P, Dh), in the dtype of q.
        is_causal: query i sees the token keys up to ``i + Sk - Sq``.
        key_padding_mask: (B, Sk) bool, True = a real token.
        bias: (B or 1, H or 1, Sq, Sk), added to the scaled products with token keys.
        scale: default ``Dh ** -0.5``.
        impl: "auto", "sdpa" or "reference".

    Returns:
        (B, H, Sq, Dh) in the autocast dtype if autocast is on, else in q's. A query that sees no key gives zeros.

    Raises:
        TypeError, ValueError: an argument has a wrong type, rank, size or value.
    """
    check_prompt_attention(q, k, v, prefixes, key_padding_mask, bias)
    settings = {"is_causal": is_causal, "key_padding_mask": key_padding_mask, "bias": bias, "scale": scale}
    if choose("prompt_attention", impl, q.device, q.dtype) == "sdpa":
        return sdpa(q, k, v, prefixes, **settings)
    with without_autocast(q.device.type):
        out = reference.prompt_attention(q, k, v, prefixes, **settings)
    return out.to(autocast_dtype(q))
