"""Tables and sentences of a report."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.report.model import Goal, Group, Profile, Row, Skip, distinct, optional, overlap, speed

TIMING_TITLES = {"called": "as called from Python", "replay": "one call's share of a CUDA graph"}


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def _cells(group: Group, row: Row, repeated: bool) -> list[str]:
    best = group.best(group.profile.peers)
    return [
        "" if repeated else group.case,
        group.profile.label(row),
        f"{row.median * 1e6:.1f}",
        f"{row.quartiles[0] * 1e6:.1f} - {row.quartiles[1] * 1e6:.1f}",
        optional(None if best is None else best.median / row.median, "{:.2f}x"),
        *(cell(row) for cell in group.profile.columns.values()),
    ]


def results_table(groups: Iterable[Group], profile: Profile) -> str:
    header = ["size", "provider", "median us", "quartiles us", f"speed / {profile.peers_text}", *profile.columns]
    lines = []
    for each in groups:
        rows = [each.rows[name] for name in profile.labels if name in each.rows]
        lines += [_cells(each, row, repeated=i > 0) for i, row in enumerate(rows)]
    return table(header, lines)


def _tax(row: Row | None) -> str:
    if row is None or "tax" not in row.info:
        return "-"
    return f"{row.info['tax']:.3f} ({row.info['tax_low']:.3f} - {row.info['tax_high']:.3f})"


def milliseconds(row: Row | None) -> str:
    return "-" if row is None else f"{float(f'{row.median * 1e3:.4g}'):g}"  # four digits, but no exponent


def _excess(row: Row | None) -> str:
    return "-" if row is None or "excess" not in row.info else f"{row.info['excess']:.3f}"


def _tokens(row: Row | None) -> str:
    return "-" if row is None else f"{row.info['token_ratio']:.3f}"


def _memory(row: Row | None) -> str:
    return (
        "-"
        if row is None or not row.info["peak_memory"]
        else f"{row.info['memory_tax']:.2f} ({row.info['peak_memory'] / 2**20:.4g})"
    )


def tax_table(groups: Sequence[Group], profile: Profile) -> str:
    """Return a table of all modes and timings of one size; if tokens were counted, with their ratio, and times divided by it."""
    header, columns = ["provider"], []
    all_rows = {name: row for each in groups for name, row in each.rows.items()}
    counted = any("token_ratio" in row.info for row in all_rows.values())
    if counted:
        header.append("tokens")
        columns.append((all_rows, _tokens))
    for mode in dict.fromkeys(each.mode for each in groups):
        of_mode = [each for each in groups if each.mode == mode]
        for each in of_mode:
            name = mode if len(of_mode) == 1 else f"{mode}, {each.timing}"
            header += [f"{name}: time", "ms"]
            columns += [(each.rows, _tax), (each.rows, milliseconds)]
            if counted:
                header.append("time / tokens")
                columns.append((each.rows, _excess))
        header.append(f"{mode}: memory (MiB)")
        columns.append((of_mode[0].rows, _memory))
    present = [name for name in profile.labels if name in all_rows]
    return table(header, ([profile.labels[name], *(cell(rows.get(name)) for rows, cell in columns)] for name in present))


def lead(group: Group) -> float | None:
    """Return the speed of ours relative to the fastest rival."""
    return speed(group, group.profile.rivals(group))


def losses(groups: Iterable[Group]) -> list[str]:
    """Return a sentence for every size at which some rival is faster than ours."""
    return [line for each in groups if (line := (_loss if each.profile.baseline is None else _tax_loss)(each)) is not None]


def _loss(group: Group) -> str | None:
    rivals = group.profile.rivals(group)
    best = group.best(rivals)
    if best is None or group.ours is None or best.median >= group.ours.median:
        return None
    note = "; the quartiles overlap" if overlap(group, rivals) else ""
    return (
        f"{group.mode}, {group.timing}, {group.case}: {group.profile.label(best)} takes {best.median * 1e6:.1f} us, "
        f"{group.profile.label(group.ours)} {group.ours.median * 1e6:.1f} us ({group.ours.median / best.median - 1:.0%} more{note})"
    )


def _tax_loss(group: Group) -> str | None:
    rivals = [group.rows[name] for name in group.profile.rivals(group) if name in group.rows]
    best = min(rivals, key=lambda row: row.info["tax"], default=None)
    if best is None or group.ours is None or best.info["tax"] >= group.ours.info["tax"]:
        return None
    note = "; their spreads overlap" if group.ours.info["tax_low"] <= best.info["tax_high"] else ""
    names = (best.info["provider"], group.profile.baseline, group.profile.ours)
    rival, baseline, ours = (group.profile.labels[name] for name in names)
    return (
        f"{group.mode}, {group.timing}, {group.case}: {rival} takes {best.info['tax']:.3f} times as long as the {baseline}, "
        f"{ours} {group.ours.info['tax']:.3f} times{note}"
    )


def verdict(goal: Goal, group: Group) -> tuple[float | None, str]:
    value = goal.measure(group)
    if value is None:
        return None, "not measured"
    if goal.excess(value) <= 0:
        return value, "met"
    if goal.level(group):
        return value, f"level ({'the spread reaches it' if goal.at_most else 'quartiles overlap'})"
    return value, f"missed by {goal.excess(value):{'.1%' if goal.at_most else '.0%'}}"


def _worst(goal: Goal, groups: Sequence[Group]) -> tuple[str, float | None, str]:
    """Return the size that misses the goal most, its value, and the number of sizes with each verdict."""
    answers = [(each.case, *verdict(goal, each)) for each in groups]
    measured = [each for each in answers if each[1] is not None]
    if not measured:
        return "-", None, "not measured"
    case, value, answer = max(measured, key=lambda each: goal.excess(each[1]))
    if len(measured) == len(answers) and all(each[2] == "met" for each in measured):
        return case, value, f"met at all {len(measured)}"
    counts = {kind: sum(each[2].startswith(kind) for each in answers) for kind in ("met", "level", "missed", "not measured")}
    worst = f"; worst: {answer}" if answer.startswith("missed") else ""
    return case, value, f"{', '.join(f'{kind} at {n}' for kind, n in counts.items() if n)}{worst}"


GOAL_HEADER = ["goal", "mode", "size (the worst, if several)", "wanted", "measured", "verdict"]


def judged(goal: Goal, groups: Sequence[Group]) -> list[Group]:
    """Return the groups that a goal is about."""
    return [g for g in groups if (g.mode, g.timing) == (goal.mode, goal.timing) and goal.fits(g.info)]


def is_missed(goal: Goal, groups: Sequence[Group]) -> bool:
    return any(verdict(goal, group)[1].startswith("missed") for group in judged(goal, groups))


def goal_lines(groups: Sequence[Group], profile: Profile, device_type: str) -> list[list[str]]:
    lines = []
    for goal in profile.goals:
        if goal.device_type != device_type:
            continue
        fitting = judged(goal, groups)
        if not fitting:
            answers = [("-", None, "not measured")]
        elif goal.summary:
            answers = [_worst(goal, fitting)]
        else:
            answers = [(each.case, *verdict(goal, each)) for each in fitting]
        name = [goal.text, f"{goal.mode}, {goal.timing}"]
        form = "{:.3f}" if goal.at_most else "{:.2f}"
        lines += [[*name, case, goal.wanted(), optional(value, form), answer] for case, value, answer in answers]
    return lines


def _peaks(rows: Sequence[Row], profile: Profile) -> list[str]:
    copies = [row.info["copy_bandwidth_gbps"] for row in rows]
    lines = [f"Copy bandwidth measured beside it: {min(copies):.4g} to {max(copies):.4g} GB/s, read plus written."]
    if "of roofline" in profile.columns and any(row.roofline_share is not None for row in rows):
        peaks = [row.info["peak_tflops"] for row in rows]
        lines.append(
            f"Peak of arithmetic: {min(peaks):.4g} to {max(peaks):.4g} TFLOP/s in {distinct(rows, 'peak_dtype')}, "
            f"from {distinct(rows, 'peak_source')}."
        )
    return lines


def preamble(rows: Sequence[Row], profile: Profile) -> str:
    versions = ", ".join(f"{name} {distinct(rows, name)}" for name in ("torch", "triton", "mope_fast", "python"))
    ours = [row for row in rows if row.info["provider"] == profile.ours]
    return "\n".join(
        [
            f"Device: {distinct(rows, 'device')}. {versions}.",
            f"Measured {distinct(rows, 'date')} at commit {distinct(rows, 'commit')}; runs: {distinct(rows, 'runs')}. "
            f"Times are {distinct(rows, 'clock')} with {distinct(rows, 'cpu_threads')} CPU thread(s).",
            *_peaks(rows, profile),
            f'`{profile.labels[profile.ours]}` is `impl="auto"`, which ran as: {distinct(ours, "implementation")}.',
            f"State of the cache when a call begins: {distinct(rows, 'l2')}.",
            "",
            profile.notes,
        ]
    )


def inexact(rows: Iterable[Row], profile: Profile) -> list[str]:
    """Return a sentence for every number outside its bound."""
    return [
        f"{row.info['mode']}, {row.info['timing']}, {row.info['case']}, {profile.label(row)}: {miss}"
        for row in rows
        for miss in row.info.get("inexact", [])
    ]


def skips(skipped: Iterable[Skip], profile: Profile) -> list[str]:
    """Return a sentence for every skipped provider and reason."""
    cases: dict[tuple[str, str], dict[str, None]] = {}
    for skip in skipped:
        cases.setdefault((skip.provider, skip.reason), {})[skip.case] = None
    return [f"{profile.labels[name]}: {reason} ({'; '.join(where)})" for (name, reason), where in cases.items()]


def _tax_tables(groups: Iterable[Group], profile: Profile) -> dict[str, list[Group]]:
    """Map each table's title to its groups."""
    tables: dict[str, list[Group]] = {}
    for each in groups:
        tables.setdefault(f"{each.case}, {each.mode}" if profile.table_per_mode else each.case, []).append(each)
    return tables


