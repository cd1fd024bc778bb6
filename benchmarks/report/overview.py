"""One page about all devices: the cost of MoPE on top of a frozen encoder, compared with other methods, and which goals are met."""

import collections
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.cases.models import INFERENCE, TRAINING
from benchmarks.report import text
from benchmarks.report.model import Group, Profile, Row, Skip, distinct
from benchmarks.report.profiles import END_TO_END, PROFILES, TOKENS, like

WHERE = {"called": "as called", "replay": "in a CUDA graph"}


@dataclass(frozen=True)
class Device:
    """The results of one device; ``folder`` is the path from the page to the reports of its ops."""

    rows: Sequence[Row]
    folder: str
    groups: dict[str, list[Group]]
    """op -> its groups; scaling has curves instead."""
    skipped: Sequence[Skip] = ()
    curves: Sequence[str] = ()
    """Names of the pictures in the folder's ``scaling``, if that was measured."""
    flatness: Sequence[str] = ()
    """Verdicts of the curves about the scaling goal, one sentence each."""

    @property
    def name(self) -> str:
        return self.rows[0].info["device"]

    @property
    def type(self) -> str:
        return self.rows[0].info["device_type"]

    def picture(self, op: str, name: str) -> str:
        return f"![{op}: {name}]({self.folder}/{op}/{name}.svg)"


def _tax(row: Row | None) -> str:
    return "-" if row is None else f"{row.info['tax']:.3f}"


def _memory(row: Row | None) -> str:
    return "-" if row is None or not row.info["memory_tax"] else f"{row.info['memory_tax']:.2f}"


def _columns(groups: Sequence[Group], profile: Profile) -> list[str]:
    """Return all measured providers but the baseline; those with another task or other inputs say so in their labels."""
    return [name for name in profile.labels if name != profile.baseline and any(name in group.rows for group in groups)]


def tax_tables(groups: Sequence[Group], profile: Profile) -> Iterator[str]:
    """Yield for every mode the times and peak memory of all providers relative to the baseline's."""
    for mode in dict.fromkeys(group.mode for group in groups):
        chosen = [group for group in groups if group.mode == mode]
        names = _columns(chosen, profile)
        labels = [f"**{profile.labels[name]}**" if name == profile.ours else profile.labels[name] for name in names]
        times = [
            [f"{each.case}, {WHERE[each.timing]}", text.milliseconds(each.rows.get(profile.baseline)),
             *(_tax(each.rows.get(name)) for name in names)]
            for each in chosen
        ]  # fmt: skip
        yield f"**{mode.capitalize()}**, time over the {profile.labels[profile.baseline]}'s:"
        yield text.table(["", f"{profile.labels[profile.baseline]}, ms", *labels], times)
        called = [each for each in chosen if each.timing == "called"]
        memory = [[each.case, *(_memory(each.rows.get(name)) for name in names)] for each in called]
        if any(cell != "-" for line in memory for cell in line[1:]):
            yield f"**{mode.capitalize()}**, peak memory over the {profile.labels[profile.baseline]}'s:"
            yield text.table(["", *labels], memory)


def _link(device: Device, op: str) -> str:
    return f"[{op}]({device.folder}/{op}/report.md)"


def _speed_tables(device: Device) -> Iterator[str]:
    lines = []
    for op, groups in device.groups.items():
        profile = PROFILES[op]
        if profile.baseline is None:
            for mode, timing in dict.fromkeys((group.mode, group.timing) for group in groups):
                chosen = [group for group in groups if (group.mode, group.timing) == (mode, timing)]
                speeds = sorted(speed for group in chosen if (speed := text.lead(group)) is not None)
                if speeds:
                    lines.append(
                        [_link(device, op), mode, WHERE[timing], str(len(speeds)),
                         *(f"{speed:.2f}" for speed in (speeds[0], statistics.median(speeds), speeds[-1]))]
                    )  # fmt: skip
    if lines:
        yield '### Functions\n\nSpeed of `impl="auto"` relative to the fastest other form of the same size, over all sizes:'
        yield text.table(["", "mode", "", "sizes", "worst", "middle", "best"], lines)


def _scaling(device: Device) -> Iterator[str]:
    if device.curves:
        yield "### Along K, L, B and S"
        if device.flatness:
            yield "\n".join(f"- {line}" for line in device.flatness)
        yield "\n\n".join(device.picture("scaling", name) for name in device.curves)
        yield f"Every point: [points.csv]({device.folder}/scaling/points.csv)."


