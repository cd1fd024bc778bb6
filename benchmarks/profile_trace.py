"""What a Chrome trace of torch's profiler says about blocks of steps: costs by op and by kernel, and when the device was idle.

Nothing here runs or profiles anything: it is arithmetic on events. Times are microseconds, costs are of one step.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

BLOCK = "profiled: "
"""What the name of a block's annotation begins with; the run's own follows."""
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
    """One call of an op on the host; ``self_time`` leaves out the ops that it calls, ``parents`` are those that called it."""

    self_time: float
    parents: tuple["Op", ...]
    identity: int | None
    """What the kernels that it launches carry."""


@dataclass(frozen=True)
class Activity(Span):
    """A kernel, copy or fill on a stream; ``op`` is the innermost one that launched it, None in a graph's replay."""

    stream: int
    op: Op | None


@dataclass(frozen=True)
class Block:
    """Some steps of one run back to back; the device has finished before the next block."""

    run: str
    steps: int
    span: Span
    ops: list[Op]
    activities: list[Activity]


class Cost(NamedTuple):
    """A step's share; ``total`` includes what an op calls, ``device`` what it itself launched."""

    calls: float = 0.0
    total: float = 0.0
    own: float = 0.0
    device: float = 0.0


class Gap(NamedTuple):
    duration: float
    before: str
    """What ended last."""
    after: str
    """What starts next."""


class Timeline(NamedTuple):
    """Of the device within blocks, from the first kernel's start to the last one's end; several streams are one timeline."""

    window: float
    busy: float
    streams: int
    gaps: list[Gap]
    """The largest first."""

    @property
    def idle_share(self) -> float:
        return 1 - self.busy / self.window if self.window else 0.0


class Host(NamedTuple):
    """A step's host side."""

    ops: float
    in_ops: float
    between_ops: float
    """Python, and whatever else is no op."""


def read_blocks(document: dict[str, Any], steps: int) -> list[Block]:
    """The blocks of a trace; ``steps`` is how many each has.

    Raises:
        ValueError: there is none.
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
            [op for op in ops if mark.start <= op.start < end], [a for a in activities if mark.start <= a.start < end],
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
    """One thread's ops in order of their start, each with the ops that were open then."""
    # of two with one start the longer one called the other
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


def _costs(blocks: Sequence[Block], of_block: Callable[[Block], dict[str, list[float]]]) -> dict[str, Cost]:
    """Medians over blocks, of which one may have been disturbed."""
    each = [of_block(block) for block in blocks]
    names = {name: None for sums in each for name in sums}
    nothing = [0.0] * len(Cost._fields)
    columns = {name: zip(*(sums.get(name, nothing) for sums in each), strict=True) for name in names}
    return {
        name: Cost(*(statistics.median(column) / blocks[0].steps for column in columns[name]))
        for name in names
    }  # fmt: skip


def op_costs(blocks: Sequence[Block]) -> dict[str, Cost]:
    """By name; an op within one of its own name counts once in ``total``."""

    def of_block(block: Block) -> dict[str, list[float]]:
        sums = defaultdict(lambda: [0.0] * len(Cost._fields))
        for op in block.ops:
            again = any(parent.name == op.name for parent in op.parents)
            _add(sums[op.name], Cost(1, 0.0 if again else op.duration, op.self_time))
        for activity in block.activities:
            if activity.op is not None:
                _add(sums[activity.op.name], Cost(device=activity.duration))
        return sums

    return _costs(blocks, of_block)


def kernel_costs(blocks: Sequence[Block]) -> dict[str, Cost]:
    """By name, copies and fills too."""

    def of_block(block: Block) -> dict[str, list[float]]:
        sums = defaultdict(lambda: [0.0] * len(Cost._fields))
        for activity in block.activities:
            _add(sums[activity.name], Cost(1, activity.duration, activity.duration, activity.duration))
        return sums

    return _costs(blocks, of_block)


def time_within(blocks: Sequence[Block], names: Collection[str]) -> dict[str, float]:
    """A step's time for which each op of ``names`` is responsible, the outermost where one calls another.

    The device's time if there is a device, else the host's.
    """

    def of_block(block: Block) -> dict[str, list[float]]:
        sums = defaultdict(lambda: [0.0] * len(Cost._fields))
        on_device = bool(block.activities)
        spans = [(a.duration, (*a.op.parents, a.op)) for a in block.activities if a.op is not None]
        for duration, chain in spans if on_device else [(op.duration, (*op.parents, op)) for op in block.ops]:
            responsible = next((op for op in chain if op.name in names), None)
            if responsible is not None and (on_device or responsible is chain[-1]):
                _add(sums[responsible.name], Cost(total=duration))
        return sums

    return {name: cost.total for name, cost in _costs(blocks, of_block).items()}


def _add(sums: list[float], cost: Cost) -> None:
    for i, value in enumerate(cost):
        sums[i] += value


def differences(ours: dict[str, Cost], theirs: dict[str, Cost], by: str) -> list[tuple[str, Cost, Cost]]:
    """(name, our cost, theirs), what we add most of ``by`` first."""
    rows = [(name, ours.get(name, Cost()), theirs.get(name, Cost())) for name in {**ours, **theirs}]
    return sorted(rows, key=lambda row: getattr(row[2], by) - getattr(row[1], by))


def union(spans: Iterable[Span]) -> float:
    """Length of what the spans cover together."""
    covered, end = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(end, span.start))
        end = max(end, span.end)
    return covered


def gaps(activities: Iterable[Activity]) -> list[Gap]:
    """When no stream has anything to do, the longest first."""
    found: list[Gap] = []
    last: Activity | None = None
    for activity in sorted(activities, key=lambda activity: (activity.start, activity.end)):
        if last is not None and activity.start > last.end:
            found.append(Gap(activity.start - last.end, last.name, activity.name))
        if last is None or activity.end >= last.end:
            last = activity
    return sorted(found, key=lambda gap: -gap.duration)


def timeline(blocks: Sequence[Block]) -> Timeline | None:
    """Of all blocks, per step; None without a device."""
    steps = sum(block.steps for block in blocks)
    used = [block.activities for block in blocks if block.activities]
    if not used:
        return None
    window = sum(max(a.end for a in activities) - min(a.start for a in activities) for activities in used)
    found = sorted((gap for activities in used for gap in gaps(activities)), key=lambda gap: -gap.duration)
    streams = {activity.stream for activities in used for activity in activities}
    return Timeline(window / steps, sum(map(union, used)) / steps, len(streams), found)


def host(blocks: Sequence[Block]) -> Host:
    """Medians over blocks. Threads that run at the same time count once in ``between_ops``."""

    def of_block(block: Block) -> tuple[float, float, float]:
        within = [op for op in block.ops if op.start < block.span.end]
        outer = [op for op in within if not op.parents]
        return len(within), sum(op.self_time for op in within), max(0.0, block.span.duration - union(outer))

    columns = zip(*map(of_block, blocks), strict=True)
    return Host(*(statistics.median(column) / blocks[0].steps for column in columns))
