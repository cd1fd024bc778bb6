"""Train MoPE's recipe on a published set, from its owners' files: food101, mm-imdb, snli-ve, mustard or hateful-memes.

    python examples/train_recipe.py mm-imdb /data/mmimdb --paper         # the settings of the paper's text, as far as it is known
    python examples/train_recipe.py mm-imdb /data/mmimdb --released      # those of the released code
    python examples/train_recipe.py mm-imdb /data/mmimdb                 # ours
    python examples/train_recipe.py mm-imdb /data/mmimdb --experts 8 --image-model google/vit-base-patch16-224-in21k
    python examples/train_recipe.py mm-imdb /data/mmimdb --resume        # after a kill at any moment

This is classify_jsonl.py with a reader of the set and other defaults: every argument of that program may be given, and overrides
the recipe's. The sets were not available, so no result of this program on any of them is known.
"""

import argparse
from pathlib import Path
from typing import Any

from jsonl_task import Task, default_device, load_task, run_from_shell, say
from recipes import NOTES, RECIPES
from training_run import check_run, readable, run, run_parser

from mope_fast.data import PUBLISHED_SETS, Posts, compare_counts
from mope_fast.data.published.arguments import add_reading_arguments, reading_settings

PRESETS = ("paper", "released")


def make_parser() -> argparse.ArgumentParser:
    """Build the parser with our defaults; a preset changes them."""
    parser = run_parser(__doc__.split("\n")[0], "train_recipe", {name: PUBLISHED_SETS[name].title for name in RECIPES})
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--paper", action="store_true", help="use the settings of the paper's text")
    group.add_argument("--released", action="store_true", help="use the settings of the released code")
    add_reading_arguments(parser, but=("missing_images", "outside"))
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    asked = parser.parse_args(arguments)
    recipe = RECIPES[asked.name]
    parser.set_defaults(output=Path("outputs") / f"train_recipe-{asked.name}", **recipe.ours)
    for preset in PRESETS:
        if getattr(asked, preset):
            changes = getattr(recipe, preset)
            if isinstance(changes, str):
                parser.error(f"--{preset} is not for {asked.name}: {changes}; leave it out to use our settings")
            parser.set_defaults(**changes)
    if parser.get_default("precision") == "fp16" and default_device() == "cpu":
        say("float16 needs a GPU: using float32")
        parser.set_defaults(precision="no")
    args = parser.parse_args(arguments)
    reading_settings(parser, args)
    return check_run(parser, args, expected=f"that of {PUBLISHED_SETS[asked.name].title}, as published")


def read(args: argparse.Namespace) -> dict[str, Posts]:
    """Read the set; if it has no val, test is used as val, as in the release."""
    splits = PUBLISHED_SETS[args.name].read(args.folder, **reading_settings(make_parser(), args))
    for difference in compare_counts(args.name, splits):
        say(f"not as published: {difference}")
    return {"train": splits["train"], "val": splits.get("val", splits.get("test")), **splits}


def load(args: argparse.Namespace) -> Task:
    return load_task(args, read)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args = parse_arguments(arguments)
    recipe = RECIPES[args.name]
    preset = next((preset for preset in PRESETS if getattr(args, preset)), "ours")
    for note in (NOTES[preset], *(recipe.notes if preset == "released" else ())):
        say(f"{preset}: {note}")
    results = run(args, load)
    judged = "test" if "test" in results else "val"
    # a split with only one class has no ROC curve
    table = {name: results[judged][name] for name in recipe.table if name in results[judged]}
    say(f"{judged}, as in published tables: {readable(table)}")
    return results


if __name__ == "__main__":
    run_from_shell(main)
