"""FusionCollator: turns samples into the keyword arguments of a fusion model's forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .images import is_pillow_image, load_image
from .posts import Post

Preprocess = Callable[..., Any]


class StackEach:
    """Applies a transform of one value to each of a list and stacks the results to (B, ...). Picklable if the transform is."""

    def __init__(self, transform: Callable[[Any], Tensor]):
        self.transform = transform

    def __call__(self, values: Sequence[Any]) -> Tensor:
        return torch.stack([self.transform(value) for value in values])


class TimmTransform(StackEach):
    """timm's inference transform, built from its data config; called with a list of images, it returns (B, C, H, W).

    A :class:`Predictor` can save it. It can't save a ``StackEach`` of timm's transform, because that does not keep the config.

    Args:
        config: the dict that ``timm.data.resolve_model_data_config`` returns: ``input_size``, ``mean``, ``std``, ``interpolation``
            and so on; any argument of ``timm.data.create_transform``.

    Raises:
        ImportError: timm or torchvision is not installed.
    """

    def __init__(self, config: Mapping[str, Any]):
        from timm.data import create_transform

        self.config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
        super().__init__(create_transform(**self.config))

    @classmethod
    def of(cls, encoder: nn.Module) -> "TimmTransform":
        """Make the transform that a timm encoder was trained with, for the image size that the encoder was created for."""
        from timm.data import resolve_model_data_config

        config = resolve_model_data_config(encoder)
        if (size := encoder.patch_embed.img_size) is not None:
            config["input_size"] = (config["input_size"][0], *size)
        return cls(config)


class EachFrame:
    """Turns a transform of images into one of videos, for a ``frames`` side: (B, T, ...), T the largest number of frames.

    It is called with a list of videos, each a list of images. The transform is called once, with the frames of all videos. Its
    tensors are returned as (B, T, ...), a bare tensor under the name ``"frames"``. Shorter videos are padded with zeros, and
    ``"frame_mask"``, bool (B, T), is True for real frames.

    Args:
        preprocess: a transform of a list of images, as for :class:`FusionCollator`.
        most: maximum number of frames, taken evenly spread over a longer video; None takes all frames.

    Raises:
        ValueError: a video has no frame, or the transform doesn't return one row per frame.
    """

    def __init__(self, preprocess: Preprocess, most: int | None = None):
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ValueError(f"most must be an integer >= 1 or None, got {most!r}")
        self.preprocess, self.most = preprocess, most

    def __call__(self, videos: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        videos = [video if hasattr(video, "__len__") else list(video) for video in videos]
        if empty := [index for index, frames in enumerate(videos) if not len(frames)]:
            raise ValueError(f"video {empty[0]} of the batch has no frame: pass None for a missing video")
        taken = [self._taken(frames) for frames in videos]
        counts = [len(frames) for frames in taken]
        made = _inputs("frames", self.preprocess, [frame for frames in taken for frame in frames])
        made = made if isinstance(made, dict) else {"frames": made}
        if wrong := {name: tuple(value.shape) for name, value in made.items() if value.shape[:1] != (sum(counts),)}:
            raise ValueError(f"{sum(counts)} frames were given, but the transform gave {wrong}: it must return one row per frame")
        padded = {name: pad_sequence(value.split(counts), batch_first=True) for name, value in made.items()}
        return {**padded, "frame_mask": torch.arange(max(counts)) < torch.tensor(counts)[:, None]}

    def _taken(self, frames: Sequence[Any]) -> Sequence[Any]:
        if self.most is None or len(frames) <= self.most:
            return frames
        return [frames[index] for index in torch.linspace(0, len(frames) - 1, self.most).round().int().tolist()]


class FusionCollator:
    """Builds a batch for :class:`MoPEFusion` from a list of samples: a DataLoader's ``collate_fn``, a Trainer's ``data_collator``.

    With ``complementary_field=None`` it builds a batch for :class:`PromptTuned`, from the main side alone.

    Samples are :class:`Post` objects or dicts, such as rows of ``datasets``. A post's images are opened here, in the DataLoader's
    worker. PIL images in dicts are converted to RGB in the same way, as a viewer shows them (:func:`load_image`).

    Args:
        main: turns the main side's values into the main encoder's inputs. One of: a transformers tokenizer (called with padding
            to the longest and truncation), image processor or feature extractor (called with ``return_tensors="pt"``, unpadded);
            any function of a list of values that returns a tensor or a dict of tensors, such as ``functools.partial(tokenizer,
            padding=True, max_length=64, ...)``; ``TimmTransform.of(encoder)`` for a timm encoder, ``StackEach(transform)`` for
            other transforms of one image; None for features, which are stacked unchanged.
        complementary: the same for the complementary side. For several sides, a dict from side name to such a preprocessing
            function, :class:`EachFrame` for video. With several sides, a sample's side is missing if its value is None, also the
            image of a post without one, which is then not replaced by a grey one. ``"present"`` tells the model; the missing row is
            filled with another sample's. The whole side is None if no sample of the batch has it.
        main_field, complementary_field, label_field: names of the samples' fields. Samples without the label field, or with None in
            it, make batches without labels. For several sides ``complementary_field`` is a dict; by default each field has its
            side's name.

    Raises:
        TypeError: ``main`` or ``complementary`` has another type.
        ValueError: ``complementary`` without a field, or fields of other sides.

    Examples:
        >>> collate = FusionCollator(tokenizer, image_processor)
        >>> loader = DataLoader(posts, batch_size=32, shuffle=True, collate_fn=collate)
        >>> output = model(**next(iter(loader)))
    """

    def __init__(
        self,
        main: Preprocess | None,
        complementary: Preprocess | Mapping[str, Preprocess | None] | None,
        *,
        main_field: str = "text",
        complementary_field: str | Mapping[str, str] | None = "image",
        label_field: str = "label",
    ):
        self.several = isinstance(complementary, Mapping)
        others = dict(complementary) if self.several else {"complementary": complementary}
        for name, preprocess in (("main", main), *others.items()):
            if preprocess is not None and not callable(preprocess):
                raise TypeError(
                    f"{name} must be a tokenizer, an image processor, a function of a list of values or None, "
                    f"got {type(preprocess).__name__}"
                )
        if complementary_field is None and complementary is not None:
            raise ValueError("complementary_field=None is for one side: leave complementary at None, or name its field")
        self.sides = {"inputs" if complementary_field is None else "main_inputs": (main_field, main)}
        """Model input -> (field, preprocessing); with several sides the inputs are called "complementary_inputs.NAME"."""
        if self.several:
            if not others or "present" in others:
                raise ValueError(f"complementary must be a dict of sides, none of them called 'present', got {list(others)}")
            fields = {name: name for name in others} if complementary_field == "image" else complementary_field
            if not isinstance(fields, Mapping) or set(fields) != set(others):
                raise ValueError(f"complementary_field must be a dict of the fields of {list(others)}, got {complementary_field!r}")
            self.sides |= {f"complementary_inputs.{name}": (fields[name], each) for name, each in others.items()}
        elif complementary_field is not None:
            self.sides["complementary_inputs"] = (complementary_field, complementary)
        self.label_field = label_field

    def __call__(self, samples: Sequence[Post | Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``main_inputs`` and ``complementary_inputs``, or ``inputs`` of one side; also ``labels`` if the samples have them.

        Integer labels are returned as int64: (B,) class indices, or (B, C) with 0 or 1 for each class. Floating-point labels are
        returned as float32.

        Raises:
            TypeError, ValueError: there is no sample, a sample lacks a field, only some have labels, labels have different shapes
                or are not finite, or inputs are not tensors.
            OSError: an image can't be read.
        """
        batch = self.inputs(samples)
        labels = [_value(sample, self.label_field) if _may_have(sample, self.label_field) else None for sample in samples]
        without = sum(label is None for label in labels)
        if without not in (0, len(samples)):
            raise ValueError(
                f"{without} of {len(samples)} samples have no {self.label_field!r}: either all of a batch have labels, or none"
            )
        if not without:
            batch["labels"] = _labels(labels)
        return batch

    def inputs(self, samples: Sequence[Post | Mapping[str, Any]]) -> dict[str, Any]:
        """Build a batch without labels."""
        if not samples:
            raise ValueError("the list of samples is empty: a batch needs at least one")
        batch: dict[str, Any] = {}
        for name, (field, preprocess) in self.sides.items():
            side, _, one_of = name.partition(".")
            values = [_value(sample, field, may_be_missing=bool(one_of)) for sample in samples]
            if not one_of:
                batch[name] = _inputs(name, preprocess, values)
                continue
            others = batch.setdefault(side, {"present": {}})
            others[one_of], present = _with_missing(name, preprocess, values)
            others["present"] |= {} if present is None else {one_of: present}
        return batch


