"""Tests that whole models are compared fairly: which gradients flow, what is counted, and which errors the check detects."""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks import end_to_end
from benchmarks.baselines import end_to_end as providers
from benchmarks.cases import SMOKE
from benchmarks.cases.end_to_end import TINY, TINY_SWIN, cases
from benchmarks.cases.models import INFERENCE, TRAINING
from mope_fast import PromptTuned
from mope_fast.encoders import family_of

CPU = torch.device("cpu")
CASES = [case for case in cases(CPU, SMOKE) if not case.dense]
(SEGMENTING,) = (case for case in cases(CPU, SMOKE) if case.dense)


@pytest.fixture(params=CASES, ids=str)
def case(request):
    pytest.importorskip(request.param.encoder.library)
    return request.param


@pytest.fixture
def vit():
    pytest.importorskip("timm")
    return CASES[0]


@pytest.fixture
def swin():
    pytest.importorskip("timm")
    return CASES[-1]


def step(name, case, mode):
    return providers.build(name, case, CPU, mode).step(end_to_end.batch_of(case, CPU), mode)


def test_flops_of_a_tiny_vit(vit):
    tokens, width, hidden, layers = 10, 32, 4 * 32, 2
    patches = 2 * (tokens - 1) * 3 * 4 * 4 * width
    layer = 2 * tokens * (4 * width * width + 2 * width * hidden) + 4 * tokens * tokens * width
    assert vit.flops(INFERENCE) == vit.batch * (patches + layers * layer)
    # gradients of activations take the same products again, and twice those of attention
    backward = layer + 4 * tokens * tokens * width
    assert vit.flops(TRAINING) == vit.batch * (patches + layers * (layer + backward))


def test_the_frozen_encoders_gradients_reach_its_embedding_and_no_weight(case):
    outputs = step("frozen", case, TRAINING)
    assert set(outputs) == {"logits", "loss", "head.weight", "head.bias", "embedding"}
    embedding = outputs["embedding"].flatten(1, -2)
    assert embedding.shape[:2] == (case.batch, case.encoder.tokens)
    assert embedding.abs().amax((1, 2)).min() > 0


def test_what_each_provider_trains(case):
    head = {"logits", "loss", "head.weight", "head.bias"}
    assert set(step("head-only", case, TRAINING)) == head
    fused = set(step("mope_fast", case, TRAINING))
    for other in ("paper-literal", "concatenated", "checkpointed"):
        assert set(step(other, case, TRAINING)) == fused
    encoder = providers.build("frozen", case, CPU, TRAINING).model["encoder"]
    deep = set(step("vpt-deep", case, TRAINING)) - head
    assert deep == {f"prompts.{width}" for width in {layer.width for layer in family_of(encoder).layers(encoder)}}
    assert fused > head
    assert all(name in head or name.startswith("bank.") for name in fused)
    weights = [name for name, _ in encoder.named_parameters() if "embed_positions" not in name]
    assert len(step("full", case, TRAINING)) == len(head) + len(weights)


def test_lora_trains_its_adapters_only(case):
    pytest.importorskip("peft")
    names = set(step("lora", case, TRAINING)) - {"logits", "loss", "head.weight", "head.bias"}
    assert all("lora_" in name for name in names)
    encoder = case.encoder.make()
    layers = family_of(encoder).layers(encoder)
    assert len(names) == len(layers) * len(case.encoder.lora) * 2


@pytest.mark.parametrize(("provider", "mode"), [("mope_fast", INFERENCE), ("mope_fast", TRAINING), ("folded", INFERENCE)])
def test_another_samples_feature_is_found(case, provider, mode):
    built, inputs = providers.build(provider, case, CPU, mode), end_to_end.batch_of(case, CPU)
    with built.without_randomness():
        right = built.step(inputs, mode)
        wrong = built.step(dataclasses.replace(inputs, cross=inputs.cross.roll(1, 0)), mode)
    end_to_end.check(built, case, mode, right, CPU)
    with pytest.raises(AssertionError, match="error of logits"):
        end_to_end.check(built, case, mode, wrong, CPU)


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING])
def test_a_segmenting_model_is_measured_beside_its_encoder_with_the_same_head(vit, mode):
    outputs = {}
    for name in end_to_end.GROUP.providers_at(SEGMENTING, mode):
        built, inputs = providers.build(name, SEGMENTING, CPU, mode), end_to_end.batch_of(SEGMENTING, CPU)
        with built.without_randomness():
            outputs[name] = built.step(inputs, mode)
            end_to_end.check(built, SEGMENTING, mode, outputs[name], CPU)
    assert list(outputs) == ["frozen", "mope_fast", *(["folded"] if mode == INFERENCE else [])]
    assert all(each["logits"].shape == (3, 1, 48, 48) for each in outputs.values())
    if mode == TRAINING:
        head = {name for name in outputs["frozen"] if name.startswith("head.")}
        assert head == {name for name in outputs["mope_fast"] if name.startswith("head.")}
        return
    provider = providers.build("frozen", SEGMENTING, CPU, mode)
    plain = PromptTuned(provider.model["encoder"], 0, head=provider.model["head"], problem_type="segmentation")
    with torch.no_grad():
        torch.testing.assert_close(outputs["frozen"]["logits"], plain.eval()(end_to_end.batch_of(SEGMENTING, CPU).main).logits)
    assert SEGMENTING.flops(TRAINING) > SEGMENTING.flops(INFERENCE) > vit.flops(INFERENCE) / vit.batch * SEGMENTING.batch


