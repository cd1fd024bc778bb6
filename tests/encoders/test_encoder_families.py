"""A family of one's own, made of plain torch modules, takes prompts like the built-in ones."""

import dataclasses
import pickle

import pytest
import torch
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, functional, register_encoder, supported_encoders
from mope_fast.encoders import (
    EncoderFamily,
    PromptedEncoder,
    PromptedLayer,
    families,
    find_family,
    first_token,
    masked_mean,
    prefixes_of,
)

DIM, HEADS, LAYERS = 16, 2, 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        return functional.prompt_attention(q, k, v, prefixes_of(self)).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(DIM), Attention()

    def forward(self, hidden_states):
        return hidden_states + self.attention(self.norm(hidden_states))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x, by_keyword=False):
        for layer in self.layers:
            x = layer(hidden_states=x) if by_keyword else layer(x)
        return x


class Derived(Encoder):
    pass


@pytest.fixture
def family(monkeypatch):
    """Registered for one test."""
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    own = EncoderFamily(
        name="own",
        models=(f"{Encoder.__module__}.Encoder",),
        input_name="x",
        layers=lambda encoder: [
            PromptedLayer(layer, layer.attention, DIM, layer.norm, layer.attention.k, layer.attention.v, HEADS)
            for layer in encoder.layers
        ],
        pool=lambda encoder, inputs: first_token,
        feature=lambda encoder, output, inputs: output[:, 0],
        feature_width=lambda encoder: DIM,
        attach=lambda encoder: lambda encoder: None,
        problem=lambda encoder: "it is too deep" if len(encoder.layers) > LAYERS else None,
    )
    register_encoder(own)
    return own


def provider(seen):
    def provide(index, x, pool):
        seen.append((index, x.shape))
        return [(torch.ones(1, HEADS, 3, DIM // HEADS, dtype=x.dtype), torch.ones(1, HEADS, 3, DIM // HEADS, dtype=x.dtype))], None

    return provide


def test_registered_family_is_listed_and_found_for_subclasses(family):
    assert supported_encoders()["own"] == family.models
    assert find_family(Encoder()) is find_family(Derived()) is family
    assert find_family(nn.Linear(2, 2)) is None


def test_families_register_is_untouched_by_other_tests():
    assert set(supported_encoders()) >= {"bert", "dinov2"}
    assert "own" not in supported_encoders()


@pytest.mark.parametrize("by_keyword", [False, True])
def test_each_layer_asks_once_for_its_prompts(family, by_keyword):
    encoder = PromptedEncoder(Encoder().double())
    x, seen = torch.randn(4, 5, DIM, dtype=torch.float64), []
    prompted, scores, *_ = encoder({"x": x, "by_keyword": by_keyword}, provider(seen))
    assert scores == [None] * LAYERS
    assert seen == [(i, (4, 5, DIM)) for i in range(LAYERS)]
    assert not torch.allclose(prompted, encoder(x)[0])
    assert torch.equal(encoder(x)[0], encoder.encoder(x)[:, 0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda k: [(k, k, torch.ones(1, 3))], TypeError, "the mask of prefix 0 must be a bool tensor"),
        (lambda k: [(k, k)] * 3, ValueError, "at most two"),
        (lambda k: [(k[:, :1], k[:, :1])], ValueError, "prefix 0 must be two tensors"),
        (lambda k: [(k[0], k[0])], ValueError, "prefix 0 must be two tensors"),
        (lambda k: k, TypeError, "prefixes must be a sequence of"),
    ],
)
def test_prefixes_from_elsewhere_are_checked(family, change, error, message):
    encoder = PromptedEncoder(Encoder().double())
    keys = torch.ones(1, HEADS, 3, DIM // HEADS, dtype=torch.float64)
    with pytest.raises(error, match=message):
        encoder(torch.randn(4, 5, DIM, dtype=torch.float64), lambda index, x, pool: (change(keys), None))


def test_prompted_encoder_is_frozen_and_stays_in_eval_mode(family):
    encoder = PromptedEncoder(Encoder().train()).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())


def test_detached_encoder_is_the_same_object_without_hooks_or_attributes(family):
    original = Encoder()
    before = [set(vars(module)) for module in original.modules()]
    assert PromptedEncoder(original).detach() is original
    assert [set(vars(module)) for module in original.modules()] == before
    assert not any(module._forward_pre_hooks for module in original.modules())


def test_own_family_can_be_fused(family):
    torch.manual_seed(0)
    config = MoPEConfig(num_experts=4, prompt_length=3, cross_dim=6)
    model = MoPEFusion(Derived(), None, num_classes=2, config=config)
    output = model(torch.randn(6, 5, DIM), torch.randn(6, 6), torch.zeros(6, dtype=torch.long))
    output.loss.backward()
    assert output.scores.shape == (LAYERS, 6, 4)
    assert (model.bank.stacks[str(DIM)].experts.grad.abs().amax((1, 2, 3)) > 0).all()


def test_a_familys_own_objection_is_passed_on(family):
    deep = Encoder()
    deep.layers.append(Layer())
    with pytest.raises(TypeError, match="Encoder can't take prompts: it is too deep"):
        PromptedEncoder(deep)


def test_unsupported_encoder_is_told_which_part_would_do(family):
    outer = nn.Module()
    outer.add_module("backbone", Encoder())
    with pytest.raises(TypeError, match=r"torch's Module is not a supported encoder: its submodule \.backbone is supported"):
        PromptedEncoder(outer)


def test_the_family_of_the_most_specific_class_wins_and_of_two_the_later(family):
    own = dataclasses.replace(family, name="derived", models=(f"{Derived.__module__}.Derived",))
    register_encoder(own)
    assert find_family(Derived()) is own
    assert find_family(Encoder()) is family
    later = dataclasses.replace(family, name="later")
    register_encoder(later)
    assert find_family(Encoder()) is later
    assert find_family(Derived()) is own


def test_only_families_are_registered():
    with pytest.raises(TypeError, match="register_encoder expects an EncoderFamily, got str"):
        register_encoder("bert")


def test_an_unknown_family_in_a_pickle_is_named(family):
    data = pickle.dumps(family)
    del families._FAMILIES["own"]
    with pytest.raises(RuntimeError, match="the encoder family 'own' is not registered: import the module"):
        pickle.loads(data)


def test_whatever_padding_holds_stays_out_of_the_mean():
    x = torch.tensor([[1.0, 3.0, torch.nan], [torch.inf, torch.nan, 5.0]])[..., None]
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert masked_mean(mask)(x).tolist() == [[2.0], [0.0]]
