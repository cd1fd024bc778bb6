"""A game's items, each with an icon and a sentence, neither of which alone always tells the kind of item.

They are read at run time from PyPI's osrsreboxed 2.3.33, whose code is GPL-3.0-only; the game's content, Old School RuneScape's,
belongs to its owners. None of it is kept or shown: results contain numbers only.
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
    name: str  # reveals the kind, so it is not an input of models
    sentence: str
    icon: str  # PNG in base64
    slot: str
    weapon: str | None  # kind of weapon


def read_items(folder: Path) -> list[Item]:
    """Read all items that can be worn, each combination of icon and sentence once: 4,296 in 12 slots.

    Args:
        folder: folder of the unpacked package.
    """
    records = json.loads((folder / FILE).read_text(encoding="utf-8")).values()
    items, seen = [], set()
    for record in records:
        if any(record[flag] for flag in ("noted", "placeholder", "duplicate")) or not (record["examine"] and record["icon"]):
            continue
        # "Dragon dagger" and "Dragon dagger (2)" count as one item
        key = (record["icon"], record["examine"], re.sub(r"\W*\d+\W*$", "", record["name"]))
        slot = (record["equipment"] or {}).get("slot") if record["equipable_by_player"] else None
        if key not in seen and slot:
            kind = (record["weapon"] or {}).get("weapon_type")
            items.append(Item(record["id"], record["name"], record["examine"], record["icon"], slot, kind))
        seen.add(key)
    return items


def picture(item: Item) -> Image.Image:
    """Draw the icon, 36 x 32 and transparent, on a white square."""
    icon = Image.open(io.BytesIO(base64.b64decode(item.icon))).convert("RGBA")
    side = max(icon.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(icon, ((side - icon.width) // 2, (side - icon.height) // 2))
    return square.convert("RGB")


def families(items: Sequence[Item]) -> list[int]:
    """Return each item's family, 1,848 in total: items share one if they share icon, sentence, or name without numbers and
    brackets.
    """
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
