"""Relative positions of VLMo-Base and -Large: the bias table row of each pair of tokens."""

import torch
from torch import Tensor

from .config import TEXT_RANGE, VLMoConfig

TEXT_ROWS = 2 * TEXT_RANGE + 2
"""Number of table rows after those of the image; independent of the image size."""


def image_rows(config: VLMoConfig) -> int:
    """Return the number of rows for pairs of image tokens: patch offsets, class to patch, patch to class, class to class."""
    return (2 * config.grid - 1) ** 2 + 3


def table_rows(config: VLMoConfig) -> int:
    """Return R, the number of table rows.

    The rows are image pairs, text to image, image to text, word offsets, and three for the text's class token.
    """
    return image_rows(config) + TEXT_ROWS


def position_index(config: VLMoConfig) -> Tensor:
    """Return the table row of each query (first dimension) and key in a joint pass, text first: (T + I, T + I) int64."""
    text, image = config.max_text_length, config.image_tokens
    index = torch.empty(text + image, text + image, dtype=torch.long)
    index[:text, :text] = _text_index(config)
    index[:text, text:] = image_rows(config)
    index[text:, :text] = image_rows(config) + 1
    index[text:, text:] = _image_index(config)
    return index


def _image_index(config: VLMoConfig) -> Tensor:
    """Return row indices as in BEiT: the offset between two patches, and three separate rows for the class token."""
    grid, last = config.grid, image_rows(config)
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    offset = (row[:, None] - row + grid - 1) * (2 * grid - 1) + column[:, None] - column + grid - 1
    index = torch.empty(grid**2 + 1, grid**2 + 1, dtype=torch.long)
    index[1:, 1:] = offset
    index[0], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


def _text_index(config: VLMoConfig) -> Tensor:
    """Return row indices: the offset between two words, and three separate rows for the class token."""
    words, last = torch.arange(config.max_text_length - 1), table_rows(config)
    index = torch.empty(config.max_text_length, config.max_text_length, dtype=torch.long)
    index[1:, 1:] = words - words[:, None] + TEXT_RANGE - 2 + image_rows(config) + 2
    index[0], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index
