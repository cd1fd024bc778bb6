"""Record the results of a run: saved after every measurement, so that a run stopped at any moment can continue.

A folder of such files, run*.json, is one set of results of one device, written by one run at a time. A measurement in it that was
made, or skipped for a reason, is not made again. One that failed, or during which a run died, is tried a second time and then given
up.
"""

import collections
import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mope_fast._files import write_atomically

NAMES = ("op", "mode", "timing", "case", "provider")
Key = tuple[str, ...]
TRIES = 2
FAILED = "failed, "
DIED = FAILED + "a run was killed or died while it measured this"


def _key(entry: Mapping[str, Any]) -> Key:
    return tuple(entry[name] for name in NAMES)


def read(file: Path) -> dict[str, Any]:
    """Read a file of results; it is empty if a run was killed before it wrote anything.

    Raises:
        ValueError: the file is not a file of results.
    """
    text = file.read_text()
    document = json.loads(text) if text else {"benchmarks": []}
    if not isinstance(document, dict) or "benchmarks" not in document:
        raise ValueError(f"{file} has no benchmark results: remove it from the folder or the arguments")
    return document


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("run*.json"))


def _measured(documents: Iterable[Mapping[str, Any]]) -> set[Key]:
    return {_key(entry["extra_info"]) for document in documents for entry in document["benchmarks"]}


def skips(documents: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return what was not measured in any of these documents, with the reason."""
    documents = list(documents)
    measured = _measured(documents)
    entries = [entry for document in documents for entry in document.get("skipped", [])]
    entries += [document["running"] | {"reason": DIED} for document in documents if document.get("running")]
    return [entry for entry in entries if _key(entry) not in measured]


def done(folder: Path) -> set[Key]:
    documents = [read(file) for file in files(folder)]
    tries = collections.Counter()
    for entry in skips(documents):
        tries[_key(entry)] += 1 if entry["reason"].startswith(FAILED) else TRIES
    return _measured(documents) | {key for key, times in tries.items() if times >= TRIES}


class Record:
    """The record of a run, kept in memory only if there is no folder; after ``seconds`` no measurement begins."""

    def __init__(self, folder: Path | None = None, seconds: float = math.inf):
        self.folder, self.path, self.end = folder, None, time.monotonic() + seconds
        self.done = set() if folder is None else done(folder)
        self.benchmarks: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.planned = self.left = 0
        self.begun = False
        self.running: dict[str, str] | None = None

    def begin(self, key: Key) -> bool:
        """Begin a measurement; False if there is no time left and another run must do it. A run's first always begins."""
        if self.begun and time.monotonic() > self.end:
            self.left += 1
            self._save()
            return False
        self.begun = True
        self.running = dict(zip(NAMES, key, strict=True))
        self._save()
        return True

    def entry(self, key: Key) -> dict[str, Any] | None:
        """Return this run's result of a measurement, or the reason for its absence; None if it was left for another run."""
        for entry in reversed(self.benchmarks):
            if _key(entry["extra_info"]) == key:
                return entry
        return next((entry for entry in reversed(self.skipped) if _key(entry) == key), None)

    def documents(self) -> list[dict[str, Any]]:
        """Return all documents in the folder, including earlier runs'; without a folder, this run's."""
        if self.folder is None:
            return [{"benchmarks": self.benchmarks, "skipped": self.skipped}]
        return [read(file) for file in files(self.folder)]

    def interrupted(self) -> None:
        """Note that the user stopped the run, so that the current measurement is not blamed."""
        self.running = None
        self._save()

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Check that the folder's results are comparable with this run's.

        Raises:
            ValueError: the folder has results of another device, clock or ``smoke`` setting.
        """
        for file in [] if self.folder is None else files(self.folder):
            for entry in read(file)["benchmarks"]:
                for name in ("device", "clock", "smoke"):
                    if (before := entry["extra_info"].get(name)) != facts[name]:
                        what = f"{name} {before!r}, this run's is {facts[name]!r}"
                        raise ValueError(f"{self.folder} has results with {what}: use separate folders")

    def skip(self, key: Key, reason: str) -> None:
        self.skipped.append(dict(zip(NAMES, key, strict=True)) | {"reason": reason})
        self.running = None
        self._save()

    def add(self, benchmark) -> None:
        """Add the statistics of pytest-benchmark's fixture, unless it was disabled; single timings are left out."""
        if benchmark.stats is not None:
            stats = benchmark.stats.stats
            figures = {name: getattr(stats, name) for name in ("median", "q1", "q3", "min", "max", "mean", "stddev", "rounds")}
            self.benchmarks.append({"name": benchmark.name, "extra_info": dict(benchmark.extra_info), "stats": figures})
        self.running = None
        self._save()

    def _save(self) -> None:
        if self.folder is None:
            return
        if self.path is None:
            self.path = self._new_file()
        names = ("planned", "left", "running", "benchmarks", "skipped")
        write_atomically(self.path, json.dumps({name: getattr(self, name) for name in names}, indent=1).encode())

    def _new_file(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            path = self.folder / f"run{number:03}.json"
            try:
                path.open("x").close()
            except FileExistsError:
                continue
            return path
