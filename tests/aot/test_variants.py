"""Batches and lengths that vary don't have kernels compiled again and again."""

import pytest
import torch
from transformers import BertConfig, BertModel
from variants import count_variants

from mope_fast import MoPEConfig, MoPEFusion, warmup

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


def test_behind_a_warm_up_a_step_compiles_nothing(variants):
    config = BertConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    fusion = MoPEConfig(num_experts=4, prompt_length=4, cross_dim=16)
    model = MoPEFusion(BertModel(config), None, num_classes=3, config=fusion).bfloat16().train()
    ids, features, labels = torch.randint(5, 100, (8, 20)), torch.randn(8, 16).bfloat16(), torch.zeros(8, dtype=torch.long)
    warmup(model, {"input_ids": ids}, features, labels=labels)
    known = {name: set(keys) for name, keys in variants.items()}
    assert known["key_grads_kernel"]
    model({"input_ids": ids[:, :17]}, features, labels=labels).loss.backward()
    with torch.no_grad():
        model.eval()({"input_ids": ids[:5]}, features[:5])
    assert variants == known
