"""One layer's prompts: as prompt tokens, or as keys and values for the layer's attention."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._autocast import cast
from .config import MoPEConfig
from .kinds import KINDS, in_place
from .router import Router
from .tables import FrozenLayer, Prefix, Projection, Rows, Tables, make_rows, mixes_in_kv_space


class _Layer(NamedTuple):
    """A frozen layer, as :meth:`MoPEOutput.key_value` is told of it."""

    norm: nn.Module | None
    k_proj: Projection
    v_proj: Projection | None
    num_heads: int
    key_norm: Projection | None


@dataclass
class MoPEOutput:
    """One layer's prompts, in the order [static | dynamic | mapped], P = 2L + 1 of them with all three.

    Dynamic prompts are mixed on first use, either as tokens (``dynamic``, ``prompts``) or as keys and values (``key_value``).
    """

    batch: int | None
    dtype: torch.dtype
    config: MoPEConfig
    kinds: Mapping[str, Tensor] = field(repr=False)
    """Prompts that aren't routed, by the name of their kind: (1 or B, P, D), after dropout."""
    router: Router | None = field(default=None, repr=False)
    experts: Tensor | None = field(default=None, repr=False)
    """(K, L, D)"""
    training: bool = False
    feature: Tensor | None = field(default=None, repr=False)
    """(B, D), what the router sees of the layer's input."""
    _dynamic: Tensor | None = field(default=None, repr=False)
    _scores: Tensor | None = field(default=None, repr=False)

    @property
    def static(self) -> Tensor | None:
        """(B, L, D), a view of one (L, D) prompt."""
        return self._kind("static")

    @property
    def mapped(self) -> Tensor | None:
        """(B, 1, D)."""
        return self._kind("mapped")

    def _kind(self, name: str) -> Tensor | None:
        return self.kinds[name].to(self.dtype).expand(self.batch, -1, -1) if name in self.kinds else None

    @property
    def dynamic(self) -> Tensor | None:
        """(B, L, D), ``sum_k scores[:, k] experts[k]``."""
        if self._dynamic is None and self.router is not None:
            mixed, self._scores = Tables(router=self.router, experts=self.experts).mixed(self.feature)
            self._dynamic = cast(F.dropout(mixed, self._dropout) if self._dropout else mixed, self.dtype)
        return self._dynamic

    @property
    def prompts(self) -> Tensor:
        """(B, P, D), to be put before the tokens of a layer."""
        before, after = ([self._kind(kind.name) for kind in KINDS if kind.before is first] for first in (True, False))
        return torch.cat([prompt for prompt in (*before, self.dynamic, *after) if prompt is not None], dim=1)

    @property
    def scores(self) -> Tensor | None:
        """(B, K) routing scores after the gate in float32 (float64 for float64); None without dynamic prompts."""
        if self._scores is None:
            _ = self.dynamic
        return self._scores

    @property
    def importance_loss(self) -> Tensor:
        """This layer's importance loss, not weighted; 0 without dynamic prompts."""
        if self.scores is None:
            return torch.zeros((), device=next(iter(self.kinds.values())).device)
        return functional.importance_loss(self.scores, threshold=self.config.importance_threshold)

    @property
    def _dropout(self) -> float:
        """Of dynamic prompts."""
        return self.config.dynamic_dropout if self.training else 0.0

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
            Up to two (key, value) pairs (1 or B, H, P, Dh): static, for all samples, and [dynamic | mapped].
        """
        layer = _Layer(norm, k_proj, v_proj, num_heads, key_norm)
        rows = self.rows(layer)
        if rows.experts is not None:
            keys, values = rows.prefix_with(layer, self.dynamic)
        else:
            ((keys, values),), scores = rows.prefixes(layer, self.feature)
            self._scores = scores if self._scores is None else self._scores
        samples, shared = rows.shapes.get("before", (0, 0))
        if samples != 1 or shared == keys.shape[2]:
            return [(keys, values)]
        return [(keys[:1, :, :shared], values[:1, :, :shared]), (keys[:, :, shared:], values[:, :, shared:])]

    def rows(self, layer: FrozenLayer, *, in_kv_space: bool | None = None) -> Rows:
        """What goes through this layer's projections; ``in_kv_space`` is None for what the configuration says."""
        if in_kv_space is None:
            in_kv_space = self.router is not None and mixes_in_kv_space(self.config, self.batch, self.training, layer)
        return make_rows(
            in_place({name: rows[None] for name, rows in self.kinds.items()}),
            None if self.experts is None else self.experts[None],
            [] if self.router is None else [self.router],
            [layer.norm], self.config, self.dtype, in_kv_space=in_kv_space, dropout=self._dropout,
        )  # fmt: skip

    def prefixes(self, layer: FrozenLayer, feature: Tensor) -> tuple[list[Prefix], Tensor | None]:
        """For the layer's feature (B, D), prefixes of its attention, and scores (B, K)."""
        return self.rows(layer).prefixes(layer, feature)
