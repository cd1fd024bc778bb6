"""transformers' encoders, one entry each: where a layer's attention, norm and projections are, and how tokens are pooled."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .families import (
    EncoderFamily,
    Inputs,
    PromptedLayer,
    keys_and_values,
    no_problem,
    nothing,
    refuse_encoder,
    register_encoder,
    registered_family,
)
from .pooling import Pool, first_token, last_real_token, masked_mean, patch_mean, token_at, token_mean
from .transformers_attention import attach, register_interfaces
from .transformers_forwards import mpnet_attention, replace_in, wavlm_attention

Layers = Callable[[nn.Module], Sequence[PromptedLayer]]


def layers_at(
    layers: str, *, attention: str, keys: str, values: str | None = None, norm: str | None = None, key_norm: str | None = None
) -> Layers:
    """Return a function that collects the facts of an encoder's layers by the names of its modules.

    For the arguments see :func:`register_transformers_encoder`.
    """
    return functools.partial(_layers_at, layers, attention, keys, values, norm, key_norm)


def _layers_at(
    layers: str, attention: str, keys: str, values: str | None, norm: str | None, key_norm: str | None, encoder: nn.Module
) -> list[PromptedLayer]:
    config = encoder.config
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group = config.num_attention_heads // key_heads
    found = []
    for layer in encoder.get_submodule(layers):
        k_proj: Callable[[Tensor], Tensor] = layer.get_submodule(keys)
        if values is None:
            k_proj = functools.partial(keys_and_values, k_proj, group=group)
        found.append(
            PromptedLayer(
                layer, layer.get_submodule(attention), config.hidden_size, _norm_at(layer, norm),
                k_proj, None if values is None else layer.get_submodule(values), key_heads, _norm_at(layer, key_norm),
            )
        )  # fmt: skip
    return found


def _norm_at(layer: nn.Module, name: str | None) -> nn.Module | None:
    """Return the norm of this name; None without a name or for an identity, which ModernBERT's first layer has."""
    norm = None if name is None else layer.get_submodule(name)
    return None if isinstance(norm, nn.Identity) else norm


def register_transformers_encoder(
    name: str,
    model: type[nn.Module] | str,
    *,
    like: str | None = None,
    layers: str | Layers | None = None,
    attention: str | None = None,
    keys: str | None = None,
    values: str | None = None,
    norm: str | None = None,
    key_norm: str | None = None,
    input_name: str | None = None,
    pooling: str | None = None,
    **facts: Any,
) -> None:
    """Register an encoder of transformers whose layers call its attention interface; it then takes prompts without more code.

    Call it where the encoder is created, in every process. :func:`mope_fast.check_encoder` checks whether the facts are right.

    Args:
        name: name of the family, used in messages and saved files.
        model: the class, or its full name, "package.module.Class".
        like: name of a registered family, whose facts are used for every argument that is not given here.
        layers: name of the list of layers within the encoder, as "encoder.layer"; or a function, encoder -> facts of its layers.
        attention: name, within a layer, of the module that calls the interface.
        keys, values: names, within a layer, of the projections to keys and values. Without ``values``, ``keys`` names a packed
            projection to queries, keys and values.
        norm: name, within a layer, of the norm between the layer's input and these projections; None for a post-norm layer. The
            names within a layer belong to the name in ``layers``: with ``like`` give all of them or none.
        key_norm: name, within a layer, of a norm that is applied to keys after the projection; None for no such norm.
        input_name: the keyword that a bare tensor is passed as: "input_ids", "pixel_values", ...
        pooling: how the feature and the router pool tokens: "cls", "mean" (over real tokens) or "last" (last real token).
        facts: other fields of :class:`EncoderFamily`: ``problem``, ``run``, ``feature``, ``tokens``, ``pools``, ...

    Raises:
        ValueError: neither ``like`` nor all of the layers, ``input_name`` and ``pooling`` are given; a layer's modules are named
            without the name of the list of layers; or the pooling is unknown.
        RuntimeError: ``like`` is not a registered family.

    Examples:
        >>> register_transformers_encoder("electra", ElectraModel, like="bert")
        >>> register_transformers_encoder(
        ...     "llama", LlamaModel, like="gpt2", layers="layers", attention="self_attn", norm="input_layernorm",
        ...     keys="self_attn.k_proj", values="self_attn.v_proj",
        ... )
    """
    names = {"attention": attention, "keys": keys, "values": values, "norm": norm, "key_norm": key_norm}
    if (given := [fact for fact, value in names.items() if value is not None]) and not isinstance(layers, str):
        raise ValueError(
            f"{', '.join(given)} can't be found without the name of the list of layers: pass layers='encoder.layer' too"
        )
    full_name = model if isinstance(model, str) else f"{model.__module__}.{model.__qualname__}"
    given = {**({} if input_name is None else {"input_name": input_name}), **facts}
    if isinstance(layers, str):
        if attention is None or keys is None:
            raise ValueError("register_transformers_encoder needs attention and keys together with the name of the layers")
        layers = layers_at(layers, attention=attention, keys=keys, values=values, norm=norm, key_norm=key_norm)
    if layers is not None:
        given["layers"] = layers
    if pooling is not None:
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling must be one of {list(_POOLINGS)}, got {pooling!r}")
        given |= {**_POOLINGS[pooling], **given}
    if like is not None:
        register_encoder(replace(registered_family(like), name=name, models=(full_name,), **given))
        return
    if missing := [fact for fact in ("layers", "input_name", "pool", "feature") if fact not in given]:
        raise ValueError(f"register_transformers_encoder needs like=, or {', '.join(missing).replace('pool, feature', 'pooling')}")
    defaults = {"attach": attach, "setup": register_interfaces, "feature_width": _hidden_size, "tokens": _tokens}
    pools = _TEXT if given["input_name"] == "input_ids" else {}
    register_encoder(EncoderFamily(name=name, models=(full_name,), **{**defaults, **pools, **given}))


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


