"""Draw the scaling curves: ``python -m benchmarks.scaling_pictures FILE [...] --output DIR``.

Files are pytest-benchmark JSON of the group ``scaling``, runs or shards of one device, and ``.jsonl`` of
``benchmarks.scaling_accuracy``. DIR gets points.csv with every point and a picture of each curve.
"""

import argparse
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import environment
from benchmarks.cases.models import TRAINING
from benchmarks.cases.scaling import AXES, LENGTH, LENGTH_EXPERTS
from benchmarks.report.model import Row
from benchmarks.report.profiles import END_TO_END_LABELS
from benchmarks.scaling_points import Results, on_axis, read, table, verdicts, where
from mope_fast._files import write_atomically

AXIS_TITLES = {"K": "experts K", "L": "rows of a prompt L", "B": "batch B", "S": "tokens S"}
OVER_THE_FROZEN = "time over the frozen encoder's"
OPTIMIZER, STATIC = "optimizer", "vpt-deep"


class Series(NamedTuple):
    """A line's style: a color of Okabe and Ito's palette, and a marker for readers who can't tell colors apart."""

    label: str
    colour: str
    marker: str


def _series(provider: str, colour: str, marker: str) -> Series:
    return Series(END_TO_END_LABELS[provider], colour, marker)


SERIES = {
    "frozen": _series("frozen", "#666666", "x"),
    "mope_fast": _series("mope_fast", "#0072b2", "o"),
    "paper-literal": _series("paper-literal", "#d55e00", "s"),
    STATIC: _series(STATIC, "#009e73", "^"),
}
"""Provider -> style, for plots along an axis."""
BOTH_WAYS = {
    ("K", "mope_fast"): Series("more experts, mope_fast", "#0072b2", "o"),
    (LENGTH, "mope_fast"): Series("longer prompts, mope_fast", "#e69f00", "D"),
    ("K", "paper-literal"): Series("more experts, paper-literal", "#d55e00", "s"),
    (LENGTH, "paper-literal"): Series("longer prompts, paper-literal", "#cc79a7", "v"),
    (LENGTH, STATIC): Series("longer prompts, VPT-deep", "#009e73", "^"),
}
"""(curve, provider) -> style, for plots over trained parameters."""


class Place(NamedTuple):
    """A point with its spread."""

    x: float
    y: float
    low: float
    high: float


def _taxes(rows: Iterable[Row], x: str) -> list[Place]:
    return sorted(Place(row.info[x], *(row.info[name] for name in ("tax", "tax_low", "tax_high"))) for row in rows)


def _new_figure(rows: int, columns: int, title: str):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(0.6 + 4.1 * columns, 0.9 + 3.3 * rows), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=10)
    return figure, axes


def _draw(axes, series: Series, places: Sequence[Place]) -> None:
    """Draw a line with its band and markers."""
    if not places:
        return
    xs, ys, lows, highs = zip(*places, strict=True)
    axes.plot(xs, ys, color=series.colour, marker=series.marker, markersize=5, linewidth=1.6, label=series.label)
    axes.fill_between(xs, lows, highs, color=series.colour, alpha=0.18, linewidth=0)


def _dress(axes, title: str, x_label: str, y_label: str) -> None:
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.5, color="#dddddd")
    axes.set_axisbelow(True)


def _ticks_at(axes, values: Iterable[float]) -> None:
    """Make the horizontal axis logarithmic, with ticks at the points."""
    from matplotlib.ticker import NullLocator

    values = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, labels=[f"{value:g}" for value in values], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())


def _count_parameters(axes) -> None:
    """Label the horizontal axis with numbers of parameters; it is logarithmic if they span more than a factor of four."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.dataLim.intervalx
    axes.set_xlabel("trained parameters, millions", fontsize=9)
    if high > 4 * low:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g}"))


def _over_the_frozen(axes) -> None:
    """Scale the axis of taxes, with a line at one; it is logarithmic if it reaches beyond 2.5."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axes.axhline(1.0, color="#333333", linewidth=0.8)
    if axes.get_ylim()[1] > 2.5:
        axes.set_yscale("log", base=2)
        axes.set_ylim(bottom=min(0.9, axes.get_ylim()[0]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6))


def write_svg(figure, path: Path, **metadata: str) -> Path:
    """Write an SVG reproducibly: the same picture gives the same bytes with the same matplotlib."""
    import matplotlib
    from matplotlib import pyplot

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mope_fast"}):
        figure.savefig(data, format="svg", metadata={"Date": None, **metadata})
    pyplot.close(figure)
    write_atomically(path, data.getvalue())
    return path


