"""From a layer's prompts to keys and values of its attention, in stages: rows, normed; tables, projected; prefixes, mixed.

Each stage has ``prefixes``, which does what is left. What needs nothing of a layer's input is done for all layers at once, ahead of
the first, where that is allowed; else within the layer's own call, by the same functions for one layer.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import cast, without_autocast
from .._dispatch import layer_prompts
from .config import MoPEConfig
from .norms import Norms, is_known, is_plain, norm_problem
from .router import Router

Projection = Callable[[Tensor], Tensor]
Prefix = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Keys and values (B or 1, H, P, Dh), and which of them are there (B or 1, P) if not all are."""


class FrozenLayer(Protocol):
    """What has to be known of a layer whose attention takes prompts: see :class:`mope_fast.encoders.PromptedLayer`."""

    norm: nn.Module | None
    k_proj: Projection
    v_proj: Projection | None
    num_heads: int
    key_norm: Projection | None


@dataclass
class Tables:
    """One layer's prompts as keys and values side by side, of width W = 2 * H * Dh, in all but their scores."""

    before: Tensor | None = None
    """(B or 1, P, W), prompts in front of routed ones."""
    after: Tensor | None = None
    """(B or 1, P, W), prompts behind them."""
    router: Router | None = None
    experts: Tensor | None = None
    """(K, L, W)"""
    gram: Tensor | None = None
    """(K, L, K), of :func:`expert_gram`; None without a norm."""
    shift: Tensor | None = None
    """(W,), added to what is mixed."""
    eps: float = 1e-5
    mix: Callable[..., tuple[Tensor, Tensor]] | None = None
    """The implementation, where it was chosen for all layers; see :func:`mope_fast._dispatch.layer_prompts`."""

    def mixed(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """All prompts (B or 1, P, W) in their order, and scores (B, K), for the layer's feature (B, D)."""
        if self.router is None:
            parts = [part for part in (self.before, self.after) if part is not None]
            if len(parts) == 1:
                return parts[0], None
            batch = max(part.shape[0] for part in parts)
            return torch.cat([cast(part, parts[0].dtype).expand(batch, -1, -1) for part in parts], dim=1), None
        cross, weight, keys, top_k, renormalize = self.router
        mix = layer_prompts(self.experts, cross) if self.mix is None else self.mix
        with without_autocast(feature.device.type):
            return mix(
                feature, cross, weight, keys, self.experts, self.before, self.after, self.gram, self.shift,
                top_k=top_k, renormalize=renormalize, eps=self.eps,
            )  # fmt: skip

    def prefixes(self, layer: FrozenLayer, feature: Tensor) -> tuple[list[Prefix], Tensor | None]:
        """One prefix of the layer's attention, and the scores."""
        rows, scores = self.mixed(feature)
        return [split_heads(rows, layer)], scores


@dataclass
class Rows:
    """What goes through n layers' projections; only rows of one layer have ``prefixes``."""

    values: Tensor
    """(n, R, D): prompts that aren't routed, normed, and in K/V space experts, the value at zero and at the norm's bias."""
    sizes: dict[str, int]
    """Of the parts of ``values``, in order."""
    shapes: dict[str, tuple[int, int]]
    """Of "before" and "after", (B or 1, P)."""
    routers: Sequence[Router]
    experts: Tensor | None
    """(n, K, L, D), as they are, to be mixed as prompts; None in K/V space."""
    scales: Tensor | None = None
    """(n, K * L, 1), what projected experts are to be multiplied by; None for one."""
    gram: Tensor | None = None
    """(n, K, L, K)"""
    eps: float = 1e-5
    dropout: float = 0.0
    """Of routed prompts."""

    def each(self) -> list["Rows"]:
        """One layer's rows, for every layer."""
        layers = range(len(self.values))
        parts = ([None] * len(layers) if part is None else part.split(1) for part in (self.experts, self.scales, self.gram))
        routers = self.routers or [None] * len(layers)
        each = zip(self.values.split(1), routers, *parts, strict=True)
        return [
            Rows(values, self.sizes, self.shapes, [] if router is None else [router], *more, self.eps, self.dropout)
            for values, router, *more in each
        ]

    def tables(self, layers: Sequence[FrozenLayer]) -> list[Tables]:
        """Every layer's, each by one call of its projections. Only where nothing is mixed as prompts."""
        both = [project(rows, layer) for rows, layer in zip(self.values, layers, strict=True)]
        if len({rows.shape[-1] for pair in both for rows in pair}) > 1:  # heads were pruned
            return [one._tables([pair])[0] for one, pair in zip(self.each(), both, strict=True)]
        return self._tables(both)

    def _tables(self, both: Sequence[tuple[Tensor, ...]]) -> list[Tables]:
        split = side_by_side(both).split(list(self.sizes.values()), dim=1)
        # of prompts that aren't routed (n, B or 1, P, W), of the others (n, R, W)
        parts = {
            name: part.unflatten(1, self.shapes[name]) if name in self.shapes else part
            for name, part in zip(self.sizes, split, strict=True)
        }
        experts, shift = parts.get("experts"), parts.get("bias", parts.get("zero"))
        if experts is not None:
            # the linear part of an affine map is its value less its value at zero
            experts = experts - parts["zero"] if "zero" in parts else experts
            experts = experts if self.scales is None else experts * cast(self.scales, experts.dtype)
            experts = experts.unflatten(1, (self.routers[0].keys.shape[1], -1))
            shift = None if shift is None else shift[:, 0]
        columns = (parts.get("before"), parts.get("after"), self.routers or None, experts, self.gram, shift)
        each = ([None] * len(both) if column is None else list(column) for column in columns)
        mix = None if experts is None else layer_prompts(experts, self.routers[0].cross)
        return [Tables(*values, self.eps, mix) for values in zip(*each, strict=True)]

    def prefixes(self, layer: FrozenLayer, feature: Tensor) -> tuple[list[Prefix], Tensor | None]:
        """One prefix of the layer's attention, and the scores."""
        if self.experts is None:
            return self.tables([layer])[0].prefixes(layer, feature)
        routed, scores = Tables(router=self.routers[0], experts=self.experts[0]).mixed(feature)
        return [self.prefix_with(layer, F.dropout(routed, self.dropout) if self.dropout else routed)], scores

    def prefix_with(self, layer: FrozenLayer, routed: Tensor) -> Prefix:
        """Routed prompts (B, L, D), mixed as prompts, are normed and projected with the others."""
        batch, length, _ = routed.shape
        routed = cast(routed.flatten(0, 1), self.values.dtype)
        routed = routed if layer.norm is None else layer.norm(routed)
        rows = torch.cat([self.values[0], cast(routed, self.values.dtype)]) if self.sizes else routed
        *beside, routed = side_by_side([project(rows, layer)])[0].split([*self.sizes.values(), batch * length])
        parts = {name: part.unflatten(0, self.shapes[name]) for name, part in zip(self.sizes, beside, strict=True)}
        in_order = (parts.get("before"), routed.unflatten(0, (batch, length)), parts.get("after"))
        each = [part.expand(batch, -1, -1) for part in in_order if part is not None]
        return split_heads(each[0] if len(each) == 1 else torch.cat(each, dim=1), layer)


_LIFT = 16.0
"""Experts go through a projection about this much larger than a norm makes them.

What is left of a projection's value less its value at zero has the rounding of both. With experts no larger than the bias, and a
mixture that is smaller by the root of K, bfloat16 would have few digits left.
"""


def make_rows(
    fixed: Mapping[str, Tensor],
    experts: Tensor | None,
    routers: Sequence[Router],
    norms: Sequence[nn.Module | None],
    config: MoPEConfig,
    dtype: torch.dtype,
    *,
    in_kv_space: bool,
    dropout: float = 0.0,
) -> Rows:
    """The rows of n layers of one width.

    Args:
        fixed: prompts that aren't routed, (1 or n, 1 or B, P, D), by "before" and "after".
        experts: (n, K, L, D), and their routers.
        norms: each layer's; several only if :func:`can_be_stacked`.
        dtype: of the layers' input.
        in_kv_space: project the experts and mix what comes out.
        dropout: of routed prompts, in prompt space.
    """
    layers, scales, gram, eps = len(norms), None, None, 1e-5
    known = None if norms[0] is None or not is_known(norms[0]) else Norms.of(norms, dtype)
    shapes = {name: tuple(rows.shape[1:3]) for name, rows in fixed.items()}
    parts = {name: _normed(rows.flatten(1, 2), norms, known, dtype) for name, rows in fixed.items()}
    if experts is not None and in_kv_space:
        with without_autocast(experts.device.type):
            wide = experts.to(torch.promote_types(experts.dtype, torch.float32))
            zero = wide.new_zeros(layers, 1, wide.shape[-1])
            if known is not None:
                # such a norm is affine in the row, centred or not, up to its deviation: the mixture's is divided by after mixing
                wide = wide - wide.mean(-1, keepdim=True) if known.centred else wide
                gram, eps = expert_gram(wide), known.eps
                with torch.no_grad():
                    # powers of two near the deviations: neither they nor their gradients change anything but the rounding
                    variances = gram.diagonal(dim1=1, dim2=3).mT
                    scales = torch.exp2((0.5 * torch.log2(variances + eps)).round()).unsqueeze(-1) / _LIFT
                wide = wide * (known.weight if isinstance(known.weight, float) else known.weight[:, None]) / scales
                scales = scales.flatten(1, 2)
                parts |= {"experts": wide.flatten(1, 2), "zero": zero}
                if isinstance(known.bias, Tensor):
                    parts["bias"] = zero + known.bias
            else:
                parts["experts"] = wide.flatten(1, 2)
                # scores that add up to one carry the projection's bias along
                if config.top_k is not None and not config.renormalize:
                    parts["zero"] = zero
        experts = None
    sizes = {name: rows.shape[1] for name, rows in parts.items()}
    rows = [rows.to(dtype).expand(layers, -1, -1) for rows in parts.values()]
    values = torch.cat(rows, dim=1) if rows else routers[0].cross.new_empty((layers, 0, 0), dtype=dtype)
    return Rows(values, sizes, shapes, routers, experts, scales, gram, eps, dropout)


def _normed(rows: Tensor, norms: Sequence[nn.Module | None], known: Norms | None, dtype: torch.dtype) -> Tensor:
    """(1 or n, R, D) -> (1 or n, R, D), each layer's by its norm; as they are without norms."""
    if norms[0] is None:
        return rows
    return norms[0](rows[0].to(dtype))[None] if len(norms) == 1 else known(rows)


def expert_gram(experts: Tensor) -> Tensor:
    """``G[..., i, l, j] = <E_il, E_jl> / D`` of the expert rows, which a layer norm has less their means, an RMS norm as they are.

    Such a norm divides row l of the mixture by ``sqrt(r' G_l r + eps)``: with G it is known before mixing.

    Args:
        experts: (..., K, L, D).

    Returns:
        (..., K, L, K) in float32 (float64 for float64), whatever autocast says.
    """
    with without_autocast(experts.device.type):
        rows = experts.to(torch.promote_types(experts.dtype, torch.float32)).transpose(-2, -3)
        # with i in front a sample's products r' G are one product of matrices
        return (rows @ (rows.mT / experts.shape[-1])).transpose(-2, -3).contiguous()


def mixes_in_kv_space(config: MoPEConfig, batch: int, training: bool, layer: FrozenLayer) -> bool:
    """Whether a layer's experts are projected and then mixed.

    Raises:
        ValueError: ``config.mixing`` asks for it, and it would not be exact.
    """
    problem = None
    if (reason := norm_problem(layer.norm)) is not None:
        problem = f"the layer's {reason}"
    elif layer.key_norm is not None:
        problem = "the layer norms its keys behind the projection"
    elif config.dynamic_dropout > 0 and training:
        problem = "dynamic_dropout is on"
    if config.mixing == "kv" and problem is not None:
        raise ValueError(f"MoPEConfig.mixing='kv' is not exact here: {problem}; use mixing='auto' or 'prompt'")
    return problem is None and (config.mixing == "kv" or (config.mixing == "auto" and config.num_experts < batch))


def project(rows: Tensor, layer: FrozenLayer) -> tuple[Tensor, ...]:
    """Rows (R, D), normed -> keys and values (R, H * Dh), or one tensor that has them side by side."""
    return (layer.k_proj(rows),) if layer.v_proj is None else (layer.k_proj(rows), layer.v_proj(rows))


def side_by_side(projected: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """What :func:`project` gives for n layers -> (n, R, 2 * H * Dh)."""
    if len(projected) == 1:
        return (projected[0][0] if len(projected[0]) == 1 else torch.cat(projected[0], dim=-1))[None]
    both = torch.stack([rows for pair in projected for rows in pair])
    if len(both) == len(projected):
        return both
    # stacked first, so that keys and values need no copy of a layer's own
    return both.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


def split_heads(rows: Tensor, layer: FrozenLayer) -> Prefix:
    """Keys and values side by side (B, P, 2 * H * Dh) -> two views (B, H, P, Dh), keys normed."""
    batch, length, width = rows.shape
    heads = layer.num_heads
    keys, values = rows.reshape(batch, length, 2, heads, width // (2 * heads)).permute(2, 0, 3, 1, 4).unbind()
    return (keys if layer.key_norm is None else cast(layer.key_norm(keys), values.dtype)), values


def can_be_projected_ahead(layers: Sequence[FrozenLayer], device: torch.device) -> bool:
    """Whether norms and projections may be called outside of their layers' own calls: nobody gathers, moves or watches for it.

    FSDP and ZeRO have a parameter whole only while its layer runs, offloading keeps it elsewhere until then, and hooks may expect
    the layer's order.
    """
    # loops: torch 2.10 doesn't trace these questions inside of all()
    for layer in layers:
        for part in (layer.norm, layer.k_proj, layer.v_proj, layer.key_norm):
            if part is not None and not _is_at_hand(part, device):
                return False
    return True


def _is_at_hand(part: Projection, device: torch.device) -> bool:
    if isinstance(part, functools.partial):
        given = [value for value in (*part.args, *part.keywords.values()) if value is not None and not isinstance(value, int)]
        if not inspect.isfunction(part.func) or not given:
            return False
        for value in given:  # noqa: SIM110
            if not (_is_here(value, device) if isinstance(value, Tensor) else _is_at_hand(value, device)):
                return False
        return True
    if not isinstance(part, nn.Module) or not is_plain(part):
        return False
    for tensor in (*part._parameters.values(), *part._buffers.values()):
        if tensor is not None and not _is_here(tensor, device):
            return False
    # a mere attribute is somebody else's to bring
    if not torch.compiler.is_compiling() and any(isinstance(value, Tensor) for value in vars(part).values()):
        return False
    for child in part._modules.values():  # noqa: SIM110
        if child is not None and not _is_at_hand(child, device):
            return False
    return True


def _is_here(tensor: Tensor, device: torch.device) -> bool:
    """Whether it is plain and whole; FSDP's first version gives memory or numbers back between calls."""
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.device != device or not tensor.numel():
        return False
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return tensor.untyped_storage().size() >= tensor.numel() * tensor.element_size()
