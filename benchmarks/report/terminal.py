"""The tables that a run prints at its end: all providers of a group next to ours."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import record, scaling_points
from benchmarks.record import FAILED
from benchmarks.report import text
from benchmarks.report.model import Group, Profile, group, merge, optional, parse, speed
from benchmarks.report.profiles import END_TO_END, PROFILES


def time_of(seconds: float) -> str:
    """Format a time with three digits."""
    scale, unit = next(
        (scale, unit) for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")) if seconds * scale >= 1 or unit == "us"
    )
    return f"{float(f'{seconds * scale:.3g}'):g} {unit}"


def _cell(each: Group, name: str) -> str:
    """Format the time with the tax or, if there is none, with the speed relative to the peers."""
    row = each.rows.get(name)
    if row is None:
        return "-"
    faster = optional(speed(each, each.profile.peers, of=name), "{:.2f}x")
    return f"{row.info['tax']:.3f} {time_of(row.median):>8}" if "tax" in row.info else f"{faster} {time_of(row.median):>8}"


def _table(groups: Sequence[Group], profile: Profile) -> Iterator[str]:
    """Yield the table of one size: a line for each provider, a column for each mode and timing."""
    info = groups[0].info
    meaning = (
        f"speed over {profile.peers_text}" if profile.baseline is None else f"time over the {profile.labels[profile.baseline]}'s"
    )
    yield f"{info['op']}, {info['case']}: {meaning}, median time"
    timings = {each.timing for each in groups}
    header = ["", *(each.mode if len(timings) == 1 else f"{each.mode}, {each.timing}" for each in groups)]
    lines = [header]
    for name in dict.fromkeys([*profile.labels, *(name for each in groups for name in each.rows)]):
        rows = [each.rows[name] for each in groups if name in each.rows]
        if rows:
            mark = " *" if any(row.info.get("inexact") for row in rows) else ""
            lines.append([profile.labels.get(name, name) + mark, *(_cell(each, name) for each in groups)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells in lines:
        yield "  " + "  ".join(
            [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        )


def _skipped(skipped: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Yield the skipped measurements by reason."""
    whose: dict[str, dict[str, None]] = {}
    for skip in skipped:
        whose.setdefault(skip["reason"], {})[f"{skip['op']} {skip['provider']}"] = None
    for reason, names in whose.items():
        yield f"{'' if reason.startswith(FAILED) else 'not measured, '}{reason}:"
        yield from textwrap.wrap(", ".join(names), 128, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def tables(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return all tables, the scaling goal's verdicts, numbers outside their bounds, and what was not measured."""
    rows = merge(row for document in documents for row in parse(document))
    lines: list[str] = []
    misses: list[str] = []
    for op in dict.fromkeys(row.info["op"] for row in rows):
        profile = PROFILES.get(op, END_TO_END)  # scaling has the same providers
        groups = group((row for row in rows if row.info["op"] == op), profile)
        for case in dict.fromkeys(each.case for each in groups):
            lines += ["", *_table([each for each in groups if each.case == case], profile)]
        misses += [f"* {op}, {miss}" for each in groups for miss in text.inexact(each.rows.values(), profile)]
    lines += ["", *scaling_points.verdicts(row for row in rows if row.info["op"] == scaling_points.OP)]
    lines += [*misses, *_skipped(record.skips(documents))]
    return "\n".join(lines).strip("\n")