def _save(figure, axes: Iterable[Any], path: Path) -> Path:
    handles = {label: handle for each in axes for handle, label in zip(*each.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(3, len(handles)), fontsize=8, frameon=False)
    return write_svg(figure, path)


def _timings_and_modes(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    rows = list(rows)
    return tuple(list(dict.fromkeys(sorted(row.info[name] for row in rows))) for name in ("timing", "mode"))


def _told(row: Row, *held: str) -> str:
    """Describe the model and the sizes that are the same at all points."""
    return ", ".join([row.info["model"], *(f"{name}={row.info[name]}" for name in held), row.info["dtype"]])


def plot_axis(rows: Sequence[Row], axis: str, path: Path, device: str) -> Path:
    """Plot taxes of every provider along K, L, B or S; along K the optimizer's share has its own panel."""
    timings, modes = _timings_and_modes(rows)
    panels = [*modes, OPTIMIZER] if axis == "K" and TRAINING in modes else modes
    told = _told(rows[0], *(name for name in AXES if name != axis))
    figure, grid = _new_figure(len(timings), len(panels), f"{told}\n{device}")
    ticks = [row.info[axis] for row in rows]
    for line, timing in zip(grid, timings, strict=True):
        for axes, mode in zip(line, panels, strict=True):
            if mode == OPTIMIZER:
                places = _taxes(on_axis(rows, axis, OPTIMIZER, TRAINING, timing), axis)
                _draw(axes, Series("AdamW's step, apart", "#e69f00", "D"), places)
                _dress(axes, f"AdamW's step alone, {timing}", AXIS_TITLES[axis], "over the frozen training step")
                _ticks_at(axes, ticks)
                axes.set_ylim(bottom=0)
                continue
            for provider, series in SERIES.items():
                if provider != STATIC or axis == "L":
                    _draw(axes, series, _taxes(on_axis(rows, axis, provider, mode, timing), axis))
            _dress(axes, f"{mode}, {timing}", AXIS_TITLES[axis], OVER_THE_FROZEN)
            _ticks_at(axes, ticks)
            _over_the_frozen(axes)
    return _save(figure, grid.flat, path)


def plot_both_ways(rows: Sequence[Row], path: Path, device: str) -> Path:
    """Plot taxes over trained parameters, for more experts and for longer prompts."""
    timings, modes = _timings_and_modes(rows)
    start = min((row for row in rows if LENGTH in row.info["axes"]), key=lambda row: row.info["L"])
    told = f"{_told(start, 'B', 'S')}: from {start.info['K']} experts of {start.info['L']} rows"
    figure, grid = _new_figure(len(timings), len(modes), f"{told}\n{device}")
    for line, timing in zip(grid, timings, strict=True):
        for axes, mode in zip(line, modes, strict=True):
            for (axis, provider), series in BOTH_WAYS.items():
                _draw(axes, series, _taxes(on_axis(rows, axis, provider, mode, timing), "trained_parameters"))
            _dress(axes, f"{mode}, {timing}", "", OVER_THE_FROZEN)
            _count_parameters(axes)
            _over_the_frozen(axes)
    return _save(figure, grid.flat, path)


def _over_seeds(runs: Iterable[dict[str, Any]], name: str, times: float) -> list[Place]:
    """Return for each number of trained parameters the mean over seeds, with minimum and maximum."""
    values: dict[int, list[float]] = {}
    for run in runs:
        values.setdefault(run["trained_parameters"], []).append(times * run[name])
    return sorted(Place(x, statistics.fmean(ys), min(ys), max(ys)) for x, ys in values.items())


def plot_accuracy(runs: Sequence[dict[str, Any]], path: Path, device: str) -> Path:
    """Plot test accuracy and training step time over trained parameters for both ways of scaling; bands are minimum to maximum."""
    settings, seeds = runs[0]["settings"], len({run["run"]["seed"] for run in runs})
    told = f"Easy-VQA, {settings['training_questions']:,} questions, epochs: {settings['epochs']}, seeds: {seeds}"
    figure, grid = _new_figure(1, 2, f"{told}\n{device}")
    ways = {
        BOTH_WAYS["K", "mope_fast"]: [run for run in runs if run["run"]["scaled"] == "experts"],
        # both ways start from the same model
        BOTH_WAYS[LENGTH, "mope_fast"]: [run for run in runs if run["run"]["experts"] == LENGTH_EXPERTS],
    }
    for axes, name, times, title in zip(
        grid[0], ("test_accuracy", "step_ms"), (100, 1), ("test accuracy, %", "a training step, ms"), strict=True
    ):
        for series, own in ways.items():
            _draw(axes, series, _over_seeds(own, name, times))
            xs, ys = [run["trained_parameters"] for run in own], [times * run[name] for run in own]
            axes.scatter(xs, ys, s=9, color=series.colour, alpha=0.7)
        _dress(axes, "", "", title)
        _count_parameters(axes)
    constant = 100 * runs[0]["constant_accuracy"]
    grid[0][0].axhline(constant, color="#333333", linewidth=1, linestyle="--", label="best constant answers")
    return _save(figure, grid.flat, path)


def plot_all(results: Results, output: Path) -> list[Path]:
    written, device = [], where(results)
    for model in dict.fromkeys(row.info["model"] for row in results.rows):
        rows, name = [row for row in results.rows if row.info["model"] == model], environment.slug(model)
        for axis in AXES:
            on = [row for row in rows if axis in row.info["axes"]]
            if len({row.info[axis] for row in on}) > 1:
                written.append(plot_axis(on, axis, output / f"{axis.lower()}-{name}.svg", device))
        if any(LENGTH in row.info["axes"] for row in rows):
            on = [row for row in rows if not {"K", LENGTH}.isdisjoint(row.info["axes"])]
            written.append(plot_both_ways(on, output / f"length-{name}.svg", device))
    if results.runs:
        written.append(plot_accuracy(results.runs, output / "accuracy.svg", device))
    return written


def write(files: Sequence[Path], output: Path) -> list[Path]:
    """Write the table and the pictures; return their paths."""
    results = read(files)
    output.mkdir(parents=True, exist_ok=True)
    points = output / "points.csv"
    write_atomically(points, table(results).encode())
    for line in verdicts(results.rows):
        print(line)
    return [points, *plot_all(results, output)]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".json of pytest --benchmark-json, .jsonl of accuracy")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets points.csv and the pictures")
    options = parser.parse_args(words)
    try:
        print(*write(options.files, options.output), sep="\n")
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.scaling_pictures: {error}") from error


if __name__ == "__main__":
    main()
