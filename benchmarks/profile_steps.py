"""Profile a step: ``python -m benchmarks.profile_steps --encoder ViT-B/16 --batch 8 --mode training --output DIR``.

Runs a provider of the group ``end_to_end`` and one to compare it with under torch's profiler, in turns, and writes a report, a
JSON file and a Chrome trace. Outputs are not checked; the benchmark does that. On a GPU each provider runs as called and, if it can
be captured, as a CUDA graph.
"""

import argparse
import dataclasses
import datetime
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import end_to_end, environment, measure, profile_report, profile_trace
from benchmarks.baselines import end_to_end as providers
from benchmarks.baselines.encoders import FROZEN
from benchmarks.baselines.models import is_compiled
from benchmarks.cases import FULL, SMOKE
from benchmarks.cases.end_to_end import FusedCase, cases
from benchmarks.cases.models import MODES
from benchmarks.profile_traffic import count_traffic, cpu_times
from mope_fast._files import write_atomically

Steps = dict[str, Callable[[], Any]]
"""Label of a run -> its step."""
REPLAY = ", replay"
"""Suffix of a CUDA graph's label."""


def find_case(encoder: str, batch: int, device: torch.device) -> FusedCase:
    """Return a case with any batch size for one of the benchmark's encoders, including the tiny ones of its smoke run.

    Raises:
        ValueError: the benchmark has no encoder of that name.
    """
    known = {case.encoder.name: case for extent in (SMOKE, FULL) for case in cases(device, extent)}
    if encoder not in known:
        raise ValueError(f"there is no encoder {encoder!r}, expected one of {sorted(known)}")
    return dataclasses.replace(known[encoder], batch=batch, modes=MODES, compiled=False)


def make_step(name: str, case: FusedCase, mode: str, device: torch.device) -> Callable[[], Any]:
    """Return a provider's step on the case's batch, which is the same for all providers.

    Raises:
        ValueError: the mode has no such provider, or the provider can't run here.
    """
    known = [provider for provider, (modes, _) in providers.PROVIDERS.items() if mode in modes]
    if name not in known:
        raise ValueError(f"there is no provider {name!r} in {mode}, expected one of {known}")
    if (reason := providers.why_not(name, case, device, smoke=False)) is not None:
        raise ValueError(f"{name} can't run here: {reason}")
    provider, inputs = providers.build(name, case, device, mode), end_to_end.batch_of(case, device)
    return lambda: provider.step(inputs, mode)


def with_graphs(steps: Steps) -> tuple[Steps, dict[str, str]]:
    """Return the steps together with replays of their CUDA graphs, and the reasons for those that can't be captured."""
    both, failed = dict(steps), {}
    for label, step in steps.items():
        try:
            graph, _ = measure.capture(lambda _, step=step: tuple(step().values()), [None])
        except Exception as error:  # a capture may fail in any way; the other runs are still useful
            failed[label] = f"{type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.synchronize()
        else:
            both[label + REPLAY] = graph.replay
    return both, failed


def time_steps(steps: Steps, rounds: int) -> dict[str, dict[str, float]]:
    """Return unprofiled medians in microseconds, one step of each in turns: of the whole step, and until the call returned."""
    whole, called = ({label: [] for label in steps} for _ in range(2))
    for _ in range(rounds):
        for label, step in steps.items():
            start = measure.synchronised_time()
            step()
            called[label].append(measure.clock() - start)
            whole[label].append(measure.synchronised_time() - start)
    median = {"step_us": whole, "host_us": called}
    return {label: {name: statistics.median(times[label]) * 1e6 for name, times in median.items()} for label in steps}


def record(steps: Steps, count: int, rounds: int) -> dict[str, Any]:
    """Record a Chrome trace of ``rounds`` blocks of ``count`` steps of each, in turns; warm-up steps are not in a block."""
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        for warm_up in range(rounds + 1):
            for label, step in steps.items():
                measure.synchronised_time()
                if warm_up == 0:
                    step()
                    continue
                with torch.profiler.record_function(profile_trace.BLOCK + label):
                    for _ in range(count):
                        step()
        measure.synchronised_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        document = json.loads(path.read_text())
    document.pop("host_name", None)
    return document


def clock_ops(steps: Steps, rounds: int) -> list[profile_trace.Block]:
    """Measure as :func:`record` does, but the CPU time of each op instead of wall time, with one step per block."""
    blocks = []
    for _ in range(rounds):
        for label, step in steps.items():
            ops = [profile_trace.Op(name, 0.0, 1e6 * took, 1e6 * took, (), None) for name, took in cpu_times(step)]
            blocks.append(profile_trace.Block(label, 1, profile_trace.Span(label, 0.0, 0.0), ops, []))
    return blocks


