"""Timer, input rotation, CUDA graphs, memory, the device's peaks, and the check before any timing."""

import functools
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
MAX_INPUT_SETS = 256
DENSE_BF16_TFLOPS = {r"NVIDIA H200": 989.0, r"NVIDIA H100 80GB HBM3": 989.0, r"NVIDIA A100.*": 312.0}
"""Datasheet peaks by device name; slower PCIe and NVL variants of the Hopper cards are left out."""
clock = time.perf_counter


def count_cpu_time() -> None:
    """Time in CPU seconds of this process, on one thread, which other programs on a shared machine hardly affect."""
    global clock
    torch.set_num_threads(1)
    clock = time.process_time


def synchronised_time() -> float:
    """Return the time in seconds after the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def seconds_per_call(target: Callable[[], Any], calls: int, warm_up: int = 3) -> float:
    for _ in range(warm_up):
        target()
    start = synchronised_time()
    for _ in range(calls):
        target()
    return (synchronised_time() - start) / calls


def schedule(
    target: Callable[[], Any], round_seconds: float = 0.01, total_seconds: float = 2.0, warm_up: int = 3, least: int = 10
) -> tuple[int, int]:
    """Return rounds (``least`` to 50) and calls per round, with rounds long enough to hide the timer's wait for the device."""
    seconds = seconds_per_call(target, max(1, warm_up), warm_up)
    iterations = max(1, min(1000, int(round_seconds / seconds)))
    return max(least, min(50, int(total_seconds / (iterations * seconds)))), iterations


class InTurns:
    """Times ``other`` before and after every round of a benchmark, so that drift affects both.

    :meth:`before` is the benchmark's ``setup``; :meth:`ratios` divides each round by the mean of its two neighbors.
    """

    def __init__(self, other: Callable[[], Any], calls: int):
        self.other, self.calls = other, calls
        self.seconds: list[float] = []

    def before(self) -> None:
        self.seconds.append(seconds_per_call(self.other, self.calls, warm_up=0))

    def ratios(self, rounds: Sequence[float]) -> list[float]:
        """Return the ratio of each round to ``other``; ``rounds`` has the seconds per call of each."""
        self.before()
        others = self.seconds[-len(rounds) - 1 :]
        return [own / ((a + b) / 2) for own, a, b in zip(rounds, others, others[1:], strict=False)]


def input_sets(footprint: int, device: torch.device) -> tuple[int, str]:
    """Return how many input sets to rotate over, and the resulting state of the cache: cold if they are twice the L2."""
    if device.type != "cuda":
        return 1, "warm"
    wanted = -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // footprint)
    return (wanted, "cold") if wanted <= MAX_INPUT_SETS else (MAX_INPUT_SETS, "partly warm")


def rotating(step: Callable[[Any], Outputs], sets: Sequence[Any]) -> Callable[[], Outputs]:
    """Return a function without arguments that uses the next input set at every call."""
    inputs = itertools.cycle(sets)
    return lambda: step(next(inputs))


def capture(step: Callable[[Any], Outputs], sets: Sequence[Any]) -> tuple[torch.cuda.CUDAGraph, list[Outputs]]:
    """Capture a CUDA graph that runs ``step`` once on every input set; all outputs stay alive, so none share memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(sets[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [step(inputs) for inputs in sets]
    return graph, outputs


def replay_poisoned(graph: torch.cuda.CUDAGraph, outputs: Sequence[Outputs]) -> None:
    """Replay once into outputs filled with NaN, so that elements that are not written are detected."""
    with torch.inference_mode():  # outputs that were made in inference mode can't be written to outside of it
        for tensor in itertools.chain.from_iterable(outputs):
            tensor.fill_(float("nan"))
    graph.replay()


def peak_memory(target: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes that a call takes beyond its inputs: by torch's allocator on CUDA, by the profiler on a CPU."""
    if device.type != "cuda":
        return _peak_of_tensors(target)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    target()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_of_tensors(target: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        target()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def copy_bandwidth(device: torch.device, smoke: bool) -> float:
    """Measure bytes per second, read plus written, of a copy far larger than any cache."""
    size = 2**22 if smoke else 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(seconds_per_call(lambda: target.copy_(source), 3, 1) for _ in range(3 if smoke else 5))


@functools.cache
def peak_arithmetic(device: torch.device, name: str, smoke: bool) -> dict[str, str | float]:
    """Return the peak TFLOP/s of dense products: the datasheet's, else measured on a large square one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for pattern, tflops in DENSE_BF16_TFLOPS.items():
        if re.fullmatch(pattern, name):
            return {"peak_tflops": tflops, "peak_dtype": "bfloat16", "peak_source": "datasheet"}
    size = 256 if smoke else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = statistics.median(seconds_per_call(lambda: a @ b, 3, warm_up=1) for _ in range(3))
    return {
        "peak_tflops": 2 * size**3 / seconds / 1e12,
        "peak_dtype": str(dtype).removeprefix("torch."),
        "peak_source": f"product of {size} x {size} matrices",
    }


OTHERS_TIMES = 2
"""Factor on the error bound of other providers: how torch's own kernels round depends on the processor."""
GROSS_TIMES = 100
"""An error of more than this many times its bound is not rounding and fails for any provider."""
_noted: list[str] | None = None


@contextmanager
def others() -> Iterator[list[str]]:
    """Apply the wider bound for other providers within this context, and collect misses in the list instead of failing."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def _errors(got: Tensor, truth: Tensor) -> dict[str, float]:
    difference = got.double() - truth
    return {"RMS": difference.square().mean().sqrt().item(), "max": difference.abs().max().item()}


def relative_error(got: Outputs, truth: Outputs) -> float:
    """Return the median, over nonzero outputs, of the largest error relative to the largest number."""
    sizes = [exact.abs().max().item() for exact in truth]
    errors = [_errors(mine, exact)["max"] / size for mine, exact, size in zip(got, truth, sizes, strict=True) if size]
    return statistics.median(errors) if errors else 0.0


def assert_as_exact_as_eager(
    got: Outputs, eager: Outputs, truth: Outputs, names: Sequence[str], times: float = 2, typical: float = 0.0
) -> None:
    """Check RMS and max error against the float64 ``truth``: at most ``times`` those of ``eager`` in its dtype + eps max|truth|.

    ``eager``'s error, relative to the truth, counts as at least ``typical``, because with few numbers it may be smaller by chance.
    """
    times *= 1 if _noted is None else OTHERS_TIMES
    for name, mine, peer, exact in zip(names, got, eager, truth, strict=True):
        assert mine.dtype == peer.dtype, f"{name} is {mine.dtype}, the eager form gives {peer.dtype}"
        assert mine.shape == exact.shape, f"{name} is {tuple(mine.shape)}, expected {tuple(exact.shape)}"
        slack = torch.finfo(mine.dtype).eps * exact.abs().max().item()
        bounds, sizes = _errors(peer, exact), _errors(exact, torch.zeros_like(exact))
        for kind, error in _errors(mine, exact).items():
            bound = times * max(bounds[kind], typical * sizes[kind]) + slack
            message = f"{kind} error of {name} is {error:.3g}, the bound is {bound:.3g}"
            assert error <= (bound if _noted is None else GROSS_TIMES * bound), message
            if error > bound:
                _noted.append(message)
