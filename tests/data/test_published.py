"""Published sets in their own files: what is read, what is left out, one error for all that is wrong, counts."""

import json
import os
import pickle
import re

import numpy as np
import pytest
from published_formats import (
    DISHES,
    make_food101,
    make_hateful_memes,
    make_mm_imdb,
    make_mm_imdb_hdf5,
    make_mustard,
    make_snli_ve,
)

from mope_fast.data import (
    PUBLISHED_SETS,
    compare_counts,
    read_food101,
    read_hateful_memes,
    read_mm_imdb,
    read_mustard,
    read_snli_ve,
)

pytest.importorskip("soundfile", reason="needs the data extra")
pytest.importorskip("h5py", reason="needs the data extra")
pytest.importorskip("sklearn", reason="needs the data extra")

MAKE = {
    "food101": make_food101,
    "mm-imdb": make_mm_imdb,
    "snli-ve": make_snli_ve,
    "mustard": lambda folder: make_mustard(folder, media=range(2)),
    "hateful-memes": make_hateful_memes,
}
SETTINGS = {"food101": {"val": 6}, "mustard": {"missing_media": "none"}}


def ids(posts) -> list[str]:
    return [post.id for post in posts]


def message_of(read, folder, error=ValueError, **settings) -> str:
    with pytest.raises(error) as raised:
        read(folder, **settings)
    return str(raised.value)


# UPMC Food-101


def test_food_pages_are_cleaned_as_by_the_release_and_pictures_without_one_left_out(tmp_path):
    splits = read_food101(make_food101(tmp_path), val=0)
    assert list(splits) == ["train", "test"]
    train = splits["train"]
    assert train.class_names == DISHES
    assert train.labels.bincount().tolist() == [8, 7, 8]
    assert train.dropped == {"no text": ["baklava_7"], "no image": []}
    texts = {post.id: post.text for post in train}
    assert texts["apple_pie_0"] == "the best apple pie 0"
    assert texts["cheese_plate_7-7"] == "crème pie it s b good b"
    assert train[0].image == tmp_path / "images" / "train" / "apple_pie" / "apple_pie_0.jpg"


def test_food_titles(tmp_path):
    folder = make_food101(tmp_path, pages=False)
    splits = read_food101(folder, val=0)
    assert splits["test"][0].text == "my apple pie a recipe pinterest"
    assert [len(posts) for posts in splits.values()] == [24, 12]
    (folder / "texts").rename(folder / "text")  # as MoPE's release has it
    (folder / "images" / "train" / "baklava" / "extra_1.jpg").write_bytes(b"")
    train = read_food101(folder, val=0)["train"]
    assert train.dropped["no text"] == ["extra_1"]


def test_food_val_is_held_out_of_each_class_and_the_same_by_the_same_seed(tmp_path):
    folder = make_food101(tmp_path)
    first, again, other = (read_food101(folder, val=6, seed=seed) for seed in (0, 0, 1))
    assert list(first) == ["train", "val", "test"]
    assert first["val"].labels.bincount().tolist() == [2, 2, 2]
    assert not set(ids(first["train"])) & set(ids(first["val"]))
    assert len(first["train"]) == 17
    assert first["train"].dropped["no text"] == ["baklava_7"]
    assert ids(first["val"]) == ids(again["val"]) != ids(other["val"])
    assert "val=5000 can't be held out of 23 samples" in message_of(read_food101, folder)
    assert "val must be >= 0, got -1" in message_of(read_food101, folder, val=-1)


