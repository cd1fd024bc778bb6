"""MoPE-BAF on every implementation of attention that can run here, against a literal forward with an explicit mask."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from literal_baf import CASES, NAMES, forward, words
from tiers import slow_but
from tiny_baf import SMALL, all_close, gradients, make_baf, make_inputs, make_vlmo, trained

from mope_fast.ops.prompt_attention import INTERPRETED

in_double = pytest.mark.skipif(not INTERPRETED, reason="float64 kernels run in the interpreter only")
implementations = pytest.mark.parametrize(
    "impl", ["reference", "sdpa", pytest.param("triton", marks=[pytest.mark.kernel, in_double])]
)
PROMPTS = {f"{NAMES[letter]}_length": letter for letter in "ulv"}


def laws(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def tables(draw):
    """What each of five groups sees: any of 2 ** 25."""
    return {group: "".join(sorted(draw(st.sets(st.sampled_from("ultiv"))))) for group in "ultiv"}


def small_inputs(text=5):
    inputs = make_inputs(2, text, SMALL["image_size"])
    assert (inputs["attention_mask"] == 0).any()
    return inputs


def check(model, of_layers, starts, inputs):
    """Outputs and gradients in float64."""
    got = {letter: model.hidden_states(**inputs)[NAMES[letter]] for letter in of_layers[-1]}
    expected = forward(model, of_layers, starts, inputs)
    all_close(got, expected, 1e-9)
    upstream = torch.randn_like(torch.cat([expected[letter] for letter in got], 1))
    grads = [gradients(torch.cat([groups[letter] for letter in got], 1), trained(model), upstream) for groups in (got, expected)]
    all_close(*grads, 1e-9)


@pytest.mark.parametrize(
    "impl", ["reference", "sdpa", pytest.param("triton", marks=[pytest.mark.kernel, in_double, pytest.mark.slow])]
)
@laws(4 if INTERPRETED else 40)
@given(expert=tables(), fusion=tables(), lengths=st.tuples(*[st.integers(0, 3)] * 3), masked=st.booleans(), relative=st.booleans())
def test_any_table_equals_its_explicit_mask(expert, fusion, lengths, masked, relative, impl):
    vlmo = make_vlmo("base" if relative else "base_plus", impl=impl, **SMALL)
    model = make_baf(
        vlmo, None, num_blocks=1, unified_from_start=True, keep_modality_prompts=True, visible=words(expert),
        fusion_visible=words(fusion), **dict(zip(PROMPTS, lengths, strict=True)),
    )  # fmt: skip
    inputs = small_inputs()
    inputs["attention_mask"] = inputs["attention_mask"] if masked else torch.ones_like(inputs["attention_mask"])
    check(model, [expert, fusion], [], inputs)


@implementations
@pytest.mark.parametrize("case", slow_but([("default",)], [("default",), ("V1 to V5",), ("V4, not seen",)]))
def test_the_usual_tables_on_every_implementation(case, impl):
    chosen, of_layers = CASES[case]
    vlmo = make_vlmo(impl=impl, **SMALL)
    check(make_baf(vlmo, None, num_blocks=1, **chosen), [of_layers[0], of_layers[-1]], [], small_inputs())


@implementations
def test_fusion_between_layers_on_every_implementation(impl):
    vlmo = make_vlmo("base", impl=impl, **{**SMALL, "num_layers": 3, "first_fusion_layer": 2})
    of_layers = CASES["default"][1]
    check(make_baf(vlmo, None, image_prompt_length=3), [*of_layers[:2], of_layers[-1]], [1], small_inputs())


@implementations
def test_a_group_that_sees_nothing_gets_zeros_from_attention(impl):
    vlmo = make_vlmo(impl=impl, **{**SMALL, "num_layers": 1})
    model = make_baf(vlmo, None, num_blocks=1, unified_from_start=True, visible=words(dict.fromkeys("ultiv", "")))
    attention, kept = vlmo.transformer.blocks[0].attn, []
    attention.register_forward_hook(lambda module, args, out: kept.append(out))
    model.hidden_states(**small_inputs())
    assert torch.equal(kept[0], attention.proj.bias.expand_as(kept[0]))


@pytest.mark.kernel
@pytest.mark.parametrize("case", ["default", "own tables"])
def test_kernels_in_float32(case, device):
    chosen, _ = CASES[case]
    double = make_baf(make_vlmo(impl="reference", **SMALL), num_blocks=1, **chosen)
    results, upstream = [], torch.randn(2, 3, dtype=torch.float64)
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        model = copy.deepcopy(double).to(device, dtype)
        for block in model.backbone.transformer.blocks:
            block.attn.impl = impl
        inputs = {key: value.to(device) for key, value in small_inputs().items()}
        logits = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}).logits
        results.append({"logits": logits, **gradients(logits, trained(model), upstream.to(logits))})
    all_close({name: value.double() for name, value in results[0].items()}, results[1], 1e-5)
