"""Router softmax, gate and expert mixing in plain PyTorch: what ``functional.route_and_mix`` means."""

import torch
from torch import Tensor

from .._autocast import cast


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def routing_logits(logits: Tensor, noise: Tensor | None, temperature: float, dtype: torch.dtype) -> Tensor:
    """``logits / temperature + noise``, the argument of the softmax, in ``dtype``."""
    x = cast(logits, dtype) / temperature
    return x if noise is None else x + cast(noise, dtype)


def kept_experts(x: Tensor, top_k: int) -> Tensor:
    """(B, K) bool: the ``top_k`` largest entries of each row; among equals the lower index goes first."""
    # by value: topk promises no order among equals, and ONNX has no stable sort
    least = x.topk(top_k, dim=-1).values[:, -1:]
    above, equal = (x > least) | x.isnan(), x == least
    return above | (equal & (equal.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))


def gated_softmax(x: Tensor, top_k: int | None, renormalize: bool) -> Tensor:
    """Softmax of each row with all but the ``top_k`` largest set to zero, ``renormalize``d to add up to one if asked."""
    scores = torch.softmax(x, dim=-1)
    if top_k is None:
        return scores
    scores = torch.where(kept_experts(x, top_k), scores, 0.0)
    return scores / scores.sum(-1, keepdim=True) if renormalize else scores


def squared_norm(scores: Tensor, gram: Tensor) -> Tensor:
    """(B, L): ``r' gram_l r``, of which rounding leaves less than 0 where experts cancel."""
    return ((scores @ cast(gram, scores.dtype)) * scores).sum(-1).T


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
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`mope_fast.functional.route_and_mix`; ``dtype`` is that of ``mixed`` (default: the table's)."""
    dtype = experts.dtype if dtype is None else dtype
    x = routing_logits(logits, noise, temperature, accumulator_dtype(logits, experts))
    scores = gated_softmax(x, top_k, renormalize)
    mixed = (cast(scores, dtype) @ cast(experts, dtype).flatten(1)).unflatten(1, experts.shape[1:])
    if gram is not None:
        reciprocal_norm = torch.rsqrt(squared_norm(scores, gram).clamp_min(0.0) + eps)
        mixed = cast(mixed * reciprocal_norm[..., None], dtype)
    return mixed, scores
