"""Write the study's results into docs/when_to_use.md, and its pictures: ``python -m benchmarks.study.page``.

The page's text is written by hand; everything between ``<!-- NAME -->`` and ``<!-- end -->`` is generated from the saved cells.
"""

import argparse
import hashlib
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling_pictures import write_svg
from benchmarks.study.cells import Interval, Store, chosen, difference, final_cells, searched
from benchmarks.study.data import TASKS
from benchmarks.study.methods import METHODS
from mope_fast._files import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "study"
PAGE = ROOT / "docs" / "when_to_use.md"
SIDES = ("text", "image")
OURS = "mope-16"
PAIRS = [
    (OURS, "mlp"), ("default", "late-concat-frozen"), ("sequential", "mlp"), ("lora", "mlp"), (OURS, "sequential"),
    (OURS, "mope-1"), (OURS, "longer"), (OURS, "mope-16-main"),
]  # fmt: skip
"""Pairs of methods whose difference is reported."""
ONE_SIDED = ("majority", "text", "image")
KINDS = {"features": ("#666666", "s"), "fused": ("#0072b2", "o"), "others": ("#d55e00", "^")}
"""Colors of Okabe and Ito's palette, and markers for readers who can't tell colors apart."""

Found = dict[int, dict[str, Any]]
"""A method's final cells, by split."""


class Measured:
    """All cells of a folder of results."""

    def __init__(self, folder: Path):
        self.rows = {task: Store(folder / f"{task}.jsonl").rows() for task in TASKS}

    @property
    def digest(self) -> str:
        """Hash of all cells, which is written into the pictures."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()

    def found(self, task: str, main: str, method: str) -> Found:
        """Return a method's final cells; empty if it wasn't run."""
        trials = searched(task, method, main)
        recipe = chosen(trials, self.rows[task])
        return {} if recipe is None else final_cells(self.rows[task], task, method, main, recipe)

    def headings(self) -> list[tuple[str, str]]:
        """Return the pairs of task and main side on which some method with a main side was run."""
        return [
            (task, main)
            for task in TASKS
            for main in SIDES
            if any(row["cell"]["tests"] and row["cell"]["main"] == main for row in self.rows[task])
        ]

    def difference(self, task: str, main: str, ours: str, theirs: str) -> Interval | None:
        return difference(self.found(task, main, ours), self.found(task, main, theirs), folds=True)


def mean(found: Found, name: str) -> float:
    return math.fsum(each[name] for each in found.values()) / len(found)


def median(found: Found, name: str) -> float:
    """Return the median over splits; NaN if nothing was measured."""
    values = [each[name] for each in found.values() if each[name] is not None]
    return statistics.median(values) if values else math.nan


def step_time(found: Found) -> str:
    """Format a step's milliseconds."""
    time = median(found, "step_ms")
    return "not timed" if math.isnan(time) else f"{time:.1f}"


def named(task: str, main: str) -> str:
    return f"{task}, {main} as main"


