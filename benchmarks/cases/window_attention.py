"""Problem sizes of ``window_prompt_attention``: the attention of one block of a Swin Transformer."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CENTRE, MODES, SMOKE


@dataclass(frozen=True)
class WindowCase:
    """Images of ``size`` tokens, cut into windows of ``window`` x ``window`` tokens; prompts as two key/value prefixes."""

    model: str
    batch: int
    size: tuple[int, int]
    heads: int
    window: int
    shift: int
    dtype: torch.dtype
    head_dim: int = 32
    prefixes: tuple[int, int] = (6, 7)
    """The first has batch 1, like a layer's learned prompt; the second has one per image, like a mixed prompt."""
    first_layer: bool = False
    """Gradients for the prefixes only: in a frozen encoder's first layer qkv doesn't depend on trained parameters."""

    op = "window_prompt_attention"

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        size = f"{self.model} B={self.batch} {self.size[0]}x{self.size[1]} H={self.heads} Dh={self.head_dim} W={self.window}"
        notes = f"{' shift ' + str(self.shift) if self.shift else ''} P={'+'.join(map(str, self.prefixes))}"
        return f"{size}{notes} {dtype}{' first layer' if self.first_layer else ''}"

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[1:] if self.first_layer else MODES

    @property
    def tokens(self) -> int:
        return math.prod(self.size)

    @property
    def area(self) -> int:
        """Number of tokens of a window."""
        return self.window**2

    @property
    def keys(self) -> int:
        return sum(self.prefixes) + self.area

    @property
    def padded(self) -> tuple[int, int]:
        height, width = (-(-side // self.window) * self.window for side in self.size)
        return height, width

    def bias_table(self, device: torch.device | str) -> Tensor:
        """Return Swin's bias table ((2 window - 1)^2, H): one number for each offset between two tokens of a window."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn((2 * self.window - 1) ** 2, self.heads, generator=generator).to(device, self.dtype)

    def bias(self, device: torch.device | str) -> Tensor:
        """Return the bias (H, W, W) of each pair of a window's tokens, by the table."""
        index = torch.arange(self.area, device=device)
        rows, columns = (axis[:, None] - axis + self.window - 1 for axis in (index // self.window, index % self.window))
        return self.bias_table(device)[rows * (2 * self.window - 1) + columns].permute(2, 0, 1).contiguous()

    def bytes(self, mode: str) -> int:
        """Count qkv, prefixes, bias and the upstream gradient read once, out and the requested gradients written once."""
        tokens = self.batch * self.tokens * self.heads * self.head_dim * self.dtype.itemsize
        shared, own = self.prefixes
        prefixes = 2 * (shared + self.batch * own) * self.heads * self.head_dim * self.dtype.itemsize
        forward = 4 * tokens + prefixes + self.heads * self.area**2 * self.dtype.itemsize
        if mode == "forward":
            return forward
        return forward + tokens + prefixes + (0 if self.first_layer else 3 * tokens)

    def flops(self, mode: str) -> int:
        """Count the matrix products: two forward, five backward, because the probabilities are recomputed; four over the pairs with
        prefix keys for the prefixes' gradients alone.

        A token attends to the prefixes and to its whole window, including padding and tokens across seams. Padding has no queries.
        """
        product = 2 * self.heads * self.head_dim
        queries = self.batch * self.tokens
        backward = 4 * sum(self.prefixes) if self.first_layer else 5 * self.keys
        return product * queries * (2 * self.keys + (0 if mode == "forward" else backward))

    def describe(self) -> dict[str, Any]:
        return {
            "case": str(self), "model": self.model, "B": self.batch, "size": "x".join(map(str, self.size)), "H": self.heads,
            "Dh": self.head_dim, "W": self.window, "shift": self.shift, "P": "+".join(map(str, self.prefixes)),
            "dtype": str(self.dtype).removeprefix("torch."), "gradients": "prefixes" if self.first_layer else "all",
        }  # fmt: skip


def swin_stage(stage: int, batch: int, dtype: torch.dtype, *, image: int = 224, shifted: bool = True, **rest) -> WindowCase:
    """Return a block of timm's Swin-B for images of 224 or 384 pixels; the last stage is one window and not shifted."""
    window, side = {224: 7, 384: 12}[image], image // 2 ** (stage + 1)
    model = f"Swin-B{'' if image == 224 else f'/{image}'} stage {stage}"
    shift = window // 2 if shifted and side > window else 0
    return WindowCase(model, batch, (side, side), 2 ** (stage + 1), window, shift, dtype, **rest)


def cases(device: torch.device, extent: str) -> list[WindowCase]:
    """Return cases in order of interest: of N shards the first has the first case."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if extent == SMOKE:
        return [
            WindowCase("tiny", 2, (8, 8), 2, 4, 2, dtype, 16),
            WindowCase("tiny", 2, (7, 9), 2, 4, 1, dtype, 16),
            WindowCase("tiny", 2, (8, 8), 2, 4, 0, dtype, 16, first_layer=True),
        ]
    if extent == CENTRE:
        return [swin_stage(3, 64 if device.type == "cuda" else 8, dtype)]
    if device.type == "cuda":
        return [
            swin_stage(3, 64, dtype),
            swin_stage(1, 64, dtype),
            swin_stage(2, 64, dtype),
            swin_stage(4, 64, dtype),
            swin_stage(1, 64, dtype, shifted=False),
            swin_stage(3, 64, dtype, image=384),
            swin_stage(1, 64, dtype, image=384),
            swin_stage(1, 64, dtype, shifted=False, first_layer=True),
            swin_stage(3, 1, dtype),
            swin_stage(3, 256, dtype),
            WindowCase("padded", 64, (15, 20), 16, 7, 3, dtype),
        ]
    return [swin_stage(stage, 8, dtype) for stage in (3, 1, 2, 4)]