def test_food_problems_come_in_one_error(tmp_path):
    folder = make_food101(tmp_path, pages=False)
    with open(folder / "texts" / "train_titles.csv", "a") as file:
        file.write("apple_pie_0.jpg,again,apple_pie\n../../x.jpg,t,apple_pie\nno,columns\ny_1.jpg,t,sushi\n")
    (folder / "images" / "test" / "baklava" / "baklava_8.jpg").unlink()
    message = message_of(read_food101, folder, val=0)
    assert message.startswith(f"5 problems in {folder}:\n")
    assert "line 25: image apple_pie_0.jpg occurs twice" in message
    assert len(re.findall(r"line 2[678]: expected image, title, class", message)) == 3
    assert "test_titles.csv, line 5: its image is missing" in message
    assert "images/test/baklava/baklava_8.jpg" in message


def test_food_missing_pictures_of_titles(tmp_path):
    folder = make_food101(tmp_path, pages=False)
    (folder / "images" / "test" / "baklava" / "baklava_8.jpg").unlink()
    assert read_food101(folder, val=0, missing_images="skip")["test"].dropped["no image"] == ["baklava_8"]
    assert read_food101(folder, val=0, missing_images="grey")["test"][4].open_image().size == (256, 256)


# MM-IMDB


def test_movies_have_their_longest_plot_and_several_genres(tmp_path):
    splits = read_mm_imdb(make_mm_imdb(tmp_path))
    assert list(splits) == ["train", "val", "test"]
    train = splits["train"]
    assert len(train.class_names) == 23
    assert train.class_names[:3] == ("Drama", "Family", "Comedy")
    chosen = [[name for name, there in zip(train.class_names, post.label, strict=True) if there] for post in train]
    assert chosen == [["Drama"], ["Comedy", "Romance"], ["Drama", "War"]]
    assert train.texts[:2] == [f"the longest plot of {post}: café" for post in ("0100001", "0100002")]
    assert train[1].open_image().mode == "RGB"


def test_television_other_genres_and_empty_plots_are_left_out(tmp_path):
    splits = read_mm_imdb(make_mm_imdb(tmp_path))
    television, other, plot = "News, Reality-TV or Talk-Show", "a genre of no class", "no plot"
    assert splits["train"].dropped == {television: ["0100004"], other: ["0100005"], plot: ["0100006"], "no image": []}
    assert splits["val"].dropped[television] == ["0100008"]
    assert splits["test"].dropped[television] == ["0100011"]


def test_problems_of_movies_come_in_one_error(tmp_path):
    folder = make_mm_imdb(tmp_path)
    split = json.loads((folder / "split.json").read_text())
    split["dev"] += ["0100001", "../secret", "0999999"]
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "dataset" / "0100002.json").write_text('{"plot": "no list", "genres": ["Drama"]}')
    (folder / "dataset" / "0100003.jpeg").unlink()
    message = message_of(read_mm_imdb, folder)
    assert message.startswith("5 problems in")
    for expected in (
        "id '0100001' occurs twice", "id '../secret' is no id", "0999999.json does not exist",
        "0100002.json: field 'plot': expected a list of strings, got 'no list'", "0100003.json: its image is missing",
    ):  # fmt: skip
        assert expected in message
    (folder / "split.json").write_text('{"train": []}')
    assert "split.json: lacks 'dev'; it has ['train']" in message_of(read_mm_imdb, folder)


