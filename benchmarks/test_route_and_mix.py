"""``route_and_mix``: each provider's numbers are checked first, then its forward or its forward and backward are timed.

Two timings: ``called`` is what Python code sees, launch overhead included; ``replay`` is one call's share of a CUDA graph of many.
Both rotate over as many input sets as ``l2`` in the results says.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.baselines import route_and_mix as providers
from benchmarks.cases import PAPER, Case, cases
from benchmarks.environment import default_device
from mope_fast import _implementations, reference

OUTPUTS = ["mixed", "scores", "gradient of logits", "gradient of experts", "gradient of gram"]


@dataclass(frozen=True)
class Inputs:
    """Arguments and random upstream gradients; the arguments ask for gradients only if ``needs_grad``."""

    logits: Tensor
    experts: Tensor
    gram: Tensor | None
    upstream: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, case: Case, device: torch.device, needs_grad: bool) -> "Inputs":
        logits = 0.2 * torch.randn(case.batch, case.experts, device=device)
        experts = torch.randn(case.experts, case.rows, case.width, device=device).to(case.dtype)
        centred = experts.float() - experts.float().mean(-1, keepdim=True)
        gram = torch.einsum("ilm,jlm->lij", centred, centred) / case.width if case.gram else None
        upstream = (
            torch.randn(case.batch, case.rows, case.width, device=device).to(case.dtype),
            torch.randn(case.batch, case.experts, device=device),
        )
        return cls(logits, experts, gram, upstream).detached(needs_grad)

    def detached(self, needs_grad: bool, dtype: torch.dtype | None = None) -> "Inputs":
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype or tensor.dtype).requires_grad_(needs_grad)

        gram = None if self.gram is None else leaf(self.gram)
        upstream = tuple(g.to(dtype or g.dtype) for g in self.upstream)
        return Inputs(leaf(self.logits), leaf(self.experts), gram, upstream)


def forward(function: providers.Provider, inputs: Inputs) -> measure.Outputs:
    return function(inputs.logits, inputs.experts, inputs.gram)


def forward_backward(function: providers.Provider, inputs: Inputs) -> measure.Outputs:
    outputs = forward(function, inputs)
    wanted = [t for t in (inputs.logits, inputs.experts, inputs.gram) if t is not None]
    return *outputs, *torch.autograd.grad(outputs, wanted, inputs.upstream)


STEPS = {"forward": forward, "forward+backward": forward_backward}


def eager_reference(logits: Tensor, experts: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference.route_and_mix(logits, experts, temperature=providers.TEMPERATURE, gram=gram, eps=providers.EPS)


def check(mode: str, got: measure.Outputs, inputs: Inputs) -> None:
    needs_grad = mode != "forward"
    eager = STEPS[mode](eager_reference, inputs.detached(needs_grad))
    truth = STEPS[mode](eager_reference, inputs.detached(needs_grad, torch.float64))
    measure.assert_as_exact_as_eager(got, eager, truth, OUTPUTS[: len(got)])


def pytest_generate_tests(metafunc):
    """All providers of one size and timing run one after the other, so that a busy machine is busy for all of them."""
    smoke, device = metafunc.config.getoption("smoke"), default_device()
    index, count = map(int, metafunc.config.getoption("shard").split("/"))
    timings = ["called", "replay"] if device.type == "cuda" else ["called"]
    metafunc.parametrize(
        ("case", "timing", "provider"),
        [
            pytest.param(case, timing, name, id=f"{str(case).replace(' ', '-')}-{timing}-{name}")
            for case in cases(device, smoke)[index - 1 :: count]
            for timing in timings
            for name in providers.NAMES
            if name not in providers.COMPILED or ((device.type == "cuda" or case == PAPER) and not smoke)
        ],
    )


def prepare(step: Callable[[Inputs], measure.Outputs], mode: str, timing: str, sets: list[Inputs]) -> Callable[[], object]:
    """The function to time; it has run and its outputs on the first and last input set are right."""
    if timing == "called":
        for inputs in (sets[0], sets[-1]):
            check(mode, step(inputs), inputs)
        return measure.rotating(step, sets)
    graph, outputs = measure.capture(step, sets)
    measure.replay_poisoned(graph, outputs)
    for i in (0, -1):
        check(mode, outputs[i], sets[i])
    return graph.replay


def throughput(case: Case, mode: str, seconds: float, copy_gbps: float) -> dict[str, float]:
    gbps = case.bytes(mode) / seconds / 1e9
    return {"median_us": seconds * 1e6, "gbps": gbps, "copy_share": gbps / copy_gbps, "tflops": case.flops(mode) / seconds / 1e12}


def run(benchmark, mode: str, case: Case, timing: str, provider: str, device: torch.device, smoke: bool, facts: dict) -> None:
    torch.manual_seed(0)
    count, l2 = measure.input_sets(case.bytes(mode), device)
    sets = [Inputs.random(case, device, needs_grad=mode != "forward") for _ in range(count)]
    function = providers.build(provider)

    def step(inputs: Inputs) -> measure.Outputs:
        return STEPS[mode](function, inputs)

    target = prepare(step, mode, timing, sets)
    calls = count if timing == "replay" else 1
    benchmark.group = f"route_and_mix {mode} {timing} {case}"
    benchmark.extra_info.update(facts | case.describe())
    benchmark.extra_info.update(
        op="route_and_mix", mode=mode, timing=timing, provider=provider, l2=l2, input_sets=count, calls_per_iteration=calls,
        bytes=case.bytes(mode), flops=case.flops(mode), peak_memory=measure.peak_memory(lambda: step(sets[0]), device),
    )  # fmt: skip
    if provider in providers.OURS:
        benchmark.extra_info["implementation"] = _implementations.choose(
            "route_and_mix", "auto", _implementations.Problem(device, case.dtype)
        )
    rounds, iterations = (3, 1) if smoke else measure.schedule(target)
    benchmark.pedantic(target, rounds=rounds, iterations=iterations, warmup_rounds=1)
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / calls
        benchmark.extra_info.update(throughput(case, mode, seconds, facts["copy_bandwidth_gbps"]))


@pytest.mark.benchmark(group="route_and_mix forward", timer=measure.synchronised_time)
def test_forward(benchmark, case, timing, provider, device, smoke, session_facts):
    run(benchmark, "forward", case, timing, provider, device, smoke, session_facts)


@pytest.mark.benchmark(group="route_and_mix forward+backward", timer=measure.synchronised_time)
def test_forward_backward(benchmark, case, timing, provider, device, smoke, session_facts):
    run(benchmark, "forward+backward", case, timing, provider, device, smoke, session_facts)
