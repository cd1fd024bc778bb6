"""Preprocessing of lists of values into an encoder's inputs: save it to a folder, load it, or get the default of its library."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..encoders import family_of
from ..encoders.sources import Source
from .collator import EachFrame, Preprocess, StackEach, TimmTransform

FIELDS = {
    "input_ids": "text", "pixel_values": "image", "x": "image", "img": "image", "input_values": "audio", "input_features": "audio",
}  # fmt: skip
"""Name of an encoder's main input -> name of the sample field."""
_BASES = ("PreTrainedTokenizerBase", "ImageProcessingMixin", "FeatureExtractionMixin", "ProcessorMixin")


def keep(preprocess: Preprocess | None, folder: Path) -> dict[str, Any] | None:
    """Describe a preprocessing function in plain values; a transformers processor is also saved into ``folder``, which it creates.

    Returns:
        None for None; else a dict with a ``kind``: "transformers", "timm", "frames", or "function" with the name of a function that
        can't be saved.
    """
    if preprocess is None:
        return None
    if isinstance(preprocess, TimmTransform) and (config := _plain(preprocess.config)) is not None:
        return {"kind": "timm", "config": config}
    if isinstance(preprocess, EachFrame) and (inner := keep(preprocess.preprocess, folder))["kind"] != "function":
        return {"kind": "frames", "inputs": inner, "most": preprocess.most}
    processor, settings = preprocess, None
    if isinstance(preprocess, functools.partial) and not preprocess.args:
        processor, settings = preprocess.func, _plain(preprocess.keywords)
    if _of_transformers(type(processor).__name__) is type(processor) and (settings is not None or processor is preprocess):
        processor.save_pretrained(folder)
        return {"kind": "transformers", "class": type(processor).__name__, "settings": settings}
    return {"kind": "function", "name": _name(preprocess)}


def read(kept: Mapping[str, Any], folder: Path) -> Preprocess:
    """Load what :func:`keep` saved; functions can't be loaded.

    Raises:
        TypeError, KeyError, ValueError, OSError: the description or the folder is damaged.
    """
    if kept["kind"] == "timm":
        return TimmTransform(kept["config"])
    if kept["kind"] == "frames":
        return EachFrame(read(kept["inputs"], folder), kept["most"])
    if kept["kind"] != "transformers" or (cls := _of_transformers(kept["class"])) is None:
        raise ValueError(f"it names {kept!r:.200}, which this version of mope_fast doesn't know")
    processor = cls.from_pretrained(folder)
    return processor if kept["settings"] is None else functools.partial(processor, **kept["settings"])


def own_preprocessing(encoder: nn.Module, source: Source | None) -> tuple[Preprocess, str]:
    """Return the default preprocessing of an encoder's library, and its description.

    Args:
        source: where the encoder comes from; a transformers encoder's processor is loaded from the same place.

    Raises:
        ValueError: the library has no known preprocessing for it, or the encoder's source is not known.
        OSError: the source has no processor.
    """
    family = family_of(encoder)
    if type(encoder).__module__.startswith("timm."):
        made = TimmTransform.of(encoder)
        return made, f"timm's transform to {made.config['input_size']}"
    if source is None or source["library"] != "transformers" or family.input_name not in FIELDS:
        raise ValueError(f"the preprocessing of a {type(encoder).__name__} is not known")
    import transformers

    place = {"revision": source["revision"]} if "revision" in source else {}
    kinds = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    processor = getattr(transformers, kinds[FIELDS[family.input_name]]).from_pretrained(source["name"], **place)
    words = f"{type(processor).__name__} of {source['name']}"
    if family.input_name == "input_ids":
        processor.pad_token = processor.pad_token or processor.eos_token  # GPT-2 has none
        return functools.partial(processor, padding=True, truncation=True, return_tensors="pt"), f"{words}, padded and truncated"
    if family.input_name == "input_values":
        return functools.partial(processor, padding=True, return_tensors="pt"), f"{words}, padded"
    return processor, words


def _of_transformers(name: str) -> type | None:
    """Return transformers' tokenizer or processor class of this name, or None."""
    try:
        import transformers
    except ImportError:
        return None
    cls = getattr(transformers, name, None)
    bases = tuple(getattr(transformers, base) for base in _BASES)
    return cls if isinstance(cls, type) and issubclass(cls, bases) else None


def _plain(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values after a round trip through JSON, tuples as lists; None if JSON can't hold them."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except (TypeError, ValueError):
        return None


def _name(function: Callable[..., Any]) -> str:
    if isinstance(function, StackEach):
        return f"StackEach of {_name(function.transform)}"
    if isinstance(function, EachFrame):
        return f"EachFrame of {_name(function.preprocess)}"
    if isinstance(function, functools.partial):
        return f"partial of {_name(function.func)}"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
