"""timm's encoders: a wrapped attention computes the same on the same parameters, and sees prompts too."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..functional import prompt_attention
from ..modules import PromptAttention
from .families import EncoderFamily, Inputs, PromptedLayer, register_encoder
from .pooling import Pool, first_token, token_mean
from .prompted import prefixes_of


def _keys_and_values(qkv: nn.Module, rows: Tensor) -> Tensor:
    """(..., 2 * H * Dh): the module is called, whatever it is, and its queries are dropped."""
    packed = qkv(rows)
    return packed[..., packed.shape[-1] // 3 :]


def _pooled(encoder: nn.Module, output: Tensor, inputs: Inputs) -> Tensor:
    return encoder.forward_head(output, pre_logits=True)


def _run(encoder: nn.Module, inputs: Inputs) -> Tensor:
    return encoder.forward_features(**inputs)


def _num_features(encoder: nn.Module) -> int:
    return encoder.num_features


def _problem(encoder: nn.Module) -> str | None:
    if any(getattr(module, "grad_checkpointing", False) for module in encoder.modules()):
        return "timm's gradient checkpointing is on: call set_grad_checkpointing(False) on it, and use the fused model's own"
    if encoder.global_pool == "":
        return "it doesn't pool its tokens (global_pool=''): create it with global_pool='token' or 'avg'"
    return None


# VisionTransformer


class _PromptedAttention(PromptAttention):
    """In place of timm's ``Attention``, on its parameters."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x, prefixes_of(self), attn_mask=attn_mask, is_causal=is_causal)


def _vit_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            block, block.attn, encoder.embed_dim, block.norm1,
            functools.partial(_keys_and_values, block.attn.qkv), None, block.attn.num_heads,
            None if isinstance(block.attn.k_norm, nn.Identity) else block.attn.k_norm,
        )
        for block in encoder.blocks
    ]  # fmt: skip


def _vit_problem(encoder: nn.Module) -> str | None:
    for block in encoder.blocks:
        if (name := type(block).__qualname__) != "Block":
            return f"its blocks are {name}s; timm's plain Block is supported"
        if (name := type(block.attn).__qualname__) not in ("Attention", "_PromptedAttention"):
            return f"its attention is {name}; timm's plain Attention is supported"
    return _problem(encoder)


def _vit_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean if encoder.cls_token is None else first_token


def _attach_vit(encoder: nn.Module) -> Callable[[nn.Module], None]:
    own = [block.attn for block in encoder.blocks]
    for block in encoder.blocks:
        block.attn = _PromptedAttention.from_attention(block.attn, ignore_dropout=True)
    return functools.partial(_detach_vit, own)


def _detach_vit(own: list[nn.Module], encoder: nn.Module) -> None:
    for block, attention in zip(encoder.blocks, own, strict=True):
        block.attn = attention


# SwinTransformer


def _window_attention(attention: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """timm's ``WindowAttention.forward`` whose windows (B * windows, W, D), an image's one after the other, see its prompts."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    bias = attention._get_rel_pos_bias()
    if mask is not None:
        images = x.shape[0] // mask.shape[0]
        bias = (bias + mask[:, None]).repeat(images, 1, 1, 1)
    prefixes = [
        tuple(part if part.shape[0] == 1 else part.repeat_interleave(x.shape[0] // part.shape[0], 0) for part in pair)
        for pair in prefixes_of(attention)
    ]
    out = prompt_attention(q, k, v, prefixes, bias=bias, scale=attention.scale)
    return attention.proj(out.transpose(1, 2).flatten(2))


def _swin_blocks(encoder: nn.Module) -> list[nn.Module]:
    return [block for stage in encoder.layers for block in stage.blocks]


def _swin_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            block, block.attn, block.dim, block.norm1,
            functools.partial(_keys_and_values, block.attn.qkv), None, block.attn.num_heads,
        )
        for block in _swin_blocks(encoder)
    ]  # fmt: skip


def _swin_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean


def _attach_swin(encoder: nn.Module) -> Callable[[nn.Module], None]:
    for block in _swin_blocks(encoder):
        block.attn.forward = functools.partial(_window_attention, block.attn)
    return _detach_swin


def _detach_swin(encoder: nn.Module) -> None:
    for block in _swin_blocks(encoder):
        del block.attn.forward


_COMMON: dict[str, Any] = {"input_name": "x", "feature": _pooled, "feature_width": _num_features, "run": _run}
register_encoder(
    EncoderFamily(
        name="timm_vit",
        models=("timm.models.vision_transformer.VisionTransformer",),
        layers=_vit_layers,
        pool=_vit_pool,
        attach=_attach_vit,
        problem=_vit_problem,
        **_COMMON,
    )
)
register_encoder(
    EncoderFamily(
        name="timm_swin",
        models=("timm.models.swin_transformer.SwinTransformer",),
        layers=_swin_layers,
        pool=_swin_pool,
        attach=_attach_swin,
        problem=_problem,
        **_COMMON,
    )
)
