"""timm's encoders: a wrapped attention has the same parameters and computes the same, but also attends to prompts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .._dispatch import prompt_attention, window_prompt_attention
from ..modules import PromptAttention
from ..modules.norms import is_plain
from .attachment import prefixes_of
from .families import EncoderFamily, Inputs, PromptedLayer, keys_and_values, refuse_encoder, register_encoder
from .front import Front
from .pooling import Pool, first_token, patch_mean, token_mean


def _layer(block: nn.Module, width: int) -> PromptedLayer:
    attention = block.attn
    key_norm, key_heads = getattr(attention, "k_norm", None), getattr(attention, "num_kv_heads", attention.num_heads)
    return PromptedLayer(
        block, attention, width, block.norm1,
        functools.partial(keys_and_values, attention.qkv, group=attention.num_heads // key_heads), None, key_heads,
        None if isinstance(key_norm, nn.Identity) else key_norm,
    )  # fmt: skip


def method_of(module: nn.Module, name: str) -> str:
    """Return the full name of a method as the module's class defines or inherits it."""
    method = getattr(type(module), name, None)
    return f"{method.__module__}.{method.__qualname__}" if method is not None else ""


_FORWARDS = ("timm.models.vision_transformer.VisionTransformer.forward", "timm.models.swin_transformer.SwinTransformer.forward")


def _features(encoder: nn.Module, inputs: Inputs, *, maps: bool = False) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Return the feature and the maps (or None), from a call of the model itself."""
    _check_not_checkpointing(encoder)
    if not maps and Front.of(encoder) is None and is_plain(encoder) and method_of(encoder, "forward") in _FORWARDS:
        # not wrapped, and nothing is attached to the model's call
        return encoder.forward_head(encoder.forward_features(**inputs), pre_logits=True), None
    return Front.ask(encoder, inputs, maps=maps)


def _run(encoder: nn.Module, inputs: Inputs) -> Tensor:
    return _features(encoder, inputs)[0]


def _feature(encoder: nn.Module, output: Tensor, inputs: Inputs) -> Tensor:
    return output


def _feature_width(encoder: nn.Module) -> int:
    return encoder.head_hidden_size


_CHECKPOINTING = "timm's gradient checkpointing is on: call set_grad_checkpointing(False) on it, and use the fused model's own"


def _checkpoints(encoder: nn.Module) -> bool:
    """Return whether timm's own gradient checkpointing is on; a Swin Transformer has this flag in its stages."""
    return any(getattr(part, "grad_checkpointing", False) for part in (encoder, *getattr(encoder, "layers", ())))


def _check_not_checkpointing(encoder: nn.Module) -> None:
    if _checkpoints(encoder):
        # it would recompute layers after the forward, when their prompts no longer exist
        raise RuntimeError(_CHECKPOINTING)


def problem_of(encoder: nn.Module, pooling: str) -> str | None:
    if _checkpoints(encoder):
        return _CHECKPOINTING
    if not pooling:
        return "it doesn't pool its tokens (global_pool=''): create it with global_pool='avg', or call reset_classifier(0, 'avg')"
    return None


# VisionTransformer


def _attention(attention: PromptAttention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Compute timm's ``Attention.forward`` with prompts; mask and causality apply to tokens only, every query sees the prompts."""
    if attn_mask is None and type(attention).forward is PromptAttention.forward:
        # prefixes were checked where the forward received them
        q, k, v = attention.queries_keys_values(x)
        out = prompt_attention(q, k, v, prefixes_of(attention), is_causal=is_causal, window=attention.window, impl=attention.impl)
        return attention.output(out, x)
    return type(attention).forward(attention, x, prefixes_of(attention), attn_mask=attn_mask, is_causal=is_causal)


def _as_prompt_attention(attention: nn.Module) -> PromptAttention:
    """Return a PromptAttention on the same parameters; its dropout is ignored, because a wrapped encoder is in eval mode."""
    if isinstance(attention, PromptAttention):
        return attention
    return PromptAttention.from_attention(attention, ignore_dropout=True)


def _vit_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [_layer(block, encoder.embed_dim) for block in encoder.blocks]


def _vit_problem(encoder: nn.Module) -> str | None:
    for index, block in enumerate(encoder.blocks):
        if method_of(block, "forward") != "timm.models.vision_transformer.Block.forward":
            return f"its blocks are {type(block).__name__}s; timm's plain Block is supported"
        if "forward" in vars(block.attn) and not isinstance(block.attn, PromptAttention):
            return f"the attention of its block {index} has a forward set on the object, which prompts would not pass through"
        try:
            _as_prompt_attention(block.attn)
        except (TypeError, ValueError) as error:
            return f"timm's plain Attention is supported, but that of its block {index} is not: {error}"
    return problem_of(encoder, encoder.global_pool)


def _vit_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean if encoder.cls_token is None else first_token


def _by_class_token(encoder: nn.Module, inputs: Inputs) -> Pool:
    if encoder.cls_token is None:
        raise ValueError(f"router_pooling is 'cls', but this {type(encoder).__name__} has no class token: use 'mean' or None")
    return first_token


def _by_patch_mean(encoder: nn.Module, inputs: Inputs) -> Pool:
    return patch_mean(encoder.num_prefix_tokens)


def _attach_vit(encoder: nn.Module) -> Callable[[nn.Module], None]:
    detach = functools.partial(_detach_vit, [block.attn for block in encoder.blocks])
    try:
        Front.wrap(encoder)
        for block in encoder.blocks:
            block.attn = _as_prompt_attention(block.attn)
            block.attn.forward = functools.partial(_attention, block.attn)
    except BaseException:  # including Ctrl-C
        detach(encoder)
        raise
    return detach


def _detach_vit(own: list[nn.Module], encoder: nn.Module) -> None:
    Front.unwrap(encoder)
    for block, attention in zip(encoder.blocks, own, strict=True):
        vars(block.attn).pop("forward", None)
        block.attn = attention


# SwinTransformer


_HOOKED = "one of its attentions has hooks, or a forward set on the object, which prompts would not pass through"


def _shifted_windows(block: nn.Module, x: Tensor) -> Tensor:
    """Compute timm's ``SwinTransformerBlock._attn`` on normed tokens (B, Hi, Wi, D); windows also see the prompts of their image.

    The projections run on the unchanged image: the roll, padding and partition that timm does before them are part of the
    attention here.
    """
    attention, prefixes = block.attn, prefixes_of(block.attn)
    if not prefixes:
        return type(block)._attn(block, x)
    if not is_plain(attention):
        raise RuntimeError(f"this Swin Transformer can't take prompts any more: {_HOOKED}; put the hooks on the block, qkv or proj")
    padded = any(size % window for size, window in zip(x.shape[1:3], block.window_size, strict=True))
    # padding is zeros after the norm, so its projection is that of zeros
    padding = attention.qkv(x.new_zeros(1, x.shape[-1]))[0].unflatten(-1, (3, attention.num_heads, -1)) if padded else None
    out = window_prompt_attention(
        attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)),
        prefixes,
        attention._get_rel_pos_bias()[0],
        window_size=block.window_size,
        shift_size=block.shift_size,
        pad_qkv=padding,
        scale=attention.scale,
    )
    return attention.proj_drop(attention.proj(out))


