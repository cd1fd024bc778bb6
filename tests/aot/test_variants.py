"""Batches and lengths that vary don't have kernels compiled again and again."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel
from variants import count_variants

from mope_fast import MoPEConfig, MoPEFusion, PromptBank, warmup
from mope_fast.encoders import PromptedLayer

pytestmark = pytest.mark.aot


@pytest.fixture
def variants(monkeypatch):
    return count_variants(monkeypatch)


def test_bert_of_any_length_takes_six_attention_kernels(variants):
    config = BertConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    fusion = MoPEConfig(num_experts=4, prompt_length=4, cross_dim=16, mapper_norm="layer")
    model = MoPEFusion(BertModel(config), None, num_classes=3, config=fusion).bfloat16().train()
    for batch in (8, 1):
        for length in range(3, 129):
            text = {
                "input_ids": torch.randint(5, 100, (batch, length)),
                "attention_mask": torch.ones(batch, length, dtype=torch.bool),
            }
            model(text, torch.randn(batch, 16).bfloat16()).logits.sum().backward()
    counts = {name: len(keys) for name, keys in variants.items() if keys}
    # of queries by the size of tiles; of gradients by layer: in the first nobody asks for those of tokens
    assert {name: counts[name] for name in ("attention_kernel", "query_grads_kernel", "key_grads_kernel")} == {
        "attention_kernel": 2, "query_grads_kernel": 2, "key_grads_kernel": 2
    }  # fmt: skip


def test_behind_two_warm_ups_no_usual_length_or_batch_compiles_anything(variants):
    config = BertConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, max_position_embeddings=512
    )
    fusion = MoPEConfig(num_experts=4, prompt_length=4, cross_dim=16)
    model = MoPEFusion(BertModel(config), None, num_classes=3, config=fusion).train()

    def inputs(batch, tokens):
        labels = torch.zeros(batch, dtype=torch.long)
        return ({"input_ids": torch.randint(5, 100, (batch, tokens))}, torch.randn(batch, 16)), {"labels": labels}

    with torch.autocast("cpu", torch.bfloat16):
        for tokens in (64, 128):
            given, labels = inputs(8, tokens)
            warmup(model, *given, **labels)
        known = {name: set(keys) for name, keys in variants.items()}
        assert known["key_grads_kernel"]
        for batch, tokens in ((8, 17), (5, 100), (5, 200), (9, 300), (6, 500), (90, 20), (127, 3)):
            given, labels = inputs(batch, tokens)
            model(*given, **labels).loss.backward()
        with torch.no_grad():
            model.eval()(*inputs(7, 33)[0])
    assert variants == known


def test_a_layer_of_any_batch_takes_few_kernels(variants):
    bank = PromptBank([128] * 2, 16, MoPEConfig(num_experts=4, prompt_length=4, mapper_norm="layer")).bfloat16().eval()
    norms = [nn.LayerNorm(128).bfloat16() for _ in range(2)]
    layers = [PromptedLayer(norm, norm, 128, norm, nn.Linear(128, 256).bfloat16(), None, 2) for norm in norms]
    for batch in (1, 2, 3, 5, 8, 15, 16, 17, 64, 100, 255, 256, 257, 500, 512, 513, 1000, 1024, 2000, 4096, 5000, 8192):
        context = bank.prepare(torch.randn(batch, 16).bfloat16(), layers, torch.bfloat16)
        for index in range(2):
            [(keys, values)], scores = context.prefixes(index, torch.randn(batch, 128).bfloat16())
            (keys.sum() + values.sum() + scores.sum()).backward(retain_graph=True)
    # mixed as prompts or in K/V space, where experts are few beside the batch; gradients whole, or in parts, which are float32
    assert {name: len(keys) for name, keys in variants.items() if keys} == {
        "mix_kernel": 2, "mixture_grads_kernel": 3, "router_grads_kernel": 3
    }  # fmt: skip
