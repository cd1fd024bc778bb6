"""What the programs on posts share: arguments, encoders by name, batches, optimiser, metrics."""

import argparse
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from named_encoders import (
    PACKAGED_AUDIO,
    PACKAGED_IMAGE,
    PACKAGED_TEXT,
    STATISTICS,
    Encoder,
    audio_encoder,
    image_encoder,
    image_transform,
    text_encoder,
)
from packages import CACHE
from sklearn.metrics import roc_auc_score
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

PACKAGED_RECIPE = {"lr": 1e-3, "head_lr": 5e-3, "dropout": 0.0, "prompt_init": 0.06}
"""Small encoders want this on Easy-VQA: defaults where the main side is one of the packaged ones."""
START_SAMPLES = 256
"""Of whose tokens prompts start at the mean."""
FIELDS = {"text": "text", "image": "image", "audio": "audio", "video": "frames"}
"""Side -> where a post has it."""


def argument_parser(description: str, output: str, sets: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """Arguments of a task.

    Args:
        output: the name of the folder for everything.
        sets: names of published sets with their titles, one of which is given before its folder; None for a folder of JSON lines.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    if sets is not None:
        add("name", choices=sets, metavar="NAME", help=", ".join(f"{name}: {title}" for name, title in sets.items()))
    lines = "train.jsonl, val.jsonl, labels.txt, the images; test.jsonl if there is one, with or without labels"
    add("folder", type=Path, help=lines if sets is None else "of that set, with its files as published")
    add("--main", choices=("text", "image"), default="text", help="the side whose layers take prompts")
    add("--text-model", default=PACKAGED_TEXT, help=f"a transformers folder or name; {PACKAGED_TEXT} comes from a package")
    add(
        "--image-model", default=PACKAGED_IMAGE,
        help=f"a transformers folder or name, or a timm model as timm/NAME; {PACKAGED_IMAGE} comes from a package",
    )  # fmt: skip
    add(
        "--other", nargs="+", choices=tuple(FIELDS), default=None,
        help="the other sides, which the prompts are routed by; several of them, audio and video may be missing in a sample; "
        "default: image or text, the one that --main isn't",
    )  # fmt: skip
    add(
        "--audio-model", default="facebook/wav2vec2-base-960h",
        help=f"a transformers folder or name; {PACKAGED_AUDIO} comes from a package",
    )  # fmt: skip
    add("--max-seconds", type=float, default=20.0, help="of a sound: longer ones are cut, shorter ones filled up with silence")
    add("--video-model", default="google/vit-base-patch16-224-in21k", help="of each frame; as for --image-model")
    add("--frames", type=int, default=8, help="of a video at most, evenly spread; their features' maximum is the video's")
    add("--combine", choices=("concat", "sum"), default="concat", help="features of several other sides: side by side, or added")
    add("--side-dropout", type=float, default=0.0, help="rate at which other sides are taken for missing, in training")
    add("--image-size", type=int, default=112, help=f"pixels, a multiple of 14; for {PACKAGED_IMAGE} only, others know theirs")
    add(
        "--image-transform", choices=("own", "crop", "squash"), default="own",
        help="how an image gets its encoder's size: by the encoder's own preprocessing; the shorter side to 8/7 of it, then the "
        "centre; both sides to 8/7 of it, then the centre",
    )  # fmt: skip
    add(
        "--image-statistics",
        choices=("own", *STATISTICS),
        default="own",
        help="mean and deviation of pixels, with crop or squash",
    )
    add(
        "--rand-augment", type=int, nargs=2, metavar=("N", "M"), default=None,
        help="change training images by N random operations of strength M, by torchvision",
    )  # fmt: skip
    add("--max-length", type=int, default=128, help="tokens of a text, longer ones are cut")
    add(
        "--complementary", choices=("prompted", "frozen"), default="prompted",
        help="the other side's encoder: with trained prompts of its own, or as it is, each sample computed once for all runs",
    )  # fmt: skip
    add("--experts", type=int, default=16, help="K, experts a layer")
    add("--prompt-length", type=int, default=6, help="L, rows of a prompt")
    add("--complementary-prompt-length", type=int, default=4, help="rows of the other side's prompts")
    add("--dropout", type=float, default=None, help="on prompts; default: the paper's 0.1")
    add("--dynamic-dropout", type=float, default=0.0, help="on routed prompts, which the paper's text has and the release doesn't")
    add("--noise-std", type=float, default=1 / 256, help="of the noise on routing logits, in training")
    add("--mapper-norm", choices=("batch", "layer", "none"), default="batch", help="on the way of the other feature to a prompt")
    add("--prompt-init", type=float, default=None, help="prompts start uniform in +- this; default: the release's rule")
    add("--complementary-prompt-init", type=float, default=None, help="likewise, of the other side's prompts; default: the same")
    add("--importance-weight", type=float, default=0.01, help="of the importance loss, 0 for none")
    add("--no-static", action="store_true", help="leave out static prompts")
    add("--no-dynamic", action="store_true", help="leave out routed prompts: no experts, no router")
    add("--no-mapped", action="store_true", help="leave out the other feature as a prompt")
    add("--top-k", type=int, default=None, help="keep the k largest routing scores; default: all")
    add("--learn-keys", action="store_true", help="train the routing keys")
    add("--temperature", type=float, default=0.1, help="of the router's softmax")
    add("--head-inputs", choices=("main", "both"), default="both", help="what the head reads: the fused feature, or the other too")
    poolings, default = ("own", "cls", "mean", "last", "cls+mean"), f"default: mean for {PACKAGED_TEXT}, else its own"
    add("--pooling", choices=poolings, default=None, help=f"of the main encoder's tokens; {default}")
    add("--router-pooling", choices=poolings[:-1], default="own", help="of a layer's input, for the router")
    add("--complementary-pooling", choices=poolings, default=None, help=f"of the other encoder's tokens; {default}")
    add("--lr", type=float, default=None, help="of prompts, router and mapper; default: the paper's 5e-4 for text, 4e-4 for images")
    add("--complementary-lr", type=float, default=None, help="of the other side's prompts; default: the paper's of that side")
    add("--head-lr", type=float, default=None, help="default: as --lr")
    add(
        "--head-epochs",
        type=int,
        default=0,
        help="of the head alone, before anything else, with prompts put where an image encoder's tokens are: each sample runs "
        "through the encoders once",
    )
    add("--check-images", action="store_true", help="read every image before anything else")
    add("--debug", action="store_true", help="show where an error comes from")
    add("--weight-decay", type=float, default=1e-3)
    add("--schedule", choices=("linear", "steps"), default="linear", help="warm-up and decay; or the paper's x 0.4 at epochs 3, 6")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=32, help="of each process")
    add("--samples", type=int, default=None, help="use the first so many of each split, for a quick try")
    add("--missing-images", choices=("error", "skip", "grey"), default="error", help="leave out, or put a grey picture in place")
    add(
        "--outside", type=Path, nargs="+", default=[], help="folders outside of FOLDER that its images may be in, by a link or path"
    )
    add("--workers", type=int, default=0, help="processes that read and decode")
    add("--seed", type=int, default=42)
    add("--output", type=Path, default=Path("outputs") / output, help="folder for everything this writes")
    return parser


def check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, expected: str = "one with train.jsonl, val.jsonl and labels.txt"
) -> argparse.Namespace:
    """Ends the program with one line for arguments that make no sense; fills in what was left to us.

    ``expected`` is the folder that is to be given.
    """
    least = {"image_size": 14, "max_length": 3, "experts": 1, "prompt_length": 1, "complementary_prompt_length": 0, "epochs": 1}
    least |= {"batch_size": 2, "samples": 2, "workers": 0, "head_epochs": 0, "frames": 1}
    for name, value in least.items():
        got = getattr(args, name)
        if got is not None and got < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}, got {got}")
    positive = ("clip", "max_seconds", "temperature")
    for name in ("lr", "complementary_lr", "head_lr", "weight_decay", "importance_weight", "noise_std", *positive):
        got = getattr(args, name)
        if got is not None and not (math.isfinite(got) and (got > 0 if name in positive else got >= 0)):
            parser.error(f"--{name.replace('_', '-')} must be a finite number {'> 0' if name in positive else '>= 0'}, got {got}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be 0 to 2**32 - 1, got {args.seed}")
    if args.image_model == PACKAGED_IMAGE and args.image_size % 14:
        parser.error(f"--image-size must be a multiple of 14, got {args.image_size}")
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is no folder: expected {expected}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must be a folder, {args.output} is a file")
    if not getattr(args, "resume", False) and not is_unused(args.output):
        more = "go on with it by --resume, or give another --output" if hasattr(args, "resume") else "give another --output"
        parser.error(f"{args.output} has files already: {more}")
    if args.other is None:
        args.other = ["image" if args.main == "text" else "text"]
    if args.main in args.other or len(set(args.other)) < len(args.other):
        parser.error(f"--other must be sides that differ from each other and from --main {args.main}, got {' '.join(args.other)}")
    if args.image_statistics != "own" and args.image_transform == "own":
        parser.error(f"--image-statistics {args.image_statistics} needs --image-transform crop or squash")
    if args.rand_augment and ("image" not in (args.main, *args.other) or min(args.rand_augment) < 0 or args.rand_augment[1] > 30):
        parser.error(f"--rand-augment is for images, N >= 0 operations of strength 0 to 30, got {args.rand_augment}")
    # the paper's, of text and of images
    papers = {"text": 5e-4}
    recipe = {"lr": papers.get(args.main, 4e-4), "complementary_lr": papers.get(args.other[0], 4e-4), "dropout": 0.1}
    if getattr(args, f"{args.main}_model") in (PACKAGED_TEXT, PACKAGED_IMAGE):
        recipe |= PACKAGED_RECIPE
    for name, side in (("pooling", args.main), ("complementary_pooling", args.other[0])):
        packaged = side == "text" and args.text_model == PACKAGED_TEXT and (name == "pooling" or len(args.other) == 1)
        recipe[name] = "mean" if packaged else "own"
    if args.top_k is not None and not 1 <= args.top_k <= args.experts:
        parser.error(f"--top-k must be 1 to --experts ({args.experts}), got {args.top_k}")
    if args.no_static and args.no_dynamic and args.no_mapped:
        parser.error("--no-static --no-dynamic --no-mapped leaves no prompt: drop one of them")
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


class Augmented(Sequence[dict[str, Any]]):
    """Posts whose images are changed at random, as dicts.

    What is drawn depends on seed, epoch and position, so that a resumed run sees the same; without an epoch on torch's generator.
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
    """Samples, and a model for them."""

    splits: dict[str, Posts]
    collate: FusionCollator
    model: MoPEFusion
    args: argparse.Namespace
    augmented: Augmented | None = None
    """Training samples with other images."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The sides."""
        return (self.args.main, *self.args.other)

    def set_epoch(self, epoch: int) -> None:
        """Of training, for what is drawn for each of its samples."""
        if self.augmented is not None:
            self.augmented.epoch = epoch

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.splits["train"].class_names

    def loader(self, split: str, sampler: Any = None) -> DataLoader:
        """Training batches are shuffled and all of one size: batch norm can't train on one sample."""
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
        """AdamW, and its learning rate after each step."""
        args = self.args
        groups = self.model.parameter_groups(args.lr, args.complementary_lr, args.weight_decay)
        if args.head_lr is not None:
            head = set(self.model.head.parameters())
            groups[0]["params"] = [parameter for parameter in groups[0]["params"] if parameter not in head]
            groups.append({"params": list(head), "lr": args.head_lr, "weight_decay": args.weight_decay})
        optimizer = torch.optim.AdamW(groups)
        if args.schedule == "linear":
            steps = args.epochs * steps_per_epoch
            return optimizer, get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
        milestones = [3 * steps_per_epoch, 6 * steps_per_epoch]
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.4)

    def fit_head(self) -> None:
        """Start prompts where tokens are and train the head alone first, if that was asked for; every process does the same."""
        if self.args.head_epochs:
            self.model.to(default_device())
            some = itertools.islice(self._batches(), -(-START_SAMPLES // self.args.batch_size))
            start_prompts(self.model, some)
            fit_head(
                self.model, self._batches(), epochs=self.args.head_epochs, batch_size=self.args.batch_size, seed=self.args.seed
            )  # fmt: skip

    def _batches(self) -> Iterator[Any]:
        """Of training samples in the seed's order, one by one: pictures of all of them may not fit into memory."""
        order = torch.randperm(len(self.splits["train"]), generator=torch.Generator().manual_seed(self.args.seed))
        for batch in self.loader("train", order.tolist()):
            yield to_device(batch, default_device())

    def save(self, folder: Path) -> None:
        """What ``python -m mope_fast.predict`` takes, and ``MoPEFusion.from_pretrained``."""
        Predictor(self.model, self.collate, self.class_names).save_pretrained(folder)

    def metrics(self, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, macro and micro F1; of two classes the area under the ROC curve too, where both occur."""
        if self.splits["train"].multi_label:
            return multi_label_metrics(logits, labels)
        metrics = classification_metrics(logits, labels, len(self.class_names))
        # of samples with one class each every mistake is one class too many and one too few
        metrics = {"accuracy": metrics["accuracy"], "f1_macro": metrics["f1_macro"], "f1_micro": metrics["accuracy"]}
        if len(self.class_names) == 2 and len(labels.unique()) == 2:
            metrics["auroc"] = float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
        return metrics

    @property
    def chosen_by(self) -> str:
        """The metric that says which epoch is the best."""
        return "f1_macro" if self.splits["train"].multi_label else "accuracy"


def read_folder(args: argparse.Namespace) -> dict[str, Posts]:
    return read_jsonl_folder(args.folder, missing_images=args.missing_images, outside=args.outside)


def load_task(args: argparse.Namespace, read: Callable[[argparse.Namespace], dict[str, Posts]] = read_folder) -> Task:
    """Read the samples, and make the model from the seed."""
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
    made = {side: _complementary(args, side, encoder) for side, (encoder, _) in zip(args.other, others, strict=True)}
    inputs = {side: preprocess for side, (_, preprocess) in zip(args.other, others, strict=True)}
    complementary = made[alone] if alone else {side: _side(side, source) for side, source in made.items()}
    config = MoPEConfig(
        num_experts=args.experts, prompt_length=args.prompt_length, dropout=args.dropout, noise_std=args.noise_std,
        prompt_init=args.prompt_init, mapper_norm=args.mapper_norm, importance_weight=args.importance_weight,
        complementary_prompt_length=args.complementary_prompt_length, use_static=not args.no_static,
        use_dynamic=not args.no_dynamic, use_mapped=not args.no_mapped, top_k=args.top_k, learn_keys=args.learn_keys,
        temperature=args.temperature, head_inputs=args.head_inputs, pooling=_pooling(args.pooling),
        router_pooling=_pooling(args.router_pooling),
        complementary_pooling=None if args.complementary == "frozen" else _pooling(args.complementary_pooling),
        dynamic_dropout=args.dynamic_dropout, combine=args.combine, side_dropout=args.side_dropout,
    )  # fmt: skip
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


def only_other(args: argparse.Namespace) -> str | None:
    """The other side where it is text or images alone: no sample lacks it, for without an image there is a grey one."""
    return args.other[0] if args.other in (["text"], ["image"]) else None


def _encoder(args: argparse.Namespace, side: str) -> Encoder:
    if side == "text":
        return text_encoder(args.text_model, args.max_length)
    if side == "audio":
        return audio_encoder(args.audio_model, args.max_seconds)
    encoder, inputs = image_encoder(getattr(args, f"{side}_model"), args.image_size)
    if side == "video":
        return encoder, EachFrame(inputs, args.frames)
    return encoder, image_transform(inputs, args.image_transform, args.image_statistics)


def _complementary(args: argparse.Namespace, side: str, encoder: nn.Module) -> Any:
    """What gives one of the other sides' features."""
    pooling = _pooling(args.complementary_pooling)
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
    """One of several: a sample may lack it."""
    return Side(source, width=getattr(source, "width", None), optional=name != "text", frames="max" if name == "video" else None)


def _pooling(name: str) -> str | None:
    return None if name == "own" else name


def _file_name(model: str) -> str:
    return model.strip("/").replace("/", "-")


def run_from_shell(main: Callable[[], Any]) -> None:
    """What is wrong with the folder's files is said in a line; with --debug with a traceback."""
    try:
        main()
    except (OSError, ValueError) as error:
        if "--debug" in sys.argv:
            raise
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def say(text: str) -> None:
    """Print it in the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_device(value: Any, device: str | torch.device) -> Any:
    """A batch's tensors, in dicts too; None is a side that no sample has."""
    if isinstance(value, dict):
        return {name: to_device(each, device) for name, each in value.items()}
    return None if value is None else value.to(device, non_blocking=True)


def is_unused(folder: Path) -> bool:
    """Whether it isn't there or has nothing in it, but for what a process that was killed at once leaves."""
    leftovers = r"\.lock|\.settings\.json\.\d+\.part"
    return not folder.exists() or all(re.fullmatch(leftovers, path.name) for path in folder.iterdir())
