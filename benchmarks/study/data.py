"""The study's data: texts, pictures, frozen features of both, classes, and splits that keep families of samples together."""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.examples import example
from benchmarks.study import items
from mope_fast import FeatureCache
from mope_fast.data import read_jsonl_folder

DEV_SHARE = 0.15
"""Share of the families in the development part, which all selection uses and no test does."""
MAX_TOKENS = 64
"""Longer texts are truncated."""
FOLDS = 5
"""Number of folds of the other families; split k tests on fold k and trains on the rest."""


@dataclass(frozen=True)
class Samples:
    """Texts with pictures, as indices into a task's texts and pictures, and their classes."""

    texts: Tensor  # (n,)
    pictures: Tensor  # (n,)
    labels: Tensor  # (n,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Samples":
        return Samples(self.texts[index], self.pictures[index], self.labels[index])


@dataclass(frozen=True)
class Split:
    """A split. ``test`` is used once per final cell; all selection is done on ``dev``."""

    train: Samples
    dev: Samples
    test: Samples


@dataclass(frozen=True)
class Task:
    """A data set. Pictures are uint8 (I, 3, H, W). Features are those of the frozen encoders: MiniLM's mean token, and the ViT's
    class token with its mean patch token.
    """

    name: str
    input_ids: Tensor  # (T, S), padded
    lengths: Tensor  # (T,)
    pictures: Tensor
    text_features: Tensor  # (T, 384)
    picture_features: Tensor  # (I, 768)
    class_names: tuple[str, ...]
    split: Callable[[int], Split]


