"""The mapped prompt P_m: the complementary feature as one prompt token (MoPE, arXiv 2403.10568, section 3.2 and appendix A)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from .._settings import checked
from .norms import is_plain

_NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda width: nn.Identity()}


class PromptMapper(nn.Module):
    """A shared bottleneck of ceil(cross_dim / 2) units, norm, GELU, then one up-projection for each layer width.

    The released code keeps its batch norm in eval mode, so its statistics stay 0 and 1; ours is an ordinary one, but for batches
    whose mean or variance isn't finite: its running statistics take nothing from them.

    Args:
        cross_dim: width of the complementary feature.
        widths: widths of the main encoder's layers; layers of one width share their mapped prompt.
        norm: "batch", "layer" or "none".
    """

    @checked
    def __init__(self, cross_dim: int, widths: Iterable[int], norm: str = "batch"):
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {tuple(_NORMS)}, got {norm!r}")
        bottleneck = -(-cross_dim // 2)
        self.down = nn.Linear(cross_dim, bottleneck)
        self.norm = _NORMS[norm](bottleneck)
        self.up = nn.ModuleDict({str(width): nn.Linear(bottleneck, width) for width in sorted(set(widths))})

    def forward(self, cross: Tensor) -> dict[int, Tensor]:
        """(B, cross_dim) -> for each width W the mapped prompt (B, W)."""
        if self.training and cross.shape[0] == 1 and isinstance(self.norm, nn.BatchNorm1d):
            raise ValueError("batch norm can't train on a batch of 1: use larger batches (drop_last=True) or mapper_norm='layer'")
        hidden = self.down(cross.to(self.down.weight.dtype))
        hidden = F.gelu(_batch_normed(self.norm, hidden) if isinstance(self.norm, _BatchNorm) else self.norm(hidden))
        return {int(width): up(hidden) for width, up in self.up.items()}


def _batch_normed(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What the norm gives, whose running statistics stay as they are where the batch's aren't all finite.

    A step that is skipped for it would else leave them NaN for good. The result isn't mended: the loss has to show it.
    """
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    if not norm.training or mean is None:
        return norm(x)
    # into copies: backward keeps what the norm was called with, and must not find it changed
    before = torch.stack((mean, var))
    moved = before.clone()
    if type(norm) is nn.BatchNorm1d and norm.momentum is not None and is_plain(norm):
        x = F.batch_norm(x, *moved.unbind(), norm.weight, norm.bias, True, norm.momentum, norm.eps)
    else:
        copies = dict(zip(("running_mean", "running_var"), moved.unbind(), strict=True))
        x = functional_call(norm, {**copies, "num_batches_tracked": count.clone()}, (x,))
    with torch.no_grad():
        finite = moved.isfinite().all()
        for kept, new in zip((mean, var), torch.where(finite, moved, before), strict=True):
            kept.copy_(new)
        count.add_(finite)
    return x
