"""Measure everything, or some groups, in resumable shards, and write the report: ``python -m benchmarks.run [GROUP ...]``.

A shard is a separate pytest process that starts no measurement after some minutes. Measurements are saved at once and survive a
stop at any time; the same command continues with the rest. Unknown arguments are passed to pytest: ``-k "ViT-B and B64"``,
``--cpu-time``, ``--smoke``.
"""

import argparse
import contextlib
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record, report

FOLDER = Path(__file__).parent
GROUPS = sorted(file.stem.removeprefix("test_") for file in FOLDER.glob("test_*.py") if "suite.parametrize(" in file.read_text())
GRACE = 180.0
"""Seconds that a shard's last measurement may take after the shard's time is up."""
NOTHING_LEFT = 5  # pytest's exit status


class Shard:
    """One pytest process for one group."""

    def __init__(self, group: str, results: Path, minutes: float, arguments: Sequence[str]):
        self.group, self.results, self.seconds = group, results, 60 * minutes
        self.command = [
            sys.executable, "-m", "pytest", str(FOLDER / f"test_{group}.py"), "--benchmark-only",
            *([] if "--smoke" in arguments else ["--full"]), "--results", str(results), "--budget", str(self.seconds), *arguments,
        ]  # fmt: skip
        self.log = results / f"{group}.log"
        self.before = set(record.files(results))

    def run(self) -> int:
        """Run it with a progress bar; return its exit status."""
        with open(self.log, "ab") as log, subprocess.Popen(self.command, stdout=log, stderr=log, cwd=FOLDER.parent) as process:
            try:
                self._watch(process)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)  # so that it records that the measurement itself didn't fail
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                raise
            finally:
                process.kill()
        return process.returncode

    def _watch(self, process: subprocess.Popen) -> None:
        from tqdm import tqdm

        end = time.monotonic() + self.seconds + GRACE
        with tqdm(desc=self.group, unit="point") as bar:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.5)
                self._show(bar)
            self._show(bar)

    def _show(self, bar) -> None:
        if (document := self.document()) is not None:
            bar.total, bar.n = document["planned"], len(document["benchmarks"]) + len(document["skipped"])
            bar.set_postfix_str(" ".join((document["running"] or {}).get(name, "") for name in ("mode", "case", "provider")))

    def document(self) -> dict | None:
        """Return what it has saved so far."""
        files = set(record.files(self.results)) - self.before
        document = record.read(files.pop()) if files else {}
        return document if "planned" in document else None

    def is_last(self) -> bool:
        document = self.document()
        failed = document is not None and any(entry["reason"].startswith(record.FAILED) for entry in document["skipped"])
        return document is None or not (document["left"] or document["running"] or failed)


def run_group(group: str, results: Path, minutes: float, shards: int | None, arguments: Sequence[str]) -> bool:
    """Run a group in shards; return False if something failed, which the log describes."""
    good = True
    for _ in itertools.count() if shards is None else range(shards):
        shard = Shard(group, results, minutes, arguments)
        status = shard.run()
        if shard.document() is None and status in (0, NOTHING_LEFT):
            print(f"{group}: nothing to measure: everything is saved already, or -k selects nothing", file=sys.stderr)
        elif status not in (0, NOTHING_LEFT):
            good = False
            print(f"{group}: pytest ended with {status}, see {shard.log}", file=sys.stderr)
        if shard.is_last():
            return good
    print(f"{group}: {shard.document()['left']} measurements are left for another call", file=sys.stderr)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=__doc__.split("\n\n")[1])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"any of {', '.join(GROUPS)}; default: all")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), metavar="DIR", help="results and report")
    parser.add_argument("-k", metavar="EXPRESSION", help="select measurements by parts of their names, as pytest's -k")
    parser.add_argument("--minutes", type=float, default=6.0, help="minutes after which a shard starts no measurement (default: 6)")
    parser.add_argument("--shards", type=int, help="maximum shards per group, for a machine that is available for minutes only")
    options, arguments = parser.parse_known_args()
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"no such group: {', '.join(sorted(unknown))}; expected any of {', '.join(GROUPS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.k:
        arguments += ["-k", options.k]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    good = []
    try:
        for group in options.groups or GROUPS:
            good.append(run_group(group, options.output.resolve(), options.minutes, options.shards, arguments))
    except KeyboardInterrupt:
        print("stopped; the same command continues with the rest", file=sys.stderr)
        good.append(False)
    if files := [*record.files(options.output), *sorted(options.output.glob("*.jsonl"))]:
        print(*report.write(files, options.output), sep="\n")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