def divided(families: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the sample indices of a share of the families, drawn by the seed, and those of the other families."""
    names = sorted(set(families))
    random.Random(seed).shuffle(names)
    chosen = set(names[: int(share * len(names))])
    inside = [index for index, family in enumerate(families) if family in chosen]
    return inside, [index for index, family in enumerate(families) if family not in chosen]


def by_family(families: Sequence[int], samples: Callable[[list[int]], Samples]) -> Callable[[int], Split]:
    """Return a function from seed to split by families, which redraws the folds every FOLDS seeds; ``samples`` maps indices."""
    dev, rest = divided(families, DEV_SHARE, 0)

    def split(seed: int) -> Split:
        names = sorted({families[index] for index in rest})
        random.Random(1 + seed // FOLDS).shuffle(names)
        tested = set(names[seed % FOLDS :: FOLDS])
        sides = ([index for index in rest if (families[index] in tested) is side] for side in (False, True))
        train, test = sides
        return Split(*map(samples, (train, dev, test)))

    return split


def _task(
    name: str,
    texts: Sequence[str],
    pictures: Tensor,
    class_names: Sequence[str],
    split: Callable[[int], Split],
) -> Task:
    packages, pretrained, easy_vqa = (example(module) for module in ("packages", "pretrained", "easy_vqa"))
    minilm, tokenizer = pretrained.minilm()
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    text_cache = FeatureCache(packages.CACHE / "study-texts", minilm, pooling="mean")
    picture_cache = FeatureCache(packages.CACHE / "study-pictures", easy_vqa.PictureEncoder())
    tokens = [
        {"input_ids": ids, "attention_mask": mask}
        for ids, mask in zip(encoded["input_ids"].split(64), encoded["attention_mask"].split(64), strict=True)
    ]
    return Task(
        name, encoded["input_ids"], encoded["attention_mask"].sum(1), pictures, text_cache.precompute(tokens),
        picture_cache.precompute(pictures.split(64)), tuple(class_names), split,
    )  # fmt: skip


def _items(name: str, size: int) -> Task:
    rows = items.read_items(example("packages").package_folder("osrsreboxed"))
    families = items.families(rows)
    kinds = [row.slot if name != "items-kind" or row.weapon is None else f"{row.slot}, {row.weapon}" for row in rows]
    names = ["no", "yes"] if name == "items-match" else sorted(set(kinds))
    labels = torch.tensor([names.index(kind) for kind in kinds]) if name != "items-match" else None

    def classified(index: list[int]) -> Samples:
        chosen = torch.tensor(index)
        return Samples(chosen, chosen, labels[chosen])

    def matched(index: list[int]) -> Samples:
        """Pair each sentence with its icon, and with an icon of the same slot from another family."""
        draw, pairs = random.Random(len(index)), [(i, i, 1) for i in index]
        by_slot: dict[str, list[int]] = {}
        for i in index:
            by_slot.setdefault(rows[i].slot, []).append(i)
        for i in index:
            others = [j for j in by_slot[rows[i].slot] if families[j] != families[i]]
            pairs += [(i, draw.choice(others), 0)] if others else []
        return Samples(*torch.tensor(pairs).unbind(1))

    split = by_family(families, matched if name == "items-match" else classified)
    return _task(
        name, [row.sentence for row in rows], example("easy_vqa_data").stacked(map(items.picture, rows), size), names, split
    )


def _easy_vqa(name: str, size: int) -> Task:
    """Make a task of 4,000 training questions, with pictures of the official training set only; the official test set is unused."""
    data = example("easy_vqa_data")
    whole, _, names = data.easy_vqa()
    count = round(4000 / (1 - DEV_SHARE) / (1 - 1 / FOLDS))
    drawn = torch.randperm(len(whole.answers), generator=torch.Generator().manual_seed(0))[:count]
    texts = sorted({whole.questions[index] for index in drawn.tolist()})
    place = {text: row for row, text in enumerate(texts)}
    rows = torch.tensor([place[whole.questions[index]] for index in drawn.tolist()])

    def samples(index: list[int]) -> Samples:
        chosen = torch.tensor(index)
        return Samples(rows[chosen], whole.images[drawn[chosen]], whole.answers[drawn[chosen]])

    return _task(name, texts, data.load_pictures(whole.paths, size), names, by_family(whole.images[drawn].tolist(), samples))


TASKS: dict[str, tuple[Callable[[str, int], Task], int, str]] = {
    "items-slot": (_items, 56, "which of 12 slots an item is worn in"),
    "items-kind": (_items, 56, "the slot, and of weapons the kind"),
    "items-match": (_items, 56, "whether the sentence is of the icon or of another item of its slot"),
    "easy-vqa": (_easy_vqa, 70, "answers to 4,000 questions about images"),
}


def load(name: str) -> Task:
    """Read and encode one of TASKS, or a folder of JSON Lines; the files it needs are downloaded once."""
    if name not in TASKS:
        return _folder(Path(name))
    make, size, _ = TASKS[name]
    return make(name, size)


def _folder(folder: Path, size: int = 112) -> Task:
    """Make a task of train.jsonl, val.jsonl and a labelled test.jsonl. Without that, val is the test split and dev a part of train
    drawn by the seed.

    Raises:
        OSError, ValueError: files are missing or wrong, or samples have no label or several classes each.
    """
    posts = read_jsonl_folder(folder, missing_images="skip")
    if any(split.multi_label for split in posts.values()):
        raise ValueError(f"{folder} has samples of several classes: the study needs one class per sample")
    names = [name for name in ("train", "val", "test") if name in posts and posts[name].labelled]
    if names[:2] != ["train", "val"]:
        raise ValueError(f"{folder} has labels in {names}: train and val need them")
    for name in names:
        dropped = sum(map(len, posts[name].dropped.values()))
        print(f"{name}: {len(posts[name]):,} samples" + (f", {dropped:,} without an image left out" if dropped else ""))
    every = [post for name in names for post in posts[name]]
    begins = [0, *itertools.accumulate(len(posts[name]) for name in names)]
    labels = torch.tensor([post.label for post in every])

    def samples(index: Iterable[int]) -> Samples:
        chosen = torch.tensor(list(index))
        return Samples(chosen, chosen, labels[chosen])

    def split(seed: int) -> Split:
        parts = [range(*pair) for pair in itertools.pairwise(begins)]
        if len(parts) == 3:
            return Split(*map(samples, parts))
        dev, train = divided(parts[0], DEV_SHARE, seed)
        return Split(samples(train), samples(dev), samples(parts[1]))

    content = repr([(post.id, post.text, post.label) for post in every]).encode()
    name = f"{folder.resolve().name}-{hashlib.sha256(content).hexdigest()[:8]}"
    pictures = example("easy_vqa_data").stacked((post.open_image() for post in every), size)
    return _task(name, [post.text for post in every], pictures, posts["train"].class_names, split)


class Batch:
    """Inputs of some samples, computed lazily, so that a method pays only for what it reads."""

    def __init__(self, task: Task, samples: Samples, text_features: Tensor, picture_features: Tensor):
        self._task, self._samples = task, samples
        self._text_features, self._picture_features = text_features, picture_features

    @property
    def text(self) -> dict[str, Any]:
        """input_ids and attention_mask, truncated to the batch's longest text."""
        lengths = self._task.lengths[self._samples.texts]
        longest = int(lengths.max())
        return {
            "input_ids": self._task.input_ids[self._samples.texts, :longest],
            "attention_mask": torch.arange(longest) < lengths[:, None],
        }

    @property
    def text_feature(self) -> Tensor:
        """(B, 384), standardized."""
        return self._text_features[self._samples.texts]

    @property
    def pictures(self) -> Tensor:
        """(B, 3, H, W), normalized as in the ViT's training."""
        return example("easy_vqa_data").normalised(self._task.pictures[self._samples.pictures])

    @property
    def picture_feature(self) -> Tensor:
        """(B, 768), standardized."""
        return self._picture_features[self._samples.pictures]

    @property
    def labels(self) -> Tensor:
        """(B,) class indices."""
        return self._samples.labels


class Batches:
    """Batches of a split's samples, with features standardized by its training samples; the same for every method."""

    def __init__(self, task: Task, train: Samples):
        self.task = task
        self._text, self._picture = (
            _standardised(features, rows)
            for features, rows in ((task.text_features, train.texts), (task.picture_features, train.pictures))
        )

    def batch(self, samples: Samples) -> Batch:
        return Batch(self.task, samples, self._text, self._picture)

    def epoch(self, samples: Samples, size: int, generator: torch.Generator) -> list[Tensor]:
        """Return index batches of an epoch, all of one size: shuffled, and sorted by length within each group of eight batches."""
        lengths = self.task.lengths[samples.texts]
        order = torch.randperm(len(samples), generator=generator)
        batches = example("easy_vqa_data").of_like_length(order, lengths, size)
        whole = [batch for batch in batches if len(batch) == size]
        return [whole[index] for index in torch.randperm(len(whole), generator=generator).tolist()]

    def in_order(self, samples: Samples, size: int) -> Sequence[Tensor]:
        """Return index batches of all samples, sorted by length."""
        return self.task.lengths[samples.texts].argsort(stable=True).split(size)


def _standardised(features: Tensor, rows: Tensor) -> Tensor:
    return (features - features[rows].mean(0)) / features[rows].std(0).clamp(min=1e-6)
