"""Routed prompts: one layer's (``MoPELayer``), or all layers' with stacked parameters (``PromptBank``)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._settings import checked
from .config import MoPEConfig
from .kinds import KINDS, PromptKind, in_place, mappers_of
from .norms import can_be_stacked
from .output import MoPEOutput
from .router import Keys, Router, make_routers, orthogonal_keys
from .tables import FrozenLayer, Prefix, Rows, Tables, can_be_projected_ahead, make_rows, mixes_in_kv_space


def check_input(name: str, x: Tensor, width: int, batch: int | None = None, ranks: tuple[int, ...] = (2,)) -> None:
    expected = " or ".join(f"({', '.join(('B', 'S')[: rank - 1])}, {width})" for rank in ranks)
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {expected}, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {x.dtype}: call .float() on it")
    if x.dim() not in ranks or x.shape[-1] != width:
        raise ValueError(f"{name} must be {expected}, got {tuple(x.shape)}")
    if x.dim() == 3 and x.shape[1] == 0:
        raise ValueError(f"{name} must hold at least one token, got {tuple(x.shape)}")
    if batch is not None and x.shape[0] != batch:
        raise ValueError(f"{name} has batch {x.shape[0]}, expected {batch}: tokens and complementary features of the same samples")


def global_feature(x: Tensor) -> Tensor:
    """The router's view of a layer's input: the class token of (B, S, D), or (B, D) as it is."""
    return x[:, 0] if x.dim() == 3 else x


class MoPELayer(nn.Module):
    """Prompts of one frozen transformer layer, to be put before its tokens (MoPE, arXiv 2403.10568, equations 2 to 4).

    Args:
        dim: D, the layer's width.
        cross_dim: width of the complementary feature psi_y.
        num_experts, prompt_length, **settings: of :class:`MoPEConfig`.

    State: ``static_prompt`` (L, D), ``experts`` (K, L, D), ``keys`` (K, d_i + d_c), ``inter_proj``, ``cross_proj``.

    Examples:
        >>> layer = MoPELayer(dim=768, cross_dim=512)
        >>> out = layer(tokens, cross)                          # tokens (B, S, 768), cross (B, 512)
        >>> tokens = frozen_layer(torch.cat([out.prompts, tokens], dim=1))[:, out.prompts.shape[1] :]
    """

    @checked
    def __init__(
        self,
        dim: int,
        cross_dim: int | None,
        num_experts: int = MoPEConfig.num_experts,
        prompt_length: int = MoPEConfig.prompt_length,
        **settings: Any,
    ):
        super().__init__()
        config = self.config = MoPEConfig(num_experts=num_experts, prompt_length=prompt_length, **settings)
        if dim < 1 or (config.use_dynamic and (cross_dim is None or cross_dim < 1)):
            raise ValueError(f"dim and cross_dim must be integers >= 1, got dim={dim!r} and cross_dim={cross_dim!r}")
        self.dim, self.cross_dim = dim, cross_dim
        bound = config.init_bound(dim)
        if config.use_static:
            self.static_prompt = nn.Parameter(torch.empty(prompt_length, dim).uniform_(-bound, bound))
        if config.use_dynamic:
            self.experts = nn.Parameter(config.draw_experts(num_experts, prompt_length, dim))
            self.inter_proj = nn.Linear(dim, config.inter_routing_dim)
            self.cross_proj = nn.Linear(cross_dim, config.cross_routing_dim)
            keys = orthogonal_keys(num_experts, config.inter_routing_dim + config.cross_routing_dim)
            self.keys = nn.Parameter(keys) if config.learn_keys else nn.Buffer(keys)

    def forward(self, x: Tensor, cross: Tensor | None = None, mapped: Tensor | None = None) -> MoPEOutput:
        """Route and give the prompts.

        Args:
            x: the layer's input (B, S, D) with the class token first, or a global feature (B, D).
            cross: (B, cross_dim), the complementary feature; may be None without dynamic prompts.
            mapped: (B, D), the mapped prompt, or None for none.
        """
        check_input("x", x, self.dim, ranks=(2, 3))
        config, batch, kinds, router = self.config, x.shape[0], {}, None
        if config.use_static:
            kinds["static"] = F.dropout(self.static_prompt, config.dropout, self.training)[None]
        if mapped is not None:
            check_input("mapped", mapped, self.dim, batch)
            kinds["mapped"] = F.dropout(mapped, config.dropout, self.training)[:, None]
        if config.use_dynamic:
            check_input("cross", cross, self.cross_dim, batch)
            keys = Keys.of(self.keys[None], self.inter_proj.bias[None], config.temperature)
            (router,) = make_routers(config, keys, [self.inter_proj.weight], cross, self.cross_proj, noisy=self.training)
        elif not kinds:
            raise ValueError("this MoPELayer has neither static nor dynamic prompts and got mapped=None: no prompt is left")
        experts = self.experts if config.use_dynamic else None
        return MoPEOutput(batch, x.dtype, config, kinds, router, experts, self.training, global_feature(x))

    def extra_repr(self) -> str:
        c = self.config
        return f"dim={self.dim}, cross_dim={self.cross_dim}, num_experts={c.num_experts}, prompt_length={c.prompt_length}"


@dataclass  # not frozen: torch 2.11 can't compile a call of a frozen one
class PromptContext:
    """One forward's prompts of all layers, as far as they don't depend on a layer's input; for :class:`PromptedEncoder`."""

    batch: int | None
    """Of the complementary features; None where no prompt depends on them."""
    stages: Sequence[MoPEOutput | Rows | Tables]
    """Of each layer what is computed already; its ``prefixes`` does the rest."""
    routes: bool
    """Whether prompts depend on the layers' inputs."""
    layers: Sequence[FrozenLayer] | None = None
    draws_random_numbers: bool = False
    """Whether a layer's prompts are random beyond what was drawn already."""
    mask: Tensor | None = None
    """(B, P), which prompts a sample has; None if all have all."""
    take_apart: Callable[[], Sequence[MoPEOutput]] | None = None
    """Makes :attr:`prompts`; None where ``stages`` are these."""
    trained: Callable[[], bool] | None = None
    """Tells whether anything of the prompts takes a gradient; None where nothing does. Asked only where one may be lost."""
    _prompts: Sequence[MoPEOutput] | None = None

    @property
    def prompts(self) -> Sequence[MoPEOutput]:
        """Of each layer, without its feature, norm and projections."""
        # not a cached_property: below Python 3.12 that has a lock, which breaks a compiled graph
        if self._prompts is None:
            self._prompts = self.stages if self.take_apart is None else self.take_apart()
        return self._prompts

    def __call__(
        self, index: int, hidden_states: Tensor, pool: Callable[[Tensor], Tensor]
    ) -> tuple[Sequence[Prefix], Tensor | None]:
        """For layer ``index`` with this input, up to two prefixes of its attention, and scores (B, K) or None."""
        # who doesn't route doesn't look
        return self.prefixes(index, pool(hidden_states) if self.routes else hidden_states)

    def prefixes(self, index: int, feature: Tensor) -> tuple[Sequence[Prefix], Tensor | None]:
        """Likewise for its pooled input (B, D)."""
        if self.batch is not None and feature.shape[0] != self.batch:
            raise ValueError(f"layer {index} has batch {feature.shape[0]}, complementary features have {self.batch}")
        prefixes, scores = self.stages[index].prefixes(self.layers[index], feature)
        if self.mask is not None:
            prefixes = [(*prefix, self.mask) for prefix in prefixes]
        return prefixes, scores


