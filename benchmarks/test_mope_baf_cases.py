"""Tests that MoPE-BAF and the plain VLMo are compared fairly: which gradients exist, what is counted, what the check detects."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks import mope_baf
from benchmarks.baselines import mope_baf as providers
from benchmarks.cases import SMOKE
from benchmarks.cases.models import INFERENCE, TRAINING
from benchmarks.cases.mope_baf import BASE_PLUS, MODES, TRAINING_FROZEN, BAFCase, cases

pytest.importorskip("timm")
CPU = torch.device("cpu")
CASES = PLUS, BASE = cases(CPU, SMOKE)
LARGE = BAFCase("VLMo-B+", BASE_PLUS, (10, 10, 10), 32, torch.bfloat16, MODES)
HEAD = {"head.weight", "head.bias"}
NEW = {"text_prompt", "image_prompt", "unified_prompt"}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def step(name, case, mode):
    return providers.build(name, case, CPU, mode).step(mope_baf.batch_of(case, CPU), mode)


def check(name, case, mode, outputs):
    mope_baf.check(name, case, mode, outputs, CPU)


def test_token_ratios_by_hand():
    assert LARGE.token_ratio == (21 * (10 + 40 + 197 + 10) + 3 * (10 + 40 + 197)) / 24 / 237
    assert PLUS.token_ratio == (3 * (2 + 6 + 5 + 3) + 1 * (2 + 6 + 5)) / 4 / 11
    assert [mope_baf.facts(name, LARGE, CPU)["token_ratio"] for name in ("plain", "one-block")] == [1, LARGE.token_ratio]


@pytest.mark.parametrize("name", ["plain", "mope_fast", "unrestricted", "one-block"])
def test_layers_have_the_rows_that_the_token_ratio_counts(case, name):
    provider, rows = providers.build(name, case, CPU, INFERENCE), []
    for module in provider.model.modules():
        if isinstance(module, providers.VLMo):
            for block in module.transformer.blocks:
                block.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    provider.step(mope_baf.batch_of(case, CPU), INFERENCE)
    ratio = mope_baf.facts(name, case, CPU)["token_ratio"]
    assert len(rows) == case.vlmo.num_layers
    assert sum(rows) / len(rows) / case.tokens == pytest.approx(ratio)


def test_flops_of_a_tiny_vlmo():
    """Training repeats the forward's products once for activations and once for weights, but not for gradients of pixels."""
    tokens, width, layers = 11, 68, 4
    embedding, pooler = 2 * 4 * 3 * 16 * 16 * width, 2 * width * width
    forward = embedding + pooler + layers * (2 * tokens * 12 * width * width + 4 * tokens * tokens * width)
    attention = layers * 4 * tokens * tokens * width
    assert PLUS.flops(INFERENCE) == PLUS.batch * forward
    assert PLUS.flops(TRAINING_FROZEN) == PLUS.batch * (2 * forward - embedding + attention)
    assert PLUS.flops(TRAINING) == PLUS.batch * (3 * forward - embedding)


def test_frozen_means_no_gradient_of_the_vlmos_weights(case):
    plain, ours = (set(step(name, case, TRAINING_FROZEN)) - {"logits", "loss"} for name in ("plain", "mope_fast"))
    assert plain == HEAD | {"embedding"}
    assert {name for name in ours if not name.startswith("fusions.")} == HEAD | NEW


def test_trained_means_all_weights_that_a_joint_pass_uses(case):
    plain, ours = (set(step(name, case, TRAINING)) - {"logits", "loss"} for name in ("plain", "mope_fast"))
    backbone = {name.removeprefix("encoder.") for name in plain if name.startswith("encoder.")}
    assert backbone - {name.removeprefix("backbone.") for name in ours} == {"pooler.dense.weight", "pooler.dense.bias"}
    assert {f"transformer.blocks.{layer}.attn.qkv.weight" for layer in range(case.vlmo.num_layers)} < backbone
    assert "text_embeddings.word_embeddings.weight" in backbone
    assert "fusions.0.to_text.attention.in_proj_weight" in ours


def test_the_embedding_of_a_frozen_vlmo_has_a_gradient_everywhere(case):
    embedding = step("plain", case, TRAINING_FROZEN)["embedding"]
    assert embedding.shape[:2] == (case.batch, case.tokens)
    assert embedding.abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_field_is_found(case, mode, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    check("mope_fast", case, mode, step("mope_fast", case, mode))
    with pytest.raises(AssertionError, match="error of"):
        check("mope_fast", case, mode, step("unrestricted", case, mode))


@pytest.mark.parametrize("name", ["plain", "mope_fast"])
def test_forgotten_padding_is_found(case, name):
    batch = mope_baf.batch_of(case, CPU)
    all_real = {"attention_mask": torch.ones_like(batch.main["attention_mask"])}
    forgetful = dataclasses.replace(batch, main=batch.main | all_real)
    outputs = providers.build(name, case, CPU, INFERENCE).step(forgetful, INFERENCE)
    with pytest.raises(AssertionError, match="error of logits"):
        check(name, case, INFERENCE, outputs)


@pytest.mark.parametrize("mode", [TRAINING, TRAINING_FROZEN])
def test_a_lost_gradient_is_found(case, mode):
    outputs = step("mope_fast", case, mode)
    for name in ("text_prompt", "fusions.0.to_text.norm_query.weight"):
        with pytest.raises(AssertionError, match=f"error of gradient of {name}"):
            check("mope_fast", case, mode, outputs | {name: torch.zeros_like(outputs[name])})
        with pytest.raises(AssertionError, match=f"there is no gradient of {name}"):
            check("mope_fast", case, mode, {key: value for key, value in outputs.items() if key != name})


def test_masks_are_made_once_for_layers_that_see_the_same():
    provider, batch = providers.build("sdpa-mask", PLUS, CPU, INFERENCE), mope_baf.batch_of(PLUS, CPU)
    with mock.patch.object(providers, "visible", wraps=providers.visible) as made:
        for _ in range(2):
            provider.step(batch, INFERENCE)
    assert made.call_count == 2


@pytest.mark.parametrize("mode", [TRAINING, TRAINING_FROZEN])
def test_ours_in_all_forms_have_the_same_weights(mode):
    one, other = (providers.build(name, PLUS, CPU, mode).model.state_dict() for name in ("mope_fast", "unrestricted"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_what_the_masks_say():
    """Run FlexAttention as torch does without compiling."""
    from torch.nn.attention.flex_attention import flex_attention

    with mock.patch.object(providers, "_compiled_flex", return_value=flex_attention):
        check("flex", PLUS, INFERENCE, step("flex", PLUS, INFERENCE))


def test_xformers_gets_a_bias_that_says_what_the_masks_say(monkeypatch):
    ops = pytest.importorskip("xformers.ops")

    def attention(q, k, v, attn_bias, scale):
        assert q.shape[-1] % 8 == 0
        assert attn_bias.stride(-2) % 8 == 0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", attention)
    check("xformers-bias", PLUS, TRAINING, step("xformers-bias", PLUS, TRAINING))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["plain-compiled", "mope_fast-compiled"])
def test_compiled_models_are_one_graph_with_the_same_numbers(name, mode, monkeypatch):
    captured = functools.partial(torch.compile, backend="eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(providers, "compile_model", captured)
    provider = providers.make(providers.PROVIDERS[name], PLUS, CPU, mode, compiled=True)
    check(name, PLUS, mode, provider.step(mope_baf.batch_of(PLUS, CPU), mode))
