"""Easy-VQA, a published set of questions about images: its files, and batches of it on a device."""

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
    """Questions about images: ``answers[i]`` indexes the list of answers, ``images[i]`` the split's images."""

    questions: list[str]
    answers: Tensor
    images: Tensor
    paths: list[Path]


def easy_vqa() -> tuple[Split, Split, list[str]]:
    """38,575 training and 9,673 test questions about 4,000 and 1,000 synthetic images of 64 x 64, and the 13 answers."""
    data = package_folder("easy-vqa") / "easy_vqa" / "data"
    answers = sorted((data / "answers.txt").read_text().split())

    def split(name: str) -> Split:
        rows = json.loads((data / name / "questions.json").read_text())
        questions, texts, images = zip(*rows, strict=True)
        paths = [data / name / "images" / f"{i}.png" for i in range(max(images) + 1)]
        return Split(list(questions), torch.tensor([answers.index(text) for text in texts]), torch.tensor(images), paths)

    return split("train"), split("test"), answers


def stacked(images: Iterable[Image.Image], size: int) -> Tensor:
    """(n, 3, size, size), uint8."""
    pictures = [np.array(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def load_pictures(paths: list[Path], size: int) -> Tensor:
    """(n, 3, size, size), uint8: decoded and resized once for all epochs."""
    return stacked(map(load_image, paths), size)


def of_like_length(order: Tensor, lengths: Tensor, size: int) -> list[Tensor]:
    """Index batches in this order, but for eight batches at a time, which are sorted by length."""
    return [batch for group in order.split(8 * size) for batch in group[lengths[group].argsort(stable=True)].split(size)]


def normalised(pictures: Tensor) -> Tensor:
    """uint8 -> float, as the ViT was trained, where the pictures are."""
    mean, std = (pictures.new_tensor(v, dtype=torch.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pictures / 255 - mean) / std


@dataclass
class Questions:
    """One split, tokenised, on the device; batches hold questions of similar length."""

    input_ids: Tensor  # (n, S), padded
    lengths: Tensor  # (n,), on the CPU
    images: Tensor  # (n,), rows of image_inputs
    image_inputs: Tensor  # features (images, D), or pictures (images, 3, H, W) of uint8
    answers: Tensor  # (n,)
    image_first: bool  # which side is the main one

    def __len__(self) -> int:
        return len(self.answers)

    def batch(self, index: Tensor) -> tuple[dict[str, Tensor] | Tensor, dict[str, Tensor] | Tensor, Tensor]:
        """(main inputs, complementary inputs, answers); the text is cut to the longest question."""
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
        """Index batches of all, in order of length."""
        return self.lengths.argsort(stable=True).split(size)

    def training_batches(self, size: int, generator: torch.Generator, balance: float = 0.0) -> list[Tensor]:
        """Index batches of one epoch: shuffled, and in order of length within eight batches.

        Args:
            size: of a batch.
            generator: of the order.
            balance: an answer to a question comes on average at most so many times as often as its rarest one, the rest is left out
                by chance; 0 leaves nothing out. Most questions here have a common answer, which the text alone tells.
        """
        order = torch.randperm(len(self), generator=generator)
        if balance:
            order = order[torch.rand(len(order), generator=generator) < (balance / self._commonness)[order]]
        batches = of_like_length(order, self.lengths, size)
        # batch norm needs two
        return [batches[i] for i in torch.randperm(len(batches), generator=generator) if len(batches[i]) > 1]

    @cached_property
    def _commonness(self) -> Tensor:
        """How many times as often as the rarest answer to its question the answer of each sample is given."""
        texts, question = self.input_ids.cpu().unique(dim=0, return_inverse=True)
        answers = self.answers.cpu()
        counts = torch.zeros(len(texts), int(answers.max()) + 1, dtype=torch.long)
        counts.index_put_((question, answers), torch.ones_like(answers), accumulate=True)
        rarest = counts.masked_fill(counts == 0, len(self)).amin(1)
        return counts[question, answers] / rarest[question]


def tokenised(split: Split, image_inputs: Tensor, tokenizer, device: str, samples: int | None, image_first: bool) -> Questions:
    """The split's first ``samples`` questions, or all."""
    encoded = tokenizer(split.questions[:samples], padding=True, return_tensors="pt")
    lengths = encoded["attention_mask"].sum(1)
    images, answers = split.images[:samples].to(device), split.answers[:samples].to(device)
    return Questions(encoded["input_ids"].to(device), lengths, images, image_inputs.to(device), answers, image_first)
