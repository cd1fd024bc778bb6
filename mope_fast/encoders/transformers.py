"""transformers' encoders: prompts enter through its own attention interface, no model is changed.

``AttentionInterface`` gets our attention, ``AttentionMaskInterface`` a mask function that hands the (B, S) padding mask through
untouched: without one transformers passes no mask at all, and the stock ones build a 4-D mask and wait for the device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..functional import prompt_attention
from .families import EncoderFamily, PromptedLayer, register_encoder
from .prompted import prefixes_of

NAME = "mope_fast"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (B, H, S, Dh) in, (B, S, H, Dh) out."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, S), True = real; got {tuple(attention_mask.shape)}")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    out = prompt_attention(
        query, key, value, prefixes_of(module), is_causal=is_causal, key_padding_mask=attention_mask, scale=scaling
    )
    return out.transpose(1, 2), None


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


def _set_attention(implementation: str, encoder: nn.Module) -> None:
    encoder.set_attn_implementation(implementation)


def _register_interfaces() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _padding_mask)


def _attach(encoder: nn.Module) -> Callable[[nn.Module], None]:
    previous = encoder.config._attn_implementation
    encoder.set_attn_implementation(NAME)
    return functools.partial(_set_attention, previous)


def _hidden_size(encoder: nn.Module) -> int:
    return encoder.config.hidden_size


def _cls_token(output: Any, inputs: dict[str, Any]) -> Tensor:
    return output.last_hidden_state[:, 0]


def _bert_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    attentions = [layer.attention.self for layer in encoder.encoder.layer]
    return [
        PromptedLayer(
            layer, attention, encoder.config.hidden_size, None, attention.key, attention.value, attention.num_attention_heads
        )
        for layer, attention in zip(encoder.encoder.layer, attentions, strict=True)
    ]


def _bert_problem(encoder: nn.Module) -> str | None:
    return "it is a decoder (config.is_decoder); load it with is_decoder=False" if encoder.config.is_decoder else None


def _dinov2_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            layer, layer.attention, encoder.config.hidden_size, layer.norm1,
            layer.attention.k_proj, layer.attention.v_proj, layer.attention.num_attention_heads,
        )
        for layer in encoder.encoder.layer
    ]  # fmt: skip


register_encoder(
    EncoderFamily(
        name="bert",
        models=("transformers.models.bert.modeling_bert.BertModel",),
        input_name="input_ids",
        layers=_bert_layers,
        feature=_cls_token,
        feature_width=_hidden_size,
        attach=_attach,
        setup=_register_interfaces,
        problem=_bert_problem,
    )
)
register_encoder(
    EncoderFamily(
        name="dinov2",
        models=("transformers.models.dinov2.modeling_dinov2.Dinov2Model",),
        input_name="pixel_values",
        layers=_dinov2_layers,
        feature=_cls_token,
        feature_width=_hidden_size,
        attach=_attach,
        setup=_register_interfaces,
    )
)
