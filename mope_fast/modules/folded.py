"""A bank folded into the frozen layers it is for: their projections of all prompts and experts, computed once."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._autocast import cast, without_autocast
from .config import MoPEConfig
from .output import expert_table, project, split_heads
from .prompts import LayerRouter, PromptBank, check_input
from .router import linear_fp32
from .rows import FrozenLayer, Prefix, can_be_stacked, norm_problem, stacked_rows


@dataclass
class FoldedContext:
    """What :meth:`FoldedBank.prepare` computes once per forward; one entry for each layer."""

    cross_logits: Sequence[Tensor | None]  # (B, K)
    mapped: Sequence[Tensor | None]  # (B, 2 * H * Dh)


class FoldedBank(nn.Module):
    """A :class:`PromptBank` for inference: keys and values of static prompts, experts and mapped prompts' directions are at hand.

    It takes no gradient and does not follow the bank or the frozen layers when these change later. For each layer it keeps
    K * L rows of width 2 * H * Dh (dynamic prompts) and a matrix (2 * H * Dh, D) (mapped prompts).

    Args:
        bank: left as it is.
        layers: the frozen layers' facts, in order.
        dtype: of keys and values, the frozen encoder's.

    Raises:
        ValueError: folding is not exact: a layer norms mixed keys behind the projection, or its norm is not ``nn.LayerNorm``.
    """

    @torch.no_grad()
    def __init__(self, bank: PromptBank, layers: Sequence[FrozenLayer], dtype: torch.dtype):
        super().__init__()
        for index, layer in enumerate(layers):
            if (problem := _problem(layer, bank)) is not None:
                raise ValueError(f"layer {index} can't be folded: {problem}; use the model as it is")
        bank = copy.deepcopy(bank).eval()
        self.config, self.dims = bank.config, bank.dims
        device = next(bank.parameters()).device
        with without_autocast(device.type):
            nothing = None if bank.cross_dim is None else torch.zeros(1, bank.cross_dim, device=device)
            context = bank.prepare(nothing)
            parts = zip(layers, context.static, context.routers, strict=True)
            self.tables = nn.ModuleList(_Tables(layer, static, router, self.config, dtype) for layer, static, router in parts)
            if self.config.use_dynamic:
                self.cross_proj = bank.cross_proj
                _, cross_keys = bank.split_keys()
                shifts = [router.inter_bias.to(router.inter_keys.dtype) @ router.inter_keys for router in context.routers]
                # torch.export writes whole storages
                self.cross_keys = nn.Buffer(cross_keys.mT.clone(memory_format=torch.contiguous_format))
                self.logit_shift = nn.Buffer(torch.stack(shifts)[:, None])
            if self.config.use_mapped:
                self.mapper = bank.mapper
                self.directions = nn.ModuleDict()
                for width in sorted(set(self.dims)):
                    members = [layer for layer, dim in zip(layers, self.dims, strict=True) if dim == width]
                    if not can_be_stacked(members):
                        raise ValueError(f"layers of width {width} can't be folded: their norms differ; use the model as it is")
                    self.directions[str(width)] = _Directions(members, width, dtype, device)
        self.requires_grad_(False).eval()

    @property
    def routes(self) -> bool:
        """Whether prompts depend on the layers' inputs."""
        return self.config.use_dynamic

    def prepare(self, cross: Tensor | None = None) -> FoldedContext:
        """Everything that doesn't depend on a layer's input, once per forward; cross is (B, cross_dim)."""
        logits = mapped = [None] * len(self.dims)
        if self.config.use_dynamic:
            logits = self.cross_logits(cross).unbind()
        if self.config.use_mapped:
            mapped = self.project_mapped(self.mapped_rows(cross))
        return FoldedContext(logits, mapped)

    def cross_logits(self, cross: Tensor) -> Tensor:
        """The complementary feature's part of all layers' routing logits, (N, B, K)."""
        check_input("cross", cross, self.cross_proj.in_features)
        query = linear_fp32(cross, self.cross_proj.weight, self.cross_proj.bias)
        query = query.unflatten(-1, (len(self.dims), -1)).transpose(0, 1)
        with without_autocast(cross.device.type):
            return torch.baddbmm(self.logit_shift.to(query.dtype), query, self.cross_keys.to(query.dtype))

    def mapped_rows(self, cross: Tensor) -> dict[int, Tensor]:
        """For each layer width W the mapped prompt (B, W)."""
        check_input("cross", cross, self.mapper.down.in_features)
        return self.mapper(cross)

    def project_mapped(self, rows: dict[int, Tensor]) -> list[Tensor]:
        """For each layer a mapped prompt's keys and values, (B, 2 * H * Dh); rows as :meth:`mapped_rows` gives them."""
        parts = {width: iter(self.directions[str(width)](row)) for width, row in rows.items()}
        return [next(parts[width]) for width in self.dims]

    def prefixes(
        self, index: int, layer: FrozenLayer, feature: Tensor, context: FoldedContext
    ) -> tuple[list[Prefix], Tensor | None]:
        """Layer ``index``'s prompts as prefixes of its attention, and its routing scores; feature is its pooled input (B, D)."""
        tables: _Tables = self.tables[index]
        prefixes, per_sample, scores = [], [], None
        if tables.static is not None:
            # its keys are normed already
            prefixes.append(split_heads(tables.static, layer.num_heads))
        if tables.experts is not None:
            mixed, scores = mix_tables(
                tables, context.cross_logits[index], feature, temperature=self.config.temperature,
                top_k=self.config.top_k, renormalize=self.config.renormalize,
            )  # fmt: skip
            per_sample.append(mixed)
        if context.mapped[index] is not None:
            per_sample.append(context.mapped[index][:, None])
        if per_sample:
            rows = per_sample[0] if len(per_sample) == 1 else torch.cat([cast(part, per_sample[0].dtype) for part in per_sample], 1)
            prefixes.append(split_heads(rows, layer.num_heads, layer.key_norm))
        return prefixes, scores

    def train(self, mode: bool = True) -> "FoldedBank":
        """Stays in eval mode."""
        return super().train(False)


