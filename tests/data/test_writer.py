"""Posts as a folder of JSON lines: they come back as they were, the folder is whole or not there."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from published_formats import make_mm_imdb_hdf5, make_mustard
from published_sets import save_image
from test_published import MAKE, SETTINGS

from mope_fast.data import (
    PUBLISHED_SETS,
    Post,
    Posts,
    load_image,
    read_jsonl_folder,
    read_mm_imdb,
    read_mustard,
    write_jsonl_folder,
)
from mope_fast.data import __main__ as program

pytest.importorskip("soundfile", reason="needs the data extra")
pytest.importorskip("h5py", reason="needs the data extra")


def contents(splits) -> dict[str, list]:
    """Everything about the posts but where their files are."""

    def of(place):
        return place and (load_image(place).tobytes() if not str(place).endswith("wav") else Path(place).read_bytes())

    return {
        name: [
            dataclasses.replace(post, image=of(post.image), audio=of(post.audio), frames=tuple(map(of, post.frames)))
            for post in posts
        ]
        for name, posts in splits.items()
    }


@pytest.mark.parametrize("name", [*MAKE, "hdf5"])
def test_a_published_set_comes_back_as_it_was(tmp_path, name):
    folder = (make_mm_imdb_hdf5 if name == "hdf5" else MAKE[name])(tmp_path / "set")
    splits = (read_mm_imdb if name == "hdf5" else PUBLISHED_SETS[name].read)(folder, **SETTINGS.get(name, {}))
    write_jsonl_folder(splits, tmp_path / "lines", progress=False)
    again = read_jsonl_folder(tmp_path / "lines")
    assert contents(again) == contents(splits)
    assert {posts.class_names for posts in again.values()} == {posts.class_names for posts in splits.values()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("media", ["hardlink", "symlink"])
def test_links_in_place_of_copies(tmp_path, media):
    splits = read_mustard(make_mustard(tmp_path / "set", 10, media=range(10)), val=0, split="speaker-independent")
    write_jsonl_folder(splits, tmp_path / "lines", media=media, progress=False)
    if media == "symlink":
        with pytest.raises(ValueError, match="outside of"):
            read_jsonl_folder(tmp_path / "lines", ["train"])
    again = read_jsonl_folder(tmp_path / "lines", ["train"], outside=[tmp_path / "set"])["train"]
    assert again[0].audio.samefile(splits["train"][0].audio)
    assert again[0].frames[3].samefile(splits["train"][0].frames[3])


def posts_of(*images, labels=None, names=("no", "yes")) -> Posts:
    return Posts(
        tuple(Post(str(i), "text", image, i % 2 if labels is None else labels[i]) for i, image in enumerate(images)), names
    )


def test_files_of_one_name_stay_apart_and_a_shared_one_is_written_once(tmp_path):
    for number, place in enumerate(["a/x/1.png", "b/x/1.png", "b/X/1.PNG"]):
        save_image(tmp_path / place, color=(number, 0, 0), format="PNG")
    images = [tmp_path / place for place in ("a/x/1.png", "b/x/1.png", "b/X/1.PNG", "a/x/1.png")]
    write_jsonl_folder({"train": posts_of(*images)}, tmp_path / "out", progress=False)
    train = read_jsonl_folder(tmp_path / "out", ["train"])["train"]
    assert [post.open_image().getpixel((0, 0))[0] for post in train] == [0, 1, 2, 0]
    written = [path.relative_to(tmp_path / "out").as_posix().casefold() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(set(written)) == len(written) == 2 + 3


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path, monkeypatch):
    save_image(tmp_path / "1.jpg")
    posts = posts_of(tmp_path / "1.jpg", tmp_path / "gone.jpg")
    with pytest.raises(FileNotFoundError, match=r"gone.jpg"):
        write_jsonl_folder({"train": posts}, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["1.jpg"]
    replace = os.replace

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_jsonl_folder({"train": posts[:1]}, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["1.jpg"]
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "out").mkdir()  # an empty one is no harm
    write_jsonl_folder({"train": posts[:1]}, tmp_path / "out", progress=False)
    with pytest.raises(FileExistsError, match="already exists and is not empty"):
        write_jsonl_folder({"train": posts[:1]}, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("splits", "error", "message"),
    [
        ({}, ValueError, "at least one"),
        ([], TypeError, "must be a dict of names to Posts"),
        ({"../x": posts_of(None)}, ValueError, "a split's name becomes a file name.*'../x'"),
        ({"a": posts_of(None), "b": posts_of(None, names=("x", "y"))}, ValueError, "must have the same classes: a has"),
        ({"a": posts_of(None, names=("x", " y"))}, ValueError, "a class is a line of labels.txt.*' y'"),
    ],
    ids=range(5),
)
def test_what_can_not_be_written(tmp_path, splits, error, message):
    with pytest.raises(error, match=message):
        write_jsonl_folder(splits, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_samples_without_labels_or_images_come_back(tmp_path):
    write_jsonl_folder({"test": posts_of(None, None, labels=[None, None])}, tmp_path / "out", progress=False)
    test = read_jsonl_folder(tmp_path / "out", ["test"])["test"]
    assert [(post.image, post.label) for post in test] == [(None, None)] * 2


# sound and frames in lines


def test_lines_with_sound_and_frames(tmp_path):
    for place in ("i.png", "f/1.png", "f/2.png"):
        save_image(tmp_path / place)
    (tmp_path / "a.wav").touch()
    (tmp_path / "labels.txt").write_text("no\nyes\n")
    rows = [
        {"audio": "a.wav", "frames": ["f/1.png", "f\\2.png"]}, {"audio": None}, {"frames": None, "img": "i.png"},
        {"img": "i.png", "audio": "a.wav"}, {"frames": []},
    ]  # fmt: skip
    lines = [json.dumps({"id": i, "text": "t", "label": "no", **row}) for i, row in enumerate(rows)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    train = read_jsonl_folder(tmp_path, ["train"])["train"]
    assert [post.audio and post.audio.name for post in train] == ["a.wav", None, None, "a.wav", None]
    assert [len(post.frames) for post in train] == [2, 0, 0, 0, 0]
    assert [post.image is not None for post in train] == [False, False, True, True, False]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"audio": "gone.wav"}, 'field "audio": .*gone.wav does not exist; use null for a sample without it'),
        ({"audio": 3}, 'field "audio": expected a path or null, got 3'),
        ({"frames": "f.png"}, 'field "frames": expected a list of paths or null, got .f.png.'),
        ({"frames": [1]}, 'field "frames": expected a list of paths or null, got 1 in it'),
        ({"frames": ["gone.png"]}, 'field "frames": .*gone.png does not exist'),
        ({"audio": "../a.wav"}, 'field "audio": .*outside of'),
    ],
)
def test_sound_and_frames_that_are_not_there(tmp_path, fields, expected):
    root = tmp_path / "set"
    root.mkdir()
    (tmp_path / "a.wav").touch()
    (root / "labels.txt").write_text("no\nyes\n")
    (root / "train.jsonl").write_text(json.dumps({"id": 1, "text": "t", "label": "no", **fields}))
    with pytest.raises(ValueError, match=f"line 1: {expected}"):
        read_jsonl_folder(root, ["train"])


# the program


def test_program_counts_checks_and_writes(tmp_path, capsys):
    folder = make_mustard(tmp_path / "set")
    program.main(["mustard", str(folder), "--missing-media", "none", "--check", "--to", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "train: 300 samples\nval: 34 samples\ntest: 356 samples\n" in out
    assert "all 690 samples of MUStARD are here, as published" in out
    assert len(read_jsonl_folder(tmp_path / "out")["test"]) == 356
    part = MAKE["snli-ve"](tmp_path / "part")
    program.main(["snli-ve", str(part)])
    out = capsys.readouterr().out
    assert "train: 8 samples; left out, no gold label: 1" in out
    assert "differs: train: 9 samples are here, 529,527 by the authors" in out
    with pytest.raises(SystemExit) as ended:
        program.main(["snli-ve", str(part), "--check"])
    assert ended.value.code == 1


def test_program_says_what_is_wrong_in_a_line(tmp_path, capsys):
    folder = MAKE["snli-ve"](tmp_path / "set")
    with pytest.raises(SystemExit, match=r"^FileNotFoundError: .* is not MM-IMDB, .*: it looks like SNLI-VE$"):
        program.main(["mm-imdb", str(folder)])
    with pytest.raises(SystemExit):
        program.main(["snli-ve", str(folder), "--val", "3"])
    assert "--val is not for snli-ve" in capsys.readouterr().err
