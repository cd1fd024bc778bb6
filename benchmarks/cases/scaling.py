"""Sizes along the curves of a fused encoder: each axis through one centre, and length-scaling at expert-scaling's parameters."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import CENTRE, SMOKE
from benchmarks.cases.end_to_end import TINY, Encoder, FusedCase, vit
from benchmarks.cases.models import INFERENCE, MODES, TRAINING

AXES = ("K", "L", "B", "S")
LENGTH = "length"
"""The curve on which prompts get longer in place of more: see :func:`equal_length`."""
LENGTH_EXPERTS = 2
"""Experts that length-scaling keeps: the paper's figure 4 starts both ways from 2 experts of 6 rows."""


@dataclass(frozen=True)
class ScalingCase(FusedCase):
    """``axes``: the curves that it is a point of."""

    axes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"axes": list(self.axes)}


def equal_length(experts: int, length: int, kept: int = LENGTH_EXPERTS) -> int:
    """Rows a prompt of ``kept`` experts that take as many parameters as ``experts`` of ``length`` rows, static prompt included.

    Raises:
        ValueError: no whole number of rows does.
    """
    rows, rest = divmod((1 + experts) * length, 1 + kept)
    if rest:
        raise ValueError(
            f"{1 + experts} prompts of {length} rows don't divide among {1 + kept} of equal length: "
            f"choose a length that is a multiple of {1 + kept}"
        )
    return rows


@dataclass(frozen=True)
class Curves:
    """The points of each axis beside the centre's; ``length``: the numbers of experts whose parameters length-scaling gets."""

    centre: ScalingCase
    experts: tuple[int, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    encoders: tuple[Encoder, ...]
    """At other numbers of tokens."""
    length: tuple[int, ...]

    def cases(self) -> list[ScalingCase]:
        """In order of interest, the centre first; a size on several curves is one case."""
        centre, length = self.centre, self.centre.length
        points = [
            (centre, AXES),
            *((dataclasses.replace(centre, experts=count), ("K",)) for count in self.experts),
            (dataclasses.replace(centre, experts=LENGTH_EXPERTS), (LENGTH,)),
            *(
                (dataclasses.replace(centre, experts=LENGTH_EXPERTS, length=equal_length(count, length)), (LENGTH,))
                for count in self.length
            ),
            *((dataclasses.replace(centre, length=rows), ("L",)) for rows in self.lengths),
            *((dataclasses.replace(centre, batch=batch, modes=_modes(batch)), ("B",)) for batch in self.batches),
            *((dataclasses.replace(centre, encoder=encoder), ("S",)) for encoder in self.encoders),
        ]
        axes: dict[ScalingCase, tuple[str, ...]] = {}
        for case, more in points:
            axes[case] = axes.get(case, ()) + more
        return [dataclasses.replace(case, axes=each) for case, each in axes.items()]


def _modes(batch: int) -> tuple[str, ...]:
    """The mapper's batch norm can't train on one sample."""
    return MODES if batch > 1 else (INFERENCE,)


def cases(device: torch.device, extent: str) -> list[ScalingCase]:
    """In order of interest, which is that of measuring."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if extent == SMOKE:
        return Curves(ScalingCase(TINY[0], 32, dtype), (2,), (3,), (3,), (TINY[1],), (4,)).cases()
    if extent == CENTRE:  # of a curve it takes two points to see anything: the goal's
        few = ScalingCase(vit("S", 224), 4, dtype, modes=(TRAINING,), axes=("K",))
        if device.type == "cuda":
            few = dataclasses.replace(few, encoder=vit("B", 224), batch=64)
        return [few, dataclasses.replace(few, experts=256)]
    return _gpu_cases(dtype) if device.type == "cuda" else _cpu_cases(dtype)


def _gpu_cases(dtype: torch.dtype) -> list[ScalingCase]:
    # length-scaling ends at 517 rows on 197 tokens: the truth in float32 goes through all of them as tokens, 40 GB at B=64
    return Curves(
        ScalingCase(vit("B", 224), 64, dtype),
        experts=(256, 2, 4, 8, 32, 64, 128, 512, 1024),
        lengths=(1, 2, 4, 8, 16, 32, 64),
        batches=(1, 4, 16, 256),
        encoders=tuple(vit("B", size) for size in (64, 112, 160, 320, 384, 512)),
        length=(4, 8, 16, 32, 64, 128),
    ).cases()


def _cpu_cases(dtype: torch.dtype) -> list[ScalingCase]:
    """Of a smaller encoder, in steps of four; where the goal is, of ViT-B, the goal's two points.

    Experts' bytes grow with a layer's width and its products with the square: a small step shows them more.
    """
    curves = Curves(
        ScalingCase(vit("S", 224), 4, dtype),
        experts=(256, 2, 64, 1024),
        lengths=(1, 16, 64),
        batches=(1, 2),
        encoders=(vit("S", 112), vit("S", 160)),
        length=(16, 64),
    ).cases()
    goal = ScalingCase(vit("B", 224), 8, dtype, modes=(TRAINING,), axes=("K",))
    return [*curves, goal, dataclasses.replace(goal, experts=256)]
