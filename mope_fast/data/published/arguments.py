"""Command-line arguments for the readers of published sets."""

import argparse
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .sets import PUBLISHED_SETS

_CHOICES = {
    "missing_images": ("error", "skip", "grey"),
    "missing_media": ("error", "skip", "none"),
    "text": ("pages", "titles"),
    "split": ("speaker-dependent", "speaker-independent"),
    "part": ("seen", "unseen"),
    "split_by": ("unc", "umd", "google"),
}
_FLAGS = {"text": "texts", "seed": "val_seed", "images": "images_in", "frames": "frames_in"}
"""Reader argument -> flag, if the argument's own name would be unclear on the command line."""


def add_reading_arguments(parser: argparse.ArgumentParser, *, but: Collection[str] = ()) -> None:
    """Add the arguments of all readers to a parser; None stands for the reader's default.

    Args:
        but: arguments that the parser already has.
    """

    def add(argument: str, words: str, **settings: Any) -> None:
        if argument not in but:
            parser.add_argument(f"--{_flag(argument)}", help=f"{words}; for {', '.join(_takers(argument))}", **settings)

    add("missing_images", "what to do with a sample without its image", choices=_CHOICES["missing_images"])
    add("missing_media", "what to do with a sample without its sound or frames", choices=_CHOICES["missing_media"])
    add("outside", "folders outside of FOLDER that its files may be in", type=Path, nargs="+")
    add("text", "text to read: whole pages or their titles", choices=_CHOICES["text"])
    add("split", "split into train and test", choices=_CHOICES["split"])
    add("part", "dev and test files to read", choices=_CHOICES["part"])
    add("split_by", "authors of the splits", choices=_CHOICES["split_by"])
    add("val", "number of train samples to hold out as val", type=int)
    add("seed", "seed of the draw of val", type=int)
    add("images", "the folder of images", type=Path)
    add("frames", "the folder of frames", type=Path)


def reading_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Return the given arguments as keywords of the reader ``args.name``; exit if one belongs to other readers only."""
    settings = {}
    for argument in (*_CHOICES, "outside", "val", "seed", "images", "frames"):
        flag = _flag(argument).replace("-", "_")
        value = getattr(args, flag)
        if args.name in _takers(argument):
            settings |= {} if value is None else {argument: value}
        elif value != parser.get_default(flag):
            parser.error(f"--{_flag(argument)} is not for {args.name}")
    return settings


def _flag(argument: str) -> str:
    return _FLAGS.get(argument, argument).replace("_", "-")


def _takers(argument: str) -> list[str]:
    return [name for name, each in PUBLISHED_SETS.items() if argument in inspect.signature(each.read).parameters]
