"""Samples in the form that the page displays: a short text, and a small picture in a data URI."""

import base64
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import Post
from ..data.images import load_image, pillow

SIDE = 112
"""Maximum side length of a picture, in pixels."""
LENGTH = 400
"""Maximum length of a text, in characters."""


class Shown(NamedTuple):
    """A sample on the page."""

    text: str | None
    picture: str | None
    """A data URI."""


def show(sample: Any, name: str) -> Shown:
    """Convert a sample for :meth:`Recorder.report`; ``name`` identifies the sample in errors.

    Raises:
        ImportError: a picture needs Pillow.
        ValueError: the sample is neither text nor picture, or a picture can't be read.
    """
    if isinstance(sample, Post):
        parts = (sample.text, sample.image)
    elif isinstance(sample, Mapping):
        if not {"text", "image"} & set(sample):
            raise ValueError(f"{name}: a dict must have 'text' or 'image', got {list(sample)}")
        parts = (sample.get("text"), sample.get("image"))
    elif isinstance(sample, (tuple, list)):
        # items after the second, and a label in second place, are ignored
        parts = (*sample[:2], None)[:2]
        parts = (parts[0], None if isinstance(parts[1], (int, float)) else parts[1])
    else:
        parts = (sample, None)
    text = picture = None
    named = isinstance(sample, (Post, Mapping))
    for index, part in enumerate(parts):
        if part is None:
            continue
        if isinstance(part, str) and text is None and not (named and index):
            text = part if len(part) <= LENGTH else part[: LENGTH - 1] + "…"
        elif picture is None:
            picture = _data_uri(part, name)
    return Shown(text, picture)


def _data_uri(picture: Any, name: str) -> str:
    try:
        image = load_image(_pillow_image(picture) if isinstance(picture, Tensor) else picture)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        kind = f"{picture.dtype} {tuple(picture.shape)}" if isinstance(picture, Tensor) else repr(picture)[:80]
        raise ValueError(
            f"{name}: expected a text, a PIL image, a path of one, or a tensor (3, H, W), got {kind} ({error})"
        ) from error
    image.thumbnail((SIDE, SIDE))
    encoded = {}
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        image.save(buffer := io.BytesIO(), kind, **settings)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def _pillow_image(picture: Tensor) -> Any:
    if picture.dim() != 3 or picture.shape[0] not in (1, 3) or 0 in picture.shape:
        raise ValueError("the shape is not (3, H, W)")
    pixels = picture.detach().cpu()
    if pixels.dtype != torch.uint8:
        if pixels.dtype != torch.bool and not pixels.is_floating_point():
            raise ValueError("among integer dtypes only uint8 has a known range: convert the picture to uint8")
        pixels = pixels.float()
        if not pixels.isfinite().all():
            raise ValueError("it has NaN or infinite values")
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 1:  # the picture was normalised for a model
            pixels = (pixels - low) / (high - low).clamp(min=1e-12)
        pixels = (pixels * 255).round()
    return pillow().fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).to(torch.uint8).numpy())
