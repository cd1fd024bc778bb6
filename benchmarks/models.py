"""Measurement of whole models: the check against a truth in a wider dtype, timing in turns with a divisor."""

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.baselines.models import Inputs, Provider
from benchmarks.cases import CENTRE, FULL, SMOKE

WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
CENTRE_SECONDS, COMPILE_SECONDS = 3.0, 120.0
Named = dict[str, Tensor]
Prepared = tuple[suite.Step, Callable[[], object]]


@dataclass(frozen=True)
class ModelGroup(suite.Group):
    """A group of whole models; a case's ``compiled`` says whether its providers are those made by torch.compile."""

    divisor: str
    """The baseline provider, by whose time and memory the others' are divided."""
    batch_of: Callable[[Any, torch.device], Inputs]
    """Returns the batch of a case, the same for all providers."""
    prepared: Callable[[str, suite.Point, torch.device], Prepared]
    """Returns a provider's step and the function to time, after checking its outputs."""
    facts: Callable[[str, Any, torch.device], dict[str, Any]]
    """Returns facts about a provider at a case that are saved with the measurement."""
    seconds_of_rounds: float = 45.0
    """Target duration of one measurement's rounds when all sizes are measured, unless seven rounds take longer."""

    def rounds(self, extent: str) -> tuple[float, int] | None:
        """Return the target seconds of all rounds and their minimum number; None for three rounds of one call."""
        return {SMOKE: None, CENTRE: (CENTRE_SECONDS, 3), FULL: (self.seconds_of_rounds, 7)}[extent]

    def reason(self, point: suite.Point, setting: suite.Setting) -> str | None:
        if (reason := super().reason(point, setting)) is not None:
            return reason
        if point.case.compiled and setting.device.type == "cpu" and not setting.compile_on_cpu:
            return "compiling takes minutes on a CPU: give --compile-on-cpu to measure it"
        return None

    def seconds(self, point: suite.Point, setting: suite.Setting) -> float:
        """Estimate the seconds: a few steps for the check and the truth, then rounds of two steps each."""
        if self.reason(point, setting) is not None:
            return 0.1
        step = point.case.flops(point.mode) / setting.flops_a_second
        total, least = self.rounds(setting.extent) or (0.0, 3)
        compiling = COMPILE_SECONDS if point.case.compiled else 0.0
        return 1.0 + 7 * step + max(total, 2 * least * step) + compiling


@dataclass(frozen=True)
class Divisor:
    """The baseline that the other providers are timed in turns with."""

    target: Callable[[], object]
    memory: int | None


def check(got: Named, eager: Named, truth: Named) -> None:
    """Check logits, loss and common gradients against the truth, and that all other outputs are finite."""
    for name, tensor in got.items():
        assert tensor.isfinite().all(), f"{name} is not finite"
    names = [name for name in got if name in truth]
    assert names[:2] == list(truth)[:2], f"got {names[:2]}, expected {list(truth)[:2]}"
    ours, eager, truth = ([outputs[name] for name in names] for outputs in (got, eager, truth))
    titles = [name if name in ("logits", "loss") else f"gradient of {name}" for name in names]
    # twice the usual tolerance: a dozen layers, each with a different order of summation
    measure.assert_as_exact_as_eager(ours, eager, truth, titles, times=4, typical=measure.relative_error(eager, truth))


def prepare(provider: Provider, point: suite.Point, inputs: Inputs, right: Callable[[Named], None]) -> Prepared:
    """Return the step and the function to time; ``right`` raises if a step's outputs are wrong."""
    names: list[str] = []

    def step(inputs: Inputs) -> measure.Outputs:
        outputs = provider.step(inputs, point.mode)
        names[:] = outputs
        return tuple(outputs.values())

    return step, suite.prepare(step, point.timing, [inputs], lambda got, _: right(dict(zip(names, got, strict=True))))


def run(benchmark, group: ModelGroup, point: suite.Point, session: suite.Session) -> None:
    session.begin(group, point)
    with session.noting_failures(group, point):
        _run(benchmark, group, point, session)
    session.record.add(benchmark)


def _run(benchmark, group: ModelGroup, point: suite.Point, session: suite.Session) -> None:
    mode, case, device = point.mode, point.case, session.setting.device
    if (reason := group.reason(point, session.setting)) is not None:
        session.skip(group, point, reason)
    divisor = _divisor(group, point, device)
    with group.judged(point.provider) as inexact:
        step, target = group.prepared(point.provider, point, device)
    inputs = group.batch_of(case, device)
    memory = measure.peak_memory(lambda: step(inputs), device)
    benchmark.group = f"{group.name} {mode} {point.timing} {case}"
    benchmark.extra_info.update(session.facts | case.describe() | group.facts(point.provider, case, device))
    benchmark.extra_info.update(
        op=group.name, mode=mode, timing=point.timing, provider=point.provider, l2="what the step before left",
        flops=case.flops(mode), peak_memory=memory, memory_tax=memory and memory / divisor.memory, inexact=inexact,
    )  # fmt: skip
    time_in_turns(benchmark, target, divisor.target, group.rounds(session.setting.extent))


_kept: dict[tuple[Any, ...], Divisor] = {}


def _divisor(group: ModelGroup, point: suite.Point, device: torch.device) -> Divisor:
    """Return the divisor, made once for all providers of a size, mode and timing, which run in a row."""
    key = (group.name, point.mode, point.case, point.timing)
    if key not in _kept:
        _kept.clear()  # before the next is made, because two may not fit in memory
        with group.judged(group.divisor):
            step, target = group.prepared(group.divisor, point, device)
        inputs = group.batch_of(point.case, device)
        _kept[key] = Divisor(target, measure.peak_memory(lambda: step(inputs), device))
    return _kept[key]


def drop_divisors() -> None:
    _kept.clear()


def time_in_turns(
    benchmark, target: Callable[[], object], divisor: Callable[[], object], schedule: tuple[float, int] | None
) -> None:
    """Time ``target`` in turns with ``divisor``; ``schedule`` comes from :meth:`ModelGroup.rounds`."""
    rounds, calls = 3, 1
    if schedule is not None:
        total, least = schedule
        rounds, calls = measure.schedule(
            lambda: (divisor(), target()), round_seconds=0.1, total_seconds=total, warm_up=0, least=least
        )
    turns = measure.InTurns(divisor, calls)

    def call() -> None:
        for _ in range(calls):
            target()

    benchmark.extra_info["calls_per_iteration"] = calls
    gc.collect()
    gc.freeze()  # a full garbage collection over all modules' objects would take as long as a small step
    try:
        benchmark.pedantic(call, setup=turns.before, rounds=rounds)
    finally:
        gc.unfreeze()
    if benchmark.stats is not None:
        seconds = [seconds / calls for seconds in benchmark.stats.stats.data]
        benchmark.extra_info.update(
            median_us=benchmark.stats.stats.median / calls * 1e6, **taxes(turns.ratios(seconds), benchmark.extra_info)
        )


def taxes(ratios: list[float], info: Mapping[str, Any]) -> dict[str, float]:
    """Return the median ratio and its spread; for a model with more tokens than the divisor also its excess over their ratio."""
    ratios = sorted(ratios)
    tax, (low, high) = statistics.median(ratios), (ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.8))
    excess = {"excess": tax / info["token_ratio"]} if "token_ratio" in info else {}
    return {"tax": tax, "tax_low": low, "tax_high": high, **excess}