def _goals(device: Device) -> Iterator[str]:
    lines = [
        [op, *line] for op, profile in PROFILES.items() for line in text.goal_lines(device.groups.get(op, []), profile, device.type)
    ]
    yield "### Goals"
    yield text.table(["", *text.GOAL_HEADER], lines)
    closing = [
        f"- {goal.text} ({goal.mode}): {goal.closing}"
        for op, groups in device.groups.items()
        for goal in PROFILES[op].goals
        if goal.device_type == device.type and goal.closing and text.is_missed(goal, groups)
    ]
    if closing:
        yield "What would close the gap where a goal is missed:"
        yield "\n".join(closing)


def _section(device: Device) -> Iterator[str]:
    rows = device.rows
    yield f"## {device.name}"
    yield (
        f"torch {distinct(rows, 'torch')}, triton {distinct(rows, 'triton')}; {distinct(rows, 'cpu_threads')} CPU thread(s), "
        f"{distinct(rows, 'clock')}; measured {distinct(rows, 'date')} at commits {distinct(rows, 'commit')}."
    )
    for op, groups in device.groups.items():
        profile = PROFILES[op]
        if profile.baseline is not None:
            yield f"### {profile.title}"
            yield from tax_tables(groups, profile)
            for mode, timing in dict.fromkeys((group.mode, group.timing) for group in groups):
                yield device.picture(op, f"taxes_{mode}_{timing}")
            yield f"Spreads, sizes and what was not measured: {_link(device, op)}."
    yield from _scaling(device)
    yield from _speed_tables(device)
    yield from _goals(device)
    yield "### Where mope_fast loses"
    whole = [line for op, groups in device.groups.items() if PROFILES[op].baseline for line in text.losses(groups)]
    yield "\n".join(f"- {line}" for line in whole) or "No whole model is slower than another method."
    yield f"Functions, size by size: {', '.join(_link(device, op) for op in device.groups if not PROFILES[op].baseline)}."


def page(devices: Sequence[Device]) -> str:
    head = """\
# What MoPE costs

Time and peak memory of a fused model's step relative to the frozen encoder's own step (1.000), in the same mode and run; the
complementary encoder is in neither. A training step of the frozen encoder goes back through every layer, so **head only**, which
never goes back into the encoder, is cheaper than 1. [README](README.md) says what each provider is and how it is checked and timed.
This page is written by `python -m benchmarks.report`; `python -m benchmarks.run` writes the same page about your machine."""
    without = [] if any(device.type == "cuda" for device in devices) else ["**No GPU has been measured yet.**"]
    return "\n\n".join([head, *without, *(part for device in devices for part in _section(device))]) + "\n"


def is_complete(device: Device) -> bool:
    """Return whether all models of the README's table have been measured."""
    measured = {group.info["model"] for group in device.groups.get(END_TO_END.op, []) if "mope_fast" in group.rows}
    return measured.issuperset(TOKENS)


def headline(devices: Sequence[Device]) -> str:
    """Return the README's table: three encoders on each device, each at the batch size with the most measurements."""
    columns = [f"{device.name}, {mode}" for device in devices for mode in (INFERENCE, TRAINING)]
    lines = []
    for model, tokens in TOKENS.items():
        line = [model]
        for device in devices:
            named = [group for group in device.groups.get(END_TO_END.op, []) if like(model=model, S=tokens)(group.info)]
            called = [group for group in named if group.timing == "called"]
            counts = collections.Counter(row.info["B"] for group in called for row in group.rows.values())
            batch = counts.most_common(1)[0][0] if counts else None
            rows = {group.mode: group.rows for group in called if group.info["B"] == batch}
            line += [_tax(rows.get(mode, {}).get("mope_fast")) for mode in (INFERENCE, TRAINING)]
        lines.append(line)
    return text.table(["", *columns], lines)


def put(document: str, table: str) -> str:
    """Return ``document`` with the table between its two marks."""
    begin, end = "<!-- from benchmarks/REPORT.md -->", "<!-- end -->"
    between = re.compile(f"{begin}.*?{end}", re.DOTALL)
    replaced, count = between.subn(lambda _: f"{begin}\n\n{table}\n\n{end}", document)
    if count != 1:
        raise ValueError(f"expected one pair of marks {begin} ... {end}, got {count}")
    return replaced