def table(measured: Measured, task: str, main: str) -> str:
    """Return a table of every method on one task, the best first."""
    lines = [
        "| | test accuracy | to the MLP, 95 % | splits | kept epochs | trained | ms a step |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {method: measured.found(task, main, method) for method in METHODS if main in METHODS[method].mains}
    for method in sorted(found, key=lambda method: -mean(found[method], "test") if found[method] else 1):
        cells, title = found[method], METHODS[method].title
        if not cells:
            lines.append(f"| {title} | not run | | | | | |")
            continue
        to_mlp = None if method == "mlp" else measured.difference(task, main, method, "mlp")
        size, step = f"{next(iter(cells.values()))['trained_parameters']:,}", step_time(cells)
        epochs = ", ".join(str(cells[split]["epoch"]) for split in sorted(cells))
        row = (title, f"{100 * mean(cells, 'test'):.1f}", to_mlp or "", len(cells), epochs, size, step)
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def differences(measured: Measured) -> str:
    """Return a table of the difference of each pair on each task."""
    headings = measured.headings()
    lines = [
        "| | " + " | ".join(named(*heading) for heading in headings) + " |",
        "|---" * (1 + len(headings)) + "|",
    ]
    for ours, theirs in PAIRS:
        values = (measured.difference(*heading, ours, theirs) for heading in headings)
        row = " | ".join("not run" if value is None else str(value) for value in values)
        lines.append(f"| {METHODS[ours].title} - {METHODS[theirs].title} | {row} |")
    return "\n".join(lines)


def judged(measured: Measured, ours: str, theirs: str) -> str:
    """Return a sentence: where the whole interval is in one method's favor, where in the other's, and where in neither's."""
    where: dict[str, list[str]] = {"ahead": [], "not told apart": [], "behind": [], "not compared": []}
    for task, main in measured.headings():
        value = measured.difference(task, main, ours, theirs)
        if value is None or math.isnan(value.half):
            where["not compared"].append(named(task, main))
        else:
            kind = "ahead" if value.low > 0 else "behind" if value.high < 0 else "not told apart"
            where[kind].append(f"{named(task, main)} ({100 * value.mean:+.1f})")
    parts = [f"{kind} on {'; '.join(places)}" for kind, places in where.items() if places]
    title = METHODS[ours].title
    return f"{title[0].upper()}{title[1:]}, against {METHODS[theirs].title}: {', '.join(parts)}."


def verdict(measured: Measured) -> str:
    return "\n".join(f"- {judged(measured, ours, theirs)}" for ours, theirs in PAIRS)


def facts(measured: Measured) -> str:
    """Return device, versions, core-hours and number of cells."""
    rows = [row for rows in measured.rows.values() for row in rows]
    values = {name: sorted({str(row[name]) for row in rows}) for name in ("device", "torch", "date", "commit")}
    hours = math.fsum(row["found"]["seconds"] for row in rows) / 3600
    told = "; ".join(f"{name} {', '.join(each)}" for name, each in values.items())
    final = sum(row["cell"]["tests"] for row in rows)
    return f"{len(rows)} cells, {final} of them final, {hours:.1f} core-hours; {told}."


def kind(method: str) -> str:
    if not METHODS[method].encodes:
        return "features"
    return "others" if method in ("pmf", "promptfuse", "lora") else "fused"


def _subplots(*shape: int, size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)


def _numbered(axes: Any, places: Sequence[tuple[float, float, float, int, str]]) -> None:
    """Draw points (x, y, half of the interval, number, kind), each with its method's number next to it."""
    for x, y, half, number, of in places:
        colour, marker = KINDS[of]
        axes.errorbar(x, y, yerr=None if math.isnan(half) else half, color=colour, marker=marker, markersize=5, elinewidth=0.8)
        axes.annotate(str(number), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.5, color="#dddddd")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def draw_costs(measured: Measured, path: Path) -> None:
    """Plot the difference of test accuracy to the MLP on the same splits, against trained parameters and training step time."""
    headings, numbers = measured.headings(), {method: number for number, method in enumerate(METHODS, start=1)}
    figure, grid = _subplots(len(headings), 2, size=(9, 1.2 + 2.9 * len(headings)))
    shown = set()
    for line, (task, main) in zip(grid, headings, strict=True):
        # methods on one side alone are far below and would compress the others' scale
        found = {method: cells for method in METHODS if (cells := measured.found(task, main, method)) and method not in ONE_SIDED}
        shown |= found.keys()
        for axes, name, title in zip(
            line, ("trained_parameters", "step_ms"), ("trained parameters", "ms a training step"), strict=True
        ):
            places = []
            for method, cells in found.items():
                over, x = measured.difference(task, main, method, "mlp"), median(cells, name)
                if over is not None and not math.isnan(x):
                    places.append((x, 100 * over.mean, 100 * over.half, numbers[method], kind(method)))
            _numbered(axes, places)
            axes.axhline(0, color="#333333", linewidth=0.8)
            axes.set_xscale("log")
            axes.margins(x=0.15)
            axes.set_xlabel(title, fontsize=8)
            axes.set_ylabel("test accuracy over the MLP's, points", fontsize=8)
            axes.set_title(named(task, main), fontsize=9)
    names = [f"{number} {METHODS[method].title}" for method, number in numbers.items() if method in shown]
    half = -(-len(names) // 2)
    legend = "\n".join(f"{left:<52}{right}" for left, right in zip(names[:half], [*names[half:], ""], strict=False))
    figure.supxlabel(legend, fontsize=7, family="monospace", x=0.02, ha="left")
    write_svg(figure, path, Description=f"cells {measured.digest}")


def routings(measured: Measured, task: str, main: str) -> list[dict[str, Any]]:
    """Return how OURS routed the test samples of each split."""
    return [each["routing"] for each in measured.found(task, main, OURS).values()]


def over_splits(routed: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return the mean over splits for each layer."""
    return [statistics.fmean(layer) for layer in zip(*(each[name] for each in routed), strict=True)]


def routing(measured: Measured) -> str:
    """Return a table of the numbers that :func:`draw_routing` draws, for each task, over layers and splits."""
    lines = ["| | entropy | information | on the class |", "|---|---|---|---|"]
    for task, main in measured.headings():
        if routed := routings(measured, task, main):
            layers = (over_splits(routed, name) for name in ("entropy", "information", "class_information"))
            row = " | ".join(f"{min(each):.2f} - {max(each):.2f}" for each in layers)
            lines.append(f"| {named(task, main)} | {row} |")
    return "\n".join(lines)


def experts(measured: Measured) -> str:
    """Return for each class of items its highest-scoring experts, in the layer with the most class information."""
    if not (routed := routings(measured, "items-slot", "text")):
        return "not run"
    first = routed[0]
    lines = [f"Layer {first['layer'] + 1}, split 0:", "", "| class | its experts, mean scores |", "|---|---|"]
    for name, scores in zip(first["class_names"], first["by_class"], strict=True):
        best = sorted(enumerate(scores, start=1), key=lambda pair: -pair[1])[:3]
        lines.append(f"| {name} | " + ", ".join(f"{expert}: {score:.2f}" for expert, score in best) + " |")
    return "\n".join(lines)


def draw_routing(measured: Measured, path: Path) -> None:
    """Plot entropy and class information of each layer, and the experts of item classes in the most informative layer."""
    figure, ((left, middle, right),) = _subplots(1, 3, size=(12, 3.6))
    for task, main in measured.headings():
        if routed := routings(measured, task, main):
            for axes, name in ((left, "entropy"), (middle, "class_information")):
                values = over_splits(routed, name)
                axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=named(task, main))
                axes.set_xticks(range(1, len(values) + 1))
    for axes, title in ((left, "entropy of a sample's scores / log K"), (middle, "information on the class / log K")):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("layer", fontsize=8)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.5, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(fontsize=7, frameon=False)
    for first in routings(measured, "items-slot", "text")[:1]:
        shown = right.imshow(first["by_class"], aspect="auto", cmap="viridis", vmin=0, vmax=1)
        right.set_yticks(range(len(first["class_names"])), labels=first["class_names"], fontsize=7)
        right.set_xticks(range(len(first["by_class"][0])), labels=range(1, len(first["by_class"][0]) + 1), fontsize=7)
        right.set_xlabel("expert", fontsize=8)
        right.set_title(f"items-slot, split 0: mean scores by class, layer {first['layer'] + 1}", fontsize=9)
        figure.colorbar(shown, ax=right, shrink=0.8)
    write_svg(figure, path, Description=f"cells {measured.digest}")


PICTURES: Mapping[str, Callable[[Measured, Path], None]] = {
    "when_to_use_costs.svg": draw_costs, "when_to_use_routing.svg": draw_routing
}  # fmt: skip


def filled(text: str, measured: Measured) -> str:
    """Return the page with the text between its marks regenerated.

    Raises:
        ValueError: a mark is unknown, or a table has no mark.
    """
    made = (verdict, differences, routing, experts, facts)
    blocks = {each.__name__: each(measured) for each in made}
    blocks |= {f"table {task} {main}": table(measured, task, main) for task, main in measured.headings()}
    marks = re.findall(r"<!-- (?!end)(.+?) -->", text)
    if set(marks) != set(blocks):
        raise ValueError(f"the page must have marks for {sorted(blocks)}, got {sorted(marks)}")

    def block(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{blocks[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- (?!end)(.+?) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(words: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.study.page", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of finished cells")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; pictures are written next to it")
    args = parser.parse_args(words)
    measured = Measured(args.results)
    write_atomically(args.page, filled(args.page.read_text(), measured).encode())
    for name, draw in PICTURES.items():
        draw(measured, args.page.parent / name)
        print(args.page.parent / name)
    print(args.page)


if __name__ == "__main__":
    main()
