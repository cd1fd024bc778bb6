"""Problem sizes of ``route_and_mix``, with their compulsory bytes and operations."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from benchmarks.cases import CENTRE, MODES, SMOKE


@dataclass(frozen=True)
class Case:
    """B samples, K experts of L rows and M columns in ``dtype``; logits, scores and gram are float32, as in the modules."""

    batch: int
    experts: int
    rows: int
    width: int
    dtype: torch.dtype
    gram: bool = False
    modes: ClassVar = MODES

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        return f"B={self.batch} K={self.experts} L={self.rows} M={self.width} {dtype}{' gram' if self.gram else ''}"

    def bytes(self, mode: str) -> int:
        """Count each input read once and each output written once; forward+backward is one function that returns gradients."""
        routing = 4 * self.batch * self.experts
        mixed = self.dtype.itemsize * self.batch * self.rows * self.width
        table = self.dtype.itemsize * self.experts * self.rows * self.width
        gram = 4 * self.rows * self.experts**2 if self.gram else 0
        forward = 2 * routing + mixed + table + gram
        return forward if mode == "forward" else 2 * forward

    def flops(self, mode: str) -> int:
        """Count the matrix products: one forward, two more backward (the gradients of both operands)."""
        mix = 2 * self.batch * self.experts * self.rows * self.width
        norm = 2 * self.batch * self.rows * self.experts**2 if self.gram else 0
        return (mix + norm) * (1 if mode == "forward" else 3)

    def describe(self) -> dict[str, Any]:
        return {
            "case": str(self), "B": self.batch, "K": self.experts, "L": self.rows, "M": self.width,
            "dtype": str(self.dtype).removeprefix("torch."), "gram": self.gram,
        }  # fmt: skip


def _bf16(batch: int, experts: int, width: int = 768, gram: bool = False) -> Case:
    return Case(batch, experts, 6, width, torch.bfloat16, gram)


def _fp32(batch: int, experts: int, width: int = 768, gram: bool = False) -> Case:
    return Case(batch, experts, 6, width, torch.float32, gram)


CUDA = [
    _bf16(64, 16), _fp32(64, 16), _bf16(64, 16, 1536, gram=True), _bf16(64, 256), _bf16(512, 16),
    _bf16(8192, 16), _bf16(8192, 16, 1536, gram=True), _bf16(8192, 256),
]  # fmt: skip
CPU = [_fp32(8, 16), _fp32(64, 16), _fp32(64, 16, 1536, gram=True), _fp32(64, 256), _fp32(512, 16)]
TINY = [Case(3, 5, 2, 24, torch.float32), Case(3, 5, 2, 24, torch.float32, gram=True)]
PAPER = _fp32(64, 16)
"""The one size at which the compiled baselines run on a CPU, where compiling takes tens of seconds."""


def cases(device: torch.device, extent: str) -> list[Case]:
    if extent == SMOKE:
        return TINY
    if extent == CENTRE:
        return [_bf16(64, 16) if device.type == "cuda" else PAPER]
    return CUDA if device.type == "cuda" else CPU
