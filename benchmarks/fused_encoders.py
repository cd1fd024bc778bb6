"""How fused encoders are measured: what is right, the check, and timing in turns with the frozen encoder."""

import functools
import gc
import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.baselines import fused_encoders as providers
from benchmarks.cases.fused_encoders import TRAINING, FusedCase
from mope_fast import MoPEConfig, _implementations

WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
LEAST_COSINE = 0.8
"""Seen: 0.95 to 1.00 for gradients behind dropout at the sizes measured, less at tiny ones; 1.00 for the others."""
PROMPTS = 2 * MoPEConfig().prompt_length + 1
SWIN_HEAD_DIM = 32  # of all but the tiny one
Named = dict[str, Tensor]


class FusedGroup(suite.Group):
    def providers_at(self, case: FusedCase, mode: str) -> Sequence[str]:
        fitting = [name for name in self.providers if mode in providers.PROVIDERS[name][0]]
        return [name for name in fitting if providers.is_compiled(name) == case.compiled]


def group(name: str, cases: Callable[[torch.device, bool], Sequence[FusedCase]], without: Sequence[str] = ()) -> FusedGroup:
    return FusedGroup(name, [provider for provider in providers.PROVIDERS if provider not in without], cases, providers.why_not)


@functools.lru_cache(maxsize=1)
def batch_of(case: FusedCase, device: torch.device) -> providers.Inputs:
    torch.manual_seed(1)
    return providers.Inputs.random(case, device)


@functools.lru_cache(maxsize=2)
def expected(name: str, case: FusedCase, mode: str, device: torch.device) -> tuple[Named, Named]:
    """A provider's outputs, dropout and noise off, in the case's dtype and in a wider one: the eager form and the truth."""
    outputs = []
    for dtype in (None, WIDER[case.dtype]):
        provider = providers.build(name, case, device, mode, dtype)
        inputs = batch_of(case, device)
        with provider.without_randomness():
            outputs.append(provider.step(inputs if dtype is None else inputs.to(dtype), mode))
    return outputs[0], outputs[1]


def check(provider: providers.Provider, case: FusedCase, mode: str, got: Named, device: torch.device) -> None:
    """Logits, loss and the gradients that both have, against the truth; the others are finite at least."""
    for name, tensor in got.items():
        assert tensor.isfinite().all(), f"{name} is not finite"
    if provider.truth is None:
        return
    eager, truth = expected(provider.truth, case, mode, device)
    names = [name for name in got if name in truth]
    assert names[: 1 + (mode == TRAINING)] == ["logits", "loss"][: 1 + (mode == TRAINING)]
    ours, eager, truth = ([outputs[name] for name in names] for outputs in (got, eager, truth))
    titles = [name if name in ("logits", "loss") else f"gradient of {name}" for name in names]
    # twice what eager is allowed elsewhere: a dozen layers, in each another order of sums
    measure.assert_as_exact_as_eager(ours, eager, truth, titles, times=4)


def check_random(provider: providers.Provider, case: FusedCase, mode: str, got: Named, device: torch.device) -> None:
    """With dropout and noise there is no truth: what is there without them shows where outputs and gradients must lie."""
    eager, truth = expected(provider.truth, case, mode, device)
    cosines = []
    for name, tensor in got.items():
        assert tensor.isfinite().all(), f"{name} is not finite"
        # not of what is zero but for rounding, as the gradient of a bias before a batch norm
        if truth[name].norm() > 2 * (eager[name] - truth[name]).norm():
            cosines.append(F.cosine_similarity(tensor.flatten().to(truth[name].dtype), truth[name].flatten(), dim=0).item())
    mean = statistics.fmean(cosines)
    assert mean > LEAST_COSINE, f"outputs have little to do with what they are without dropout: mean cosine {mean:.3f}"


def is_random(provider: providers.Provider, mode: str) -> bool:
    return mode == TRAINING and provider.bank is not None


