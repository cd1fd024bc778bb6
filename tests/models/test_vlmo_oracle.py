"""VLMo against its specification, written out by hand: outputs and the gradients of all parameters."""

import pytest
import torch
from tiny_vlmo import CONFIGS, close, given, make_config, make_inputs, make_vlmo, weighted
from vlmo_by_hand import VLMoByHand

from mope_fast.models.vlmo.positions import position_index


def assert_equals_by_hand(model, inputs, **settings):
    parameters = dict(model.named_parameters())
    by_hand = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    expected = VLMoByHand(model.config, by_hand)(**inputs, **settings)
    got = model(**inputs, **settings)
    assert [out is None for out in got] == [out is None for out in expected]
    close(given(got), given(expected))
    mine = torch.autograd.grad(weighted(given(got)), list(parameters.values()), materialize_grads=True)
    truth = torch.autograd.grad(weighted(given(expected)), list(by_hand.values()), materialize_grads=True)
    for name, gradient, true_gradient in zip(parameters, mine, truth, strict=True):
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    return dict(zip(parameters, mine, strict=True))


@pytest.mark.parametrize("vl_experts", [False, True])
@pytest.mark.parametrize("modality", ["joint", "text", "image"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_pass(name, modality, vl_experts):
    gradients = assert_equals_by_hand(make_vlmo(name), make_inputs(modality, 3), vl_experts=vl_experts)
    used = {key.split(".")[3] for key, value in gradients.items() if ".mlp_" in key and value.any()}
    own = {"joint": {"mlp_text", "mlp_imag"}, "text": {"mlp_text"}, "image": {"mlp_imag"}}[modality]
    assert used == own | ({"mlp_vl"} if modality == "joint" or vl_experts else set())


@pytest.mark.parametrize("modality", ["joint", "text"])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", ["base_plus", "base"])
def test_text_shorter_than_there_are_positions(name, tokens, modality):
    assert_equals_by_hand(make_vlmo(name), make_inputs(modality, 2, tokens=tokens))


@pytest.mark.parametrize("side", [4, 8, 20])
@pytest.mark.parametrize("name", ["base_plus", "base"])
def test_other_image_sizes(name, side):
    assert_equals_by_hand(make_vlmo(name, image_size=side), make_inputs("joint", 2, side=side))


@pytest.mark.parametrize("first", [0, 3])
def test_a_fusion_expert_in_every_layer_or_in_none(first):
    assert_equals_by_hand(make_vlmo("base", first_fusion_layer=first), make_inputs("joint", 2))


def test_padding_in_the_middle_and_no_mask():
    inputs = make_inputs("joint", 2)
    inputs["attention_mask"] = torch.tensor([[1, 1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 1, 1]])
    assert_equals_by_hand(make_vlmo("base"), inputs)
    del inputs["attention_mask"]
    assert_equals_by_hand(make_vlmo("base"), inputs)


def test_rows_of_the_bias_table_at_the_official_size():
    config = make_config("base", image_size=224, patch_size=16, max_text_length=40)
    index, image = position_index(config), 40
    assert index.shape == (237, 237)
    assert index.max() == 1125
    assert index[0, 0] == 1125
    assert set(index[0, 1:40].tolist()) == {1123}
    assert set(index[1:40, 0].tolist()) == {1124}
    assert index[5, 5] == 928
    assert index[5, 6] == 929
    assert index[39, 1] == 928 - 38
    assert set(index[:40, 40:].flatten().tolist()) == {732}
    assert set(index[40:, :40].flatten().tolist()) == {733}
    assert set(index[image, image + 1 :].tolist()) == {729}
    assert set(index[image + 1 :, image].tolist()) == {730}
    assert index[image, image] == 731
    assert index[image + 1, image + 1] == 13 * 27 + 13
    assert index[image + 1, image + 2] == 13 * 27 + 12
    assert index[image + 15, image + 1] == 14 * 27 + 13
