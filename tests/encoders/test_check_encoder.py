"""The oracle as a user's function: what it finds, and that every family of today's encoders passes it."""

import dataclasses
import importlib
import sys

import pytest
import torch
import transformers as hf
from tiers import slow_but
from tiny_mechanisms import ALIASES, MECHANISMS, make_ids
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, check_encoder, supported_encoders
from mope_fast.encoders import encode, families, register_transformers_encoder, transformers_attention
from mope_fast.modules.tables import can_be_projected_ahead


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    return register_transformers_encoder


COMPILED = (
    "modernbert",
    "qwen3",
    "gemma3: both",
    "t5",
    "beit: a bias",
    "dinov3",
    "mpnet",
    "timm_eva: EVA",
    "torchvision",
    "open_clip_text",
)
"""What is compiled for every push: each function of transformers' masks, and each attention of ours."""


@pytest.mark.parametrize(
    ("name", "compiled"),
    slow_but(
        [(name, name.startswith(COMPILED)) for name in MECHANISMS],
        [(name, compiled) for name in MECHANISMS for compiled in dict.fromkeys((True, name.startswith(COMPILED)))],
    ),
)
def test_each_way_to_attend_is_that_of_the_librarys_layers_on_the_concatenation(name, compiled, capsys):
    make, example = MECHANISMS[name]
    encoder = make()
    assert families.family_of(encoder).name == name.partition(":")[0]
    check_encoder(encoder, example(), compiled=compiled)
    printed = capsys.readouterr().out
    assert "the example, mixing='prompt': features" in printed
    assert ("the example, compiled: features" in printed) == compiled
    assert "can't be folded" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIASES)
def test_models_that_share_a_way_to_attend_are_right_too(name):
    make, example = ALIASES[name]
    encoder = make()
    assert families.family_of(encoder).name == name.partition(":")[0]
    check_encoder(encoder, example(), compiled=False)


def test_names_in_the_register_are_classes_of_the_library():
    models = [model for models in supported_encoders().values() for model in models] + list(families._REFUSED)
    for name in (name for name in models if name.startswith("transformers.")):
        module, _, cls = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), cls), nn.Module)


@pytest.mark.parametrize("name", ["Albert", "BigBird", "DebertaV2", "Longformer", "Swin", "Timesformer", "Wav2Vec2Bert"])
def test_what_can_not_take_prompts_is_refused_with_the_reason(name):
    model, config = getattr(hf, f"{name}Model"), getattr(hf, f"{name}Config")()
    with torch.device("meta"):
        encoder = model(config)
    with pytest.raises(TypeError, match=f"transformers' {name}Model is not supported: (its|transformers|convolutions)"):
        MoPEFusion(encoder, config=MoPEConfig(cross_dim=5))


def test_an_encoder_that_hides_patches_at_random_is_refused():
    make, example = ALIASES["vit_mae"]
    encoder = make()
    encoder.config.mask_ratio = 0.75
    with pytest.raises(TypeError, match="load it with mask_ratio=0"):
        check_encoder(encoder, example())


@pytest.mark.parametrize("name", MECHANISMS)
def test_prompts_of_all_layers_are_projected_ahead(name):
    """One matrix product for all layers, in place of some in each."""
    encoder = MECHANISMS[name][0]()
    model = MoPEFusion(encoder, config=MoPEConfig(num_experts=2, cross_dim=5))
    assert can_be_projected_ahead(model.main.layers, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "pooling", "pooled"),
    [
        ("dinov3: rotation of patches alone", "mean", lambda e, out: out.last_hidden_state[:, 3:].mean(1)),
        ("beit: one bias for all layers", "mean", lambda e, out: e.pooler.layernorm(out.last_hidden_state[:, 1:]).mean(1)),
        ("siglip_text: the last position", "mean", lambda e, out: out.last_hidden_state.mean(1)),
    ],
)
def test_other_poolings_leave_registers_out_and_have_norm_and_width_of_tokens(name, pooling, pooled):
    make, example = MECHANISMS[name]
    encoder, inputs = make().eval(), example()
    expected = pooled(encoder, encoder(inputs))
    model = MoPEFusion(encoder, num_classes=3, config=MoPEConfig(num_experts=2, cross_dim=5, pooling=pooling)).eval()
    torch.testing.assert_close(encode(model.main.encoder, inputs, pooling), expected, rtol=1e-5, atol=1e-5)
    assert model(inputs, torch.randn(3, 5)).logits.shape == (3, 3)


