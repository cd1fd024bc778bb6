"""One layer's prompts in plain PyTorch: route by the layer's own feature, mix, put beside the prompts that aren't routed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autocast import cast
from .route_and_mix import accumulator_dtype, gated_softmax


def router_logits(feature: Tensor, cross: Tensor, weight: Tensor, keys: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The softmax's argument of equation 3, (B, K): x_0 (B, D) by W_x (d_i, D) and keys / tau (d_i, K), and the rest (B, K).

    Returns:
        That, and the query x_0 W_x' (B, d_i).
    """
    query = F.linear(cast(feature, dtype), cast(weight, dtype))
    return torch.addmm(cast(cross, dtype), query, cast(keys, dtype)), query


def layer_prompts(
    feature: Tensor,
    cross: Tensor,
    weight: Tensor,
    keys: Tensor,
    experts: Tensor,
    before: Tensor | None = None,
    after: Tensor | None = None,
    gram: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    top_k: int | None = None,
    renormalize: bool = False,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Prompts [before | routed | after] of one layer, as rows of width M, and their scores (equations 2 to 4).

    ``routed[b, l] = sum_k scores[b, k] experts[k, l]``; with ``gram`` it is divided by the root of a norm's statistic, as
    :func:`mope_fast.functional.route_and_mix` has it; then ``shift`` is added.

    Args:
        feature, cross, weight, keys: of :func:`router_logits`.
        experts: (K, L, M).
        before, after: (B or 1, P, M), prompts that aren't routed.
        gram: (K, L, K), inner products of expert k's row l with the other experts' rows l.
        shift: (M,).
        dtype: of the rows, default that of the experts.

    Returns:
        (B, P_before + L + P_after, M), and (B, K) in float32 (float64 if anything is).
    """
    dtype = experts.dtype if dtype is None else dtype
    num_experts, length, width = experts.shape
    logits, _ = router_logits(feature, cross, weight, keys, accumulator_dtype(cross, experts))
    scores = gated_softmax(logits, top_k, renormalize)
    routed = (cast(scores, dtype) @ cast(experts, dtype).reshape(num_experts, -1)).view(-1, length, width)
    if gram is not None:
        products = (scores @ cast(gram, scores.dtype).reshape(num_experts, -1)).view(-1, length, num_experts)
        reciprocal_norm = torch.rsqrt(torch.bmm(products, scores.unsqueeze(-1)).clamp_min(0.0) + eps)
        routed = routed * reciprocal_norm if shift is None else torch.addcmul(shift, routed, reciprocal_norm)
    elif shift is not None:
        routed = routed + shift
    parts = [part for part in (before, cast(routed, dtype), after) if part is not None]
    if len(parts) == 1:
        return parts[0], scores
    batch = scores.shape[0]
    return torch.cat([cast(part if part.shape[0] == batch else part.expand(batch, -1, -1), dtype) for part in parts], 1), scores
