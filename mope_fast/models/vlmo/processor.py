"""Text and images as VLMo takes them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class VLMoProcessor:
    """Tokens of a BERT tokenizer, padded and cut to a length; square images with mean and deviation 0.5.

    Args:
        tokenizer: transformers' BERT tokenizer, that of ``bert-base-uncased`` for official checkpoints.
        image_size: side in pixels; images are resized to it by a bicubic filter, whatever their shape.
        max_text_length: tokens, [CLS] and [SEP] included.

    Example:
        >>> processor = VLMoProcessor(AutoTokenizer.from_pretrained("bert-base-uncased"))
        >>> vlmo(**processor(["a dog on grass"], [Image.open("dog.jpg")]))
    """

    def __init__(self, tokenizer: Any, image_size: int = 224, max_text_length: int = 40):
        from transformers import ViTImageProcessor

        if not callable(tokenizer):
            raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
        self.tokenizer, self.image_size, self.max_text_length = tokenizer, image_size, max_text_length
        bicubic = 3
        self._images = ViTImageProcessor(
            size={"height": image_size, "width": image_size}, resample=bicubic, image_mean=[0.5] * 3, image_std=[0.5] * 3,
            do_convert_rgb=True,
        )  # fmt: skip

    def __call__(self, text: str | Sequence[str] | None = None, images: Any = None) -> dict[str, Tensor]:
        """Keyword arguments for :class:`VLMo` and :class:`MoPEBAF`.

        Args:
            text: one or several; None for images only.
            images: PIL images, or arrays or tensors of uint8 (3, H, W); one or several; None for text only.

        Returns:
            input_ids and attention_mask (B, max_text_length) int64, pixel_values (B, 3, image_size, image_size) float32.

        Raises:
            ValueError: neither text nor images, or different numbers of them.
        """
        if text is None and images is None:
            raise ValueError("VLMoProcessor got neither text nor images")
        inputs: dict[str, Tensor] = {}
        if text is not None:
            encoded = self.tokenizer(
                [text] if isinstance(text, str) else list(text), padding="max_length", truncation=True,
                max_length=self.max_text_length, return_tensors="pt",
            )  # fmt: skip
            inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if images is not None:
            inputs["pixel_values"] = self._images(images, return_tensors="pt")["pixel_values"]
        sizes = {len(value) for value in inputs.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"got {len(inputs['input_ids'])} texts and {len(inputs['pixel_values'])} images: expected one image a text"
            )
        return inputs
