"""What all groups of benchmarks share: which points are measured, the check before the timing, the timing, what is saved with it.

Two timings: ``called`` is what Python code sees, launch overhead included; ``replay`` is one call's share of a CUDA graph of many.
Both rotate over as many input sets as ``l2`` in the results says.
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
"""What the rounds of a function's measurement should take, where ten don't take longer."""
GROUPS = pytest.StashKey[dict[str, "Group"]]()
"""By the name of the test function."""


@dataclass(frozen=True)
class Setting:
    """Where and how much is measured."""

    device: torch.device
    extent: str
    compile_on_cpu: bool = False
    """Compile encoders where that takes minutes."""

    @property
    def smoke(self) -> bool:
        return self.extent == SMOKE

    @functools.cached_property
    def flops_a_second(self) -> float:
        """That whole models reach, roughly."""
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
    """What is compared: ``Case`` is its own, opaque to this module."""

    name: str
    providers: Sequence[str]
    ours: Sequence[str]
    """Providers whose numbers have to be right; those of the others are timed with a flag if they aren't."""
    cases: Callable[[torch.device, str], Sequence[Case]]
    """For a device, and how much is measured."""
    why_not: Callable[[str, Any, torch.device, bool], str | None]
    """Why a provider isn't measured at a case."""

    @abstractmethod
    def seconds(self, point: "Point", setting: Setting) -> float:
        """Estimate how long a measurement takes."""

    def reason(self, point: "Point", setting: Setting) -> str | None:
        """Why it isn't made; None if it is."""
        return self.why_not(point.provider, point.case, setting.device, setting.smoke)

    def providers_at(self, case: Any, mode: str) -> Sequence[str]:
        """Those for which it makes sense there."""
        return self.providers

    def captures(self, provider: str) -> bool:
        """Whether it can go into a CUDA graph."""
        return True

    def judged(self, provider: str) -> AbstractContextManager[list[str]]:
        """Within, numbers outside their bound are an error of ours; the others' bound is wider, and what misses it is noted."""
        return nullcontext([]) if provider in self.ours else measure.others()


@dataclass(frozen=True)
class Op(Group):
    """One function under measurement; the input sets are its own too."""

    random: Callable[[Any, torch.device, str], Any]
    """One input set for a case and mode."""
    step: Callable[[str, Any, torch.device, str], Step]
    """A provider at a case and mode, as a function of an input set."""
    check: Callable[[str, Any, str, measure.Outputs, Any], None]
    """Fails if a provider's outputs at a case and mode are not what the input set gives."""
    implementation: Callable[[str, Any, torch.device], str | None]
    """What a provider of ours that chooses has chosen."""

    def seconds(self, point: "Point", setting: Setting) -> float:
        """The truth is in float64 and holds all scores."""
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
        """Of such letters as pytest's ``-k`` takes."""
        return f"{self.mode}-{str(self.case).replace(' ', '-').replace('=', '')}-{self.timing}-{self.provider}"


@dataclass(frozen=True)
class Session:
    """What all measurements of a run share. What is skipped, or fails, is saved with what is measured."""

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
        """Failures are saved with the results, and raised; what a library says it can't do is a skip."""
        try:
            yield
        except NotImplementedError as error:  # how a library says that none of its kernels takes the case
            self.skip(group, point, _first_line(error))
        except (Exception, pytest.fail.Exception) as error:
            self.record.skip(point.key(group), f"{FAILED}{_first_line(error)}")
            raise


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def parametrize(metafunc, group: Group) -> None:
    """All providers of one size, mode and timing run one after the other, so that a busy machine is busy for all of them."""
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
    """Those of pytest's items that measure a point; where none is left, pytest makes one without."""
    return [item for item in items if hasattr(item, "callspec") and isinstance(item.callspec.params.get("point"), Point)]


def prepare(step: Step, timing: str, sets: list[Any], check: Callable[[measure.Outputs, Any], None]) -> Callable[[], object]:
    """The function to time; it has run and its outputs on the first and last input set are right."""
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
