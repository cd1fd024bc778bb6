"""The mapped prompt P_m: the complementary feature as one prompt token (MoPE, arXiv 2403.10568, section 3.2 and appendix A)."""

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from .._settings import checked

_NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": lambda width: nn.Identity()}


class PromptMapper(nn.Module):
    """A shared bottleneck of ceil(cross_dim / 2) units, norm, GELU, then one up-projection for each layer width.

    The released code keeps its batch norm in eval mode, so its statistics stay 0 and 1; ours is an ordinary one.

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
        hidden = F.gelu(self.norm(self.down(cross.to(self.down.weight.dtype))))
        return {int(width): up(hidden) for width, up in self.up.items()}
