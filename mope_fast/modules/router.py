"""The multimodal router's pieces: self feature, projections in float32, keys, noise (MoPE, arXiv 2403.10568, equation 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import cast, without_autocast


def global_feature(x: Tensor) -> Tensor:
    """The router's view of a layer's input: the class token of (B, S, D), or (B, D) as it is."""
    return x[:, 0] if x.dim() == 3 else x


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map in float32 (float64 if the weight is), whatever autocast says: logits / tau has no bits to spare."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with without_autocast(x.device.type):
        return F.linear(cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))


def orthogonal_keys(num_experts: int, routing_dim: int) -> Tensor:
    """(K, d_r) routing embeddings of the released code: orthonormal for K <= d_r, else columns are (the keys then aren't)."""
    return nn.init.orthogonal_(torch.empty(routing_dim, num_experts)).T.contiguous()


def routing_noise(logits: Tensor, std: float) -> Tensor | None:
    """Normal noise for logits / tau, drawn on their device."""
    return torch.randn_like(logits) * std if std > 0 else None
