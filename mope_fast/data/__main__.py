"""Read a published set, compare its counts with the published ones, write it as JSON Lines: python -m mope_fast.data NAME FOLDER"""

import argparse
from pathlib import Path

from .published import PUBLISHED_SETS, compare_counts
from .published.arguments import add_reading_arguments, reading_settings
from .published.sets import count
from .writer import write_jsonl_folder


def make_parser() -> argparse.ArgumentParser:
    """Build the program's argument parser."""
    parser = argparse.ArgumentParser(prog="python -m mope_fast.data", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("name", choices=PUBLISHED_SETS, metavar="NAME", help=", ".join(f"{name}: {s.title}" for name, s in PUBLISHED_SETS.items()))
    add("folder", type=Path, metavar="FOLDER", help="folder with the set's files as published")
    add("--check", action="store_true", help="exit with status 1 if the counts differ from the published ones")
    add("--to", type=Path, metavar="OUT", help="write a folder of JSON Lines here; it must be new or empty")
    add("--media", choices=("copy", "hardlink", "symlink"), default="copy", help="how to place files in OUT (default: %(default)s)")
    add_reading_arguments(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the program; errors in arguments or files raise SystemExit with a short message."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    published = PUBLISHED_SETS[args.name]
    settings = reading_settings(parser, args)
    try:
        splits = published.read(args.folder, **settings)
        for name, posts in splits.items():
            left_out = "".join(f"; left out, {reason}: {len(ids):,}" for reason, ids in posts.dropped.items() if ids)
            print(f"{name}: {len(posts):,} samples{left_out}")
        found = compare_counts(args.name, splits)
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


if __name__ == "__main__":
    main()
