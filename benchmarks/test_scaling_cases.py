"""Tests of the scaling curves: sizes, equal parameters, what is left out and why, the optimizer's step."""

import dataclasses

import pytest
import torch

from benchmarks import end_to_end, scaling
from benchmarks.baselines import scaling as providers
from benchmarks.baselines.encoders import Parts
from benchmarks.baselines.paper_literal import PaperLiteral
from benchmarks.cases import FULL, SMOKE
from benchmarks.cases.models import INFERENCE, TRAINING
from benchmarks.cases.scaling import AXES, LENGTH, LENGTH_EXPERTS, cases, equal_length
from mope_fast import MoPEConfig, PromptBank

CPU = torch.device("cpu")
DEVICES = [(torch.device(name), extent) for name in ("cpu", "cuda") for extent in (FULL, SMOKE)]


@pytest.fixture
def case():
    pytest.importorskip("timm")
    return cases(CPU, SMOKE)[0]


@pytest.mark.parametrize("experts", [1, 2, 4, 8, 16, 32, 64, 128, 1024])
def test_longer_prompts_take_exactly_the_parameters_of_more_experts(experts):
    def trained(count, length):
        with torch.device("meta"):
            bank = PromptBank([16, 16, 32], 12, MoPEConfig(num_experts=count, prompt_length=length))
        return sum(p.numel() for p in bank.parameters())

    assert trained(experts, 6) == trained(LENGTH_EXPERTS, equal_length(experts, 6))


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="5 prompts of 4 rows don't divide among 3"):
        equal_length(4, 4)


@pytest.mark.parametrize(("device", "extent"), DEVICES)
def test_along_a_curve_one_thing_changes(device, extent):
    pytest.importorskip("timm")
    found = cases(device, extent)
    centre = found[0]
    assert centre.axes == AXES
    assert len({str(case) for case in found}) == len(found)
    for case in (case for case in found if case.encoder.name == centre.encoder.name):
        sizes = {"K": case.experts, "L": case.length, "B": case.batch, "S": case.encoder.tokens}
        at_centre = {"K": centre.experts, "L": centre.length, "B": centre.batch, "S": centre.encoder.tokens}
        changed = {name for name in AXES if sizes[name] != at_centre[name]}
        for axis in case.axes:
            assert changed <= ({"K", "L"} if axis == LENGTH else {axis})
        assert TRAINING not in case.modes or case.batch > 1
    for count in (case.experts for case in found if LENGTH in case.axes):
        assert count == LENGTH_EXPERTS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_goal_has_both_its_points(device):
    pytest.importorskip("timm")
    points = {(case.encoder.name, case.batch, case.experts) for case in cases(torch.device(device), FULL) if "K" in case.axes}
    goal = ("ViT-B/16", 64 if device == "cuda" else 8)
    assert {(*goal, 16), (*goal, 256)} <= points


def test_who_is_measured_where(case):
    assert providers.providers_at(case, TRAINING) == list(providers.NAMES)
    assert providers.OPTIMIZER not in providers.providers_at(case, INFERENCE)
    more = dataclasses.replace(case, experts=2, axes=("K",))
    assert providers.providers_at(more, TRAINING) == ["mope_fast", "paper-literal", "optimizer"]
    longer = dataclasses.replace(case, experts=2, length=10, axes=(LENGTH,))
    assert providers.providers_at(longer, TRAINING) == ["mope_fast", "paper-literal", "vpt-deep"]


def test_expanded_experts_are_counted_and_too_many_left_out_with_the_reason(case):
    literal = PaperLiteral(Parts.of(case, CPU), TRAINING)
    literal.prepare(end_to_end.batch_of(case, CPU).cross)
    assert providers.expanded_bytes(case) == sum(
        experts.nbytes // experts.element_size() * 4 for experts in literal.experts.values()
    )
    assert providers.why_not("paper-literal", case, CPU, False) is None
    many = dataclasses.replace(case, experts=(providers.CPU_BYTES // providers.expanded_bytes(case) + 1) * case.experts)
    assert "0.25 GiB" in providers.why_not("paper-literal", many, CPU, False)
    assert providers.why_not("mope_fast", many, CPU, False) is None


def test_the_optimisers_step_is_adamws_on_all_that_is_trained(case):
    provider = providers.build("optimizer", case, CPU, TRAINING)
    assert provider.parameters.keys() == providers.build("mope_fast", case, CPU, TRAINING).parameters.keys()
    (group,) = provider.optimizer.param_groups
    group["lr"] = 1e-2
    copies = [p.detach().clone().requires_grad_() for p in group["params"]]
    for copy, own in zip(copies, group["params"], strict=True):
        copy.grad = own.grad.clone()
    plain = torch.optim.AdamW(copies, lr=1e-2, weight_decay=group["weight_decay"], foreach=False)
    for _ in range(2):
        provider.step(None, TRAINING)
        plain.step()
    torch.testing.assert_close([p.detach() for p in group["params"]], [p.detach() for p in copies])


def test_what_is_saved_says_how_much_is_trained(case):
    longer = dataclasses.replace(case, experts=LENGTH_EXPERTS, length=equal_length(case.experts, case.length), axes=(LENGTH,))
    one, other = (scaling.facts("mope_fast", each, CPU)["trained_parameters"] for each in (case, longer))
    assert one == other
    assert scaling.facts("frozen", case, CPU)["trained_parameters"] < one
    assert longer.describe()["axes"] == [LENGTH]
