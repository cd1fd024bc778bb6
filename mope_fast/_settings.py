"""Settings that say what they mean and where their default comes from."""

from __future__ import annotations

from dataclasses import MISSING, asdict, field, fields
from typing import Any

_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str}


def setting(default: Any, meaning: str, source: str) -> Any:
    """A dataclass field; MISSING for one that has to be given."""
    return field(default=default, metadata={"meaning": meaning, "source": source})


class Settings:
    """Base of frozen dataclasses whose fields are made by :func:`setting`."""

    def check_types(self) -> None:
        """Raises TypeError for a value that isn't what the annotation says, where that is a plain type or such or None."""
        for item in fields(self):
            value, kind = getattr(self, item.name), _KINDS.get(item.type.removesuffix(" | None"))
            if kind is None or (value is None and item.type.endswith("None")):
                continue
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise TypeError(f"{type(self).__name__}.{item.name} must be {item.type}, got {value!r}")

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
