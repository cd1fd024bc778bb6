"""Randomly damaged files of data sets raise what their readers document."""

import json
import random

import pytest
from damage import TIMES, VALUES, another_value, damaged, damaged_head, hold
from published_formats import make_food101, make_hateful_memes, make_mm_imdb, make_mm_imdb_hdf5, make_mustard, make_snli_ve
from published_sets import make_mvsa, make_twitter

from mope_fast.data import (
    FewShotSplit,
    read_food101,
    read_hateful_memes,
    read_jsonl_folder,
    read_mm_imdb,
    read_mustard,
    read_mvsa_single,
    read_snli_ve,
    read_twitter_sarcasm,
)


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


def test_sets_of_mope(tmp_path):
    pytest.importorskip("soundfile", reason="needs the data extra")
    food, movies = make_food101(tmp_path / "food", pages=False), make_mm_imdb(tmp_path / "movies")
    snli, memes = make_snli_ve(tmp_path / "snli"), make_hateful_memes(tmp_path / "memes")
    shows = make_mustard(tmp_path / "shows", 10)
    for file, read in {
        food / "texts" / "train_titles.csv": lambda: read_food101(food, val=0),
        movies / "split.json": lambda: read_mm_imdb(movies),
        movies / "dataset" / "0100001.json": lambda: read_mm_imdb(movies),
        snli / "snli_ve_train.jsonl": lambda: read_snli_ve(snli),
        memes / "dev_seen.jsonl": lambda: read_hateful_memes(memes),
        shows / "sarcasm_data.json": lambda: read_mustard(shows, split="speaker-independent", val=0, missing_media="none"),
    }.items():
        hold(file, read, ValueError)


def test_an_hdf5_file_and_its_words(tmp_path):
    pytest.importorskip("h5py", reason="needs the data extra")
    folder = make_mm_imdb_hdf5(tmp_path)
    hold(folder / "metadata.npy", lambda: read_mm_imdb(folder), ValueError)
    hold(folder / "multimodal_imdb.hdf5", lambda: read_mm_imdb(folder), (ValueError, OSError), damaged_head)


def test_few_shot_labels():
    draw, refused = random.Random(0), 0
    for _ in range(20 * TIMES):
        try:
            FewShotSplit(draw.choice([[0, 1] * 4, *VALUES]), draw.choice([1, *VALUES]), draw.choice([0, *VALUES]))
        except (TypeError, ValueError):
            refused += 1
    assert refused
