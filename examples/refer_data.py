"""Mosaics of four published Easy-VQA pictures, with a phrase that refers to one of the shapes, and that shape's mask."""

from dataclasses import dataclass

import numpy as np
import torch
from easy_vqa_data import easy_vqa
from easy_vqa_jsonl import shown
from torch import Tensor

from mope_fast.data import load_image

SHAPES = ("circle", "rectangle", "triangle")
CELL = 64
"""Height and width of an Easy-VQA picture, in pixels."""
CONTRAST = 24
"""Minimum difference between a shape's pixel and the background, in at least one color channel."""


@dataclass(frozen=True)
class Mosaics:
    """N pictures of four shapes, one of which a phrase names. One other shares its color, one its form, the last one or neither.

    Attributes:
        images: (N, 3, S, S), uint8.
        masks: (N, S, S), bool: the named shape.
        foreground: (N, S, S), bool: all four shapes.
        phrase: (N,), indices into ``phrases``.
    """

    images: Tensor
    masks: Tensor
    foreground: Tensor
    phrase: Tensor
    phrases: list[str]

    def __len__(self) -> int:
        return len(self.phrase)


def mosaics(train: int, test: int, size: int, seed: int) -> tuple[Mosaics, Mosaics]:
    """Make mosaics of ``size`` x ``size`` pixels from the published training and test pictures; only training uses the seed."""
    *splits, answers = easy_vqa()
    things: list[dict[tuple[str, str], list]] = []
    for split in splits:
        of_split: dict[tuple[str, str], list] = {}
        for image, names in shown(split, answers).items():
            color, shape = sorted(names, key=SHAPES.__contains__)
            of_split.setdefault((color, shape), []).append(split.paths[image])
        things.append(of_split)
    names = sorted(set(things[0]) & set(things[1]))
    counts, seeds = (train, test), (seed, 12345)
    made = [_mosaics(of_split, names, *settings, size) for of_split, *settings in zip(things, counts, seeds, strict=True)]
    return made[0], made[1]


def _mosaics(pictures: dict[tuple[str, str], list], names: list[tuple[str, str]], count: int, seed: int, size: int) -> Mosaics:
    random, cells = np.random.default_rng(seed), {}

    def cell(name: tuple[str, str]) -> np.ndarray:
        path = pictures[name][random.integers(len(pictures[name]))]
        if path not in cells:
            cells[path] = np.array(load_image(path))
        return cells[path]

    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    masks, foreground = (torch.empty(count, size, size, dtype=torch.bool) for _ in range(2))
    phrase = torch.empty(count, dtype=torch.long)
    for i in range(count):
        phrase[i] = target = int(random.integers(len(names)))
        color, shape = names[target]
        like_color = [name for name in names if name[0] == color and name[1] != shape]
        like_shape = [name for name in names if name[0] != color and name[1] == shape]
        others = [name for name in names if name != names[target]]
        chosen = [names[target], *(some[random.integers(len(some))] for some in (like_color, like_shape, others))]
        order = random.permutation(4)
        picture = np.empty((2 * CELL, 2 * CELL, 3), np.uint8)
        is_shape = np.zeros((2, 2 * CELL, 2 * CELL), bool)
        for place, which in enumerate(order):
            rows, columns = (slice(CELL * at, CELL * (at + 1)) for at in divmod(place, 2))
            picture[rows, columns] = one = cell(chosen[which])
            drawn = np.abs(one.astype(int) - one[0, 0].astype(int)).max(-1) > CONTRAST
            is_shape[1, rows, columns] = drawn
            if which == 0:
                is_shape[0, rows, columns] = drawn
        images[i] = _resized(torch.from_numpy(picture).permute(2, 0, 1).float(), size).round().clamp(0, 255).to(torch.uint8)
        masks[i], foreground[i] = _resized(torch.from_numpy(is_shape).float(), size) > 0.5
    return Mosaics(images, masks, foreground, phrase, [f"the {color} {shape}" for color, shape in names])


def _resized(x: Tensor, size: int) -> Tensor:
    return torch.nn.functional.interpolate(x[None], size=(size, size), mode="bilinear", antialias=True)[0]
