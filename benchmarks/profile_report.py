"""Write a profile as Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.profile_trace import Cost, differences
from benchmarks.report.text import table

ROWS = 20
"""Maximum rows of a table; the remaining ones are summed in one more row."""
Rows = Sequence[tuple[str, Cost, Cost]]
Column = Callable[[Cost, Cost], float]


def text(found: dict[str, Any]) -> str:
    """Return a Markdown report of what :func:`benchmarks.profile_steps.profile` found."""
    facts, runs = found["facts"], found["runs"]
    ours, theirs = facts["provider"], facts["against"]
    on_device = runs[ours]["timeline"] is not None
    parts = [_heading(facts), _times(runs, facts["clock"]), _device_bound(runs) if on_device else ""]
    parts += [f"{label} was not captured in a graph: {reason}" for label, reason in found["not_captured"].items()]
    parts += ["## What is added, by op", _added(runs[ours], runs[theirs], "ops", on_device), _OPS]
    parts += [f"## Ops of {ours}", _costs(runs[ours], runs[theirs], "ops", theirs, "device" if on_device else "own")]
    if on_device:
        parts += [f"## Kernels of {ours}", _costs(runs[ours], runs[theirs], "kernels", theirs, "total")]
        parts += ["## What is added, by kernel", _added(runs[ours], runs[theirs], "kernels", on_device)]
        parts += [_gaps(label, run) for label, run in runs.items()]
    parts += [_bandwidth(label, runs[label], facts["copy_bandwidth_gbps"]) for label in (ours, theirs)]
    return "\n\n".join(part for part in parts if part) + "\n"


_OPS = (
    "Self time of ops on the host leaves out the ops that they call. Every figure is of one step: of each call on the host the "
    "fastest one, because other programs only make it slower, and of each kernel the median. "
    "`autograd::engine` is the engine's own work around each backward formula. A negative difference is saved."
)


def _heading(facts: dict[str, Any]) -> str:
    versions = f"torch {facts['torch']}, triton {facts['triton']}, {facts['cpu_threads']} CPU thread(s)"
    return (
        f"# {facts['case']}, {facts['mode']}: {facts['provider']} against {facts['against']}\n\n"
        f"{facts['device']}, {versions}, {facts['date']}, commit {facts['commit']}. Profiled in turns: {facts['rounds']} blocks of "
        f"{facts['steps']} steps each. A large copy, read plus written: {facts['copy_bandwidth_gbps']:.1f} GB/s. "
        f"Times that are not profiled are {facts['clock']}, medians of steps in turns."
    )


_BETWEEN = {
    "wall time": "Between ops is Python; the profiler makes ops and Python slower.",
    "CPU time": "Nested ops are counted too. Their CPU time was taken around each op that is not made of others; what is left of a "
    "step is Python and dispatch, and where steps take seconds mostly their scatter.",
}


def _times(runs: dict[str, Any], clock: str) -> str:
    header = ["run", "us a step", "until the call is back", "profiled", "ops", "us in ops", "us an op", "us between ops"]
    lines = []
    for label, run in runs.items():
        host = run["host"]
        each = host["in_ops"] / host["ops"] if host["ops"] else 0.0
        lines.append([
            label, f"{run['step_us']:.0f}", f"{run['host_us']:.0f}", f"{run['profiled_us']:.0f}",
            f"{host['ops']:.0f}", f"{host['in_ops']:.0f}", f"{each:.2f}", f"{host['between_ops']:.0f}",
        ])  # fmt: skip
    return "## Time and host\n\n" + table(header, lines) + f"\n\n{_BETWEEN[clock]}"


def _device_bound(runs: dict[str, Any]) -> str:
    lines = []
    for label, run in runs.items():
        busy, host = run["timeline"]["busy"], run["host_us"]
        verdict = "host-bound" if host > busy else "device-bound"
        lines.append(f"- {label}: the device is busy for {busy:.0f} us a step, the host for {host:.0f} us: **{verdict}**.")
    return "\n".join(lines)


def _difference(field: str) -> Column:
    return lambda ours, theirs: getattr(ours, field) - getattr(theirs, field)


def _rows(ours: dict[str, Any], theirs: dict[str, Any], what: str, by: str) -> Rows:
    mine, other = ({name: Cost(**cost) for name, cost in run[what].items()} for run in (ours, theirs))
    return differences(mine, other, by)


def _added(ours: dict[str, Any], theirs: dict[str, Any], what: str, on_device: bool) -> str:
    by = "own" if what == "ops" and not on_device else "device"
    columns = {"calls": _difference("calls"), f"{'self' if by == 'own' else 'device'} us": _difference(by)}
    if what == "ops" and on_device:
        columns["host self us"] = _difference("own")
    return _table(what, _rows(ours, theirs, what, by), columns, by, signed=True)


def _costs(ours: dict[str, Any], theirs: dict[str, Any], what: str, against: str, by: str) -> str:
    rows = [row for row in _rows(ours, theirs, what, by) if row[1].calls or row[1].device]
    rows.sort(key=lambda row: -getattr(row[1], by))
    whole = sum(getattr(mine, by) for _, mine, _ in rows)
    columns: dict[str, Column] = {"calls": lambda mine, _: mine.calls}
    if what == "ops":
        columns |= {"host total us": lambda mine, _: mine.total, "host self us": lambda mine, _: mine.own}
    if by != "own":
        columns["device us"] = lambda mine, _: mine.device
    columns["%"] = lambda mine, _: 100 * getattr(mine, by) / whole if whole else 0.0
    columns |= {f"{against}: calls": lambda _, other: other.calls, f"{against}: us": lambda _, other: getattr(other, by)}
    return _table(what, rows, columns, by, signed=False)


def _table(what: str, rows: Rows, columns: dict[str, Column], by: str, *, signed: bool) -> str:
    """Build a table of the rows with the largest difference or cost, in the order given; the others are summed in one row."""
    weight = (lambda row: abs(getattr(row[1], by) - getattr(row[2], by))) if signed else (lambda row: getattr(row[1], by))
    shown = {id(row) for row in sorted(rows, key=weight, reverse=True)[:ROWS]}
    form = "{:+.1f}" if signed else "{:.1f}"
    lines = [
        [_short(name), *(form.format(column(mine, other)) for column in columns.values())]
        for row in rows
        if id(row) in shown
        for name, mine, other in [row]
    ]
    for title, members in (("others", [row for row in rows if id(row) not in shown]), ("**all**", rows)):
        # a sum of total times would count nested ops twice
        sums = [
            "" if name == "host total us" else form.format(sum(column(*row[1:]) for row in members))
            for name, column in columns.items()
        ]
        lines.append([title, *sums])
    return table([what[:-1], *columns], lines)


def _short(name: str) -> str:
    """Shorten a name to fit a table: C++ kernels have very long template parameters."""
    name = name if len(name) <= 100 else f"{name[:97]}..."
    return f"`{name}`".replace("|", "\\|")


def _gaps(label: str, run: dict[str, Any]) -> str:
    found = run["timeline"]
    head = (
        f"## Launch gaps: {label}\n\nFrom the first kernel to the last {found['window']:.0f} us a step, "
        f"busy {found['busy']:.0f}, idle {found['idle_share']:.1%} in {found['gap_count']:.0f} gaps a step; "
        f"{found['streams']} stream(s)."
    )
    lines = [[_short(gap["before"]), _short(gap["after"]), f"{gap['duration']:.1f}"] for gap in found["gaps"]]
    return head + "\n\n" + table(["behind", "before", "us"], lines)


def _bandwidth(label: str, run: dict[str, Any], copy: float) -> str:
    if run["traffic"] is None:
        return f"## Achieved bandwidth: {label}\n\nNot counted: ops can't be seen in a compiled graph."
    moved = {name: entry for name, entry in run["traffic"].items() if not entry["product"]}
    order = sorted(moved, key=lambda name: -moved[name]["us"])[:ROWS]
    lines = [
        [
            f"`{name}`", f"{moved[name]['calls']}", f"{moved[name]['bytes'] / 1e6:.2f}", f"{moved[name]['us']:.1f}",
            f"{moved[name]['gbps']:.1f}", f"{moved[name]['gbps'] / copy:.0%}",
        ]
        for name in order
    ]  # fmt: skip
    note = (
        "Compulsory bytes: each input read once, each output written once; products of matrices are left out, but for those inside "
        "mope_fast's own ops. More than 100 % is what caches served."
    )
    return f"## Achieved bandwidth: {label}\n\n{note}\n\n" + table(["op", "calls", "MB", "us", "GB/s", "of copy"], lines)