def results(groups: Sequence[Group], profile: Profile) -> list[str]:
    """Return titles and tables: with taxes one for each size (or each of its modes), else one for each mode and timing."""
    parts = []
    if profile.baseline is not None:
        for title, chosen in _tax_tables(groups, profile).items():
            parts += [f"## {title}", tax_table(chosen, profile)]
        return parts
    for mode, timing in dict.fromkeys((g.mode, g.timing) for g in groups):
        chosen = [g for g in groups if (g.mode, g.timing) == (mode, timing)]
        parts += [f"## {mode}, {TIMING_TITLES[timing]}", results_table(chosen, profile)]
    return parts


def markdown(groups: Sequence[Group], profile: Profile, skipped: Sequence[Skip], pictures: Sequence[str]) -> str:
    rows = [row for each in groups for row in each.rows.values()]
    parts = [f"# {profile.op} on {distinct(rows, 'device')}", preamble(rows, profile)]
    parts += results(groups, profile)
    parts += ["## Goals", table(GOAL_HEADER, goal_lines(groups, profile, rows[0].info["device_type"]))]
    parts += ["## Where mope_fast loses", "\n".join(f"- {line}" for line in losses(groups)) or "At no size measured."]
    if lines := inexact(rows, profile):
        parts += ["## Timed, though outside their bound", "\n".join(f"- {line}" for line in lines)]
    if lines := skips(skipped, profile):
        parts += ["## Not measured", "\n".join(f"- {line}" for line in lines)]
    parts += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"
