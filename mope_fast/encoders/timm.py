"""timm's encoders: a wrapped attention computes the same on the same parameters, and sees prompts too."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..functional import prompt_attention
from ..modules import PromptAttention
from .families import EncoderFamily, Inputs, PromptedLayer, keys_and_values, register_encoder
from .pooling import Pool, first_token, token_mean
from .prompted import prefixes_of


def _layer(block: nn.Module, width: int) -> PromptedLayer:
    attention = block.attn
    key_norm = getattr(attention, "k_norm", None)
    return PromptedLayer(
        block, attention, width, block.norm1,
        functools.partial(keys_and_values, attention.qkv), None, attention.num_heads,
        None if isinstance(key_norm, nn.Identity) else key_norm,
    )  # fmt: skip


def _forward_of(module: nn.Module) -> str:
    """Full name of the class whose ``forward`` this module runs: its own, or one that it inherits from."""
    forward = type(module).forward
    return f"{forward.__module__}.{forward.__qualname__}".removesuffix(".forward")


def _run(encoder: nn.Module, inputs: Inputs) -> Tensor:
    if _checkpoints(encoder):
        # it would compute layers again after the forward, when their prompts are gone
        raise RuntimeError(_CHECKPOINTING)
    return encoder.forward_features(**inputs)


def _feature(encoder: nn.Module, output: Tensor, inputs: Inputs) -> Tensor:
    return encoder.forward_head(output, pre_logits=True)


def _feature_width(encoder: nn.Module) -> int:
    return encoder.head_hidden_size


_CHECKPOINTING = "timm's gradient checkpointing is on: call set_grad_checkpointing(False) on it, and use the fused model's own"


def _checkpoints(encoder: nn.Module) -> bool:
    """Whether timm's own checkpointing is on; a Swin Transformer has the switch in its stages."""
    return any(getattr(part, "grad_checkpointing", False) for part in (encoder, *getattr(encoder, "layers", ())))


def _problem(encoder: nn.Module, pooling: str) -> str | None:
    if _checkpoints(encoder):
        return _CHECKPOINTING
    if not pooling:
        return "it doesn't pool its tokens (global_pool=''): create it with global_pool='avg', or call reset_classifier(0, 'avg')"
    return None


# VisionTransformer


def _attention(attention: PromptAttention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm's ``Attention.forward``; mask and causality are about tokens, everyone sees the prompts."""
    return type(attention).forward(attention, x, prefixes_of(attention), attn_mask=attn_mask, is_causal=is_causal)


def _as_prompt_attention(attention: nn.Module) -> PromptAttention:
    """On the same parameters; the wrapped encoder is in eval mode, where dropout does nothing."""
    if isinstance(attention, PromptAttention):
        return attention
    return PromptAttention.from_attention(attention, ignore_dropout=True)


def _vit_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [_layer(block, encoder.embed_dim) for block in encoder.blocks]


def _vit_problem(encoder: nn.Module) -> str | None:
    for index, block in enumerate(encoder.blocks):
        if _forward_of(block) != "timm.models.vision_transformer.Block":
            return f"its blocks are {type(block).__name__}s; timm's plain Block is supported"
        if "forward" in vars(block.attn) and not isinstance(block.attn, PromptAttention):
            return f"the attention of its block {index} has a forward of its own on the object, which prompts would not pass"
        try:
            _as_prompt_attention(block.attn)
        except (TypeError, ValueError) as error:
            return f"timm's plain Attention is supported, that of its block {index} is not: {error}"
    return _problem(encoder, encoder.global_pool)


def _vit_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean if encoder.cls_token is None else first_token


def _attach_vit(encoder: nn.Module) -> Callable[[nn.Module], None]:
    own = [block.attn for block in encoder.blocks]
    for block in encoder.blocks:
        block.attn = _as_prompt_attention(block.attn)
        block.attn.forward = functools.partial(_attention, block.attn)
    return functools.partial(_detach_vit, own)


def _detach_vit(own: list[nn.Module], encoder: nn.Module) -> None:
    for block, attention in zip(encoder.blocks, own, strict=True):
        del block.attn.forward
        block.attn = attention


# SwinTransformer


def _window_attention(attention: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """timm's ``WindowAttention.forward`` on windows (B * windows, W, D) that see the prompts of their image.

    Args:
        attention: timm's module.
        x: the windows, those of an image one after the other.
        mask: (windows, W, W), added to the scaled products: -100 between parts of the image that the shift put together.
    """
    prefixes = prefixes_of(attention)
    if not prefixes:
        return type(attention).forward(attention, x, mask)
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    bias = attention._get_rel_pos_bias()
    if mask is None:
        prefixes = [tuple(_for_windows_as_samples(part, len(x)) for part in prefix) for prefix in prefixes]
    else:
        # windows as heads of their image: every image has the same mask, which is not repeated for each then
        windows = len(mask)
        q, k, v = (part.unflatten(0, (-1, windows)).flatten(1, 2) for part in (q, k, v))
        bias = (bias + mask[:, None]).flatten(0, 1)[None]
        prefixes = [
            (_for_windows_as_heads(keys, windows), _for_windows_as_heads(values, windows), *there)
            for keys, values, *there in prefixes
        ]
    out = prompt_attention(q, k, v, prefixes, bias=bias, scale=attention.scale)
    return attention.proj(out.reshape(len(x), attention.num_heads, x.shape[1], -1).transpose(1, 2).flatten(2))


def _for_windows_as_samples(part: Tensor, samples: int) -> Tensor:
    """(B or 1, ...) of a prefix, an image's once for each of its windows: (B * windows or 1, ...)."""
    if len(part) == 1:
        return part
    return part[:, None].expand(-1, samples // len(part), *part.shape[1:]).flatten(0, 1)


def _for_windows_as_heads(part: Tensor, windows: int) -> Tensor:
    """(B or 1, H, P, Dh) -> (B or 1, windows * H, P, Dh)."""
    return part[:, None].expand(-1, windows, -1, -1, -1).flatten(1, 2)


def _swin_blocks(encoder: nn.Module) -> list[nn.Module]:
    return [block for stage in encoder.layers for block in stage.blocks]


def _swin_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [_layer(block, block.dim) for block in _swin_blocks(encoder)]


def _swin_problem(encoder: nn.Module) -> str | None:
    for block in _swin_blocks(encoder):
        for part, supported in ((block, "SwinTransformerBlock"), (block.attn, "WindowAttention")):
            if _forward_of(part) != f"timm.models.swin_transformer.{supported}":
                return f"it has a {type(part).__name__} in place of timm's {supported}"
        if "forward" in vars(block.attn) and getattr(block.attn.forward, "func", None) is not _window_attention:
            return "an attention of it has a forward of its own on the object, which prompts would not pass"
    if not hasattr(encoder.head, "global_pool"):
        return (
            f"its head, which pools, was replaced by {type(encoder.head).__name__}: to drop the classifier call reset_classifier(0)"
        )
    return _problem(encoder, encoder.head.global_pool.pool_type)


def _swin_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean


def _attach_swin(encoder: nn.Module) -> Callable[[nn.Module], None]:
    for block in _swin_blocks(encoder):
        block.attn.forward = functools.partial(_window_attention, block.attn)
    return _detach_swin


def _detach_swin(encoder: nn.Module) -> None:
    for block in _swin_blocks(encoder):
        del block.attn.forward


_COMMON: dict[str, Any] = {"input_name": "x", "feature": _feature, "feature_width": _feature_width, "run": _run}
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
        problem=_swin_problem,
        **_COMMON,
    )
)
