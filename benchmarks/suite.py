"""What all groups of benchmarks share: which points are measured, the check before the timing, the timing, what is saved with it.

Two timings: ``called`` is what Python code sees, launch overhead included; ``replay`` is one call's share of a CUDA graph of many.
Both rotate over as many input sets as ``l2`` in the results says.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import pytest
import torch

from benchmarks import measure
from benchmarks.environment import default_device
from benchmarks.record import FAILED, Key, Record

Step = Callable[[Any], measure.Outputs]
RECORD = pytest.StashKey[Record]()


class Case(Protocol):
    """A problem size."""

    modes: Sequence[str]

    def flops(self, mode: str) -> int: ...

    def describe(self) -> dict[str, Any]: ...


class OpCase(Case, Protocol):
    """A problem size of one function."""

    def bytes(self, mode: str) -> int: ...


@dataclass(frozen=True)
class Group:
    """What is compared: ``Case`` is its own, opaque to this module."""

    name: str
    providers: Sequence[str]
    cases: Callable[[torch.device, bool], Sequence[Case]]
    """For a device, of a smoke run or not."""
    why_not: Callable[[str, Any, torch.device, bool], str | None]
    """Why a provider isn't measured at a case."""

    def providers_at(self, case: Any, mode: str) -> Sequence[str]:
        """Those for which it makes sense there."""
        return self.providers

    def captures(self, provider: str) -> bool:
        """Whether it can go into a CUDA graph."""
        return True


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

    device: torch.device
    smoke: bool
    facts: dict[str, Any]
    record: Record = field(default_factory=Record)
    compile_on_cpu: bool = False
    """Where compiling takes minutes."""

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
        except Exception as error:
            self.record.skip(point.key(group), f"{FAILED}{_first_line(error)}")
            raise


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def parametrize(metafunc, group: Group) -> None:
    """All providers of one size, mode and timing run one after the other, so that a busy machine is busy for all of them."""
    smoke, device, record = metafunc.config.getoption("smoke"), default_device(), metafunc.config.stash[RECORD]
    points = [
        Point(mode, case, timing, provider)
        for case in group.cases(device, smoke)
        for mode in case.modes
        for timing in (["called", "replay"] if device.type == "cuda" else ["called"])
        for provider in group.providers_at(case, mode)
        if timing == "called" or group.captures(provider)
    ]
    points = [point for point in points if point.key(group) not in record.done]
    metafunc.parametrize("point", points, ids=str)


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
    mode, case, device, facts = point.mode, point.case, session.device, session.facts
    if (reason := op.why_not(point.provider, case, device, session.smoke)) is not None:
        session.skip(op, point, reason)
    torch.manual_seed(0)
    count, l2 = measure.input_sets(case.bytes(mode), device)
    sets = [op.random(case, device, mode) for _ in range(count)]
    step = op.step(point.provider, case, device, mode)
    target = prepare(step, point.timing, sets, lambda got, inputs: op.check(point.provider, case, mode, got, inputs))
    calls = count if point.timing == "replay" else 1
    benchmark.group = f"{op.name} {mode} {point.timing} {case}"
    benchmark.extra_info.update(facts | case.describe())
    benchmark.extra_info.update(
        op=op.name, mode=mode, timing=point.timing, provider=point.provider, l2=l2, input_sets=count, calls_per_iteration=calls,
        bytes=case.bytes(mode), flops=case.flops(mode), peak_memory=measure.peak_memory(lambda: step(sets[0]), device),
    )  # fmt: skip
    if (implementation := op.implementation(point.provider, case, device)) is not None:
        benchmark.extra_info["implementation"] = implementation
    rounds, iterations = (3, 1) if session.smoke else measure.schedule(target)
    benchmark.pedantic(target, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info.update(throughput(case, mode, benchmark.stats.stats.median / calls, facts))
