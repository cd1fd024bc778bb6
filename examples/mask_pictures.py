"""Draw pictures and masks side by side."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch

COLUMN, ROW = 1.5, 1.6
"""Width of a column and height of a row, in inches."""


class Masked(NamedTuple):
    """A picture, the phrase to segment as its title, and masks by column name."""

    title: str
    image: np.ndarray
    """(H, W, 3), uint8."""
    masks: dict[str, torch.Tensor]
    """(H, W), bool."""


def draw(path: Path, rows: Sequence[Masked]) -> None:
    """Draw rows of pictures to a PNG file; pixels outside of a mask are faded."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(rows[0].masks)
    size = (COLUMN * (1 + len(names)), ROW * len(rows))
    figure, axes = plt.subplots(len(rows), 1 + len(names), figsize=size, squeeze=False)
    for number, (line, row) in enumerate(zip(axes, rows, strict=True)):
        line[0].imshow(row.image)
        line[0].set_title(row.title, fontsize=8, wrap=True)
        faded = (row.image * 0.25 + 191).astype(np.uint8)
        for axis, name in zip(line[1:], names, strict=True):
            axis.imshow(np.where(row.masks[name].numpy()[..., None], row.image, faded))
            if number == 0:
                axis.set_title(name, fontsize=8)
        for axis in line:
            axis.set_axis_off()
    figure.tight_layout()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    figure.savefig(part, dpi=130, format="png")
    os.replace(part, path)
    plt.close(figure)
