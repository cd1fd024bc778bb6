"""Encoders of a few thousand parameters in place of the packaged ones, and a JSONL folder of small noisy pictures."""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import jsonl_task
import torch
from PIL import Image
from tiny_fusion import make_bert, make_dinov2
from torchvision.transforms import functional as vision

from mope_fast.data import StackEach

NAMES = ["red", "green", "blue"]


def write_folder(root: Path, train: int = 40, val: int = 12, test: int = 10, multi_label: bool = False) -> Path:
    """Samples whose class is the picture's color where the text asks for it, else the color that the text names."""
    draw = random.Random(0)
    (root / "images").mkdir(parents=True)
    (root / "labels.txt").write_text("\n".join(NAMES))
    for split, count in {"train": train, "val": val, "test": test}.items():
        lines = []
        for i in range(count):
            shown, named, asked = draw.randrange(3), draw.randrange(3), draw.random() < 0.5
            picture = torch.full((12, 12, 3), 60) + torch.randint(40, (12, 12, 3), generator=torch.Generator().manual_seed(i))
            picture[..., shown] += 120
            Image.fromarray(picture.to(torch.uint8).numpy()).save(root / "images" / f"{split}{i}.png")
            label = sorted({NAMES[shown], NAMES[named]}) if multi_label else NAMES[shown if asked else named]
            text = "which color is it ?" if asked and not multi_label else f"say {NAMES[named]}" + " now" * (i % 3)
            lines.append(json.dumps({"id": i, "text": text, "img": f"images/{split}{i}.png", "label": label}))
        (root / f"{split}.jsonl").write_text("\n".join(lines))
    return root


def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
    rows = [[1] + [2 + zlib.crc32(word.encode()) % 48 for word in text.split()] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def text_encoder(name: str, max_length: int) -> jsonl_task.Encoder:
    torch.manual_seed(1)
    return make_bert().float().eval(), tokenize


def image_encoder(name: str, size: int) -> jsonl_task.Encoder:
    torch.manual_seed(2)
    return make_dinov2().float().eval(), StackEach(_pixels)


def _pixels(image: Image.Image) -> torch.Tensor:
    return vision.to_tensor(image.resize((12, 12)))


def use_tiny_encoders(cache: Path, put: Callable[..., None] = setattr) -> None:
    """``put``: monkeypatch.setattr, for one test only."""
    for name, value in {"text_encoder": text_encoder, "image_encoder": image_encoder, "CACHE": cache}.items():
        put(jsonl_task, name, value)
