"""The multimodal router (MoPE, arXiv 2403.10568, equation 3): the one place of its formula."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import cast, without_autocast
from .config import MoPEConfig


class Router(NamedTuple):
    """One layer's scores, ``gate(softmax_j((psi_y W_y . v_j + x_0 W_x . v_j) / tau + noise))``, all computed but what x_0 decides.

    In float32 (float64 where a weight is): logits / tau has no bits to spare.
    """

    cross: Tensor
    """(B, K), all of the softmax's argument that doesn't depend on x_0."""
    weight: Tensor
    """(d_i, D), W_x."""
    keys: Tensor
    """(d_i, K), the routing embeddings' part for x_0, divided by tau."""
    top_k: int | None = None
    renormalize: bool = False


class Keys(NamedTuple):
    """What the routers of n layers have in common for all samples."""

    own: Tensor | Sequence[Tensor]
    """(n, d_i, K), divided by tau."""
    cross: Tensor
    """(n, d_c, K), divided by tau."""
    shift: Tensor
    """(n, 1, K), of the bias of W_x."""

    @classmethod
    def of(cls, keys: Tensor, bias: Tensor, temperature: float) -> "Keys":
        """Keys (n, K, d_i + d_c) and the bias of W_x (n, d_i)."""
        with without_autocast(keys.device.type):
            scaled = cast(keys, torch.promote_types(keys.dtype, torch.float32)).mT / temperature
            own, cross = scaled.split([bias.shape[-1], scaled.shape[1] - bias.shape[-1]], dim=1)
            return cls(own, cross, cast(bias, scaled.dtype)[:, None] @ own)

    def logits(self, psi_y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(n, B, K): what psi_y (B, cross_dim) gives the softmax by W_y (n * d_c, cross_dim) and its bias."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with without_autocast(psi_y.device.type):
            query = F.linear(cast(psi_y, dtype), cast(weight, dtype), cast(bias, dtype))
            query = query.unflatten(-1, (len(self.cross), -1)).transpose(0, 1)
            return torch.baddbmm(cast(self.shift, dtype), query, cast(self.cross, dtype))


def make_routers(
    config: MoPEConfig,
    keys: Keys,
    weights: Sequence[Tensor],
    psi_y: Tensor,
    cross_proj: nn.Linear,
    *,
    noisy: bool = False,
) -> list[Router]:
    """Those of n layers, for the complementary features psi_y (B, cross_dim).

    Args:
        weights: W_x of each layer, (d_i, D).
        cross_proj: W_y of all layers, cross_dim -> n * d_c.
        noisy: add normal noise of ``config.noise_std`` to the softmax's argument.
    """
    logits = keys.logits(psi_y, cross_proj.weight, cross_proj.bias)
    if noisy and config.noise_std > 0:
        logits = logits + torch.randn_like(logits) * config.noise_std
    each = zip(logits.unbind(), weights, keys.own, strict=True)
    return [Router(cross, weight, own, config.top_k, config.renormalize) for cross, weight, own in each]


def orthogonal_keys(num_experts: int, routing_dim: int) -> Tensor:
    """(K, d_r) routing embeddings of the released code: orthonormal for K <= d_r, else columns are (the keys then aren't)."""
    return nn.init.orthogonal_(torch.empty(routing_dim, num_experts)).T.contiguous()
