"""Equation 5 of MoPE (arXiv 2403.10568): the importance loss."""

import torch
from torch import Tensor


def importance_loss(scores: Tensor, *, threshold: float = 0.1) -> Tensor:
    """``CV(Imp)^2`` with ``Imp_j = sum_batch r_j``, averaged over layers: see :func:`mope_fast.functional.importance_loss`."""
    return importance_loss_of_sums(scores.to(torch.promote_types(scores.dtype, torch.float32)).sum(-2), threshold=threshold)


def importance_loss_of_sums(importance: Tensor, *, threshold: float) -> Tensor:
    """The loss of already summed scores (K,) or (N, K): unbiased variance over squared mean, 0 where it is <= threshold."""
    if importance.shape[-1] == 1:
        return importance.sum() * 0.0
    mean = importance.mean(-1, keepdim=True)
    # an empty batch has mean 0: divide by 1 there, in forward and backward; the square of a small mean would be 0
    cv_squared = torch.var(importance / torch.where(mean == 0, 1.0, mean), dim=-1)
    return torch.where(cv_squared <= threshold, 0.0, cv_squared).mean()
