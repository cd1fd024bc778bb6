"""Preprocessing of text and images for VLMo."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.images import load_image
from .model import VLMo


class VLMoProcessor:
    """A processor that tokenizes text to a fixed length and normalises square images with mean and standard deviation 0.5.

    Args:
        tokenizer: transformers' BERT tokenizer; for official checkpoints that of ``bert-base-uncased``.
        image_size: side length in pixels; images of any shape are resized to this square by Pillow's bicubic filter.
        max_text_length: number of tokens to which texts are padded or truncated, including [CLS] and [SEP].

    Raises:
        TypeError: ``tokenizer`` is not callable, or a size isn't an integer.
        ValueError: a size is too small.

    Examples:
        >>> processor = VLMoProcessor.of(vlmo, AutoTokenizer.from_pretrained("bert-base-uncased"))
        >>> vlmo(**processor(["a dog on grass"], [Image.open("dog.jpg")]))
    """

    def __init__(self, tokenizer: Any, image_size: int = 224, max_text_length: int = 40):
        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        for name, value, least in (("image_size", image_size, 1), ("max_text_length", max_text_length, 3)):
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.tokenizer, self.image_size, self.max_text_length = tokenizer, image_size, max_text_length

    @classmethod
    def of(cls, vlmo: VLMo, tokenizer: Any) -> "VLMoProcessor":
        """Create a processor with the image size and the text length of a model."""
        return cls(tokenizer, vlmo.config.image_size, vlmo.config.max_text_length)

    def __call__(self, text: str | Sequence[str] | None = None, images: Any = None) -> dict[str, Tensor]:
        """Return keyword arguments for :class:`VLMo` and :class:`MoPEBAF`.

        Args:
            text: one or several strings; None for images only.
            images: one or several PIL images, converted by :func:`mope_fast.data.load_image`, or uint8 arrays or tensors, (3, H, W)
                or (H, W, 3); None for text only.

        Returns:
            input_ids and attention_mask (B, max_text_length) int64, pixel_values (B, 3, image_size, image_size) float32.

        Raises:
            TypeError: an input is neither text nor an image.
            ValueError: neither text nor images are given, one of them is empty, their numbers differ, or an image has another
                shape, or the ambiguous shape (3, W, 3).
            OSError: a PIL image can't be decoded: its file is truncated or too large, or its mode has no known range.
        """
        if text is None and images is None:
            raise ValueError("VLMoProcessor got neither text nor images")
        inputs: dict[str, Tensor] = {}
        if text is not None:
            encoded = self.tokenizer(
                _texts(text), padding="max_length", truncation=True, max_length=self.max_text_length, return_tensors="pt"
            )
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if images is not None:
            inputs["pixel_values"] = torch.stack([self._pixels(image) for image in _images(images)])
        if len({len(value) for value in inputs.values()}) > 1:
            raise ValueError(
                f"got {len(inputs['input_ids'])} texts and {len(inputs['pixel_values'])} images: expected one image per text"
            )
        return inputs

    def _pixels(self, image: Any) -> Tensor:
        """Convert a PIL image -> (3, side, side), -1 to 1."""
        from PIL.Image import Resampling

        resized = load_image(image).resize((self.image_size, self.image_size), Resampling.BICUBIC)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 127.5 - 1


def _texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) or not hasattr(text, "__iter__") else list(text)
    if not texts:
        raise ValueError("VLMoProcessor got no text: expected at least one")
    for item in texts:
        if not isinstance(item, str):
            raise TypeError(f"text must be a str or a sequence of str, got {type(item).__name__}")
    return texts


def _images(images: Any) -> list[Any]:
    """Return a list of PIL images."""
    from PIL.Image import Image, fromarray

    one = isinstance(images, (Image, str)) or getattr(images, "ndim", 0) in (2, 3) or not hasattr(images, "__iter__")
    pictures = []
    for image in [images] if one else images:
        if isinstance(image, (np.ndarray, Tensor)):
            if image.dtype not in (np.uint8, torch.uint8):
                raise TypeError(f"arrays and tensors of images must be uint8, 0 to 255, got {image.dtype}")
            array = image.cpu().numpy() if isinstance(image, Tensor) else image
            if array.ndim != 3 or 3 not in (array.shape[0], array.shape[2]) or not array.size:
                raise ValueError(f"arrays and tensors of images must be (3, H, W) or (H, W, 3), got {tuple(array.shape)}")
            if array.shape[0] == array.shape[2]:
                raise ValueError(f"an image of shape {tuple(array.shape)} could have its channels first or last: pass a PIL image")
            image = fromarray(np.ascontiguousarray(array.transpose(1, 2, 0) if array.shape[0] == 3 else array))
        elif not isinstance(image, Image):
            raise TypeError(
                f"images must be PIL images, arrays or tensors, got {type(image).__name__}: open files with PIL.Image"
            )
        pictures.append(image)
    if not pictures:
        raise ValueError("VLMoProcessor got no image: expected at least one")
    return pictures
