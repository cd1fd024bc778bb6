"""Today's encoders of transformers and timm, of a few thousand weights: one for each way to attend, and those that share it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

TOKENS = 11
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
_TEXT = {**_SIZES, **_SPECIAL, "vocab_size": 50, "max_position_embeddings": 24}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
_LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_DECODER, **_LAYER_TYPES, "query_pre_attn_scalar": 8}
_T5 = {
    "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "pad_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
}  # fmt: skip
_IMAGE = {**_SIZES, "image_size": 12, "patch_size": 4}
_WAVEFORM = {
    **_SIZES, "conv_dim": (16, 16), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_conv_pos_embeddings": 3,
    "num_conv_pos_embedding_groups": 2, "conv_pos_kernel_size": 3,
}  # fmt: skip

_WAVLM = {**_WAVEFORM, "num_conv_pos_embeddings": 4, "num_buckets": 8, "max_bucket_distance": 6}


def make_ids() -> Tensor:
    return torch.randint(5, 49, (3, TOKENS))


def make_images() -> Tensor:
    return torch.randn(3, 3, 12, 12)


def make_video() -> Tensor:
    return torch.randn(3, 4, 3, 12, 12)


def make_spectrogram() -> Tensor:
    return torch.randn(3, 12, 8)


def make_patches() -> dict[str, Tensor]:
    """Images of three shapes, the last one padded."""
    shapes = torch.tensor([[3, 4], [4, 3], [3, 3]])
    mask = torch.arange(12) < shapes.prod(1, keepdim=True)
    return {"pixel_values": torch.randn(3, 12, 48), "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}


def make_waveform() -> dict[str, Tensor]:
    return {"input_values": torch.randn(3, 60), "attention_mask": (torch.arange(60) < torch.tensor([60, 60, 40])[:, None]).long()}


def _make(model: str, config: str, **settings: Any) -> nn.Module:
    return getattr(hf, model)(getattr(hf, config)(**settings))


def _row(name: str, settings: dict[str, Any], example: Callable[[], Any] = make_ids, model: str | None = None, **more: Any):
    return partial(_make, model or f"{name}Model", f"{name}Config", **{**settings, **more}), example


def _make_timm(path: str, **settings: Any) -> nn.Module:
    file, _, name = path.partition(".")
    sizes = {"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    return getattr(pytest.importorskip(f"timm.models.{file}"), name)(**sizes, **settings)


def _make_torchvision() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    encoder = models.VisionTransformer(12, 4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=40)
    encoder.heads = nn.Identity()
    return encoder


def _make_open_clip(name: str, *sizes: int, **settings: Any) -> nn.Module:
    return getattr(pytest.importorskip("open_clip.transformer"), name)(
        *sizes, width=32, layers=2, heads=4, mlp_ratio=1.25, output_dim=24, **settings
    )


def _timm(path: str, **settings: Any):
    return partial(_make_timm, path, **settings), make_images


MECHANISMS = {
    "modernbert: windows, rotation, packed projections": _row(
        "ModernBert", _TEXT, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2, local_attention=4
    ),
    "eurobert: shared keys, both ways": _row("EuroBert", _TEXT, num_key_value_heads=2, mask_token_id=3),
    "esm: rotation, a norm within the attention": _row(
        "Esm", _TEXT, pad_token_id=1, mask_token_id=3, position_embedding_type="rotary"
    ),
    "qwen3: causal, windows, shared keys, a norm of keys": _row("Qwen3", _DECODER, use_sliding_window=True, **_LAYER_TYPES),
    "gemma2: causal, though its attention says it is not": _row(
        "Gemma2", _GEMMA, attn_logit_softcapping=None, use_bidirectional_attention=True
    ),
    "gemma3: norms with an offset": _row("Gemma3Text", _GEMMA, model="Gemma3TextModel"),
    "gemma3: both ways, within windows": _row(
        "Gemma3Text", _GEMMA, model="Gemma3TextModel", use_bidirectional_attention=True
    ),
    "t5: one bias by position for all layers": _row("T5", _T5, model="T5EncoderModel"),
    "umt5: a bias of each layer": _row("UMT5", _T5, model="UMT5EncoderModel"),
    "siglip_text: the last position": _row("SiglipText", _TEXT, projection_size=16),
    "beit: a bias in place of the mask": _row("Beit", _IMAGE, make_images, use_relative_position_bias=True),
    "beit: one bias for all layers": _row("Beit", _IMAGE, make_images, use_shared_relative_position_bias=True),
    "dinov3: rotation of patches alone": _row("DINOv3ViT", _IMAGE, make_images, num_register_tokens=2),
    "siglip2_vision: masked patches": _row(
        "Siglip2Vision", {**_SIZES, "patch_size": 4, "num_patches": 16}, make_patches, model="Siglip2VisionModel"
    ),
    "videomae: biases apart from the projections": _row("VideoMAE", _IMAGE, make_video, num_frames=4, tubelet_size=2),
    "data2vec_audio: samples that become frames": _row("Data2VecAudio", _WAVEFORM, make_waveform),
    "mpnet: a bias by position, no interface": _row("MPNet", _TEXT),
    "wavlm: a bias that the query gates": _row("WavLM", _WAVLM, make_waveform),
    "wavlm: norms before": _row("WavLM", _WAVLM, make_waveform, do_stable_layer_norm=True, feat_extract_norm="layer"),
    "timm_eva: EVA-02": _timm("eva.Eva", use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False),
    "timm_eva: a bias apart from the packed projection": _timm(
        "eva.Eva", use_rot_pos_emb=True, scale_attn_inner=True, global_pool="token"
    ),
    "timm_eva: DINOv3": _timm(
        "eva.Eva", use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4, use_abs_pos_emb=False,
        attn_type="rope",
    ),
    "timm_eva: rotations of each layer, norms of keys": _timm("eva.Eva", use_rot_pos_emb=True, rope_type="mixed", qk_norm=True),
    "timm_beit: a bias of each layer": _timm("beit.Beit", use_rel_pos_bias=True, use_abs_pos_emb=False),
    "timm_beit: one bias for all layers": _timm("beit.Beit", use_shared_rel_pos_bias=True, global_pool="token"),
    "torchvision_vit: nn.MultiheadAttention": (_make_torchvision, make_images),
    "open_clip_vision: the same": (partial(_make_open_clip, "VisionTransformer", 12, 4), make_images),
    "open_clip_vision: the mean": (partial(_make_open_clip, "VisionTransformer", 12, 4, pool_type="avg"), make_images),
    "open_clip_text: a triangle as a mask": (partial(_make_open_clip, "TextTransformer", TOKENS, 50), make_ids),
}  # fmt: skip
ALIASES = {
    "camembert": _row("Camembert", _TEXT),
    "data2vec_text": _row("Data2VecText", _TEXT),
    "electra": _row("Electra", _TEXT, embedding_size=16),
    "ernie": _row("Ernie", _TEXT),
    "roberta_prelayernorm": _row("RobertaPreLayerNorm", _TEXT),
    "xlm_roberta": _row("XLMRoberta", _TEXT),
    "xlm_roberta_xl": _row("XLMRobertaXL", _TEXT),
    "mt5": _row("MT5", _T5, model="MT5EncoderModel"),
    "llama": _row("Llama", {name: value for name, value in _DECODER.items() if name != "sliding_window"}),
    "mistral": _row("Mistral", _DECODER),
    "qwen2": _row("Qwen2", {name: value for name, value in _DECODER.items() if name != "head_dim"}),
    "ast": _row("AST", _SIZES, make_spectrogram, patch_size=4, max_length=12, num_mel_bins=8, frequency_stride=3, time_stride=3),
    "dinov2_with_registers": _row("Dinov2WithRegisters", _IMAGE, make_images, mlp_ratio=1, num_register_tokens=2),
    "vit_mae": _row("ViTMAE", _IMAGE, make_images, mask_ratio=0.0),
    "vit_msn": _row("ViTMSN", _IMAGE, make_images),
    "siglip2_text": _row("Siglip2Text", _TEXT, model="Siglip2TextModel", projection_size=16),
    "timm_vit: DeiT III": _timm("vision_transformer.VisionTransformer", no_embed_class=True, init_values=1e-6),
    "timm_vit: distilled": _timm("deit.VisionTransformerDistilled"),
    "timm_vit: four registers": _timm("vision_transformer.VisionTransformer", reg_tokens=4, no_embed_class=True),
    "timm_vit: SO400M": _timm("vision_transformer.VisionTransformer", class_token=False, global_pool="map"),
    "timm_vit: quick GELU": _timm("vision_transformer.VisionTransformer", act_layer="quick_gelu", pre_norm=True),
    "vivit": _row("Vivit", _IMAGE, make_video, num_frames=4, tubelet_size=[2, 4, 4]),
}
