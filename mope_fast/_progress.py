"""Show progress of long work: a bar on a terminal, occasional lines in a file."""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

SECONDS_PER_LINE = 10.0


class _Lines:
    """A file in which each state of a progress bar is its own line."""

    def __init__(self, file: TextIO):
        self._file = file

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self._file.write(f"{text}\n")

    def flush(self) -> None:
        self._file.flush()


def tracked(items: Iterable[Any], description: str, unit: str, *, shown: bool, total: int | None = None) -> "tqdm[Any]":
    """Yield the items and show on stderr how many are done; ``total`` is their number if they have no length."""
    from tqdm import tqdm

    options: dict[str, Any] = {"desc": description, "unit": unit, "disable": not shown, "total": total}
    if not (sys.stderr.isatty() or "ipykernel" in sys.modules):  # a notebook can draw bars
        options |= {"file": _Lines(sys.stderr), "mininterval": SECONDS_PER_LINE, "miniters": 1}
    return tqdm(items, **options)
