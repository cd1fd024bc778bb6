"""Shared by all groups of benchmarks: the points to measure, the check before timing, the timing, and the facts saved with it.

There are two timings: ``called`` includes launch overhead, as seen by Python code; ``replay`` is one call's share of a CUDA graph
of many calls. Both rotate over several input sets; ``l2`` in the results is the resulting state of the cache.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import pytest
import torch

from benchmarks import measure
from benchmarks.cases import CENTRE, FULL, SMOKE
from benchmarks.environment import default_device, device_name
from benchmarks.record import FAILED, Key, Record

Step = Callable[[Any], measure.Outputs]
RECORD = pytest.StashKey[Record]()
COMPILE_SECONDS = 8.0
OP_SECONDS = {CENTRE: 1.0, FULL: 2.0}
"""Target duration of the rounds of a function's measurement, unless ten rounds take longer."""
GROUPS = pytest.StashKey[dict[str, "Group"]]()
"""Name of the test function -> its group."""


@dataclass(frozen=True)
class Setting:
    """The device, and how much is measured."""

    device: torch.device
    extent: str
    compile_on_cpu: bool = False
    """Compile encoders on a CPU too, where that takes minutes."""

    @property
    def smoke(self) -> bool:
        return self.extent == SMOKE

    @functools.cached_property
    def flops_a_second(self) -> float:
        """Rough FLOP/s that whole models reach."""
        return 0.8e12 * measure.peak_arithmetic(self.device, device_name(self.device), self.smoke)["peak_tflops"]


def setting(config: pytest.Config) -> Setting:
    extent = SMOKE if config.getoption("smoke") else FULL if config.getoption("full") else CENTRE
    return Setting(default_device(), extent, config.getoption("compile_on_cpu"))


class Case(Protocol):
    """A problem size."""

    modes: Sequence[str]

    def flops(self, mode: str) -> int: ...

    def describe(self) -> dict[str, Any]: ...


class OpCase(Case, Protocol):
    """A problem size of one function."""

    def bytes(self, mode: str) -> int: ...


@dataclass(frozen=True)
class Group(ABC):
    """A group of providers to compare. Its ``Case`` is opaque to this module."""

    name: str
    providers: Sequence[str]
    ours: Sequence[str]
    """Providers whose outputs must be within their bounds; others are timed even if they aren't, and marked."""
    cases: Callable[[torch.device, str], Sequence[Case]]
    """Returns the cases for a device and an extent."""
    why_not: Callable[[str, Any, torch.device, bool], str | None]
    """Returns why a provider isn't measured at a case; None if it is."""

    @abstractmethod
    def seconds(self, point: "Point", setting: Setting) -> float:
        """Estimate how long a measurement takes."""

    def reason(self, point: "Point", setting: Setting) -> str | None:
        """Return why a measurement isn't made; None if it is."""
        return self.why_not(point.provider, point.case, setting.device, setting.smoke)

    def providers_at(self, case: Any, mode: str) -> Sequence[str]:
        """Return the providers that make sense at a case and mode."""
        return self.providers

    def captures(self, provider: str) -> bool:
        """Return whether a provider can be captured in a CUDA graph."""
        return True

    def judged(self, provider: str) -> AbstractContextManager[list[str]]:
        """Return a context in which outputs outside their bound raise for our providers; for others the bound is wider and misses
        are only collected.
        """
        return nullcontext([]) if provider in self.ours else measure.others()


@dataclass(frozen=True)
class Op(Group):
    """A group for one function, with its own kind of input sets."""

    random: Callable[[Any, torch.device, str], Any]
    """Draws one input set for a case and mode."""
    step: Callable[[str, Any, torch.device, str], Step]
    """Returns a provider at a case and mode as a function of an input set."""
    check: Callable[[str, Any, str, measure.Outputs, Any], None]
    """Raises if a provider's outputs at a case and mode are wrong for the input set."""
    implementation: Callable[[str, Any, torch.device], str | None]
    """Returns the implementation that a provider has chosen, if it chooses one."""

    def seconds(self, point: "Point", setting: Setting) -> float:
        """Estimate the seconds; the truth is slow, because it is in float64 and materializes all scores."""
        if self.reason(point, setting) is not None:
            return 0.1
        compiling = COMPILE_SECONDS if "compiled" in point.provider or point.provider == "flex" else 0.0
        check = 20 * point.case.flops(point.mode) / setting.flops_a_second
        return 0.5 + check + OP_SECONDS.get(setting.extent, 0.0) + compiling


@dataclass(frozen=True)
class Point:
    """One measurement."""

    mode: str
    case: Case
    timing: str
    provider: str

    def key(self, group: Group) -> Key:
        return (group.name, self.mode, self.timing, str(self.case), self.provider)

    def __str__(self) -> str:
        """Return a name of characters that pytest's ``-k`` accepts."""
        return f"{self.mode}-{str(self.case).replace(' ', '-').replace('=', '')}-{self.timing}-{self.provider}"


