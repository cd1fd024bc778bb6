"""Encoders of transformers whose attention doesn't go through its attention interface: replace the method that computes it."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .._dispatch import prompt_attention
from .attachment import prefixes_of
from .replaced import replace_methods


def replace_in(layers: str, attention: str, method: str, ours: Callable[..., Any]) -> Callable[[nn.Module], Any]:
    """Return an ``attach`` that replaces, in each layer, a method of its attention by ``ours``, called with the attention first."""
    return functools.partial(_attach, layers, attention, method, ours)


def _attach(layers: str, attention: str, method: str, ours: Callable[..., Any], encoder: nn.Module) -> Callable[..., None]:
    return replace_methods(((layer.get_submodule(attention), ours) for layer in encoder.get_submodule(layers)), method)


def mpnet_attention(
    attention: nn.Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor | None, ...]:
    """Compute ``MPNetSelfAttention.forward`` with prompts; its mask (B, 1, 1, S) is 0 for a real token."""
    if not (prefixes := prefixes_of(attention)):
        return type(attention).forward(attention, hidden_states, attention_mask, position_bias, output_attentions, **kwargs)
    heads = (-1, attention.attention_head_size)
    q, k, v = (proj(hidden_states).unflatten(-1, heads).transpose(1, 2) for proj in (attention.q, attention.k, attention.v))
    padding = None if attention_mask is None else attention_mask[:, 0, 0] == 0
    out = prompt_attention(q, k, v, prefixes, key_padding_mask=padding, bias=position_bias)
    out = attention.o(out.transpose(1, 2).flatten(2))
    return (out, None) if output_attentions else (out,)


def wavlm_attention(
    attention: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Compute ``WavLMAttention.torch_multi_head_self_attention`` with prompts; its bias (B * H, S, S) is gated by the query."""
    if not (prefixes := prefixes_of(attention)):
        own = type(attention).torch_multi_head_self_attention
        return own(attention, hidden_states, attention_mask, gated_position_bias)
    heads = (-1, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (proj(hidden_states).unflatten(-1, heads).transpose(1, 2) for proj in projections)
    padding = None if attention_mask is None else attention_mask == 1
    bias = gated_position_bias.unflatten(0, (-1, attention.num_heads))
    out = prompt_attention(q, k, v, prefixes, key_padding_mask=padding, bias=bias)
    return attention.out_proj(out.transpose(1, 2).flatten(2)), None
