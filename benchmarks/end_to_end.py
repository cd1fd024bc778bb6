"""Measurement of fused encoders: checks of outputs and gradients, with and without dropout and routing noise."""

import dataclasses
import functools
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from benchmarks import models, suite
from benchmarks.baselines import end_to_end as providers
from benchmarks.baselines.encoders import FROZEN, FusedProvider, Inputs
from benchmarks.baselines.models import is_compiled
from benchmarks.cases.end_to_end import FusedCase, cases
from benchmarks.models import WIDER, Named
from mope_fast import _implementations

LEAST_COSINE = 0.8
"""Observed: 0.95 to 1.00 for gradients affected by dropout at the sizes measured, less at tiny ones; 1.00 for the others."""
SWIN_HEAD_DIM = 32  # of all Swins but the tiny one


class FusedGroup(models.ModelGroup):
    def providers_at(self, case: FusedCase, mode: str) -> Sequence[str]:
        fitting = [name for name, (modes, _) in providers.PROVIDERS.items() if mode in modes and is_compiled(name) == case.compiled]
        if case.dense:
            return [name for name in fitting if name in providers.SEGMENTING]
        # encoders without windows use SDPA by default
        return [name for name in fitting if name != providers.FROZEN_WITH_SDPA or case.encoder.window]

    def captures(self, provider: str) -> bool:
        return provider != providers.PAPER_LITERAL


@functools.lru_cache(maxsize=2)
def batch_of(case: FusedCase, device: torch.device) -> Inputs:
    torch.manual_seed(1)
    return Inputs.random(case, device)


@functools.lru_cache(maxsize=3)
def expected(name: str, case: FusedCase, mode: str, device: torch.device) -> tuple[Named, Named]:
    """Return a provider's outputs without dropout and noise, in the case's dtype (eager form) and in a wider one (truth)."""
    outputs = []
    for dtype in (None, WIDER[case.dtype]):
        provider = providers.build(name, case, device, mode, dtype)
        inputs = batch_of(case, device)
        if case.batch == 1 and provider.bank is not None:
            provider.bank.eval()  # the mapper's batch norm can't train on one sample
        with provider.without_randomness():
            outputs.append(provider.step(inputs if dtype is None else inputs.to(dtype), mode))
    return outputs[0], outputs[1]


def check(provider: FusedProvider, case: FusedCase, mode: str, got: Named, device: torch.device) -> None:
    """Check outputs against the provider's truth, if it has one."""
    models.check(got, *(expected(provider.truth, case, mode, device) if provider.truth else ({}, {})))


def check_random(provider: FusedProvider, case: FusedCase, mode: str, got: Named, device: torch.device) -> None:
    """Check outputs with dropout and noise, which have no exact truth: they must point in the direction of those without."""
    eager, truth = expected(provider.truth, case, mode, device)
    cosines = []
    for name, tensor in got.items():
        assert tensor.isfinite().all(), f"{name} is not finite"
        # skip tensors that are zero up to rounding, such as the gradient of a bias before a batch norm
        if truth[name].norm() > 2 * (eager[name] - truth[name]).norm():
            cosines.append(F.cosine_similarity(tensor.flatten().to(truth[name].dtype), truth[name].flatten(), dim=0).item())
    mean = statistics.fmean(cosines)
    assert mean > LEAST_COSINE, f"outputs differ too much from those without dropout: mean cosine {mean:.3f}"


def check_without_randomness(provider: FusedProvider, case: FusedCase, mode: str, device: torch.device) -> None:
    if provider.alone:
        case = dataclasses.replace(case, batch=1)
    with provider.without_randomness():
        check(provider, case, mode, provider.step(batch_of(case, device), mode), device)


def check_finite(provider: FusedProvider, case: FusedCase, mode: str, got: Named, device: torch.device) -> None:
    models.check(got, {}, {})


def prepared(name: str, point: suite.Point, device: torch.device) -> models.Prepared:
    case, mode = point.case, point.mode
    provider, right = providers.build(name, case, device, mode), check
    if provider.is_random(mode):
        if not is_compiled(name):  # compiled ones would be compiled a second time
            check_without_randomness(provider, case, mode, device)
        right = check_finite if provider.alone and case.batch > 1 else check_random
    return models.prepare(provider, point, batch_of(case, device), lambda got: right(provider, case, mode, got, device))


def implementation(provider: str, case: FusedCase, device: torch.device) -> dict[str, str]:
    """Return the implementations that the fused model runs on."""
    encoder = case.encoder
    masked = "attention_mask" in encoder.inputs(1, encoder.tokens, torch.device("cpu"), case.dtype)
    keys, head_dim = (encoder.window**2, SWIN_HEAD_DIM) if encoder.window else (encoder.tokens, 0)
    problem = _implementations.Problem(device, case.dtype, keys + 2 * case.length + 1, masked, head_dim=head_dim)
    attention = "window_prompt_attention" if encoder.window else "prompt_attention"
    chosen = [f"{op} {_implementations.choose(op, 'auto', problem)}" for op in (attention, "route_and_mix")]
    return {"implementation": ", ".join(chosen)}


GROUP = FusedGroup(
    "end_to_end", list(providers.PROVIDERS), providers.OURS, cases, providers.why_not, FROZEN, batch_of, prepared, implementation
)  # fmt: skip
