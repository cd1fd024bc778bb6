"""torch's FlopCounterMode counts the library's own ops, as many as their matrix products have."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mope_fast import functional
from mope_fast.ops.layer_prompts import layer_prompts
from mope_fast.ops.prompt_attention import prompt_attention
from mope_fast.ops.route_and_mix import route_and_mix

BATCH, HEADS, QUERIES, KEYS, HEAD_DIM = 2, 3, 5, 7, 4
EXPERTS, ROWS, WIDTH, FEATURE, RANK = 6, 3, 8, 10, 2


def random(*shape):
    return torch.randn(*shape, requires_grad=True)


def attention():
    prefix = [random(1, HEADS, 2, HEAD_DIM) for _ in range(2)], [random(BATCH, HEADS, 4, HEAD_DIM) for _ in range(2)]
    q, k, v = random(BATCH, HEADS, QUERIES, HEAD_DIM), random(BATCH, HEADS, KEYS, HEAD_DIM), random(BATCH, HEADS, KEYS, HEAD_DIM)
    return prompt_attention(q, k, v, prefix, field=None, window=(None, None), key_padding_mask=None, bias=None, scale=None)


def windows():
    qkv = random(BATCH, 5, 4, 3, HEADS, HEAD_DIM)  # six windows of 2 x 2, two of them padded
    prefix = [random(BATCH, HEADS, 3, HEAD_DIM) for _ in range(2)]
    bias = random(HEADS, 4, 4)
    pad = torch.zeros(3, HEADS, HEAD_DIM)
    return functional.window_prompt_attention(
        qkv, [prefix], bias, window_size=(2, 2), shift_size=(0, 0), pad_qkv=pad, impl="cpu"
    )  # fmt: skip


def mixture():
    return route_and_mix(random(BATCH, EXPERTS), random(EXPERTS, ROWS, WIDTH), None, None, 1.0, None, False, 1e-5, torch.float32)[0]


def layer():
    return layer_prompts(
        random(BATCH, FEATURE), random(BATCH, EXPERTS), random(RANK, FEATURE), random(RANK, EXPERTS),
        random(EXPERTS, ROWS, WIDTH), None, None, None, None, top_k=None, renormalize=False, eps=1e-5, dtype=torch.float32,
    )[0]  # fmt: skip


MIXED = 2 * BATCH * EXPERTS * ROWS * WIDTH
PAIRS = 2 * BATCH * HEADS * HEAD_DIM
CASES = {
    "prompt_attention": (attention, PAIRS * QUERIES * (KEYS + 2 + 4), 2, 5),
    "window_prompt_attention": (windows, PAIRS * 6 * 4 * (4 + 3), 2, 5),
    "route_and_mix": (mixture, MIXED, 1, 2),
    "layer_prompts": (layer, MIXED + 2 * BATCH * (RANK * FEATURE + RANK * EXPERTS), 1, 2),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_are_counted(name):
    run, product, forward, backward = CASES[name]
    with FlopCounterMode(display=False) as counter:
        run().sum().backward()
    found = {str(op).removeprefix("mope_fast."): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert found[name] == forward * product
    assert found[f"{name}_backward"] == backward * product
