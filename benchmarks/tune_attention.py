"""Try other tile sizes for the attention kernels: ``python -m benchmarks.tune_attention --output FILE.json``.

Every candidate replaces one function of ``kernels/launch.py``, is checked as in the benchmarks, and is timed in a CUDA graph in
turns with the table's current entry. A ratio below 1 means that the candidate is faster. No file is changed: edit the table by hand
after a second run has confirmed the result.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from mope_fast.kernels import launch

from benchmarks import attention, measure
from benchmarks.cases import FULL
from benchmarks.cases.attention import AttentionCase, prompt_attention, receptive_field_attention

try:
    from tqdm import tqdm as progress
except ImportError:  # no progress bar without tqdm

    def progress(items, **_):
        return items


def _tiles(*candidates: tuple[int, int, int, int]) -> list[launch.AttentionLaunch]:
    """Make launches from tuples (queries, keys, warps, stages)."""
    return [launch.AttentionLaunch(*candidate) for candidate in candidates]


FORWARD, BOTH = "forward", "forward+backward"
KNOBS: dict[str, tuple[str, list[Any]]] = {
    "attention_launch": (
        FORWARD,
        _tiles((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 32, 4, 3), (128, 128, 8, 2)),
    ),
    "query_grads_launch": (BOTH, _tiles((64, 64, 4, 3), (64, 32, 4, 3), (128, 32, 4, 2), (128, 64, 8, 2), (64, 128, 8, 2))),
    "key_grads_launch": (
        BOTH,
        _tiles((32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2), (16, 64, 4, 2)),
    ),
    "prefix_splits": (BOTH, [1, 2, 4, 8]),
}
"""Function to replace -> (mode that it affects, candidates)."""


class Graph(NamedTuple):
    """A captured and checked CUDA graph of one call on every input set."""

    graph: torch.cuda.CUDAGraph
    calls: int

    def microseconds(self) -> float:
        return measure.seconds_per_call(self.graph.replay, 10, warm_up=1) / self.calls * 1e6


def capture(case: AttentionCase, mode: str, sets: list[attention.Inputs], device: torch.device) -> Graph:
    graph, outputs = measure.capture(attention.build_step("triton", case, device, mode), sets)
    measure.replay_poisoned(graph, outputs)
    attention.check("triton", case, mode, outputs[-1], sets[-1])
    return Graph(graph, len(sets))


def in_turns(*graphs: Graph, rounds: int = 7) -> list[float]:
    """Return the median of each graph; rounds are interleaved, so that clock drift affects all."""
    times = [[graph.microseconds() for graph in graphs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def try_out(case: AttentionCase, knob: str, value: Any, table: Graph, sets: list, device: torch.device) -> dict[str, Any]:
    result = {"case": str(case), "knob": knob, "value": value}
    try:
        with mock.patch.object(launch, knob, return_value=value):
            candidate = capture(case, KNOBS[knob][0], sets, device)
    except Exception as error:  # too little shared memory or wrong numbers are recorded as results
        return result | {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    ours, theirs = in_turns(table, candidate)
    return result | {"table_us": ours, "us": theirs, "ratio": theirs / ours}


def tune(case: AttentionCase, knobs: list[str], device: torch.device) -> list[dict[str, Any]]:
    results = []
    for mode in dict.fromkeys(KNOBS[knob][0] for knob in knobs):
        torch.manual_seed(0)
        count, _ = measure.input_sets(case.bytes(mode), device)
        sets = [attention.Inputs.random(case, device, mode) for _ in range(count)]
        table = capture(case, mode, sets, device)
        useful = [knob for knob in knobs if KNOBS[knob][0] == mode and (case.prefixes or knob != "prefix_splits")]
        work = [(knob, value) for knob in useful for value in KNOBS[knob][1]]
        results += [try_out(case, knob, value, table, sets, device) for knob, value in progress(work, desc=f"{case} {mode}")]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json", help="results, rewritten after every size")
    parser.add_argument("--case", default="B=64", metavar="TEXT", help="only sizes whose name contains TEXT (default: %(default)s)")
    parser.add_argument("--knob", action="append", choices=KNOBS, help="function to tune; may be repeated (default: all)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA GPU")
    device = torch.device("cuda")
    cases = [*prompt_attention(device, FULL), *receptive_field_attention(device, FULL)]
    results: list[dict[str, Any]] = []
    for case in (case for case in cases if options.case in str(case) and not case.first_layer):
        of_case = tune(case, options.knob or list(KNOBS), device)
        results += of_case
        options.output.write_text(json.dumps(results, indent=1))
        for result in sorted(of_case, key=lambda result: result.get("ratio", float("inf"))):
            told = result.get("failed") or f"{result['ratio']:.3f} ({result['us']:.1f} us, table {result['table_us']:.1f} us)"
            print(f"{case}: {result['knob']} {json.dumps(result['value'])}: {told}", flush=True)


if __name__ == "__main__":
    main()
