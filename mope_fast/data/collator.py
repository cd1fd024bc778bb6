"""FusionCollator: samples to the keyword arguments of a fusion's forward."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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


class EachFrame:
    """A transform of images made one of videos, for a side of ``frames``: (B, T, ...), T the most frames of a video.

    Called with a list of videos, each a list of images, it gives what the transform gives of all frames together, a tensor being
    ``"frames"``; shorter videos are padded with zeros, and ``"frame_mask"``, bool (B, T), is True for real frames.

    Args:
        preprocess: of a list of images, as for :class:`FusionCollator`.
        most: frames that are taken of a longer video, evenly spread over it; None for all.

    Raises:
        ValueError: a video has no frame, or the transform gives no row of each frame.
    """

    def __init__(self, preprocess: Preprocess, most: int | None = None):
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise ValueError(f"most must be an integer >= 1 or None, got {most!r}")
        self.preprocess, self.most = preprocess, most

    def __call__(self, videos: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
        videos = [video if hasattr(video, "__len__") else list(video) for video in videos]
        if empty := [index for index, frames in enumerate(videos) if not len(frames)]:
            raise ValueError(f"video {empty[0]} of the batch has no frame: a missing one is None")
        taken = [self._taken(frames) for frames in videos]
        counts = [len(frames) for frames in taken]
        made = _inputs("frames", self.preprocess, [frame for frames in taken for frame in frames])
        made = made if isinstance(made, dict) else {"frames": made}
        if wrong := {name: tuple(value.shape) for name, value in made.items() if value.shape[:1] != (sum(counts),)}:
            raise ValueError(f"{sum(counts)} frames were given, but the transform made {wrong} of them: it must give a row of each")
        padded = {name: pad_sequence(value.split(counts), batch_first=True) for name, value in made.items()}
        return {**padded, "frame_mask": torch.arange(max(counts)) < torch.tensor(counts)[:, None]}

    def _taken(self, frames: Sequence[Any]) -> Sequence[Any]:
        if self.most is None or len(frames) <= self.most:
            return frames
        return [frames[index] for index in torch.linspace(0, len(frames) - 1, self.most).round().int().tolist()]


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
        complementary: likewise for the other side; of several sides a dict of these by name, :class:`EachFrame` for video. A
            sample's side is missing where its value is None: ``"present"`` says so to the model, the row is another sample's, and
            the whole side is None where no sample of the batch has it. Of a post without an image, too, in place of a grey one.
        main_field, complementary_field, label_field: where a sample has them. Samples without the label field, or with None in it,
            make batches without labels. Of several sides ``complementary_field`` is a dict; by default fields are called as sides.

    Raises:
        TypeError: ``main`` or ``complementary`` is none of these.
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
        """Of each input of the model its field and what makes it; those of several sides are "complementary_inputs.NAME"."""
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
    """Pillow's images, and lists of them, in RGB as a viewer shows them; all else as it is."""
    if isinstance(value, (list, tuple)) and value and all(is_pillow_image(each) for each in value):
        return [load_image(each) for each in value]
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


def _with_missing(name: str, preprocess: Preprocess | None, values: list[Any]) -> tuple[Any, Tensor | None]:
    """Inputs where some are None, and which are not; None and None where all are."""
    present = torch.tensor([value is not None for value in values])
    if not present.any():
        return None, None
    inputs = _inputs(name, preprocess, [value for value in values if value is not None])
    if present.all():
        return inputs, None
    # a missing one's row is that of one before it, or the first: whatever an encoder makes of it is a number
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
            hint = "; names of classes need numbers first" if isinstance(value, str) else ""
            raise ValueError(f"{expected}, got {value!r} of sample {index} of the batch{hint}")
        tensors.append(tensor.float() if tensor.is_floating_point() else tensor.long())
        if not tensors[-1].isfinite().all():
            raise ValueError(f"{expected}, got {value!r} of sample {index} of the batch, which is not finite as float32")
    try:
        return torch.stack(tensors)
    except RuntimeError as error:
        raise ValueError(f"{expected}: {error}") from error
