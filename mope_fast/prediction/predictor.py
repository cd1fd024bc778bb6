"""Predictor: a trained model with its preprocessing, saved together and applied to raw samples."""

import copy
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .._files import remove_leftovers
from .._modes import evaluating
from .._progress import tracked
from ..data import FusionCollator, Post, load_image, preprocessing
from ..encoders import find_family
from ..encoders.sources import encoder_of
from ..models import MoPEFusion, PromptTuned, checkpoint, hub
from ..models.sides import Sides, sources_of
from .found import find_encoder, names_of_sides
from .kept import DESCRIPTION, FORMAT, Inputs, completed, content_hash, is_whole, kept_inputs, read_kept, write_subfolder

KINDS = {"MoPEFusion": MoPEFusion, "PromptTuned": PromptTuned}


@dataclass(frozen=True)
class Prediction:
    """A model's prediction for one sample."""

    label: Any
    """The class: its name, or its index if classes have no names. For multi-label classification a list of all classes whose
    probability is above 0.5. For regression a number, or a list of several."""
    probabilities: dict[str, float] | list[float] | None
    """The probability of each class, by its name or by its index; None for regression."""
    experts: list[tuple[int, float]] | None
    """For each layer the expert with the highest routing score, and that score; None for a model without a router."""


class Predictor(hub.PushToHub):
    """A predictor for raw samples: it preprocesses them, runs a trained model in folded form, and names classes.

    Args:
        model: :class:`MoPEFusion` or :class:`PromptTuned`, with a head that returns (B, C). Predictions come from this model folded
            in its current state; if folding is not exact, from the model itself in eval mode.
        inputs: the collator that made the batches in training, ``FusionCollator(tokenizer, image_processor)``. For a PromptTuned it
            has one side, ``FusionCollator(tokenizer, None, complementary_field=None)``.
        class_names: names of class 0, 1, ...; None to use their indices. Regression has no class names.

    Raises:
        TypeError: the model is of another class, or ``inputs`` is not a FusionCollator.
        ValueError: the model has no head, the collator has another number of sides, or the names don't fit.
        RuntimeError: the model's weights are sharded.

    Examples:
        >>> Predictor(model, collate, class_names=["red", "blue"]).save_pretrained("adapter")
        >>> predictor = Predictor.from_pretrained("adapter")
        >>> for prediction in predictor([{"text": "which color ?", "image": "a.png"}]):
        ...     print(prediction.label, prediction.probabilities)
    """

    def __init__(self, model: MoPEFusion | PromptTuned, inputs: FusionCollator, class_names: Sequence[str] | None = None):
        if not isinstance(model, tuple(KINDS.values())):
            raise TypeError(f"model must be a {' or a '.join(KINDS)}, got {type(model).__name__}")
        if not isinstance(inputs, FusionCollator):
            raise TypeError(f"inputs must be the FusionCollator that makes the model's batches, got {type(inputs).__name__}")
        if model.head is None:
            raise ValueError(f"this {type(model).__name__} has no head, so it predicts nothing: create it with num_classes")
        if model.is_dense:
            raise ValueError("a Predictor names classes of samples, but this model classifies pixels: call it, or its fold()")
        encoders = _encoders(model)
        if set(inputs.sides) != set(encoders):
            needed, count = "FusionCollator(main, complementary)", len(encoders)
            if len(encoders) == 1:
                needed = "FusionCollator(..., None, complementary_field=None)"
            elif "complementary_inputs" not in encoders:
                names = ", ".join(f"{name.partition('.')[2]!r}: ..." for name in encoders if "." in name)
                needed = f"FusionCollator(main, {{{names}}})"
            raise ValueError(f"this {type(model).__name__} has inputs of {count} side{'s' * (count > 1)}: use {needed}")
        self.class_names = None if class_names is None else _checked_names(class_names, model)
        self.model, self.inputs = model, inputs
        try:
            folded = model.fold()
            self._outputs, self._mode = folded.outputs, nullcontext
        except ValueError:
            plain = copy.copy(model)
            plain.return_logits = False
            self._outputs, self._mode = plain, functools.partial(evaluating, model)
        self._sides = {name: _Side(encoders[name], field) for name, (field, _) in inputs.sides.items()}
        facts = getattr(getattr(model, "complementary", None), "facts", {})
        self._may_lack = {inputs.sides[f"complementary_inputs.{name}"][0]: None for name, side in facts.items() if side.optional}

    def __call__(
        self, samples: Iterable[Post | Mapping[str, Any]], batch_size: int = 32, progress: bool = False
    ) -> Iterator[Prediction]:
        """Yield one prediction per sample, in order; a batch runs when its first prediction is requested.

        Args:
            samples: the collator's samples: dicts with its fields, or posts; labels are ignored. In the field "image", or in the
                field of an image encoder, an image may be a path, which is opened by :func:`mope_fast.data.load_image`.
            batch_size: number of samples in all batches except the last.
            progress: show a progress bar.

        Raises:
            TypeError, ValueError: samples or ``batch_size`` are invalid, the head doesn't return (B, C), or logits aren't finite.
            OSError: an image can't be read.
        """
        if isinstance(samples, (str, Mapping)) or not isinstance(samples, Iterable):
            raise TypeError(f"samples must be a list of samples, got {type(samples).__name__}: give [sample] for one")
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")
        predictions = self._predictions(iter(samples), batch_size)
        if not progress:
            return predictions
        return iter(tracked(predictions, "predicting", "sample", shown=True, total=_length(samples)))

    def _predictions(self, samples: Iterator[Post | Mapping[str, Any]], batch_size: int) -> Iterator[Prediction]:
        done = 0
        while batch := list(islice(samples, batch_size)):
            yield from self._predict(batch, done)
            done += len(batch)

    def _predict(self, samples: list[Post | Mapping[str, Any]], done: int) -> list[Prediction]:
        inputs = self.inputs.inputs([self._opened(sample) for sample in samples])
        device = next(self.model.main.parameters()).device
        with torch.inference_mode(), self._mode():
            output = self._outputs(*[self._moved(name, value, device) for name, value in inputs.items()])
            logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32)).cpu()
        classes = logits.shape[-1] if self.class_names is None else len(self.class_names)
        if logits.shape != (len(samples), classes):
            raise ValueError(
                f"the head returned {tuple(logits.shape)} for {len(samples)} samples, expected {(len(samples), classes)}"
            )
        if not (finite := logits.isfinite().all(1)).all():
            first = done + int(finite.int().argmin())
            raise ValueError(f"the model returned NaN or infinite logits, first for sample {first} (from 0): look at its inputs")
        experts = [None] * len(samples)
        if output.scores is not None:
            scores, chosen = (value.t().tolist() for value in output.scores.max(-1))
            experts = [list(zip(*layers, strict=True)) for layers in zip(chosen, scores, strict=True)]
        return [self._prediction(row, layers) for row, layers in zip(logits, experts, strict=True)]

    def _moved(self, name: str, value: Any, device: torch.device) -> Any:
        if name in self._sides:
            return self._sides[name].moved(value, device)
        return {each: self._sides.get(f"{name}.{each}", _Side(None, "")).moved(part, device) for each, part in value.items()}

    def _prediction(self, logits: Tensor, experts: list[tuple[int, float]] | None) -> Prediction:
        if self.model.problem_type == "regression":
            values = logits.tolist()
            return Prediction(values[0] if len(values) == 1 else values, None, experts)
        several = self.model.problem_type == "multi_label_classification"
        values = (logits.sigmoid() if several else logits.softmax(0)).tolist()
        names = range(len(values)) if self.class_names is None else self.class_names
        if several:
            label = [name for name, value in zip(names, values, strict=True) if value > 0.5]
        else:
            label = names[values.index(max(values))]
        return Prediction(label, values if self.class_names is None else dict(zip(names, values, strict=True)), experts)

    def _opened(self, sample: Any) -> Any:
        """Return a sample with images loaded from their paths, and None for the field of an absent optional side."""
        if not isinstance(sample, Mapping):
            return sample
        fields = [side.field for side in self._sides.values() if side.is_image and side.field in sample]
        return {**self._may_lack, **sample, **{field: _opened(sample[field]) for field in fields}}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the files of the model's ``save_pretrained``, and a subfolder with its preprocessing and class names.

        transformers' tokenizers, image processors and feature extractors, also in a ``functools.partial`` with plain keyword
        arguments, are saved by their own ``save_pretrained``. For a ``TimmTransform`` its config is saved. For any other function
        only its name is saved, and :meth:`from_pretrained` requires the function as an argument.

        If the process is killed at any moment, the folder holds either the complete old save or the complete new one: the subfolder
        gets its name when it is complete, and becomes valid when the model's description names it. Its name is derived from its
        content.

        Raises:
            ValueError, NotADirectoryError: as for the model's ``save_pretrained``.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file: give save_pretrained a folder")
        folder.mkdir(parents=True, exist_ok=True)
        name = self._publish(folder)
        self.model._save(folder, {"predictor": name})
        unused = [path for path in folder.glob("predictor-*") if path.name != name]
        remove_leftovers(folder, [*unused, *folder.glob(".predictor-*.tmp")])

    def _publish(self, folder: Path) -> str:
        """Write the subfolder completely and return its name."""
        with TemporaryDirectory() as scratch:
            sides = {}
            for name, (field, preprocess) in self.inputs.sides.items():
                side = "main" if name == "inputs" else name.replace("_inputs", "")
                sides[side] = {"field": field, "inputs": preprocessing.keep(preprocess, Path(scratch, side))}
            files = sorted(path for path in Path(scratch).rglob("*") if path.is_file())
            content = {path.relative_to(scratch).as_posix(): path.read_bytes() for path in files}
        names = None if self.class_names is None else list(self.class_names)
        hashes = {file: content_hash(data) for file, data in content.items()}
        description = {"format": FORMAT, "class_names": names, "sides": sides, "files": hashes}
        content[DESCRIPTION] = json.dumps(description, indent=2).encode()
        whole = folder / f"predictor-{content_hash(content[DESCRIPTION])[:16]}"
        if is_whole(whole):
            os.utime(whole)  # it is in use again, so it must not look like a leftover
        else:
            write_subfolder(whole, content)
        for useless in folder.glob(f".{whole.name}-*.tmp"):  # left by killed or slower processes
            shutil.rmtree(useless, ignore_errors=True)
        return whole.name

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        main: nn.Module | str | None = None,
        complementary: nn.Module | Callable[..., Tensor] | str | Mapping[str, Any] | None = None,
        main_inputs: Callable[..., Any] | None = None,
        complementary_inputs: Callable[..., Any] | Mapping[str, Callable[..., Any]] | None = None,
        head: nn.Module | None = None,
        class_names: Sequence[str] | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> "Predictor":
        """Load a folder of :meth:`save_pretrained`, or of a model's own; encoders are loaded by the names in the save.

        ``folder`` may also be "user/name" of one on the Hugging Face Hub, where ``revision`` is a branch, a tag or a commit.

        A save of a model alone contains no preprocessing and no class names. Then the preprocessing of the encoders' library is
        used (tokenizer with padding and truncation; image processor; feature extractor; timm's transform) on the fields "text",
        "image" and "audio", and a warning says so.

        Args:
            main, complementary: the encoder itself, or another name for it: "bert-base-uncased", a folder, "timm/NAME". If the
                complementary side was your own function, that function. For several sides, a dict of these by name.
            main_inputs, complementary_inputs: preprocessing used instead of the saved one, as for :class:`FusionCollator`; needed
                if that was your own function. For several sides, a dict by name.
            head: as for the model's ``from_pretrained``.
            class_names: names used instead of those saved.
            device: where to run; None for the encoders' current device, which is the CPU for those loaded by name.

        Raises:
            FileNotFoundError, ValueError: there is no such save, it is damaged or doesn't fit, an encoder can't be loaded or has
                other weights than in training, or something that was not saved has to be passed; the message says what.
            OSError: a file can't be read.
            TypeError: an argument has a wrong type.
        """
        folder = hub.local_folder(folder, revision)
        name = checkpoint.saved_by(folder)
        if name not in list(KINDS):
            raise ValueError(f"{folder} was saved by {name}: Predictor loads saves of {' and '.join(KINDS)}")
        saved = KINDS[name]._read(folder)
        if saved["head"] is None and head is None:
            raise ValueError(f"{folder} was saved without a head, so it predicts nothing: pass head=... if you have one for it")
        if saved["head"] not in (None, "Linear") and head is None:
            raise ValueError(f"{folder} was saved with a custom head, {saved['head']}: pass head=..., the same module")
        kept = read_kept(folder, saved["predictor"]) if "predictor" in saved else {"class_names": None, "sides": {}}
        if name == "PromptTuned" and (complementary, complementary_inputs) != (None, None):
            raise ValueError(f"{folder} was saved by PromptTuned, which has no complementary side: pass main and main_inputs")
        names = names_of_sides(folder, saved)
        encoders = [main, *_each("complementary", complementary, names)]
        makers = [main_inputs, *_each("complementary_inputs", complementary_inputs, names)]
        given = dict(zip(names, zip(encoders, makers, strict=True), strict=True))
        inputs = {side: kept_inputs(folder, side, each, saved, kept) for side, (_, each) in given.items()}
        found = {side: find_encoder(folder, side, encoder, saved) for side, (encoder, _) in given.items()}
        facts = saved.get("complementary") if "complementary" not in names else None
        of_frames = [f"complementary.{side['name']}" for side in facts or () if side.get("frames")]
        inputs = completed(folder, inputs, found, of_frames)
        values = [side.value for side in found.values()]
        if facts:
            values = [values[0], {side.partition(".")[2]: value for side, value in zip(names[1:], values[1:], strict=True)}]
        model = KINDS[name]._make(folder, saved, *values, head=head)
        model._load(folder, saved, False, [side.sampled_as for side in found.values() if side.by_save])
        if device is not None:
            for module in (model, *(side.encoder for side in found.values() if side.encoder is not None)):
                module.to(device)
        own, other = inputs["main"], inputs.get("complementary", Inputs(None, None, True))
        made, fields = other.preprocess, other.field
        if facts:
            others = {side.partition(".")[2]: each for side, each in inputs.items() if side != "main"}
            made = {side: each.preprocess for side, each in others.items()}
            fields = {side: each.field for side, each in others.items()}
        collate = FusionCollator(own.preprocess, made, main_field=own.field, complementary_field=fields)
        return cls(model, collate, kept["class_names"] if class_names is None else class_names)


