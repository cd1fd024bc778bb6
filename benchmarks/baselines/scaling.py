"""What is measured along a curve: providers of ``end_to_end``, and the optimiser's step apart."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.baselines import end_to_end
from benchmarks.baselines.encoders import FROZEN, FusedProvider, Inputs, Parts
from benchmarks.cases.end_to_end import Encoder, FusedCase
from benchmarks.cases.models import TRAINING
from benchmarks.cases.scaling import AXES, LENGTH, ScalingCase
from mope_fast.encoders import family_of

OPTIMIZER = "optimizer"
NAMES = (FROZEN, "mope_fast", end_to_end.PAPER_LITERAL, "vpt-deep", OPTIMIZER)
OURS = ("mope_fast", OPTIMIZER)
CPU_BYTES = 2**28
"""Of expanded experts: their gradient is filled and added up once a layer."""


class OptimizerStep(FusedProvider):
    """A step of AdamW on all that ``MoPEFusion`` trains, gradients given: what a training step has beside forward and backward."""

    truth = None

    def __init__(self, parts: Parts):
        self.model = end_to_end.Fused.of(parts, TRAINING).model
        trained = list(self.parameters.values())
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        # so small a rate that the weights stay where they are over thousands of steps
        self.optimizer = torch.optim.AdamW(trained, lr=1e-8, fused=True, capturable=trained[0].is_cuda)

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("an optimiser's step has no logits")

    def step(self, inputs: Inputs, mode: str) -> dict[str, Tensor]:
        self.optimizer.step()
        return {"head.bias": self.parameters["head.bias"].detach().clone()}


def providers_at(case: ScalingCase, mode: str) -> Sequence[str]:
    """Those that the case's axes change: the frozen encoder knows neither K nor L, static prompts don't know K."""
    at_centre = (case.experts, case.length) == (FusedCase.experts, FusedCase.length)
    wanted = {
        FROZEN: at_centre,
        "vpt-deep": not {"L", LENGTH}.isdisjoint(case.axes),
        OPTIMIZER: mode == TRAINING and AXES[0] in case.axes,
    }
    return [name for name in NAMES if wanted.get(name, True)]


def build(name: str, case: ScalingCase, device: torch.device, mode: str) -> FusedProvider:
    if name == OPTIMIZER:
        return OptimizerStep(Parts.of(case, device))
    return end_to_end.build(name, case, device, mode)


@functools.cache
def _widths(encoder: Encoder) -> tuple[int, ...]:
    """Of the layers."""
    with torch.device("meta"):
        model = encoder.make()
    return tuple(layer.width for layer in family_of(model).layers(model))


def expanded_bytes(case: ScalingCase) -> int:
    """Of the experts of all layers in float32, one copy a sample: a tensor whose gradient the paper-literal form makes."""
    return 4 * case.batch * case.experts * case.length * sum(_widths(case.encoder))


def why_not(name: str, case: ScalingCase, device: torch.device, smoke: bool) -> str | None:
    """Why a provider isn't measured here; None if it is."""
    if (reason := end_to_end.why_not(name, case, device, smoke)) is not None or name != end_to_end.PAPER_LITERAL:
        return reason
    room = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else CPU_BYTES
    if (size := expanded_bytes(case)) <= room:
        return None
    consequence = "it would not fit" if device.type == "cuda" else "a step would take many times the encoder's"
    return (
        f"its experts expanded to the batch have {size / 2**30:.2f} GiB and a gradient of that size in every layer: {consequence}"
    )
