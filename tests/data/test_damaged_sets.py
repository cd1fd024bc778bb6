"""Randomly damaged files of data sets raise what their readers document."""

import json
import random

from damage import TIMES, VALUES, another_value, damaged, hold
from published_sets import make_mvsa, make_twitter

from mope_fast.data import FewShotSplit, read_jsonl_folder, read_mvsa_single, read_twitter_sarcasm


def test_jsonl_folder(tmp_path):
    (tmp_path / "1.png").touch()
    row = {"id": 1, "text": "a", "img": "1.png", "label": "pizza"}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    (tmp_path / "labels.txt").write_text("pizza\nsushi\n")

    def read():
        repr(read_jsonl_folder(tmp_path, ["train"], missing_images="grey"))

    hold(tmp_path / "train.jsonl", read, ValueError)
    hold(tmp_path / "train.jsonl", read, ValueError, lambda data, draw: data + another_value(row, draw).encode())
    hold(tmp_path / "labels.txt", read, ValueError)


def test_published_sets(tmp_path):
    tweets, mvsa = make_twitter(tmp_path / "twitter"), make_mvsa(tmp_path / "mvsa")
    hold(tweets / "text" / "train.txt", lambda: read_twitter_sarcasm(tweets, "train"), ValueError, damaged)
    hold(mvsa / "labelResultAll.txt", lambda: read_mvsa_single(mvsa), ValueError, damaged)


def test_few_shot_labels():
    draw, refused = random.Random(0), 0
    for _ in range(20 * TIMES):
        try:
            FewShotSplit(draw.choice([[0, 1] * 4, *VALUES]), draw.choice([1, *VALUES]), draw.choice([0, *VALUES]))
        except (TypeError, ValueError):
            refused += 1
    assert refused