def prepared(name: str, point: suite.Point, device: torch.device) -> tuple[suite.Step, Callable[[], object]]:
    """A provider's step and the function to time; its numbers are right."""
    case, mode = point.case, point.mode
    provider = providers.build(name, case, device, mode)
    inputs = batch_of(case, device)
    names: list[str] = []
    if is_random(provider, mode) and not providers.is_compiled(name):  # those would be compiled a second time
        with provider.without_randomness():
            check(provider, case, mode, provider.step(inputs, mode), device)

    def step(inputs: providers.Inputs) -> measure.Outputs:
        outputs = provider.step(inputs, mode)
        names[:] = outputs
        return tuple(outputs.values())

    def check_outputs(got: measure.Outputs, _: providers.Inputs) -> None:
        right = check_random if is_random(provider, mode) else check
        right(provider, case, mode, dict(zip(names, got, strict=True)), device)

    return step, suite.prepare(step, point.timing, [inputs], check_outputs)


def implementation(case: FusedCase, device: torch.device) -> str:
    """What the fused model runs on."""
    encoder = case.encoder
    masked = "attention_mask" in encoder.inputs(1, encoder.tokens, torch.device("cpu"), case.dtype)
    keys, head_dim = (encoder.window**2, SWIN_HEAD_DIM) if encoder.window else (encoder.tokens, 0)
    problem = _implementations.Problem(device, case.dtype, keys + PROMPTS, masked, head_dim=head_dim)
    attention = "window_prompt_attention" if encoder.window else "prompt_attention"
    return ", ".join(f"{op} {_implementations.choose(op, 'auto', problem)}" for op in (attention, "route_and_mix"))


def run(benchmark, group: suite.Group, point: suite.Point, session: suite.Session) -> None:
    mode, case, device = point.mode, point.case, session.device
    reason = group.why_not(point.provider, case, device, session.smoke)
    if reason is None and case.compiled and device.type == "cpu" and not session.compile_on_cpu:
        reason = "on a CPU, where compiling takes minutes, only with --compile-on-cpu"
    if reason is not None:
        session.skip(group, point, reason)
    with session.noting_failures(group, point):
        frozen_step, frozen = prepared(providers.FROZEN, point, device)
        step, target = prepared(point.provider, point, device)
    inputs = batch_of(case, device)
    memory, frozen_memory = (measure.peak_memory(lambda s=s: s(inputs), device) for s in (step, frozen_step))
    benchmark.group = f"{group.name} {mode} {point.timing} {case}"
    benchmark.extra_info.update(session.facts | case.describe())
    benchmark.extra_info.update(
        op=group.name, mode=mode, timing=point.timing, provider=point.provider, l2="what the step before left",
        flops=case.flops(mode), peak_memory=memory, memory_tax=memory and memory / frozen_memory,
        implementation=implementation(case, device),
    )  # fmt: skip
    time_in_turns(benchmark, target, frozen, session.smoke)


def time_in_turns(benchmark, target: Callable[[], object], frozen: Callable[[], object], smoke: bool) -> None:
    rounds, calls = 3, 1
    if not smoke:
        # at least ten rounds: three quarters of a minute where a step takes seconds
        rounds, calls = measure.schedule(lambda: (frozen(), target()), round_seconds=0.1, total_seconds=45.0, warm_up=1)
    turns = measure.InTurns(frozen, calls)

    def call() -> None:
        for _ in range(calls):
            target()

    benchmark.extra_info["calls_per_iteration"] = calls
    gc.collect()
    gc.freeze()  # a full collection among all modules' objects would take as long as a small step
    try:
        benchmark.pedantic(call, setup=turns.before, rounds=rounds, warmup_rounds=1)
    finally:
        gc.unfreeze()
    if benchmark.stats is not None:
        ratios = sorted(turns.ratios([seconds / calls for seconds in benchmark.stats.stats.data]))
        low, high = (ratios[round(share * (len(ratios) - 1))] for share in (0.2, 0.8))
        benchmark.extra_info.update(
            median_us=benchmark.stats.stats.median / calls * 1e6, tax=statistics.median(ratios), tax_low=low, tax_high=high
        )
