"""VLMos with random weights for MoPE-BAF's prompts, and the sizes to measure."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import CENTRE, SMOKE
from benchmarks.cases.models import DTYPE_NAMES, INFERENCE, TRAINING, count_flops, padded_text
from mope_fast import BAFConfig, VLMo, VLMoConfig
from mope_fast.models.mope_baf.plan import make_plan

TRAINING_FROZEN = "training-frozen"
"""Training of the new parameters only; ``TRAINING`` also trains the backbone's weights."""
MODES = (TRAINING, TRAINING_FROZEN, INFERENCE)
CLASSES = 2


@dataclass(frozen=True)
class BAFCase:
    """One VLMo at one batch size. ``compiled`` selects the providers made by torch.compile, else the others."""

    name: str
    vlmo: VLMoConfig
    prompts: tuple[int, int, int]
    """Lengths of the L-, V- and VL-Prompt in tokens."""
    batch: int
    dtype: torch.dtype
    modes: tuple[str, ...]
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.name} B={self.batch} S={self.tokens} P={'+'.join(map(str, self.prompts))} {DTYPE_NAMES[self.dtype]}"

    @property
    def tokens(self) -> int:
        """Number of tokens without prompts."""
        return self.vlmo.max_text_length + self.vlmo.image_tokens

    def config(self, **settings: Any) -> BAFConfig:
        """Make a config with this case's prompt lengths and other given settings."""
        text, image, unified = self.prompts
        return BAFConfig(text_prompt_length=text, image_prompt_length=image, unified_prompt_length=unified, **settings)

    @property
    def token_ratio(self) -> float:
        """Length of a layer's sequence relative to that without prompts, the mean over layers."""
        segments = make_plan(self.config(), self.vlmo, self.vlmo.max_text_length)
        rows = sum(len(segment.layers) * sum(segment.lengths.values()) for segment in segments)
        return rows / self.vlmo.num_layers / self.tokens

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        side = self.vlmo.image_size
        pixels = torch.randn(self.batch, 3, side, side, device=device).to(self.dtype)
        return {**padded_text(self.batch, self.vlmo.max_text_length, device), "pixel_values": pixels}

    def flops(self, mode: str) -> int:
        """Count the plain VLMo's matrix products."""
        return _flops(self.vlmo, mode) * self.batch

    def describe(self) -> dict[str, Any]:
        return {
            "case": str(self), "model": self.name, "B": self.batch, "S": self.tokens, "P": "+".join(map(str, self.prompts)),
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


@functools.cache
def _flops(config: VLMoConfig, mode: str) -> int:
    """Count operations for one sample, on meta tensors."""
    with torch.device("meta"):
        vlmo = VLMo(config).requires_grad_(mode == TRAINING)
        text = torch.zeros(1, config.max_text_length, dtype=torch.long)
        image = torch.zeros(1, 3, config.image_size, config.image_size)
    for block in vlmo.transformer.blocks:  # mope_fast's attention queries autocast, which the meta device doesn't support
        block.attn.attend = lambda q, k, v, sees: F.scaled_dot_product_attention(q, k, v)
    first, backward = vlmo.transformer.blocks[0], mode != INFERENCE
    return count_flops(first, lambda: vlmo(text, None, image).pooled, backward=backward, cut=mode == TRAINING_FROZEN)


# drop path is off: it would cost a VLMo the same with prompts and without
BASE_PLUS = VLMoConfig.named("base_plus", drop_path_rate=0.0)
BASE_PLUS_QUARTER = VLMoConfig.named("base_plus", drop_path_rate=0.0, num_layers=6, first_fusion_layer=5)
_TINY = {"image_size": 32, "max_text_length": 6, "vocab_size": 100, "num_heads": 2, "drop_path_rate": 0.0}
TINY_PLUS = VLMoConfig(hidden_size=68, num_layers=4, first_fusion_layer=3, **_TINY)
TINY_BASE = VLMoConfig(
    hidden_size=32, num_layers=3, first_fusion_layer=2, absolute_positions=False,
    layer_scale=0.5,  # it is initialized near zero, where a layer does nothing, unlike in trained models
    **_TINY,
)  # fmt: skip


def _quarter(mode: str) -> BAFCase:
    """Make a case with a quarter of the layers, each of full size, which takes minutes on a CPU."""
    return BAFCase("VLMo-B+ 6 layers", BASE_PLUS_QUARTER, (10, 10, 10), 2, torch.float32, (mode,))


def cases(device: torch.device, extent: str) -> list[BAFCase]:
    """Return cases in order of interest: of N shards the first has the first case."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if extent == SMOKE:
        tiny = {"tiny VLMo-B+": TINY_PLUS, "tiny VLMo-B": TINY_BASE}
        return [BAFCase(name, config, (2, 3, 2), 3, dtype, MODES) for name, config in tiny.items()]

    def case(batch: int, mode: str, compiled: bool = False) -> BAFCase:
        return BAFCase("VLMo-B+", BASE_PLUS, (10, 10, 10), batch, dtype, (mode,), compiled)

    if extent == CENTRE:
        return [case(32, mode) for mode in MODES] if device.type == "cuda" else [_quarter(mode) for mode in MODES]
    if device.type == "cuda":
        return [
            *(case(32, mode) for mode in MODES),
            *(case(32, mode, compiled=True) for mode in MODES),
            *(case(8, mode) for mode in MODES),  # the paper's batch
            *(case(64, mode) for mode in MODES),
            case(1, INFERENCE),
        ]
    return [
        *(case(8, mode) for mode in MODES),
        case(1, INFERENCE),
        *(_quarter(mode) for mode in MODES),
        *(case(8, mode, compiled=True) for mode in MODES),
    ]
