"""Frozen encoders of fused models, with random weights, and the sizes to measure."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import CENTRE, FULL, SMOKE
from benchmarks.cases.models import DTYPE_NAMES, INFERENCE, MODES, TRAINING, count_flops, padded_text

CLASSES = 101


@dataclass(frozen=True)
class Encoder:
    """An encoder architecture. Its library is imported only when an encoder is made."""

    name: str
    library: str
    make: Callable[[], nn.Module]
    tokens: int
    inputs: Callable[[int, int, torch.device, torch.dtype], dict[str, Tensor]]
    """Maps (batch, tokens, device, dtype) to the encoder's keyword arguments."""
    cross_dim: int
    """Width of the complementary feature."""
    lora: tuple[str, ...]
    """Names of the projections that get LoRA adapters."""
    side: str = ""
    """Name of the complementary encoder that would give such a feature."""
    window: int = 0
    """Side of an attention window in tokens; 0 without windows."""

    @property
    def map_size(self) -> int:
        """Patches per side of a ViT's image."""
        return math.isqrt(self.tokens)


@dataclass(frozen=True)
class FusedCase:
    """One encoder at one batch size; ``compiled`` selects the providers made by torch.compile, else the others.

    ``experts`` (K) of ``length`` (L) tokens default to the paper's. With ``dense`` the head is SETR's, on the feature map of a
    ViT's last layer, and a label is a mask.
    """

    encoder: Encoder
    batch: int
    dtype: torch.dtype
    modes: tuple[str, ...] = MODES
    compiled: bool = False
    experts: int = 16
    length: int = 6
    dense: bool = False

    @property
    def model(self) -> str:
        return f"{self.encoder.name}, segmenting" if self.dense else self.encoder.name

    def __str__(self) -> str:
        own = "" if (self.experts, self.length) == (16, 6) else f" K={self.experts} L={self.length}"
        return f"{self.model} B={self.batch} S={self.encoder.tokens}{own} {DTYPE_NAMES[self.dtype]}"

    def inputs(self, device: torch.device | str) -> dict[str, Tensor]:
        return self.encoder.inputs(self.batch, self.encoder.tokens, torch.device(device), self.dtype)

    def flops(self, mode: str) -> int:
        """Count the frozen encoder's matrix products; training adds the gradients of activations after the embedding.

        Products of a segmenting head are counted too.
        """
        return (_flops(self.encoder, mode) + (_head_flops(self.encoder, mode) if self.dense else 0)) * self.batch

    def describe(self) -> dict[str, Any]:
        return {
            "case": str(self), "model": self.model, "B": self.batch, "S": self.encoder.tokens,
            "K": self.experts, "L": self.length, "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip


@functools.cache
def _flops(encoder: Encoder, mode: str) -> int:
    """Count operations for one sample, on meta tensors."""
    from mope_fast.encoders import family_of

    with torch.device("meta"):
        model = encoder.make().eval().requires_grad_(False)
    inputs = encoder.inputs(1, encoder.tokens, torch.device("meta"), torch.float32)
    inputs.pop("attention_mask", None)  # a library may read the mask's values
    family, training = family_of(model), mode == TRAINING
    first = family.layers(model)[0].module
    return count_flops(first, lambda: family.encode(model, inputs), backward=training, cut=training)


@functools.cache
def _head_flops(encoder: Encoder, mode: str) -> int:
    """Count operations of SETR's head for one sample; training includes gradients of inputs and weights."""
    with torch.device("meta"):
        width = encoder.make().embed_dim
        head, size = segmenting_head(width), encoder.map_size
        inputs = torch.empty(1, width, size, size, requires_grad=mode == TRAINING)
    return count_flops(head, lambda: head([inputs]), backward=mode == TRAINING, cut=False)


def segmenting_head(width: int) -> nn.Module:
    """Make SETR's head with few channels; with the usual 256 it would take longer than the encoder."""
    from mope_fast.models import SETRHead

    return SETRHead(width, 1, channels=64)


def _timm(name: str, **settings: Any) -> nn.Module:
    import timm

    model = timm.create_model(name, num_classes=0, **settings)
    for block in model.blocks:
        if hasattr(block.ls1, "gamma"):  # it is initialized near zero, where a layer does nothing, unlike in trained models
            nn.init.constant_(block.ls1.gamma, 0.5)
            nn.init.constant_(block.ls2.gamma, 0.5)
    return model


def _swin(name: str, **settings: Any) -> nn.Module:
    """Make a Swin with plain products and softmax, timm's default."""
    import timm

    return timm.create_model(name, num_classes=0, **settings)


def _tiny_swin() -> nn.Module:
    """Make a Swin with 15 x 15 tokens, 8 x 8 in the second stage: windows of 4 are padded in the first stage only."""
    from timm.models.swin_transformer import SwinTransformer

    settings = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 0}
    return SwinTransformer(img_size=30, patch_size=2, **settings)


