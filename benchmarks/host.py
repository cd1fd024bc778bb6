"""Cost of prompts on the host: very narrow layers, whose step takes as long as calling it. Otherwise as ``end_to_end``."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import end_to_end, models
from benchmarks.baselines import end_to_end as providers
from benchmarks.baselines.encoders import FROZEN
from benchmarks.cases.end_to_end import NARROW, FusedCase, host_cases, narrow
from benchmarks.cases.models import INFERENCE

NAMES = (FROZEN, "mope_fast", "folded", "concatenated", "vpt-deep", "lora")
NO_LAUNCH = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "new_empty_strided", "permute",
    "promote_types", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze",
    "_unsafe_view", "view",
}  # fmt: skip
"""Operations that only return a view or uninitialized memory."""


class HostGroup(models.ModelGroup):
    def providers_at(self, case: FusedCase, mode: str) -> Sequence[str]:
        return [name for name in NAMES if mode in providers.PROVIDERS[name][0]]


class _Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in NO_LAUNCH
        return func(*args, **(kwargs or {}))


@functools.cache
def launches_a_layer(name: str, case: FusedCase, device: torch.device) -> int:
    """Count the operations of a forward that do work on this device, for one layer with everything that a provider adds to it."""
    (kind,) = (kind for kind in NARROW if case.encoder.name.startswith(f"{kind},"))
    counts = []
    for layers in (2, 3):
        of_these = dataclasses.replace(case, encoder=narrow(kind, layers))
        provider = providers.build(name, of_these, device, INFERENCE)
        with torch.no_grad(), _Launches() as launches:  # inference mode would dispatch composite operations undecomposed
            provider.logits_and_loss(end_to_end.batch_of(of_these, device), training=False)
        counts.append(launches.count)
    return counts[1] - counts[0]


def facts(name: str, case: FusedCase, device: torch.device) -> dict[str, Any]:
    return end_to_end.implementation(name, case, device) | {"launches_a_layer": launches_a_layer(name, case, device)}


GROUP = HostGroup(
    "host", NAMES, providers.OURS, host_cases, providers.why_not, FROZEN, end_to_end.batch_of, end_to_end.prepared, facts,
    seconds_of_rounds=10.0,
)  # fmt: skip
