"""Measurement of MoPE-BAF: every form is checked against itself with an explicit mask, and timed in turns with the plain VLMo."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import models, suite
from benchmarks.baselines import mope_baf as providers
from benchmarks.baselines.models import Inputs, is_compiled
from benchmarks.cases.mope_baf import CLASSES, BAFCase, cases
from benchmarks.models import WIDER, Named
from mope_fast import _implementations


class BAFGroup(models.ModelGroup):
    def providers_at(self, case: BAFCase, mode: str) -> Sequence[str]:
        return [name for name in self.providers if is_compiled(name) == case.compiled]


@functools.lru_cache(maxsize=1)
def batch_of(case: BAFCase, device: torch.device) -> Inputs:
    torch.manual_seed(1)
    return Inputs(case.inputs(device), torch.randint(CLASSES, (case.batch,), device=device))


@functools.lru_cache(maxsize=2)
def expected(form: providers.Form, case: BAFCase, mode: str, device: torch.device) -> tuple[Named, Named]:
    """Return a form's outputs in the case's dtype (the eager form) and in a wider one (the truth)."""
    batch, wider = batch_of(case, device), WIDER[case.dtype]
    eager = providers.make(form, case, device, mode).step(batch, mode)
    return eager, providers.make(form, case, device, mode, wider).step(batch.to(wider), mode)


def check(name: str, case: BAFCase, mode: str, got: Named, device: torch.device) -> None:
    """Check logits, loss and every gradient against the truth; a compiled model has its anchor's gradient, not the embedding's."""
    eager, truth = expected(providers.PROVIDERS[name].truth, case, mode, device)
    lost = truth.keys() - got.keys() - ({"embedding"} if "anchor" in got else set())
    assert not lost, f"there is no gradient of {sorted(lost)[0]}"
    models.check(got, eager, truth)


def prepared(name: str, point: suite.Point, device: torch.device) -> models.Prepared:
    case, mode = point.case, point.mode
    provider = providers.build(name, case, device, mode)
    return models.prepare(provider, point, batch_of(case, device), lambda got: check(name, case, mode, got, device))


def facts(provider: str, case: BAFCase, device: torch.device) -> dict[str, Any]:
    """Return the implementation that ``auto`` chooses, and a layer's number of tokens relative to the plain VLMo's."""
    return {
        "implementation": _implementations.choose("receptive_field_attention", "auto", providers.problem(case, device)),
        "token_ratio": case.token_ratio if providers.PROVIDERS[provider].prompts else 1.0,
    }


GROUP = BAFGroup(
    "mope_baf", list(providers.PROVIDERS), providers.OURS, cases, providers.why_not, providers.PLAIN, batch_of, prepared, facts
)
