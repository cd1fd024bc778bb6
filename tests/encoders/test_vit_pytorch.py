"""vit-pytorch's ViT: as its own layers on the concatenated sequence, and refused where that can't be."""

import pytest
import torch
import vit_pytorch.vit
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, PromptTuned

SIZES = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 48}


def make_vit(**settings):
    torch.manual_seed(0)
    return vit_pytorch.vit.ViT(**{**SIZES, "num_classes": 0, **settings}).double().eval()


def concatenated_feature(encoder, images, bank, cross):
    context = bank.prepare(cross)
    x = encoder.to_patch_embedding(images)
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1) + encoder.pos_embedding
    pool = (lambda x: x.mean(1)) if encoder.pool == "mean" else (lambda x: x[:, 0])
    for index, (attention, mlp) in enumerate(encoder.transformer.layers):
        prompts = bank.layer(index, pool(x), context).prompts
        added = vit_pytorch.vit.Attention.forward(attention, torch.cat([prompts, x], dim=1))[:, prompts.shape[1] :]
        x = x + added
        x = x + mlp(x)
    return pool(encoder.transformer.norm(x))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_and_gradients_are_those_of_the_concatenated_sequence(pool):
    encoder = make_vit(pool=pool)
    images, cross = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    plain = encoder(images)
    model = MoPEFusion(encoder, None, 4, MoPEConfig(cross_dim=5, num_experts=2, prompt_length=3)).double().eval()
    features = model(images, cross).features
    expected = concatenated_feature(encoder, images, model.bank, cross)
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.fold()(images, cross).features, expected, rtol=1e-12, atol=1e-12)
    trained = [parameter for parameter in model.bank.parameters() if parameter.requires_grad]
    for got, wanted in zip(*(torch.autograd.grad(f.square().sum(), trained) for f in (features, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(encoder(images), plain)
    model.unwrap()
    assert all("forward" not in vars(attention) for attention, _ in encoder.transformer.layers)


def test_an_encoder_whose_model_is_gone_can_be_wrapped_again():
    encoder = make_vit()
    PromptTuned(encoder, 2)
    model = PromptTuned(encoder, 2)
    with pytest.raises(ValueError, match="already takes prompts from another model"):
        PromptTuned(encoder, 2)
    encoder.mlp_head = nn.Linear(32, 3).double()
    with pytest.raises(RuntimeError, match="was given an mlp_head after it was wrapped"):
        model(torch.randn(2, 3, 16, 16, dtype=torch.float64))


def test_poolings_of_the_feature():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    encoder = make_vit()
    expected = encoder(images)
    model = PromptTuned(encoder, 0, pooling="cls+mean").eval()
    torch.testing.assert_close(model(images).features, torch.cat([expected[:, 0], expected[:, 1:].mean(1)], dim=-1))
    with pytest.raises(ValueError, match="this ViT has no class token"):
        PromptTuned(make_vit(pool="mean"), 0, pooling="cls")(images)


def replaced(part):
    encoder = make_vit()
    attention = encoder.transformer.layers[1][0]
    if part == "attention":
        encoder.transformer.layers[1][0] = nn.Identity()
    else:
        attention.forward = attention.forward
    return encoder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_vit(num_classes=3), "set mlp_head = None on it"),
        (lambda: replaced("attention"), "the attention of its layer 1 is a Identity"),
        (lambda: replaced("forward"), "the attention of its layer 1 has a forward set on the object"),
    ],
)
def test_what_can_not_take_prompts_says_why(make, message):
    with pytest.raises(TypeError, match=f"vit_pytorch's ViT can't take prompts: .*{message}"):
        PromptTuned(make(), 2)
