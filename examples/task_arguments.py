"""Command-line arguments of the programs that train on folders of posts, or of references with masks."""

import argparse
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from named_encoders import PACKAGED_AUDIO, PACKAGED_IMAGE, PACKAGED_TEXT, STATISTICS

PACKAGED_RECIPE = {"lr": 1e-3, "head_lr": 5e-3, "dropout": 0.0, "prompt_init": 0.06}
"""Settings that suit small encoders on Easy-VQA: defaults if the main side's encoder is a packaged one."""
FIELDS = {"text": "text", "image": "image", "audio": "audio", "video": "frames"}
"""Side -> field of a post."""
POOLINGS = ("own", "cls", "mean", "last", "cls+mean")
_POOLING_DEFAULT = f"default: mean for {PACKAGED_TEXT}, else its own"
_LEAST = {
    "image_size": 14, "max_length": 3, "experts": 1, "prompt_length": 1, "complementary_prompt_length": 0, "epochs": 1,
    "batch_size": 2, "samples": 2, "workers": 0, "head_epochs": 0, "frames": 1,
}  # fmt: skip
_POSITIVE = ("clip", "max_seconds", "temperature")
_NOT_NEGATIVE = ("lr", "complementary_lr", "head_lr", "weight_decay", "importance_weight", "noise_std")
Add = Callable[..., Any]


