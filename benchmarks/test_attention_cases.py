"""Tests that the measured forms solve the same problem: visibility, counts, the block-wise truth."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from benchmarks import attention
from benchmarks.baselines.attention import mask_mod
from benchmarks.cases import SMOKE
from benchmarks.cases.attention import GAPS, MOPE_BAF, AttentionCase, prompt_attention, receptive_field_attention, visible_pairs

CPU = torch.device("cpu")
CASES = [*prompt_attention(CPU, SMOKE), *receptive_field_attention(CPU, SMOKE)]


def test_fields_are_what_they_are_measured_for():
    assert MOPE_BAF.is_interval
    assert not GAPS.is_interval


@pytest.mark.parametrize("case", [c for c in CASES if c.masked], ids=str)
def test_flex_attention_sees_what_the_masks_say(case):
    batch = case.batch if case.ragged else 1
    seen = create_mask(mask_mod(case, CPU), batch, 1, case.tokens, case.keys, device="cpu")
    assert torch.equal(seen, case.visible(CPU))


def test_counts():
    case = AttentionCase("m", 3, 8, 2, 16, torch.bfloat16, (4, 5), causal=True)
    assert visible_pairs(case) == 3 * (8 * 9 + 8 * 9 // 2)
    assert case.flops("forward") == 4 * 2 * 16 * visible_pairs(case)
    tokens, prefixes = 3 * 8 * 2 * 16 * 2, 2 * (4 + 3 * 5) * 2 * 16 * 2
    assert case.bytes("forward") == 4 * tokens + prefixes
    assert case.bytes("forward+backward") == 8 * tokens + 2 * prefixes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_truth_by_blocks_is_the_truth(case, monkeypatch):
    torch.manual_seed(0)
    inputs = attention.Inputs.random(case, CPU, "forward+backward")
    whole = attention.expected(case, "forward+backward", inputs, torch.float64)
    monkeypatch.setattr(attention, "REFERENCE_PAIRS", case.tokens * case.keys)  # one head of one sample
    for one, other in zip(attention.expected(case, "forward+backward", inputs, torch.float64), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
