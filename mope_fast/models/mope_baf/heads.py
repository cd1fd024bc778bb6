"""Heads for few-shot classification other than the linear one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MlpHead(nn.Sequential):
    """VLMo's head for visual question answering: D -> 2 D, LayerNorm, GELU, 2 D -> classes."""

    def __init__(self, width: int, num_classes: int):
        super().__init__(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, num_classes))


class Verbalizer(nn.Module):
    """A head that maps word logits to class logits: the mean over each class's words.

    Args:
        words: the token ids of each class.
        vocab_size: number of word logits.

    Raises:
        ValueError: an id is outside the vocabulary.
    """

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int):
        super().__init__()
        if outside := [word for of_class in words for word in of_class if not 0 <= word < vocab_size]:
            raise ValueError(f"the verbalizer has token id {outside[0]}, but the vocabulary has ids 0 to {vocab_size - 1}")
        longest = max(map(len, words))
        rows = [[*of_class, *[of_class[0]] * (longest - len(of_class))] for of_class in words]
        present = [[position < len(of_class) for position in range(longest)] for of_class in words]
        self.register_buffer("index", torch.tensor(rows), persistent=False)
        self.register_buffer("there", torch.tensor(present), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Map word logits (B, vocabulary) -> class logits (B, classes)."""
        return logits[:, self.index].masked_fill(~self.there, 0.0).sum(-1) / self.there.sum(-1)
