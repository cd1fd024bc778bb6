"""Where frozen encoders can be got again: what a save says of them, and how that is read."""

import functools
import importlib
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .families import encode, find_family, supported_encoders

Source = dict[str, Any]
"""Plain values: ``library``, ``class``, ``name`` and what else that library needs to find the encoder."""

_WHOLE = {"BartEncoder": "BartModel", "WhisperEncoder": "WhisperModel"}
"""Encoders that are a part, ``encoder``, of what checkpoints hold."""
_OVERLAY = ("file", "hf_hub_id", "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
"""Of a timm model's ``pretrained_cfg``: where weights come from, and how images are made for them."""


def source_of(encoder: nn.Module) -> Source | None:
    """Say where an encoder can be got again, for :func:`load_source`; nothing is looked up.

    Returns:
        Of transformers: library, class, name (a folder by its whole path), commit hash (``revision``) if known, dtype. Of timm:
        library, class, name with its tag, what it was made with (``settings``; versions that don't keep it: what shows in its
        attributes), what differs from the name's own ``pretrained_cfg`` (``overlay``), how it pools now, dtype. None for an encoder
        of neither, of a subclass of a supported class, made from a configuration, or with settings that are no plain values.
    """
    # fully_shard puts a class of its own in front
    kind = next(cls for cls in type(encoder).__mro__ if not cls.__name__.startswith("FSDP"))
    name = f"{kind.__module__}.{kind.__qualname__}"
    if _is_supported(name):
        library = name.partition(".")[0]
        described = {"transformers": _in_transformers, "timm": _in_timm}.get(library, lambda encoder: None)(encoder)
        dtype = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), None)
        if described is not None and dtype is not None:
            return {"library": library, "class": name, **described, "dtype": str(dtype).removeprefix("torch.")}
    return None


def load_source(source: Source) -> nn.Module:
    """Get an encoder again, in eval mode and without gradients.

    Only classes of registered families are made, and only by transformers and timm; nothing else that a file names is run.

    Args:
        source: what :func:`source_of` gave.

    Raises:
        ValueError: it is damaged or names a class that is not supported, or what it names is of another class by now.
        Exception: what the library raises where there is no such encoder, or no network.
    """
    kinds = {"library": str, "class": str, "name": str, "dtype": str, "settings": dict, "overlay": dict}
    source = {"settings": {}, "overlay": {}, **source}
    dtype = getattr(torch, str(source.get("dtype")), None)
    if not all(isinstance(source.get(key), kind) for key, kind in kinds.items()) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"this says of no encoder where it is: {source!r:.300}; expected library, class, name and dtype")
    library, cls, name = source["library"], source["class"], source["name"]
    if library not in ("transformers", "timm") or not cls.startswith(f"{library}.") or not _is_supported(cls):
        raise ValueError(f"{cls!r:.99} of {library!r:.99} is no supported encoder and is not made: don't trust where it is named")
    encoder = (_from_transformers if library == "transformers" else _from_timm)(source)
    if f"{type(encoder).__module__}.{type(encoder).__qualname__}" != cls:
        raise ValueError(f"{name} is a {type(encoder).__name__}, expected a {cls.rpartition('.')[2]}")
    return encoder.to(dtype).eval().requires_grad_(False)


def encoder_of(function: Callable[..., Tensor]) -> tuple[nn.Module, str | None] | None:
    """Give the encoder and pooling of a function that is a supported encoder's plain feature; None for any other.

    Known are ``functools.partial(mope_fast.encoders.encode, encoder, pooling=...)`` and what says by ``encodes`` that it gives the
    same as one, as :class:`FeatureCache` does.
    """
    function = getattr(function, "encodes", function)
    if not isinstance(function, functools.partial) or function.func is not encode or len(function.args) != 1:
        return None
    (encoder,) = function.args
    return (encoder, function.keywords.get("pooling")) if find_family(encoder) is not None else None


def _is_supported(cls: str) -> bool:
    return any(cls in models for models in supported_encoders().values())


# transformers


