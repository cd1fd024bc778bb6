"""What goes through frozen key and value projections before anything of a layer's input is known: for many layers at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import without_autocast
from .config import MoPEConfig

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


@dataclass(frozen=True)
class Rows:
    """One layer's rows, normed: static, mapped, and in K/V space experts, zero and the norm's bias (zero and bias if needed)."""

    values: Tensor  # (R, D)
    sizes: dict[str, int]
    in_kv_space: bool
    scales: Tensor | None = None  # (K * L, 1): what the projected experts are to be multiplied by; None for one


_LAYER_NORMS = ("torch.nn.modules.normalization.LayerNorm.forward", "timm.layers.norm.LayerNorm.forward")


def is_plain(module: nn.Module) -> bool:
    """Whether a call of it is a call of its class's forward and nothing else: no hooks, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether it computes what ``nn.LayerNorm`` does: that class, timm's of the same name, or one that inherits their forward."""
    forward = getattr(type(norm), "forward", None)
    name = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    # timm's fast norms round differently
    return name in _LAYER_NORMS and not getattr(norm, "_fast_norm", False) and is_plain(norm)


def norm_problem(norm: nn.Module | None) -> str | None:
    """Why mixing behind this norm is not exact, about "norm", or None."""
    if norm is None or is_layer_norm(norm):
        return None
    return f"norm is {type(norm).__name__}, not nn.LayerNorm, or it has hooks"


def mixes_in_kv_space(config: MoPEConfig, batch: int, training: bool, norm: nn.Module | None, key_norm: Projection | None) -> bool:
    """Whether a layer's experts are projected and then mixed.

    Raises:
        ValueError: ``config.mixing`` asks for it, and it would not be exact.
    """
    problem = None
    if (reason := norm_problem(norm)) is not None:
        problem = f"the layer's {reason}"
    elif key_norm is not None:
        problem = "the layer norms its keys behind the projection"
    elif config.dynamic_dropout > 0 and training:
        problem = "dynamic_dropout is on"
    if config.mixing == "kv" and problem is not None:
        raise ValueError(f"MoPEConfig.mixing='kv' is not exact here: {problem}; use mixing='auto' or 'prompt'")
    return problem is None and (config.mixing == "kv" or (config.mixing == "auto" and config.num_experts < batch))


def can_be_stacked(layers: Sequence[FrozenLayer]) -> bool:
    """Whether these layers' norms can be applied together: all the same layer norm but for weight and bias, or none at all.

    A sharded weight (DTensor) is whole only while its own layer runs.
    """
    norms = [layer.norm for layer in layers]
    if any(norm is None for norm in norms):
        return all(norm is None for norm in norms)
    plain = all(is_layer_norm(norm) and type(norm.weight) in (nn.Parameter, Tensor, type(None)) for norm in norms)
    return plain and len({(norm.eps, norm.weight is None, norm.bias is None) for norm in norms}) == 1


_LIFT = 16.0
"""Experts go through a projection about this much larger than a layer norm makes them.

What is left of a projection's value less its value at zero has the rounding of both. With experts no larger than the bias, and a
mixture that is smaller by the root of K, bfloat16 would have few digits left.
"""


def stacked_rows(
    static: Tensor | None,
    mapped: Tensor | None,
    experts: Tensor | None,
    norms: Sequence[nn.Module | None],
    config: MoPEConfig,
    dtype: torch.dtype,
) -> list[Rows]:
    """The rows of n layers of one width.

    Args:
        static: (n, L, D). mapped: (B, D), the same for all layers. experts: (n, K, L, D) to be mixed in K/V space, else None.
        norms: each layer's; several only if :func:`can_be_stacked`.
        dtype: of the rows.
    """
    layers, scales = len(norms), None
    affine = _Affine.of(norms)
    parts = {"static": static, "mapped": None if mapped is None else mapped[None]}
    parts = {name: _normed(rows, norms, affine, dtype) for name, rows in parts.items() if rows is not None}
    if experts is not None:
        with without_autocast(experts.device.type):
            experts = experts.flatten(1, 2).to(torch.promote_types(experts.dtype, torch.float32))
            zero = experts.new_zeros(layers, 1, experts.shape[-1])
            if affine is not None:
                # a layer norm is affine in the centred row, up to its deviation: the mixture's is divided by after mixing
                experts = experts - experts.mean(-1, keepdim=True)
                with torch.no_grad():
                    deviations = (experts.square().mean(-1, keepdim=True) + affine.eps).sqrt()
                    # powers of two: neither they nor their gradients change anything but the rounding
                    scales = torch.exp2(torch.log2(deviations).round()) / _LIFT
                experts = experts * affine.weight / scales
                parts |= {"experts": experts, "zero": zero, "bias": zero + affine.bias}
            else:
                parts["experts"] = experts
                # scores that add up to one carry the projection's bias along
                if config.top_k is not None and not config.renormalize:
                    parts["zero"] = zero
    if not parts:
        return [Rows(torch.empty(0, 0), {}, False)] * layers
    sizes = {name: rows.shape[1] for name, rows in parts.items()}
    values = torch.cat([rows.to(dtype).expand(layers, -1, -1) for rows in parts.values()], dim=1)
    each_scales = [None] * layers if scales is None else scales.unbind()
    return [Rows(rows, sizes, experts is not None, scale) for rows, scale in zip(values.unbind(), each_scales, strict=True)]


@dataclass(frozen=True)
class _Affine:
    """Layer norms behind their statistics: x * weight + bias, (n, 1, D) each or a number."""

    weight: Tensor | float
    bias: Tensor | float
    eps: float

    @classmethod
    def of(cls, norms: Sequence[nn.Module | None]) -> "_Affine | None":
        first = norms[0]
        if first is None or not is_layer_norm(first):
            return None
        weight = 1.0 if first.weight is None else torch.stack([norm.weight for norm in norms])[:, None]
        bias = 0.0 if first.bias is None else torch.stack([norm.bias for norm in norms])[:, None]
        return cls(weight, bias, first.eps)


def _normed(rows: Tensor, norms: Sequence[nn.Module | None], affine: _Affine | None, dtype: torch.dtype) -> Tensor:
    """(1 or n, R, D) -> (n, R, D), each layer's by its norm; as they are without norms."""
    if norms[0] is None:
        return rows
    if len(norms) == 1:
        return norms[0](rows[0].to(dtype))[None]
    with without_autocast(rows.device.type):
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return F.layer_norm(rows, rows.shape[-1:], eps=affine.eps) * affine.weight + affine.bias