def argument_parser(description: str, output: str, sets: Mapping[str, str] | None = None) -> argparse.ArgumentParser:
    """Build the parser for a task on posts.

    Args:
        output: default name of the output folder, within ``outputs``.
        sets: names and titles of published sets, one of which must be given before its folder; None for a folder of JSON Lines.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    if sets is not None:
        add("name", choices=sets, metavar="NAME", help=", ".join(f"{name}: {title}" for name, title in sets.items()))
    lines = "folder with train.jsonl, val.jsonl, labels.txt, the images, and optionally test.jsonl, with or without labels"
    add("folder", type=Path, help=lines if sets is None else "folder with that set's files as published")
    add("--main", choices=("text", "image"), default="text", help="the side whose layers take prompts")
    add(
        "--other", nargs="+", choices=tuple(FIELDS), default=None,
        help="complementary sides, which route the prompts; a sample may lack audio or video, and its image if there are several; "
        "default: image or text, whichever --main is not",
    )  # fmt: skip
    add_encoders(add)
    add(
        "--audio-model", default="facebook/wav2vec2-base-960h",
        help=f"a transformers folder or name; {PACKAGED_AUDIO} comes from a package",
    )  # fmt: skip
    add("--max-seconds", type=float, default=20.0, help="length of a sound: longer ones are cut, shorter ones padded with silence")
    add("--video-model", default="google/vit-base-patch16-224-in21k", help="encoder of each frame; as for --image-model")
    add("--frames", type=int, default=8, help="maximum frames of a video, evenly spread; its feature is the maximum of theirs")
    add("--combine", choices=("concat", "sum"), default="concat", help="how features of several complementary sides are combined")
    add("--side-dropout", type=float, default=0.0, help="rate at which complementary sides are treated as missing in training")
    add(
        "--image-transform", choices=("own", "crop", "squash"), default="own",
        help="how images get the encoder's size: own preprocessing of the encoder; or resize the shorter side (crop) or both sides "
        "(squash) to 8/7 of it, then crop the center",
    )  # fmt: skip
    add(
        "--image-statistics", choices=("own", *STATISTICS), default="own",
        help="mean and standard deviation of pixels, with crop or squash",
    )  # fmt: skip
    add(
        "--rand-augment", type=int, nargs=2, metavar=("N", "M"), default=None,
        help="augment training images by N random operations of strength M, by torchvision's RandAugment",
    )  # fmt: skip
    add_prompts(add)
    add("--head-inputs", choices=("main", "both"), default="both", help="the fused feature, or also the complementary one")
    add("--pooling", choices=POOLINGS, default=None, help=f"pooling of the main encoder's tokens; {_POOLING_DEFAULT}")
    add(
        "--head-epochs", type=int, default=0,
        help="epochs of training the head alone first, with prompts initialized around the mean of an image encoder's tokens; "
        "each sample runs through the encoders once",
    )  # fmt: skip
    add("--check-images", action="store_true", help="read every image once before training")
    add(
        "--missing-images", choices=("error", "skip", "grey"), default="error",
        help="samples without their image: stop, leave them out, or use a grey picture",
    )  # fmt: skip
    add_training(add, output)
    return parser


def add_encoders(add: Add) -> None:
    """Add the arguments of text and image encoders and their inputs."""
    add("--text-model", default=PACKAGED_TEXT, help=f"a transformers folder or name; {PACKAGED_TEXT} comes from a package")
    add(
        "--image-model", default=PACKAGED_IMAGE,
        help=f"a transformers folder or name, or a timm model as timm/NAME; {PACKAGED_IMAGE} comes from a package",
    )  # fmt: skip
    add("--image-size", type=int, default=112, help=f"pixels, a multiple of 14; for {PACKAGED_IMAGE} only, other sizes are fixed")
    add("--max-length", type=int, default=128, help="maximum tokens of a text; longer ones are truncated")
    add(
        "--complementary", choices=("prompted", "frozen"), default="prompted",
        help="the complementary encoder: with trained prompts of its own, or frozen, with each sample computed once for all runs",
    )  # fmt: skip


def add_prompts(add: Add) -> None:
    """Add the arguments of prompts and router."""
    add("--experts", type=int, default=16, help="K, experts per layer")
    add("--prompt-length", type=int, default=6, help="L, tokens of a prompt")
    add("--complementary-prompt-length", type=int, default=4, help="tokens of the complementary side's prompts")
    add("--dropout", type=float, default=None, help="dropout on prompts; default: the paper's 0.1")
    add("--dynamic-dropout", type=float, default=0.0, help="dropout on routed prompts, in the paper's text but not in the release")
    add("--noise-std", type=float, default=1 / 256, help="standard deviation of the noise on routing logits in training")
    add("--mapper-norm", choices=("batch", "layer", "none"), default="batch", help="norm in the mapper of complementary features")
    add("--prompt-init", type=float, default=None, help="prompts start uniform in +- this; default: the release's rule")
    add("--complementary-prompt-init", type=float, default=None, help="--prompt-init of the complementary side; default: the same")
    add("--importance-weight", type=float, default=0.01, help="weight of the importance loss, 0 for none")
    add("--no-static", action="store_true", help="leave out static prompts")
    add("--no-dynamic", action="store_true", help="leave out routed prompts: no experts, no router")
    add("--no-mapped", action="store_true", help="leave out the prompt mapped from the complementary feature")
    add("--top-k", type=int, default=None, help="keep the k largest routing scores; default: all")
    add("--learn-keys", action="store_true", help="train the routing keys")
    add("--temperature", type=float, default=0.1, help="temperature of the router's softmax")
    add("--router-pooling", choices=POOLINGS[:-1], default="own", help="pooling of a layer's input for the router")
    add("--complementary-pooling", choices=POOLINGS, default=None, help=f"pooling of complementary tokens; {_POOLING_DEFAULT}")


def add_training(add: Add, output: str) -> None:
    """Add the arguments of the optimizer, of data loading and of the output folder."""
    add(
        "--lr", type=float, default=None,
        help="learning rate of prompts, router and mapper; default: the paper's 5e-4 for text, 4e-4 for images",
    )  # fmt: skip
    add(
        "--complementary-lr", type=float, default=None,
        help="learning rate of the complementary side's prompts; default: the paper's for that side",
    )  # fmt: skip
    add("--head-lr", type=float, default=None, help="default: the same as --lr")
    add("--weight-decay", type=float, default=1e-3)
    add("--schedule", choices=("linear", "steps"), default="linear", help="warm-up and decay; or the paper's x 0.4 at epochs 3, 6")
    add("--clip", type=float, default=1.0, help="maximum norm of the gradient")
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=32, help="batch size of each process")
    add("--samples", type=int, default=None, help="number of first samples of each split to use, for a quick try")
    add(
        "--outside", type=Path, nargs="+", default=[], help="folders outside of FOLDER that its images may be in, by a link or path"
    )
    add("--workers", type=int, default=0, help="DataLoader worker processes")
    add("--seed", type=int, default=42)
    add("--output", type=Path, default=Path("outputs") / output, help="folder for all output files")
    add("--debug", action="store_true", help="show the traceback of an error")


def check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, expected: str = "one with train.jsonl, val.jsonl and labels.txt"
) -> argparse.Namespace:
    """Exit with one line for invalid arguments; fill in the defaults of arguments that were not given.

    ``expected`` describes the folder to give.
    """
    given = vars(args)
    for name, value in _LEAST.items():
        if given.get(name) is not None and given[name] < value:
            parser.error(f"--{name.replace('_', '-')} must be at least {value}, got {given[name]}")
    for name in (*_NOT_NEGATIVE, *_POSITIVE):
        got, positive = given.get(name), name in _POSITIVE
        if got is not None and not (math.isfinite(got) and (got > 0 if positive else got >= 0)):
            parser.error(f"--{name.replace('_', '-')} must be a finite number {'> 0' if positive else '>= 0'}, got {got}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be 0 to 2**32 - 1, got {args.seed}")
    if args.image_model == PACKAGED_IMAGE and args.image_size % 14:
        parser.error(f"--image-size must be a multiple of 14, got {args.image_size}")
    if not args.folder.is_dir():
        parser.error(f"{args.folder} is not a folder: expected {expected}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must be a folder, {args.output} is a file")
    if not getattr(args, "resume", False) and not is_unused(args.output):
        more = "continue it by --resume, or give another --output" if hasattr(args, "resume") else "give another --output"
        parser.error(f"{args.output} already has files: {more}")
    if args.top_k is not None and not 1 <= args.top_k <= args.experts:
        parser.error(f"--top-k must be 1 to --experts ({args.experts}), got {args.top_k}")
    if args.no_static and args.no_dynamic and args.no_mapped:
        parser.error("--no-static --no-dynamic --no-mapped leaves no prompt: drop one of them")
    if args.other is None:
        args.other = ["image" if args.main == "text" else "text"]
    if args.main in args.other or len(set(args.other)) < len(args.other):
        parser.error(f"--other must be sides that differ from each other and from --main {args.main}, got {' '.join(args.other)}")
    if given.get("image_statistics", "own") != "own" and args.image_transform == "own":
        parser.error(f"--image-statistics {args.image_statistics} needs --image-transform crop or squash")
    augment = given.get("rand_augment")
    if augment and ("image" not in (args.main, *args.other) or min(augment) < 0 or augment[1] > 30):
        parser.error(f"--rand-augment needs an image side, N >= 0 operations and a strength M of 0 to 30, got {augment}")
    _fill_in(args)
    return args


def _fill_in(args: argparse.Namespace) -> None:
    """Set arguments that were not given to the paper's settings for the sides, or to those of the packaged encoders."""
    papers = {"text": 5e-4}
    recipe = {"lr": papers.get(args.main, 4e-4), "complementary_lr": papers.get(args.other[0], 4e-4), "dropout": 0.1}
    if getattr(args, f"{args.main}_model") in (PACKAGED_TEXT, PACKAGED_IMAGE):
        recipe |= PACKAGED_RECIPE
    for name, side in (("pooling", args.main), ("complementary_pooling", args.other[0])):
        packaged = side == "text" and args.text_model == PACKAGED_TEXT and (name == "pooling" or len(args.other) == 1)
        recipe[name] = "mean" if packaged else "own"
    for name, value in recipe.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def only_other(args: argparse.Namespace) -> str | None:
    """Return the complementary side if it is only text or only image, else None; no sample lacks it: a missing image is grey."""
    return args.other[0] if args.other in (["text"], ["image"]) else None


def is_unused(folder: Path) -> bool:
    """Return whether a folder doesn't exist or is empty, except for files left by a process killed right at its start."""
    leftovers = r"\.lock|\.settings\.json\.\d+\.part"
    return not folder.exists() or all(re.fullmatch(leftovers, path.name) for path in folder.iterdir())
