"""Poolings that a user asks for, of the feature and of what the router sees."""

import json
import pickle
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from tiny_transformers import CASES, CROSS, SETTINGS, class_token, close, each, last_real_token, make_cross, masked_mean

from mope_fast import FeatureCache, MoPEConfig, MoPEFusion, PromptedEncoder, PromptTuned, unwrap_encoder
from mope_fast.encoders import encode


def patches(first, inputs, x):
    mask = inputs.get("attention_mask")
    return x[:, first:].mean(1) if mask is None else each(lambda i, s: s[first:][mask[i, first:].bool()].mean(0), x)


def real_mean(inputs, x):
    mask = inputs.get("attention_mask")
    return x.mean(1) if mask is None else masked_mean(mask, x)


TEXT = {"cls": class_token, "mean": real_mean, "last": last_real_token}
IMAGE = {"cls": class_token, "mean": partial(patches, 1)}
EXPECTED = {
    "bert": TEXT,
    "roberta": TEXT,
    "distilbert": TEXT,
    "bart": TEXT,
    "gpt2": {name: TEXT[name] for name in ("mean", "last")},
    "vit": IMAGE,
    "deit": {"cls": class_token, "mean": partial(patches, 2)},
    "dinov2": IMAGE,
    "clip_vision": IMAGE,
    "clip_text": {"mean": real_mean},
    "siglip_vision": {"mean": real_mean},
    "whisper": {"mean": real_mean},
}


