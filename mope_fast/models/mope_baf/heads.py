"""Heads of few-shot classification beside the linear one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MlpHead(nn.Sequential):
    """VLMo's classifier of questions about images: D -> 2 D, LayerNorm, GELU, 2 D -> classes."""

    def __init__(self, width: int, num_classes: int):
        super().__init__(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, num_classes))


class Verbalizer(nn.Module):
    """Logits of words to logits of classes: the mean over each class' words.

    Args:
        words: each class' token ids.
        vocab_size: of the logits.

    Raises:
        ValueError: an id outside of the vocabulary.
    """

    def __init__(self, words: Sequence[Sequence[int]], vocab_size: int):
        super().__init__()
        if outside := [word for of_class in words for word in of_class if not 0 <= word < vocab_size]:
            raise ValueError(f"the verbalizer has token id {outside[0]}, the vocabulary has 0 to {vocab_size - 1}")
        longest = max(map(len, words))
        rows = [[*of_class, *[of_class[0]] * (longest - len(of_class))] for of_class in words]
        there = [[position < len(of_class) for position in range(longest)] for of_class in words]
        self.register_buffer("index", torch.tensor(rows), persistent=False)
        self.register_buffer("there", torch.tensor(there), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, vocabulary) -> (B, classes)."""
        return logits[:, self.index].masked_fill(~self.there, 0.0).sum(-1) / self.there.sum(-1)
