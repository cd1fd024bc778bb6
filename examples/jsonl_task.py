"""Shared by the programs that train on posts: encoders by name, batches, optimizer, metrics."""

import argparse
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from named_encoders import Encoder, audio_encoder, image_encoder, image_transform, text_encoder
from packages import CACHE
from sklearn.metrics import roc_auc_score
from task_arguments import FIELDS, only_other
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from mope_fast import (
    FeatureCache,
    FusionCollator,
    MoPEConfig,
    MoPEFusion,
    Predictor,
    PromptTuned,
    Side,
    fit_head,
    start_prompts,
)
from mope_fast.data import EachFrame, Posts, classification_metrics, multi_label_metrics, read_jsonl_folder
from mope_fast.data.images import Hdf5Image

START_SAMPLES = 256
"""Number of training samples around whose mean token the prompts are initialized."""


class Augmented(Sequence[dict[str, Any]]):
    """Posts as dicts, with random augmentation of their images.

    The augmentation depends on seed, epoch and position, so that a resumed run sees the same images; if no epoch is set, it depends
    on torch's generator.
    """

    def __init__(self, posts: Posts, operations: int, strength: int, seed: int):
        from torchvision.transforms import RandAugment

        self.posts, self.seed, self.epoch = posts, seed, None
        self._change = RandAugment(operations, strength)

    def __len__(self) -> int:
        return len(self.posts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        post = self.posts[index]
        with torch.random.fork_rng(devices=[], enabled=self.epoch is not None):
            if self.epoch is not None:
                torch.manual_seed((self.seed * 1_000_003 + self.epoch) * len(self.posts) + int(index))
            image = self._change(post.open_image())
        return {"id": post.id, "text": post.text, "image": image, "label": post.label}


@dataclass
class Task:
    """Samples and a model for them."""

    splits: dict[str, Posts]
    collate: FusionCollator
    model: MoPEFusion
    args: argparse.Namespace
    augmented: Augmented | None = None
    """Training samples with augmented images."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the sides, the main one first."""
        return (self.args.main, *self.args.other)

    def set_epoch(self, epoch: int) -> None:
        """Set the training epoch, which the augmentation of each sample depends on."""
        if self.augmented is not None:
            self.augmented.epoch = epoch

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.splits["train"].class_names

    def loader(self, split: str, sampler: Any = None) -> DataLoader:
        """Build a DataLoader. Training batches are shuffled and all of one size, because batch norm can't train on one sample."""
        training, posts = split == "train", self.splits[split]
        count = len(posts if sampler is None else sampler)
        if training and self.augmented is not None:
            posts = self.augmented
        return DataLoader(
            posts, self.args.batch_size, collate_fn=self.collate, num_workers=self.args.workers, sampler=sampler,
            shuffle=training and sampler is None, drop_last=training and count > self.args.batch_size,
            generator=torch.Generator().manual_seed(self.args.seed),
        )  # fmt: skip

    def optimizer(self, steps_per_epoch: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return AdamW and its learning rate schedule, to be stepped after each step."""
        args = self.args
        groups = self.model.parameter_groups(args.lr, args.complementary_lr, args.weight_decay)
        if args.head_lr is not None:
            # in the module's order: a checkpoint names parameters by their places
            head = list(self.model.head.parameters())
            groups[0]["params"] = [each for each in groups[0]["params"] if not any(each is own for own in head)]
            groups.append({"params": head, "lr": args.head_lr, "weight_decay": args.weight_decay})
        optimizer = torch.optim.AdamW(groups)
        if args.schedule == "linear":
            steps = args.epochs * steps_per_epoch
            return optimizer, get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
        milestones = [3 * steps_per_epoch, 6 * steps_per_epoch]
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.4)

    def fit_head(self) -> None:
        """Initialize prompts around the mean token and train the head alone, if --head-epochs is set; same in every process."""
        if self.args.head_epochs:
            self.model.to(default_device())
            some = itertools.islice(self._batches(), -(-START_SAMPLES // self.args.batch_size))
            start_prompts(self.model, some)
            fit_head(
                self.model, self._batches(), epochs=self.args.head_epochs, batch_size=self.args.batch_size, seed=self.args.seed
            )  # fmt: skip

    def _batches(self) -> Iterator[Any]:
        """Yield training batches in the seed's order, one by one, because all pictures may not fit into memory."""
        order = torch.randperm(len(self.splits["train"]), generator=torch.Generator().manual_seed(self.args.seed))
        for batch in self.loader("train", order.tolist()):
            yield to_device(batch, default_device())

    def save(self, folder: Path) -> None:
        """Save an adapter for ``python -m mope_fast.predict`` and ``MoPEFusion.from_pretrained``."""
        Predictor(self.model, self.collate, self.class_names).save_pretrained(folder)

    def outcomes(self, batch: dict[str, Any], model: nn.Module) -> Tensor:
        """Return what each sample of a batch is evaluated by: its logits."""
        return model(**batch).logits.float()

    def judge(self, outcomes: Tensor, split: str) -> dict[str, float]:
        """Compute the metrics of a whole split."""
        return self.metrics(outcomes, self.splits[split].labels)

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Compute accuracy, macro and micro F1; for two classes also the area under the ROC curve, if both occur."""
        if self.splits["train"].multi_label:
            return multi_label_metrics(logits, labels)
        metrics = classification_metrics(logits, labels, len(self.class_names))
        # micro F1 equals accuracy for single-label samples: each error is one false positive and one false negative
        metrics = {"accuracy": metrics["accuracy"], "f1_macro": metrics["f1_macro"], "f1_micro": metrics["accuracy"]}
        if len(self.class_names) == 2 and len(labels.unique()) == 2:
            metrics["auroc"] = float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
        return metrics

    @property
    def chosen_by(self) -> str:
        """Name of the metric by which the best epoch is selected."""
        return "f1_macro" if self.splits["train"].multi_label else "accuracy"

    def data_hash(self) -> str:
        """Hash all samples and classes; files are hashed by their paths relative to the folder."""
        samples = [
            (split, post.id, post.text, self._place(post.image), post.label)
            + ((self._place(post.audio), *(self._place(frame) for frame in post.frames)) if post.audio or post.frames else ())
            for split, posts in self.splits.items()
            for post in posts
        ]
        return hashlib.sha256(repr((self.class_names, samples)).encode()).hexdigest()[:16]

    def _place(self, file: Path | Hdf5Image | None) -> str | None:
        """Return a file's path relative to the folder."""
        if isinstance(file, Hdf5Image):
            return f"{self._place(file.file)}[{file.index}]"
        return None if file is None else os.path.relpath(file, self.args.folder)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count for each split its samples, those left out, and those that lack an image, sound or frames."""
        counts = {}
        for split, posts in self.splits.items():
            counts[split] = {"samples": len(posts), "left out, without image": len(posts.dropped.get("no image", ()))}
            others = {reason: len(ids) for reason, ids in posts.dropped.items() if reason != "no image"}
            counts[split] |= {f"left out, {reason}": count for reason, count in others.items() if count}
            if "image" in self.fields:
                counts[split]["with a grey picture"] = sum(post.image is None for post in posts)
            if "audio" in self.fields:
                counts[split]["without sound"] = sum(post.audio is None for post in posts)
            if "video" in self.fields:
                counts[split]["without frames"] = sum(not post.frames for post in posts)
        return counts

    def predictions(self, split: str, logits: Tensor) -> list[dict[str, Any]]:
        """Return a row for each sample: id, label, prediction and scores."""
        posts, names, several = self.splits[split], self.class_names, self.splits["train"].multi_label
        scores = logits.sigmoid() if several else logits.softmax(1)
        rows = []
        for post, score in zip(posts, scores.tolist(), strict=True):
            if several:
                label = post.label and [name for name, present in zip(names, post.label, strict=True) if present]
                predicted = [name for name, value in zip(names, score, strict=True) if value > 0.5]
            else:
                label = None if post.label is None else names[post.label]
                predicted = names[max(range(len(names)), key=score.__getitem__)]
            rows.append({"id": post.id, "label": label, "predicted": predicted, "scores": [round(value, 4) for value in score]})
        return rows


def config_of(args: argparse.Namespace, **others: Any) -> MoPEConfig:
    """Build the config from arguments of prompts and router, and from other settings."""
    return MoPEConfig(
        num_experts=args.experts, prompt_length=args.prompt_length, dropout=args.dropout, noise_std=args.noise_std,
        prompt_init=args.prompt_init, mapper_norm=args.mapper_norm, importance_weight=args.importance_weight,
        complementary_prompt_length=args.complementary_prompt_length, use_static=not args.no_static,
        use_dynamic=not args.no_dynamic, use_mapped=not args.no_mapped, top_k=args.top_k, learn_keys=args.learn_keys,
        temperature=args.temperature, pooling=pooling_of(args.pooling), router_pooling=pooling_of(args.router_pooling),
        complementary_pooling=None if args.complementary == "frozen" else pooling_of(args.complementary_pooling),
        dynamic_dropout=args.dynamic_dropout, **others,
    )  # fmt: skip


def read_folder(args: argparse.Namespace) -> dict[str, Posts]:
    return read_jsonl_folder(args.folder, missing_images=args.missing_images, outside=args.outside)


def load_task(args: argparse.Namespace, read: Callable[[argparse.Namespace], dict[str, Posts]] = read_folder) -> Task:
    """Read the samples and create the model, seeded by --seed."""
    splits = read(args)
    if unlabelled := [name for name in ("train", "val") if not splits[name].labelled]:
        raise ValueError(f"{args.folder}: {', '.join(unlabelled)} has no labels: train and val need a label in each line")
    if args.samples is not None:
        splits = {name: replace(posts, posts=posts.posts[: args.samples]) for name, posts in splits.items()}
    for posts in splits.values() if args.check_images else ():
        posts.check_images()
    (main, main_inputs), *others = (_encoder(args, side) for side in (args.main, *args.other))
    torch.manual_seed(args.seed)
    alone = only_other(args)
    made = {side: complementary_of(args, side, encoder) for side, (encoder, _) in zip(args.other, others, strict=True)}
    inputs = {side: preprocess for side, (_, preprocess) in zip(args.other, others, strict=True)}
    complementary = made[alone] if alone else {side: _side(side, source) for side, source in made.items()}
    config = config_of(args, head_inputs=args.head_inputs, combine=args.combine, side_dropout=args.side_dropout)
    several = splits["train"].multi_label
    model = MoPEFusion(
        main, complementary, len(splits["train"].class_names), config,
        problem_type="multi_label_classification" if several else "single_label_classification",
    )  # fmt: skip
    collate = FusionCollator(
        main_inputs, inputs[alone] if alone else inputs, main_field=FIELDS[args.main],
        complementary_field=FIELDS[alone] if alone else {side: FIELDS[side] for side in args.other},
    )  # fmt: skip
    augmented = Augmented(splits["train"], *args.rand_augment, args.seed) if args.rand_augment else None
    return Task(splits, collate, model, args, augmented)


def _encoder(args: argparse.Namespace, side: str) -> Encoder:
    if side == "text":
        return text_encoder(args.text_model, args.max_length)
    if side == "audio":
        return audio_encoder(args.audio_model, args.max_seconds)
    encoder, inputs = image_encoder(getattr(args, f"{side}_model"), args.image_size)
    if side == "video":
        return encoder, EachFrame(inputs, args.frames)
    return encoder, image_transform(inputs, args.image_transform, args.image_statistics)


def complementary_of(args: argparse.Namespace, side: str, encoder: nn.Module) -> Any:
    """Return the source of a complementary side's features: a cache, an encoder, or an encoder with prompts."""
    pooling = pooling_of(args.complementary_pooling)
    if args.complementary == "frozen":
        encoder.to(default_device())
        name = _file_name(getattr(args, f"{side}_model"))
        return FeatureCache(CACHE / "features" / (name if pooling is None else f"{name}-{pooling}"), encoder, pooling=pooling)
    if args.complementary_prompt_init is None:
        return encoder
    return PromptTuned(
        encoder, args.complementary_prompt_length, dropout=args.dropout, prompt_init=args.complementary_prompt_init, pooling=pooling
    )


def _side(name: str, source: Any) -> Side:
    """Wrap one of several sides; every side but text is optional in a sample."""
    return Side(source, width=getattr(source, "width", None), optional=name != "text", frames="max" if name == "video" else None)


def pooling_of(name: str) -> str | None:
    return None if name == "own" else name


def _file_name(model: str) -> str:
    return model.strip("/").replace("/", "-")


def run_from_shell(main: Callable[[], Any]) -> None:
    """Run a program; errors in the folder's files exit with a short message, or with a traceback if --debug is given."""
    try:
        main()
    except (OSError, ValueError) as error:
        if "--debug" in sys.argv:
            raise
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def say(text: str) -> None:
    """Print a text in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_device(value: Any, device: str | torch.device) -> Any:
    """Move a batch's tensors, also in dicts and lists, to a device; None stands for a side that no sample has."""
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    if isinstance(value, list):
        return [to_device(each, device) for each in value]
    return None if value is None else value.to(device, non_blocking=True)
