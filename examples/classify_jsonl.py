"""Classify text with an image: trains a fusion on a folder of JSON Lines, the format of MoPE's released code.

The folder has train.jsonl, val.jsonl, optionally test.jsonl, labels.txt, and the images. Each line is {"id": ...,
"text": ..., "img": "path/from/the/folder.jpg", "label": "name"}; label is a list of names if a sample may have several classes.
A test.jsonl without labels is predicted. With --other audio video a line has "audio", a path, and "frames", a list of paths.

    python examples/easy_vqa_jsonl.py outputs/easy_vqa_jsonl                     # or a folder of your own
    python examples/classify_jsonl.py outputs/easy_vqa_jsonl --complementary frozen
    python examples/classify_jsonl.py outputs/easy_vqa_jsonl --complementary frozen --resume  # after a kill at any moment
    torchrun --nproc-per-node 2 examples/classify_jsonl.py outputs/easy_vqa_jsonl --complementary frozen
    tensorboard --logdir outputs/classify_jsonl

A resumed run ends with the same numbers as an uninterrupted one, because randomness in a step depends only on seed and step. At the
end the output folder has results.json, report.html, predictions-SPLIT.jsonl, and the adapter of the best epoch on val.
"""

import argparse
from typing import Any

from jsonl_task import load_task, run_from_shell
from training_run import check_run, run, run_parser


def make_parser() -> argparse.ArgumentParser:
    return run_parser(__doc__.split("\n")[0], "classify_jsonl")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    return check_run(parser, parser.parse_args(arguments))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    return run(parse_arguments(arguments), load_task)


if __name__ == "__main__":
    run_from_shell(main)
