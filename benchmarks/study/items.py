"""A game's items: an icon and a sentence each, of which neither says what kind of item it is in all cases.

Read at run time out of PyPI's osrsreboxed 2.3.33, whose code is GPL-3.0-only; the game's content, Old School RuneScape's, belongs
to its owners. Nothing of it is kept or shown: results have figures only.
"""

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

FILE = Path("osrsreboxed", "docs", "items-complete.json")


@dataclass(frozen=True)
class Item:
    """Something that a player can wear."""

    id: int
    name: str  # says what it is: no input for a model
    sentence: str
    icon: str  # PNG in base64
    slot: str
    weapon: str | None  # its kind


def read_items(folder: Path) -> list[Item]:
    """All items that can be worn, each icon with each sentence once: 4,296 of 12 slots.

    Args:
        folder: of the unpacked package.
    """
    records = json.loads((folder / FILE).read_text(encoding="utf-8")).values()
    items, seen = [], set()
    for record in records:
        if any(record[flag] for flag in ("noted", "placeholder", "duplicate")) or not (record["examine"] and record["icon"]):
            continue
        # "Dragon dagger" and "Dragon dagger (2)" are one
        key = (record["icon"], record["examine"], re.sub(r"\W*\d+\W*$", "", record["name"]))
        slot = (record["equipment"] or {}).get("slot") if record["equipable_by_player"] else None
        if key not in seen and slot:
            kind = (record["weapon"] or {}).get("weapon_type")
            items.append(Item(record["id"], record["name"], record["examine"], record["icon"], slot, kind))
        seen.add(key)
    return items


def picture(item: Item) -> Image.Image:
    """The icon, 36 x 32 and transparent, on a white square."""
    icon = Image.open(io.BytesIO(base64.b64decode(item.icon))).convert("RGBA")
    side = max(icon.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(icon, ((side - icon.width) // 2, (side - icon.height) // 2))
    return square.convert("RGB")


def families(items: Sequence[Item]) -> list[int]:
    """The family of each: items with one icon, sentence, or name less numbers and brackets belong together. 1,848 of them."""
    parent = list(range(len(items)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[str, str], int] = {}
    for index, item in enumerate(items):
        words = re.sub(r"\(.*?\)|\d+|[^a-z ]", " ", item.name.lower()).split()
        for key in (("icon", item.icon), ("name", " ".join(words)), ("sentence", item.sentence)):
            parent[root(index)] = root(first.setdefault(key, index))
    return [root(index) for index in range(len(items))]