def _in_transformers(encoder: nn.Module) -> Source | None:
    name = getattr(encoder.config, "_name_or_path", None)
    if not name:
        return None
    # a path from this folder means nothing to a program that starts in another
    found = {"name": os.path.abspath(name) if os.path.isdir(name) else name}
    commit = getattr(encoder.config, "_commit_hash", None)
    return found if commit is None else {**found, "revision": commit}


def _from_transformers(source: Source) -> nn.Module:
    module, _, name = source["class"].rpartition(".")
    module = importlib.import_module(module)
    cls, place = getattr(module, name), {"revision": source["revision"]} if "revision" in source else {}
    if name in _WHOLE:
        config = cls.config_class.from_pretrained(source["name"], **place)
        if name not in (config.architectures or ()):
            return getattr(module, _WHOLE[name]).from_pretrained(source["name"], **place).encoder
    return cls.from_pretrained(source["name"], **place)


# timm


def _in_timm(encoder: nn.Module) -> Source | None:
    import timm

    config = getattr(encoder, "pretrained_cfg", None) or {}
    architecture, tag, origin = config.get("architecture"), config.get("tag"), config.get("source")
    if not architecture or not timm.is_model(architecture) or "state_dict" in config:
        return None
    if origin == "local-dir":
        name, own = f"local-dir:{os.path.abspath(config['file'])}", config
    elif origin == "hf-hub":
        name, own = f"hf-hub:{config['hf_hub_id']}", config
    else:
        name = f"{architecture}.{tag}" if tag else architecture
        registered = timm.get_pretrained_cfg(name)
        own = {} if registered is None else registered.to_dict()
    overlay = {key: config[key] for key in _OVERLAY if key in config and config[key] != own.get(key)}
    if "file" in overlay:
        overlay["file"] = os.path.abspath(overlay["file"])
    now = {"global_pool": _pooling(encoder), "num_classes": encoder.num_classes}
    # versions of timm that don't keep what a model was made with: what shows in its attributes has to do
    settings = {**now, **({"fc_norm": not isinstance(encoder.fc_norm, nn.Identity)} if hasattr(encoder, "fc_norm") else {})}
    settings |= {**getattr(encoder, "_model_args", {}), "img_size": encoder.patch_embed.img_size}
    found = {"name": name, "settings": settings, "overlay": overlay, **now}
    try:
        return json.loads(json.dumps(found))
    except TypeError:  # made with a class or a function of the user's
        return None


def _from_timm(source: Source) -> nn.Module:
    import timm

    name, classes, pooling = source["name"], source.get("num_classes"), source.get("global_pool")
    settings, overlay = ({key: _tuples(value) for key, value in source[part].items()} for part in ("settings", "overlay"))
    unknown = [key for key in settings if key in inspect.signature(timm.create_model).parameters]
    if unknown := [*unknown, *(key for key in overlay if key not in _OVERLAY)]:
        raise ValueError(f"timm's {name} comes with {unknown}, which no save says of an encoder: don't trust it")
    if ":" in name and not inspect.signature(timm.models.load_state_dict).parameters["weights_only"].default:
        raise ValueError(f"this version of timm runs whatever a file of weights says: update it, to load {name} by a save's word")
    file = overlay.pop("file", None)
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"{file} is not there: the weights of timm's {name} were read from it")
    if file is not None and file.endswith(".npz"):
        overlay |= {"file": file, "custom_load": True}
    elif file is not None:
        # read here: versions of timm differ in what a pickle may do
        overlay["state_dict"] = timm.models.load_state_dict(file, weights_only=True)
    encoder = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **settings)
    if "state_dict" in overlay:
        del encoder.pretrained_cfg["state_dict"]
        encoder.pretrained_cfg["file"] = file
    if pooling not in (None, _pooling(encoder)):  # changed after it was made
        encoder.reset_classifier(classes, pooling)
    return encoder


def _pooling(encoder: nn.Module) -> str:
    """A Swin Transformer's is in its head, and its attribute is what it was made with."""
    pool = getattr(getattr(encoder, "head", None), "global_pool", None)
    return encoder.global_pool if pool is None else pool.pool_type


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
