"""Analyze blocks of steps in a Chrome trace of torch's profiler: costs by op and by kernel, and when the device was idle.

This module runs and profiles nothing; it only computes on events. Times are in microseconds, costs are per step.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

BLOCK = "profiled: "
"""Prefix of a block's annotation; the run's name follows."""
DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_ENGINE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Span:
    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Op(Span):
    """One call of an op on the host; ``self_time`` leaves out nested ops, ``parents`` are the ops that it is nested in."""

    self_time: float
    parents: tuple["Op", ...]
    identity: int | None
    """Id by which the kernels that it launches refer to it."""


@dataclass(frozen=True)
class Activity(Span):
    """A kernel, copy or fill on a stream; ``op`` is the innermost op that launched it, None in a graph's replay."""

    stream: int
    op: Op | None


@dataclass(frozen=True)
class Block:
    """Consecutive steps of one run; the device has finished before the next block."""

    run: str
    steps: int
    span: Span
    ops: list[Op]
    activities: list[Activity]


Pick = Callable[[Sequence[float]], float]
"""Selects or combines several measurements of the same quantity, such as ``min`` or the median."""


class Cost(NamedTuple):
    """Cost per step; ``total`` includes nested ops, ``device`` only what the op itself launched."""

    calls: float = 0.0
    total: float = 0.0
    own: float = 0.0
    device: float = 0.0


class Gap(NamedTuple):
    duration: float
    before: str
    """Name of the activity that ended last."""
    after: str
    """Name of the activity that starts next."""


class Timeline(NamedTuple):
    """The device's timeline within blocks, from the first kernel's start to the last one's end; streams are merged."""

    window: float
    busy: float
    streams: int
    gaps: list[Gap]
    """Sorted by duration, the largest first."""

    @property
    def idle_share(self) -> float:
        return 1 - self.busy / self.window if self.window else 0.0


class Host(NamedTuple):
    """Host costs of a step."""

    ops: float
    in_ops: float
    between_ops: float
    """Python, and everything else outside ops."""


