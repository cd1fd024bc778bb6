"""One layer's prompts: as prompt tokens, or as keys and values for the layer's attention."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._autocast import cast, without_autocast
from .config import MoPEConfig
from .rows import Prefix, Projection, Rows, mixes_in_kv_space, stacked_rows


def expert_gram(experts: Tensor) -> Tensor:
    """``G[..., l, i, j] = <C_i, C_j> / D`` of the centred expert rows ``C_j = E_j - mean(E_j)``.

    A layer norm divides the mixture ``sum_j r_j E_j`` by ``sqrt(r' G r + eps)``: with G it is known before mixing.

    Args:
        experts: (..., K, L, D).

    Returns:
        (..., L, K, K) in float32 (float64 for float64), whatever autocast says.
    """
    with without_autocast(experts.device.type):
        rows = experts.to(torch.promote_types(experts.dtype, torch.float32)).transpose(-2, -3)
        rows = rows - rows.mean(-1, keepdim=True)
        return rows @ rows.mT / experts.shape[-1]


@dataclass
class Routing:
    """What it takes to mix one layer's experts."""

    logits: Tensor  # (B, K), float32 or float64
    noise: Tensor | None  # (B, K)
    experts: Tensor  # (K, L, D)
    gram: Callable[[], Tensor]  # () -> (L, K, K)
    training: bool


@dataclass
class MoPEOutput:
    """One layer's prompts, in the order [static | dynamic | mapped], P = 2L + 1 of them with all three.

    Dynamic prompts are mixed on first use, either as tokens (``dynamic``, ``prompts``) or as keys and values (``key_value``).
    """

    batch: int
    dtype: torch.dtype
    config: MoPEConfig
    static_rows: Tensor | None  # (L, D), after dropout
    mapped_rows: Tensor | None  # (B, D), after dropout
    routing: Routing | None
    rows: Rows | None = field(default=None, repr=False)
    """What of ``key_value`` was computed with other layers', for the very layer that it will be called with."""
    _dynamic: Tensor | None = field(default=None, repr=False)
    _scores: Tensor | None = field(default=None, repr=False)

    @property
    def static(self) -> Tensor | None:
        """(B, L, D), a view of one (L, D) prompt."""
        return None if self.static_rows is None else self.static_rows.to(self.dtype).expand(self.batch, -1, -1)

    @property
    def mapped(self) -> Tensor | None:
        """(B, 1, D)."""
        return None if self.mapped_rows is None else self.mapped_rows.to(self.dtype)[:, None]

    @property
    def dynamic(self) -> Tensor | None:
        """(B, L, D), ``sum_k scores[:, k] experts[k]``."""
        if self.routing is None:
            return None
        if self._dynamic is None:
            mixed, self._scores = self._mix(self.routing.experts)
            if self.routing.training and self.config.dynamic_dropout > 0:
                mixed = F.dropout(mixed, self.config.dynamic_dropout)
            self._dynamic = cast(mixed, self.dtype)
        return self._dynamic

    @property
    def prompts(self) -> Tensor:
        """(B, P, D), to be put before the tokens of a layer."""
        return torch.cat([prompt for prompt in (self.static, self.dynamic, self.mapped) if prompt is not None], dim=1)

    @property
    def scores(self) -> Tensor | None:
        """(B, K) routing scores after the gate in float32 (float64 for float64); None without dynamic prompts."""
        if self._scores is None and self.routing is not None:
            _ = self.dynamic
        return self._scores

    @property
    def importance_loss(self) -> Tensor:
        """This layer's importance loss, not weighted; 0 without dynamic prompts."""
        if self.scores is None:
            reference = self.static_rows if self.static_rows is not None else self.mapped_rows
            return torch.zeros((), device=reference.device)
        return functional.importance_loss(self.scores, threshold=self.config.importance_threshold)

    def _mix(self, table: Tensor, gram: Tensor | None = None, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        config, routing = self.config, self.routing
        return functional.route_and_mix(
            routing.logits, table, temperature=config.temperature, noise=routing.noise,
            top_k=config.top_k, renormalize=config.renormalize, gram=gram, eps=eps,
        )  # fmt: skip

    def key_value(
        self,
        norm: nn.Module | None,
        k_proj: Projection,
        v_proj: Projection | None,
        num_heads: int,
        *,
        key_norm: Projection | None = None,
    ) -> list[Prefix]:
        """The prompts as key/value prefixes of a frozen layer's attention, for :func:`mope_fast.functional.prompt_attention`.

        Same result as the layer's own keys and values at the prompts' positions of the concatenated sequence. Static prompts
        are projected once, for batch 1. Dynamic prompts are mixed as tokens and projected, or (``config.mixing``) the experts
        are projected and their keys and values mixed: K*L rows through the projections in place of B*L.

        Args:
            norm: the norm before the layer's attention; None for a post-norm layer.
            k_proj, v_proj: affine maps (..., D) -> (..., H * Dh); they are called, never read. With ``v_proj`` None, ``k_proj``
                gives keys and values side by side, (..., 2 * H * Dh).
            num_heads: H.
            key_norm: a norm of keys behind the projection, called on (..., H, P, Dh); it rules out K/V-space mixing.

        Returns:
            Up to two (key, value) pairs (1 or B, H, P, Dh): static, and [dynamic | mapped].
        """
        rows = self._rows(norm, key_norm) if self.rows is None else self.rows
        values, sizes = rows.values, dict(rows.sizes)
        if self.routing is not None and not rows.in_kv_space:
            dynamic = self.dynamic.flatten(0, 1)
            sizes["dynamic"] = dynamic.shape[0]
            dynamic = dynamic if norm is None else norm(dynamic)
            values = torch.cat([values, cast(dynamic, values.dtype)]) if rows.sizes else dynamic
        both = project(values, k_proj, v_proj)
        parts = dict(zip(sizes, both.split(list(sizes.values())), strict=True))

        if rows.in_kv_space:
            parts["dynamic"] = self._mix_in_kv_space(parts, rows.scales, norm)
        elif self.routing is not None:
            parts["dynamic"] = parts["dynamic"].unflatten(0, (self.batch, self.config.prompt_length))
        if "mapped" in parts:
            parts["mapped"] = parts["mapped"][:, None]
        prefixes = [parts["static"][None]] if "static" in parts else []
        if per_sample := [parts[name] for name in ("dynamic", "mapped") if name in parts]:
            prefixes.append(per_sample[0] if len(per_sample) == 1 else torch.cat(per_sample, dim=1))
        return [split_heads(rows, num_heads, key_norm) for rows in prefixes]

    def _rows(self, norm: nn.Module | None, key_norm: Projection | None) -> Rows:
        experts, config = None, self.config
        if self.routing is not None and mixes_in_kv_space(config, self.batch, self.routing.training, norm, key_norm):
            experts = self.routing.experts[None]
        static = None if self.static_rows is None else self.static_rows[None]
        return stacked_rows(static, self.mapped_rows, experts, [norm], config, self.dtype)[0]

    def _mix_in_kv_space(self, parts: dict[str, Tensor], scales: Tensor | None, norm: nn.Module | None) -> Tensor:
        """Keys and values of experts, of zero and of the norm's bias -> those of the mixed prompts, (B, L, 2 * H * Dh)."""
        table, shift = expert_table(parts, scales, self.config.num_experts)
        gram, eps = (None, 1e-5) if norm is None else (self.routing.gram(), norm.eps)
        mixed, self._scores = self._mix(table, gram, eps)
        return mixed if shift is None else mixed + cast(shift, mixed.dtype)


def project(rows: Tensor, k_proj: Projection, v_proj: Projection | None) -> Tensor:
    """(R, D) -> keys and values side by side, (R, 2 * H * Dh)."""
    keys = k_proj(rows)
    return keys if v_proj is None else torch.cat([keys, v_proj(rows)], dim=-1)


def expert_table(parts: dict[str, Tensor], scales: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor | None]:
    """What K/V-space mixing mixes and what it then adds: (K, L, 2 * H * Dh) and (1, 2 * H * Dh) or None.

    Args:
        parts: projections of :class:`Rows`' experts (K * L, 2 * H * Dh), zero and bias, as far as there are any.
        scales: those of :class:`Rows`.
    """
    table, zero = parts["experts"], parts.get("zero")
    # the linear part of an affine map is its value less its value at zero
    table = table if zero is None else table - zero
    table = table if scales is None else table * cast(scales, table.dtype)
    return table.unflatten(0, (num_experts, -1)), parts.get("bias", zero)


def split_heads(rows: Tensor, num_heads: int, key_norm: Projection | None = None) -> Prefix:
    """Keys and values side by side (B, P, 2 * H * Dh) -> two views (B, H, P, Dh), keys normed."""
    keys, values = rows.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return (keys if key_norm is None else cast(key_norm(keys), values.dtype)), values
