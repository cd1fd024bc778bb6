"""Turn saved pytest-benchmark JSON into a Markdown table and plots: ``python -m benchmarks.report FILE.json [...] --output DIR``.

Several files are repeated runs or shards of one device's suite: a size measured more than once gets the median of its medians.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.baselines.route_and_mix import COMPILED, EAGER, NAMES, OURS

(OUR_NAME,) = OURS
TIMING_TITLES = {"called": "as called from Python", "replay": "one call's share of a CUDA graph"}
LABELS = {
    "literal": "paper-literal eager",
    "matmul": "matmul eager",
    "literal-compiled": "paper-literal, torch.compile",
    "matmul-compiled": "matmul, torch.compile",
    OUR_NAME: "mope_fast",
}
COLOURS = dict(zip(NAMES, ["#b0b7c3", "#6b7a90", "#e3c29b", "#c98a3c", "#1f6fb4"], strict=True))
RATIO_COLOURS = {
    ("forward", "called"): "#9ec5e8",
    ("forward+backward", "called"): "#1f6fb4",
    ("forward", "replay"): "#e3c29b",
    ("forward+backward", "replay"): "#c98a3c",
}
PAPER_SIZE = {"B": 64, "K": 16, "L": 6, "M": 768, "gram": False}
LARGE_SIZE = {"B": 8192, "K": 16, "L": 6, "M": 768, "gram": False}


@dataclass(frozen=True)
class Row:
    """One provider at one size, in seconds per call."""

    info: dict[str, Any]
    median: float
    quartiles: tuple[float, float]

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.info[name] for name in ("device", "mode", "timing", "case", "provider"))

    @property
    def gbps(self) -> float:
        return self.info["bytes"] / self.median / 1e9

    @property
    def copy_share(self) -> float:
        return self.gbps / self.info["copy_bandwidth_gbps"]


@dataclass(frozen=True)
class Group:
    """All providers of one mode, timing and size."""

    mode: str
    timing: str
    case: str
    rows: dict[str, Row]

    @property
    def ours(self) -> Row | None:
        return self.rows.get(OUR_NAME)

    def best(self, names: Iterable[str]) -> Row | None:
        return min((self.rows[name] for name in names if name in self.rows), key=lambda row: row.median, default=None)

    def fits(self, size: dict[str, Any]) -> bool:
        info = next(iter(self.rows.values())).info
        return all(info[name] == value for name, value in size.items())


@dataclass(frozen=True)
class Goal:
    """A bound on ``measure`` over the groups of one mode and timing; ``size`` None takes every size."""

    text: str
    device_type: str
    mode: str
    timing: str
    size: dict[str, Any] | None
    measure: Callable[[Group], float | None]
    at_least: float


def parse(document: dict[str, Any]) -> list[Row]:
    rows = []
    for entry in document["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        calls = info["calls_per_iteration"]
        rows.append(Row(info, stats["median"] / calls, (stats["q1"] / calls, stats["q3"] / calls)))
    return rows


def merge(rows: Iterable[Row]) -> list[Row]:
    """One row a key: the median over runs of the median, of each quartile and of the copy bandwidth."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(row.key, []).append(row)
    return [_middle(same) for same in runs.values()]


def _middle(same: Sequence[Row]) -> Row:
    copy = statistics.median(row.info["copy_bandwidth_gbps"] for row in same)
    low, high = (statistics.median(row.quartiles[i] for row in same) for i in (0, 1))
    info = same[-1].info | {"copy_bandwidth_gbps": copy, "runs": len(same)}
    return Row(info, statistics.median(row.median for row in same), (low, high))


def group(rows: Iterable[Row]) -> list[Group]:
    groups: dict[tuple[str, str, str], Group] = {}
    for row in rows:
        key = (row.info["mode"], row.info["timing"], row.info["case"])
        groups.setdefault(key, Group(*key, {})).rows[row.info["provider"]] = row
    return list(groups.values())


def speedup(group: Group, names: Iterable[str] = EAGER) -> float | None:
    """How many times faster ours is than the best of ``names``."""
    best = group.best(names)
    return None if best is None or group.ours is None else best.median / group.ours.median


def within_spread(group: Group) -> bool:
    """Ours and the best eager form differ by less than their quartiles overlap."""
    best = group.best(EAGER)
    return best is not None and group.ours is not None and group.ours.quartiles[0] <= best.quartiles[1]


def _against_compiled(group: Group) -> float | None:
    return speedup(group, COMPILED)


def _copy_share(group: Group) -> float | None:
    return None if group.ours is None else group.ours.copy_share


