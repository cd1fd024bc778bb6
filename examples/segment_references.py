"""Segment what a phrase refers to: trains a fusion on pictures, phrases and masks, from a folder of JSON Lines or RefCOCO's files.

The folder has train.jsonl and val.jsonl, and other splits that are evaluated at the end. Each line is {"id": ...,
"texts": ["the red circle"], "img": "a.png", "mask": "a_mask.png"}. Paths are relative to the folder; a mask is a picture that is 0
outside the object.

    python examples/segment_references.py my_folder
    python examples/segment_references.py refer/data/refcoco+ --set refcoco+ --paper    # the settings of the paper's text
    python examples/segment_references.py refer/data/refcoco+ --set refcoco+ --resume   # after a kill at any moment
    torchrun --nproc-per-node 2 examples/segment_references.py my_folder

Pictures are letterboxed: scaled to fit into a square, in its middle. An epoch uses one phrase of each object; evaluation uses all
phrases, on masks of the pictures' own sizes. At the end the output folder has results.json, predictions-SPLIT.jsonl,
predictions.png, and the adapter of the best epoch on val. RefCOCO was not available, so no result of this program on it is known.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonl_task import run_from_shell, say, to_device
from mask_pictures import Masked, draw
from recipes import NOTES, REFERENCES
from reference_task import ReferenceTask, load_references
from task_arguments import add_encoders, add_prompts, add_training
from training_run import Run, add_run, check_run, readable, run

from mope_fast.data import References, compare_counts, read_refcoco, read_reference_folder

SETS = ("refcoco", "refcoco+", "refcocog")
SHOWN = 6
"""Number of phrases in predictions.png."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="folder with train.jsonl, val.jsonl, pictures and masks; or with a published set, with --set")
    add("--set", choices=SETS, default=None, help="read FOLDER as this published set, in REFER's files")
    add("--split-by", choices=("unc", "umd", "google"), default=None, help="authors of the splits; default: unc, for refcocog umd")
    add("--images-in", type=Path, default=None, help="the folder of COCO's train2014; default: where REFER has it")
    add("--missing-images", choices=("error", "skip"), default="error", help="with --set: skip leaves out such objects")
    add("--paper", action="store_true", help="use the settings of the paper's text")
    add_encoders(add)
    add_prompts(add)
    add(
        "--start-prompts", action=argparse.BooleanOptionalAction, default=True,
        help="initialize prompts around the mean of the encoders' tokens before training",
    )  # fmt: skip
    add_training(add, "segment_references")
    return add_run(parser)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    parser.set_defaults(main="image", other=["text"], batch_size=16, head_lr=1e-3)
    asked = parser.parse_args(arguments)
    if asked.set is None and (asked.split_by, asked.images_in, asked.missing_images) != (None, None, "error"):
        parser.error("--split-by, --images-in and --missing-images are for a published set: add --set")
    if asked.set is not None:
        parser.set_defaults(output=Path("outputs") / f"segment_references-{asked.set}", **REFERENCES.ours)
    if asked.paper:
        parser.set_defaults(**{**REFERENCES.ours, **REFERENCES.paper})
    expected = "one with train.jsonl and val.jsonl" if asked.set is None else f"that of {asked.set}, with refs(...).p"
    return check_run(parser, parser.parse_args(arguments), expected=expected)


def read(args: argparse.Namespace) -> dict[str, References]:
    if args.set is None:
        return read_reference_folder(args.folder, outside=args.outside)
    splits = read_refcoco(
        args.folder, args.set, split_by=args.split_by, images=args.images_in, missing_images=args.missing_images,
        outside=args.outside,
    )  # fmt: skip
    for difference in compare_counts(args.set, splits):
        say(f"not as published: {difference}")
    return splits


def load(args: argparse.Namespace) -> ReferenceTask:
    return load_references(args, read)


class ReferenceRun(Run):
    """A run that also draws predicted masks in its report."""

    task: ReferenceTask

    def report(self, results: dict[str, Any]) -> None:
        for split in self.judged:
            outcomes = self.outcomes(split)
            results[split] = self.task.judge(outcomes, split)
            self.accelerator.print(f"{split}: {readable(results[split])}")
            self.write(split, results, outcomes)
        page = self.args.output / "predictions.png"
        if self.accelerator.is_main_process:
            draw(page, self._shown(split))
        self.accelerator.print(f"{page.with_name('results.json')}, {page}, {self.folder.adapter(self.position.best_epoch)}")

    @torch.inference_mode()
    def _shown(self, split: str) -> list[Masked]:
        """Predict masks for evenly spaced phrases of a split."""
        task = self.task
        named = task.named(split)
        chosen = [named[i] for i in np.linspace(0, len(named) - 1, min(SHOWN, len(named))).round().astype(int)]
        task.model.eval()
        batch = replace(task.collate, whole=True)(chosen)
        found = task.segment(to_device(batch, self.accelerator.device), task.model)
        return [
            Masked(phrase, np.array(reference.open_image()), {"named": mask, "found": guess.cpu()})
            for (reference, phrase), mask, guess in zip(chosen, batch["masks"], found, strict=True)
        ]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(arguments)
    if args.set is not None or args.paper:
        preset = "paper" if args.paper else "ours"
        say(f"{preset}: {NOTES[preset]}")
    return run(args, load, ReferenceRun)


if __name__ == "__main__":
    run_from_shell(main)
