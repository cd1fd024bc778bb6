"""MoPE-BAF against plain VLMo where it has to be that, and against a literal forward pass in all of its settings."""

import pytest
import torch
from literal_baf import ALL, CASES, CHAIN, JOINT, NAMES, forward
from tiny_baf import LENGTHS, NONE, all_close, close, gradients, make_baf, make_inputs, make_vlmo, trained
from torch import nn

from mope_fast import BAFConfig, MoPEBAF
from mope_fast.modules.block_fusion import PromptFusion

TABLES = [CHAIN] * 3 + [JOINT] * 2


@pytest.mark.parametrize("name", ["base_plus", "base"])
@pytest.mark.parametrize("settings", [{"num_blocks": 1}, {"num_blocks": 2}, {"fusion_form": "F", "boundaries": [1, 2]}])
def test_without_prompts_it_is_the_plain_vlmo_to_the_bit(name, settings):
    vlmo, inputs = make_vlmo(name), make_inputs()
    expected = vlmo(**inputs)
    model = make_baf(vlmo, None, **NONE, **settings)
    groups = model.hidden_states(**inputs)
    assert torch.equal(groups["text"], expected.text)
    assert torch.equal(groups["image"], expected.image)
    assert torch.equal(model(**inputs).features, expected.pooled)


def check_against_literal(model, tables, starts, inputs):
    """Outputs of all groups that are left, and the gradient of every parameter."""
    got, expected = model.hidden_states(**inputs), forward(model, tables, starts, inputs)
    expected = {NAMES[letter]: rows for letter, rows in expected.items()}
    all_close(got, expected)
    parameters = trained(model)
    names = list(expected)
    upstream = torch.randn_like(torch.cat([expected[name] for name in names], 1))
    grads = [gradients(torch.cat([groups[name] for name in names], 1), parameters, upstream) for groups in (got, expected)]
    all_close(*grads)
    return grads[1]


@pytest.mark.parametrize("name", ["base_plus", "base"])
@pytest.mark.parametrize("case", CASES)
def test_every_visibility_equals_the_literal_model(case, name):
    settings, tables = CASES[case]
    model = make_baf(make_vlmo(name), **{"num_blocks": 1, **settings})
    starts = list(model.config.boundaries or {3: (1, 2), 2: (2,), 1: ()}[model.config.num_blocks])
    grads = check_against_literal(model, tables, starts, make_inputs())
    for prompt in ("text_prompt", "image_prompt", "unified_prompt"):
        assert grads[prompt].abs().max() > 1e-4


@pytest.mark.parametrize("form", "ABCDFG")
@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"num_blocks": 2}, [2]),
        ({"num_blocks": 3, "share_directions": True}, [1, 2]),
        ({"boundaries": [1, 2], "share_boundaries": True, "per_block_prompts": True}, [1, 2]),
        ({"num_blocks": 2, "fusion_heads": 4, "unified_from_start": True}, [2]),
    ],
)
def test_every_form_of_fusion_equals_the_literal_model(form, settings, starts):
    tables = [{"u": "ultiv", "l": "ult", "t": "ulti", "i": "utiv", "v": "uiv"}] * 3 + [JOINT] * 2
    tables = tables if "unified_from_start" in settings else TABLES
    model = make_baf(fusion_form=form, image_prompt_length=3, **settings)
    grads = check_against_literal(model, tables, starts, make_inputs())
    assert all(grads[name].abs().max() > 1e-6 for name in grads if "prompt" in name or "fusion" in name)
    if form == "G":
        assert grads["unified_fusion.attention.in_proj_weight"].abs().max() > 1e-6


@pytest.mark.parametrize(
    ("settings", "starts", "tables"),
    [
        ({"partition": "all", "num_blocks": 3, "keep_modality_prompts": True}, [2, 4], [CHAIN] * 3 + [ALL] * 2),
        ({"partition": "stages", "keep_modality_prompts": True}, [3], [CHAIN] * 3 + [ALL] * 2),
        ({"partition": "stages", "fusion_form": "G"}, [3], TABLES),
        ({"boundaries": [1, 2, 3], "fusion_form": "G", "per_block_prompts": True}, [1, 2, 3], TABLES),
        ({"text_prompt_length": 0}, [2], TABLES),
        ({"image_prompt_length": 0, "fusion_form": "B"}, [2], TABLES),
        ({"image_prompt_length": 0, "fusion_form": "G"}, [2], TABLES),
        ({"unified_prompt_length": 0}, [2], TABLES),
        ({"fusion_form": "E", "per_block_prompts": True}, [2], [CHAIN] * 2 + [{**CHAIN, "l": "ltv", "v": "liv"}] + [JOINT] * 2),
    ],
)  # fmt: skip
def test_boundaries_and_missing_prompts_equal_the_literal_model(settings, starts, tables):
    grads = check_against_literal(make_baf(**settings), tables, starts, make_inputs(text=6))
    assert all(grads[name].abs().max() > 1e-6 for name in grads if "prompt" in name or "fusion" in name)


@pytest.mark.parametrize(
    ("sizes", "settings", "tables", "starts"),
    [
        ({"first_fusion_layer": 5}, {"unified_prompt_length": 0, "num_blocks": 4}, [CHAIN] * 5, [2, 3, 4]),
        ({"first_fusion_layer": 0}, {**NONE, "unified_prompt_length": 3, "num_blocks": 1}, [JOINT] * 5, []),
        ({"first_fusion_layer": 0}, {"partition": "all", "keep_modality_prompts": True}, [ALL] * 5, [3]),
        ({"first_fusion_layer": 0}, {**NONE, "num_blocks": 1}, [JOINT] * 5, []),
    ],
)  # fmt: skip
def test_vlmos_without_either_kind_of_layer(sizes, settings, tables, starts):
    check_against_literal(make_baf(make_vlmo(**sizes), **settings), tables, starts, make_inputs())


@pytest.mark.parametrize("form", "ACDG")
def test_fusion_that_projects_to_zero_is_no_fusion(form):
    model, inputs = make_baf(fusion_form=form, image_prompt_length=3), make_inputs()
    fused = model(**inputs).logits
    exchanges = [module for module in model.modules() if isinstance(module, PromptFusion)]
    assert len(exchanges) == (3 if form == "G" else 2)
    for exchange in exchanges:
        last = [exchange.attention.out_proj, *([] if exchange.feed_forward is None else [exchange.feed_forward[-1]])]
        for parameter in nn.ModuleList(last).parameters():
            nn.init.zeros_(parameter)
    plain = make_baf(model.backbone, image_prompt_length=3, num_blocks=1)
    state = model.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert not torch.allclose(fused, plain(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize("pooling", ["auto", "unified", "pooler"])
def test_pooling_and_head_equal_the_literal_model(pooling):
    model, inputs = make_baf(pooling=pooling, num_blocks=1), make_inputs()
    groups = forward(model, TABLES, [], inputs)
    dense = model.backbone.pooler.dense
    features = torch.tanh(groups["t"][:, 0] @ dense.weight.T + dense.bias) if pooling == "pooler" else groups["u"].mean(1)
    output = model(**inputs)
    close(output.features, features)
    close(output.logits, features @ model.head.weight.T + model.head.bias)


def test_prompts_start_with_the_deviation_asked_for():
    lengths = dict.fromkeys(LENGTHS, 100)
    model = MoPEBAF(make_vlmo(), None, BAFConfig(**lengths, prompt_init_std=0.5))
    for name in ("text_prompt", "image_prompt", "unified_prompt"):
        assert 0.48 < getattr(model, name).std().item() < 0.52
