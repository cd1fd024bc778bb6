"""Progress of long work: a bar on a terminal, a line from time to time in a file."""

import time
from collections.abc import Collection, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 10.0
"""Seconds between two lines."""


class Steps:
    """Shows how many steps are done, within a ``with`` block. A nested block shows a second bar below the first.

    Args:
        description: name of the work.
        total: total number of steps.
        done: number of steps done before it begins.
        shown: False for a process that must print nothing.
    """

    _drawing: Progress | None = None
    """The display that is on the terminal now; only one is possible."""

    def __init__(self, description: str, total: int, done: int = 0, shown: bool = True):
        self._description, self._total, self._done, self._before, self._note = description, total, done, done, ""
        console = Console()
        draws = shown and (console.is_interactive or console.is_jupyter)
        self._prints, self._bar, self._outer = shown and not draws, None, Steps._drawing
        if draws:
            self._bar = self._outer or Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> "Steps":
        self._start = self._last = time.monotonic()
        if self._bar is not None and self._outer is None:
            self._bar.start()
            Steps._drawing = self._bar
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._bar is not None and self._outer is None:
            self._bar.stop()
            Steps._drawing = None
        elif self._bar is not None:
            self._bar.remove_task(self._task)
        elif self._prints and kind is None:
            self._print()

    def reach(self, done: int, note: str | None = None) -> None:
        """Report the number of steps done; the note, such as a loss, stays until the next one."""
        self._done = done
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=self._note)
        elif self._prints and time.monotonic() >= self._last + EVERY:
            self._print()

    def _print(self) -> None:
        self._last = time.monotonic()
        seconds, done, left = self._last - self._start, self._done - self._before, self._total - self._done
        parts = [f"{self._description}: {self._done:,} of {self._total:,}", f"{_clock(seconds)} elapsed"]
        if left and done:
            parts.append(f"{_clock(seconds * left / done)} remaining")
        print(", ".join([*parts, *filter(None, [self._note])]), flush=True)


def tracked(items: Collection[Any], description: str, shown: bool = True) -> Iterator[Any]:
    """Yield the items one by one and show how many are done."""
    with Steps(description, len(items), shown=shown) as steps:
        for done, item in enumerate(items, start=1):
            yield item
            steps.reach(done)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"
