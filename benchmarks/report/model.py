"""Saved results as rows and groups, and how a report shows and judges them: profiles and goals."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks import record


@dataclass(frozen=True)
class Row:
    """One provider at one size, in seconds per call."""

    info: dict[str, Any]
    median: float
    quartiles: tuple[float, float]

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(self.info[name] for name in ("device", "op", "mode", "timing", "case", "provider"))

    @property
    def gbps(self) -> float:
        return self.info["bytes"] / self.median / 1e9

    @property
    def copy_share(self) -> float:
        return self.gbps / self.info["copy_bandwidth_gbps"]

    @property
    def tflops(self) -> float:
        return self.info["flops"] / self.median / 1e12

    @property
    def roofline_share(self) -> float | None:
        """Share of the roofline: the larger of the shares of the copy bandwidth and of the arithmetic peak."""
        if self.info.get("peak_dtype") != self.info["dtype"]:
            return None
        return max(self.copy_share, self.tflops / self.info["peak_tflops"])


class Skip(NamedTuple):
    """A measurement that was not made."""

    op: str
    mode: str
    timing: str
    case: str
    provider: str
    reason: str


@dataclass(frozen=True)
class Group:
    """All providers of one mode, timing and size."""

    mode: str
    timing: str
    case: str
    rows: dict[str, Row]
    profile: "Profile"

    @property
    def ours(self) -> Row | None:
        return self.rows.get(self.profile.ours)

    @property
    def info(self) -> dict[str, Any]:
        return next(iter(self.rows.values())).info

    def best(self, names: Iterable[str]) -> Row | None:
        return min((self.rows[name] for name in names if name in self.rows), key=lambda row: row.median, default=None)


@dataclass(frozen=True)
class Goal:
    """A bound on ``measure`` over the groups of one mode and timing that ``fits`` accepts."""

    text: str
    device_type: str
    mode: str
    timing: str
    fits: Callable[[dict[str, Any]], bool]
    measure: Callable[[Group], float | None]
    bound: float
    level: Callable[[Group], bool] = lambda group: False
    """Returns True if a missed bound is too close to call."""
    summary: bool = False
    """Report all sizes in one line, with the worst one."""
    at_most: bool = False
    """True for an upper bound, False for a lower one."""
    closing: str = ""
    """What would close the gap if the goal is missed."""

    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"

    def excess(self, value: float) -> float:
        """Return the relative amount by which the bound is missed; at most 0 if it is met."""
        return value / self.bound - 1 if self.at_most else 1 - value / self.bound


@dataclass(frozen=True)
class Profile:
    """How the results of one op are shown and judged."""

    op: str
    labels: Mapping[str, str]
    """Label of every provider, in the order of tables and pictures."""
    colours: Mapping[str, str]
    ours: str
    peers: tuple[str, ...]
    """Providers whose best the speed column is relative to."""
    peers_text: str
    rivals: Callable[[Group], Sequence[str]]
    """Returns the providers that ours should not be slower than."""
    columns: Mapping[str, Callable[[Row], str]]
    """Columns of the results table after the times."""
    goals: Sequence[Goal]
    notes: str
    """Meaning of the columns, printed under the report's head."""
    ratios: Sequence["Ratio"]
    axis_label: Callable[[str], str]
    """Breaks a size's name into short lines."""
    title: str = ""
    """Title of the op's section on the page about all ops; for ops with a baseline."""
    baseline: str | None = None
    """The provider that all were timed in turns with, if any: taxes relative to it are shown instead of times."""
    table_per_mode: bool = False
    """True for a table of taxes per mode instead of one for all modes of a size."""

    def label(self, row: Row) -> str:
        name = row.info["provider"]
        return self.labels.get(name, name)


class Ratio(NamedTuple):
    """A plot of ``value`` for every mode and timing."""

    file: str
    title: str
    axis: str
    value: Callable[[Group], float | None]


def parse(document: dict[str, Any]) -> list[Row]:
    rows = []
    for entry in document["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        calls = info["calls_per_iteration"]
        rows.append(Row(info, stats["median"] / calls, (stats["q1"] / calls, stats["q3"] / calls)))
    return rows


def parse_skipped(documents: Iterable[dict[str, Any]]) -> list[Skip]:
    """Return the measurements that none of the documents has."""
    return [Skip(**entry) for entry in record.skips(documents)]


def by_key(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Group the runs of each measurement."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(row.key, []).append(row)
    return runs


def merge(rows: Iterable[Row]) -> list[Row]:
    """Merge runs to one row per key: the medians over runs of the median, each quartile, the taxes and the device's peaks."""
    return [_middle(same) for same in by_key(rows).values()]


def _middle(same: Sequence[Row]) -> Row:
    middles = {
        name: statistics.median(row.info[name] for row in same)
        for name in ("copy_bandwidth_gbps", "peak_tflops", "tax", "tax_low", "tax_high", "excess", "memory_tax")
        if name in same[-1].info
    }
    low, high = (statistics.median(row.quartiles[i] for row in same) for i in (0, 1))
    return Row(same[-1].info | middles | {"runs": len(same)}, statistics.median(row.median for row in same), (low, high))


def group(rows: Iterable[Row], profile: Profile) -> list[Group]:
    groups: dict[tuple[str, str, str], Group] = {}
    for row in rows:
        key = (row.info["mode"], row.info["timing"], row.info["case"])
        groups.setdefault(key, Group(*key, {}, profile)).rows[row.info["provider"]] = row
    return list(groups.values())


def distinct(rows: Iterable[Row], name: str) -> str:
    return ", ".join(sorted({str(row.info[name]) for row in rows}))


def optional(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def speed(group: Group, names: Iterable[str], of: str | None = None) -> float | None:
    """Return the speed of ours, or of the provider ``of``, relative to the best of ``names``."""
    best, row = group.best(names), group.rows.get(of or group.profile.ours)
    return None if best is None or row is None else best.median / row.median


def overlap(group: Group, names: Iterable[str], of: str | None = None) -> bool:
    """Return whether the lower quartile of ours, or of the provider ``of``, is within the upper one of the best of ``names``."""
    best, row = group.best(names), group.rows.get(of or group.profile.ours)
    return best is not None and row is not None and row.quartiles[0] <= best.quartiles[1]
