"""Growth of cost: one fused encoder along K, L, B and S, checked and timed as in ``end_to_end``."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import end_to_end, models, suite
from benchmarks.baselines import scaling as providers
from benchmarks.baselines.encoders import FROZEN
from benchmarks.cases.models import TRAINING
from benchmarks.cases.scaling import ScalingCase, cases


class ScalingGroup(models.ModelGroup):
    def providers_at(self, case: ScalingCase, mode: str) -> Sequence[str]:
        return providers.providers_at(case, mode)

    def captures(self, provider: str) -> bool:
        return end_to_end.GROUP.captures(provider)


def prepared(name: str, point: suite.Point, device: torch.device) -> models.Prepared:
    if name != providers.OPTIMIZER:
        return end_to_end.prepared(name, point, device)
    provider, inputs = providers.build(name, point.case, device, point.mode), end_to_end.batch_of(point.case, device)
    return models.prepare(provider, point, inputs, lambda got: models.check(got, {}, {}))


def facts(name: str, case: ScalingCase, device: torch.device) -> dict[str, Any]:
    """Return facts with the number of trained parameters, at which both ways of scaling are compared."""
    trained = providers.build(name, case, device, TRAINING).parameters
    return end_to_end.implementation(name, case, device) | {"trained_parameters": sum(p.numel() for p in trained.values())}


GROUP = ScalingGroup(
    "scaling", providers.NAMES, providers.OURS, cases, providers.why_not, FROZEN, end_to_end.batch_of, prepared, facts,
    seconds_of_rounds=10.0,
)  # fmt: skip
