"""A report's plots."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.cases.models import INFERENCE
from benchmarks.report.model import Group, Profile, Ratio, Row
from benchmarks.report.text import TIMING_TITLES

RATIO_COLOURS = {"called": ("#9ec5e8", "#1f6fb4"), "replay": ("#e3c29b", "#c98a3c")}
"""Light color for the mode without a backward pass, dark for the one with it."""


def _new_axes(groups: Sequence[Group], profile: Profile):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(max(7.0, 1.55 * len(groups) + 2), 4.4), layout="constrained")
    axes.set_xticks(range(len(groups)), [profile.axis_label(each.case) for each in groups], fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", linewidth=0.6, color="#dddddd")
    return figure, axes


def _finish(figure, axes, path: Path, title: str) -> str:
    import matplotlib
    from matplotlib import pyplot

    axes.set_title(title, fontsize=10)
    columns = max(2, min(5, int(figure.get_figwidth() / 2.3)))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):  # makes the file's bytes reproducible
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path.name


class Bar(NamedTuple):
    """One provider at one size: a height and the ends of its whisker."""

    height: float
    low: float
    high: float


def _plot_providers(
    axes, groups: Sequence[Group], profile: Profile, bar: Callable[[Row], Bar], labelled: bool
) -> list[tuple[float, float, Row]]:
    """Draw bars with whiskers for every provider of every group; return the left and right end of each bar."""
    width = 0.84 / max(len(each.rows) for each in groups)
    placed: dict[str, list[tuple[float, Row]]] = {name: [] for name in profile.labels}
    for x, each in enumerate(groups):
        for i, name in enumerate(name for name in profile.labels if name in each.rows):
            placed[name].append((x + (i - (len(each.rows) - 1) / 2) * width, each.rows[name]))
    for name, present in placed.items():
        if present:
            places, bars = [x for x, _ in present], [bar(row) for _, row in present]
            heights = [bar.height for bar in bars]
            whiskers = [[bar.height - bar.low for bar in bars], [bar.high - bar.height for bar in bars]]
            drawn = axes.bar(places, heights, 0.92 * width, color=profile.colours[name], label=profile.labels[name])
            axes.errorbar(places, heights, whiskers, fmt="none", ecolor="#333333", elinewidth=0.8)
            if labelled:
                axes.bar_label(drawn, fmt="%.3f", fontsize=6, padding=6, rotation=90)
    return [(x - 0.46 * width, x + 0.46 * width, row) for present in placed.values() for x, row in present]


def plot_times(groups: Sequence[Group], profile: Profile, path: Path, device: str) -> str:
    """Plot the median time of every provider, with quartiles as whiskers, on a log axis."""
    from matplotlib.ticker import LogFormatter

    def bar(row: Row) -> Bar:
        return Bar(*(seconds * 1e6 for seconds in (row.median, *row.quartiles)))

    figure, axes = _new_axes(groups, profile)
    _plot_providers(axes, groups, profile, bar, labelled=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(LogFormatter())  # labels between decades if there are few decades
    axes.set_ylabel("median time of a call, us")
    return _finish(figure, axes, path, f"{profile.op} {groups[0].mode}, {TIMING_TITLES[groups[0].timing]}\n{device}")


def plot_taxes(groups: Sequence[Group], profile: Profile, path: Path, device: str) -> str:
    """Plot every provider's time relative to the baseline's, with the spread over rounds, a line at one and the ratio of tokens."""

    def bar(row: Row) -> Bar:
        return Bar(*(row.info[name] for name in ("tax", "tax_low", "tax_high")))

    figure, axes = _new_axes(groups, profile)
    placed = _plot_providers(axes, groups, profile, bar, labelled=True)
    if counted := [(row.info["token_ratio"], *ends) for *ends, row in placed if row.info.get("token_ratio", 1) != 1]:
        axes.hlines(*zip(*counted, strict=True), color="#d62728", linewidth=1.2, label="its tokens over the baseline's")
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_ylabel(f"time over that of the {profile.labels[profile.baseline]}")
    return _finish(figure, axes, path, f"{profile.op} {groups[0].mode}, {TIMING_TITLES[groups[0].timing]}\n{device}")


def plot_ratio(groups: Sequence[Group], profile: Profile, path: Path, device: str, ratio: Ratio) -> str:
    """Plot bars for every mode and timing, and a line at one."""
    cases = list({each.case: each for each in groups}.values())
    figure, axes = _new_axes(cases, profile)
    place = {each.case: x for x, each in enumerate(cases)}
    series = list(dict.fromkeys((g.mode, g.timing) for g in groups))
    width = 0.84 / len(series)
    for i, (mode, timing) in enumerate(series):
        values = [(place[g.case], ratio.value(g)) for g in groups if (g.mode, g.timing) == (mode, timing)]
        shown = [(x, y) for x, y in values if y is not None]
        bars = axes.bar(
            [x + (i - (len(series) - 1) / 2) * width for x, _ in shown], [y for _, y in shown], 0.92 * width,
            color=RATIO_COLOURS[timing][mode not in ("forward", INFERENCE)], label=f"{mode}, {timing}",
        )  # fmt: skip
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axes.axhline(1.0, color="#333333", linewidth=0.8)
    axes.margins(y=0.1)
    axes.set_ylabel(ratio.axis)
    return _finish(figure, axes, path, f"{ratio.title}\n{device}")


def plot_all(groups: Sequence[Group], profile: Profile, output: Path) -> list[str]:
    device = groups[0].info["device"]
    names = []
    for mode, timing in dict.fromkeys((g.mode, g.timing) for g in groups):
        chosen = [g for g in groups if (g.mode, g.timing) == (mode, timing)]
        plot, kind = (plot_times, "times") if profile.baseline is None else (plot_taxes, "taxes")
        names.append(plot(chosen, profile, output / f"{kind}_{mode.replace('+', '_')}_{timing}.svg", device))
    for ratio in profile.ratios:
        if any(ratio.value(each) is not None for each in groups):
            names.append(plot_ratio(groups, profile, output / ratio.file, device, ratio))
    return names
