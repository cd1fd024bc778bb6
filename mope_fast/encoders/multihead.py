"""Encoders built on torch's nn.MultiheadAttention: torchvision's VisionTransformer, open_clip's towers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dispatch import prompt_attention
from .attachment import prefixes_of
from .families import EncoderFamily, Inputs, PromptedLayer, register_encoder
from .pooling import Pool, first_token, last_real_token, patch_mean, token_at
from .replaced import forward_problem, replace_methods

Blocks = Callable[[nn.Module], Sequence[nn.Module]]


def _keys_and_values(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    width = weight.shape[1]
    return F.linear(rows, weight[width:], None if bias is None else bias[width:])


def _attention(
    attention: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``nn.MultiheadAttention.forward`` as self-attention; its masks are True, or -inf, where a token is masked out."""
    prefixes = prefixes_of(attention)
    if not prefixes:
        return type(attention).forward(
            attention, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )  # fmt: skip
    if query is not key or query is not value:
        raise RuntimeError(
            "prompts reached an nn.MultiheadAttention that isn't self-attention: query, key and value must be one tensor"
        )
    packed = F.linear(query, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    padding = None if key_padding_mask is None else key_padding_mask == 0
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, -torch.inf)
    bias = attn_mask
    if attn_mask is not None:
        bias = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, attention.num_heads))
    out = prompt_attention(q, k, v, prefixes, key_padding_mask=padding, bias=bias)
    return attention.out_proj(out.transpose(1, 2).flatten(2)), None


def _family(name: str, model: str, blocks: Blocks, attention: str, **facts: Any) -> None:
    """Register a family whose blocks have ``ln_1`` before their attention."""
    layers, attach = (functools.partial(function, blocks, attention) for function in (_layers, _attach))
    register_encoder(EncoderFamily(name=name, models=(model,), layers=layers, attach=attach, feature=_output, **facts))


def _layers(blocks: Blocks, name: str, encoder: nn.Module) -> list[PromptedLayer]:
    layers = []
    for block in blocks(encoder):
        attention = getattr(block, name)
        k_proj = functools.partial(_keys_and_values, attention.in_proj_weight, attention.in_proj_bias)
        layers.append(PromptedLayer(block, attention, attention.embed_dim, block.ln_1, k_proj, None, attention.num_heads))
    return layers


def _problem(blocks: Blocks, name: str, supported: str, encoder: nn.Module) -> str | None:
    for index, block in enumerate(blocks(encoder)):
        attention = getattr(block, name, None)
        if f"{type(block).__module__}.{type(block).__qualname__}" != supported or type(attention) is not nn.MultiheadAttention:
            return f"its block {index} is a {type(block).__name__} with a {type(attention).__name__}; {supported} is supported"
        if attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None:
            return (
                f"the attention of its block {index} has keys and values of its own (bias_k, add_zero_attn), "
                "or a kdim or vdim other than embed_dim"
            )
        if not attention.batch_first:
            return "its layers take (S, B, D) inputs, with the sequence dimension first: create it with batch_first=True"
        if problem := forward_problem(f"block {index}", attention):
            return problem
    return None


def _attach(blocks: Blocks, name: str, encoder: nn.Module) -> Callable[[nn.Module], None]:
    return replace_methods((getattr(block, name), _attention) for block in blocks(encoder))


def _output(encoder: nn.Module, output: Tensor, inputs: Inputs) -> Tensor:
    return output


# torchvision


def _torchvision_blocks(encoder: nn.Module) -> Sequence[nn.Module]:
    return encoder.encoder.layers


_TORCHVISION_BLOCK = "torchvision.models.vision_transformer.EncoderBlock"


def _torchvision_problem(encoder: nn.Module) -> str | None:
    if not isinstance(encoder.heads, nn.Identity):
        return "it ends in a classifier: set heads = nn.Identity() on it, and give the fused model num_classes or head"
    return _problem(_torchvision_blocks, "self_attention", _TORCHVISION_BLOCK, encoder)


