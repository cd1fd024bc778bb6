"""Relative positions of VLMo-Base and -Large: which row of the bias table each pair of tokens takes."""

import torch
from torch import Tensor

from .config import TEXT_RANGE, VLMoConfig

TEXT_ROWS = 2 * TEXT_RANGE + 2
"""Rows of the table behind those of the image, whatever its size."""


def image_rows(config: VLMoConfig) -> int:
    """Rows for pairs of image tokens: offsets of patches, then class to patch, patch to class and class to class."""
    return (2 * config.grid - 1) ** 2 + 3


def table_rows(config: VLMoConfig) -> int:
    """R, rows of the table: image pairs, text to image, image to text, offsets of words, and three for the text's class token."""
    return image_rows(config) + TEXT_ROWS


def position_index(config: VLMoConfig) -> Tensor:
    """int64 (T + I, T + I): the row of each query (first dimension) and key, text first, in a joint pass."""
    text, image = config.max_text_length, config.image_tokens
    index = torch.empty(text + image, text + image, dtype=torch.long)
    index[:text, :text] = _text_index(config)
    index[:text, text:] = image_rows(config)
    index[text:, :text] = image_rows(config) + 1
    index[text:, text:] = _image_index(config)
    return index


def _image_index(config: VLMoConfig) -> Tensor:
    """As BEiT's: the offset between two patches, three rows of its own for the class token."""
    grid, last = config.grid, image_rows(config)
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    offset = (row[:, None] - row + grid - 1) * (2 * grid - 1) + column[:, None] - column + grid - 1
    index = torch.empty(grid**2 + 1, grid**2 + 1, dtype=torch.long)
    index[1:, 1:] = offset
    index[0], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


def _text_index(config: VLMoConfig) -> Tensor:
    """The offset between two words, three rows of its own for the class token."""
    words, last = torch.arange(config.max_text_length - 1), table_rows(config)
    index = torch.empty(config.max_text_length, config.max_text_length, dtype=torch.long)
    index[1:, 1:] = words - words[:, None] + TEXT_RANGE - 2 + image_rows(config) + 2
    index[0], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index