@pytest.mark.parametrize("caffe", [True, False])
def test_posters_and_words_of_the_authors_hdf5(tmp_path, caffe):
    splits = read_mm_imdb(make_mm_imdb_hdf5(tmp_path, caffe))
    assert {name: posts.texts for name, posts in splits.items()} == {
        "train": ["a story of love .", "war N"], "val": ["a war"], "test": ["love"],
    }  # fmt: skip
    train = splits["train"]
    assert train.class_names[0] == "Drama"
    assert train.class_names[1] == "Family"
    assert [[name for name, there in zip(train.class_names, post.label, strict=True) if there] for post in train] == [
        ["Drama", "Romance"], ["Comedy"],
    ]  # fmt: skip
    image = train[0].open_image()
    assert image.size == (160, 256)
    for place, color in {(10, 100): (200, 0, 10), (150, 100): (0, 0, 10)}.items():
        assert np.abs(np.array(image.getpixel(place)) - color).max() <= 1
    pickle.loads(pickle.dumps(train[0]))  # a DataLoader's workers get it


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("where", ["in the dict", "in its place"])
def test_nothing_that_metadata_names_is_called(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    metadata = np.empty((), object)
    metadata[()] = {"ix_to_word": {0: Harmful()}} if where == "in the dict" else Harmful()
    folder = make_mm_imdb_hdf5(tmp_path / "set", metadata=metadata)
    message = message_of(read_mm_imdb, folder)
    assert "metadata.npy can't be read as plain data (UnpicklingError: it names posix.mkdir" in message
    assert not (tmp_path / "harm").exists()


def test_other_files_by_the_name_of_the_hdf5(tmp_path):
    import h5py

    folder = make_mm_imdb_hdf5(tmp_path)
    with h5py.File(folder / "multimodal_imdb.hdf5", "a") as file:
        del file["genres"]
    assert "is not as make_dataset.py of MM-IMDB's authors writes it" in message_of(read_mm_imdb, folder)
    (folder / "multimodal_imdb.hdf5").write_bytes(b"none")
    assert "can't be read as HDF5" in message_of(read_mm_imdb, folder, OSError)
    np.save(folder / "metadata.npy", np.arange(3))
    assert "metadata.npy has int64 (3,), expected one object" in message_of(read_mm_imdb, folder)
    (folder / "metadata.npy").unlink()
    assert "it has the vocabulary of multimodal_imdb.hdf5" in message_of(read_mm_imdb, folder, FileNotFoundError)


# SNLI-VE


def test_hypotheses_with_pictures_and_no_line_without_a_gold_label(tmp_path):
    splits = read_snli_ve(make_snli_ve(tmp_path))
    assert {name: len(posts) for name, posts in splits.items()} == {"train": 8, "val": 3, "test": 3}
    train = splits["train"]
    assert train.class_names == ("contradiction", "entailment", "neutral")
    assert train.labels[:3].tolist() == [1, 2, 0]
    assert train[0].text == "Two women hug, 0 — ümlaut."
    assert train[0].image.name == "4705552913.jpg"
    assert train[0].image == train[1].image
    assert train[0].id == "4705552913.jpg#2r1e"
    assert train.dropped == {"no gold label": ["4705552915.jpg#2r1-"], "no image": []}


def test_flickr30k_may_be_elsewhere(tmp_path):
    folder = make_snli_ve(tmp_path / "set")
    (folder / "Flickr30K" / "flickr30k_images").rename(tmp_path / "pictures")
    assert "flickr30k_images does not exist" in message_of(read_snli_ve, folder, FileNotFoundError)
    for images in (tmp_path / "pictures", "../pictures"):
        assert read_snli_ve(folder, images=images)["test"][0].open_image().size == (40, 30)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"cut', "not JSON"),
        ({"gold_label": "maybe"}, "field 'gold_label': expected one of"),
        ({"Flickr30K_ID": "../1"}, "field 'Flickr30K_ID': expected digits, got '../1'"),
        ({"Flickr30K_ID": 1}, "field 'Flickr30K_ID': expected a string, got 1"),
        ({"sentence2": "\ud800"}, "field 'sentence2' is not UTF-8"),
        ({"Flickr30K_ID": "7"}, "its image is missing"),
    ],
    ids=range(6),
)
def test_broken_lines_of_snli_ve(tmp_path, line, expected):
    folder = make_snli_ve(tmp_path)
    file = folder / "snli_ve_dev.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    broken = line if isinstance(line, str) else json.dumps({**row, **line})
    file.write_text(file.read_text() + broken + "\n")
    assert f"1 problem in {folder}:\n{file}, line 5: {expected}" in message_of(read_snli_ve, folder)


# MUStARD


