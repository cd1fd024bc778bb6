"""Which norms are known: what they do to a mixture of prompts follows from their statistics and their affine part."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import without_autocast

_LAYER_NORMS = (
    "torch.nn.modules.normalization.LayerNorm.forward", "timm.layers.norm.LayerNorm.forward",
    "open_clip.transformer.LayerNorm.forward",
)  # fmt: skip
_RMS_NORMS = ("torch.nn.modules.normalization.RMSNorm.forward", "timm.layers.norm.RmsNorm.forward")
_TRANSFORMERS_RMS_NORMS = {
    "LlamaRMSNorm": 0.0, "MistralRMSNorm": 0.0, "Qwen2RMSNorm": 0.0, "Qwen3RMSNorm": 0.0, "T5LayerNorm": 0.0, "UMT5LayerNorm": 0.0,
    "EuroBertRMSNorm": 0.0, "GemmaRMSNorm": 1.0, "Gemma2RMSNorm": 1.0, "Gemma3RMSNorm": 1.0,
}  # fmt: skip
"""What is added to their weight."""


def is_plain(module: nn.Module) -> bool:
    """Whether a call of it is a call of its class's forward and nothing else: no hooks, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _forward_of(norm: nn.Module) -> str:
    """The full name of the forward that it has or inherits."""
    forward = getattr(type(norm), "forward", None)
    return f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"


def _rms_offset(name: str) -> float | None:
    """What an RMS norm of this forward adds to its weight; None for another."""
    if name in _RMS_NORMS:
        return 0.0
    return _TRANSFORMERS_RMS_NORMS.get(name.split(".")[-2]) if name.startswith("transformers.") else None


def is_known(norm: nn.Module) -> bool:
    """Whether it is a layer norm or an RMS norm, of a class in the lists above or one that inherits its forward, without hooks."""
    name = _forward_of(norm)
    # timm's fast norms round differently
    known = name in _LAYER_NORMS or _rms_offset(name) is not None
    return known and not getattr(norm, "_fast_norm", False) and is_plain(norm)


def norm_problem(norm: nn.Module | None) -> str | None:
    """Why mixing behind this norm is not exact, about "norm", or None."""
    if norm is None or is_known(norm):
        return None
    return f"norm is {type(norm).__name__}, which is no layer norm or RMS norm of a known class, or has hooks"


def norm_eps(norm: nn.Module, dtype: torch.dtype) -> float:
    """What it adds below its root."""
    eps = getattr(norm, "eps", None)
    eps = getattr(norm, "variance_epsilon", None) if eps is None else eps
    # torch's RMSNorm takes that of the dtype it computes in
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps if eps is None else eps


@dataclass
class Norms:
    """n known norms of one kind: a row, less its mean if ``centred``, over its deviation, times weight, plus bias."""

    centred: bool
    weight: Tensor | float  # (n, 1, D)
    bias: Tensor | float  # (n, 1, D)
    eps: float

    @classmethod
    def of(cls, norms: Sequence[nn.Module], dtype: torch.dtype) -> "Norms":
        first, offset = norms[0], _rms_offset(_forward_of(norms[0]))
        weight, bias = 1.0, 0.0
        if first.weight is not None:
            weight = torch.stack([norm.weight for norm in norms])[:, None]
            weight = weight + offset if offset else weight
        if getattr(first, "bias", None) is not None:
            bias = torch.stack([norm.bias for norm in norms])[:, None]
        return cls(offset is None, weight, bias, norm_eps(first, dtype))

    def __call__(self, rows: Tensor) -> Tensor:
        """(1 or n, R, D) -> (n, R, D), each layer's by its norm; in float32 at least."""
        with without_autocast(rows.device.type):
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            normed = F.layer_norm if self.centred else F.rms_norm
            return normed(rows, rows.shape[-1:], eps=self.eps) * self.weight + self.bias


def can_be_stacked(norms: Sequence[nn.Module | None]) -> bool:
    """Whether these can be applied together: all of one known kind but for weight and bias, or none at all.

    A sharded weight (DTensor) is whole only while its own layer runs.
    """
    if any(norm is None for norm in norms):
        return all(norm is None for norm in norms)
    plain = all(is_known(norm) and type(norm.weight) in (nn.Parameter, Tensor, type(None)) for norm in norms)
    return plain and len({_kind(norm) for norm in norms}) == 1


def _kind(norm: nn.Module) -> tuple[str, float, bool, bool]:
    return _forward_of(norm), norm_eps(norm, torch.float32), norm.weight is None, getattr(norm, "bias", None) is None
