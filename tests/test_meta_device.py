"""On the meta device the functions give shapes and dtypes, for who counts memory or plans without weights."""

import torch

from mope_fast import ReceptiveField
from mope_fast.functional import (
    importance_loss,
    prompt_attention,
    receptive_field_attention,
    route_and_mix,
    window_prompt_attention,
)


def test_every_function_takes_meta_tensors():
    with torch.device("meta"):
        q, prefix = torch.randn(2, 3, 5, 4), [(torch.randn(1, 3, 2, 4),) * 2]
        assert prompt_attention(q, q, q, prefix, is_causal=True).shape == q.shape
        field = ReceptiveField(lengths={"text": 2, "image": 3}, visible={"text": ["text"], "image": ["text", "image"]})
        assert receptive_field_attention(q, q, q, field).shape == q.shape
        qkv, bias = torch.randn(2, 7, 8, 3, 3, 4, dtype=torch.bfloat16), torch.randn(3, 16, 16)
        out = window_prompt_attention(qkv, prefix, bias, window_size=4, shift_size=2)
        assert (out.shape, out.dtype, out.device.type) == ((2, 7, 8, 12), torch.bfloat16, "meta")
        mixed, scores = route_and_mix(torch.randn(6, 4), torch.randn(4, 2, 8), top_k=2, gram=torch.randn(2, 4, 4))
        assert (mixed.shape, scores.shape) == ((6, 2, 8), (6, 4))
        assert importance_loss(scores).shape == ()