@pytest.mark.parametrize(
    ("name", "settings"), [("modernbert", {"classifier_pooling": "mean"}), ("gemma3", {"use_bidirectional_attention": True})]
)
def test_a_configuration_says_how_its_feature_is_pooled(name, settings):
    make, example = next(row for key, row in MECHANISMS.items() if key.startswith(name))
    encoder = make().eval()
    for key, value in settings.items():
        setattr(encoder.config, key, value)
    inputs = {"input_ids": example(), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    inputs["attention_mask"][:, 7:] = 0
    tokens = encoder(**inputs).last_hidden_state
    torch.testing.assert_close(encode(encoder, inputs), tokens[:, :7].mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma2", lambda e: setattr(e.config, "attn_logit_softcapping", 50.0), "caps its logits"),
        ("open_clip_text", lambda e: e.set_grad_checkpointing(True), "gradient checkpointing is on"),
        (
            "torchvision_vit",
            lambda e: setattr(e.encoder.layers[0].self_attention, "add_zero_attn", True),
            "keys and values of its own",
        ),
        ("beit", lambda e: setattr(e, "pooler", None), "no norm without the pooling layer"),
    ],
)
def test_settings_under_which_prompts_would_be_wrong_are_refused(name, change, message):
    make, _ = next(row for key, row in MECHANISMS.items() if key.startswith(name))
    encoder = make()
    change(encoder)
    with pytest.raises(TypeError, match=message):
        MoPEFusion(encoder, config=MoPEConfig(cross_dim=5))


def test_an_encoder_without_the_interface_is_refused(register):
    register("megatron", hf.MegatronBertModel, like="bert")
    encoder = hf.MegatronBertModel(hf.MegatronBertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50))
    with pytest.raises(TypeError, match="MegatronBertModel doesn't go through transformers' attention interface"):
        MoPEFusion(encoder, config=MoPEConfig(cross_dim=5))


@pytest.mark.parametrize("pool_type", ["argmax", "eos", "last", "first"])
def test_the_router_sees_the_token_that_open_clip_pools(pool_type):
    transformer = pytest.importorskip("open_clip.transformer")
    tower = transformer.TextTransformer(11, 50, 32, 4, 2, 1.25, output_dim=None, proj_type="none", pool_type=pool_type, eos_id=40)
    ids = torch.randint(1, 40, (3, 11))
    ids[:, 6] = 40
    place = {"argmax": 6, "eos": 6, "last": 10, "first": 0}[pool_type]
    family = families.family_of(tower)
    x = torch.randn(3, 11, 32)
    assert torch.equal(family.router_pool(tower, {"text": ids})(x), x[:, place])
    assert family.feature_width(tower) == tower(ids).shape[1] == 32


def test_mpnet_gives_no_attention_weights_where_they_are_asked_for():
    make, example = MECHANISMS["mpnet: a bias by position, no interface"]
    model = MoPEFusion(make(), config=MoPEConfig(num_experts=2, cross_dim=5)).eval()
    model({"input_ids": example(), "output_attentions": True}, torch.randn(3, 5))


# Planted faults