def _swin_blocks(encoder: nn.Module) -> list[nn.Module]:
    return [block for stage in encoder.layers for block in stage.blocks]


def _swin_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [_layer(block, block.dim) for block in _swin_blocks(encoder)]


def _swin_problem(encoder: nn.Module) -> str | None:
    for block in _swin_blocks(encoder):
        parts = ((block, "SwinTransformerBlock", "_attn"), (getattr(block, "attn", block), "WindowAttention", "forward"))
        for part, supported, other in parts:
            if any(method_of(part, name) != f"timm.models.swin_transformer.{supported}.{name}" for name in ("forward", other)):
                return f"it has a {type(part).__name__} in place of timm's {supported}"
        replaced = vars(block).get("_attn")
        if not is_plain(block.attn) or (replaced is not None and getattr(replaced, "func", None) is not _shifted_windows):
            return _HOOKED
    if not hasattr(encoder.head, "global_pool"):
        return (
            f"its head, which pools, was replaced by {type(encoder.head).__name__}: call reset_classifier(0) to drop the classifier"
        )
    return problem_of(encoder, encoder.head.global_pool.pool_type)


def _swin_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean


def _attach_swin(encoder: nn.Module) -> Callable[[nn.Module], None]:
    try:
        Front.wrap(encoder)
        for block in _swin_blocks(encoder):
            block._attn = functools.partial(_shifted_windows, block)
    except BaseException:  # including Ctrl-C
        _detach_swin(encoder)
        raise
    return _detach_swin


def _detach_swin(encoder: nn.Module) -> None:
    Front.unwrap(encoder)
    for block in _swin_blocks(encoder):
        vars(block).pop("_attn", None)


def _swin_feature_maps(encoder: nn.Module, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _features(encoder, inputs, maps=True)


_SWIN_V2 = (
    "Swin v2 compares queries and keys by their cosine, with a learned scale for each head, and norms after its layers: prompts "
    "as keys and values have no defined place there; use timm's SwinTransformer"
)


def patch_grid(encoder: nn.Module, inputs: Inputs) -> tuple[int, int]:
    """Return the number of rows and columns of an image's patches."""
    return encoder.patch_embed.dynamic_feat_size(inputs["x"].shape[-2:])


def _last_norm(encoder: nn.Module) -> nn.Module:
    return encoder.norm


COMMON: dict[str, Any] = {
    "input_name": "x", "feature": _feature, "feature_width": _feature_width, "run": _run, "last_norm": _last_norm,
}  # fmt: skip
register_encoder(
    EncoderFamily(
        name="timm_vit",
        models=("timm.models.vision_transformer.VisionTransformer",),
        layers=_vit_layers,
        pool=_vit_pool,
        attach=_attach_vit,
        problem=_vit_problem,
        pools={"cls": _by_class_token, "mean": _by_patch_mean},
        grid=patch_grid,
        **COMMON,
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
        pools={"mean": _swin_pool},
        feature_maps=_swin_feature_maps,
        **COMMON,
    )
)
for _model in (
    "timm.models.swin_transformer_v2.SwinTransformerV2",
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr",
    "transformers.models.swinv2.modeling_swinv2.Swinv2Model",
):
    refuse_encoder(_model, _SWIN_V2)
for _model in ("FeatureListNet", "FeatureGetterNet", "FeatureHookNet", "FeatureDictNet"):
    refuse_encoder(
        f"timm.models._features.{_model}",
        "it is a model created with features_only=True; pass the model itself (features_only=False) and use "
        "feature_maps=True in the forward",
    )
