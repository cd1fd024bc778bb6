"""What a contact has, and who judges it: right, refused by name, or wrong."""

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

RIGHT, REFUSED = "right", "refused"


class WrongError(AssertionError):
    """A value that isn't the right one, an error that isn't documented, a hang, or a later use that fails."""


class Refusal(NamedTuple):
    """How a use may be refused: an exception of these types, whose message has one of these words."""

    types: tuple[type[Exception], ...]
    words: tuple[str, ...]


class Contact:
    """One use: its random numbers, a folder of its own, and notes of what it does, for whoever has to find out."""

    def __init__(self, seed: int, kind: str, index: int, folder: Path):
        self.index, self.folder = index, folder
        self.random = random.Random(f"{seed} {kind} {index}")
        self.numbers = np.random.default_rng(self.random.getrandbits(63))
        torch.manual_seed(self.random.getrandbits(63))
        self.notes: list[str] = []

    def note(self, *what: object) -> None:
        self.notes.append(" ".join(map(str, what)))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choose(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)


_kept: list[tempfile.TemporaryDirectory] = []


def kept_folder() -> Path:
    """One that stays until the process ends."""
    _kept.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    return Path(_kept[-1].name)


def judge(use: Callable[[], Any], right: Callable[[Any], None] | None, refusal: Refusal | None) -> str:
    """The verdict on a use.

    Args:
        right: raises AssertionError for a result that isn't the right one; None for a use that has to be refused.
        refusal: how it may be refused; None for a use that must not be.
    """
    try:
        result = use()
    except Exception as error:
        if refusal is None:
            raise WrongError(f"refused what is right: {error!r}") from error
        if not isinstance(error, refusal.types):
            raise WrongError(f"expected one of {[kind.__name__ for kind in refusal.types]}, got {error!r}") from error
        if not any(word in str(error) for word in refusal.words):
            raise WrongError(f"the message has none of {refusal.words}: {error!r}") from error
        return REFUSED
    if right is None:
        raise WrongError(f"took what has to be refused, and gave {result!r:.300}")
    right(result)
    return RIGHT


def same(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Tensors, or nested lists and dicts of them; only the order of sums may differ."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