def summarise(
    label: str,
    blocks: list[profile_trace.Block],
    clocked: list[profile_trace.Block],
    traffic: dict | None,
    times: dict[str, float],
) -> dict[str, Any]:
    """Return one run's costs per step, in microseconds; times of ops come from ``clocked`` blocks, if there are any."""
    blocks = profile_trace.of_run(blocks, label)
    timed = profile_trace.of_run(clocked, label) or blocks
    ops, timeline, host = profile_trace.op_costs(timed), profile_trace.timeline(blocks), profile_trace.host(blocks)
    if timed is not blocks:
        in_ops = sum(cost.own for cost in ops.values())
        host = profile_trace.Host(host.ops, in_ops, times["step_us"] - in_ops)
    summary = times | {
        "ops": {name: cost._asdict() for name, cost in ops.items()},
        "kernels": {name: cost._asdict() for name, cost in profile_trace.kernel_costs(blocks).items()},
        "host": host._asdict(),
        "profiled_us": min(block.span.duration for block in blocks) / blocks[0].steps,
        "timeline": None,
        "traffic": None,
    }
    if timeline is not None:
        largest = [gap._asdict() for gap in timeline.gaps[:10]]
        summary["timeline"] = timeline._asdict() | {
            "idle_share": timeline.idle_share, "gaps": largest, "gap_count": len(timeline.gaps) / sum(b.steps for b in blocks),
        }  # fmt: skip
    if traffic is not None:
        took = profile_trace.time_within(timed, traffic)
        summary["traffic"] = {
            name: dataclasses.asdict(moved) | {"us": took[name], "gbps": moved.bytes / took[name] / 1e3}
            for name, moved in traffic.items()
            if took.get(name)
        }
    return summary


def profile(
    case: FusedCase, mode: str, running: Steps, device: torch.device, *, count: int, rounds: int, smoke: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Profile two providers; return the results and the trace.

    Args:
        running: two providers' steps: the one of interest, and the one to compare it with.
        count: steps per block.
        rounds: blocks of each provider.
    """
    provider, against = running
    for step in running.values():
        for _ in range(3):
            step()
    traffic = {name: None if is_compiled(name) else count_traffic(step) for name, step in running.items()}
    everything, failed = with_graphs(running) if device.type == "cuda" else (running, {})
    times = time_steps(everything, max(3, count * rounds))
    trace = record(everything, count, rounds)
    blocks, clocked = profile_trace.read_blocks(trace, count), []
    if measure.clock is time.process_time and not any(map(is_compiled, running)):
        clocked = clock_ops(running, count * rounds)
    runs = {label: summarise(label, blocks, clocked, traffic.get(label), times[label]) for label in everything}
    facts = environment.describe(device) | case.describe()
    facts |= {
        "commit": environment.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "copy_bandwidth_gbps": measure.copy_bandwidth(device, smoke) / 1e9,
        "clock": "CPU time" if measure.clock is time.process_time else "wall time",
        "mode": mode, "provider": provider, "against": against, "steps": count, "rounds": rounds,
    }  # fmt: skip
    return {"facts": facts, "runs": runs, "not_captured": failed}, trace


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True, metavar="NAME", help="an encoder of the group end_to_end, such as ViT-B/16")
    parser.add_argument("--batch", required=True, type=int, metavar="B")
    parser.add_argument("--mode", required=True, choices=MODES)
    parser.add_argument("--provider", default="mope_fast", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--against", default=FROZEN, metavar="NAME", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="steps per block (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="blocks of each provider (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU time of steps and of ops; no GPU")
    parser.add_argument("--smoke", action="store_true", help="only check that it runs, with a small copy for the bandwidth")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="for NAME.md, NAME.json, NAME.trace.json.gz")
    options = parser.parse_args(arguments)
    device = environment.default_device()
    if options.cpu_time:
        if device.type == "cuda":
            parser.error("--cpu-time doesn't include GPU time: hide the GPU (CUDA_VISIBLE_DEVICES=) or drop the option")
        measure.count_cpu_time()
    if min(options.batch, options.steps, options.rounds) < 1 or options.provider == options.against:
        parser.error("--batch, --steps and --rounds must be at least 1, and --provider and --against must differ")
    try:
        case = find_case(options.encoder, options.batch, device)
        running = {name: make_step(name, case, options.mode, device) for name in (options.provider, options.against)}
    except ValueError as error:
        parser.error(str(error))
    found, trace = profile(case, options.mode, running, device, count=options.steps, rounds=options.rounds, smoke=options.smoke)
    name = environment.slug(f"{case} {options.mode} {options.provider}")
    options.output.mkdir(parents=True, exist_ok=True)
    report = profile_report.text(found)
    write_atomically(options.output / f"{name}.trace.json.gz", gzip.compress(json.dumps(trace).encode()))
    write_atomically(options.output / f"{name}.json", json.dumps(found, indent=1).encode())
    write_atomically(options.output / f"{name}.md", report.encode())
    print(report)


if __name__ == "__main__":
    main()
