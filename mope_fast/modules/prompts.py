"""Routed prompts: one layer's (``MoPELayer``), or all layers' with stacked parameters (``PromptBank``)."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import without_autocast
from .._settings import checked
from .config import MoPEConfig
from .mapper import PromptMapper
from .output import MoPEOutput, Routing, expert_gram
from .router import global_feature, linear_fp32, orthogonal_keys, routing_noise
from .rows import FrozenLayer, Prefix, Rows, can_be_stacked, mixes_in_kv_space, stacked_rows


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


class MoPELayer(nn.Module):
    """Prompts of one frozen transformer layer, to be put before its tokens (MoPE, arXiv 2403.10568, equations 2 to 4).

    Args:
        dim: D, the layer's width.
        cross_dim: width of the complementary feature psi_y.
        num_experts, prompt_length, cross_routing_dim, inter_routing_dim, temperature, noise_std, top_k, learn_keys, dropout,
            dynamic_dropout, use_static, use_dynamic: see :class:`MoPEConfig`.
        **settings: any other setting of :class:`MoPEConfig`.

    State: ``static_prompt`` (L, D), ``experts`` (K, L, D), ``keys`` (K, d_i + d_c), ``inter_proj``, ``cross_proj``.

    Example:
        >>> layer = MoPELayer(dim=768, cross_dim=512)
        >>> out = layer(tokens, cross)                          # tokens (B, S, 768), cross (B, 512)
        >>> tokens = frozen_layer(torch.cat([out.prompts, tokens], dim=1))[:, out.prompts.shape[1] :]
    """

    @checked
    def __init__(
        self,
        dim: int,
        cross_dim: int | None,
        num_experts: int = 16,
        prompt_length: int = 6,
        *,
        cross_routing_dim: int = 8,
        inter_routing_dim: int = 2,
        temperature: float = 0.1,
        noise_std: float = 1 / 256,
        top_k: int | None = None,
        learn_keys: bool = False,
        dropout: float = 0.1,
        dynamic_dropout: float = 0.0,
        use_static: bool = True,
        use_dynamic: bool = True,
        **settings,
    ):
        super().__init__()
        config = self.config = MoPEConfig(
            num_experts=num_experts, prompt_length=prompt_length, cross_routing_dim=cross_routing_dim,
            inter_routing_dim=inter_routing_dim, temperature=temperature, noise_std=noise_std, top_k=top_k, learn_keys=learn_keys,
            dropout=dropout, dynamic_dropout=dynamic_dropout, use_static=use_static, use_dynamic=use_dynamic, **settings,
        )  # fmt: skip
        if dim < 1 or (use_dynamic and (cross_dim is None or cross_dim < 1)):
            raise ValueError(f"dim and cross_dim must be integers >= 1, got dim={dim!r} and cross_dim={cross_dim!r}")
        self.dim, self.cross_dim = dim, cross_dim
        bound = config.init_bound(dim)
        if use_static:
            self.static_prompt = nn.Parameter(torch.empty(prompt_length, dim).uniform_(-bound, bound))
        if use_dynamic:
            self.experts = nn.Parameter(config.draw_experts(num_experts, prompt_length, dim))
            self.inter_proj = nn.Linear(dim, inter_routing_dim)
            self.cross_proj = nn.Linear(cross_dim, cross_routing_dim)
            keys = orthogonal_keys(num_experts, inter_routing_dim + cross_routing_dim)
            self.keys = nn.Parameter(keys) if learn_keys else nn.Buffer(keys)

    def forward(self, x: Tensor, cross: Tensor | None = None, mapped: Tensor | None = None) -> MoPEOutput:
        """Route and give the prompts.

        Args:
            x: the layer's input (B, S, D) with the class token first, or a global feature (B, D).
            cross: (B, cross_dim), the complementary feature; may be None without dynamic prompts.
            mapped: (B, D), the mapped prompt, or None for none.
        """
        check_input("x", x, self.dim, ranks=(2, 3))
        config, batch = self.config, x.shape[0]
        if mapped is not None:
            check_input("mapped", mapped, self.dim, batch)
            mapped = F.dropout(mapped, config.dropout, self.training)
        routing = None
        if config.use_dynamic:
            check_input("cross", cross, self.cross_dim, batch)
            inter = linear_fp32(global_feature(x), self.inter_proj.weight, self.inter_proj.bias)
            query = torch.cat([inter, linear_fp32(cross, self.cross_proj.weight, self.cross_proj.bias)], dim=-1)
            logits = linear_fp32(query, self.keys)
            noise = routing_noise(logits, config.noise_std) if self.training else None
            routing = Routing(logits, noise, self.experts, lambda: expert_gram(self.experts), self.training)
        elif not config.use_static and mapped is None:
            raise ValueError("this MoPELayer has neither static nor dynamic prompts and got mapped=None: no prompt is left")
        static = F.dropout(self.static_prompt, config.dropout, self.training) if config.use_static else None
        return MoPEOutput(batch, x.dtype, config, static, mapped, routing)

    def extra_repr(self) -> str:
        c = self.config
        return f"dim={self.dim}, cross_dim={self.cross_dim}, num_experts={c.num_experts}, prompt_length={c.prompt_length}"


class LayerRouter(NamedTuple):
    """One layer's share of the stacked router, its complementary half computed."""

    cross_logits: Tensor  # (B, K)
    noise: Tensor | None  # (B, K)
    inter_weight: Tensor  # (d_i, D)
    inter_bias: Tensor  # (d_i,)
    inter_keys: Tensor  # (d_i, K)
    experts: Tensor  # (K, L, D)
    gram: Callable[[], Tensor]  # () -> (L, K, K)


