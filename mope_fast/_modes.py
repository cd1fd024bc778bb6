"""Put modules into eval mode temporarily."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ._locks import Guarded


class _Modes(Guarded):
    """Keeps, for each module in eval mode, its mode before the first block and the blocks that use it."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[tuple[int, nn.Module], tuple[bool, set[object]]] = {}


_modes = _Modes()


@contextmanager
def evaluating(encoder: nn.Module) -> Iterator[None]:
    """Put the encoder into eval mode for the block; if blocks of several threads share modules, the last one restores the modes."""
    # keyed by process: a forked process inherits blocks of threads that don't exist in it
    block, keys = object(), [(os.getpid(), module) for module in encoder.modules()]
    try:
        with _modes.lock:
            for key in keys:
                _modes.of.setdefault(key, (key[1].training, set()))[1].add(block)
            encoder.eval()
        yield
    finally:
        try:
            _give_modes_back(block, keys)
        except BaseException:  # for example a Ctrl-C in the middle of it
            _give_modes_back(block, keys)
            raise


def _give_modes_back(block: object, keys: list[tuple[int, nn.Module]]) -> None:
    with _modes.lock:
        for key in keys:
            mode, blocks = _modes.of.get(key, (None, set()))
            if mode is not None and blocks <= {block}:
                key[1].training = mode
                del _modes.of[key]
            blocks.discard(block)
