"""What readers of published sets take, as arguments of a program."""

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
"""Where a reader's argument alone would say too little."""


def add_reading_arguments(parser: argparse.ArgumentParser, *, but: Collection[str] = ()) -> None:
    """Add an argument for each that some reader takes; None is the reader's default.

    Args:
        but: those that the parser has already.
    """

    def add(argument: str, words: str, **settings: Any) -> None:
        if argument not in but:
            parser.add_argument(f"--{_flag(argument)}", help=f"{words}; for {', '.join(_takers(argument))}", **settings)

    add("missing_images", "what to do with a sample without its image", choices=_CHOICES["missing_images"])
    add("missing_media", "likewise, without its sound or frames", choices=_CHOICES["missing_media"])
    add("outside", "folders outside of FOLDER that its files may be in", type=Path, nargs="+")
    add("text", "which text", choices=_CHOICES["text"])
    add("split", "which of two", choices=_CHOICES["split"])
    add("part", "which dev and test", choices=_CHOICES["part"])
    add("split_by", "whose splits", choices=_CHOICES["split_by"])
    add("val", "samples of train that become val", type=int)
    add("seed", "of that draw", type=int)
    add("images", "the folder of images", type=Path)
    add("frames", "the folder of frames", type=Path)


def reading_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of the reader ``args.name``: what was given; ends the program where that is another reader's."""
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
