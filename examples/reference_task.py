"""Referring segmentation: batches of pictures, phrases and masks for a segmenting fusion, and its evaluation."""

import argparse
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jsonl_task import START_SAMPLES, Task, complementary_of, config_of, default_device
from named_encoders import image_encoder, pixels_of, text_encoder
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mope_fast import MoPEFusion, start_prompts
from mope_fast.data import Reference, References, overlap_metrics

DOES_NOT_COUNT = -100
Named = tuple[Reference, str]
"""A reference, with one of its phrases."""


class Drawn(Sequence[Named]):
    """Each reference with one of its phrases, drawn anew in each epoch. The draw depends on seed, epoch and position only."""

    def __init__(self, references: References, seed: int):
        self.references, self.seed, self.epoch = references, seed, 0

    def __len__(self) -> int:
        return len(self.references)

    def __getitem__(self, index: int) -> Named:
        phrases = self.references[index].phrases
        return self.references[index], phrases[np.random.default_rng([self.seed, self.epoch, index]).integers(len(phrases))]


@dataclass(frozen=True)
class Square:
    """Letterboxing: a square of ``side`` pixels with a picture (H, W), scaled to fit, in its middle."""

    side: int
    size: tuple[int, int]

    @property
    def inside(self) -> tuple[slice, slice]:
        """Rows and columns of the square that the picture takes."""
        height, width = (max(1, round(self.side * edge / max(self.size))) for edge in self.size)
        top, left = (self.side - height) // 2, (self.side - width) // 2
        return slice(top, top + height), slice(left, left + width)

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the picture in the square."""
        rows, columns = self.inside
        return rows.stop - rows.start, columns.stop - columns.start

    def image(self, image: Image.Image, mean: Tensor, std: Tensor) -> Tensor:
        """Return the normalized square (3, side, side), padded with the mean."""
        pixels = np.array(image.resize(self.inner[::-1], Image.Resampling.BICUBIC))
        made, (rows, columns) = torch.zeros(3, self.side, self.side), self.inside
        made[:, rows, columns] = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean[:, None, None]) / std[:, None, None]
        return made

    def mask(self, mask: Tensor) -> Tensor:
        """Turn a mask (H, W) into labels (side, side): 0 and 1, and the ignored index around the picture."""
        made = torch.full((self.side, self.side), DOES_NOT_COUNT)
        small = F.interpolate(mask[None, None].float(), size=self.inner, mode="bilinear", antialias=True)[0, 0]
        made[self.inside] = (small > 0.5).long()
        return made

    def back(self, logits: Tensor) -> Tensor:
        """Turn logits (h, w) of the square into the picture's predicted mask (H, W), True where they are above 0."""
        whole = F.interpolate(logits[None, None], size=(self.side, self.side), mode="bilinear", align_corners=False)
        rows, columns = self.inside
        return F.interpolate(whole[..., rows, columns], size=self.size, mode="bilinear", align_corners=False)[0, 0] > 0


@dataclass(frozen=True)
class Batches:
    """Collates references with phrases into a batch.

    Attributes:
        side: side of a picture's square, in pixels.
        mean, std: (3,), for normalizing pixels.
        whole: return the masks in the pictures' own sizes as ``"masks"``, in place of ``"labels"``.
    """

    tokenize: Callable[[list[str]], Any]
    side: int
    mean: Tensor
    std: Tensor
    whole: bool = False

    def __call__(self, named: Sequence[Named]) -> dict[str, Any]:
        images, masks = [], []
        for reference, _ in named:
            image, mask = reference.open_image(), torch.from_numpy(reference.open_mask())
            if (size := tuple(mask.shape)) != image.size[::-1]:
                raise ValueError(f"reference {reference.id}: its mask is {size}, but its picture {image.size[::-1]} pixels (H, W)")
            square = Square(self.side, size)
            images.append(square.image(image, self.mean, self.std))
            masks.append(mask if self.whole else square.mask(mask))
        batch = {"main_inputs": torch.stack(images), "complementary_inputs": dict(self.tokenize([phrase for _, phrase in named]))}
        return batch | ({"masks": masks} if self.whole else {"labels": torch.stack(masks)})


