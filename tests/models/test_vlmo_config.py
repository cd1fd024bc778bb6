"""Sizes, names and numbers of parameters of the three official models, and what a configuration refuses."""

import pytest
import torch
from tiny_vlmo import make_config
from vlmo_files import mlm_shapes, official_shapes

from mope_fast import VLMo, VLMoConfig

OFFICIAL = {
    "base": official_shapes(768, 12, 10, relative=(1126, 144)),
    "base_plus": official_shapes(544, 24, 21),
    "large": official_shapes(1024, 24, 21, relative=(1126, 384)),
}
WIDTHS = {"base": 768, "base_plus": 544, "large": 1024}
PARAMETERS = {"base": 176_021_088, "base_plus": 166_863_840, "large": 562_594_048}


def on_meta(name, **overrides):
    with torch.device("meta"):
        return VLMo.from_config(name, **overrides)


@pytest.mark.parametrize("mlm_head", [False, True])
@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_of_the_official_files(name, mlm_head):
    state = on_meta(name, mlm_head=mlm_head).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == OFFICIAL[name] | (
        mlm_shapes(WIDTHS[name]) if mlm_head else {}
    )


@pytest.mark.parametrize("name", OFFICIAL)
def test_number_of_parameters(name):
    model = on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    if name == "base_plus":
        assert sum(p.numel() for p in model.transformer.blocks.parameters()) == 149_411_232


def test_a_new_model_starts_as_the_official_one():
    model = VLMo(make_config("base", layer_scale=0.3, hidden_size=96))
    block = model.transformer.blocks[2]
    assert torch.equal(block.gamma_2, torch.full((96,), 0.3))
    assert not model.relative_position_bias_table.any()
    for weight in (block.attn.qkv.weight, block.mlp_vl.fc1.weight, model.pooler.dense.weight):
        assert 0.018 < weight.std() < 0.022
    assert not block.mlp_vl.fc1.bias.any()
    assert 0.018 < model.text_embeddings.word_embeddings.weight.std() < 0.022


def test_drop_path_rises_to_its_rate():
    model = VLMo(make_config(num_layers=5, drop_path_rate=0.2))
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.transformer.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert model.text_embeddings.dropout.p == 0.2


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers must be >= 1, got 0"),
        ({"vocab_size": -3}, ValueError, "vocab_size must be >= 1, got -3"),
        ({"mlp_ratio": 4.0}, TypeError, "mlp_ratio must be int, got 4.0"),
        ({"num_heads": "3"}, TypeError, "num_heads must be int, got '3'"),
        ({"hidden_size": True}, TypeError, "hidden_size must be int, got True"),
        ({"drop_path_rate": "0.1"}, TypeError, "drop_path_rate must be float, got '0.1'"),
        ({"mlm_head": "no"}, TypeError, "mlm_head must be bool, got 'no'"),
        ({"layer_scale": "x"}, TypeError, "layer_scale must be float \\| None, got 'x'"),
        ({"hidden_size": 25}, ValueError, "hidden_size=25 must be a multiple of num_heads=3"),
        ({"image_size": 14}, ValueError, "image_size=14 must be a multiple of patch_size=4"),
        ({"image_size": 2}, ValueError, "image_size=2 must be a multiple of patch_size=4"),
        ({"first_fusion_layer": 4}, ValueError, "first_fusion_layer must be 0 to num_layers=3, got 4"),
        ({"first_fusion_layer": -1}, ValueError, "first_fusion_layer must be 0 to num_layers=3, got -1"),
        ({"drop_path_rate": 1.0}, ValueError, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"max_text_length": 197}, ValueError, "relative positions cover at most 196 text tokens, got max_text_length=197"),
    ],
    ids=str,
)
def test_sizes_that_do_not_go_together(overrides, error, message):
    with pytest.raises(error, match=message):
        make_config("base", **overrides)


def test_other_names_and_no_configuration():
    with pytest.raises(ValueError, match=r"configurations \['base', 'base_plus', 'large'\], got 'huge'"):
        VLMo.from_config("huge")
    with pytest.raises(TypeError, match=r"config must be a VLMoConfig, got 'base_plus': use VLMo.from_config for names"):
        VLMo("base_plus")


def test_it_says_what_it_is():
    config = make_config("base")
    assert VLMoConfig(**config.to_dict()) == config
    assert "hidden_size=24, num_layers=3" in repr(VLMo(config))