@pytest.mark.parametrize("split", ["speaker-dependent", "speaker-independent"])
def test_both_splits_of_mustard_are_334_and_356(tmp_path, split):
    folder = make_mustard(tmp_path)
    splits = read_mustard(folder, split=split, val=0, missing_media="none")
    assert {name: len(posts) for name, posts in splits.items()} == {"train": 334, "test": 356}
    rows = json.loads((folder / "sarcasm_data.json").read_text())
    shows = {name: {rows[post.id]["show"] for post in posts} for name, posts in splits.items()}
    if split == "speaker-independent":
        assert shows["test"] == {"FRIENDS"}
        assert "FRIENDS" not in shows["train"]
    else:
        assert ids(splits["train"]) == list(rows)[:334]
        assert shows["train"] == {"BBT", "FRIENDS"}
    held_out = read_mustard(folder, split=split, missing_media="none")
    assert {name: len(posts) for name, posts in held_out.items()} == {"train": 300, "val": 34, "test": 356}


def test_utterances_have_speaker_sound_and_frames_at_even_distances(tmp_path):
    folder = make_mustard(tmp_path, frames=20, media=range(330, 335, 4))
    splits = read_mustard(folder, missing_media="skip", val=0, num_frames=4)
    (post,) = splits["train"]
    assert post.text == "SHELDON: It's just a privilege to watch your mind at work, 330."
    assert splits["train"].class_names[post.label] == "sarcastic"
    assert post.image is None
    assert post.open_audio().dtype == np.float32
    assert [frame.stem for frame in post.frames] == ["00003", "00008", "00013", "00018"]
    assert len(post.open_frames()) == 4


def test_missing_media_of_mustard(tmp_path):
    folder = make_mustard(tmp_path, utterances=10, media=range(10))
    (folder / "utterances_final" / "1_60.wav").unlink()
    message = message_of(read_mustard, folder, val=0)
    assert "1 problem in" in message
    assert f"'1_60': no sound, {folder / 'utterances_final' / '1_60.wav'} does not exist; missing_media='skip' leaves" in message
    train = read_mustard(folder, split="speaker-independent", val=0, missing_media="skip")["train"]
    assert train.dropped == {"no sound": ["1_60"], "no frames": []}
    post = read_mustard(folder, split="speaker-independent", val=0, missing_media="none")["train"][0]
    assert (post.audio, post.open_audio(), len(post.frames)) == (None, None, 8)


def test_broken_utterances(tmp_path):
    folder = make_mustard(tmp_path, utterances=10, media=range(10))
    rows = json.loads((folder / "sarcasm_data.json").read_text())
    rows["../x"] = rows["1_60"]
    rows["1_60"] = {**rows["1_60"], "sarcasm": "no"}
    rows["1_70"] = 5
    (folder / "sarcasm_data.json").write_text(json.dumps(rows))
    message = message_of(read_mustard, folder)
    assert message.startswith("3 problems in")
    for expected in ("'../x': the id must be", "'1_60': field 'sarcasm': expected true or false", "'1_70': expected an object"):
        assert expected in message


# Hateful Memes


def test_memes_seen_and_unseen(tmp_path):
    folder = make_hateful_memes(tmp_path)
    seen, unseen = (read_hateful_memes(folder, part=part) for part in ("seen", "unseen"))
    assert [len(posts) for posts in seen.values()] == [8, 4, 4]
    assert [len(posts) for posts in unseen.values()] == [8, 5, 6]
    assert seen["train"].class_names == ("not hateful", "hateful")
    assert seen["train"].labels.tolist() == [0, 1] * 4
    assert seen["train"][0].image.name == f"{int(seen['train'][0].id):05}.png"