def _by_class_token(encoder: nn.Module, inputs: Inputs) -> Pool:
    return first_token


def _by_patch_mean(encoder: nn.Module, inputs: Inputs) -> Pool:
    return patch_mean(1)


def _torchvision_grid(encoder: nn.Module, inputs: Inputs) -> tuple[int, int]:
    return inputs["x"].shape[-2] // encoder.patch_size, inputs["x"].shape[-1] // encoder.patch_size


def _open_clip_grid(encoder: nn.Module, inputs: Inputs) -> tuple[int, int]:
    return tuple(encoder.grid_size)


_IMAGE_POOLS = {"cls": _by_class_token, "mean": _by_patch_mean}
_family(
    "torchvision_vit", "torchvision.models.vision_transformer.VisionTransformer", _torchvision_blocks,
    "self_attention", input_name="x", pool=_by_class_token, pools=_IMAGE_POOLS,
    feature_width=lambda encoder: encoder.hidden_dim, problem=_torchvision_problem, grid=_torchvision_grid,
    last_norm=lambda encoder: encoder.encoder.ln,
)  # fmt: skip


# open_clip


def _open_clip_blocks(encoder: nn.Module) -> Sequence[nn.Module]:
    return encoder.transformer.resblocks


def _open_clip_image_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return patch_mean(1) if encoder.pool_type == "avg" else first_token


def _open_clip_text_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    """Pool as the tower pools its output; the end-of-text token has the largest id, or ``eos_id``."""
    if encoder.cls_emb is not None or encoder.pool_type == "last":
        return last_real_token(None)
    if encoder.pool_type == "first":
        return first_token
    ids = inputs["text"]
    return token_at((ids if encoder.pool_type == "argmax" else ids == encoder.eos_id).int().argmax(-1))


_OPEN_CLIP_BLOCK = "open_clip.transformer.ResidualAttentionBlock"


_CHECKPOINTING = "its own gradient checkpointing is on: call set_grad_checkpointing(False) on it, and use the fused model's own"


def _open_clip_run(encoder: nn.Module, inputs: Inputs) -> Tensor:
    if encoder.transformer.grad_checkpointing:
        # it would recompute layers after the forward, when their prompts no longer exist
        raise RuntimeError(_CHECKPOINTING)
    return encoder(**inputs)


def _open_clip_width(encoder: nn.Module) -> int:
    of_images = hasattr(encoder, "ln_post")
    projection = encoder.proj if of_images else encoder.text_projection
    if projection is None:
        return (encoder.ln_post if of_images else encoder.ln_final).weight.shape[0]
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


def _open_clip_problem(encoder: nn.Module) -> str | None:
    if encoder.transformer.grad_checkpointing:
        return _CHECKPOINTING
    if encoder.output_tokens:
        return "it returns its tokens beside the feature: set output_tokens = False on it"
    if encoder.pool_type == "none":
        return "it doesn't pool its tokens (pool_type='none')"
    return _problem(_open_clip_blocks, "attn", _OPEN_CLIP_BLOCK, encoder)


_OPEN_CLIP = {"feature_width": _open_clip_width, "problem": _open_clip_problem, "run": _open_clip_run}
_family(
    "open_clip_vision", "open_clip.transformer.VisionTransformer", _open_clip_blocks, "attn", input_name="x",
    pool=_open_clip_image_pool, pools=_IMAGE_POOLS, grid=_open_clip_grid, last_norm=lambda encoder: encoder.ln_post, **_OPEN_CLIP,
)  # fmt: skip
_family(
    "open_clip_text", "open_clip.transformer.TextTransformer", _open_clip_blocks, "attn", input_name="text",
    pool=_open_clip_text_pool, last_norm=lambda encoder: encoder.ln_final, **_OPEN_CLIP,
)  # fmt: skip
