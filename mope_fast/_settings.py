"""Settings that say what they mean and where their default comes from."""

from __future__ import annotations

from dataclasses import MISSING, asdict, field, fields
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
    """Base of frozen dataclasses whose fields are made by :func:`setting`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def describe(cls) -> str:
        """One line a setting: name, default, meaning, source."""
        return "\n".join(
            f"{f.name}{'' if f.default is MISSING else f' = {f.default!r}'}: {f.metadata['meaning']} [{f.metadata['source']}]"
            for f in fields(cls)
        )
