"""Encoders of today's kind, registered by facts alone: windows and shared keys are theirs; other attention is refused by name."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.masking_utils import chunked_causal_mask_function, eager_mask

from mope_fast import PromptTuned, register_encoder
from mope_fast.encoders import PromptedLayer, families
from mope_fast.encoders import transformers as adapters
from mope_fast.encoders.families import keys_and_values
from mope_fast.functional import prompt_attention

IDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, **IDS}
DECODER = {
    **SIZES, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
}  # fmt: skip


def modernbert():
    config = ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=8)
    return ModernBertModel(config)


def modernbert_layers(encoder):
    return [
        PromptedLayer(
            layer, layer.attn, 32, None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm,
            functools.partial(keys_and_values, layer.attn.Wqkv), None, 4,
        )
        for layer in encoder.layers
    ]  # fmt: skip


def qwen3():
    return Qwen3Model(Qwen3Config(**DECODER, use_sliding_window=True, max_window_layers=0))


def gemma3(**settings):
    return Gemma3TextModel(Gemma3TextConfig(**DECODER, query_pre_attn_scalar=8, **settings))


def gemma2():
    """Its attention says that it sees both ways, its mask that it is causal: transformers' own goes by the mask."""
    return Gemma2Model(
        Gemma2Config(**DECODER, query_pre_attn_scalar=8, attn_logit_softcapping=None, use_bidirectional_attention=True)
    )


def decoder_layers(encoder):
    return [
        PromptedLayer(
            layer, layer.self_attn, 32, layer.input_layernorm, layer.self_attn.k_proj, layer.self_attn.v_proj, 2,
            key_norm=getattr(layer.self_attn, "k_norm", None),
        )
        for layer in encoder.layers
    ]  # fmt: skip


ENCODERS = {
    "Gemma 2": (gemma2, decoder_layers),
    "ModernBERT": (modernbert, modernbert_layers),
    "Qwen3": (qwen3, decoder_layers),
    "Gemma 3": (gemma3, decoder_layers),
    "Gemma 3, both ways": (functools.partial(gemma3, use_bidirectional_attention=True), decoder_layers),
}


@pytest.fixture
def register(monkeypatch):
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))

    def register(make, layers):
        torch.manual_seed(0)
        encoder = make().double().eval()
        for parameter in encoder.parameters():
            nn.init.normal_(parameter, std=0.3)  # weights that show
        like = families._FAMILIES["bert" if make is modernbert else "gpt2"]  # the first or the last token
        run = like.run if make is modernbert else lambda encoder, inputs: encoder(use_cache=False, **inputs)
        name = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
        register_encoder(
            dataclasses.replace(like, name="tried", models=(name,), layers=layers, run=run, problem=lambda encoder: None)
        )
        return encoder

    return register


class Oracle:
    """Attention that does as its formula says, by transformers' own mask, over keys and values of prompts and tokens."""

    def __init__(self, layers, prompts):
        self.rows = {layer.attention: self.keys_and_values(layer, rows) for layer, rows in zip(layers, prompts, strict=True)}

    @staticmethod
    def keys_and_values(layer, rows):
        rows = rows if layer.norm is None else layer.norm(rows)
        keys, values = layer.k_proj(rows).chunk(2, -1) if layer.v_proj is None else (layer.k_proj(rows), layer.v_proj(rows))
        keys, values = (t.unflatten(-1, (layer.num_heads, -1)) for t in (keys, values))
        keys = keys if layer.key_norm is None else layer.key_norm(keys)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        keys, values = (
            torch.cat([prompts.expand(key.shape[0], -1, -1, -1), tokens], dim=2)
            for prompts, tokens in zip(self.rows[module], (key, value), strict=True)
        )
        keys, values = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (keys, values))
        weights = query @ keys.mT * scaling
        if attention_mask is not None:
            weights = weights + torch.nn.functional.pad(attention_mask, (keys.shape[2] - key.shape[2], 0))
        weights = weights.softmax(-1)
        return (weights @ values).transpose(1, 2), None


def expected(encoder, layers, prompts, inputs):
    AttentionInterface.register("oracle", Oracle(layers(encoder), prompts))
    AttentionMaskInterface.register("oracle", functools.partial(eager_mask))
    encoder.set_attn_implementation("oracle")
    if isinstance(encoder, ModernBertModel):
        return encoder(**inputs).last_hidden_state[:, 0]
    lengths = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).sum(1)
    return encoder(**inputs, use_cache=False).last_hidden_state[range(len(lengths)), lengths - 1]


def make_inputs(padded, batch=2, tokens=13):
    inputs = {"input_ids": torch.randint(3, 50, (batch, tokens))}
    if padded:
        inputs["attention_mask"] = torch.arange(tokens) < torch.tensor([tokens, 9])[:, None]
    return inputs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_windows_and_shared_keys_are_those_of_the_encoder(name, padded, register):
    make, layers = ENCODERS[name]
    encoder = register(make, layers)
    plain, inputs = copy.deepcopy(encoder), make_inputs(padded)
    model = PromptTuned(encoder, 3, prompt_init=1.0).double().eval()
    prompts = model.bank.stacks["32"].static_prompt.split(1)
    got, truth = model(inputs).features, expected(plain, layers, prompts, inputs)
    # their RMS norms compute in float32, whatever comes in
    tolerance = 1e-9 if name == "ModernBERT" else 1e-5
    torch.testing.assert_close(got, truth, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(got)
    grads = [torch.autograd.grad(out, list(model.bank.parameters()), upstream) for out in (got, truth)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_compiled_model_has_the_same_windows(name, padded, register):
    model = PromptTuned(register(*ENCODERS[name]), 3).double().eval()
    inputs = make_inputs(padded)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(inputs).features, model(inputs).features, rtol=1e-10, atol=1e-10)


def test_masks_that_leave_no_window_are_refused(register):
    model = PromptTuned(register(gemma3, decoder_layers), 3).double()
    jumping = {**make_inputs(False), "position_ids": torch.tensor([[*range(6), *range(7)]])}
    with pytest.raises(ValueError, match="several sequences packed into one"):
        model(jumping)


def test_masks_of_other_kinds_are_refused():
    chunks = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="a layer of this encoder has a mask by chunked_overlay, which attention with prompts"):
        adapters._mask(mask_function=chunks, q_length=5, kv_length=5)
    with pytest.raises(ValueError, match="has a mask by partial"):
        adapters._mask(mask_function=functools.partial(chunks, 0), q_length=5, kv_length=5)


def test_a_mask_with_a_window_says_all_whatever_the_module_says():
    module = nn.Identity()
    module.is_causal = True
    q = torch.randn(2, 4, 5, 8)
    got, _ = adapters._attention(module, q, q, q, adapters._Mask(None, (1, 1)), sliding_window=2)
    torch.testing.assert_close(got, prompt_attention(q, q, q, window=(1, 1)).transpose(1, 2))


def test_an_attention_that_asks_for_a_window_which_its_mask_lacks_is_refused():
    q = torch.randn(2, 4, 5, 8)
    with pytest.raises(ValueError, match="Identity attends within a window of 3 tokens, but the mask that it was given has none"):
        adapters._attention(nn.Identity(), q, q, q, None, sliding_window=3)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "rel_pos", "bias"])
def test_what_else_changes_attention_is_refused(name):
    q = torch.randn(2, 4, 5, 8)
    assert adapters._attention(nn.Identity(), q, q, q, None, **{name: None})[0].shape == (2, 5, 4, 8)
    with pytest.raises(ValueError, match=f"Identity asks for {name}, "):
        adapters._attention(nn.Identity(), q, q, q, None, **{name: 3.0})
