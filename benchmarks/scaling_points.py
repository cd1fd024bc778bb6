"""Points of the scaling curves from saved results: one table, and the verdict on the goal."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record, scaling_accuracy
from benchmarks.cases.models import TRAINING
from benchmarks.report.model import Row, Skip, distinct, merge, parse, parse_skipped

OP = "scaling"
FLAT_FROM, FLAT_TO, FLAT_GOAL = 16, 256, 1.02
"""Goal: a forward and backward step with FLAT_TO experts takes at most FLAT_GOAL times that with FLAT_FROM experts."""
FACTS = ("device", "torch", "clock", "commit", "date")
SIZES = ("model", "dtype", "K", "L", "B", "S")
COLUMNS = (
    "kind", *FACTS, "case", *SIZES, "axes", "mode", "timing", "provider", "trained_parameters", "median_ms", "tax", "tax_low",
    "tax_high", "peak_memory_mib", "scaled", "seed", "training_questions", "epochs", "test_accuracy", "constant_accuracy",
    "test_questions", "step_ms", "not_measured",
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """``rows`` are times of the benchmark group, ``runs`` lines of :mod:`benchmarks.scaling_accuracy`."""

    rows: list[Row]
    skipped: list[Skip]
    runs: list[dict[str, Any]]


def read(files: Sequence[Path]) -> Results:
    """Read saved results, and ``.jsonl`` files of accuracy, all from one device.

    Raises:
        ValueError: the files have no point, or are from several devices.
    """
    documents = [record.read(file) for file in files if file.suffix != ".jsonl"]
    rows = merge(row for document in documents for row in parse(document) if row.info["op"] == OP)
    skipped = [skip for skip in parse_skipped(documents) if skip.op == OP]
    runs = [run for file in files if file.suffix == ".jsonl" for run in scaling_accuracy.load(file)]
    names = ", ".join(map(str, files))
    if not rows and not runs:
        raise ValueError(f"no measurement of the group {OP} and no run of benchmarks.scaling_accuracy in {names}")
    if len(devices := {row.info["device"] for row in rows} | {run["device"] for run in runs}) > 1:
        raise ValueError(f"curves are of one device, {names} are from {', '.join(sorted(devices))}: give the files of one device")
    return Results(rows, skipped, runs)


def table(results: Results) -> str:
    """Return all points as CSV: times, accuracies, and points that weren't measured, with the reason."""
    lines = [_of_time(row) for row in results.rows]
    lines += [_of_accuracy(run) for run in results.runs]
    lines += [{"kind": "time", **skip._asdict(), "not_measured": skip.reason} for skip in results.skipped]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _of_time(row: Row) -> dict[str, Any]:
    memory = row.info["peak_memory"]
    return row.info | {
        "kind": "time", "axes": " ".join(row.info["axes"]), "median_ms": row.median * 1e3,
        "peak_memory_mib": None if memory is None else memory / 2**20,
    }  # fmt: skip


def _of_accuracy(run: dict[str, Any]) -> dict[str, Any]:
    own = run["run"]
    return {
        **run,
        **run["settings"],
        **own,
        "kind": "accuracy",
        "K": own["experts"],
        "L": own["length"],
        "B": run["settings"]["batch_size"],
    }


def on_axis(rows: Iterable[Row], axis: str, provider: str, mode: str, timing: str) -> list[Row]:
    """Return a provider's points on a curve, sorted from the smallest."""
    wanted = (provider, mode, timing)
    found = [
        row for row in rows if axis in row.info["axes"] and tuple(row.info[n] for n in ("provider", "mode", "timing")) == wanted
    ]
    return sorted(found, key=lambda row: row.info[axis if axis in row.info else "L"])


def verdicts(rows: Iterable[Row]) -> list[str]:
    """Return for every model a sentence on whether a training step is flat in K."""
    rows, lines = list(rows), []
    for model, timing in dict.fromkeys((row.info["model"], row.info["timing"]) for row in rows):
        of_model = [row for row in rows if row.info["model"] == model]
        by_count = {row.info["K"]: row for row in on_axis(of_model, "K", "mope_fast", TRAINING, timing)}
        if FLAT_FROM not in by_count or FLAT_TO not in by_count:
            continue
        few, many = by_count[FLAT_FROM], by_count[FLAT_TO]
        ratio = many.info["tax"] / few.info["tax"]
        low, high = many.info["tax_low"] / few.info["tax_high"], many.info["tax_high"] / few.info["tax_low"]
        said = "met" if ratio <= FLAT_GOAL else "level" if low <= FLAT_GOAL else "missed"
        lines.append(
            f"{model} B={few.info['B']} {TRAINING} {timing}: {FLAT_FROM} -> {FLAT_TO} experts take {ratio:.3f} times as long "
            f"({low:.3f} - {high:.3f} by the spread; goal <= {FLAT_GOAL}): {said}"
        )
    return lines


def where(results: Results) -> str:
    """Return device, clock and dates for a picture's title."""
    facts = [Row(run, 0.0, (0.0, 0.0)) for run in results.runs] + results.rows
    return f"{distinct(facts, 'device')}, {distinct(facts, 'clock')}, {distinct(facts, 'date')}"