def _tiny_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=12, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=0)


def _narrow_vit(layers: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=12, patch_size=4, embed_dim=32, depth=layers, num_heads=2, num_classes=0)


def _narrow_bert(layers: int) -> nn.Module:
    return _bert(**{**TINY_TEXT, "num_hidden_layers": layers})


def _narrow_dinov2(layers: int) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    size = {"hidden_size": 32, "num_attention_heads": 2, "image_size": 12, "patch_size": 4, "mlp_ratio": 1}
    return Dinov2Model(Dinov2Config(num_hidden_layers=layers, attn_implementation="sdpa", **size))


def _bert(**settings: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(attn_implementation="sdpa", **settings), add_pooling_layer=False)


def _whisper(**settings: Any) -> nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    return WhisperEncoder(WhisperConfig(attn_implementation="sdpa", **settings))  # the default settings are Whisper-tiny's


def _images(size: int) -> Callable[[int, int, torch.device, torch.dtype], dict[str, Tensor]]:
    def inputs(batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"x": torch.randn(batch, 3, size, size, device=device).to(dtype)}

    return inputs


def _pixels(size: int) -> Callable[[int, int, torch.device, torch.dtype], dict[str, Tensor]]:
    """Make images under transformers' input name."""
    images = _images(size)
    return lambda *args: {"pixel_values": images(*args)["x"]}


def _text(batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return padded_text(batch, tokens, device)


def _spectrograms(batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 80, 2 * tokens, device=device).to(dtype)}


def _text_encoder(name: str, tokens: int, **settings: Any) -> Encoder:
    return Encoder(name, "transformers", functools.partial(_bert, **settings), tokens, _text, 768, ("query", "value"), "ViT-S/16")


MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TINY_TEXT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY_AUDIO = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "max_source_positions": 12}