@dataclass
class PromptContext:
    """What :meth:`PromptBank.prepare` computes once per forward.

    One entry for each layer: stacked parameters are taken apart once, so that their gradients are put together once.
    """

    batch: int | None
    static: list[Tensor | None]  # (L, D), after dropout
    mapped: list[Tensor | None]  # (B, D), after dropout
    routers: list[LayerRouter | None]
    rows: list[Rows | None]  # for key_value, where the frozen layers were given

    def compute_shared(self) -> None:
        """Do now what the first layer that needs it would do for all: a layer that is run again must find the same."""
        for router in self.routers:
            if router is not None:
                router.gram()


class _Stack(nn.Module):
    """Parameters of all n layers of one width."""

    def __init__(self, layers: int, width: int, config: MoPEConfig):
        super().__init__()
        bound = config.init_bound(width)
        if config.use_static:
            self.static_prompt = nn.Parameter(torch.empty(layers, config.prompt_length, width).uniform_(-bound, bound))
        if config.use_dynamic:
            self.experts = nn.Parameter(config.draw_experts(layers, config.num_experts, config.prompt_length, width))
            # the start of nn.Linear: uniform in +-1 / sqrt(inputs)
            self.inter_weight = nn.Parameter(
                torch.empty(layers, config.inter_routing_dim, width).uniform_(-(width**-0.5), width**-0.5)
            )
            self.inter_bias = nn.Parameter(torch.empty(layers, config.inter_routing_dim).uniform_(-(width**-0.5), width**-0.5))

    def draw(self, centre: Tensor, spread: Tensor, config: MoPEConfig) -> None:
        """Prompts anew, around rows (n, D)."""
        unit = 3**0.5 / config.init_bound(centre.shape[-1])  # to a standard deviation of 1
        if config.use_static:
            drawn = torch.empty(self.static_prompt.shape).uniform_(-(3**0.5), 3**0.5)
            self.static_prompt.copy_(centre[:, None] + spread[:, None] * drawn)
        if config.use_dynamic:
            drawn = unit * config.draw_experts(*self.experts.shape)
            self.experts.copy_(centre[:, None, None] + spread[:, None, None] * drawn)


