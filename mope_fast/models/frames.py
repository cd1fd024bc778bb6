"""Videos as a side: frames go through an image encoder, and their features are pooled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._values import can_be_looked_at
from .prompting import Inputs

FRAMES, FRAME_MASK = "frames", "frame_mask"
"""Input names that don't belong to an encoder: all frames as a tensor, and the mask of frames that are present."""


def as_samples(name: str, inputs: Any) -> tuple[Inputs, tuple[int, int], Tensor | None]:
    """Return the inputs of all frames (B * T, ...), the shape (B, T), and the mask of present frames (B, T) or None.

    Raises:
        TypeError: the mask is not a tensor.
        ValueError: shapes differ, or there are no frames.
    """
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {FRAMES: inputs}
    mask = arguments.pop(FRAME_MASK, None)
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"{FRAME_MASK} of {name!r} must be a bool tensor (B, T), got {type(mask).__name__}")
    tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
    shapes = [tuple(value.shape[:2]) for value in (*tensors.values(), *([] if mask is None else [mask]))]
    if not shapes or len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"{name!r} is a side of frames: its inputs must be tensors (B, T, ...) of the same B and T, got {shapes}")
    if shapes[0][1] == 0:
        raise ValueError(f"{name!r} has videos without frames, (B, T) = {shapes[0]}: pass None if all are missing")
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 2):
        got = f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"{FRAME_MASK} of {name!r} must be a bool tensor (B, T), True for real frames; got {got}")
    folded = {key: value.flatten(0, 1) if key in tensors else value for key, value in arguments.items()}
    return folded.pop(FRAMES) if [*folded] == [FRAMES] else folded, shapes[0], mask


def pooled(name: str, features: Tensor, mask: Tensor | None, how: str, present: Tensor | None) -> Tensor:
    """Pool features (B, T, D) -> (B, D) by "mean" or "max" over the frames that are present.

    Args:
        present: (B,) bool, True for samples that have a video; None for all.

    Raises:
        ValueError: a video that is present has no frame. Where values can't be read without waiting, its feature is NaN instead.
    """
    if mask is None:
        return features.mean(1) if how == "mean" else features.amax(1)
    count = mask.sum(1, keepdim=True)
    empty = count == 0
    if can_be_looked_at(mask):
        lost = empty[:, 0] if present is None else empty[:, 0] & present
        if lost.any():
            first = int(lost.int().argmax())
            raise ValueError(f"{name!r}: video {first} of the batch has no frame, its {FRAME_MASK} is False everywhere")
    if how == "mean":
        feature = features.masked_fill(~mask[..., None], 0).sum(1) / count.clamp(min=1)
    else:
        feature = features.masked_fill(~mask[..., None], float("-inf")).amax(1)
    return torch.where(empty, float("nan"), feature)
