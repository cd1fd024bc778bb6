"""FusionCollator: samples to the keyword arguments of a fusion's forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .images import is_pillow_image, load_image
from .posts import Post

Preprocess = Callable[..., Any]


class StackEach:
    """A transform of one value made one of a list: the results stacked, (B, ...). It can be pickled if the transform can."""

    def __init__(self, transform: Callable[[Any], Tensor]):
        self.transform = transform

    def __call__(self, values: Sequence[Any]) -> Tensor:
        return torch.stack([self.transform(value) for value in values])


class TimmTransform(StackEach):
    """timm's transform of images for inference, by its data config; called with a list of images, it gives (B, C, H, W).

    A :class:`Predictor` can save it, and a ``StackEach`` of timm's transform it can't: that doesn't say what it was made of.

    Args:
        config: of ``timm.data.resolve_model_data_config``: ``input_size``, ``mean``, ``std``, ``interpolation`` and so on; whatever
            ``timm.data.create_transform`` takes.

    Raises:
        ImportError: timm or torchvision is not installed.
    """

    def __init__(self, config: Mapping[str, Any]):
        from timm.data import create_transform

        self.config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
        super().__init__(create_transform(**self.config))

    @classmethod
    def of(cls, encoder: nn.Module) -> "TimmTransform":
        """Make the one that a timm encoder was trained with, for the size of images that it was created for."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(encoder)
        if (size := encoder.patch_embed.img_size) is not None:
            config["input_size"] = (config["input_size"][0], *size)
        return cls(config)


