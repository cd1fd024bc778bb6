"""Read a published set, compare its counts with the published ones, write it as JSON lines: python -m mope_fast.data NAME FOLDER"""

import argparse
import inspect
from pathlib import Path
from typing import Any

from .published import PUBLISHED_SETS, differences
from .published.sets import count
from .writer import write_jsonl_folder

_CHOICES = {
    "missing_images": ("error", "skip", "grey"),
    "missing_media": ("error", "skip", "none"),
    "text": ("pages", "titles"),
    "split": ("speaker-dependent", "speaker-independent"),
    "part": ("seen", "unseen"),
}
"""Arguments of readers that take a word."""


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the program."""
    parser = argparse.ArgumentParser(prog="python -m mope_fast.data", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("name", choices=PUBLISHED_SETS, metavar="NAME", help=", ".join(f"{name}: {s.title}" for name, s in PUBLISHED_SETS.items()))
    add("folder", type=Path, metavar="FOLDER", help="where the set's files are, as published")
    add("--check", action="store_true", help="end with status 1 where counts are not the published ones")
    add("--to", type=Path, metavar="OUT", help="write a folder of JSON lines, which must not be there yet")
    add("--media", choices=("copy", "hardlink", "symlink"), default="copy", help="how files come to OUT (default: %(default)s)")
    add("--outside", type=Path, nargs="+", help="folders outside of FOLDER that its files may be in")
    for name, choices in _CHOICES.items():
        add(f"--{name.replace('_', '-')}", choices=choices, help=f"for {', '.join(_takers(name))}")
    add("--val", type=int, help=f"samples of train that become val; for {', '.join(_takers('val'))}")
    add("--seed", type=int, help="of that draw")
    for name in ("images", "frames"):
        add(f"--{name}", type=Path, help=f"the folder of {name}; for {', '.join(_takers(name))}")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the program; SystemExit with one line for what is wrong with arguments or files."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    published = PUBLISHED_SETS[args.name]
    try:
        splits = published.read(args.folder, **_settings(parser, args))
        for name, posts in splits.items():
            left_out = "".join(f"; left out, {reason}: {len(ids):,}" for reason, ids in posts.dropped.items() if ids)
            print(f"{name}: {len(posts):,} samples{left_out}")
        found = differences(args.name, splits)
        for difference in found:
            print(f"differs: {difference}")
        if not found:
            print(f"all {count(splits, tuple(splits)):,} samples of {published.title} are here, as published")
        if args.to is not None:
            write_jsonl_folder(splits, args.to, media=args.media)
            print(f"{args.to}: {', '.join(f'{name}.jsonl' for name in splits)}")
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if args.check and found:
        raise SystemExit(1)


def _takers(argument: str) -> list[str]:
    return [name for name, each in PUBLISHED_SETS.items() if argument in inspect.signature(each.read).parameters]


def _settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the reader's own arguments."""
    given = {name: getattr(args, name) for name in ("outside", "val", "seed", "images", "frames", *_CHOICES)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if args.name not in _takers(name):
            parser.error(f"--{name.replace('_', '-')} is not for {args.name}")
    return given


if __name__ == "__main__":
    main()
