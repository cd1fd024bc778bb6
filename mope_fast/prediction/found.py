"""Lookup of a save's encoders, by the sources in the save or by the user's arguments."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..encoders import PromptedEncoder, encode, family_of, find_family, supported_encoders
from ..encoders.sources import Source, encoder_of, load_source, source_of
from ..models import PromptTuned, Side, checkpoint


class Found(NamedTuple):
    """One side of a model, with its encoder."""

    value: Any
    """The value to pass to the model's class."""
    encoder: nn.Module | None = None
    """The supported encoder in ``value``."""
    source: Source | None = None
    by_save: bool = False
    """Whether the encoder was loaded by the name in the save."""
    sampled_as: str = ""


def find_encoder(folder: Path, side: str, given: Any, saved: dict[str, Any]) -> Found:
    """Find the encoder of one side: "main", "complementary", or "complementary.NAME" of several."""
    described, source = described_side(saved, side), saved.get("sources", {}).get(side)
    is_function = side != "main" and described is None
    if isinstance(given, Side):
        given = given.source
    if not (is_function or isinstance(described, dict)) or not isinstance(source, (dict, type(None))):
        raise ValueError(f"{folder / checkpoint.DESCRIPTION} is damaged: it doesn't describe {side}; restore it, or save it again")
    if is_function and given is None and "sources" in saved and side not in saved["sources"]:
        return Found(None)  # features are passed in
    if is_function and callable(given) and find_family(given) is None:  # includes modules that were trained
        encoder, _ = encoder_of(given) or (None, None)
        return Found(given, encoder, None if encoder is None else source_of(encoder))
    if is_function and source is None:
        raise ValueError(
            f"the {side} side of {folder} was your own function or module, which a save can't hold: pass {argument(side)}, a "
            "callable that returns the features, such as functools.partial(mope_fast.encoders.encode, encoder)"
        )
    if isinstance(given, nn.Module):
        wrapped = given.main if isinstance(given, PromptTuned) else given
        encoder = wrapped.encoder if isinstance(wrapped, PromptedEncoder) else wrapped
        family_of(encoder)
        value = functools.partial(encode, given.eval(), pooling=source["pooling"]) if is_function else given
        return Found(value, encoder, source_of(encoder) or source)
    if not isinstance(given, (str, type(None))):
        raise TypeError(f"{side} must be an encoder or the name of one, got {type(given).__name__}")
    known = _in_words(described, source)
    if isinstance(given, str):
        source = _named(side, given, known, described, source)
    if source is None:
        raise ValueError(
            f"{folder} doesn't say where to load its {side} encoder from, only that it is {known}: pass {argument(side)}, the "
            "encoder itself, or a folder or name to load it from ('bert-base-uncased', 'timm/NAME')"
        )
    try:
        encoder = load_source(source)
    except Exception as error:  # each library raises its own exceptions
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"
        raise ValueError(
            f"the {side} encoder of {folder}, {known}, can't be loaded by the name {source.get('name')!r:.200} ({why}): pass "
            f"{argument(side)}, the encoder itself, or a folder or name to load it from ('bert-base-uncased', 'timm/NAME')"
        ) from error
    if is_function:
        feature = functools.partial(encode, encoder, pooling=source.get("pooling"))
        return Found(feature, encoder, source, given is None, f"{side}.encoder")
    path = "main" if side == "main" else f"{side.replace('.', '.sides.')}.main"
    return Found(encoder, encoder, source, given is None, path)


def described_side(saved: dict[str, Any], side: str) -> Any:
    """Return a save's description of the supported encoder of a side; None if the side had no supported encoder."""
    _, _, name = side.partition(".")
    if not name:
        return saved.get(side)
    return next(each["encoder"] for each in saved["complementary"] if each["name"] == name)


def names_of_sides(folder: Path, saved: dict[str, Any]) -> list[str]:
    """Return the names of a save's sides: "main", and "complementary", or "complementary.NAME" for each of several.

    Raises:
        ValueError: the save's description is damaged.
    """
    if saved["model"] == "PromptTuned":
        return ["main"]
    sides = saved.get("complementary")
    if not isinstance(sides, list):
        return ["main", "complementary"]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) and "encoder" in each for each in sides):
        raise ValueError(f"{folder / checkpoint.DESCRIPTION} is damaged: its sides are {sides!r:.200}; restore it")
    return ["main", *(f"complementary.{each['name']}" for each in sides)]


def argument(side: str, suffix: str = "") -> str:
    """Return the text of the argument by which a side's encoder, or its preprocessing, is passed."""
    name, _, one = side.partition(".")
    return f"{name}{suffix}={{{one!r}: ...}}" if one else f"{name}{suffix}=..."


def _in_words(described: dict[str, Any] | None, source: Source | None) -> str:
    """Describe an encoder in words, as far as a save knows it."""
    words = []
    if source is not None:
        words.append(f"{str(source.get('class')).rpartition('.')[2]} {source.get('name')!r:.200} of {source.get('library')}")
    if described is not None:
        classes = [] if source is not None else [cls.rpartition(".")[2] for cls in _classes(described)]
        words.append(f"a {' or '.join(classes) or described.get('family')} whose layers have the widths {described.get('widths')}")
    return ", ".join(words)


def _classes(described: dict[str, Any]) -> tuple[str, ...]:
    """Return the class names of the family that a save names."""
    return supported_encoders().get(str(described.get("family")), ())


def _named(side: str, name: str, known: str, described: dict[str, Any] | None, source: Source | None) -> Source:
    """Return the source of an encoder by the user's name for it, with the class saved in ``described`` or ``source``."""
    library = "timm" if name.startswith("timm/") else "transformers"
    classes = _classes(described) if source is None else (str(source.get("class")),)
    classes = [cls for cls in classes if cls.startswith(f"{library}.")]
    if not classes:
        raise ValueError(
            f"{side}={name!r} is a name of a {library} model, but the save needs {known}: pass the encoder itself, or its name"
        )
    same = {key: source[key] for key in ("dtype", "settings", "global_pool", "num_classes", "pooling") if source and key in source}
    return {"dtype": "float32", **same, "library": library, "class": classes[0], "name": name.removeprefix("timm/")}