BOTH = "forward+backward"
GOALS = [
    Goal("the best eager form, paper's size", "cuda", BOTH, "replay", PAPER_SIZE, speedup, 2.5),
    Goal("the best eager form, paper's size", "cuda", BOTH, "called", PAPER_SIZE, speedup, 1.2),
    Goal("the best torch.compile, paper's size", "cuda", BOTH, "replay", PAPER_SIZE, _against_compiled, 1.5),
    Goal("copy bandwidth, B=8192 K=16", "cuda", "forward", "replay", LARGE_SIZE, _copy_share, 0.85),
    Goal("copy bandwidth, B=8192 K=16", "cuda", BOTH, "replay", LARGE_SIZE, _copy_share, 0.70),
    Goal("not slower than the best eager form", "cpu", "forward", "called", None, speedup, 1.0),
    Goal("not slower than the best eager form", "cpu", BOTH, "called", None, speedup, 1.0),
]


def verdict(goal: Goal, group: Group) -> tuple[float | None, str]:
    value = goal.measure(group)
    if value is None:
        return None, "not measured"
    if value >= goal.at_least:
        return value, "met"
    if goal.at_least == 1.0 and within_spread(group):
        return value, "level (quartiles overlap)"
    return value, f"missed by {1 - value / goal.at_least:.0%}"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _cells(group: Group, row: Row, repeated: bool) -> list[str]:
    best, memory = group.best(EAGER), row.info["peak_memory"]
    return [
        "" if repeated else group.case,
        LABELS[row.info["provider"]],
        f"{row.median * 1e6:.1f}",
        f"{row.quartiles[0] * 1e6:.1f} - {row.quartiles[1] * 1e6:.1f}",
        _optional(None if best is None else best.median / row.median, "{:.2f}x"),
        f"{row.gbps:.1f}",
        f"{row.copy_share:.1%}",
        _optional(None if memory is None else memory / 2**20, "{:.1f}"),
    ]


def results_table(groups: Iterable[Group]) -> str:
    header = ["size", "provider", "median us", "quartiles us", "speed / best eager", "GB/s", "of copy", "peak MiB"]
    lines = []
    for each in groups:
        rows = [each.rows[name] for name in NAMES if name in each.rows]
        lines += [_cells(each, row, repeated=i > 0) for i, row in enumerate(rows)]
    return table(header, lines)


def losses(groups: Iterable[Group]) -> list[str]:
    """A sentence for every size at which some provider is faster than ours."""
    lines = []
    for each in groups:
        best = each.best([*EAGER, *COMPILED])
        if best is None or each.ours is None or best.median >= each.ours.median:
            continue
        note = "; the quartiles overlap" if each.ours.quartiles[0] <= best.quartiles[1] else ""
        lines.append(
            f"{each.mode}, {each.timing}, {each.case}: {LABELS[best.info['provider']]} takes {best.median * 1e6:.1f} us, "
            f"mope_fast {each.ours.median * 1e6:.1f} us ({each.ours.median / best.median - 1:.0%} more{note})"
        )
    return lines


def goals_table(groups: Sequence[Group], device_type: str) -> str:
    lines = []
    for goal in GOALS:
        fitting = [g for g in groups if (g.mode, g.timing) == (goal.mode, goal.timing) and (not goal.size or g.fits(goal.size))]
        if goal.device_type != device_type:
            continue
        name = [goal.text, f"{goal.mode}, {goal.timing}"]
        if not fitting:
            lines.append([*name, "-", f">= {goal.at_least:g}", "-", "not measured"])
        for each in fitting:
            value, answer = verdict(goal, each)
            lines.append([*name, each.case, f">= {goal.at_least:g}", _optional(value, "{:.2f}"), answer])
    return table(["goal", "mode", "size", "wanted", "measured", "verdict"], lines)


def _distinct(rows: Iterable[Row], name: str) -> str:
    return ", ".join(sorted({str(row.info[name]) for row in rows}))


def preamble(rows: Sequence[Row]) -> str:
    versions = ", ".join(f"{name} {_distinct(rows, name)}" for name in ("torch", "triton", "mope_fast", "python"))
    copies = [row.info["copy_bandwidth_gbps"] for row in rows]
    ours = [row for row in rows if row.info["provider"] == OUR_NAME]
    return "\n".join(
        [
            f"Device: {_distinct(rows, 'device')}. {versions}.",
            f"Measured {_distinct(rows, 'date')} at commit {_distinct(rows, 'commit')}; runs: {_distinct(rows, 'runs')}. "
            f"Times are {_distinct(rows, 'clock')} with {_distinct(rows, 'cpu_threads')} CPU thread(s).",
            f"Copy bandwidth measured beside it: {min(copies):.4g} to {max(copies):.4g} GB/s, read plus written.",
            f'`mope_fast` is `impl="auto"`, which ran as: {_distinct(ours, "implementation")}.',
            f"State of the cache when a call begins: {_distinct(rows, 'l2')}.",
            "",
            "Every provider's outputs and gradients were checked against float64 before it was timed. GB/s counts each input read",
            "once and each output written once; a share of copy above 100 % means that caches served some of it.",
        ]
    )