@functools.cache  # cached so that each size is one object: encoders compare by their ``make`` functions
def vit(size: str, image: int) -> Encoder:
    """Return ViT-B/16 or ViT-S/16, ``size`` "B" or "S", for images of ``image`` x ``image`` pixels."""
    name = {"B": "vit_base_patch16_224", "S": "vit_small_patch16_224"}[size]
    make = functools.partial(_timm, name, img_size=image)
    return Encoder(f"ViT-{size}/16", "timm", make, (image // 16) ** 2 + 1, _images(image), 768, ("qkv",), "MiniLM")


VIT_B = vit("B", 224)
VIT_S = Encoder(
    "ViT-S/14", "timm", functools.partial(_timm, "vit_small_patch14_dinov2", img_size=224), 257, _images(224), 384, ("qkv",),
    "MiniLM",
)  # fmt: skip
BERT_B, LONG_BERT_B = _text_encoder("BERT-B", 128), _text_encoder("BERT-B", 512)
WHISPER = Encoder("Whisper-tiny", "transformers", _whisper, 1500, _spectrograms, 384, ("q_proj", "v_proj"), "MiniLM")


def _swin_encoder(size: str, image: int) -> Encoder:
    window, name = {224: 7, 384: 12}[image], {"T": "swin_tiny", "B": "swin_base"}[size]
    settings = {} if image == 224 else {"img_size": image, "window_size": window}
    make = functools.partial(_swin, f"{name}_patch4_window7_224", **settings)
    return Encoder(f"Swin-{size}/{image}", "timm", make, (image // 4) ** 2, _images(image), 768, ("qkv",), "MiniLM", window)


SWIN_T, SWIN_B, LARGE_SWIN_T, LARGE_SWIN_B = (_swin_encoder(size, image) for image in (224, 384) for size in "TB")
TINY_SWIN = Encoder("tiny Swin", "timm", _tiny_swin, 225, _images(30), 24, ("qkv",), "tiny text", 4)
TINY = [
    Encoder("tiny ViT", "timm", _tiny_vit, 10, _images(12), 24, ("qkv",), "tiny text"),
    Encoder("tiny BERT", "transformers", functools.partial(_bert, **TINY_TEXT), 9, _text, 24, ("query", "value"), "tiny image"),
    Encoder(
        "tiny Whisper", "transformers", functools.partial(_whisper, **TINY_AUDIO), 12, _spectrograms, 24, ("q_proj", "v_proj"),
        "tiny text",
    ),
]  # fmt: skip
SIDES = {
    "MiniLM": _text_encoder("MiniLM", 64, **MINILM),
    "ViT-S/16": Encoder("ViT-S/16", "timm", functools.partial(_timm, "vit_small_patch16_224"), 197, _images(224), 768, ()),
    "tiny text": TINY[1],
    "tiny image": TINY[0],
}
"""Complementary encoders of usual sizes, by name."""


NARROW = ("ViT", "BERT", "DINOv2")


def narrow(name: str, layers: int = 12) -> Encoder:
    """Return an encoder of NARROW whose layers are so small that the host's time dominates."""
    make, library, tokens, inputs, lora, side = {
        "ViT": (_narrow_vit, "timm", 10, _images(12), ("qkv",), "tiny text"),
        "BERT": (_narrow_bert, "transformers", 9, _text, ("query", "value"), "tiny image"),
        "DINOv2": (_narrow_dinov2, "transformers", 10, _pixels(12), ("q_proj", "v_proj"), "tiny text"),
    }[name]
    return Encoder(f"{name}, {layers} x 32", library, functools.partial(make, layers), tokens, inputs, 24, lora, side)


def host_cases(device: torch.device, extent: str) -> list[FusedCase]:
    """Return cases with enough samples for prompts to be mixed in K/V space."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    names = {SMOKE: NARROW[:1], CENTRE: NARROW[:2], FULL: NARROW}[extent]
    return [FusedCase(narrow(name, 2 if extent == SMOKE else 12), 24, dtype) for name in names]


def cases(device: torch.device, extent: str) -> list[FusedCase]:
    """Return cases in order of interest, which is the order of measuring."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if extent == SMOKE:
        return _tiny_cases(dtype)
    if extent == CENTRE:
        if device.type == "cuda":
            return [FusedCase(VIT_B, 64, dtype), FusedCase(VIT_B, 64, dtype, dense=True)]
        return [FusedCase(vit("S", 224), 4, dtype), FusedCase(vit("S", 112), 4, dtype, modes=(INFERENCE,), dense=True)]
    return _gpu_cases(dtype) if device.type == "cuda" else _cpu_cases(dtype)


def _tiny_cases(dtype: torch.dtype) -> list[FusedCase]:
    # with 17 samples experts are mixed in K/V space, with 3 as prompts
    sizes = {TINY[0]: 17, TINY[1]: 3, TINY[2]: 17, TINY_SWIN: 17}
    return [*(FusedCase(encoder, batch, dtype) for encoder, batch in sizes.items()), FusedCase(TINY[0], 3, dtype, dense=True)]


def _gpu_cases(dtype: torch.dtype) -> list[FusedCase]:
    first, all_five = [VIT_B, SWIN_B, BERT_B], [VIT_B, SWIN_B, BERT_B, VIT_S, WHISPER]
    return [
        *(FusedCase(encoder, 64, dtype) for encoder in first),
        *(FusedCase(encoder, 16, dtype) for encoder in first),
        *(FusedCase(encoder, 64, dtype, compiled=True) for encoder in first),
        *(
            FusedCase(encoder, 1, dtype, modes=(INFERENCE,)) for encoder in all_five
        ),  # the mapper's batch norm can't train on one sample
        *(FusedCase(encoder, 64, dtype) for encoder in (VIT_S, WHISPER)),
        # without Swin-B: the truth's step takes 36 GB in float32, besides two graphs of half of that each
        *(FusedCase(encoder, 256, dtype) for encoder in (VIT_B, BERT_B)),
        *(FusedCase(encoder, 64, dtype) for encoder in (LONG_BERT_B, SWIN_T, LARGE_SWIN_B, LARGE_SWIN_T)),
        *(FusedCase(encoder, 16, dtype) for encoder in (VIT_S, WHISPER)),
        *(FusedCase(encoder, 256, dtype) for encoder in (SWIN_B, VIT_S, WHISPER)),
        FusedCase(VIT_B, 64, dtype, dense=True),
    ]


def _cpu_cases(dtype: torch.dtype) -> list[FusedCase]:
    return [
        *(FusedCase(encoder, 8, dtype) for encoder in (VIT_B, SWIN_B, BERT_B)),
        *(FusedCase(encoder, 1, dtype, modes=(INFERENCE,)) for encoder in (VIT_B, SWIN_B, BERT_B, VIT_S, WHISPER)),
        *(FusedCase(encoder, 16, dtype, modes=(TRAINING,)) for encoder in (VIT_B, SWIN_B)),
        *(FusedCase(encoder, 8, dtype) for encoder in (VIT_S, WHISPER, SWIN_T, LARGE_SWIN_T)),
        *(FusedCase(encoder, 64, dtype, modes=(INFERENCE,)) for encoder in (VIT_B, SWIN_B, BERT_B)),
        FusedCase(vit("S", 224), 4, dtype),
        *(FusedCase(vit("S", size), 4, dtype, dense=True) for size in (112, 224)),
        *(FusedCase(encoder, 8, dtype, compiled=True) for encoder in (VIT_B, SWIN_B, BERT_B)),
    ]