@pytest.fixture
def qwen3(monkeypatch):
    """A tiny Qwen3, and a function that changes a fact of its layers."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    encoder = MECHANISMS["qwen3: causal, windows, shared keys, a norm of keys"][0]()
    family = families.family_of(encoder)

    def change(function):
        def layers(encoder):
            return [function(layer, index, encoder) for index, layer in enumerate(family.layers(encoder))]

        families.register_encoder(dataclasses.replace(family, layers=layers))

    return encoder, change


def fails(encoder, match, compiled=False):
    with pytest.raises(AssertionError, match=match):
        check_encoder(encoder, make_ids(), compiled=compiled)


def test_a_wrong_norm_is_found(qwen3):
    encoder, change = qwen3
    change(lambda layer, index, e: dataclasses.replace(layer, norm=layer.module.post_attention_layernorm))
    fails(encoder, "Qwen3Model, family 'qwen3', doesn't fit:\nthe example, mixing='prompt': features differ by .* from layer 0 on")


def test_a_missing_key_norm_is_found(qwen3):
    encoder, change = qwen3
    change(lambda layer, index, e: dataclasses.replace(layer, key_norm=None))
    fails(encoder, "features differ by .* from layer 0 on")


def test_a_wrong_number_of_heads_is_found(qwen3):
    encoder, change = qwen3
    change(lambda layer, index, e: dataclasses.replace(layer, num_heads=4, key_norm=None))
    fails(encoder, "the example, mixing='prompt': ValueError: .* 2")


def test_keys_of_another_layer_are_found(qwen3):
    encoder, change = qwen3
    change(lambda layer, index, e: dataclasses.replace(layer, k_proj=e.layers[0].self_attn.k_proj))
    fails(encoder, "features differ by .* from layer 1 on")


def test_a_window_that_is_dropped_is_found(qwen3, monkeypatch):
    monkeypatch.setattr(transformers_attention, "_window_of", lambda function: (None, 0))
    fails(qwen3[0], "the example, mixing='prompt': features differ by .* from layer 0 on")


def test_a_mask_that_is_dropped_is_found(qwen3, monkeypatch):
    of_mask = transformers_attention._mask
    monkeypatch.setattr(transformers_attention, "_mask", lambda *args, attention_mask=None, **named: of_mask(*args, **named))
    with pytest.raises(AssertionError) as error:
        check_encoder(qwen3[0], make_ids(), compiled=False)
    lines = str(error.value).splitlines()[1:]
    assert {line.partition(",")[0] for line in lines} <= {"padding behind", "padding within", "padding before"}
    assert any(line.startswith("padding within") for line in lines)


def test_a_feature_of_another_token_is_found_behind_the_layers(qwen3):
    encoder, _ = qwen3
    family = families.family_of(encoder)
    seen = []

    def feature(encoder, output, inputs):
        seen.append(output)
        return output.last_hidden_state[:, -1 if len(seen) % 2 else 0]

    families.register_encoder(dataclasses.replace(family, feature=feature))
    fails(encoder, "after the last layer")


def test_a_gradient_that_is_no_number_is_found(qwen3, monkeypatch):
    check = sys.modules["mope_fast.models.check_encoder"]
    original = check._error
    monkeypatch.setattr(check, "_error", lambda got, expected: original(torch.full_like(got, float("nan")), expected))
    fails(qwen3[0], "features differ by inf")


def test_an_encoder_that_is_left_changed_is_found(qwen3):
    encoder, _ = qwen3
    family = families.family_of(encoder)

    def attach(encoder):
        family.attach(encoder)
        return lambda encoder: encoder.norm.weight.data.mul_(2)

    families.register_encoder(dataclasses.replace(family, attach=attach))
    fails(encoder, "the encoder alone after unwrap: features differ")


def test_a_wrong_width_is_found(qwen3):
    encoder, _ = qwen3
    families.register_encoder(dataclasses.replace(families.family_of(encoder), feature_width=lambda encoder: 31))
    fails(encoder, "features are 32 wide, feature_width says 31")


def test_a_wrapped_encoder_is_checked_as_it_was(qwen3):
    encoder, _ = qwen3
    model = MoPEFusion(encoder, config=MoPEConfig(num_experts=2, cross_dim=5))
    with torch.no_grad():
        check_encoder(encoder, make_ids(), compiled=False)
    model({"input_ids": make_ids()}, torch.randn(3, 5))


def test_what_does_not_compile_is_told(qwen3):
    encoder, _ = qwen3
    family = families.family_of(encoder)

    def feature(encoder, output, inputs):
        torch._dynamo.graph_break()
        return family.feature(encoder, output, inputs)

    families.register_encoder(dataclasses.replace(family, feature=feature))
    fails(encoder, r"the example, compiled: torch.compile\(fullgraph=True\) fails", compiled=True)


def test_the_encoder_and_random_numbers_stay_as_they_were(qwen3):
    encoder, _ = qwen3
    before, state = {name: value.clone() for name, value in encoder.state_dict().items()}, torch.get_rng_state()
    ids = make_ids()
    state = torch.get_rng_state()
    check_encoder(encoder.train(), ids, compiled=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.dtype == torch.float32


def test_layers_of_another_shape_are_refused():
    timm = pytest.importorskip("timm")
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, depths=(1, 1), embed_dim=16, num_heads=(2, 4), window_size=4
    )
    with pytest.raises(
        ValueError, match=r"needs layers on sequences \(B, S, D\), but SwinTransformerBlock was given \(2, 8, 8, 16\)"
    ):
        check_encoder(swin, torch.randn(2, 3, 32, 32))


# Registration by facts


class Renamed(hf.ElectraModel):
    pass


def test_an_encoder_like_another_is_one_line(register):
    register("renamed", Renamed, like="bert")
    encoder = Renamed(ALIASES["electra"][0]().config)
    assert families.family_of(encoder).name == "renamed"
    check_encoder(encoder, make_ids(), compiled=False)


def test_an_encoder_by_names_of_its_modules(register):
    class Ours(hf.LlamaModel):
        pass

    register(
        "ours", Ours, layers="layers", attention="self_attn", norm="input_layernorm", keys="self_attn.k_proj",
        values="self_attn.v_proj", input_name="input_ids", pooling="mean",
    )  # fmt: skip
    check_encoder(Ours(ALIASES["llama"][0]().config), make_ids(), compiled=False)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"layers": "layers", "attention": "attn", "keys": "qkv"}, "needs like=, or input_name, pooling"),
        ({"layers": "layers"}, "needs attention and keys together with the name of the layers"),
        ({"like": "bert", "pooling": "first"}, r"pooling must be one of \['cls', 'mean', 'last'\], got 'first'"),
        ({"like": "bert", "norm": "attention.ln"}, "norm can't be found without the name of the list of layers"),
        ({"like": "elmo"}, "the encoder family 'elmo' is not registered"),
    ],
)
def test_facts_that_are_not_enough_are_told(facts, message, register):
    with pytest.raises((ValueError, RuntimeError), match=message):
        register("renamed", Renamed, **facts)
