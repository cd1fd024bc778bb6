"""What a run measured: saved after every measurement, so that a run that was stopped at any moment goes on where it was.

A folder of such files, run*.json, is one set of results of one device, written by one run at a time. A measurement in it, made or
skipped for a reason, is not made again. One that failed or that a run died of is tried a second time, and then given up.
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
    """Empty where a run was killed before it wrote anything.

    Raises:
        ValueError: it is no file of results.
    """
    text = file.read_text()
    document = json.loads(text) if text else {"benchmarks": []}
    if not isinstance(document, dict) or "benchmarks" not in document:
        raise ValueError(f"{file} has no results of benchmarks: take it out of the folder, or leave it out of the arguments")
    return document


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("run*.json"))


def _measured(documents: Iterable[Mapping[str, Any]]) -> set[Key]:
    return {_key(entry["extra_info"]) for document in documents for entry in document["benchmarks"]}


def skips(documents: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What was not measured, with the reason, and is not measured in another of these."""
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
    """In memory only where there is no folder; ``seconds``: after so many no measurement begins."""

    def __init__(self, folder: Path | None = None, seconds: float = math.inf):
        self.folder, self.path, self.end = folder, None, time.monotonic() + seconds
        self.done = set() if folder is None else done(folder)
        self.benchmarks: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.planned = self.left = 0
        self.begun = False
        self.running: dict[str, str] | None = None

    def begin(self, key: Key) -> bool:
        """False if there is no time for it: it is left for another run. There always is for a run's first."""
        if self.begun and time.monotonic() > self.end:
            self.left += 1
            self._save()
            return False
        self.begun = True
        self.running = dict(zip(NAMES, key, strict=True))
        self._save()
        return True

    def entry(self, key: Key) -> dict[str, Any] | None:
        """What this run has of a measurement: its figures, or why there are none; None if it was left."""
        for entry in reversed(self.benchmarks):
            if _key(entry["extra_info"]) == key:
                return entry
        return next((entry for entry in reversed(self.skipped) if _key(entry) == key), None)

    def documents(self) -> list[dict[str, Any]]:
        """What the folder has, of earlier runs too; without one what this run has."""
        if self.folder is None:
            return [{"benchmarks": self.benchmarks, "skipped": self.skipped}]
        return [read(file) for file in files(self.folder)]

    def interrupted(self) -> None:
        """By the user, not by the measurement."""
        self.running = None
        self._save()

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: the folder has results of another device or clock.
        """
        for file in [] if self.folder is None else files(self.folder):
            for entry in read(file)["benchmarks"]:
                for name in ("device", "clock", "smoke"):
                    if (before := entry["extra_info"].get(name)) != facts[name]:
                        what = f"{name} {before!r}, this run's is {facts[name]!r}"
                        raise ValueError(f"{self.folder} has results with {what}: give each a folder of its own")

    def skip(self, key: Key, reason: str) -> None:
        self.skipped.append(dict(zip(NAMES, key, strict=True)) | {"reason": reason})
        self.running = None
        self._save()

    def add(self, benchmark) -> None:
        """What pytest-benchmark's fixture measured, if it wasn't told not to; single timings are left out."""
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