class _Stack(nn.Module):
    """Parameters of all n layers of one width."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = layers

    def add_experts(self, width: int, config: MoPEConfig) -> None:
        """Experts and the router's projection of the layers' own feature."""
        self.experts = nn.Parameter(config.draw_experts(self.layers, config.num_experts, config.prompt_length, width))
        # the start of nn.Linear: uniform in +-1 / sqrt(inputs)
        bound, d_i = width**-0.5, config.inter_routing_dim
        self.inter_weight = nn.Parameter(torch.empty(self.layers, d_i, width).uniform_(-bound, bound))
        self.inter_bias = nn.Parameter(torch.empty(self.layers, d_i).uniform_(-bound, bound))

    def draw(self, centre: Tensor, spread: Tensor, config: MoPEConfig) -> None:
        """Prompts anew, around rows (n, D)."""
        unit = 3**0.5 / config.init_bound(centre.shape[-1])  # to a standard deviation of 1
        if config.use_static:
            drawn = torch.empty(self.static_prompt.shape).uniform_(-(3**0.5), 3**0.5)
            self.static_prompt.copy_(centre[:, None] + spread[:, None] * drawn)
        if config.use_dynamic:
            drawn = unit * config.draw_experts(*self.experts.shape)
            self.experts.copy_(centre[:, None, None] + spread[:, None, None] * drawn)


class PromptBank(nn.Module):
    """Prompts of all layers of a frozen encoder, with parameters stacked by layer width.

    ``prepare`` does all that doesn't depend on a layer's input in one matrix product each: the complementary half of every
    layer's routing logits, and the mapped prompts.

    Args:
        dims: width of each layer, in order; N = len(dims).
        cross_dim: width of the complementary feature; None where no prompt depends on it.
        config: see :class:`MoPEConfig`.

    Examples:
        >>> bank = PromptBank([768] * 12, cross_dim=512, config=MoPEConfig())
        >>> context = bank.prepare(cross)                       # once per forward, cross (B, 512)
        >>> out = bank.layer(i, tokens, context)                # at layer i, tokens (B, S, 768)
        >>> prefixes = out.key_value(layer.norm1, layer.k_proj, layer.v_proj, num_heads=12)
    """

    @checked
    def __init__(self, dims: Iterable[int], cross_dim: int | None, config: MoPEConfig | None = None):
        super().__init__()
        self.dims = tuple(dims)
        self.cross_dim = cross_dim
        config = self.config = MoPEConfig() if config is None else config
        if not self.dims or not all(type(width) is int and width >= 1 for width in self.dims):
            raise ValueError(f"dims must list the width of at least one layer, integers >= 1; got {self.dims}")
        if config.needs_cross and (cross_dim is None or cross_dim < 1):
            raise ValueError(
                f"cross_dim is {cross_dim!r}, but dynamic and mapped prompts need the width of the complementary feature"
            )
        if config.side_dims is not None and sum(config.side_dims) != cross_dim:
            raise ValueError(
                f"MoPEConfig.side_dims {config.side_dims} add up to {sum(config.side_dims)}, but cross_dim is {cross_dim}"
            )
        widths = sorted(set(self.dims))
        self.stacks = nn.ModuleDict({str(width): _Stack(self.dims.count(width)) for width in widths})
        self.kinds: list[PromptKind] = [kind for kind in KINDS if kind.wanted(config)]
        # in the order of prompts, in which optimisers have saved what they know of each
        self._add_parameters(before=True)
        if config.use_dynamic:
            for width in widths:
                self.stacks[str(width)].add_experts(width, config)
            layers, routing_dim = len(self.dims), config.inter_routing_dim + config.cross_routing_dim
            self.cross_proj = nn.Linear(cross_dim, layers * config.cross_routing_dim)
            keys = torch.stack([orthogonal_keys(config.num_experts, routing_dim) for _ in self.dims])
            self.keys = nn.Parameter(keys) if config.learn_keys else nn.Buffer(keys)
        self._add_parameters(before=False)

    def _add_parameters(self, *, before: bool) -> None:
        for kind in self.kinds:
            if kind.before is before:
                kind.add_parameters(self)

    @torch.no_grad()
    def start_at(self, centres: Sequence[Tensor], spreads: Sequence[Tensor]) -> None:
        """Draw each layer's static prompts and experts around a row (D,) with standard deviations (D,).

        A mapped prompt becomes the mean of its layers' centres, for every sample.
        """
        for width, stack in self.stacks.items():
            members = [index for index, dim in enumerate(self.dims) if dim == int(width)]
            centre, spread = (torch.stack([rows[index] for index in members]) for rows in (centres, spreads))
            stack.draw(centre, spread, self.config)
            if self.config.use_mapped:
                for mapper in mappers_of(self):
                    nn.init.zeros_(mapper.up[width].weight)
                    mapper.up[width].bias.copy_(centre.mean(0))

    @property
    def routes(self) -> bool:
        """Whether prompts depend on the layers' inputs."""
        return self.config.use_dynamic

    def prepare(
        self,
        cross: Tensor | None = None,
        layers: Sequence[FrozenLayer] | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        ahead: bool = True,
    ) -> PromptContext:
        """Everything that doesn't depend on a layer's input, once per forward.

        Args:
            cross: (B, cross_dim).
            layers: the frozen layers that prompts are for: norms, statistics and, where it is allowed, projections are then applied
                to all layers' prompts ahead, and the context gives prefixes.
            dtype: of these layers' input.
            ahead: project ahead where it is allowed (see :func:`can_be_projected_ahead`).
        """
        config = self.config
        if config.needs_cross:
            check_input("cross", cross, self.cross_dim)
        batch = cross.shape[0] if config.needs_cross else None
        kinds = {kind.name: kind.rows(self, cross) for kind in self.kinds}
        routers = self._routers(cross) if config.use_dynamic else [None] * len(self.dims)
        random = self.training and config.dynamic_dropout > 0
        trained = functools.partial(self._is_trained, cross)
        take_apart = functools.partial(self._outputs, batch, kinds, routers, dtype)
        if layers is None:
            outputs = take_apart()
            return PromptContext(batch, outputs, self.routes, None, random, trained=trained)
        members = {width: [index for index, dim in enumerate(self.dims) if dim == int(width)] for width in self.stacks}
        stacked = [width for width, own in members.items() if can_be_stacked([layers[index].norm for index in own])]
        stages: list[Any] = [None] * len(self.dims) if len(stacked) == len(self.stacks) else take_apart()
        for width in stacked:
            own = members[width]
            of_width = {name: rows[width] for name, rows in kinds.items()}
            ready = self._ahead(width, batch, of_width, [routers[i] for i in own], [layers[i] for i in own], dtype, project=ahead)
            for index, stage in zip(own, ready, strict=True):
                stages[index] = stage
        return PromptContext(batch, stages, self.routes, layers, random, take_apart=take_apart, trained=trained)

    def _is_trained(self, cross: Tensor | None) -> bool:
        given = () if cross is None else (cross,)
        return any(tensor.requires_grad for tensor in (*given, *self.parameters()))

    def layer(self, index: int, x: Tensor, context: PromptContext) -> MoPEOutput:
        """Layer ``index``'s prompts for its input x: (B, S, D) with the class token first, or a global feature (B, D)."""
        check_input("x", x, self.dims[index], context.batch, ranks=(2, 3))
        return dataclasses.replace(context.prompts[index], batch=x.shape[0], dtype=x.dtype, feature=global_feature(x))

    def _outputs(
        self, batch: int | None, kinds: Mapping[str, Mapping[str, Tensor]], routers: Sequence[Router | None], dtype: torch.dtype
    ) -> list[MoPEOutput]:
        """Each layer's prompts. Stacks are taken apart once, so that their gradients are put together once."""
        each_kind = {
            name: self._in_order(
                {
                    width: rows.unbind() if len(rows) > 1 else [rows[0]] * self.stacks[width].layers
                    for width, rows in by_width.items()
                }
            )
            for name, by_width in kinds.items()
        }
        experts = [None] * len(self.dims)
        if self.config.use_dynamic:
            experts = self._in_order({width: stack.experts for width, stack in self.stacks.items()})
        return [
            MoPEOutput(
                batch, dtype, self.config, {name: rows[index] for name, rows in each_kind.items()},
                routers[index], experts[index], self.training,
            )
            for index in range(len(self.dims))
        ]  # fmt: skip

    def _ahead(
        self,
        width: str,
        batch: int | None,
        kinds: Mapping[str, Tensor],
        routers: Sequence[Router | None],
        layers: Sequence[FrozenLayer],
        dtype: torch.dtype,
        *,
        project: bool,
    ) -> Sequence[Rows | Tables]:
        """For all layers of one width what can be done before they run."""
        config, routes = self.config, self.config.use_dynamic
        in_kv_space = routes and all(mixes_in_kv_space(config, batch, self.training, layer) for layer in layers)
        rows = make_rows(
            in_place(kinds), self.stacks[width].experts if routes else None, routers if routes else [],
            [layer.norm for layer in layers], config, dtype, in_kv_space=in_kv_space,
            dropout=config.dynamic_dropout if self.training else 0.0,
        )  # fmt: skip
        if project and rows.experts is None and can_be_projected_ahead(layers, rows.values.device):
            return rows.tables(layers)
        return rows.each()

    def _in_order(self, by_width: Mapping[str, Sequence]) -> list:
        """What is given for the layers of each width, in the order of layers."""
        # iterating over a tensor takes it apart once
        parts = {width: iter(sequence) for width, sequence in by_width.items()}
        return [next(parts[str(width)]) for width in self.dims]

    def router_keys(self) -> Keys:
        """Routing embeddings of all layers, and the bias of the projections of their own features."""
        biases = [stack.inter_bias for stack in self.stacks.values()]
        if len(biases) > 1:
            biases = [torch.stack(self._in_order({width: stack.inter_bias for width, stack in self.stacks.items()}))]
        return Keys.of(self.keys, biases[0], self.config.temperature)

    def _routers(self, cross: Tensor) -> list[Router]:
        weights = self._in_order({width: stack.inter_weight for width, stack in self.stacks.items()})
        return make_routers(self.config, self.router_keys(), weights, cross, self.cross_proj, noisy=self.training)

    def extra_repr(self) -> str:
        c = self.config
        return f"layers={len(self.dims)}, cross_dim={self.cross_dim}, num_experts={c.num_experts}, prompt_length={c.prompt_length}"
