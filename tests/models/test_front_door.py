"""Encoders are entered by their own call: whatever stands there takes part, and what timm asks of a model is there."""

import copy
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from timm.data import resolve_data_config
from tiny_baf import make_baf, make_inputs, make_vlmo
from tiny_fusion import close, make_bert, make_dinov2, make_fusion, make_text

from mope_fast import FeatureCache, MoPEFusion, PromptedEncoder, PromptTuned, encoders

VIT = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
SWIN = {"model_name": "swin_tiny_patch4_window7_224", "img_size": 32, "window_size": 4, "embed_dim": 16}
SWIN |= {"depths": (1, 2), "num_heads": (2, 4)}


def make_timm(settings):
    torch.manual_seed(3)
    return timm.create_model(**settings, num_classes=7).double().eval()


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64)


@pytest.mark.parametrize("settings", [VIT, SWIN], ids=["vit", "swin"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_hooks_on_a_timm_model_run_and_its_classifier_does_not(settings, wrapped, tmp_path):
    encoder, x = make_timm(settings), images()
    expected = encoder.forward_head(encoder.forward_features(2 * x), pre_logits=True)
    logits, seen = encoder(2 * x), []
    classifier = encoder.get_classifier().register_forward_hook(lambda *args: seen.append("classifier"))
    encoder.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "x": 2 * kwargs["x"]}), with_kwargs=True)
    encoder.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    if wrapped:
        model = PromptTuned(encoder, 0)
        close(model(x).features, expected)
    else:
        close(FeatureCache(tmp_path, encoder)(x), expected)
    assert seen == [expected.shape]
    classifier.remove()
    # the user's own call is what it was
    close(encoder(x=x), logits)


def test_threads_that_ask_one_hooked_model_and_hooks_that_ask_another_get_features():
    encoder, other, x, inner = make_timm(VIT), make_timm(SWIN), images(), []
    expected, of_other, logits = encoders.encode(encoder, x), encoders.encode(other, x), encoder(x)
    encoder.blocks[1].register_forward_pre_hook(lambda *args: time.sleep(0.02 * random.random()))
    encoder.register_forward_hook(lambda *args: inner.append(encoders.encode(other, x)))
    other.register_forward_hook(lambda *args: None)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(encoders.encode, encoder, x) for _ in range(12)]
        own = [encoder(x) for _ in range(4)]
        for feature in asked:
            assert torch.equal(feature.result(60), expected)
    assert all(torch.equal(feature, of_other) for feature in inner)
    assert all(torch.equal(result, logits) for result in own)
    assert not {"forward_features", "forward_head", "_mope_fast_front"} & vars(encoder).keys()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_class_with_a_forward_of_its_own_is_entered_by_it(wrapped):
    class Doubling(timm.models.VisionTransformer):
        def forward(self, x):
            return super().forward(2 * x)

    encoder, x = make_timm(VIT), images()
    expected = encoders.encode(encoder, 2 * x)
    encoder.__class__ = Doubling
    close(PromptTuned(encoder, 0)(x).features if wrapped else encoders.encode(encoder, x), expected)


@pytest.mark.parametrize("settings", [VIT, SWIN], ids=["vit", "swin"])
def test_a_timm_model_compiled_on_its_own_gives_features_where_asked(settings):
    encoder, x = make_timm(settings), images()
    model = PromptTuned(encoder, 2).double().eval()
    expected, logits = model(x).features, encoder(x)
    encoder.compile(backend="eager")
    close(model(x).features, expected)
    close(encoder(x), logits)
    close(model(x).features, expected)


def test_feature_maps_come_out_of_the_models_own_call():
    encoder, x, seen = make_timm(SWIN), images(), []
    model = make_fusion(encoder, None, cross_dim=6)
    cross = torch.randn(3, 6, dtype=torch.float64)
    expected = model(x, cross, feature_maps=True)
    encoder.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(x, cross, feature_maps=True)
    close(list(output.feature_maps), list(expected.feature_maps))
    assert torch.equal(seen[0], output.features)


def test_a_forward_replaced_on_the_object_that_gives_no_feature_is_an_error():
    encoder = make_timm(VIT)
    encoder.forward = encoder.forward_features
    with pytest.raises(RuntimeError, match="the forward of this VisionTransformer is not timm's"):
        PromptTuned(encoder, 2).double()(images())


def test_a_method_of_somebody_elses_on_the_object_is_used_and_given_back():
    encoder, x = make_timm(VIT), images()
    own = encoder.forward_features
    doubled = encoder.forward_head(own(2 * x), pre_logits=True)
    theirs = lambda x, **more: own(2 * x, **more)  # noqa: E731
    encoder.forward_features = theirs
    model = PromptTuned(encoder, 0)
    close(model(x).features, doubled)
    model.unwrap()
    assert encoder.forward_features is theirs
    assert "forward_head" not in vars(encoder)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["vit", "bert", "baf"])
def test_an_encoder_that_accelerate_offloads_gives_the_same(name, order):
    cpu_offload = pytest.importorskip("accelerate").cpu_offload
    if name == "baf":
        build, encoder, inputs = (lambda vlmo: make_baf(vlmo, freeze_backbone=True)), make_vlmo(), make_inputs(3)
    else:
        encoder = make_timm(VIT) if name == "vit" else make_bert()
        build = lambda encoder: make_fusion(encoder, None, cross_dim=6)  # noqa: E731
        main = images() if name == "vit" else make_text(3)
        inputs = {"main_inputs": main, "complementary_inputs": torch.randn(3, 6, dtype=torch.float64)}
    model = build(copy.deepcopy(encoder))
    expected, trained = model(**inputs).logits, model.trained_state_dict()
    if order == "before":
        cpu_offload(encoder, execution_device="cpu")
    model = build(encoder)
    model.load_state_dict(trained, strict=False)
    if order == "after":
        cpu_offload(encoder, execution_device="cpu")
    assert all(parameter.is_meta for parameter in encoder.parameters())
    close(model(**inputs).logits, expected)


def test_hooks_on_a_vlmo_run():
    model, inputs, seen = make_baf(), make_inputs(3), []
    expected = model(**inputs).logits
    model.backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(**inputs)
    close(output.logits, expected)
    assert torch.equal(seen[0][0], output.features)
    groups = model.hidden_states(**inputs)
    assert seen[1] is groups


def test_timm_finds_how_images_are_normalised():
    encoder = timm.create_model("vit_tiny_patch16_224.augreg_in21k", img_size=32, depth=1)
    expected = resolve_data_config(model=encoder)
    assert expected["mean"] == (0.5, 0.5, 0.5)
    bert = make_bert()
    shared = PromptedEncoder(encoder)
    tuned = PromptTuned(shared, 2)
    for model in (shared, tuned, tuned.fold(), make_fusion(shared, None, cross_dim=6), MoPEFusion(bert, tuned)):
        assert resolve_data_config(model=model) == expected
        assert model.default_cfg is encoder.pretrained_cfg
    model = make_fusion("bert", make_dinov2())
    assert not hasattr(model, "pretrained_cfg")
    assert encoders.family_of(encoder).name == "timm_vit"
