"""Compare ways of fusing two frozen encoders: the same splits, features, head and budget of trials for every method.

    python -m benchmarks.study items-slot                   # all methods, text as main; continues where it was stopped
    python -m benchmarks.study items-slot --main image --methods mlp sequential mope-16
    python -m benchmarks.study my_folder                    # train.jsonl, val.jsonl, images: as for examples/classify_jsonl.py
    python -m benchmarks.study items-slot --quick           # only check that it runs, in a minute

Each method's recipe is the best of a number of trials that is the same for every method (``benchmarks.study.cells``). Recipe and
epoch are selected on one development part, on which no split tests. With its recipe a method is trained once per split and tested
once on the split's test part; the test parts of five splits are disjoint. A finished cell is saved at once. The table says what was
not run.
"""

import argparse
import dataclasses
import datetime
import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.study import data
from benchmarks.study.cells import QUICK, Cell, Store, chosen, difference, final_cells, main_of, searched
from benchmarks.study.methods import METHODS, Recipe
from benchmarks.study.training import train

RESULTS = Path(__file__).parents[1] / "results" / "study"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.study", description=__doc__.split("\n")[0])
    parser.add_argument("task", help=f"{', '.join(data.TASKS)}, or a folder of JSON Lines")
    parser.add_argument("--main", choices=("text", "image"), default="text", help="the side whose layers take prompts")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=None, metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--splits", type=int, default=3, help="number of splits, counted from 0")
    parser.add_argument("--hours", type=float, default=float("inf"), help="hours after which no cell is started")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished cells")
    parser.add_argument("--untimed", action="store_true", help="save no step times, because other programs run at the same time")
    parser.add_argument("--quick", action="store_true", help="only check that it runs: few samples, one trial, split and epoch")
    args = parser.parse_args(words)
    if args.task not in data.TASKS and not Path(args.task).is_dir():
        parser.error(f"{args.task} is neither a folder nor one of {', '.join(data.TASKS)}")
    if args.splits < 1:
        parser.error(f"--splits must be at least 1, got {args.splits}")
    if args.methods is None:
        args.methods = [method for method in METHODS if args.main in METHODS[method].mains]
    if others := [method for method in args.methods if args.main not in METHODS[method].mains]:
        parser.error(f"{', '.join(others)} can't have {args.main} as main: leave them out, or drop --main {args.main}")
    if missing := [name for name in ("scipy", "peft") if find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)} are missing: pip install -e '.[bench,examples]'")
    return args


class Study:
    """Runs the cells that aren't in the results yet, one after another."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.started = args, time.monotonic()
        self.tasks: dict[str, data.Task] = {}
        self.task = args.task
        if args.task not in data.TASKS:
            folder = data.load(args.task)
            self.task, self.tasks[folder.name] = folder.name, folder
        self.recipes: dict[str, Recipe | None] = {}
        self.facts = {
            **environment.describe(torch.device("cpu")), "commit": environment.commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }  # fmt: skip

    def store(self, task: str) -> Store:
        return Store(self.args.results / f"{task}{'-quick' if self.args.quick else ''}.jsonl")

    def loaded(self, task: str) -> data.Task:
        if task not in self.tasks:
            self.tasks[task] = data.load(task)
        return self.tasks[task]

    def run(self, cell: Cell) -> bool:
        """Run a cell unless it is finished; return False if the hours are used up."""
        store = self.store(cell.task)
        if store.find(cell) is not None:
            return True
        if time.monotonic() - self.started > 3600 * self.args.hours:
            return False
        task = self.loaded(cell.task)
        split = task.split(cell.split)
        if self.args.quick:
            some = (torch.linspace(0, len(part) - 1, 48).long() for part in (split.train, split.dev, split.test))
            split = data.Split(*(part[index] for part, index in zip((split.train, split.dev, split.test), some, strict=True)))
        what = f"{cell.task}, {cell.method}, {cell.main or 'features'}, split {cell.split}{'' if cell.tests else ', a trial'}"

        def progress(note: str) -> None:
            print(f"{what}: {note}", flush=True)

        found = train(task, split, cell.method, cell.main or "text", cell.recipe, cell.split, test=cell.tests, progress=progress)
        progress(f"dev {100 * found.dev:.1f} %" + ("" if found.test is None else f", test {100 * found.test:.1f} %"))
        kept = dataclasses.asdict(found) | ({"step_ms": None} if self.args.untimed else {})
        store.add(cell, kept, self.facts)
        return True

    def recipe(self, method: str) -> Recipe | None:
        """Return the best trial's recipe; None if the hours don't suffice for all trials."""
        if self.args.quick:
            return QUICK[METHODS[method].encodes][0]
        trials = searched(self.task, method, self.args.main)
        return chosen(trials, self.store(self.task).rows()) if all(self.run(cell) for cell in trials) else None

    def run_all(self) -> None:
        """Run all cells split by split, so that an interrupted study has whole splits."""
        self.recipes = {method: self.recipe(method) for method in self.args.methods}
        for split in range(1 if self.args.quick else self.args.splits):
            for method, recipe in self.recipes.items():
                if recipe is not None:
                    self.run(Cell(self.task, main_of(method, self.args.main), method, split, recipe, True))

    def table(self) -> str:
        """Return a line per method: accuracy, difference to the MLP, parameters and step time; or that it wasn't run."""
        rows = self.store(self.task).rows()
        folds = self.task in data.TASKS  # a folder has a single split, repeated with other seeds
        times, of = ("splits", "") if folds else ("seeds", " of seeds")
        lines = [f"{'':<46}{'test':>6}  {f'to the MLP, 95 %{of}':<25}{times:>6}{'trained':>11}{'ms a step':>11}"]
        found = {
            method: final_cells(rows, self.task, method, self.args.main, recipe)
            for method, recipe in self.recipes.items()
            if recipe is not None
        }
        for method in self.args.methods:
            title = METHODS[method].title
            if not (cells := found.get(method)):
                lines.append(f"{title:<46}not run")
                continue
            paired = difference(cells, found.get("mlp", {}), folds=folds) if method != "mlp" else None
            mean = math.fsum(each["test"] for each in cells.values()) / len(cells)
            last = next(iter(cells.values()))
            size, step = f"{last['trained_parameters']:,}", "not timed" if last["step_ms"] is None else f"{last['step_ms']:.1f}"
            lines.append(f"{title:<46}{100 * mean:>6.1f}  {paired or ''!s:<25}{len(cells):>6}{size:>11}{step:>11}")
        return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    study = Study(parse_arguments(words))
    study.args.results.mkdir(parents=True, exist_ok=True)
    study.run_all()
    print(study.table())


if __name__ == "__main__":
    main()