class FusionCollator:
    """Makes a batch for :class:`MoPEFusion` of a list of samples: ``collate_fn`` of a DataLoader, ``data_collator`` of a Trainer.

    With ``complementary_field=None`` it makes one for :class:`PromptTuned`, of the main side alone.

    Samples are :class:`Post` objects, whose images are opened here, in the DataLoader's worker; or dicts, as ``datasets`` has them,
    whose PIL images become RGB as a viewer shows them, too (:func:`load_image`).

    Args:
        main: how the main side's values become the main encoder's inputs. A transformers tokenizer (pads to the longest,
            truncates), image processor or feature extractor (called with ``return_tensors="pt"``, unpadded); any function of a
            list of values that gives a tensor or a dict of tensors: ``functools.partial(tokenizer, padding=True, max_length=64,
            ...)``; ``TimmTransform.of(encoder)`` for a timm encoder, ``StackEach(transform)`` for other transforms of one image;
            None for features, stacked as they are.
        complementary: likewise for the other side.
        main_field, complementary_field, label_field: where a sample has them. Samples without the label field, or with None in it,
            make batches without labels.

    Raises:
        TypeError: ``main`` or ``complementary`` is none of these.
        ValueError: ``complementary`` without a field.

    Example:
        >>> collate = FusionCollator(tokenizer, image_processor)
        >>> loader = DataLoader(posts, batch_size=32, shuffle=True, collate_fn=collate)
        >>> output = model(**next(iter(loader)))
    """

    def __init__(
        self,
        main: Preprocess | None,
        complementary: Preprocess | None,
        *,
        main_field: str = "text",
        complementary_field: str | None = "image",
        label_field: str = "label",
    ):
        for name, preprocess in (("main", main), ("complementary", complementary)):
            if preprocess is not None and not callable(preprocess):
                raise TypeError(
                    f"{name} must be a tokenizer, an image processor, a function of a list of values or None, "
                    f"got {type(preprocess).__name__}"
                )
        if complementary_field is None and complementary is not None:
            raise ValueError("complementary_field=None is for one side: leave complementary at None, or name its field")
        if complementary_field is None:
            self.sides = {"inputs": (main_field, main)}
        else:
            self.sides = {"main_inputs": (main_field, main), "complementary_inputs": (complementary_field, complementary)}
        self.label_field = label_field

    def __call__(self, samples: Sequence[Post | Mapping[str, Any]]) -> dict[str, Any]:
        """``main_inputs`` and ``complementary_inputs``, or ``inputs`` of one side; and, where samples have them, ``labels``.

        Labels are int64, (B,) of classes or (B, C) of 0 and 1 for each class, or float32 for numbers with a point.

        Raises:
            TypeError, ValueError: no sample, a sample lacks a field, some have labels and some not, labels of different shapes, or
                not finite, or inputs that are no tensors.
            OSError: an image can't be read.
        """
        batch = self.inputs(samples)
        labels = [_value(sample, self.label_field) if _may_have(sample, self.label_field) else None for sample in samples]
        without = sum(label is None for label in labels)
        if without not in (0, len(samples)):
            raise ValueError(
                f"{without} of {len(samples)} samples have no {self.label_field!r}: a batch has labels of all, or of none"
            )
        if not without:
            batch["labels"] = _labels(labels)
        return batch

    def inputs(self, samples: Sequence[Post | Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch without looking at labels."""
        if not samples:
            raise ValueError("there is no sample to make a batch of")
        batch = {}
        for name, (field, preprocess) in self.sides.items():
            batch[name] = _inputs(name, preprocess, [_value(sample, field) for sample in samples])
        return batch


def _may_have(sample: Post | Mapping[str, Any], field: str) -> bool:
    return isinstance(sample, Post) or field in sample


def _value(sample: Post | Mapping[str, Any], field: str) -> Any:
    if isinstance(sample, Post):
        if field in ("image", "audio", "frames"):
            return getattr(sample, f"open_{field}")()
        if field in Post.__slots__:
            return getattr(sample, field)
        raise ValueError(f"a Post has no field {field!r}: it has {list(Post.__slots__)}")
    if not isinstance(sample, Mapping):
        raise TypeError(f"samples must be Post objects or dicts, got {type(sample).__name__}")
    if field not in sample:
        raise ValueError(
            f"a sample has no field {field!r}, only {list(sample)}: name it (main_field=..., complementary_field=..., "
            "label_field=...); transformers' Trainer drops fields unless remove_unused_columns=False"
        )
    value = sample[field]
    return load_image(value) if is_pillow_image(value) else value


def _inputs(name: str, preprocess: Preprocess | None, values: list[Any]) -> Any:
    if preprocess is None or isinstance(preprocess, StackEach):
        try:
            return StackEach(torch.as_tensor)(values) if preprocess is None else preprocess(values)
        except RuntimeError as error:
            raise ValueError(f"{name} can't be stacked: {error}; make them of one size, or pad them") from error
    if hasattr(preprocess, "model_input_names"):  # transformers' tokenizers, image processors and feature extractors
        settings = {"padding": True, "truncation": True} if hasattr(preprocess, "vocab_size") else {}
        inputs = preprocess(values, return_tensors="pt", **settings)
    else:
        inputs = preprocess(values)
    if isinstance(inputs, Mapping):
        inputs = dict(inputs)
    tensors = inputs.values() if isinstance(inputs, dict) else [inputs]
    if wrong := [type(value).__name__ for value in tensors if not isinstance(value, Tensor)]:
        raise TypeError(f"{name} must be a tensor or a dict of tensors, got {wrong[0]}: does it need return_tensors='pt'?")
    return inputs


def _labels(values: list[Any]) -> Tensor:
    expected = "labels must be numbers, or lists of one length with 0 or 1 for each class"
    tensors = []
    for index, value in enumerate(values):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
        if tensor is None or tensor.is_complex():
            hint = "; names of classes need numbers first" if isinstance(value, str) else ""
            raise ValueError(f"{expected}, got {value!r} of sample {index} of the batch{hint}")
        tensors.append(tensor.float() if tensor.is_floating_point() else tensor.long())
        if not tensors[-1].isfinite().all():
            raise ValueError(f"{expected}, got {value!r} of sample {index} of the batch, which is not finite as float32")
    try:
        return torch.stack(tensors)
    except RuntimeError as error:
        raise ValueError(f"{expected}: {error}") from error
