"""Segment what a phrase names: trains a fusion on pictures, phrases and masks, a folder of JSON lines or RefCOCO as published.

The folder has train.jsonl and val.jsonl, and others to be judged in the end. Each line is {"id": ..., "texts": ["the red circle"],
"img": "a.png", "mask": "a_mask.png"}: paths from the folder, the mask a picture that is 0 where the object isn't.

    python examples/segment_references.py my_folder
    python examples/segment_references.py refer/data/refcoco+ --set refcoco+ --paper    # the settings of the paper's text
    python examples/segment_references.py refer/data/refcoco+ --set refcoco+ --resume   # after a kill at any moment
    torchrun --nproc-per-node 2 examples/segment_references.py my_folder

Pictures are put whole into the middle of a square. An epoch has one phrase of each object; judged are all phrases, on masks of the
pictures' own sizes. In the end the output folder has results.json, predictions-SPLIT.jsonl, predictions.png, and the adapter of the
epoch that was the best on val. RefCOCO was not at hand: no figure of this program on it is known.
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
"""Phrases in the picture."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="train.jsonl, val.jsonl, pictures and masks; or a set's own, with --set")
    add("--set", choices=SETS, default=None, help="read FOLDER as this one, in the files of REFER")
    add("--split-by", choices=("unc", "umd", "google"), default=None, help="whose splits; default: unc, of refcocog umd")
    add("--images-in", type=Path, default=None, help="the folder of COCO's train2014; default: where REFER has it")
    add("--missing-images", choices=("error", "skip"), default="error", help="of a published set: leave such objects out")
    add("--paper", action="store_true", help="the settings of the paper's text")
    add_encoders(add)
    add_prompts(add)
    add(
        "--start-prompts", action=argparse.BooleanOptionalAction, default=True,
        help="put prompts where the encoders' tokens are, before anything else",
    )  # fmt: skip
    add_training(add, "segment_references")
    return add_run(parser)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    parser.set_defaults(main="image", other=["text"], batch_size=16, head_lr=1e-3)
    asked = parser.parse_args(arguments)
    if asked.set is None and (asked.split_by, asked.images_in, asked.missing_images) != (None, None, "error"):
        parser.error("--split-by, --images-in and --missing-images are for a published set: give --set")
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
    """Reports by a picture of masks."""

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
        """Phrases at equal distances in a split."""
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