@dataclass(frozen=True)
class Session:
    """State shared by all measurements of a run. Skips and failures are saved with the results."""

    setting: Setting
    facts: dict[str, Any]
    record: Record = field(default_factory=Record)

    def begin(self, group: Group, point: Point) -> None:
        if not self.record.begin(point.key(group)):
            pytest.skip("the budget is used up")

    def skip(self, group: Group, point: Point, reason: str) -> NoReturn:
        self.record.skip(point.key(group), reason)
        pytest.skip(f"{point.provider}: {reason}")

    @contextmanager
    def noting_failures(self, group: Group, point: Point) -> Iterator[None]:
        """Save failures with the results and raise them; a NotImplementedError of a library is a skip."""
        try:
            yield
        except NotImplementedError as error:  # libraries raise it if none of their kernels supports the case
            self.skip(group, point, _first_line(error))
        except (Exception, pytest.fail.Exception) as error:
            self.record.skip(point.key(group), f"{FAILED}{_first_line(error)}")
            raise


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def parametrize(metafunc, group: Group) -> None:
    """Parametrize a test with a group's points; all providers of one size, mode and timing run in a row, under the same load."""
    config, device = metafunc.config, default_device()
    record, extent = config.stash[RECORD], setting(config).extent
    points = [
        Point(mode, case, timing, provider)
        for case in group.cases(device, extent)
        for mode in case.modes
        for timing in (["called", "replay"] if device.type == "cuda" else ["called"])
        for provider in group.providers_at(case, mode)
        if timing == "called" or group.captures(provider)
    ]
    points = [point for point in points if point.key(group) not in record.done]
    config.stash[GROUPS][metafunc.function.__name__] = group
    metafunc.parametrize("point", points, ids=str)


def measurements(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return the pytest items that measure a point; if none is left, pytest makes an item without one."""
    return [item for item in items if hasattr(item, "callspec") and isinstance(item.callspec.params.get("point"), Point)]


def prepare(step: Step, timing: str, sets: list[Any], check: Callable[[measure.Outputs, Any], None]) -> Callable[[], object]:
    """Return the function to time, after checking its outputs on the first and last input set."""
    ends = sorted({0, len(sets) - 1})
    if timing == "called":
        for i in ends:
            check(step(sets[i]), sets[i])
        return measure.rotating(step, sets)
    graph, outputs = measure.capture(step, sets)
    measure.replay_poisoned(graph, outputs)
    for i in ends:
        check(outputs[i], sets[i])
    return graph.replay


def throughput(case: OpCase, mode: str, seconds: float, facts: dict[str, Any]) -> dict[str, float]:
    gbps, tflops = case.bytes(mode) / seconds / 1e9, case.flops(mode) / seconds / 1e12
    figures = {"median_us": seconds * 1e6, "gbps": gbps, "copy_share": gbps / facts["copy_bandwidth_gbps"], "tflops": tflops}
    if case.describe()["dtype"] == facts["peak_dtype"]:
        figures["roofline_share"] = max(figures["copy_share"], tflops / facts["peak_tflops"])
    return figures


def run(benchmark, op: Op, point: Point, session: Session) -> None:
    session.begin(op, point)
    with session.noting_failures(op, point):
        _run(benchmark, op, point, session)
    session.record.add(benchmark)


def _run(benchmark, op: Op, point: Point, session: Session) -> None:
    mode, case, device, facts = point.mode, point.case, session.setting.device, session.facts
    if (reason := op.reason(point, session.setting)) is not None:
        session.skip(op, point, reason)
    torch.manual_seed(0)
    count, l2 = measure.input_sets(case.bytes(mode), device)
    sets = [op.random(case, device, mode) for _ in range(count)]
    step = op.step(point.provider, case, device, mode)
    with op.judged(point.provider) as inexact:
        target = prepare(step, point.timing, sets, lambda got, inputs: op.check(point.provider, case, mode, got, inputs))
    calls = count if point.timing == "replay" else 1
    benchmark.group = f"{op.name} {mode} {point.timing} {case}"
    benchmark.extra_info.update(facts | case.describe())
    benchmark.extra_info.update(
        op=op.name, mode=mode, timing=point.timing, provider=point.provider, l2=l2, input_sets=count, calls_per_iteration=calls,
        bytes=case.bytes(mode), flops=case.flops(mode), peak_memory=measure.peak_memory(lambda: step(sets[0]), device),
        inexact=inexact,
    )  # fmt: skip
    if (implementation := op.implementation(point.provider, case, device)) is not None:
        benchmark.extra_info["implementation"] = implementation
    rounds, iterations = (
        (3, 1) if session.setting.smoke else measure.schedule(target, total_seconds=OP_SECONDS[session.setting.extent])
    )
    benchmark.pedantic(target, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info.update(throughput(case, mode, benchmark.stats.stats.median / calls, facts))
