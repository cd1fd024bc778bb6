"""A report's plots."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.model import Group, Profile, Ratio, Row
from benchmarks.report.text import TIMING_TITLES

RATIO_COLOURS = {
    ("forward", "called"): "#9ec5e8",
    ("forward+backward", "called"): "#1f6fb4",
    ("forward", "replay"): "#e3c29b",
    ("forward+backward", "replay"): "#c98a3c",
}


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
    from matplotlib import pyplot

    axes.set_title(title, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.name


def plot_times(groups: Sequence[Group], profile: Profile, path: Path, device: str) -> str:
    """Bars of the median time of every provider, with quartiles as whiskers, on a log axis."""
    from matplotlib.ticker import LogFormatter

    figure, axes = _new_axes(groups, profile)
    width = 0.84 / max(len(each.rows) for each in groups)
    bars: dict[str, list[tuple[float, Row]]] = {name: [] for name in profile.labels}
    for x, each in enumerate(groups):
        for i, name in enumerate(name for name in profile.labels if name in each.rows):
            bars[name].append((x + (i - (len(each.rows) - 1) / 2) * width, each.rows[name]))
    for name, present in bars.items():
        if present:
            places, heights = zip(*((x, row.median * 1e6) for x, row in present), strict=True)
            whiskers = [[abs(row.median - row.quartiles[side]) * 1e6 for _, row in present] for side in (0, 1)]
            axes.bar(places, heights, 0.92 * width, color=profile.colours[name], label=profile.labels[name])
            axes.errorbar(places, heights, whiskers, fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.yaxis.set_minor_formatter(LogFormatter())  # between the decades where there are few
    axes.set_ylabel("median time of a call, us")
    return _finish(figure, axes, path, f"{profile.op} {groups[0].mode}, {TIMING_TITLES[groups[0].timing]}\n{device}")


def plot_ratio(groups: Sequence[Group], profile: Profile, path: Path, device: str, ratio: Ratio) -> str:
    """Bars for every mode and timing; a line at one."""
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
            color=RATIO_COLOURS[mode, timing], label=f"{mode}, {timing}",
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
        names.append(plot_times(chosen, profile, output / f"times_{mode.replace('+', '_')}_{timing}.png", device))
    for ratio in profile.ratios:
        if any(ratio.value(each) is not None for each in groups):
            names.append(plot_ratio(groups, profile, output / ratio.file, device, ratio))
    return names
