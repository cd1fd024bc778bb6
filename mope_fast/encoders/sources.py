"""Describe in a save where a frozen encoder came from, and load it again from that description."""

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
"""Plain values: ``library``, ``class``, ``name`` and whatever else the library needs to find the encoder."""

_WHOLE = {"BartEncoder": "BartModel", "WhisperEncoder": "WhisperModel"}
"""Encoders that are the submodule ``encoder`` of the model in a checkpoint."""
_OVERLAY = ("file", "hf_hub_id", "input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
"""Keys of a timm model's ``pretrained_cfg`` that say where its weights come from and how its images are prepared."""


def source_of(encoder: nn.Module) -> Source | None:
    """Describe where an encoder can be loaded from again, for :func:`load_source`; nothing is looked up.

    Returns:
        For transformers: library, class, name (an absolute path for a folder), commit hash (``revision``) if known, dtype. For
        timm: library, class, name with its tag, the arguments it was created with (``settings``; for versions that don't keep them,
        what its attributes show), what differs from the ``pretrained_cfg`` registered for the name (``overlay``), its current
        pooling, dtype. None for an encoder of another library, one whose class is a subclass of a supported class, one created from
        a configuration, or one whose settings are not plain values.
    """
    # fully_shard puts its own class in front
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
    """Load an encoder from its description, in eval mode and without gradients.

    Only classes of registered families are created, and only by transformers and timm; nothing else that a file names is run.

    Args:
        source: what :func:`source_of` returned.

    Raises:
        ValueError: ``source`` is damaged or names a class that is not supported, or the encoder it names now has another class.
        Exception: what the library raises if there is no such encoder, or no network.
    """
    kinds = {"library": str, "class": str, "name": str, "dtype": str, "settings": dict, "overlay": dict}
    source = {"settings": {}, "overlay": {}, **source}
    dtype = getattr(torch, str(source.get("dtype")), None)
    if not all(isinstance(source.get(key), kind) for key, kind in kinds.items()) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"this doesn't describe where an encoder is: {source!r:.300}; expected library, class, name and dtype")
    library, cls, name = source["library"], source["class"], source["name"]
    if library not in ("transformers", "timm") or not cls.startswith(f"{library}.") or not _is_supported(cls):
        raise ValueError(f"{cls!r:.99} of {library!r:.99} is not a supported encoder: don't trust the file that names it")
    encoder = (_from_transformers if library == "transformers" else _from_timm)(source)
    if f"{type(encoder).__module__}.{type(encoder).__qualname__}" != cls:
        raise ValueError(f"{name} is a {type(encoder).__name__}, expected a {cls.rpartition('.')[2]}")
    return encoder.to(dtype).eval().requires_grad_(False)


def encoder_of(function: Callable[..., Tensor]) -> tuple[nn.Module, str | None] | None:
    """Return the encoder and pooling of a function that computes a supported encoder's plain feature; None for any other.

    These are ``functools.partial(mope_fast.encoders.encode, encoder, pooling=...)`` and objects whose attribute ``encodes`` is such
    a partial with the same output, as that of :class:`FeatureCache`.
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
    # a relative path would be wrong for a program that starts in another folder
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
    # some versions of timm don't keep the arguments a model was created with: then its attributes are used
    settings = {**now, **({"fc_norm": not isinstance(encoder.fc_norm, nn.Identity)} if hasattr(encoder, "fc_norm") else {})}
    settings |= {**getattr(encoder, "_model_args", {}), "img_size": encoder.patch_embed.img_size}
    found = {"name": name, "settings": settings, "overlay": overlay, **now}
    try:
        return json.loads(json.dumps(found))
    except TypeError:  # created with a user's class or function
        return None


def _from_timm(source: Source) -> nn.Module:
    import timm

    name, classes, pooling = source["name"], source.get("num_classes"), source.get("global_pool")
    settings, overlay = ({key: _tuples(value) for key, value in source[part].items()} for part in ("settings", "overlay"))
    unknown = [key for key in settings if key in inspect.signature(timm.create_model).parameters]
    if unknown := [*unknown, *(key for key in overlay if key not in _OVERLAY)]:
        raise ValueError(f"timm's {name} comes with {unknown}, which no save contains for an encoder: don't trust it")
    if ":" in name and not inspect.signature(timm.models.load_state_dict).parameters["weights_only"].default:
        raise ValueError(f"this version of timm runs any code in a weights file: update timm to load {name}, which a save names")
    file = overlay.pop("file", None)
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: the weights of timm's {name} were read from it")
    if file is not None and file.endswith(".npz"):
        overlay |= {"file": file, "custom_load": True}
    elif file is not None:
        # read here, with weights_only: versions of timm differ in what they let a pickle do
        overlay["state_dict"] = timm.models.load_state_dict(file, weights_only=True)
    encoder = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **settings)
    if "state_dict" in overlay:
        del encoder.pretrained_cfg["state_dict"]
        encoder.pretrained_cfg["file"] = file
    if pooling not in (None, _pooling(encoder)):  # changed after it was created
        encoder.reset_classifier(classes, pooling)
    return encoder


def _pooling(encoder: nn.Module) -> str:
    """Return the current pooling; a Swin Transformer has it in its head, and its own attribute is the one it was created with."""
    pool = getattr(getattr(encoder, "head", None), "global_pool", None)
    return encoder.global_pool if pool is None else pool.pool_type


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