def _pooler_output(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return output.pooler_output


def _pooled(pool: Callable[[nn.Module, Inputs], Pool]) -> dict[str, Any]:
    """Use one pool for the router and the feature."""
    return {"pool": pool, "feature": functools.partial(_pooled_tokens, pool)}


def _pooled_tokens(pool: Callable[[nn.Module, Inputs], Pool], encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return pool(encoder, inputs)(output.last_hidden_state)


_POOLINGS = {"cls": _pooled(_by_class_token), "mean": _pooled(_by_masked_mean), "last": _pooled(_by_last_token)}
_TEXT = {"pools": {"cls": _by_class_token, "mean": _by_masked_mean, "last": _by_last_token}}


def _image_pools(class_tokens: int) -> dict[str, Any]:
    return {"cls": _by_class_token, "mean": functools.partial(_by_patch_mean, class_tokens)}


def _bert_problem(encoder: nn.Module) -> str | None:
    is_decoder = getattr(encoder.config, "is_decoder", False)
    return "it is a decoder (config.is_decoder); load it with is_decoder=False" if is_decoder else None


def _dinov2_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    # until transformers 5.17 the projections are one level deeper and have other names
    deep = hasattr(encoder.encoder.layer[0].attention, "attention")
    attention, keys, values = ("attention.attention", "key", "value") if deep else ("attention", "k_proj", "v_proj")
    at = layers_at("encoder.layer", attention=attention, norm="norm1", keys=f"{attention}.{keys}", values=f"{attention}.{values}")
    return at(encoder)


def _clip_text_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    ids = inputs["input_ids"]
    # found as in CLIPTextModel: in old configurations the end of text is the largest id, not eos_token_id
    return token_at((ids if encoder.config.eos_token_id == 2 else ids == encoder.config.eos_token_id).int().argmax(1))


def _patch_grid(encoder: nn.Module, inputs: Inputs) -> tuple[int, int]:
    size, patch = inputs["pixel_values"].shape[-2:], encoder.config.patch_size
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return size[0] // rows, size[1] // columns


def _clip_vision_tokens(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    # transformers applies this norm to the class token only
    return encoder.post_layernorm(output.last_hidden_state)


def _siglip_feature(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return token_mean(output.last_hidden_state) if output.pooler_output is None else output.pooler_output


def _wav2vec2_layers(encoder: nn.Module) -> Sequence[PromptedLayer]:
    norm = "layer_norm" if encoder.config.do_stable_layer_norm else None
    return layers_at(
        "encoder.layers", attention="attention", norm=norm, keys="attention.k_proj", values="attention.v_proj"
    )(encoder)  # fmt: skip


def _wav2vec2_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    mask, config = inputs.get("attention_mask"), encoder.config
    if mask is None:
        return token_mean
    frames = inputs["input_values"].shape[1]
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        frames = (frames - kernel) // stride + 1
    # the adapter, which only wav2vec2 can have, shortens the sequence after the last layer
    no_adapter = {"add_adapter": False} if _has_adapter(encoder) else {}
    return masked_mean(_real_frames(encoder, frames, mask, **no_adapter))


def _wav2vec2_feature(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    tokens, mask = output.last_hidden_state, inputs.get("attention_mask")
    return masked_mean(None if mask is None else _real_frames(encoder, tokens.shape[1], mask))(tokens)


def _attach_wav2vec2(attach_layers: Callable[[nn.Module], Any], encoder: nn.Module) -> Callable[[nn.Module], None]:
    detach = attach_layers(encoder)
    # transformers' own method sets ones through an index: it copies them from the host, which waits for the device
    encoder._get_feature_vector_attention_mask = functools.partial(_real_frames, encoder)
    return functools.partial(_detach_wav2vec2, detach)


def _detach_wav2vec2(detach: Callable[[nn.Module], None], encoder: nn.Module) -> None:
    detach(encoder)
    vars(encoder).pop("_get_feature_vector_attention_mask", None)


def _real_frames(encoder: nn.Module, frames: int, mask: Tensor, add_adapter: bool | None = None) -> Tensor:
    """Return (B, frames) bool, True for frames that see real samples only."""
    more = {} if add_adapter is None else {"add_adapter": add_adapter}
    lengths = encoder._get_feat_extract_output_lengths(mask.sum(-1), **more)
    return torch.arange(frames, device=mask.device) < lengths[:, None]


def _has_adapter(encoder: nn.Module) -> bool:
    return getattr(encoder.config, "add_adapter", False)


def _wav2vec2_feature_width(encoder: nn.Module) -> int:
    return encoder.config.output_hidden_size if _has_adapter(encoder) else encoder.config.hidden_size


def _decoder_run(encoder: nn.Module, inputs: Inputs) -> Any:
    given = {name: value for name, value in inputs.items() if value is not None}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if tokens is not None and not {"attention_mask", "position_ids", "past_key_values"} & set(given):
        # without a mask transformers looks for padding and for packed sequences, which waits for the device
        inputs = {**inputs, "attention_mask": tokens.new_ones(tokens.shape[:2], dtype=torch.bool)}
    return encoder(**{"use_cache": False, **inputs})


def _register(name: str, model: str, module: str | None = None, **facts: Any) -> None:
    register_transformers_encoder(name, _full_name(name if module is None else module, model), **facts)


def _full_name(module: str, model: str) -> str:
    """Return the full name of a model in the file named after its folder, or in the file that ``module`` names."""
    file = module if "." in module else f"{module}.modeling_{module}"
    return f"transformers.models.{file}.{model}"


_BERT_LAYERS = layers_at("encoder.layer", attention="attention.self", keys="attention.self.key", values="attention.self.value")
_VIT_LAYERS = layers_at(
    "layers", attention="attention", norm="layernorm_before", keys="attention.k_proj", values="attention.v_proj"
)  # fmt: skip
_CLIP_LAYERS = layers_at(
    "encoder.layers", attention="self_attn", norm="layer_norm1", keys="self_attn.k_proj", values="self_attn.v_proj"
)  # fmt: skip
_BART_LAYERS = layers_at("layers", attention="self_attn", keys="self_attn.k_proj", values="self_attn.v_proj")
_WHISPER_LAYERS = layers_at(
    "layers", attention="self_attn", norm="self_attn_layer_norm", keys="self_attn.k_proj", values="self_attn.v_proj"
)  # fmt: skip


_register("bert", "BertModel", layers=_BERT_LAYERS, input_name="input_ids", pooling="cls", problem=_bert_problem)
_register("roberta", "RobertaModel", like="bert")
_register(
    "distilbert", "DistilBertModel", like="bert", problem=no_problem,
    layers="transformer.layer", attention="attention", keys="attention.k_lin", values="attention.v_lin",
)  # fmt: skip
_register(
    "vit", "ViTModel", layers=_VIT_LAYERS, input_name="pixel_values", pooling="cls", pools=_image_pools(1), grid=_patch_grid
)  # fmt: skip
_register("deit", "DeiTModel", like="vit", pools=_image_pools(2))
_register("dinov2", "Dinov2Model", like="vit", layers=_dinov2_layers)
_register(
    "clip_vision", "CLIPVisionModel", "clip", like="vit", layers=_CLIP_LAYERS, feature=_pooler_output, tokens=_clip_vision_tokens
)  # fmt: skip
_register(
    "clip_text", "CLIPTextModel", "clip", layers=_CLIP_LAYERS, input_name="input_ids", pool=_clip_text_pool,
    feature=_pooler_output, pools={"mean": _by_masked_mean, "last": _clip_text_pool},
)  # fmt: skip
_register(
    "siglip_vision", "SiglipVisionModel", "siglip", layers=_CLIP_LAYERS, input_name="pixel_values", pool=_by_mean,
    feature=_siglip_feature, pools={"mean": _by_mean}, grid=_patch_grid,
)  # fmt: skip
_register(
    "whisper", "WhisperEncoder", layers=_WHISPER_LAYERS, input_name="input_features", **_pooled(_by_mean),
    pools={"mean": _by_mean},
)  # fmt: skip
_register("bart", "BartEncoder", layers=_BART_LAYERS, input_name="input_ids", pooling="mean")
_register(
    "wav2vec2", "Wav2Vec2Model", layers=_wav2vec2_layers, input_name="input_values", pool=_wav2vec2_pool,
    feature=_wav2vec2_feature, feature_width=_wav2vec2_feature_width,
    attach=functools.partial(_attach_wav2vec2, attach),
)  # fmt: skip
_register("hubert", "HubertModel", like="wav2vec2")
_register(
    "gpt2", "GPT2Model", layers="h", attention="attn", norm="ln_1", keys="attn.c_attn", input_name="input_ids", pooling="last",
    run=_decoder_run, pools={"mean": _by_masked_mean, "last": _by_last_token},
)  # fmt: skip


_VIDEOMAE_LAYERS = layers_at(
    "encoder.layer", attention="attention.attention", norm="layernorm_before", keys="attention.attention.key",
    values="attention.attention.value",
)  # fmt: skip


def _projection_width(encoder: nn.Module) -> int:
    return encoder.head.out_features


def _by_registers_patch_mean(encoder: nn.Module, inputs: Inputs) -> Pool:
    return patch_mean(1 + encoder.config.num_register_tokens)


def _beit_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return patch_mean(1) if encoder.config.use_mean_pooling else first_token


def _beit_tokens(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    # with mean pooling transformers applies the norm to the mean only
    norm = encoder.pooler.layernorm if encoder.config.use_mean_pooling else nn.Identity()
    return norm(output.last_hidden_state)


def _beit_problem(encoder: nn.Module) -> str | None:
    return "its tokens have no norm without the pooling layer (add_pooling_layer=False)" if encoder.pooler is None else None


def _modernbert_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return _by_masked_mean(encoder, inputs) if encoder.config.classifier_pooling == "mean" else first_token


def _eurobert_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return first_token if encoder.config.classifier_pooling == "bos" else _by_masked_mean(encoder, inputs)


def _gemma3_pool(encoder: nn.Module, inputs: Inputs) -> Pool:
    return _by_masked_mean(encoder, inputs) if encoder.config.use_bidirectional_attention else _by_last_token(encoder, inputs)


def _gemma2_problem(encoder: nn.Module) -> str | None:
    cap = encoder.config.attn_logit_softcapping
    return (
        None
        if cap is None
        else f"its attention caps its logits (attn_logit_softcapping={cap}), which attention with prompts does not support"
    )


def _vit_mae_problem(encoder: nn.Module) -> str | None:
    return "it hides patches at random (config.mask_ratio): load it with mask_ratio=0" if encoder.config.mask_ratio else None


def _by_real_patches(encoder: nn.Module, inputs: Inputs) -> Pool:
    return masked_mean(inputs["pixel_attention_mask"])


def _siglip2_feature(encoder: nn.Module, output: Any, inputs: Inputs) -> Tensor:
    return _by_real_patches(encoder, inputs)(output.last_hidden_state) if output.pooler_output is None else output.pooler_output


def _attach_siglip2(encoder: nn.Module) -> Callable[[nn.Module], None]:
    config, detach = encoder.config, attach(encoder)
    if encoder.use_head:  # the head builds its own mask, for another attention implementation
        encoder.head.config = config
    return detach


def _by_last_position(encoder: nn.Module, inputs: Inputs) -> Pool:
    return last_real_token(None)


# the same layers under other names
for _name, _model, _module in (
    ("camembert", "CamembertModel", None), ("data2vec_text", "Data2VecTextModel", "data2vec.modeling_data2vec_text"),
    ("electra", "ElectraModel", None), ("ernie", "ErnieModel", None), ("xlm_roberta", "XLMRobertaModel", None),
):  # fmt: skip
    _register(_name, _model, _module, like="bert")
_register("vit_mae", "ViTMAEModel", like="vit", problem=_vit_mae_problem, grid=None)  # its patches are shuffled
_register("vit_msn", "ViTMSNModel", like="vit")
_register(
    "roberta_prelayernorm", "RobertaPreLayerNormModel", like="bert", layers="encoder.layer", attention="attention.self",
    norm="attention.LayerNorm", keys="attention.self.key", values="attention.self.value",
)  # fmt: skip
_register(
    "ast", "ASTModel", "audio_spectrogram_transformer", like="deit", input_name="input_values", feature=_pooler_output, grid=None
)  # fmt: skip
_REGISTERS = {"cls": _by_class_token, "mean": _by_registers_patch_mean}
_register("dinov2_with_registers", "Dinov2WithRegistersModel", like="dinov2", pools=_REGISTERS)

_register(
    "xlm_roberta_xl", "XLMRobertaXLModel", like="bert", layers="encoder.layer", attention="attention.self",
    norm="attention.self_attn_layer_norm", keys="attention.self.key", values="attention.self.value",
)  # fmt: skip
_register(
    "modernbert", "ModernBertModel", layers="layers", attention="attn", norm="attn_norm", keys="attn.Wqkv", input_name="input_ids",
    **_pooled(_modernbert_pool),
)  # fmt: skip
_LLAMA = {
    "layers": "layers", "attention": "self_attn", "norm": "input_layernorm", "keys": "self_attn.k_proj",
    "values": "self_attn.v_proj",
}  # fmt: skip
_register("eurobert", "EuroBertModel", input_name="input_ids", **_pooled(_eurobert_pool), **_LLAMA)
for _name, _model in (("llama", "LlamaModel"), ("mistral", "MistralModel"), ("qwen2", "Qwen2Model")):
    _register(_name, _model, like="gpt2", **_LLAMA)
_register("gemma2", "Gemma2Model", like="gpt2", problem=_gemma2_problem, **_LLAMA)
_register("gemma3", "Gemma3TextModel", like="gpt2", key_norm="self_attn.k_norm", **_pooled(_gemma3_pool), **_LLAMA)
_register("qwen3", "Qwen3Model", like="gpt2", key_norm="self_attn.k_norm", **_LLAMA)
_T5 = {
    "layers": "encoder.block", "attention": "layer.0.SelfAttention", "norm": "layer.0.layer_norm",
    "keys": "layer.0.SelfAttention.k", "values": "layer.0.SelfAttention.v",
}  # fmt: skip
_T5_POOLS = {"mean": _by_masked_mean, "last": _by_last_token}
_register("t5", "T5EncoderModel", input_name="input_ids", pooling="mean", pools=_T5_POOLS, **_T5)
for _name, _model in (("mt5", "MT5EncoderModel"), ("umt5", "UMT5EncoderModel")):
    _register(_name, _model, like="t5")
_register(
    "esm", "EsmModel", like="bert", layers="encoder.layer", attention="attention.self", norm="attention.LayerNorm",
    keys="attention.self.key", values="attention.self.value",
)  # fmt: skip
_register(
    "dinov3", "DINOv3ViTModel", "dinov3_vit", like="vit", pools=_REGISTERS, layers="model.layer", attention="attention",
    norm="norm1", keys="attention.k_proj", values="attention.v_proj",
)  # fmt: skip
_register("beit", "BeitModel", like="vit", pool=_beit_pool, feature=_pooler_output, tokens=_beit_tokens, problem=_beit_problem)
_register(
    "siglip2_vision",
    "Siglip2VisionModel",
    "siglip2",
    like="siglip_vision",
    pool=_by_real_patches,
    feature=_siglip2_feature,
    attach=_attach_siglip2,
    pools={"mean": _by_real_patches},
    grid=None,
)
_register(
    "siglip_text", "SiglipTextModel", "siglip", like="clip_text", pool=_by_last_position, pools={"mean": _by_masked_mean},
    feature_width=_projection_width, tokens_width=_hidden_size,
)  # fmt: skip
_register("siglip2_text", "Siglip2TextModel", "siglip2", like="siglip_text")
_register(
    "videomae", "VideoMAEModel", like="vit", layers=_VIDEOMAE_LAYERS, **_pooled(_by_mean), pools={"mean": _by_mean}, grid=None
)  # fmt: skip
_register("vivit", "VivitModel", like="vit", grid=None)
_register(
    "data2vec_audio",
    "Data2VecAudioModel",
    "data2vec.modeling_data2vec_audio",
    like="wav2vec2",
    layers=layers_at("encoder.layers", attention="attention", keys="attention.k_proj", values="attention.v_proj"),
)

_register(
    "mpnet", "MPNetModel", like="bert", problem=no_problem, setup=nothing,
    layers="encoder.layer", attention="attention.attn", keys="attention.attn.k", values="attention.attn.v",
    attach=replace_in("encoder.layer", "attention.attn", "forward", mpnet_attention),
)  # fmt: skip
_WAVLM = replace_in("encoder.layers", "attention", "torch_multi_head_self_attention", wavlm_attention)
_register("wavlm", "WavLMModel", like="wav2vec2", setup=nothing, attach=functools.partial(_attach_wav2vec2, _WAVLM))

_NO_INTERFACE = "its attention doesn't go through transformers' attention interface, where prompts enter"
_ONE_MODULE = "its layers are one module that is called repeatedly, and each layer needs prompts of its own"
_LOCAL = "its attention is computed in blocks, which have no keys that every token sees"
_BY_CONTENT = f"{_NO_INTERFACE}, and its bias depends on content and distance, but a prompt has no distance"
_CONVOLUTIONS = (
    "convolutions within its layers mix neighbouring positions, so a prompt before the tokens would reach them around the attention"
)
for _module, _models, _reason in (
    ("albert", ("AlbertModel",), _ONE_MODULE),
    ("big_bird", ("BigBirdModel",), _LOCAL),
    ("clap", ("ClapAudioModel", "ClapAudioEncoder"), "it attends in windows of an image, like Swin; use timm's SwinTransformer"),
    ("convbert", ("ConvBertModel",), _CONVOLUTIONS),
    ("data2vec.modeling_data2vec_vision", ("Data2VecVisionModel",), f"{_NO_INTERFACE}; use BeitModel"),
    ("deberta", ("DebertaModel",), _BY_CONTENT),
    ("deberta_v2", ("DebertaV2Model",), _BY_CONTENT),
    ("longformer", ("LongformerModel",), _LOCAL),
    ("t5", ("T5Model", "T5ForConditionalGeneration", "T5Stack"), "its encoder alone takes prompts; load T5EncoderModel"),
    ("umt5", ("UMT5Model", "UMT5ForConditionalGeneration", "UMT5Stack"), "its encoder alone takes prompts; load UMT5EncoderModel"),
    ("swin", ("SwinModel",), "its attention gets windows, not the image that they belong to; use timm's SwinTransformer"),
    ("timesformer", ("TimesformerModel",), f"{_NO_INTERFACE}, and it attends to time and space in turn; use VideoMAEModel"),
    ("wav2vec2_bert", ("Wav2Vec2BertModel",), _CONVOLUTIONS),
    ("wav2vec2_conformer", ("Wav2Vec2ConformerModel",), _CONVOLUTIONS),
):  # fmt: skip
    for _model in _models:
        refuse_encoder(_full_name(_module, _model), _reason)