def mix_tables(tables: nn.Module, cross_logits: Tensor, feature: Tensor, **routing: Any) -> tuple[Tensor, Tensor]:
    """Keys and values (B, L, 2 * H * Dh) of dynamic prompts, and their scores (B, K).

    Args:
        tables: with logit_map, experts, shift, gram and eps of one layer.
        cross_logits: (B, K).
        feature: the layer's pooled input (B, D).
        **routing: settings of :func:`mope_fast.functional.route_and_mix`.
    """
    with without_autocast(feature.device.type):
        dtype = cross_logits.dtype
        logits = torch.addmm(cross_logits, cast(feature, dtype), cast(tables.logit_map, dtype))
    mixed, scores = functional.route_and_mix(logits, tables.experts, gram=tables.gram, eps=tables.eps, **routing)
    return mixed if tables.shift is None else mixed + cast(tables.shift, mixed.dtype), scores


class _Tables(nn.Module):
    """What folding knows of one layer; None for prompts it doesn't have, ``gram`` for one without a norm."""

    static: Tensor | None  # (1, L, 2 * H * Dh)
    logit_map: Tensor | None  # (D, K)
    experts: Tensor | None  # (K, L, 2 * H * Dh)
    shift: Tensor | None  # (1, 2 * H * Dh); None if there is nothing to add
    gram: Tensor | None  # (L, K, K)

    def __init__(
        self, layer: FrozenLayer, static: Tensor | None, router: LayerRouter | None, config: MoPEConfig, dtype: torch.dtype
    ):
        super().__init__()
        self.eps = getattr(layer.norm, "eps", 1e-5)
        if static is not None:
            both = _project(static.to(dtype), layer)[None]
            static = torch.stack(split_heads(both, layer.num_heads, layer.key_norm)).permute(1, 3, 0, 2, 4).flatten(2)
        tables = {} if router is None else _dynamic_tables(layer, router, config, dtype)
        tables["static"] = static
        for name in ("static", "logit_map", "experts", "shift", "gram"):
            table = tables.get(name)
            self.register_buffer(name, None if table is None else table.clone())


def _dynamic_tables(layer: FrozenLayer, router: LayerRouter, config: MoPEConfig, dtype: torch.dtype) -> dict[str, Tensor | None]:
    rows = stacked_rows(None, None, router.experts[None], [layer.norm], config, dtype)[0]
    both = project(rows.values, layer.k_proj, layer.v_proj)
    parts = dict(zip(rows.sizes, both.split(list(rows.sizes.values())), strict=True))
    experts, shift = expert_table(parts, rows.scales, config.num_experts)
    logit_map = router.inter_weight.T.to(router.inter_keys.dtype) @ router.inter_keys
    return {"logit_map": logit_map, "experts": experts, "shift": shift, "gram": None if layer.norm is None else router.gram()}


_LIFT = 256.0
"""A unit vector's projection is this much larger than the weight, and far above the bias: a power of two, divided out again."""


class _Directions(nn.Module):
    """Mapped prompts' keys and values in all layers of one width, as one matrix product."""

    def __init__(self, layers: Sequence[FrozenLayer], width: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.eps = None if layers[0].norm is None else layers[0].norm.eps
        zero = torch.zeros(1, width, dtype=dtype, device=device)
        units = _LIFT * torch.eye(width, dtype=dtype, device=device)
        weights, biases, self.sizes = [], [], []
        for layer in layers:
            # behind its statistics a layer norm is x * weight + bias
            bias = zero if layer.norm is None or layer.norm.bias is None else layer.norm.bias[None]
            scaled = units if layer.norm is None or layer.norm.weight is None else units * layer.norm.weight
            scaled, at_zero, bias = (project(rows, layer.k_proj, layer.v_proj) for rows in (scaled, zero, bias))
            weights.append((scaled - at_zero) / _LIFT)
            biases.append(bias[0])
            self.sizes.append(len(bias[0]))
        # (D, all outputs): with few rows a CPU reads it this way in little more than half the time of nn.Linear's layout
        self.weight, self.bias = nn.Buffer(torch.cat(weights, dim=1)), nn.Buffer(torch.cat(biases))

    def forward(self, mapped: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> for each layer (B, 2 * H * Dh)."""
        mapped = mapped.to(self.weight.dtype)
        if self.eps is not None:
            mapped = F.layer_norm(mapped, mapped.shape[-1:], eps=self.eps)
        return torch.addmm(self.bias, mapped, self.weight).split(self.sizes, dim=-1)


def _problem(layer: FrozenLayer, bank: PromptBank) -> str | None:
    if (reason := norm_problem(layer.norm)) is not None:
        return f"its {reason}" if bank.config.needs_cross else None
    if layer.key_norm is not None and bank.config.use_dynamic:
        return "it norms its keys behind the projection, and a mixture of normed keys is not the normed key of a mixture"
    return None


def _project(rows: Tensor, layer: FrozenLayer) -> Tensor:
    return project(rows if layer.norm is None else layer.norm(rows), layer.k_proj, layer.v_proj)