def markdown(rows: Sequence[Row], pictures: Sequence[str]) -> str:
    groups = group(rows)
    parts = [f"# route_and_mix on {_distinct(rows, 'device')}", preamble(rows)]
    for mode, timing in dict.fromkeys((g.mode, g.timing) for g in groups):
        chosen = [g for g in groups if (g.mode, g.timing) == (mode, timing)]
        parts += [f"## {mode}, {TIMING_TITLES[timing]}", results_table(chosen)]
    parts += ["## Goals", goals_table(groups, rows[0].info["device_type"])]
    parts += ["## Where mope_fast loses", "\n".join(f"- {line}" for line in losses(groups)) or "At no size measured."]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def _axis_labels(groups: Sequence[Group]) -> list[str]:
    """Sizes on short lines."""
    return [each.case.replace(" L=", "\nL=").replace(" gram", "\ngram") for each in groups]


def _new_axes(groups: Sequence[Group]):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.55 * len(groups) + 2), 4.4), layout="constrained")
    axes.set_xticks(range(len(groups)), _axis_labels(groups), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", linewidth=0.6, color="#dddddd")
    return figure, axes


def _finish(figure, axes, path: Path, title: str) -> str:
    from matplotlib import pyplot

    axes.set_title(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.name


def plot_times(groups: Sequence[Group], path: Path, device: str) -> str:
    """Bars of the median time of every provider, with quartiles as whiskers, on a log axis."""
    figure, axes = _new_axes(groups)
    width = 0.84 / max(len(each.rows) for each in groups)
    bars: dict[str, list[tuple[float, Row]]] = {name: [] for name in NAMES}
    for x, each in enumerate(groups):
        for i, name in enumerate(name for name in NAMES if name in each.rows):
            bars[name].append((x + (i - (len(each.rows) - 1) / 2) * width, each.rows[name]))
    for name, present in bars.items():
        if present:
            places, heights = zip(*((x, row.median * 1e6) for x, row in present), strict=True)
            whiskers = [[abs(row.median - row.quartiles[side]) * 1e6 for _, row in present] for side in (0, 1)]
            axes.bar(places, heights, 0.92 * width, color=COLOURS[name], label=LABELS[name])
            axes.errorbar(places, heights, whiskers, fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.set_ylabel("median time of a call, us")
    return _finish(figure, axes, path, f"route_and_mix {groups[0].mode}, {TIMING_TITLES[groups[0].timing]}\n{device}")


def plot_ratio(groups: Sequence[Group], path: Path, title: str, label: str, value: Callable[[Group], float | None]) -> str:
    """Bars of ``value`` for every mode and timing; a line at one."""
    cases = list({each.case: each for each in groups}.values())
    figure, axes = _new_axes(cases)
    place = {each.case: x for x, each in enumerate(cases)}
    series = list(dict.fromkeys((g.mode, g.timing) for g in groups))
    width = 0.84 / len(series)
    for i, (mode, timing) in enumerate(series):
        shown = [(place[g.case], value(g)) for g in groups if (g.mode, g.timing) == (mode, timing) and value(g) is not None]
        bars = axes.bar(
            [x + (i - (len(series) - 1) / 2) * width for x, _ in shown], [y for _, y in shown], 0.92 * width,
            color=RATIO_COLOURS[mode, timing], label=f"{mode}, {timing}",
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.margins(y=0.1)
    axes.set_ylabel(label)
    return _finish(figure, axes, path, title)


def plot_all(rows: Sequence[Row], output: Path) -> list[str]:
    groups, device = group(rows), _distinct(rows, "device")
    names = []
    for mode, timing in dict.fromkeys((g.mode, g.timing) for g in groups):
        chosen = [g for g in groups if (g.mode, g.timing) == (mode, timing)]
        names.append(plot_times(chosen, output / f"times_{mode.replace('+', '_')}_{timing}.png", device))
    if any(speedup(g) is not None for g in groups):
        title = f"Speed of mope_fast over the best eager form\n{device}"
        names.append(plot_ratio(groups, output / "speedup.png", title, "times the speed of the best eager form", speedup))
        title = f"mope_fast: compulsory bytes a second, as a share of a large copy's\n{device}"
        names.append(plot_ratio(groups, output / "copy_share.png", title, "share of copy bandwidth", _copy_share))
    return names


def write(files: Sequence[Path], output: Path) -> Path:
    rows = merge(row for file in files for row in parse(json.loads(file.read_text())))
    if not rows:
        raise SystemExit(f"no benchmark in {', '.join(map(str, files))}")
    if len({row.info["device"] for row in rows}) > 1:
        raise SystemExit(f"one report is about one device, these files are from {_distinct(rows, 'device')}")
    output.mkdir(parents=True, exist_ok=True)
    report = output / "report.md"
    report.write_text(markdown(rows, plot_all(rows, output)))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="saved with pytest --benchmark-json")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets report.md and the plots")
    options = parser.parse_args()
    print(write(options.files, options.output))


if __name__ == "__main__":
    main()