def test_a_lost_gradient_is_found(vit):
    built = providers.build("mope_fast", vit, CPU, TRAINING)
    with built.without_randomness():
        outputs = built.step(end_to_end.batch_of(vit, CPU), TRAINING)
    (experts,) = [name for name in outputs if name.endswith("experts")]
    with pytest.raises(AssertionError, match=r"error of gradient of bank.*experts"):
        end_to_end.check(built, vit, TRAINING, outputs | {experts: torch.zeros_like(outputs[experts])}, CPU)


@pytest.mark.parametrize("mode", [INFERENCE, TRAINING])
def test_the_paper_literal_form_has_mopes_numbers_for_one_sample(case, mode):
    built = providers.build("paper-literal", case, CPU, mode)
    end_to_end.check_without_randomness(built, case, mode, CPU)
    with torch.no_grad():
        built.bank.keys.mul_(-1)
    with pytest.raises(AssertionError, match="error of logits"):
        end_to_end.check_without_randomness(built, case, mode, CPU)


def test_its_windows_get_prompts_of_other_samples_as_released(case):
    built, inputs = providers.build("paper-literal", case, CPU, INFERENCE), end_to_end.batch_of(case, CPU)
    changed = inputs.cross.clone()
    changed[1] += 1
    changed = dataclasses.replace(inputs, cross=changed)
    with built.without_randomness():
        one, other = (built.step(each, INFERENCE)["logits"] for each in (inputs, changed))
    differ = (one != other).any(1)
    assert differ[1]
    assert differ[torch.arange(case.batch) != 1].any() == bool(case.encoder.window)


def test_the_importance_of_the_paper_literal_form_branches_on_values(vit):
    built = providers.build("paper-literal", vit, CPU, TRAINING)
    torch.testing.assert_close(built._importance(torch.full((4, 3), 1 / 3)), torch.tensor(0.0))
    sums = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(built._importance(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]])), (sums.std() / sums.mean()) ** 2)


def test_random_steps_are_random_and_near_the_truth(vit):
    built, inputs = providers.build("mope_fast", vit, CPU, TRAINING), end_to_end.batch_of(vit, CPU)
    one, other = (built.step(inputs, TRAINING) for _ in range(2))
    assert not torch.equal(one["logits"], other["logits"])
    end_to_end.check_random(built, vit, TRAINING, one, CPU)
    unrelated = {name: torch.randn_like(tensor) for name, tensor in one.items()}
    with pytest.raises(AssertionError, match="differ too much from those without dropout"):
        end_to_end.check_random(built, vit, TRAINING, unrelated, CPU)


def test_both_ways_of_mixing_are_measured():
    experts = 16
    assert {case.batch > experts for case in CASES} == {True, False}
    assert [case.encoder for case in CASES] == [*TINY, TINY_SWIN]


@pytest.mark.parametrize(("provider", "fused"), [("frozen", False), ("frozen-sdpa", True)])
def test_timms_swin_is_on_sdpa_where_its_label_says_so(provider, fused, swin):
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
        step(provider, swin, INFERENCE)
    assert sdpa.called == fused


def test_prompts_are_tokens_of_the_windows_of_their_image(swin):
    """A sample's logits don't depend on the other samples."""
    provider, inputs = providers.build("concatenated", swin, CPU, INFERENCE), end_to_end.batch_of(swin, CPU)
    together = provider.step(inputs, INFERENCE)["logits"]
    one = dataclasses.replace(inputs, main={"x": inputs.main["x"][3:4]}, cross=inputs.cross[3:4])
    torch.testing.assert_close(provider.step(one, INFERENCE)["logits"], together[3:4])
