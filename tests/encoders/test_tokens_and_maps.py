"""The last layer's tokens of every family, and the maps of encoders of images."""

import functools

import pytest
import tiny_timm
import torch
from tiny_mechanisms import ALIASES, MECHANISMS, make_ids
from tiny_transformers import CASES, ONE_OF_EACH
from transformers import BertConfig, BertModel

from mope_fast import MoPEConfig, MoPEFusion, PromptTuned
from mope_fast.encoders import find_family

close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-6)
ENCODERS = {
    **{name: (CASES[name].make, functools.partial(CASES[name].inputs, 2)) for name in ONE_OF_EACH},
    **MECHANISMS,
    **{name: alias for name, alias in ALIASES.items() if name != "vit_mae"},  # which shuffles its patches
    "timm_vit": (functools.partial(tiny_timm.make_encoder, "vit"), functools.partial(tiny_timm.make_images, 2, "vit", {})),
    "timm_swin": (functools.partial(tiny_timm.make_encoder, "swin"), functools.partial(tiny_timm.make_images, 2, "swin", {})),
}
NORMS = {
    "timm": lambda encoder: encoder.norm, "torchvision": lambda encoder: encoder.encoder.ln,
    "open_clip": lambda encoder: encoder.ln_post if hasattr(encoder, "ln_post") else encoder.ln_final,
}  # fmt: skip
PER_LAYER = {"clip_vision", "beit"}
"""Of which transformers norms the pooled token alone."""


@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_are_what_the_encoder_itself_has_behind_its_last_layer(name):
    make, example = ENCODERS[name]
    torch.manual_seed(0)
    encoder, inputs = make().eval(), example()
    model, seen = PromptTuned(encoder, 2).eval().to(next(encoder.parameters()).dtype), []
    norm = next((norm for library, norm in NORMS.items() if type(encoder).__module__.startswith(library)), None)
    watched = encoder if norm is None else norm(encoder)
    handle = watched.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(inputs, tokens=True)
    handle.remove()
    whole = seen[0] if norm is not None else getattr(seen[0], "last_hidden_state", seen[0])
    if find_family(encoder).name not in PER_LAYER and whole.dim() > 2:
        close(output.tokens, whole.flatten(1, -2))
    close(output.features, model(inputs).features)
    assert output.tokens.dim() == 3
    assert model(inputs).tokens is None
    close(model.fold()(inputs, tokens=True).tokens if _folds(model) else output.tokens, output.tokens)
    output.tokens.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.bank.parameters())


def _folds(model):
    try:
        model.fold()
    except ValueError:
        return False
    return True


def test_tokens_are_pooled_into_the_feature():
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40))
    model = MoPEFusion(bert, None, 3, MoPEConfig(num_experts=3, cross_dim=4)).eval()
    output = model(make_ids(), torch.randn(len(make_ids()), 4), tokens=True)
    close(output.tokens[:, 0], output.features)


@pytest.mark.parametrize("name", [name for name, (make, _) in ENCODERS.items() if find_family(make()).grid is not None])
def test_a_map_has_each_patch_in_its_place(name):
    make, example = ENCODERS[name]
    torch.manual_seed(0)
    encoder, images = make().eval(), example()
    images = images["pixel_values"] if isinstance(images, dict) else images
    model = PromptTuned(encoder, 2).eval().to(images.dtype)
    with torch.no_grad():
        (before,) = model(images, feature_maps=True).feature_maps
        rows, columns = before.shape[2:]
        assert before.shape == (len(images), model.main.widths[-1], rows, columns)
        size = images.shape[-1] // columns
        for row, column in ((0, columns - 1), (rows - 1, 1)):
            changed = images.clone()
            changed[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size] += 3
            moved = (model(changed, feature_maps=True).feature_maps[0] - before).norm(dim=1)
            assert moved[0].argmax() == row * columns + column
        output = model(images, feature_maps=True, tokens=True)
        close(output.feature_maps[0].flatten(2).transpose(1, 2), output.tokens[:, -rows * columns :])


def test_both_are_those_of_an_image_that_is_not_square():
    torch.manual_seed(0)
    encoder = tiny_timm.make_encoder("vit", img_size=(8, 16)).eval()
    model = PromptTuned(encoder, 2).double().eval()
    images = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    assert model(images, feature_maps=True).feature_maps[0].shape == (2, 32, 2, 4)
    exported = torch.export.export(model.fold().for_export("feature_maps", "tokens"), (images,)).module()(images)
    close(exported["tokens"], model(images, tokens=True).tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(images, tokens=True).tokens, model(images, tokens=True).tokens)
    model.gradient_checkpointing_enable()
    close(model(images, tokens=True).tokens, exported["tokens"])


def test_without_prompts_and_where_there_is_no_map():
    torch.manual_seed(0)
    encoder = tiny_timm.make_encoder("vit").eval()
    images = tiny_timm.make_images(2, "vit", {})
    close(PromptTuned(encoder, 0).double()(images, tokens=True).tokens, encoder.forward_features(images))
    bert = BertModel(BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40))
    with pytest.raises(ValueError, match=r"bert has no feature maps; families that have them: .*timm_swin.* dinov2, "):
        PromptTuned(bert, 2)(make_ids(), feature_maps=True)
    with pytest.raises(ValueError, match="returns logits, no feature maps and no tokens"):
        PromptTuned(BertModel(bert.config), 2, 3, return_logits=True)(make_ids(), tokens=True)
