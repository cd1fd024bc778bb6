"""Load encoders by name, each with the preprocessing of a list of texts, images or sounds into its inputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

from pretrained import dinov2_small, minilm, whisper_tiny_en
from torch import nn

from mope_fast.data import TimmTransform
from mope_fast.data.audio import RATE

PACKAGED_TEXT, PACKAGED_IMAGE, PACKAGED_AUDIO = "minilm", "dinov2-small", "whisper-tiny-en"
PACKAGED_PIXELS = {
    "interpolation": "bicubic", "crop_mode": "squash", "crop_pct": 1.0,
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
}  # fmt: skip
"""Preprocessing of the packaged image encoder: the whole image, resized to a square."""
STATISTICS = {"mmbt": ((0.46777044, 0.44531429, 0.40661017), (0.12221994, 0.12145835, 0.14380469))}
"""Mean and standard deviation of pixels that MoPE's released code uses for every encoder."""
Encoder = tuple[nn.Module, Callable[..., Any]]
"""A frozen encoder, and the preprocessing of a list of texts, images, sounds or videos into its inputs."""


def text_encoder(name: str, max_length: int) -> Encoder:
    if name == PACKAGED_TEXT:
        encoder, tokenizer = minilm()
    else:
        from transformers import AutoModel, AutoTokenizer

        encoder, tokenizer = AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
    return encoder, partial(tokenizer, padding=True, truncation=True, max_length=max_length, return_tensors="pt")


def image_encoder(name: str, size: int) -> Encoder:
    if name == PACKAGED_IMAGE:
        return dinov2_small(), TimmTransform({"input_size": (3, size, size), **PACKAGED_PIXELS})
    if name.startswith("timm/"):
        import timm

        encoder = timm.create_model(name.removeprefix("timm/"), pretrained=True)
        return encoder, TimmTransform.of(encoder)
    from transformers import AutoImageProcessor, AutoModel

    return AutoModel.from_pretrained(name), AutoImageProcessor.from_pretrained(name)


def pixels_of(own: Callable[..., Any]) -> tuple[tuple[int, int | None, int | None], tuple[float, ...], tuple[float, ...]]:
    """Return channels, height and width of an encoder's images, None if unknown; and the mean and deviation of its pixels."""
    if isinstance(own, TimmTransform):
        return own.config["input_size"], own.config["mean"], own.config["std"]
    if not hasattr(own, "image_mean"):
        return (3, None, None), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    described = own.to_dict()
    sizes = described.get("crop_size") or described["size"]
    return (3, sizes.get("height"), sizes.get("width")), own.image_mean, own.image_std


def image_transform(own: Callable[..., Any], name: str, statistics: str) -> Callable[..., Any]:
    """Return the transform selected by ``--image-transform``.

    Raises:
        ValueError: the size of the encoder's own preprocessing is not known.
    """
    if name == "own":
        return own
    size, mean, std = pixels_of(own)
    if None in size:
        raise ValueError(f"--image-transform {name} needs an image size, which {type(own).__name__} doesn't give: leave it at own")
    mean, std = STATISTICS.get(statistics, (mean, std))
    mode = {"crop": "center", "squash": "squash"}[name]
    config = {"input_size": tuple(size), "mean": tuple(mean), "std": tuple(std), "interpolation": "bilinear"}
    return TimmTransform({**config, "crop_mode": mode, "crop_pct": 224 / 256})


def audio_encoder(name: str, seconds: float) -> Encoder:
    settings = {"sampling_rate": RATE, "return_tensors": "pt"}
    if name == PACKAGED_AUDIO:
        encoder, extractor = whisper_tiny_en()
        return encoder, partial(extractor, **settings)
    from transformers import AutoFeatureExtractor, AutoModel

    extractor = AutoFeatureExtractor.from_pretrained(name)
    settings |= {"max_length": round(seconds * RATE), "truncation": True, "padding": "max_length", "return_attention_mask": True}
    # pad all to one length: wav2vec 2.0's first norm is over the whole sound, so features would depend on the batch's longest one;
    # with a mask, the mean over time leaves out the silence
    return AutoModel.from_pretrained(name), partial(extractor, **settings)