@pytest.mark.parametrize(("family", "pooling"), [(family, name) for family, pools in EXPECTED.items() for name in pools])
def test_feature_and_router_are_pooled_as_asked(family, pooling):
    case = CASES[family]
    encoder, inputs, pool = case.make(), case.inputs(3), EXPECTED[family][pooling]
    with torch.no_grad():
        tokens = encoder(**inputs).last_hidden_state
    tokens = encoder.post_layernorm(tokens) if family == "clip_vision" else tokens
    plain, seen = encode(encoder, inputs, pooling), []

    def provide(index, hidden_states, pool_of):
        seen.append((pool_of(hidden_states), pool(inputs, hidden_states)))
        head = torch.zeros(1, 4, 1, hidden_states.shape[-1] // 4, dtype=hidden_states.dtype)
        return [(head, head)], None

    feature = PromptedEncoder(encoder, pooling=pooling, router_pooling=pooling)(inputs).feature
    close(feature, pool(inputs, tokens))
    close(plain, feature)
    PromptedEncoder(case.make(), router_pooling=pooling)(inputs, provide)
    assert len(seen) == 2
    for got, expected in seen:
        close(got, expected)


def test_a_save_keeps_its_poolings(tmp_path):
    bert, dinov2 = CASES["bert"].make(), CASES["dinov2"].make()
    poolings = {"pooling": "mean", "router_pooling": "last", "complementary_pooling": "mean"}
    model = MoPEFusion(bert, dinov2, 3, MoPEConfig(**{**SETTINGS, "cross_dim": None, **poolings})).double().eval()
    inputs = CASES["bert"].inputs(3), CASES["dinov2"].inputs(3)
    expected = model(*inputs)
    model.save_pretrained(tmp_path)
    model.unwrap()
    again = MoPEFusion.from_pretrained(tmp_path, bert, dinov2).double()
    assert torch.equal(again(*inputs).logits, expected.logits)
    assert {name: getattr(again.config, name) for name in poolings} == poolings


def test_a_save_from_before_there_were_poolings_means_what_it_meant(tmp_path):
    bert, inputs, cross = CASES["bert"].make(), CASES["bert"].inputs(3), make_cross(3)
    model = MoPEFusion(bert, None, 3, MoPEConfig(**SETTINGS, head_inputs="main")).double().eval()
    expected = model(inputs, cross).logits
    model.save_pretrained(tmp_path)
    file = tmp_path / "mope_fast.json"
    saved = json.loads(file.read_text())
    for name in ("pooling", "router_pooling", "complementary_pooling", "head_inputs", "expert_spread"):
        del saved["config"][name]
    file.write_text(json.dumps(saved))
    model.unwrap()
    again = MoPEFusion.from_pretrained(tmp_path, bert).double()
    assert torch.equal(again(inputs, cross).logits, expected)
    again.unwrap()
    other = MoPEFusion(bert, None, 3, MoPEConfig(**SETTINGS, pooling="mean")).double()
    with pytest.raises(ValueError, match=r"config.pooling: saved with None, got 'mean'"):
        other.load_pretrained(tmp_path)


def test_prompt_tuning_keeps_its_pooling_too(tmp_path):
    bert, inputs = CASES["bert"].make(), CASES["bert"].inputs(3)
    makers = [
        lambda: PromptTuned(bert, 2, 3, pooling="mean"), lambda: PromptTuned(PromptedEncoder(bert, pooling="mean"), 2, 3)
    ]  # fmt: skip
    for make in makers:
        model = make().double().eval()
        expected = model(inputs)
        model.save_pretrained(tmp_path)
        unwrap_encoder(bert)
        again = PromptTuned.from_pretrained(tmp_path, bert).double()
        assert torch.equal(again(inputs).logits, expected.logits)
        again.unwrap()


def test_a_complementary_side_that_pools_otherwise_is_refused():
    bert, config = CASES["bert"].make(), MoPEConfig(**SETTINGS, complementary_pooling="cls")
    side = PromptTuned(CASES["bert"].make(), 2, pooling="mean")
    for complementary in (side, side.fold(), None):
        with pytest.raises(ValueError, match=r"complementary_pooling='cls' was requested, but complementary, \w+, has pooling="):
            MoPEFusion(bert, complementary, 3, replace(config, cross_dim=None if complementary is not None else CROSS))
    assert MoPEFusion(bert, side, 3, MoPEConfig(**{**SETTINGS, "cross_dim": None})).config.complementary_pooling == "mean"


def test_an_encoder_that_came_wrapped_keeps_its_poolings():
    shared = PromptedEncoder(CASES["bert"].make(), pooling="mean")
    config = MoPEConfig(**SETTINGS)
    assert MoPEFusion(shared, None, 3, config).config.pooling == "mean"
    with pytest.raises(ValueError, match=r"pooling='cls' was requested, but this PromptedEncoder has pooling='mean'"):
        MoPEFusion(shared, None, 3, MoPEConfig(**SETTINGS, pooling="cls"))


@pytest.mark.parametrize(
    ("family", "poolings", "message"),
    [
        ("bert", {"pooling": "max"}, r"pooling of bert must be one of \[None, 'cls', 'mean', 'last'\]"),
        ("bert", {"pooling": "cls+max"}, r"None for its default, or several, 'cls\+mean', got 'cls\+max'"),
        ("bert", {"pooling": "cls+cls"}, r"got 'cls\+cls'"),
        ("bert", {"router_pooling": "cls+mean"}, r"router_pooling of bert must be one of"),
        ("gpt2", {"router_pooling": "cls"}, r"router_pooling of gpt2 must be one of \[None, 'mean', 'last'\], None for its"),
        ("wav2vec2", {"pooling": "cls"}, r"pooling of wav2vec2 must be one of \[None\]"),
    ],
)
def test_a_pooling_that_a_family_does_not_have_is_refused(family, poolings, message):
    encoder = CASES[family].make()
    with pytest.raises(ValueError, match=message):
        PromptedEncoder(encoder, **poolings)
    assert PromptedEncoder(encoder), "it was not touched"


def test_timms_feature_is_pooled_by_the_model_and_the_routers_view_as_asked():
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "reg_tokens": 2}
    vit = timm.models.vision_transformer.VisionTransformer(num_classes=0, **settings).eval()
    with pytest.raises(ValueError, match=r"must be one of \[None\], None for its default, got 'mean'; .*global_pool='avg'"):
        PromptedEncoder(vit, pooling="mean")
    seen = []

    def provide(index, hidden_states, pool_of):
        seen.append(torch.equal(pool_of(hidden_states), hidden_states[:, 3:].mean(1)))
        head = torch.zeros(1, 4, 1, 8)
        return [(head, head)], None

    PromptedEncoder(vit, router_pooling="mean")(torch.randn(2, 3, 16, 16), provide)
    assert seen == [True, True]


