"""Settings that say what they mean and where their default comes from."""

from __future__ import annotations

import json
from dataclasses import MISSING, FrozenInstanceError, asdict, field, fields
from typing import Any

_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str}


def setting(default: Any, meaning: str, source: str) -> Any:
    """A dataclass field; MISSING for one that has to be given."""
    return field(default=default, metadata={"meaning": meaning, "source": source})


def check_types(settings: Any) -> None:
    """Raises TypeError for a field that isn't what its annotation says, where that is a plain type, or such or None.

    Annotations have to be strings: ``from __future__ import annotations`` in the dataclass' module.
    """
    for item in fields(settings):
        value, kind = getattr(settings, item.name), _KINDS.get(item.type.removesuffix(" | None"))
        if kind is None or (value is None and item.type.endswith("None")):
            continue
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise TypeError(f"{type(settings).__name__}.{item.name} must be {item.type}, got {value!r}")


class Settings:
    """Base of dataclasses whose fields are made by :func:`setting`; they can't be changed, ``dataclasses.replace`` makes another.

    Attributes that are no settings can be set: transformers' Trainer leaves notes of its own (``use_cache``) on a model's config.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dataclass_fields__ and name in vars(self):
            raise FrozenInstanceError(f"{type(self).__name__}.{name} can't be changed: use dataclasses.replace(config, {name}=...)")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dataclass_fields__:
            raise FrozenInstanceError(f"{type(self).__name__}.{name} can't be deleted")
        super().__delattr__(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def to_json_string(self) -> str:
        """As transformers' loggers ask for it."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def describe(cls) -> str:
        """One line a setting: name, default, meaning, source."""
        return "\n".join(
            f"{f.name}{'' if f.default is MISSING else f' = {f.default!r}'}: {f.metadata['meaning']} [{f.metadata['source']}]"
            for f in fields(cls)
        )