class _Side:
    """The encoder and the field of one side, used to load images and to move inputs to the device."""

    def __init__(self, encoder: nn.Module | None, field: str):
        family = None if encoder is None else find_family(encoder)
        self.encoder, self.field = encoder, field
        self.is_image = field == "image" or (family is not None and preprocessing.FIELDS.get(family.input_name) == "image")

    def moved(self, value: Any, device: torch.device) -> Any:
        """Move inputs to the device, and floating-point inputs to the encoder's dtype."""
        if value is None:
            return None
        if isinstance(value, Mapping):
            return {name: self.moved(each, device) for name, each in value.items()}
        if self.encoder is None or not value.is_floating_point():
            return value.to(device)
        return value.to(device, next(p.dtype for p in self.encoder.parameters() if p.is_floating_point()))


def _encoders(model: MoPEFusion | PromptTuned) -> dict[str, nn.Module | None]:
    """Return encoders by the names of the model's inputs; None for a side with a user's function or with features passed in."""
    if isinstance(model, PromptTuned):
        return {"inputs": model.main.encoder}
    encoders = {"main_inputs": model.main.encoder}
    for name, source in sources_of(model.complementary).items():
        key = "complementary_inputs" + (f".{name}" if isinstance(model.complementary, Sides) else "")
        encoders[key] = source.value.main.encoder if source.is_tuned else (encoder_of(source.value) or (None, None))[0]
    return encoders


