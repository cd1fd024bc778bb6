"""Settings that document their meaning and the source of their default."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, asdict, field, fields
from typing import Any, ClassVar

LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest finite float32."""
_KINDS: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}


def setting(default: Any, meaning: str, source: str) -> Any:
    """Return a dataclass field; the default is MISSING for a required setting."""
    return field(default=default, metadata={"meaning": meaning, "source": source})


def check_value(name: str, value: Any, annotation: Any) -> None:
    """Raise TypeError for a value that doesn't match its annotation, and ValueError for a number that is not finite in float32.

    Only annotations int, float, bool and str, each with or without ``| None``, are checked. Numbers must be Python's own, and a
    bool doesn't count as an integer.
    """
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kind = _KINDS.get(text.removesuffix(" | None"))
    if kind is None or (value is None and text.endswith("None")):
        return
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        hint = ": call .item() on it" if hasattr(value, "item") else ""
        raise TypeError(f"{name} must be {text}, got {value!r:.80}{hint}")
    if kind is not int and isinstance(value, (int, float)) and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be finite in float32, got {value}")


def check_types(settings: Any) -> None:
    """Check every field of a dataclass with :func:`check_value`."""
    for item in fields(settings):
        check_value(f"{type(settings).__name__}.{item.name}", getattr(settings, item.name), item.type)


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """Decorate a constructor so that its arguments are checked by :func:`check_value` first."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # the call below raises Python's own message, which says more
        for name, value in given.items():
            check_value(f"{type(self).__name__}: {name}", value, signature.parameters[name].annotation)
        init(self, *args, **kwargs)

    return call


class Settings:
    """Base of immutable dataclasses whose fields are made by :func:`setting`; ``dataclasses.replace`` makes a changed copy.

    Attributes that are not settings can be set: transformers' Trainer sets its own (``use_cache``) on a model's config.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__ and name in vars(self):
            raise FrozenInstanceError(f"{type(self).__name__}.{name} can't be changed: use dataclasses.replace(config, {name}=...)")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dataclass_fields__:
            raise FrozenInstanceError(f"{type(self).__name__}.{name} can't be deleted")
        super().__delattr__(name)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for JSON."""
        return asdict(self)

    def to_json_string(self) -> str:
        """Return the settings as JSON; transformers' loggers call this."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def describe(cls) -> str:
        """Return one line for each setting: name, default, meaning, source."""
        return "\n".join(
            f"{f.name}{'' if f.default is MISSING else f' = {f.default!r}'}: {f.metadata['meaning']} [{f.metadata['source']}]"
            for f in fields(cls)
        )
