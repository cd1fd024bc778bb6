"""The study's cells: the training runs, their saved results, and statistics of them."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from benchmarks.study.data import FOLDS
from benchmarks.study.methods import METHODS, Recipe
from mope_fast._files import write_atomically

VERSION = 1
"""Increase this when a task, a method or the training changes; cells of another version are ignored."""
TRIALS = {
    True: [
        Recipe(2, 5e-4, 3e-4, dropout=0.3, head_epochs=40),
        Recipe(2, 2e-3, 3e-4, dropout=0.5, head_epochs=40),
        Recipe(6, 5e-4, 1e-3, dropout=0.5),  # trains everything from the start
    ],
    False: [Recipe(epochs, 0.0, 1e-3, dropout) for epochs, dropout in ((40, 0.3), (40, 0.5), (80, 0.5))],
}
"""Trial recipes, keyed by whether a method's steps run an encoder; the same number for each method."""
QUICK = {True: [Recipe(1, 1e-3, 3e-3, batch_size=16, head_epochs=2)], False: [Recipe(2, 0.0, 1e-3)]}


@dataclass(frozen=True)
class Cell:
    """One training run. ``main`` is None if a method reads features only."""

    task: str
    main: str | None
    method: str
    split: int
    recipe: Recipe
    tests: bool
    """True for a final cell, which evaluates on its test split once."""
    version: int = VERSION

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Store:
    """Finished cells in a JSON Lines file, each written when it ends. Processes may share a file."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """Read all cells.

        Raises:
            ValueError: a line is not a cell; the message says which.
        """
        rows = []
        for number, line in enumerate(self.path.read_text().splitlines() if self.path.exists() else [], start=1):
            try:
                row = json.loads(line)
                if not {"cell", "found"} <= row.keys():
                    raise ValueError(f"it has {sorted(row)}")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{self.path}, line {number} is not a cell of benchmarks.study: {error}") from error
            rows.append(row)
        return rows

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's saved results, or None."""
        return _found(self.rows(), cell)

    def add(self, cell: Cell, found: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            rows = [*self.rows(), {"cell": cell.as_dict(), "found": dict(found), **facts}]
            write_atomically(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def main_of(method: str, main: str) -> str | None:
    return main if METHODS[method].encodes else None


def searched(task: str, method: str, main: str) -> list[Cell]:
    """Return a method's trials, evaluated on the task's development part."""
    return [Cell(task, main_of(method, main), method, 0, recipe, False) for recipe in TRIALS[METHODS[method].encodes]]


def _found(rows: Iterable[Mapping[str, Any]], cell: Cell) -> dict[str, Any] | None:
    return next((row["found"] for row in rows if row["cell"] == cell.as_dict()), None)


def chosen(trials: Iterable[Cell], rows: Sequence[Mapping[str, Any]]) -> Recipe | None:
    """Return the recipe of the best trial on dev, the earliest of equal ones; None while a trial is missing."""
    found = [(_found(rows, cell), cell) for cell in trials]
    if any(result is None for result, _ in found):
        return None
    return max(found, key=lambda pair: pair[0]["dev"])[1].recipe


class Interval(NamedTuple):
    """A mean with the 95 % interval of Student's t."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{100 * self.mean:+.1f} (one split)"
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def interval(values: Sequence[float], overlap: float = 0.0) -> Interval:
    """Return the 95 % interval of the mean; with one value its width is NaN.

    Args:
        overlap: ratio of test to training samples if the values are from splits that share training samples; it widens the
            interval (Nadeau and Bengio, 2003).
    """
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, math.nan, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Interval(mean, float(t.ppf(0.975, count - 1)) * math.sqrt(variance * (1 / count + overlap)), count)


def final_cells(rows: Iterable[Mapping[str, Any]], task: str, method: str, main: str, recipe: Recipe) -> dict[int, dict[str, Any]]:
    """Return the results of a method's final cells with this recipe, by split."""
    key = (task, method, main_of(method, main))
    return {
        row["cell"]["split"]: row["found"]
        for row in rows
        if row["cell"]["tests"] and (row["cell"]["task"], row["cell"]["method"], row["cell"]["main"]) == key
        and row["cell"]["recipe"] == dataclasses.asdict(recipe) and row["cell"]["version"] == VERSION
    }  # fmt: skip


def difference(ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]], *, folds: bool) -> Interval | None:
    """Return the difference of two methods' test accuracies on the same splits; None if they share no split.

    Args:
        ours, theirs: results of :func:`final_cells`.
        folds: True if splits have disjoint test samples, one of FOLDS parts each, and share training samples.
    """
    shared = sorted(ours.keys() & theirs.keys())
    values = [ours[split]["test"] - theirs[split]["test"] for split in shared]
    return interval(values, 1 / (FOLDS - 1) if folds else 0.0) if shared else None
