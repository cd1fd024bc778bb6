"""transformers' encoders: prompts enter through its own attention interface, no model is changed.

``AttentionInterface`` gets our attention, ``AttentionMaskInterface`` a mask function that hands the (B, S) padding mask through
untouched, with a layer's window beside it: without one transformers passes no mask at all, and the stock ones build a 4-D mask and
wait for the device.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from .._dispatch import prompt_attention
from ..reference.attention import CAUSAL, UNLIMITED, Window
from .attachment import prefixes_of
from .families import EncoderFamily, Inputs, PromptedLayer, keys_and_values, register_encoder
from .pooling import Pool, first_token, last_real_token, masked_mean, patch_mean, token_at, token_mean

NAME = "mope_fast"


class _Mask(NamedTuple):
    """What the tokens of a layer that attends within a window see."""

    padding: Tensor | None
    """(B, S) bool, True = real."""
    window: Window


_OTHER_ATTENTION = {
    "softcap": "a cap on its products",
    "s_aux": "attention sinks",
    "position_bias": "a bias by position",
    "rel_pos": "a bias by position",
    "bias": "a bias",
}
"""What encoders may ask of transformers' attention that changes its result."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Mask | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (B, H, S, Dh) in, (B, S, H, Dh) out; keys and values may have fewer heads."""
    window, prefixes = None, prefixes_of(module)
    if isinstance(attention_mask, _Mask):
        attention_mask, window = attention_mask
    elif kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"{type(module).__name__} attends within a window of {kwargs['sliding_window']} tokens, but the mask that it was given "
            "has none: what it sees can't be told"
        )
    for name, meaning in _OTHER_ATTENTION.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}, {meaning}, which attention with prompts does not have")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, S), True = real; got {tuple(attention_mask.shape)}")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    is_causal = is_causal and window is None  # a mask with a window says all of it
    # what fits needs no check; the public function says what doesn't
    fits = all(prefix[0].shape[1] == key.shape[1] and prefix[0].shape[3] == key.shape[3] for prefix in prefixes) and (
        attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape == (key.shape[0], key.shape[2]))
    )
    attend = prompt_attention if fits else functional.prompt_attention
    masking = {"is_causal": is_causal, "window": window, "key_padding_mask": attention_mask}
    return attend(query, key, value, prefixes, scale=scaling, **masking).transpose(1, 2), None


def _mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    **kwargs: Any,
) -> Tensor | _Mask | None:
    """The (B, S) mask as it is, with the window that transformers' function of places leaves, if it leaves one."""
    # not getattr with a default, which Dynamo gives for every function within a function
    kind = "" if mask_function is None or isinstance(mask_function, functools.partial) else mask_function.__qualname__
    if mask_function is None or kind == "bidirectional_mask_function":
        return attention_mask
    if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise ValueError("an encoder that takes prompts can't fill a static cache: unwrap() it first, or use a dynamic one")
    return _Mask(attention_mask, _window_of(mask_function))


_UNKNOWN = "a layer of this encoder has a mask by {}, which attention with prompts does not have"


def _window_of(function: Callable[..., Any]) -> Window:
    """(left, right) of one of transformers' functions of places.

    Raises:
        ValueError: it is none of those that are known to leave a window.
    """
    if isinstance(function, functools.partial):
        raise ValueError(_UNKNOWN.format("partial"))
    name = function.__qualname__.removesuffix(".<locals>.inner_mask")
    if name == "causal_mask_function":
        return CAUSAL
    if name == "bidirectional_mask_function":
        return UNLIMITED
    inside = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"):
        limits = zip(*map(_window_of, inside["mask_functions"].cell_contents), strict=True)
        return tuple(_strictest(each) if name.startswith("and") else _widest(each) for each in limits)
    if name == "Gemma3TextModel.forward.<locals>.<lambda>":  # joined to the causal one it lets all be seen
        return UNLIMITED
    if name in _WINDOWS:
        return _WINDOWS[name](inside["sliding_window"].cell_contents)
    if "packed_sequence" in name:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # then transformers takes any position_ids for packed ones
            return _window_of(inside["mask_function"].cell_contents) if "mask_function" in inside else UNLIMITED
        raise ValueError(
            "position_ids jump and there is no attention_mask: transformers takes that for several sequences packed into one, "
            "which can't have prompts of their own; pass an attention_mask"
        )
    raise ValueError(_UNKNOWN.format(name))


