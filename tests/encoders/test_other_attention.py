"""Encoders whose attention is more than ours: refused by name, whoever registers them."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertModel

from mope_fast import PromptTuned, register_encoder
from mope_fast.encoders import PromptedLayer, families
from mope_fast.encoders import transformers as adapters

IDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def layers(encoder):
    return [
        PromptedLayer(layer, layer.attn, 32, layer.attn_norm, lambda rows, qkv=layer.attn.Wqkv: qkv(rows)[..., 32:], None, 4)
        for layer in encoder.layers
    ]


def attach_without_a_look(encoder):
    encoder.set_attn_implementation(adapters.NAME)
    return lambda encoder: None


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))

    def register(**facts):
        bert = families._FAMILIES["bert"]
        models = ("transformers.models.modernbert.modeling_modernbert.ModernBertModel",)
        register_encoder(
            dataclasses.replace(bert, name="modernbert", models=models, layers=layers, problem=lambda encoder: None, **facts)
        )
        config = ModernBertConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40, global_attn_every_n_layers=2,
            local_attention=8, **IDS,
        )  # fmt: skip
        return ModernBertModel(config).eval()

    return register


def test_windows_are_refused_when_an_encoder_is_wrapped(register):
    encoder = register()
    with pytest.raises(TypeError, match=r"this ModernBertModel can't take prompts: its layers.1.attn sees a window of 5 tokens"):
        PromptTuned(encoder, 2)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("compiled", [False, True])
def test_windows_are_refused_in_a_forward_compiled_or_not(register, compiled):
    model = PromptTuned(register(attach=attach_without_a_look), 2)
    run = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    ids = torch.randint(3, 50, (2, 20))
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        # a graph says in its own words where the error comes from
        with pytest.raises(Exception, match="sees a window of"):
            run(inputs)


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "s_aux", "position_bias", "rel_pos", "bias"])
def test_what_else_changes_attention_is_refused(name):
    q = torch.randn(2, 4, 5, 8)
    assert adapters._attention(nn.Identity(), q, q, q, None, **{name: None})[0].shape == (2, 5, 4, 8)
    with pytest.raises(ValueError, match=f"Identity asks for {name}, "):
        adapters._attention(nn.Identity(), q, q, q, None, **{name: 3.0})
