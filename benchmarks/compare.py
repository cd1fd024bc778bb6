"""List the measurements that got slower between two sets of results by more than their spread explains.

    python -m benchmarks.compare OLD NEW

OLD and NEW are files saved with pytest --benchmark-json, or folders of them. If a measurement was timed in turns with a baseline,
its tax is compared, else its time. It is slower, or faster, if the spreads (quartiles of times, 20th to 80th percentile of taxes,
the widest over several runs) don't overlap and the medians differ by more than --least. It takes more memory if its peak grew by
more than --least. On a shared machine one run's spread says little: give folders of several runs, or taxes. The exit status is 1 if
anything got slower, takes more memory, or can't be measured any more.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.report.model import Row, Skip, by_key, parse, parse_skipped

VERDICTS = ("slower", "more memory", "failed now", "faster", "less memory", "the same", "only in new", "only in old")
BAD = VERDICTS[:3]


class Change(NamedTuple):
    """One measurement in the old and new results; None where it wasn't made."""

    verdict: str
    name: str
    old: str | None
    new: str | None
    ratio: float | None


class Spread(NamedTuple):
    """A median between two quantiles."""

    low: float
    middle: float
    high: float


def spread(runs: Sequence[Row]) -> Spread:
    """Return the spread of the tax, or of the seconds: the median of the runs' medians, and the lowest and highest quantile."""
    each = [
        Spread(*(row.info[name] for name in ("tax_low", "tax", "tax_high")))
        if "tax" in row.info
        else Spread(row.quartiles[0], row.median, row.quartiles[1])
        for row in runs
    ]
    return Spread(min(run.low for run in each), statistics.median(run.middle for run in each), max(run.high for run in each))


def compare(old: Sequence[Row], new: Sequence[Row], skipped: Iterable[Skip], least: float) -> list[Change]:
    """Compare every measurement in either set, the worst first; one whose time and memory changed gets two lines.

    Raises:
        ValueError: the sets are from different devices, or timed by different clocks.
    """
    for fact in ("device", "clock"):
        found = [sorted({row.info.get(fact, "wall time") for row in rows}) for rows in (old, new)]
        if old and new and found[0] != found[1]:
            raise ValueError(f"old results have {fact} {', '.join(found[0])}, new ones {', '.join(found[1])}: it must be the same")
    before, after = by_key(old), by_key(new)
    failed = {(s.op, s.mode, s.timing, s.case, s.provider): s.reason for s in skipped}
    changes = []
    for key in {**before, **after}:
        name = " ".join(key[1:])
        if key not in before:
            changes.append(Change("only in new", name, None, _text(after[key]), None))
        elif key not in after:
            reason = failed.get(key[1:])
            changes.append(Change("only in old" if reason is None else "failed now", name, _text(before[key]), reason, None))
        else:
            changes += _changes(name, before[key], after[key], least)
    return sorted(changes, key=lambda change: (VERDICTS.index(change.verdict), -(change.ratio or 0)))


def _changes(name: str, old: Sequence[Row], new: Sequence[Row], least: float) -> list[Change]:
    changes, (a, b) = [], (spread(old), spread(new))
    ratio = b.middle / a.middle
    if b.low > a.high and ratio > 1 + least:
        changes.append(Change("slower", name, _text(old), _text(new), ratio))
    elif b.high < a.low and ratio < 1 / (1 + least):
        changes.append(Change("faster", name, _text(old), _text(new), ratio))
    peaks = [statistics.median(row.info.get("peak_memory", 0) for row in runs) for runs in (old, new)]
    if all(peaks) and not 1 / (1 + least) <= (growth := peaks[1] / peaks[0]) <= 1 + least:
        texts = [f"{peak / 2**20:,.1f} MiB" for peak in peaks]
        changes.append(Change("more memory" if growth > 1 else "less memory", name, *texts, growth))
    return changes or [Change("the same", name, _text(old), _text(new), ratio)]


def _text(runs: Sequence[Row]) -> str:
    middle = spread(runs).middle
    return f"tax {middle:.3f}" if "tax" in runs[0].info else f"{middle * 1e6:,.1f} us"


def render(changes: Sequence[Change]) -> str:
    """Return a line for each change, and the number of each kind; unchanged measurements are only counted."""
    shown = [change for change in changes if change.verdict not in ("the same", "only in new", "only in old")]
    lines = []
    for change in shown:
        ratio = "" if change.ratio is None else f" ({change.ratio:.3f}x)"
        lines.append(f"{change.verdict}: {change.name}: {change.old} -> {change.new}{ratio}")
    counts = [(verdict, sum(change.verdict == verdict for change in changes)) for verdict in VERDICTS]
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in counts if count) or "nothing to compare"])


def read(path: Path) -> tuple[list[Row], list[Skip]]:
    """Read all results of a file, or of a folder's files.

    Raises:
        FileNotFoundError, ValueError: there are no files, or a file has no results of these benchmarks.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} has no *.json: expected results saved with pytest --benchmark-json")
    rows, skipped = [], []
    for file in files:
        try:
            document = json.loads(file.read_text())
            rows += parse(document)
            skipped += parse_skipped([document])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a result of these benchmarks ({type(error).__name__}: {error})") from error
    return rows, skipped


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="file or folder")
    parser.add_argument("new", type=Path, help="file or folder")
    parser.add_argument("--least", type=float, default=0.03, help="smallest relative change to report (default: 0.03)")
    options = parser.parse_args(arguments)
    if not options.least >= 0:
        parser.error(f"--least must be >= 0, got {options.least}")
    try:
        (old, _), (new, skipped) = read(options.old), read(options.new)
        changes = compare(old, new, skipped, options.least)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(render(changes))
    return int(any(change.verdict in BAD for change in changes))


if __name__ == "__main__":
    sys.exit(main())