_WINDOWS: dict[str, Callable[[int], Window]] = {
    "sliding_window_overlay": lambda size: (size - 1, None),
    "sliding_window_bidirectional_overlay": lambda size: (size, size),
    "_bidirectional_window_overlay": lambda size: (size - 1, size - 1),
}
"""transformers' functions of places, by the name of what makes them, and how far each lets a token see."""


def _strictest(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _widest(limits: Sequence[int | None]) -> int | None:
    return None if None in limits else max(limits)


def _replace_config(old: Any, new: Any, encoder: nn.Module) -> None:
    """In the encoder and all its parts that have the old one."""
    for module in encoder.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def _register_interfaces() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attach(encoder: nn.Module) -> Callable[[nn.Module], None]:
    # a config of its own: the user's may be a decoder's or another encoder's too
    config, ours = encoder.config, copy.copy(encoder.config)
    undo = functools.partial(_replace_config, ours, config)
    try:
        _replace_config(config, ours, encoder)
        encoder.set_attn_implementation(NAME)
    except BaseException:  # a Ctrl-C too
        undo(encoder)
        raise
    return undo


def _hidden_size(encoder: nn.Module) -> int:
    return encoder.config.hidden_size


def _by_class_token(encoder: nn.Module, inputs: Inputs) -> Pool:
    return first_token


def _by_mean(encoder: nn.Module, inputs: Inputs) -> Pool:
    return token_mean


def _by_masked_mean(encoder: nn.Module, inputs: Inputs) -> Pool:
    return masked_mean(inputs.get("attention_mask"))


def _by_patch_mean(class_tokens: int, encoder: nn.Module, inputs: Inputs) -> Pool:
    if (mask := inputs.get("attention_mask")) is None:
        return patch_mean(class_tokens)
    return masked_mean(F.pad(mask[:, class_tokens:].bool(), (class_tokens, 0)))


def _by_last_token(encoder: nn.Module, inputs: Inputs) -> Pool:
    return last_real_token(inputs.get("attention_mask"))


def _tokens(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return output.last_hidden_state


def _class_token(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return output.last_hidden_state[:, 0]


def _pooler_output(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return output.pooler_output


def _mean(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return token_mean(output.last_hidden_state)


def _masked_mean(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return _by_masked_mean(encoder, inputs)(output.last_hidden_state)


# BERT, RoBERTa


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


# DistilBERT


def _distilbert_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            layer, layer.attention, encoder.config.dim, None,
            layer.attention.k_lin, layer.attention.v_lin, layer.attention.n_heads,
        )
        for layer in encoder.transformer.layer
    ]  # fmt: skip


# ViT, DeiT, DINOv2


def _vit_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            layer, layer.attention, encoder.config.hidden_size, layer.layernorm_before,
            layer.attention.k_proj, layer.attention.v_proj, layer.attention.num_attention_heads,
        )
        for layer in encoder.layers
    ]  # fmt: skip


def _dinov2_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    layers = []
    for layer in encoder.encoder.layer:
        # until transformers 5.17 the projections are one level deeper and have other names
        attention = getattr(layer.attention, "attention", layer.attention)
        k_proj = getattr(attention, "k_proj", None) or attention.key
        v_proj = getattr(attention, "v_proj", None) or attention.value
        heads = attention.num_attention_heads
        layers.append(PromptedLayer(layer, attention, encoder.config.hidden_size, layer.norm1, k_proj, v_proj, heads))
    return layers


# CLIP, SigLIP


def _clip_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            layer, layer.self_attn, encoder.config.hidden_size, layer.layer_norm1,
            layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.num_heads,
        )
        for layer in encoder.encoder.layers
    ]  # fmt: skip