def test_poolings_side_by_side(tmp_path):
    dinov2, inputs, cross = CASES["dinov2"].make(), CASES["dinov2"].inputs(3), make_cross(3)
    expected = torch.cat([encode(dinov2, inputs, "cls"), encode(dinov2, inputs, "mean")], dim=1)
    close(encode(dinov2, inputs, "cls+mean"), expected)
    close(encode(dinov2, **inputs, pooling="cls+mean"), expected)
    with pytest.raises(TypeError, match="encode takes either inputs"):
        encode(dinov2)
    cache = FeatureCache(tmp_path / "cache", dinov2, pooling="cls+mean")
    assert cache.feature_width == expected.shape[1]
    close(cache(inputs), expected)
    bert, text = CASES["bert"].make(), CASES["bert"].inputs(3)
    config = MoPEConfig(**SETTINGS | {"cross_dim": None}, complementary_pooling="cls+mean")
    model = MoPEFusion(bert, dinov2, 5, config).double().eval()
    assert model.bank.cross_dim == expected.shape[1]
    assert model(text, inputs).logits.isfinite().all()
    unwrap_encoder(dinov2)
    model = MoPEFusion(dinov2, None, 5, MoPEConfig(**SETTINGS, pooling="cls+mean")).double().eval()
    assert model.head.in_features == expected.shape[1] + CROSS
    model.save_pretrained(tmp_path / "saved")
    logits = model(inputs, cross).logits
    close(model.fold()(inputs, cross).logits, logits)
    model.unwrap()
    close(MoPEFusion.from_pretrained(tmp_path / "saved", dinov2).double().eval()(inputs, cross).logits, logits)


def test_features_of_another_pooling_are_another_cache(tmp_path):
    bert, inputs = CASES["bert"].make(), CASES["bert"].inputs(3)
    cache = FeatureCache(tmp_path, bert, pooling="mean")
    close(cache(inputs), encode(bert, inputs, "mean"))
    cache.flush()
    assert torch.equal(pickle.loads(pickle.dumps(cache))(inputs), cache(inputs))
    with pytest.raises(ValueError, match="another encoder"):
        FeatureCache(tmp_path, bert)(inputs)
    with pytest.raises(ValueError, match=r"pooling of bert must be one of"):
        FeatureCache(tmp_path / "other", bert, pooling="max")
    with pytest.raises(ValueError, match=r"pooling='mean' needs a supported encoder"):
        FeatureCache(tmp_path / "other", torch.nn.Linear(2, 3), pooling="mean")


def test_the_librarys_head_reads_the_complementary_feature_too_and_ones_own_does_not():
    with pytest.raises(ValueError, match="head_inputs='both' needs a head"):
        MoPEFusion(CASES["bert"].make(), None, None, MoPEConfig(**SETTINGS, head_inputs="both"))
    bert, inputs, cross = CASES["bert"].make(), CASES["bert"].inputs(3), make_cross(3)
    model = MoPEFusion(bert, None, 5, MoPEConfig(**SETTINGS)).double().eval()
    assert model.config.head_inputs == "both"
    output = model(inputs, cross)
    close(output.logits, model.head(torch.cat([output.features, cross], dim=1)))
    assert model.head.in_features == 32 + CROSS
    close(model.fold()(inputs, cross).logits, output.logits)
    model.unwrap()
    for head, more in (
        (torch.nn.Linear(32, 5), {}),
        (None, {"use_dynamic": False, "use_mapped": False}),
        (None, {"head_inputs": "main"}),
    ):
        classes = 5 if head is None else None
        model = MoPEFusion(bert, None, classes, MoPEConfig(**SETTINGS | more), head=head).double()
        assert model.config.head_inputs == "main"
        assert model.head.in_features == 32
        assert model(inputs, cross).logits.shape == (3, 5)
        model.unwrap()
