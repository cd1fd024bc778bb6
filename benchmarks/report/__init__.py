"""Turn saved pytest-benchmark JSON into tables and plots: ``python -m benchmarks.report FILE.json [...] --output DIR``.

Several files are repeated runs or shards of one device's suite: a size measured more than once gets the median of its medians.
Every op gets a report of its own, DIR/OP/report.md.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import pictures, text
from benchmarks.report.model import distinct, group, merge, parse, parse_skipped
from benchmarks.report.profiles import PROFILES


def write(files: Sequence[Path], output: Path) -> list[Path]:
    """The reports written, one for each op."""
    documents = [json.loads(file.read_text()) for file in files]
    rows = merge(row for document in documents for row in parse(document))
    skipped = [skip for document in documents for skip in parse_skipped(document)]
    if not rows:
        raise SystemExit(f"no benchmark in {', '.join(map(str, files))}")
    if len({row.info["device"] for row in rows}) > 1:
        raise SystemExit(f"one report is about one device, these files are from {distinct(rows, 'device')}")
    reports = []
    for op in dict.fromkeys(row.info["op"] for row in rows):
        profile, folder = PROFILES[op], output / op
        groups = group((row for row in rows if row.info["op"] == op), profile)
        folder.mkdir(parents=True, exist_ok=True)
        reports.append(folder / "report.md")
        names = pictures.plot_all(groups, profile, folder)
        reports[-1].write_text(text.markdown(groups, profile, [skip for skip in skipped if skip.op == op], names))
    return reports
