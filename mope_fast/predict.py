"""Predict a file of JSON lines with a saved model: python -m mope_fast.predict adapter data.jsonl -o predictions.jsonl"""

import argparse
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._files import published
from .data.jsonl import MISSING_IMAGES, read_unlabelled
from .prediction import Predictor

_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_OTHERS = (
    "a transformers folder or name, timm/NAME, or MODULE:FUNCTION, where the function takes no arguments and returns the encoder, "
    "or a pair of the encoder and a function that makes its inputs from a list of values"
)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of the program's arguments."""
    parser = argparse.ArgumentParser(prog="python -m mope_fast.predict", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("folder", type=Path, help="folder written by save_pretrained")
    add(
        "data",
        type=Path,
        help='JSON lines, one {"id": ..., "text": ..., "img": ..., "audio": ..., "frames": [...]} for each sample, with the '
        "fields that the model reads; paths are relative to this file's folder",
    )
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="JSON lines to write, one with id, label, probabilities and experts for each sample",
    )
    add("--main", help=f"main encoder to use instead of the one that the save names: {_OTHERS}")
    add(
        "--complementary", nargs="+", default=[], metavar="[SIDE=]NAME",
        help="the same for the complementary encoder, or SIDE=NAME for some of several sides; FUNCTION may also return "
        "a function that computes the features",
    )  # fmt: skip
    add("--batch-size", type=int, default=32)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default here: %(default)s")
    add(
        "--missing-images",
        choices=MISSING_IMAGES,
        default="error",
        help="drop samples without an image, or use a grey image instead",
    )
    add("--outside", type=Path, nargs="+", default=[], help="folders, other than the file's own, that may contain its images")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the program; exit with a one-line message if arguments or files are wrong."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device} can't be used: {str(error).partition(chr(10))[0]}")
    if args.output.is_dir() or not args.output.parent.is_dir():
        parser.error(f"--output must be a file in an existing folder, got {args.output}")
    if args.output.exists() and args.data.exists() and args.output.samefile(args.data):
        parser.error(f"--output would replace the data, {args.data}")
    try:
        count = _predict(args)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(f"{args.output}: {count:,} samples")


def _predict(args: argparse.Namespace) -> int:
    sides: dict[str, Any] = {"device": args.device}
    sides["main"], inputs = _encoder(args.main)
    sides |= {} if inputs is None else {"main_inputs": inputs}
    sides |= _complementary(args.complementary)
    predictor = Predictor.from_pretrained(args.folder, **sides)
    fields = {field for field, _ in predictor.inputs.sides.values()}
    if not fields <= (known := {"text", "image", "audio", "frames"}):
        raise ValueError(
            f"{args.folder} reads fields {sorted(fields)}, but lines can only have {sorted(known)}: use the Predictor in Python"
        )
    posts = read_unlabelled(args.data, fields=fields, missing_images=args.missing_images, outside=args.outside)
    for reason, left_out in posts.dropped.items():
        print(f"{len(left_out):,} samples are left out: {reason}")
    with published(args.output) as file:
        for post, prediction in zip(posts, predictor(posts, args.batch_size, progress=True), strict=True):
            file.write(json.dumps({"id": post.id, **vars(prediction)}).encode() + b"\n")
    return len(posts)


def _complementary(given: list[str]) -> dict[str, Any]:
    """Return arguments of the Predictor for the only complementary side, or for several by name."""
    named = [re.match(r"([A-Za-z]\w*)=(.+)", value, re.ASCII) for value in given]
    if not any(named):
        if len(given) > 1:
            raise ValueError(f"--complementary got {given}: give one name, or SIDE=NAME for each of several sides")
        made = {"": _encoder(given[0] if given else None)}
    elif all(named):
        made = {match[1]: _encoder(match[2]) for match in named if match}
    else:
        raise ValueError(f"--complementary got {given}: give SIDE=NAME for all of them, or one name alone")
    encoders = {side: encoder for side, (encoder, _) in made.items() if encoder is not None}
    inputs = {side: make for side, (_, make) in made.items() if make is not None}
    if "" in made:
        return {"complementary": encoders.get(""), **({"complementary_inputs": inputs[""]} if inputs else {})}
    return {"complementary": encoders, "complementary_inputs": inputs}


def _encoder(name: str | None) -> tuple[Any, Callable[..., Any] | None]:
    """Return the encoder's name, or what the user's function returns; and the function that makes its inputs, or None."""
    if name is None or not _FUNCTION.fullmatch(name) or Path(name).exists():
        return name, None
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name} can't be imported ({error}): is the module's folder in PYTHONPATH?") from error
    made = make()
    return made if isinstance(made, tuple) and len(made) == 2 else (made, None)


if __name__ == "__main__":
    main()
