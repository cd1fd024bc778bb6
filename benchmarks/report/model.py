"""Saved results as rows and groups, and what a report says about them: goals and profiles."""

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
        """Of the faster of two impossible devices: one that only copies, one that only multiplies."""
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
    """Too close to call, where the bound is missed."""
    summary: bool = False
    """One line for all sizes, about the worst."""
    at_most: bool = False
    """Bounded from above, not from below."""
    closing: str = ""
    """What would close the gap, where it is missed."""

    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"

    def excess(self, value: float) -> float:
        """By which share the bound is missed; at most 0 if it is met."""
        return value / self.bound - 1 if self.at_most else 1 - value / self.bound


@dataclass(frozen=True)
class Profile:
    """How the results of one op are shown and judged."""

    op: str
    labels: Mapping[str, str]
    """For every provider, in the order of tables and pictures."""
    colours: Mapping[str, str]
    ours: str
    peers: tuple[str, ...]
    """Whose best the speed column is relative to."""
    peers_text: str
    rivals: Callable[[Group], Sequence[str]]
    """Those that ours should not lose to."""
    columns: Mapping[str, Callable[[Row], str]]
    """Of the results table, after the times."""
    goals: Sequence[Goal]
    notes: str
    """What the columns mean, under the report's head."""
    ratios: Sequence["Ratio"]
    axis_label: Callable[[str], str]
    """A size on short lines."""
    title: str = ""
    """Of its part of the page about all ops, where there are taxes."""
    baseline: str | None = None
    """The provider in turns with which all were timed, if they were: taxes on it are shown in place of times."""
    table_per_mode: bool = False
    """Of taxes: not one table for all modes of a size."""

    def label(self, row: Row) -> str:
        name = row.info["provider"]
        return self.labels.get(name, name)


class Ratio(NamedTuple):
    """A picture of ``value`` for every mode and timing."""

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
    """What none of them has."""
    return [Skip(**entry) for entry in record.skips(documents)]


def by_key(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """The runs of each measurement."""
    runs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(row.key, []).append(row)
    return runs


def merge(rows: Iterable[Row]) -> list[Row]:
    """One row a key: the median over runs of the median, of each quartile, of the taxes and of the device's peaks."""
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
    """How many times faster ours, or the provider ``of``, is than the best of ``names``."""
    best, row = group.best(names), group.rows.get(of or group.profile.ours)
    return None if best is None or row is None else best.median / row.median


def overlap(group: Group, names: Iterable[str], of: str | None = None) -> bool:
    """Ours, or the provider ``of``, and the best of ``names`` differ by less than their quartiles overlap."""
    best, row = group.best(names), group.rows.get(of or group.profile.ours)
    return best is not None and row is not None and row.quartiles[0] <= best.quartiles[1]
