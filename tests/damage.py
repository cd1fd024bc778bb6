"""Random damage to files: readers read them or raise what they document, nothing else."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMES = 12
VALUES = [
    None, True, -1, 0, 3, 10**12, 10**40, 1.5, float("nan"), float("inf"), "", "x", "\ud800", "..", "\0", [], [1], [[]], {"a": 1}
]  # fmt: skip
"""What JSON may have in a place where something else is expected."""


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Cut, flipped, overwritten, nested deeply, or with a part removed or repeated."""
    first, second = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    other = draw.choice([b"\xff" * 8, b"\0" * 8, b"9" * 20, b"[" * 100_000, b'{"a":' * 20_000, b"\\ud800"])
    flipped = bytearray(data)
    for _ in range(draw.choice([1, 8, 64])):
        flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return draw.choice([
        data[:first], bytes(flipped), data[:first] + other + data[first:], data[:first] + other + data[second:],
        data[:first] + data[second:], data[:second] + data[first:],
    ])  # fmt: skip


def damaged_head(data: bytes, draw: random.Random) -> bytes:
    """Where headers are."""
    return damaged(data[:2000], draw) + data[2000:]


def another_value(row: dict[str, Any], draw: random.Random) -> str:
    """An object in JSON, something unexpected in one of its fields."""
    return json.dumps({**row, draw.choice(list(row)): draw.choice(VALUES)})


def hold(file: Path, read: Callable[[], Any], errors: Any, change: Callable[[bytes, random.Random], bytes] = damaged) -> None:
    """Read the file with many a damage; it is whole again afterwards."""
    data, draw, refused = file.read_bytes(), random.Random(file.name), 0
    for _ in range(TIMES):
        file.write_bytes(change(data, draw))
        try:
            read()
        except errors:
            refused += 1
    assert refused, "is it read at all?"
    file.write_bytes(data)