def _grams(stack: _Stack) -> list[Callable[[], Tensor]]:
    """For each layer a function that gives its Gram matrices; the first call computes all layers'."""
    computed: list[Tensor] = []

    def gram(position: int) -> Tensor:
        if not computed:
            computed.extend(expert_gram(stack.experts).unbind())
        return computed[position]

    return [partial(gram, position) for position in range(len(stack.experts))]


class PromptBank(nn.Module):
    """Prompts of all layers of a frozen encoder, with parameters stacked by layer width.

    ``prepare`` does all that doesn't depend on a layer's input in one matrix product each: the complementary half of every
    layer's routing logits, and the mapped prompts.

    Args:
        dims: width of each layer, in order; N = len(dims).
        cross_dim: width of the complementary feature; None where no prompt depends on it.
        config: see :class:`MoPEConfig`.

    Example:
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
        self.stacks = nn.ModuleDict({str(width): _Stack(self.dims.count(width), width, config) for width in sorted(set(self.dims))})
        if config.use_dynamic:
            layers, routing_dim = len(self.dims), config.inter_routing_dim + config.cross_routing_dim
            self.cross_proj = nn.Linear(cross_dim, layers * config.cross_routing_dim)
            keys = torch.stack([orthogonal_keys(config.num_experts, routing_dim) for _ in self.dims])
            self.keys = nn.Parameter(keys) if config.learn_keys else nn.Buffer(keys)
        if config.use_mapped:
            self.mapper = PromptMapper(cross_dim, self.dims, config.mapper_norm)

    @torch.no_grad()
    def start_at(self, centres: Sequence[Tensor], spreads: Sequence[Tensor]) -> None:
        """Draw each layer's static prompts and experts around a row (D,) with standard deviations (D,).

        The mapped prompt becomes the mean of its layers' centres, for every sample.
        """
        for width, stack in self.stacks.items():
            members = [index for index, dim in enumerate(self.dims) if dim == int(width)]
            centre, spread = (torch.stack([rows[index] for index in members]) for rows in (centres, spreads))
            stack.draw(centre, spread, self.config)
            if self.config.use_mapped:
                up = self.mapper.up[width]
                nn.init.zeros_(up.weight)
                up.bias.copy_(centre.mean(0))

    @property
    def routes(self) -> bool:
        """Whether prompts depend on the layers' inputs."""
        return self.config.use_dynamic

    @property
    def draws_random_numbers(self) -> bool:
        """Whether a layer's prompts are random beyond what :meth:`prepare` has drawn."""
        return self.training and self.config.dynamic_dropout > 0

    def prepare(
        self, cross: Tensor | None = None, layers: Sequence[FrozenLayer] | None = None, dtype: torch.dtype = torch.float32
    ) -> PromptContext:
        """Everything that doesn't depend on a layer's input, once per forward.

        Args:
            cross: (B, cross_dim).
            layers: the frozen layers whose projections ``key_value`` will be called with: their norms are then applied to
                the prompts of all layers together.
            dtype: of these layers' input.
        """
        config = self.config
        static = mapped = routers = rows = [None] * len(self.dims)
        stacked = {}
        if config.use_static:
            for width, stack in self.stacks.items():
                stacked[width] = F.dropout(stack.static_prompt, config.dropout, self.training)
            static = self._in_order({width: prompts.unbind() for width, prompts in stacked.items()})
        if config.needs_cross:
            check_input("cross", cross, self.cross_dim)
        if config.use_dynamic:
            routers = self._routers(cross)
        if config.use_mapped:
            each = {width: F.dropout(row, config.dropout, self.training) for width, row in self.mapper(cross).items()}
            mapped = [each[width] for width in self.dims]
        batch = cross.shape[0] if config.needs_cross else None
        if layers is not None:
            rows = self._rows(batch, stacked, mapped, layers, dtype)
        return PromptContext(batch, static, mapped, routers, rows)

    def layer(self, index: int, x: Tensor, context: PromptContext) -> MoPEOutput:
        """Layer ``index``'s prompts for its input x: (B, S, D) with the class token first, or a global feature (B, D)."""
        check_input("x", x, self.dims[index], context.batch, ranks=(2, 3))
        routing, router = None, context.routers[index]
        if router is not None:
            inter = linear_fp32(global_feature(x), router.inter_weight, router.inter_bias)
            with without_autocast(x.device.type):
                logits = torch.addmm(router.cross_logits, inter, router.inter_keys)
            routing = Routing(logits, router.noise, router.experts, router.gram, self.training)
        return MoPEOutput(
            x.shape[0], x.dtype, self.config, context.static[index], context.mapped[index], routing, context.rows[index]
        )

    def prefixes(
        self, index: int, layer: FrozenLayer, feature: Tensor, context: PromptContext
    ) -> tuple[list[Prefix], Tensor | None]:
        """Layer ``index``'s prompts as prefixes of its attention, and its routing scores; feature is its pooled input (B, D)."""
        out = self.layer(index, feature, context)
        prefixes = out.key_value(layer.norm, layer.k_proj, layer.v_proj, layer.num_heads, key_norm=layer.key_norm)
        return prefixes, out.scores

    def _rows(
        self,
        batch: int | None,
        static: dict[str, Tensor],
        mapped: list[Tensor | None],
        layers: Sequence[FrozenLayer],
        dtype: torch.dtype,
    ) -> list[Rows | None]:
        """For each layer the input-free part of its ``key_value``; None where it can't be computed with the others'."""
        rows: list[Rows | None] = [None] * len(self.dims)
        for width, stack in self.stacks.items():
            members = [index for index, dim in enumerate(self.dims) if dim == int(width)]
            own = [layers[index] for index in members]
            if not can_be_stacked(own):
                continue
            in_kv_space = self.config.use_dynamic and all(
                mixes_in_kv_space(self.config, batch, self.training, layer.norm, layer.key_norm) for layer in own
            )
            experts, norms = stack.experts if in_kv_space else None, [layer.norm for layer in own]
            stacked = stacked_rows(static.get(width), mapped[members[0]], experts, norms, self.config, dtype)
            for index, one in zip(members, stacked, strict=True):
                rows[index] = one
        return rows

    def split_keys(self) -> tuple[Tensor, Tensor]:
        """The routing keys' parts for the layer's own and for the complementary feature: (N, K, d_i) and (N, K, d_c)."""
        config, dtype = self.config, torch.promote_types(self.cross_proj.weight.dtype, torch.float32)
        return self.keys.to(dtype).split([config.inter_routing_dim, config.cross_routing_dim], dim=-1)

    def _in_order(self, by_width: dict[str, Sequence]) -> list:
        """What is given for the layers of each width, in the order of layers."""
        parts = {width: iter(sequence) for width, sequence in by_width.items()}
        return [next(parts[str(width)]) for width in self.dims]

    def _per_layer(self, take: Callable[[_Stack], Sequence]) -> list:
        return self._in_order({width: take(stack) for width, stack in self.stacks.items()})

    def _routers(self, cross: Tensor) -> list[LayerRouter]:
        config, layers = self.config, len(self.dims)
        query = linear_fp32(cross, self.cross_proj.weight, self.cross_proj.bias)
        query = query.unflatten(-1, (layers, config.cross_routing_dim)).transpose(0, 1)
        inter_keys, cross_keys = self.split_keys()
        with without_autocast(cross.device.type):
            cross_logits = query @ cross_keys.mT
        noise = routing_noise(cross_logits, config.noise_std) if self.training else None
        columns = (
            cross_logits.unbind(),
            [None] * layers if noise is None else noise.unbind(),
            self._per_layer(lambda stack: stack.inter_weight.unbind()),
            self._per_layer(lambda stack: stack.inter_bias.unbind()),
            inter_keys.mT.unbind(),
            self._per_layer(lambda stack: stack.experts.unbind()),
            self._per_layer(_grams),
        )
        return [LayerRouter(*parts) for parts in zip(*columns, strict=True)]

    def extra_repr(self) -> str:
        c = self.config
        return f"layers={len(self.dims)}, cross_dim={self.cross_dim}, num_experts={c.num_experts}, prompt_length={c.prompt_length}"
