"""timm's encoders with positions in their attention: rotary ones in Eva (EVA-02, DINOv3), a bias in Beit; prompts have neither."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .._dispatch import prompt_attention
from ..modules.attention import split_attn_mask
from .attachment import prefixes_of
from .families import EncoderFamily, Inputs, PromptedLayer, keys_and_values, register_encoder
from .front import Front
from .pooling import Pool, first_token, token_mean
from .replaced import forward_problem, replace_methods
from .timm_encoders import COMMON, method_of, patch_grid, problem_of


def _layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [_layer(block, block.attn, encoder.embed_dim) for block in encoder.blocks]


def _layer(block: nn.Module, attention: nn.Module, width: int) -> PromptedLayer:
    key_heads, key_norm = getattr(attention, "num_kv_heads", attention.num_heads), getattr(attention, "k_norm", None)
    if attention.qkv is None:
        k_proj, v_proj = attention.k_proj, attention.v_proj
    else:
        k_proj, v_proj = functools.partial(_keys_and_values, attention.qkv, *_key_and_value_bias(attention)), None
    key_norm = None if isinstance(key_norm, nn.Identity) else key_norm
    return PromptedLayer(block, attention, width, block.norm1, k_proj, v_proj, key_heads, key_norm)


def _key_and_value_bias(attention: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return the biases of keys and values kept apart from the packed projection, or Nones; that of keys is zero."""
    return (None, None) if getattr(attention, "q_bias", None) is None else (attention.k_bias, attention.v_bias)


def _keys_and_values(qkv: nn.Module, k_bias: Tensor | None, v_bias: Tensor | None, rows: Tensor) -> Tensor:
    packed = keys_and_values(qkv, rows)
    return packed if k_bias is None else packed + torch.cat([k_bias, v_bias])


def _queries_keys_values(attention: nn.Module, x: Tensor) -> list[Tensor]:
    """Return queries, keys and values, each (B, H or Hkv, S, Dh)."""
    if attention.qkv is None:
        parts = [attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)]
    else:
        packed = attention.qkv(x)
        if getattr(attention, "q_bias", None) is not None:
            packed = packed + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        parts = packed.chunk(3, dim=-1)
    head_dim = parts[0].shape[-1] // attention.num_heads
    return [part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts]


def _rotated(
    attention: nn.Module, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Compute Eva's attention on its own parameters; a wrapped encoder is in eval mode, so there is no dropout."""
    from timm.layers import apply_rot_embed_cat

    prefixes = prefixes_of(attention)
    if not prefixes:
        return type(attention).forward(attention, x, rope, attn_mask, is_causal)
    q, k, v = _queries_keys_values(attention, x)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if rope is not None:
        fixed, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        q, k = (
            torch.cat([t[:, :, :fixed], apply_rot_embed_cat(t[:, :, fixed:], rope, half=half)], dim=2).type_as(v) for t in (q, k)
        )
    padding, bias = (None, None) if attn_mask is None else split_attn_mask(attn_mask, q)
    out = prompt_attention(
        q, k, v, prefixes, is_causal=is_causal, key_padding_mask=padding, bias=bias, scale=attention.scale
    )  # fmt: skip
    out = attention.norm(out.transpose(1, 2).flatten(2))
    return attention.proj(out if attention.gate is None else out * attention.gate(x).sigmoid())


def _biased(attention: nn.Module, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    """Compute BEiT's attention on its own parameters; a wrapped encoder is in eval mode, so there is no dropout."""
    prefixes = prefixes_of(attention)
    if not prefixes:
        return type(attention).forward(attention, x, shared_rel_pos_bias)
    bias = shared_rel_pos_bias
    if attention.relative_position_bias_table is not None:
        own = attention._get_rel_pos_bias()
        bias = own if bias is None else own + bias
    out = prompt_attention(*_queries_keys_values(attention, x), prefixes, bias=bias, scale=attention.scale)
    return attention.proj(out.transpose(1, 2).flatten(2))


_OURS = {
    "timm.models.eva.EvaAttention": _rotated,
    "timm.layers.attention.AttentionRope": _rotated,
    "timm.models.beit.Attention": _biased,
}
_BLOCKS = ("timm.models.eva.EvaBlock", "timm.models.beit.Block")


def _problem(encoder: nn.Module) -> str | None:
    for index, block in enumerate(encoder.blocks):
        if method_of(block, "forward").removesuffix(".forward") not in _BLOCKS:
            return f"its blocks are {type(block).__name__}s; timm's blocks that norm before their attention are supported"
        if method_of(block.attn, "forward").removesuffix(".forward") not in _OURS:
            return f"the attention of its block {index} is a {type(block.attn).__name__}, which is not one of timm's"
        if problem := forward_problem(f"block {index}", block.attn):
            return problem
    return problem_of(encoder, encoder.global_pool)


def _attach(encoder: nn.Module) -> Callable[[nn.Module], None]:
    attentions = [block.attn for block in encoder.blocks]
    detach = functools.partial(
        _detach, replace_methods((part, _OURS[method_of(part, "forward").removesuffix(".forward")]) for part in attentions)
    )
    try:
        Front.wrap(encoder)
    except BaseException:  # including Ctrl-C
        detach(encoder)
        raise
    return detach


def _detach(put_back: Callable[[nn.Module], None], encoder: nn.Module) -> None:
    Front.unwrap(encoder)
    put_back(encoder)


def _pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean if encoder.cls_token is None else first_token


for _name, _model in (("timm_eva", "timm.models.eva.Eva"), ("timm_beit", "timm.models.beit.Beit")):
    register_encoder(
        EncoderFamily(
            name=_name, models=(_model,), layers=_layers, pool=_pool, attach=_attach, problem=_problem, grid=patch_grid, **COMMON
        )
    )
