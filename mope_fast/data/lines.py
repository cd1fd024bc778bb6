"""Helpers shared by readers of text files: numbered lines, checks of choices, and one exception for all problems of a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SHOWN = 10
"""Number of problems of a file that are listed one by one."""


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return the non-blank lines with their line numbers; bytes that aren't UTF-8 are kept as surrogates."""
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    return [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def decoded(data: bytes) -> str:
    """Decode UTF-8; if that fails, Windows-1252 with U+FFFD for its undefined bytes."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: the text is not JSON, or not a JSON object.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {text!r:.120}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with id, text, img and label, got {text!r:.120}")
    return row


def is_unicode(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8; a lone surrogate can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def problems_in(path: Path, problems: Sequence[str]) -> ValueError:
    """Return one exception with the first :data:`SHOWN` problems and the number of all."""
    return ValueError(f"{len(problems)} problem{'s' * (len(problems) > 1)} in {path}:\n{listed(problems)}")


def listed(problems: Sequence[str]) -> str:
    """Return the first :data:`SHOWN` problems, one per line, and how many more there are."""
    more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "\n".join(problems[:SHOWN]) + more
