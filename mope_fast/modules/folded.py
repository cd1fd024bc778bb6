"""A bank folded into the frozen layers it is for: their tables, computed once and kept."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import cast, without_autocast
from .._dispatch import layer_prompts
from .kinds import in_place
from .norms import Norms, can_be_stacked, norm_problem
from .prompts import PromptBank, PromptContext, check_input
from .router import Keys, Router, make_routers
from .tables import FrozenLayer, Tables, project, side_by_side


class KeptTables(nn.Module):
    """One layer's :class:`Tables` as buffers, as far as they are the same for all samples."""

    before: Tensor | None
    after: Tensor | None
    router_weight: Tensor | None
    router_keys: Tensor | None
    experts: Tensor | None
    gram: Tensor | None
    shift: Tensor | None

    def __init__(self, tables: Tables):
        super().__init__()
        self.eps, router = tables.eps, tables.router
        named = {
            "before": tables.before, "after": tables.after, "experts": tables.experts, "gram": tables.gram, "shift": tables.shift,
            "router_weight": None if router is None else router.weight, "router_keys": None if router is None else router.keys,
        }  # fmt: skip
        for name, table in named.items():
            # torch.export writes whole storages
            self.register_buffer(name, None if table is None else table.clone(memory_format=torch.contiguous_format))

    def tables(
        self,
        router: Router | None,
        before: Tensor | None,
        after: Tensor | None,
        mix: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> Tables:
        """With each sample's router, the prompts (B, P, W) that are its own, and the implementation that mixes."""
        before, after = _beside(self.before, before), _beside(self.after, after)
        return Tables(before, after, router, self.experts, self.gram, self.shift, self.eps, mix)


def _beside(kept: Tensor | None, own: Tensor | None) -> Tensor | None:
    if kept is None or own is None:
        return own if kept is None else kept
    return torch.cat([kept.expand(own.shape[0], -1, -1), cast(own, kept.dtype)], dim=1)


class FoldedBank(nn.Module):
    """A :class:`PromptBank` for inference: the tables of prompts and experts are at hand, and mapped prompts' directions.

    It takes no gradient and does not follow the bank or the frozen layers when these change later. For each layer it keeps
    K * L rows of width 2 * H * Dh (dynamic prompts) and a matrix (2 * H * Dh, D) (mapped prompts).

    Args:
        bank: left as it is.
        layers: the frozen layers' facts, in order.
        dtype: of keys and values, the frozen encoder's.

    Raises:
        ValueError: folding is not exact: a layer norms mixed keys behind the projection, or its norm is neither a layer norm nor an
            RMS norm.
    """

    @torch.no_grad()
    def __init__(self, bank: PromptBank, layers: Sequence[FrozenLayer], dtype: torch.dtype):
        super().__init__()
        for index, layer in enumerate(layers):
            if (problem := _problem(layer, bank)) is not None:
                raise ValueError(f"layer {index} can't be folded: {problem}; use the model as it is")
        bank = copy.deepcopy(bank).eval()
        self.config, self.dims, self.cross_dim = bank.config, bank.dims, bank.cross_dim
        self.norms_keys = any(layer.key_norm is not None for layer in layers)
        device = next(bank.parameters()).device
        # two samples, to tell which prompts are a sample's own
        nothing = None if bank.cross_dim is None else torch.zeros(2, bank.cross_dim, device=device)
        shared = {kind.name for kind in bank.kinds for rows in kind.rows(bank, nothing).values() if rows.shape[1] == 1}
        self.kinds = [kind for kind in bank.kinds if kind.name not in shared]
        self.kind_names = {kind.name for kind in bank.kinds}
        for kind in self.kinds:
            if any(rows.shape[0] != 1 for rows in kind.rows(bank, nothing).values()):
                raise ValueError(f"{kind.name} prompts can't be folded: they differ between layers and between samples")
        with without_autocast(device.type):
            self.tables = nn.ModuleList()
            for output, layer in zip(bank.prepare(nothing, dtype=dtype).stages, layers, strict=True):
                output = dataclasses.replace(output, kinds={name: rows for name, rows in output.kinds.items() if name in shared})
                has_any = output.kinds or output.router is not None
                self.tables.append(KeptTables(output.rows(layer, in_kv_space=True).tables([layer])[0] if has_any else Tables()))
            if self.config.use_dynamic:
                keys = bank.router_keys()
                self.router_cross = nn.Buffer(keys.cross.clone(memory_format=torch.contiguous_format))
                self.router_shift = nn.Buffer(keys.shift)
            # the router's projection, and what kinds of prompts have added
            for name, part in (*bank.named_children(), *bank.named_parameters(recurse=False)):
                if name not in ("stacks", "keys"):
                    setattr(self, name, part)
            if self.kinds:
                self.directions = nn.ModuleDict()
                for width in bank.stacks:
                    members = [layer for layer, dim in zip(layers, self.dims, strict=True) if dim == int(width)]
                    norms = [layer.norm for layer in members if layer.norm is not None]
                    if norms and not can_be_stacked(norms):
                        raise ValueError(f"layers of width {width} can't be folded: their norms differ; use the model as it is")
                    self.directions[width] = _Directions(members, int(width), dtype, device)
        self.requires_grad_(False).eval()

    @property
    def routes(self) -> bool:
        """Whether prompts depend on the layers' inputs."""
        return self.config.use_dynamic

    def prepare(
        self,
        cross: Tensor | None,
        layers: Sequence[FrozenLayer],
        dtype: torch.dtype = torch.float32,
        *,
        ahead: bool = True,
    ) -> PromptContext:
        """As :meth:`PromptBank.prepare`; ``dtype`` and ``ahead`` were decided when it was folded."""
        config = self.config
        if config.needs_cross:
            check_input("cross", cross, self.cross_dim)
        routers = [None] * len(self.dims)
        if config.use_dynamic:
            routers = make_routers(config, self._keys(), [table.router_weight for table in self.tables], cross, self.cross_proj)
        own = self.project({kind.name: kind.rows(self, cross) for kind in self.kinds})
        parts = zip(self.tables, routers, own, strict=True)
        mix = layer_prompts(self.tables[0].experts, routers[0].cross) if config.use_dynamic else None
        stages = [kept.tables(router, rows.get("before"), rows.get("after"), mix) for kept, router, rows in parts]
        return PromptContext(cross.shape[0] if config.needs_cross else None, stages, self.routes, layers)

    def _keys(self) -> Keys:
        return Keys([table.router_keys for table in self.tables], self.router_cross, self.router_shift)

    def cross_logits(self, cross: Tensor) -> Tensor:
        """The complementary feature's part of the routers' logits, over the temperature, (N, B, K)."""
        check_input("cross", cross, self.cross_dim)
        return self._keys().logits(cross, self.cross_proj.weight, self.cross_proj.bias)

    def project(self, kinds: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Each layer's keys and values (B, P, 2 * H * Dh), by place, of prompts that are a sample's own, (1, B, P, D) by width."""
        parts: list[dict[str, Tensor]] = [{} for _ in self.dims]
        for width in self.directions if kinds else ():
            members = [own for own, dim in zip(parts, self.dims, strict=True) if dim == int(width)]
            for place, rows in in_place({name: rows[width] for name, rows in kinds.items()}).items():
                both = self.directions[width](rows[0].flatten(0, 1))
                for own, projected in zip(members, both, strict=True):
                    own[place] = projected.unflatten(0, rows.shape[1:3])
        return parts

    def train(self, mode: bool = True) -> "FoldedBank":
        """Stays in eval mode."""
        return super().train(False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes what earlier versions have saved: products of the router's factors, not divided by the temperature."""
        temperature = self.config.temperature
        old = f"{prefix}cross_keys" in state_dict
        for name, new in (("cross_keys", "router_cross"), ("logit_shift", "router_shift")):
            if (table := state_dict.pop(f"{prefix}{name}", None)) is not None:
                state_dict[f"{prefix}{new}"] = table / temperature
        for index in range(len(self.tables)):
            own = f"{prefix}tables.{index}."
            if (table := state_dict.pop(f"{own}logit_map", None)) is not None:
                weight, keys = _factors(table, self.config.inter_routing_dim)
                state_dict |= {f"{own}router_weight": weight, f"{own}router_keys": keys / temperature}
            if (static := state_dict.pop(f"{own}static", None)) is not None:
                if self.norms_keys:
                    raise ValueError("this state of a folded model is of an earlier version, which kept keys normed: fold it again")
                state_dict[f"{own}before"] = static
            if (gram := state_dict.get(f"{own}gram")) is not None and old:
                state_dict[f"{own}gram"] = gram.transpose(0, 1)
            if (shift := state_dict.get(f"{own}shift")) is not None and shift.dim() == 2:
                state_dict[f"{own}shift"] = shift[0]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _factors(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(D, K) of this rank -> (rank, D) and (rank, K)."""
    left, sizes, right = torch.linalg.svd(product.double(), full_matrices=False)
    weight, keys = (left * sizes).T[:rank], right[:rank]
    missing = (0, 0, 0, rank - len(weight))
    return F.pad(weight, missing).to(product.dtype), F.pad(keys, missing).to(product.dtype)


_LIFT = 256.0
"""A unit vector's projection is this much larger than the weight, and far above the bias: a power of two, divided out again."""


class _Directions(nn.Module):
    """Keys and values in all layers of one width, as one matrix product, of prompts that the layers share."""

    def __init__(self, layers: Sequence[FrozenLayer], width: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.norms: Norms | None = None
        self.plain = [index for index, layer in enumerate(layers) if layer.norm is None]
        if (norm := next((layer.norm for layer in layers if layer.norm is not None), None)) is not None:
            # behind its statistics a norm is x * weight + bias
            self.norms = dataclasses.replace(Norms.of([norm], dtype), weight=1.0, bias=0.0)
        zero = torch.zeros(1, width, dtype=dtype, device=device)
        units = _LIFT * torch.eye(width, dtype=dtype, device=device)
        weights, biases, self.sizes = [], [], []
        for layer in layers:
            own = None if layer.norm is None else Norms.of([layer.norm], dtype)
            scaled, bias = (units, zero) if own is None else (units * own.weight, zero + own.bias)
            rows = (scaled.view(width, width), zero, bias.view(1, width))
            scaled, at_zero, bias = (side_by_side([project(part, layer)])[0] for part in rows)
            weights.append((scaled - at_zero) / _LIFT)
            biases.append(bias[0])
            self.sizes.append(len(bias[0]))
        # (D, all outputs): with few rows a CPU reads it this way in little more than half the time of nn.Linear's layout
        self.weight, self.bias = nn.Buffer(torch.cat(weights, dim=1)), nn.Buffer(torch.cat(biases))

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        """(R, D) -> for each layer (R, 2 * H * Dh)."""
        rows = rows.to(self.weight.dtype)
        if self.norms is None:
            return torch.addmm(self.bias, rows, self.weight).split(self.sizes, dim=-1)
        normed = self.norms(rows).to(self.weight.dtype)
        outputs = list(torch.addmm(self.bias, normed, self.weight).split(self.sizes, dim=-1))
        if self.plain:  # as ModernBERT's first layer, whose embeddings are normed already
            weights, biases = self.weight.split(self.sizes, dim=-1), self.bias.split(self.sizes)
            for index in self.plain:
                outputs[index] = torch.addmm(biases[index], rows, weights[index])
        return tuple(outputs)


def _problem(layer: FrozenLayer, bank: PromptBank) -> str | None:
    if (reason := norm_problem(layer.norm)) is not None:
        return f"its {reason}" if bank.config.needs_cross else None
    if layer.key_norm is not None and bank.config.use_dynamic:
        return "it norms its keys behind the projection, and a mixture of normed keys is not the normed key of a mixture"
    return None