def _each(argument: str, given: Any, names: list[str]) -> list[Any]:
    """Return the value given for each complementary side of a save."""
    if names[1:] in ([], ["complementary"]):
        return [given] * len(names[1:])
    known = [name.partition(".")[2] for name in names[1:]]
    if given is not None and (not isinstance(given, Mapping) or not set(given) <= set(known)):
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"{argument} must be a dict of some of the sides {known}, got {got}")
    return [None if given is None else given.get(name) for name in known]


def _opened(value: Any) -> Any:
    """Load images from paths, also within lists; other values stay as they are."""
    if isinstance(value, (list, tuple)):
        return [_opened(each) for each in value]
    return load_image(value) if isinstance(value, (str, os.PathLike)) else value


def _checked_names(names: Sequence[str], model: MoPEFusion | PromptTuned) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names must be a list of strings, got {names!r:.200}")
    if model.problem_type == "regression":
        raise ValueError("class_names are for classification, but this model was trained for regression: leave them out")
    if model.num_classes not in (None, len(names)):
        raise ValueError(f"class_names must have {model.num_classes} names, one for each output of the head, got {len(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"class_names must differ from each other, got {list(names)}")
    return tuple(names)


def _length(samples: Iterable[Any]) -> int | None:
    return len(samples) if hasattr(samples, "__len__") else None
