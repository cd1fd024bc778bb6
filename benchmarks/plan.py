"""The plan of a run: what it will measure and how long that takes, its progress, and its results."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import suite
from benchmarks.cases import CENTRE
from benchmarks.record import FAILED
from benchmarks.report import terminal


def duration(seconds: float) -> str:
    """Format seconds with about two digits."""
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 99.5 * 60 else f"{round(seconds / 3600)} h"


@dataclass(frozen=True)
class Work:
    """A measurement and its estimated seconds."""

    group: suite.Group
    point: suite.Point
    seconds: float

    @property
    def size(self) -> str:
        return f"{self.group.name}, {self.point.case}"

    def __str__(self) -> str:
        timing = "" if self.point.timing == "called" else f" {self.point.timing}"
        return f"{self.point.mode}{timing} {self.point.provider}"


class Plan:
    """All measurements of a run, in their order."""

    def __init__(self, points: Iterable[tuple[suite.Group, suite.Point]], setting: suite.Setting):
        self.works = [Work(group, point, group.seconds(point, setting)) for group, point in points]
        self.begun: float | None = None

    def __str__(self) -> str:
        """Return a line for each group: measurements, time, and the sizes if they are few."""
        lines = [f"{len(self.works)} measurements, about {duration(sum(work.seconds for work in self.works))} on this machine"]
        for name in dict.fromkeys(work.group.name for work in self.works):
            works = [work for work in self.works if work.group.name == name]
            sizes = list(dict.fromkeys(str(work.point.case) for work in works))
            shown = "; ".join(sizes) if len(sizes) < 3 else f"{len(sizes)} sizes"
            lines.append(f"  {name:<26}{len(works):>4}  {duration(sum(work.seconds for work in works)):>6}  {shown}")
        return "\n".join(lines)

    def begin(self) -> None:
        if self.begun is None:
            self.begun = time.monotonic()

    def end(self, number: int, entry: Mapping[str, Any]) -> str:
        """Return the result of a measurement, by its number from 0, and the estimated time left at the speed so far.

        If the previous measurement had another size, a line with the size precedes it.
        """
        work, ended = self.works[number], number + 1
        title = "" if number and self.works[number - 1].size == work.size else f"{work.size}\n"
        done, ahead = (sum(each.seconds for each in part) for part in (self.works[:ended], self.works[ended:]))
        left = f"{duration(ahead / done * (time.monotonic() - self.begun))} left" if ahead else "done"
        return f"{title}  [{ended}/{len(self.works)}, {left}] {work}: {_found(entry)}"


def _found(entry: Mapping[str, Any]) -> str:
    if "reason" in entry:
        return entry["reason"] if entry["reason"].startswith(FAILED) else "not measured"  # the reason is printed below the tables
    info = entry["extra_info"]
    tax = f", tax {info['tax']:.3f}" if "tax" in info else ""
    return f"{terminal.time_of(info['median_us'] / 1e6)}{tax}{', outside its bound' if info.get('inexact') else ''}"


class Progress:
    """A pytest plugin that prints the plan before the first measurement, a line after each one, and the tables at the end."""

    def __init__(self, config: pytest.Config):
        self.config, self.record = config, config.stash[suite.RECORD]
        self.plan: Plan | None = None
        self.numbers: dict[str, int] = {}
        """pytest id -> index in the plan."""

    def _reporter(self) -> pytest.TerminalReporter:
        return self.config.pluginmanager.getplugin("terminalreporter")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Plan only the measurements that ``-k`` selects."""
        items = suite.measurements(session.items)
        groups = self.config.stash[suite.GROUPS]
        self.numbers = {item.nodeid: number for number, item in enumerate(items)}
        self._reporter().showfspath = self._reporter().showfspath and not items
        self.plan = Plan([(groups[item.originalname], item.callspec.params["point"]) for item in items], suite.setting(self.config))

    def pytest_report_collectionfinish(self) -> str | None:
        if not self.plan.works:
            return f"nothing is left to measure: {self.record.folder} has it" if self.record.done else None
        more = "one size of every group; --full for all sizes\n" if suite.setting(self.config).extent == CENTRE else ""
        return f"{self.plan}\n{more}"

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if nodeid in self.numbers:
            self.plan.begin()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if (number := self.numbers.get(nodeid)) is None:
            return
        work = self.plan.works[number]
        if (entry := self.record.entry(work.point.key(work.group))) is not None:  # else the budget is used up
            self._reporter().ensure_newline()
            self._reporter().write_line(self.plan.end(number, entry))

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Replace the status letter: a line after each measurement reports it; reasons for skips are printed below the tables."""
        if report.nodeid not in self.numbers or report.when != "call" or report.failed:
            return None
        outcome = "not measured" if report.skipped else report.outcome
        return outcome, "", outcome.upper()

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        documents = self.record.documents()
        if any(document["benchmarks"] for document in documents):
            terminalreporter.section("mope_fast and the others")
            terminalreporter.write_line(terminal.tables(documents))
        if self.record.left:
            terminalreporter.write_line(
                f"{self.record.left} measurements are left, because the budget is used up; with --results DIR the next continues"
            )