@dataclass
class ReferenceTask(Task):
    """References, and a model that segments a phrase's object. Training draws one phrase per object, evaluation uses all."""

    splits: dict[str, References]
    collate: Batches
    drawn: Drawn | None = None

    def set_epoch(self, epoch: int) -> None:
        self.drawn.epoch = epoch

    def named(self, split: str) -> list[Named]:
        """Return each reference with each of its phrases."""
        return [(reference, phrase) for reference in self.splits[split] for phrase in reference.phrases]

    def loader(self, split: str, sampler: Any = None) -> DataLoader:
        training, size = split == "train", self.args.batch_size
        samples = self.drawn if training else self.named(split)
        return DataLoader(
            samples, size, collate_fn=self.collate if training else replace(self.collate, whole=True), sampler=sampler,
            num_workers=self.args.workers, shuffle=training and sampler is None,
            drop_last=training and len(samples if sampler is None else sampler) > size,
            generator=torch.Generator().manual_seed(self.args.seed),
        )  # fmt: skip

    def fit_head(self) -> None:
        """Initialize prompts around the mean token, if --start-prompts is set."""
        if self.args.start_prompts:
            self.model.to(default_device())
            start_prompts(self.model, itertools.islice(self._batches(), -(-START_SAMPLES // self.args.batch_size)))

    def save(self, folder: Path) -> None:
        """Save an adapter for ``MoPEFusion.from_pretrained``."""
        self.model.save_pretrained(folder)

    def segment(self, batch: dict[str, Any], model: nn.Module) -> list[Tensor]:
        """Predict the mask (H, W) of each sample; removes ``"masks"``, which give the sizes (H, W), from the batch."""
        sizes = [tuple(mask.shape) for mask in batch.pop("masks")]
        logits = model(**batch).logits.float()
        return [Square(self.collate.side, size).back(each[0]) for each, size in zip(logits, sizes, strict=True)]

    def outcomes(self, batch: dict[str, Any], model: nn.Module) -> Tensor:
        """Return (B, 2): the numbers of pixels in the intersection and in the union of predicted and true mask."""
        masks = batch["masks"]
        found = self.segment(batch, model)
        return torch.stack([torch.stack([(a & b).sum(), (a | b).sum()]) for a, b in zip(found, masks, strict=True)])

    def judge(self, outcomes: Tensor, split: str) -> dict[str, float]:
        return overlap_metrics(*outcomes.unbind(1))

    @property
    def chosen_by(self) -> str:
        return "mean_iou"

    def data_hash(self) -> str:
        """Hash all references; files are hashed by their paths relative to the folder."""
        rows = []
        for split, references in self.splits.items():
            for each in references:
                mask = each.segmentation
                mask = self._place(mask) if isinstance(mask, Path) else mask
                rows.append((split, each.id, each.phrases, os.path.relpath(each.image, self.args.folder), mask))
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]

    def counts(self) -> dict[str, dict[str, int]]:
        return {
            split: {"objects": len(own), "phrases": sum(len(each.phrases) for each in own)}
            | {f"left out, {reason}": len(ids) for reason, ids in own.dropped.items() if ids}
            for split, own in self.splits.items()
        }

    def predictions(self, split: str, outcomes: Tensor) -> list[dict[str, Any]]:
        """Return the intersection over union of each phrase."""
        return [
            {"id": reference.id, "phrase": phrase, "iou": round(intersection / union, 4) if union else 1.0}
            for (reference, phrase), (intersection, union) in zip(self.named(split), outcomes.tolist(), strict=True)
        ]


def load_references(args: argparse.Namespace, read: Callable[[argparse.Namespace], dict[str, References]]) -> ReferenceTask:
    """Read the references and create the model, seeded by --seed."""
    splits = read(args)
    if missing := [name for name in ("train", "val") if not len(splits.get(name, ()))]:
        raise ValueError(f"{args.folder} has no {' and no '.join(missing)}: training needs both, got {list(splits)}")
    splits = {name: splits[name] for name in ("train", "val", *splits)}  # the last split to be evaluated is drawn
    if args.samples is not None:
        splits = {name: references[: args.samples] for name, references in splits.items()}
    main, own = image_encoder(args.image_model, args.image_size)
    text, tokenize = text_encoder(args.text_model, args.max_length)
    (_, height, width), mean, std = pixels_of(own)
    if height is None or height != width:
        raise ValueError(f"{args.image_model} takes images of {height} x {width} pixels: expected a known, square size")
    torch.manual_seed(args.seed)
    config = config_of(args, head_inputs="main")
    model = MoPEFusion(main, complementary_of(args, "text", text), 1, config, problem_type="segmentation")
    collate = Batches(tokenize, height, torch.tensor(mean), torch.tensor(std))
    return ReferenceTask(splits, collate, model, args, drawn=Drawn(splits["train"], args.seed))
