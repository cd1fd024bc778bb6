"""What a run measured: saved after every measurement, so that a run that was stopped at any moment goes on where it was.

A folder of such files is one set of results. A measurement in it, made or skipped for a reason, is not made again; nor is one that
two runs died of.
"""

import collections
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mope_fast._files import write_atomically

NAMES = ("op", "mode", "timing", "case", "provider")
Key = tuple[str, ...]
DEATHS = 2


def _key(entry: Mapping[str, Any]) -> Key:
    return tuple(entry[name] for name in NAMES)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _keys(document: Mapping[str, Any]) -> Iterator[Key]:
    yield from (_key(entry["extra_info"]) for entry in document["benchmarks"])
    yield from (_key(entry) for entry in document.get("skipped", []))


def done(folder: Path) -> set[Key]:
    saved = [read(file) for file in folder.glob("*.json")]
    died = collections.Counter(_key(document["running"]) for document in saved if document.get("running"))
    return {key for document in saved for key in _keys(document)} | {key for key, times in died.items() if times >= DEATHS}


class Record:
    """In memory only where there is no folder; ``seconds``: after so many no measurement begins."""

    def __init__(self, folder: Path | None = None, seconds: float = math.inf):
        self.folder, self.path, self.end = folder, None, time.monotonic() + seconds
        self.done = set() if folder is None else done(folder)
        self.benchmarks: list[dict[str, Any]] = []
        self.skipped: list[dict[str, str]] = []
        self.planned = self.left = 0
        self.running: dict[str, str] | None = None

    def begin(self, key: Key) -> bool:
        """False if there is no time for it: it is left for another run."""
        if time.monotonic() > self.end:
            self.left += 1
            self._save()
            return False
        self.running = dict(zip(NAMES, key, strict=True))
        self._save()
        return True

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
        number = 1 + max((int(file.stem[3:]) for file in self.folder.glob("run[0-9]*.json")), default=0)
        return self.folder / f"run{number:03}.json"
