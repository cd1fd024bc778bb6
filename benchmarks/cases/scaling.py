"""Sizes along the curves of a fused encoder: each axis through one center, and longer prompts at equal parameters."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import CENTRE, SMOKE
from benchmarks.cases.end_to_end import TINY, Encoder, FusedCase, vit
from benchmarks.cases.models import INFERENCE, MODES, TRAINING

AXES = ("K", "L", "B", "S")
LENGTH = "length"
"""The curve on which prompts get longer instead of more numerous: see :func:`equal_length`."""
LENGTH_EXPERTS = 2
"""Number of experts in length-scaling: the paper's figure 4 starts both ways from 2 experts of 6 tokens."""


@dataclass(frozen=True)
class ScalingCase(FusedCase):
    """A point of one or several curves, which ``axes`` names."""

    axes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"axes": list(self.axes)}


def equal_length(experts: int, length: int, kept: int = LENGTH_EXPERTS) -> int:
    """Return the length of ``kept`` experts with as many parameters as ``experts`` of ``length``, static prompt included.

    Raises:
        ValueError: no integer length has as many.
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
    """The points of each axis besides the center; ``length``: numbers of experts whose parameter counts length-scaling matches."""

    centre: ScalingCase
    experts: tuple[int, ...]
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    encoders: tuple[Encoder, ...]
    """Encoders with other numbers of tokens."""
    length: tuple[int, ...]

    def cases(self) -> list[ScalingCase]:
        """Return cases in order of interest, the center first; a size on several curves is one case."""
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
    """Return the modes for a batch size; the mapper's batch norm can't train on one sample."""
    return MODES if batch > 1 else (INFERENCE,)


def cases(device: torch.device, extent: str) -> list[ScalingCase]:
    """Return cases in order of interest, which is the order of measuring."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if extent == SMOKE:
        return Curves(ScalingCase(TINY[0], 32, dtype), (2,), (3,), (3,), (TINY[1],), (4,)).cases()
    if extent == CENTRE:  # the two points of the goal: a curve needs at least two
        few = ScalingCase(vit("S", 224), 4, dtype, modes=(TRAINING,), axes=("K",))
        if device.type == "cuda":
            few = dataclasses.replace(few, encoder=vit("B", 224), batch=64)
        return [few, dataclasses.replace(few, experts=256)]
    return _gpu_cases(dtype) if device.type == "cuda" else _cpu_cases(dtype)


def _gpu_cases(dtype: torch.dtype) -> list[ScalingCase]:
    # length-scaling ends at 517 prompt tokens on 197 tokens: the float32 truth processes all of them as tokens, 40 GB at B=64
    return Curves(
        ScalingCase(vit("B", 224), 64, dtype),
        experts=(256, 2, 4, 8, 32, 64, 128, 512, 1024),
        lengths=(1, 2, 4, 8, 16, 32, 64),
        batches=(1, 4, 16, 256),
        encoders=tuple(vit("B", size) for size in (64, 112, 160, 320, 384, 512)),
        length=(4, 8, 16, 32, 64, 128),
    ).cases()


def _cpu_cases(dtype: torch.dtype) -> list[ScalingCase]:
    """Return the curves of a smaller encoder, in steps of four, and the goal's two points of ViT-B.

    Experts' bytes grow with a layer's width, its products with the square of it: in a small encoder's step the experts show more.
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