def read_blocks(document: dict[str, Any], steps: int) -> list[Block]:
    """Read the blocks of a trace; ``steps`` is the number of steps in each.

    Raises:
        ValueError: the trace has no block.
    """
    events = [event for event in document["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    marks = sorted(
        (_span(event) for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(BLOCK)),
        key=lambda span: span.start,
    )
    if not marks:
        raise ValueError(f"the trace has no annotation that starts with {BLOCK!r}: is it from benchmarks.profile_steps?")
    ops = [op for thread in _by_thread(events).values() for op in nested(thread)]
    by_identity = {op.identity: op for op in ops if op.identity is not None}
    activities = [
        Activity(event["name"], event["ts"], event["dur"], args.get("stream", 0), by_identity.get(args.get("External id")))
        for event in events
        if event.get("cat") in DEVICE_KINDS
        for args in [event.get("args", {})]
    ]
    ends = [mark.start for mark in marks[1:]] + [float("inf")]
    return [
        Block(
            mark.name.removeprefix(BLOCK), steps, mark,
            [op for op in ops if mark.start <= op.start < mark.end], [a for a in activities if mark.start <= a.start < end],
        )
        for mark, end in zip(marks, ends, strict=True)
    ]  # fmt: skip


def _span(event: dict[str, Any]) -> Span:
    return Span(event["name"], event["ts"], event["dur"])


def _by_thread(events: Iterable[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(event)
    return threads


def nested(events: list[dict[str, Any]]) -> list[Op]:
    """Return one thread's ops in order of their start, each with the ops that were open then."""
    # of two ops with the same start, the longer one called the other
    events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    inner = [0.0] * len(events)
    open_: list[int] = []
    parents: list[int | None] = []
    for i, event in enumerate(events):
        while open_ and _span(events[open_[-1]]).end <= event["ts"]:
            open_.pop()
        parents.append(open_[-1] if open_ else None)
        if open_:
            inner[open_[-1]] += event["dur"]
        open_.append(i)
    ops: list[Op] = []
    for event, inside, parent in zip(events, inner, parents, strict=True):
        above = () if parent is None else (*ops[parent].parents, ops[parent])
        name = "autograd::engine" if event["name"].startswith(_ENGINE) else event["name"]
        own = max(0.0, event["dur"] - inside)
        ops.append(Op(name, event["ts"], event["dur"], own, above, event.get("args", {}).get("External id")))
    return ops


def of_run(blocks: Iterable[Block], run: str) -> list[Block]:
    return [block for block in blocks if block.run == run]


def _per_step(blocks: Sequence[Block], values: Callable[[Block], dict[str, list[float]]], pick: Pick) -> dict[str, float]:
    """Sum over a step, by name, what ``values`` returns for a block's calls, in order.

    ``pick`` combines the values of all steps at the same position in a step; if steps differ, it combines the blocks' sums.
    """
    each = [values(block) for block in blocks]
    result = {}
    for name in {name: None for calls in each for name in calls}:
        columns = [calls.get(name, []) for calls in each]
        size, rest = divmod(len(columns[0]), blocks[0].steps)
        if rest or any(len(column) != len(columns[0]) for column in columns):
            result[name] = pick([sum(column) / blocks[0].steps for column in columns])
        else:
            steps = [column[i : i + size] for column in columns for i in range(0, len(column), size)]
            result[name] = sum(pick(calls) for calls in zip(*steps, strict=True))
    return result


def _of_ops(blocks: Sequence[Block], value: Callable[[Op], float], pick: Pick = min) -> dict[str, float]:
    """Combine host times by their minimum: a busy machine only makes them longer."""
    return _per_step(blocks, lambda block: _by_name((op.name, value(op)) for op in block.ops), pick)


def _of_activities(blocks: Sequence[Block], name: Callable[[Activity], str | None]) -> dict[str, float]:
    return _per_step(blocks, lambda block: _by_name((name(a), a.duration) for a in block.activities), statistics.median)


def _by_name(pairs: Iterable[tuple[str | None, float]]) -> dict[str, list[float]]:
    values = defaultdict(list)
    for name, value in pairs:
        if name is not None:
            values[name].append(value)
    return values


def op_costs(blocks: Sequence[Block]) -> dict[str, Cost]:
    """Return costs by op name; an op nested in one of the same name counts once in ``total``."""
    calls = _of_ops(blocks, lambda op: 1.0, statistics.median)
    total = _of_ops(blocks, lambda op: 0.0 if any(parent.name == op.name for parent in op.parents) else op.duration)
    own = _of_ops(blocks, lambda op: op.self_time)
    device = _of_activities(blocks, lambda a: None if a.op is None else a.op.name)
    return {name: Cost(calls[name], total[name], own[name], device.get(name, 0.0)) for name in calls}


def kernel_costs(blocks: Sequence[Block]) -> dict[str, Cost]:
    """Return costs by kernel name, including copies and fills."""
    times = _of_activities(blocks, lambda a: a.name)
    calls = _per_step(blocks, lambda block: _by_name((a.name, 1.0) for a in block.activities), statistics.median)
    return {name: Cost(calls[name], time, time, time) for name, time in times.items()}


def time_within(blocks: Sequence[Block], names: Collection[str]) -> dict[str, float]:
    """Return the time per step for which each op of ``names`` is responsible; of nested ops the outermost is.

    It is the device's time if there is a device, else the host's.
    """

    def responsible(op: Op | None) -> Op | None:
        chain = () if op is None else (*op.parents, op)
        return next((op for op in chain if op.name in names), None)

    if any(block.activities for block in blocks):
        return _of_activities(blocks, lambda a: (op := responsible(a.op)) and op.name)
    return _per_step(blocks, lambda block: _by_name((op.name, op.duration) for op in block.ops if responsible(op) is op), min)


def differences(ours: dict[str, Cost], theirs: dict[str, Cost], by: str) -> list[tuple[str, Cost, Cost]]:
    """Return (name, our cost, their cost), sorted by how much we add of ``by``, the largest first."""
    rows = [(name, ours.get(name, Cost()), theirs.get(name, Cost())) for name in {**ours, **theirs}]
    return sorted(rows, key=lambda row: getattr(row[2], by) - getattr(row[1], by))


def union(spans: Iterable[Span]) -> float:
    """Return the total length covered by the spans."""
    covered, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return covered


def gaps(activities: Iterable[Activity]) -> list[Gap]:
    """Return the gaps in which all streams are idle, the longest first."""
    found: list[Gap] = []
    last: Activity | None = None
    for activity in sorted(activities, key=lambda activity: (activity.start, activity.end)):
        if last is not None and activity.start > last.end:
            found.append(Gap(activity.start - last.end, last.name, activity.name))
        if last is None or activity.end >= last.end:
            last = activity
    return sorted(found, key=lambda gap: -gap.duration)


def timeline(blocks: Sequence[Block]) -> Timeline | None:
    """Return the timeline of all blocks, per step; None without a device."""
    steps = sum(block.steps for block in blocks)
    used = [block.activities for block in blocks if block.activities]
    if not used:
        return None
    window = sum(max(a.end for a in activities) - min(a.start for a in activities) for activities in used)
    found = sorted((gap for activities in used for gap in gaps(activities)), key=lambda gap: -gap.duration)
    streams = {activity.stream for activities in used for activity in activities}
    return Timeline(window / steps, sum(map(union, used)) / steps, len(streams), found)


def host(blocks: Sequence[Block]) -> Host:
    """Return host costs; concurrent threads count once in ``between_ops``, which is the minimum over blocks."""
    between = [max(0.0, block.span.duration - union(op for op in block.ops if not op.parents)) for block in blocks]
    costs = op_costs(blocks).values()
    return Host(sum(cost.calls for cost in costs), sum(cost.own for cost in costs), min(between) / blocks[0].steps)
