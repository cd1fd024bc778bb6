"""Providers that are measured along a curve: some of ``end_to_end``, and the optimizer's step separately."""

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
"""Limit on the bytes of expanded experts, whose gradient is filled and accumulated once per layer."""


class OptimizerStep(FusedProvider):
    """A step of AdamW on all parameters that ``MoPEFusion`` trains, with given gradients: what a training step adds to forward and
    backward.
    """

    truth = None

    def __init__(self, parts: Parts):
        self.model = end_to_end.Fused.of(parts, TRAINING).model
        trained = list(self.parameters.values())
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        # a learning rate so small that the weights hardly change over thousands of steps
        self.optimizer = torch.optim.AdamW(trained, lr=1e-8, fused=True, capturable=trained[0].is_cuda)

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("an optimizer's step has no logits")

    def step(self, inputs: Inputs, mode: str) -> dict[str, Tensor]:
        self.optimizer.step()
        return {"head.bias": self.parameters["head.bias"].detach().clone()}


def providers_at(case: ScalingCase, mode: str) -> Sequence[str]:
    """Return the providers that the case's axes affect: the frozen encoder depends on neither K nor L, static prompts not on K."""
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
    """Return the widths of the layers."""
    with torch.device("meta"):
        model = encoder.make()
    return tuple(layer.width for layer in family_of(model).layers(model))


def expanded_bytes(case: ScalingCase) -> int:
    """Return the bytes of all layers' experts in float32, one copy per sample; the paper-literal form makes their gradient."""
    return 4 * case.batch * case.experts * case.length * sum(_widths(case.encoder))


def why_not(name: str, case: ScalingCase, device: torch.device, smoke: bool) -> str | None:
    """Return why a provider isn't measured here; None if it is."""
    if (reason := end_to_end.why_not(name, case, device, smoke)) is not None or name != end_to_end.PAPER_LITERAL:
        return reason
    room = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else CPU_BYTES
    if (size := expanded_bytes(case)) <= room:
        return None
    consequence = "it would not fit" if device.type == "cuda" else "a step would take many times the encoder's"
    return (
        f"its experts expanded to the batch have {size / 2**30:.2f} GiB and a gradient of that size in every layer: {consequence}"
    )
