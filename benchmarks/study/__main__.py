"""Compare ways of fusing two frozen encoders: the same splits, features, head and budget of trials for every method.

    python -m benchmarks.study items-slot                   # all methods, text as main; goes on where it was stopped
    python -m benchmarks.study items-slot --main image --methods mlp sequential mope-16
    python -m benchmarks.study my_folder                    # train.jsonl, val.jsonl, images: as for examples/classify_jsonl.py
    python -m benchmarks.study items-slot --quick           # does it run at all? a minute

Each method's recipe is the best of as many trials as any other method has, on the development part of one split of one task
(``benchmarks.study.cells``). With it the method is trained once a split; the epoch is chosen on that split's development part, and
the test part is opened once. A finished cell is in the results at once. What wasn't run is said.
"""

import argparse
import dataclasses
import datetime
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.study import data
from benchmarks.study.cells import QUICK, Cell, Store, chosen, difference, interval, main_of, searched, tested
from benchmarks.study.methods import METHODS, Recipe
from benchmarks.study.training import train

RESULTS = Path(__file__).parents[1] / "results" / "study"


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.study", description=__doc__.split("\n")[0])
    parser.add_argument("task", help=f"{', '.join(data.TASKS)}, or a folder of JSON lines")
    parser.add_argument("--main", choices=("text", "image"), default="text", help="the side whose layers take prompts")
    parser.add_argument(
        "--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD", help=", ".join(METHODS)
    )
    parser.add_argument("--splits", type=int, default=3, help="how many, from 0")
    parser.add_argument("--hours", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished cells")
    parser.add_argument("--quick", action="store_true", help="few samples, one trial, one split, one epoch: does it run at all?")
    args = parser.parse_args(words)
    if args.task not in data.TASKS and not Path(args.task).is_dir():
        parser.error(f"{args.task} is neither a folder nor one of {', '.join(data.TASKS)}")
    if args.splits < 1:
        parser.error(f"--splits must be at least 1, got {args.splits}")
    args.methods = [method for method in args.methods if args.main in METHODS[method].mains]
    return args


class Study:
    """Runs cells that aren't in the results yet, one after another."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.started = args, time.monotonic()
        self.tasks: dict[str, data.Task] = {}
        self.facts = {
            **environment.describe(environment.default_device()), "commit": environment.commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }  # fmt: skip

    def store(self, task: str) -> Store:
        name = task if task in data.TASKS else Path(task).resolve().name
        return Store(self.args.results / f"{name}{'-quick' if self.args.quick else ''}.jsonl")

    def run(self, cell: Cell) -> bool:
        """Whether it is done: False where the hours are used up."""
        store = self.store(cell.task)
        if store.find(cell) is not None:
            return True
        if time.monotonic() - self.started > 3600 * self.args.hours:
            return False
        if cell.task not in self.tasks:
            self.tasks[cell.task] = data.load(cell.task)
        task = self.tasks[cell.task]
        split = task.split(cell.split)
        if self.args.quick:
            split = data.Split(*(part[torch.arange(min(48, len(part)))] for part in (split.train, split.dev, split.test)))
        what = f"{cell.task}, {cell.method}, {cell.main or 'features'}, split {cell.split}{'' if cell.tests else ', a trial'}"

        def progress(note: str) -> None:
            print(f"{what}: {note}", flush=True)

        found = train(task, split, cell.method, cell.main or "text", cell.recipe, cell.split, test=cell.tests, progress=progress)
        progress(f"dev {100 * found.dev:.1f} %" + ("" if found.test is None else f", test {100 * found.test:.1f} %"))
        store.add(cell, dataclasses.asdict(found), self.facts)
        return True

    def recipe(self, method: str) -> Recipe | None:
        """The best trial's; None where the hours don't reach for all of them."""
        if self.args.quick:
            return QUICK[METHODS[method].encodes][0]
        for cell in searched(method, self.args.main):
            if not self.run(cell):
                return None
        return chosen(method, self.args.main, self.store(searched(method, self.args.main)[0].task))

    def run_all(self) -> None:
        """Split after split, so that what is cut short has whole splits."""
        recipes = {method: self.recipe(method) for method in self.args.methods}
        for split in range(1 if self.args.quick else self.args.splits):
            for method, recipe in recipes.items():
                if recipe is not None:
                    self.run(Cell(self.args.task, main_of(method, self.args.main), method, split, recipe, True))

    def table(self) -> str:
        """A line a method: accuracy, difference to the MLP, parameters, time of a step; or that it wasn't run."""
        rows = self.store(self.args.task).rows()
        lines = [f"{'':<46}{'test':>6}  {'to the MLP, 95 %':<24}{'splits':>6}{'trained':>11}{'ms a step':>11}"]
        for method in self.args.methods:
            found = tested(rows, self.args.task, method, self.args.main)
            title = METHODS[method].title
            if not found:
                lines.append(f"{title:<46}not run")
                continue
            paired = difference(rows, self.args.task, method, "mlp", self.args.main) if method != "mlp" else None
            mean = interval([each["test"] for each in found.values()]).mean
            last = next(iter(found.values()))
            size, step = f"{last['trained_parameters']:,}", f"{last['step_ms']:.1f}"
            lines.append(f"{title:<46}{100 * mean:>6.1f}  {paired or ''!s:<24}{len(found):>6}{size:>11}{step:>11}")
        return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    study = Study(parse_arguments(words))
    study.args.results.mkdir(parents=True, exist_ok=True)
    study.run_all()
    print(study.table())


if __name__ == "__main__":
    main()
