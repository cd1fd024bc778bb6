"""The study's cells: which there are, what was found in each, and what is made of them."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.study.methods import METHODS, Recipe
from mope_fast._files import write_atomically

# the same number of trials for each method, all on the development part of SEARCHED
SEARCHED = ("items-slot", 0)
TRIALS = {
    True: [
        Recipe(epochs, lr, head_lr) for epochs, lr, head_lr in ((4, 5e-4, 1e-3), (4, 1e-3, 3e-3), (6, 3e-4, 1e-3), (6, 5e-4, 3e-3))
    ],
    False: [
        Recipe(epochs, 0.0, 1e-3, dropout, smoothing)
        for epochs, dropout, smoothing in ((20, 0.3, 0.0), (20, 0.5, 0.1), (40, 0.5, 0.1), (40, 0.3, 0.1))
    ],
}
"""Recipes by whether a method's steps run an encoder."""
QUICK = {True: [Recipe(1, 1e-3, 3e-3, batch_size=16)], False: [Recipe(2, 0.0, 1e-3)]}


@dataclass(frozen=True)
class Cell:
    """One training run. ``main`` is None where a method reads features only."""

    task: str
    main: str | None
    method: str
    split: int
    recipe: Recipe
    tests: bool
    """A final cell: it opens its test split, once."""

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Store:
    """Finished cells in a file of JSON lines, each written as it ends. Processes may share a file, each with cells of its own."""

    def __init__(self, path: Path):
        self.path = path

    def rows(self) -> list[dict[str, Any]]:
        """All of them.

        Raises:
            ValueError: a line isn't of a cell; the message says which.
        """
        rows = []
        for number, line in enumerate(self.path.read_text().splitlines() if self.path.exists() else [], start=1):
            try:
                row = json.loads(line)
                if not {"cell", "found"} <= row.keys():
                    raise ValueError(f"it has {sorted(row)}")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{self.path}, line {number} is no cell of benchmarks.study: {error}") from error
            rows.append(row)
        return rows

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """What was found in it."""
        return next((row["found"] for row in self.rows() if row["cell"] == cell.as_dict()), None)

    def add(self, cell: Cell, found: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        rows = [*self.rows(), {"cell": cell.as_dict(), "found": dict(found), **facts}]
        write_atomically(self.path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def main_of(method: str, main: str) -> str | None:
    return main if METHODS[method].encodes else None


def searched(method: str, main: str) -> list[Cell]:
    """The trials of a method."""
    task, split = SEARCHED
    return [Cell(task, main_of(method, main), method, split, recipe, False) for recipe in TRIALS[METHODS[method].encodes]]


def chosen(method: str, main: str, store: Store) -> Recipe | None:
    """The recipe of the best trial on dev, the earlier one of equals; None while one is missing."""
    found = [(store.find(cell), cell) for cell in searched(method, main)]
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
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} to {100 * self.high:+.1f})"


def interval(values: Sequence[float]) -> Interval:
    """Of at least two values; with one the interval is not a number."""
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Interval(mean, math.nan, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count), count)


def tested(rows: Iterable[Mapping[str, Any]], task: str, method: str, main: str) -> dict[int, dict[str, Any]]:
    """Of a method's final cells, by split, what was found; the last one where a recipe was changed."""
    return {
        row["cell"]["split"]: row["found"]
        for row in rows
        if row["cell"]["tests"] and (row["cell"]["task"], row["cell"]["method"]) == (task, method)
        and row["cell"]["main"] == main_of(method, main)
    }  # fmt: skip


def difference(rows: Sequence[Mapping[str, Any]], task: str, method: str, other: str, main: str) -> Interval | None:
    """How much more of the test samples a method has right than another, on the same splits; None where they share none."""
    ours, theirs = (tested(rows, task, name, main) for name in (method, other))
    shared = sorted(ours.keys() & theirs.keys())
    return interval([ours[split]["test"] - theirs[split]["test"] for split in shared]) if shared else None