def test_tests_without_labels_and_the_first_release(tmp_path):
    folder = make_hateful_memes(tmp_path, labelled_tests=False)
    for name in ("dev", "test"):
        (folder / f"{name}_unseen.jsonl").unlink()
        (folder / f"{name}_seen.jsonl").rename(folder / f"{name}.jsonl")
    splits = read_hateful_memes(folder)
    assert (splits["val"].labelled, splits["test"].labelled) == (True, False)
    assert "dev_unseen.jsonl does not exist" in message_of(read_hateful_memes, folder, FileNotFoundError, part="unseen")
    (folder / "test.jsonl").unlink()
    assert list(read_hateful_memes(folder)) == ["train", "val"]
    lines = (folder / "train.jsonl").read_text().splitlines()
    rows = [
        {**json.loads(line), **change} for line, change in zip(lines, [{"label": None}, {"label": 2}, {"id": None}], strict=False)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = message_of(read_hateful_memes, folder)
    assert message.startswith("3 problems in")
    assert "line 1: has no label" in message
    assert "line 2: field 'label': expected 0 or 1, got 2" in message
    assert "line 3: field 'id': expected a number or a string, got None" in message


# all of them


@pytest.mark.parametrize("name", MAKE)
def test_a_folder_of_another_set_says_which_it_looks_like(tmp_path, name):
    folder = MAKE[name](tmp_path / "set")
    for other, published in PUBLISHED_SETS.items():
        if other != name:
            message = message_of(published.read, folder, FileNotFoundError)
            assert message.startswith(f"{folder} is not {published.title}, which has ")
            assert message.endswith(f": it looks like {PUBLISHED_SETS[name].title}")
    (tmp_path / "empty").mkdir()
    assert "looks like" not in message_of(PUBLISHED_SETS[name].read, tmp_path / "empty", FileNotFoundError)
    assert "is not a folder" in message_of(PUBLISHED_SETS[name].read, tmp_path / "none", FileNotFoundError)


@pytest.mark.parametrize("name", MAKE)
def test_no_picture_is_opened(tmp_path, name, monkeypatch):
    folder = MAKE[name](tmp_path)
    monkeypatch.setattr("PIL.Image.open", lambda *args, **settings: pytest.fail("opened"))
    assert PUBLISHED_SETS[name].read(folder, **SETTINGS.get(name, {}))


@pytest.mark.parametrize("name", ["food101", "mm-imdb", "snli-ve", "hateful-memes"])
def test_a_link_that_leads_out_of_the_set_is_refused(tmp_path, name):
    read, settings = PUBLISHED_SETS[name].read, SETTINGS.get(name, {})
    folder = MAKE[name](tmp_path / "set")
    image = read(folder, **settings)["test"][0].image
    image.rename(tmp_path / "elsewhere")
    image.symlink_to(tmp_path / "elsewhere")
    assert f"outside of {folder}" in message_of(read, folder, **settings)
    assert read(folder, outside=[tmp_path], **settings)["test"][0].open_image().size == (40, 30)


def test_differences_of_counts_are_named(tmp_path):
    splits = read_mustard(make_mustard(tmp_path / "whole"), missing_media="none")
    assert compare_counts("mustard", splits) == []
    part = read_mustard(make_mustard(tmp_path / "part", utterances=600), missing_media="none")
    assert compare_counts("mustard", part) == [
        "test: 266 samples are here, 356 by the authors and MoPE's release", "all: 600 samples are here, 690 by the authors",
    ]  # fmt: skip
    # those left out are counted: the published counts are of the whole set
    skipped = read_mustard(make_mustard(tmp_path / "whole", media=range(0, 690, 50), frames=1), missing_media="skip", val=0)
    assert compare_counts("mustard", skipped) == []
    with pytest.raises(ValueError, match=r"name must be one of \['food101'"):
        compare_counts("imagenet", splits)


def test_published_counts_of_parts_add_up():
    for name, published in PUBLISHED_SETS.items():
        parts = [part for part in published.counts if part]
        if name != "food101" and () in published.counts:
            assert sum(next(iter(published.counts[part].values())) for part in parts) in published.counts[()].values()