def _clip_text_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    ids = inputs["input_ids"]
    # as CLIPTextModel finds it: in old configurations the end of text is the largest id, not eos_token_id
    return token_at((ids if encoder.config.eos_token_id == 2 else ids == encoder.config.eos_token_id).int().argmax(1))


def _clip_vision_tokens(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    # transformers norms the class token alone
    return encoder.post_layernorm(output.last_hidden_state)


def _siglip_feature(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return token_mean(output.last_hidden_state) if output.pooler_output is None else output.pooler_output


# Whisper, BART


def _d_model(encoder: nn.Module) -> int:
    return encoder.config.d_model


def _layers_behind_a_norm(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [replace(layer, norm=layer.module.self_attn_layer_norm) for layer in _layers_before_a_norm(encoder)]


def _layers_before_a_norm(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            layer, layer.self_attn, encoder.config.d_model, None,
            layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.num_heads,
        )
        for layer in encoder.layers
    ]  # fmt: skip


# wav2vec2, HuBERT


def _wav2vec2_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    pre_norm = encoder.config.do_stable_layer_norm
    return [
        PromptedLayer(
            layer, layer.attention, encoder.config.hidden_size, layer.layer_norm if pre_norm else None,
            layer.attention.k_proj, layer.attention.v_proj, layer.attention.num_heads,
        )
        for layer in encoder.encoder.layers
    ]  # fmt: skip


def _wav2vec2_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    mask, config = inputs.get("attention_mask"), encoder.config
    if mask is None:
        return token_mean
    frames = inputs["input_values"].shape[1]
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
    # the adapter, which only wav2vec2 can have, shortens the sequence behind the last layer
    no_adapter = {"add_adapter": False} if _has_adapter(encoder) else {}
    return masked_mean(_real_frames(encoder, frames, mask, **no_adapter))


def _wav2vec2_feature(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    tokens, mask = output.last_hidden_state, inputs.get("attention_mask")
    return masked_mean(None if mask is None else _real_frames(encoder, tokens.shape[1], mask))(tokens)


def _attach_wav2vec2(encoder: nn.Module) -> Callable[[nn.Module], None]:
    detach = _attach(encoder)
    # the library's own sets ones through an index, which copies them from the host, and that waits for the device
    encoder._get_feature_vector_attention_mask = functools.partial(_real_frames, encoder)
    return functools.partial(_detach_wav2vec2, detach)


def _detach_wav2vec2(detach: Callable[[nn.Module], None], encoder: nn.Module) -> None:
    detach(encoder)
    vars(encoder).pop("_get_feature_vector_attention_mask", None)


def _real_frames(encoder: nn.Module, frames: int, mask: Tensor, add_adapter: bool | None = None) -> Tensor:
    """Which of the frames see real samples only, (B, frames) bool."""
    more = {} if add_adapter is None else {"add_adapter": add_adapter}
    lengths = encoder._get_feat_extract_output_lengths(mask.sum(-1), **more)
    return torch.arange(frames, device=mask.device) < lengths[:, None]


def _has_adapter(encoder: nn.Module) -> bool:
    return getattr(encoder.config, "add_adapter", False)


def _wav2vec2_feature_width(encoder: nn.Module) -> int:
    return encoder.config.output_hidden_size if _has_adapter(encoder) else encoder.config.hidden_size


# GPT-2


def _gpt2_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    return [
        PromptedLayer(
            layer, layer.attn, encoder.config.hidden_size, layer.ln_1,
            functools.partial(keys_and_values, layer.attn.c_attn), None, layer.attn.num_heads,
        )
        for layer in encoder.h
    ]  # fmt: skip


def _gpt2_run(encoder: nn.Module, inputs: Inputs) -> Any:
    given = {name: value for name, value in inputs.items() if value is not None}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is not None and not {"attention_mask", "position_ids", "past_key_values"} & set(given):
        # without a mask transformers looks for padding and for packed sequences, and waits for the device to tell
        inputs = {**inputs, "attention_mask": tokens.new_ones(tokens.shape[:2], dtype=torch.bool)}
    return encoder(**{"use_cache": False, **inputs})


def _last_token(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return _by_last_token(encoder, inputs)(output.last_hidden_state)


def _register(name: str, model: str, input_name: str, *, module: str | None = None, **facts: Any) -> None:
    module = name if module is None else module
    defaults = {"attach": _attach, "setup": _register_interfaces, "feature_width": _hidden_size, "tokens": _tokens}
    models = (f"transformers.models.{module}.modeling_{module}.{model}",)
    register_encoder(EncoderFamily(name=name, models=models, input_name=input_name, **{**defaults, **facts}))


_CLASS_TOKEN = {"pool": _by_class_token, "feature": _class_token}
_TEXT = {"pools": {"cls": _by_class_token, "mean": _by_masked_mean, "last": _by_last_token}}
_IMAGE = {"pools": {"cls": _by_class_token, "mean": functools.partial(_by_patch_mean, 1)}}
_DISTILLED = {"pools": {"cls": _by_class_token, "mean": functools.partial(_by_patch_mean, 2)}}
_register("bert", "BertModel", "input_ids", layers=_bert_layers, problem=_bert_problem, **_CLASS_TOKEN, **_TEXT)
_register("roberta", "RobertaModel", "input_ids", layers=_bert_layers, problem=_bert_problem, **_CLASS_TOKEN, **_TEXT)
_register("distilbert", "DistilBertModel", "input_ids", layers=_distilbert_layers, **_CLASS_TOKEN, **_TEXT)
_register("vit", "ViTModel", "pixel_values", layers=_vit_layers, **_CLASS_TOKEN, **_IMAGE)
_register("deit", "DeiTModel", "pixel_values", layers=_vit_layers, **_CLASS_TOKEN, **_DISTILLED)
_register("dinov2", "Dinov2Model", "pixel_values", layers=_dinov2_layers, **_CLASS_TOKEN, **_IMAGE)
_register(
    "clip_vision", "CLIPVisionModel", "pixel_values",
    module="clip", layers=_clip_layers, pool=_by_class_token, feature=_pooler_output, tokens=_clip_vision_tokens, **_IMAGE,
)  # fmt: skip
_register(
    "clip_text", "CLIPTextModel", "input_ids",
    module="clip", layers=_clip_layers, pool=_clip_text_pool, feature=_pooler_output,
    pools={"mean": _by_masked_mean, "last": _clip_text_pool},
)  # fmt: skip
_register(
    "siglip_vision", "SiglipVisionModel", "pixel_values",
    module="siglip", layers=_clip_layers, pool=_by_mean, feature=_siglip_feature, pools={"mean": _by_mean},
)  # fmt: skip
_register(
    "whisper", "WhisperEncoder", "input_features",
    layers=_layers_behind_a_norm, pool=_by_mean, feature=_mean, feature_width=_d_model, pools={"mean": _by_mean},
)  # fmt: skip
_register(
    "bart", "BartEncoder", "input_ids",
    layers=_layers_before_a_norm, pool=_by_masked_mean, feature=_masked_mean, feature_width=_d_model, **_TEXT,
)  # fmt: skip
for _name, _model in (("wav2vec2", "Wav2Vec2Model"), ("hubert", "HubertModel")):
    _register(
        _name, _model, "input_values",
        layers=_wav2vec2_layers, pool=_wav2vec2_pool, feature=_wav2vec2_feature, feature_width=_wav2vec2_feature_width,
        attach=_attach_wav2vec2, tokens=None,
    )  # fmt: skip
_register(
    "gpt2", "GPT2Model", "input_ids",
    layers=_gpt2_layers, pool=_by_last_token, feature=_last_token, run=_gpt2_run,
    pools={"mean": _by_masked_mean, "last": _by_last_token},
)  # fmt: skip
