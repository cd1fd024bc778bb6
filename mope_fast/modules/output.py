"""One layer's prompts: as prompt tokens, or as keys and values for the layer's attention."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .config import MoPEConfig

Projection = Callable[[Tensor], Tensor]
Prefix = tuple[Tensor, Tensor]


def expert_gram(experts: Tensor) -> Tensor:
    """``G[..., l, i, j] = <C_i, C_j> / D`` of the centred expert rows ``C_j = E_j - mean(E_j)``.

    A layer norm divides the mixture ``sum_j r_j E_j`` by ``sqrt(r' G r + eps)``: with G it is known before mixing.

    Args:
        experts: (..., K, L, D).

    Returns:
        (..., L, K, K) in float32 (float64 for float64), whatever autocast says.
    """
    with torch.autocast(experts.device.type, enabled=False):
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
            self._dynamic = F.dropout(mixed, self.config.dynamic_dropout, self.routing.training).to(self.dtype)
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
        self, norm: nn.Module | None, k_proj: Projection, v_proj: Projection, num_heads: int, *, key_norm: Projection | None = None
    ) -> list[Prefix]:
        """The prompts as key/value prefixes of a frozen layer's attention, for :func:`mope_fast.functional.prompt_attention`.

        Same result as the layer's own keys and values at the prompts' positions of the concatenated sequence. Static prompts
        are projected once, for batch 1. Dynamic prompts are mixed as tokens and projected, or (``config.mixing``) the experts
        are projected and their keys and values mixed: K*L rows through the projections in place of B*L.

        Args:
            norm: the norm before the layer's attention; None for a post-norm layer.
            k_proj, v_proj: affine maps (..., D) -> (..., H * Dh); they are called, never read.
            num_heads: H.
            key_norm: a norm of keys behind the projection, called on (..., H, P, Dh); it rules out K/V-space mixing.

        Returns:
            Up to two (key, value) pairs (1 or B, H, P, Dh): static, and [dynamic | mapped].
        """
        in_kv_space = self.routing is not None and self._mixes_in_kv_space(norm, key_norm)
        length = self.config.prompt_length
        static = [] if self.static_rows is None else [self.static_rows]
        mapped = [] if self.mapped_rows is None else [self.mapped_rows]
        if in_kv_space:
            experts = self.routing.experts
            sources = [*static, *mapped, experts.flatten(0, 1), experts.new_zeros(1, experts.shape[-1])]
        else:
            dynamic = [] if self.routing is None else [self.dynamic.flatten(0, 1)]
            sources = [*static, *mapped, *dynamic]
        sizes = [len(rows) for rows in sources]
        rows = torch.cat([rows.to(self.dtype) for rows in sources])
        if norm is not None:
            rows = norm(rows)
        if in_kv_space:
            # the linear part of an affine map is its value less its value at zero, the norm's value at zero is its bias
            shift = rows[-1:] if norm is not None else None
            if norm is not None:
                start = len(rows) - 1 - sizes[-2]
                rows = torch.cat([rows[:start], rows[start:-1] - shift, torch.zeros_like(shift), shift])
        key_rows, value_rows = k_proj(rows), v_proj(rows)

        prefixes: list[Prefix] = []
        if static:
            prefixes.append((_heads(key_rows[:length][None], num_heads), _heads(value_rows[:length][None], num_heads)))
            key_rows, value_rows = key_rows[length:], value_rows[length:]
        per_sample: list[list[Tensor]] = [[], []]
        if mapped:
            per_sample = [[key_rows[: self.batch][:, None]], [value_rows[: self.batch][:, None]]]
            key_rows, value_rows = key_rows[self.batch :], value_rows[self.batch :]
        if in_kv_space:
            keys, values = self._mix_in_kv_space(key_rows, value_rows, norm)
            per_sample = [[keys, *per_sample[0]], [values, *per_sample[1]]]
        elif self.routing is not None:
            shape = (self.batch, length)
            per_sample = [[key_rows.unflatten(0, shape), *per_sample[0]], [value_rows.unflatten(0, shape), *per_sample[1]]]
        if per_sample[0]:
            keys, values = (torch.cat(parts, dim=1) for parts in per_sample)
            prefixes.append((_heads(keys, num_heads), _heads(values, num_heads)))
        if key_norm is not None:
            prefixes = [(key_norm(keys), values) for keys, values in prefixes]
        return prefixes

    def _mixes_in_kv_space(self, norm: nn.Module | None, key_norm: Projection | None) -> bool:
        config, routing = self.config, self.routing
        problem = None
        if norm is not None and not isinstance(norm, nn.LayerNorm):
            problem = f"the layer's norm is {type(norm).__name__}, not nn.LayerNorm"
        elif key_norm is not None:
            problem = "the layer norms its keys behind the projection"
        elif config.dynamic_dropout > 0 and routing.training:
            problem = "dynamic_dropout is on"
        if config.mixing == "kv" and problem is not None:
            raise ValueError(f"MoPEConfig.mixing='kv' is not exact here: {problem}; use mixing='auto' or 'prompt'")
        return problem is None and (config.mixing == "kv" or (config.mixing == "auto" and config.num_experts < self.batch))

    def _mix_in_kv_space(self, key_rows: Tensor, value_rows: Tensor, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
        """Rows [experts | value at zero | value at the norm's bias] -> the mixed prompts' keys and values (B, L, H * Dh)."""
        num_experts, length = self.config.num_experts, self.config.prompt_length
        rows = torch.cat([key_rows, value_rows], dim=-1)
        experts, ends = rows[: num_experts * length], rows[num_experts * length :]
        table = (experts - ends[:1]).unflatten(0, (num_experts, length))
        gram, eps = None, 1e-5
        if norm is not None:
            gram, eps = self.routing.gram(), norm.eps
            # the norm has divided each expert by its own deviation: undo that, the mixture has another
            deviation = (gram.diagonal(dim1=-2, dim2=-1) + eps).sqrt().T  # (K, L)
            table = table * deviation[..., None].to(table.dtype)
        mixed, self._scores = self._mix(table, gram, eps)
        mixed = mixed + ends[-1].to(mixed.dtype)
        return mixed.split([key_rows.shape[-1], value_rows.shape[-1]], dim=-1)


def _heads(rows: Tensor, num_heads: int) -> Tensor:
    """(B, P, H * Dh) -> (B, H, P, Dh), a view."""
    return rows.unflatten(-1, (num_heads, -1)).transpose(1, 2)