def _may_have(sample: Post | Mapping[str, Any], field: str) -> bool:
    return isinstance(sample, Post) or field in sample


def _value(sample: Post | Mapping[str, Any], field: str, *, may_be_missing: bool = False) -> Any:
    if isinstance(sample, Post):
        if may_be_missing and field == "image" and sample.image is None:
            return None
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
    return _as_shown(sample[field])


def _as_shown(value: Any) -> Any:
    """Convert PIL images, and lists of them, to RGB as a viewer shows them; return other values unchanged."""
    if isinstance(value, (list, tuple)) and value and all(is_pillow_image(each) for each in value):
        return [load_image(each) for each in value]
    return load_image(value) if is_pillow_image(value) else value


def _inputs(name: str, preprocess: Preprocess | None, values: list[Any]) -> Any:
    if preprocess is None or isinstance(preprocess, StackEach):
        try:
            return StackEach(torch.as_tensor)(values) if preprocess is None else preprocess(values)
        except RuntimeError as error:
            raise ValueError(f"{name} can't be stacked: {error}; resize or pad them to one shape") from error
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


def _with_missing(name: str, preprocess: Preprocess | None, values: list[Any]) -> tuple[Any, Tensor | None]:
    """Return the inputs and a bool mask (B,) of present values: None for the mask if all are present, (None, None) if none is."""
    present = torch.tensor([value is not None for value in values])
    if not present.any():
        return None, None
    inputs = _inputs(name, preprocess, [value for value in values if value is not None])
    if present.all():
        return inputs, None
    # a missing row repeats the present row before it, or the first present one, so that the encoder's output is finite
    rows = (present.cumsum(0) - 1).clamp(min=0)
    if not isinstance(inputs, dict):
        return inputs[rows], present
    count = present.sum()
    return {key: value[rows] if value.shape[:1] == (count,) else value for key, value in inputs.items()}, present


def _labels(values: list[Any]) -> Tensor:
    expected = "labels must be numbers, or lists of one length with 0 or 1 for each class"
    tensors = []
    for index, value in enumerate(values):
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            tensor = None
        if tensor is None or tensor.is_complex():
            hint = "; convert class names to indices first" if isinstance(value, str) else ""
            raise ValueError(f"{expected}, got {value!r} of sample {index} of the batch{hint}")
        tensors.append(tensor.float() if tensor.is_floating_point() else tensor.long())
        if not tensors[-1].isfinite().all():
            raise ValueError(f"{expected}, got {value!r} of sample {index} of the batch, which is not finite as float32")
    try:
        return torch.stack(tensors)
    except RuntimeError as error:
        raise ValueError(f"{expected}: {error}") from error
