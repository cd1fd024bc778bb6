"""Write Easy-VQA as a folder of JSON Lines, the format that classify_jsonl.py reads: real data for a first try.

Samples are questions about pictures of shapes, labelled with the answer. With --multi-label they are labelled with the shape and
color of the picture, if the answers to its questions contain both.

    python examples/easy_vqa_jsonl.py outputs/easy_vqa_jsonl
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from easy_vqa_data import Split, easy_vqa
from files import write_atomically

VALIDATION_IMAGES = 400
"""Number of the last of the 4,000 training images whose questions are used for validation, not for training."""


def lines(split: Split, answers: list[str], chosen: torch.Tensor, folder: str, multi_label: bool) -> Iterator[dict]:
    """Yield a line for each chosen question that can be labelled."""
    names = shown(split, answers) if multi_label else {}
    for i in chosen.tolist():
        image = int(split.images[i])
        label = names.get(image) if multi_label else answers[split.answers[i]]
        if label is not None:
            yield {"id": f"{folder}-{i}", "text": split.questions[i], "img": f"images/{folder}/{image}.png", "label": label}


def shown(split: Split, answers: list[str]) -> dict[int, list[str]]:
    """Map each image to its shape and color, if both are answers to its questions."""
    shown: dict[int, set[str]] = {image: set() for image in split.images.tolist()}
    for image, answer in zip(split.images.tolist(), split.answers.tolist(), strict=True):
        shown[image] |= {answers[answer]} - {"yes", "no"}
    return {image: sorted(names) for image, names in shown.items() if len(names) == 2}


def write(root: Path, samples: int | None = None, multi_label: bool = False) -> None:
    """Write the whole folder, with ``samples`` of each split, or all of them."""
    train, test, answers = easy_vqa()
    held_out = train.images >= len(train.paths) - VALIDATION_IMAGES
    splits = {"train": (train, ~held_out, "train"), "val": (train, held_out, "train"), "test": (test, test.images >= 0, "test")}
    root.mkdir(parents=True, exist_ok=True)
    names = [name for name in answers if not (multi_label and name in ("yes", "no"))]
    write_atomically(root / "labels.txt", "\n".join(names) + "\n")
    generator = torch.Generator().manual_seed(0)
    for name, (split, members, folder) in splits.items():
        chosen = members.nonzero()[:, 0]
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
        rows = list(islice(lines(split, answers, chosen, folder, multi_label), samples))
        (root / "images" / folder).mkdir(parents=True, exist_ok=True)
        for image in {row["img"] for row in rows}:
            shutil.copyfile(split.paths[int(re.search(r"(\d+)\.png", image)[1])], root / image)
        write_atomically(root / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        print(f"{root / name}.jsonl: {len(rows):,} questions")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="created if it doesn't exist")
    parser.add_argument("--samples", type=int, default=None, help="number of questions of each split; default: all")
    parser.add_argument("--multi-label", action="store_true", help="label with the shape and color of the picture")
    args = parser.parse_args(arguments)
    if args.samples is not None and args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    write(args.folder, args.samples, args.multi_label)


if __name__ == "__main__":
    main()
