"""Easy-VQA, a published set of questions about images: reads its files and makes batches on a device."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from packages import package_folder
from PIL import Image
from torch import Tensor

from mope_fast.data import load_image


@dataclass(frozen=True)
class Split:
    """Questions of one split: ``answers[i]`` indexes the list of answers, ``images[i]`` indexes ``paths``."""

    questions: list[str]
    answers: Tensor
    images: Tensor
    paths: list[Path]


def easy_vqa() -> tuple[Split, Split, list[str]]:
    """Return 38,575 training and 9,673 test questions about 4,000 and 1,000 synthetic images of 64 x 64, and the 13 answers."""
    data = package_folder("easy-vqa") / "easy_vqa" / "data"
    answers = sorted((data / "answers.txt").read_text().split())

    def split(name: str) -> Split:
        rows = json.loads((data / name / "questions.json").read_text())
        questions, texts, images = zip(*rows, strict=True)
        paths = [data / name / "images" / f"{i}.png" for i in range(max(images) + 1)]
        return Split(list(questions), torch.tensor([answers.index(text) for text in texts]), torch.tensor(images), paths)

    return split("train"), split("test"), answers


def stacked(images: Iterable[Image.Image], size: int) -> Tensor:
    """Resize and stack images, (n, 3, size, size), uint8."""
    pictures = [np.array(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def load_pictures(paths: list[Path], size: int) -> Tensor:
    """Load pictures, (n, 3, size, size), uint8; decoded and resized once for all epochs."""
    return stacked(map(load_image, paths), size)


def of_like_length(order: Tensor, lengths: Tensor, size: int) -> list[Tensor]:
    """Split the order into index batches; samples are sorted by length within each group of eight batches."""
    return [batch for group in order.split(8 * size) for batch in group[lengths[group].argsort(stable=True)].split(size)]


def normalised(pictures: Tensor) -> Tensor:
    """Normalize uint8 pictures to float as in the ViT's training, on the pictures' device."""
    mean, std = (pictures.new_tensor(v, dtype=torch.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pictures / 255 - mean) / std


@dataclass
class Questions:
    """One split, tokenized, on the device; batches hold questions of similar length."""

    input_ids: Tensor  # (n, S), padded
    lengths: Tensor  # (n,), on the CPU
    images: Tensor  # (n,), rows of image_inputs
    image_inputs: Tensor  # features (images, D), or pictures (images, 3, H, W) of uint8
    answers: Tensor  # (n,)
    image_first: bool  # which side is the main one

    def __len__(self) -> int:
        return len(self.answers)

    def batch(self, index: Tensor) -> tuple[dict[str, Tensor] | Tensor, dict[str, Tensor] | Tensor, Tensor]:
        """Return (main inputs, complementary inputs, answers); text is truncated to the batch's longest question."""
        longest = int(self.lengths[index].max())
        lengths = self.lengths[index].to(self.input_ids.device)
        index = index.to(self.input_ids.device)
        mask = torch.arange(longest, device=index.device) < lengths[:, None]
        text = {"input_ids": self.input_ids[index, :longest], "attention_mask": mask}
        image = self.image_inputs[self.images[index]]
        if image.dtype == torch.uint8:
            image = normalised(image)
        sides = (image, text) if self.image_first else (text, image)
        return *sides, self.answers[index]

    def batches(self, size: int) -> Sequence[Tensor]:
        """Return index batches of all samples, in order of length."""
        return self.lengths.argsort(stable=True).split(size)

    def training_batches(self, size: int, generator: torch.Generator, balance: float = 0.0) -> list[Tensor]:
        """Return index batches of one epoch: shuffled, with samples sorted by length within each group of eight batches.

        Args:
            size: batch size.
            generator: draws the order.
            balance: samples are left out at random so that an answer to a question occurs on average at most this many times as
                often as the question's rarest answer; 0 leaves nothing out. Most questions here have a common answer that can be
                predicted from the text alone.
        """
        order = torch.randperm(len(self), generator=generator)
        if balance:
            order = order[torch.rand(len(order), generator=generator) < (balance / self._commonness)[order]]
        batches = of_like_length(order, self.lengths, size)
        # batch norm needs at least two samples
        return [batches[i] for i in torch.randperm(len(batches), generator=generator) if len(batches[i]) > 1]

    @cached_property
    def _commonness(self) -> Tensor:
        """For each sample, the frequency of its answer relative to the rarest answer to the same question."""
        texts, question = self.input_ids.cpu().unique(dim=0, return_inverse=True)
        answers = self.answers.cpu()
        counts = torch.zeros(len(texts), int(answers.max()) + 1, dtype=torch.long)
        counts.index_put_((question, answers), torch.ones_like(answers), accumulate=True)
        rarest = counts.masked_fill(counts == 0, len(self)).amin(1)
        return counts[question, answers] / rarest[question]


def tokenised(split: Split, image_inputs: Tensor, tokenizer, device: str, samples: int | None, image_first: bool) -> Questions:
    """Tokenize the split's first ``samples`` questions, or all."""
    encoded = tokenizer(split.questions[:samples], padding=True, return_tensors="pt")
    lengths = encoded["attention_mask"].sum(1)
    images, answers = split.images[:samples].to(device), split.answers[:samples].to(device)
    return Questions(encoded["input_ids"].to(device), lengths, images, image_inputs.to(device), answers, image_first)
