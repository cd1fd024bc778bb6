"""``route_and_mix``: each provider's outputs are checked first, then its forward or its forward and backward are timed."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.baselines import route_and_mix as providers
from benchmarks.cases.route_and_mix import PAPER, Case, cases
from mope_fast import _implementations, reference

OUTPUTS = ["mixed", "scores", "gradient of logits", "gradient of experts", "gradient of gram"]


@dataclass(frozen=True)
class Inputs:
    """Arguments and random upstream gradients; the arguments require grad only if ``needs_grad``."""

    logits: Tensor
    experts: Tensor
    gram: Tensor | None
    upstream: tuple[Tensor, Tensor]

    @classmethod
    def random(cls, case: Case, device: torch.device, mode: str) -> "Inputs":
        logits = 0.2 * torch.randn(case.batch, case.experts, device=device)
        experts = torch.randn(case.experts, case.rows, case.width, device=device).to(case.dtype)
        centred = experts.float() - experts.float().mean(-1, keepdim=True)
        gram = torch.einsum("ilm,jlm->lij", centred, centred) / case.width if case.gram else None
        upstream = (
            torch.randn(case.batch, case.rows, case.width, device=device).to(case.dtype),
            torch.randn(case.batch, case.experts, device=device),
        )
        return cls(logits, experts, gram, upstream).detached(needs_grad=mode != "forward")

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


def build_step(provider: str, case: Case, device: torch.device, mode: str) -> suite.Step:
    function = providers.build(provider)
    return lambda inputs: STEPS[mode](function, inputs)


def eager_reference(logits: Tensor, experts: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    return reference.route_and_mix(logits, experts, temperature=providers.TEMPERATURE, gram=gram, eps=providers.EPS)


def check(provider: str, case: Case, mode: str, got: measure.Outputs, inputs: Inputs) -> None:
    needs_grad = mode != "forward"
    eager = STEPS[mode](eager_reference, inputs.detached(needs_grad))
    truth = STEPS[mode](eager_reference, inputs.detached(needs_grad, torch.float64))
    measure.assert_as_exact_as_eager(got, eager, truth, OUTPUTS[: len(got)])


def why_not(provider: str, case: Case, device: torch.device, smoke: bool) -> str | None:
    if provider not in providers.COMPILED:
        return None
    if smoke:
        return "a smoke run compiles nothing"
    return None if device.type == "cuda" or case == PAPER else "on a CPU, where compiling takes long, only at the paper's size"


def implementation(provider: str, case: Case, device: torch.device) -> str | None:
    if provider not in providers.OURS:
        return None
    return _implementations.choose("route_and_mix", "auto", _implementations.Problem(device, case.dtype))


OP = suite.Op(
    "route_and_mix", providers.NAMES, list(providers.OURS), cases, why_not, Inputs.random, build_step, check, implementation
)


def pytest_generate_tests(metafunc):
    suite.parametrize(metafunc, OP)


@pytest.mark.benchmark(timer=measure.synchronised_time)
def test_route_and_mix(benchmark, point, session):
    suite.run(benchmark, OP, point, session)
