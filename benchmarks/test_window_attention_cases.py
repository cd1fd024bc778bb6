"""Tests that the measured forms solve the same problem: the bias, counts, reordering, and which errors the check detects."""

import dataclasses

import pytest
import torch

from benchmarks import window_attention
from benchmarks.baselines import window_attention as providers
from benchmarks.baselines.window_attention import Inputs, flex_attention, timm_block
from benchmarks.cases import SMOKE
from benchmarks.cases.window_attention import WindowCase, cases, swin_stage

CPU = torch.device("cpu")
SHIFTED, PADDED, FIRST_LAYER = CASES = cases(CPU, SMOKE)
BACKWARD = "forward+backward"


def outputs(provider: str, case: WindowCase, inputs: Inputs, mode: str = BACKWARD):
    return window_attention.build_step(provider, case, CPU, mode)(inputs)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return Inputs.random(SHIFTED, CPU, BACKWARD)


def test_bias_is_timms():
    pytest.importorskip("timm")
    block = timm_block(SHIFTED, CPU)
    assert torch.equal(block.attn._get_rel_pos_bias()[0], SHIFTED.bias(CPU))


def test_a_case_is_what_timm_makes_of_swin():
    swin = pytest.importorskip("timm").create_model("swin_base_patch4_window7_224", num_classes=0)
    for stage, layer in enumerate(swin.layers, start=1):
        for block, shifted in zip(layer.blocks, (False, True), strict=False):
            case = swin_stage(stage, 1, torch.float32, shifted=shifted)
            assert (case.size, case.heads) == (block.input_resolution, block.attn.num_heads)
            assert ((case.window,) * 2, (case.shift,) * 2) == (block.window_size, block.shift_size)


def test_counts():
    case = WindowCase("m", 3, (8, 12), 2, 4, 1, torch.bfloat16, 16, (4, 5))
    queries, keys = 3 * 8 * 12, 16 + 9
    assert case.flops("forward") == 4 * 2 * 16 * queries * keys
    tokens, prefixes, bias = queries * 2 * 16 * 2, 2 * (4 + 3 * 5) * 2 * 16 * 2, 2 * 16 * 16 * 2
    assert case.bytes("forward") == 4 * tokens + prefixes + bias
    assert case.bytes(BACKWARD) == 8 * tokens + 2 * prefixes + bias


@pytest.mark.parametrize("case", [SHIFTED, PADDED], ids=str)
def test_flex_attention_sees_what_the_reference_sees(case):
    torch.manual_seed(0)
    inputs = Inputs.random(case, CPU, "forward")
    got = flex_attention(case, CPU)(inputs.qkv, inputs.pad_qkv, inputs.prefixes)  # uncompiled, it computes the full score matrices
    window_attention.check("flex", case, "forward", (got,), inputs)


@pytest.mark.parametrize("provider", ["sdpa-concat", "auto"])
def test_another_images_prompts_are_found(provider, inputs):
    pytest.importorskip("timm")
    shared, (keys, values) = inputs.prefixes
    wrong = dataclasses.replace(inputs, prefixes=(shared, (keys.roll(1, 0), values.roll(1, 0))))
    window_attention.check(provider, SHIFTED, BACKWARD, outputs(provider, SHIFTED, inputs), inputs)
    with pytest.raises(AssertionError, match="error of out"):
        window_attention.check(provider, SHIFTED, BACKWARD, outputs(provider, SHIFTED, wrong), inputs)


@pytest.mark.parametrize("provider", ["timm", "timm-eager", "sdpa-concat", "auto"])
def test_another_shift_is_found(provider, inputs):
    pytest.importorskip("timm")
    other = dataclasses.replace(SHIFTED, shift=1)
    with pytest.raises(AssertionError, match="error of out"):
        window_attention.check(provider, SHIFTED, BACKWARD, outputs(provider, other, inputs), inputs)


@pytest.mark.parametrize("lost", ["tokens", "windows"])
def test_what_goes_back_through_timms_partition_is_checked(lost, inputs):
    pytest.importorskip("timm")
    got = list(outputs("timm", SHIFTED, inputs))
    index = 1 + list(providers.PROVIDERS["timm"].learned(inputs)).index(lost)
    got[index] = got[index].roll(1, 1)
    title = {"tokens": "tokens", "windows": "qkv"}[lost]
    with pytest.raises(AssertionError, match=f"error of gradient of {title}"):
        window_attention.check("timm", SHIFTED, BACKWARD, tuple(got), inputs)


def test_a_first_layer_learns_its_prefixes():
    inputs = Inputs.random(FIRST_LAYER, CPU, BACKWARD)
    for provider, form in providers.PROVIDERS.items():
        assert len(form.learned(inputs)) == (4 if form.prompted else 0), provider
