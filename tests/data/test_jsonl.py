"""Folders of JSON lines: what is read, and one message for all that is wrong."""

import difflib
import json
import os

import pytest
import torch
from PIL import Image

from mope_fast.data import read_jsonl_folder

NAMES = "pizza\nsushi \n waffle\n\n"


def line(number, label="pizza", **fields):
    row = {"id": number, "text": f"text {number}", "img": f"images/a/{number}.png", "label": label}
    return json.dumps({**row, **fields})


def write(root, labels=NAMES, images=range(20), **splits):
    """A folder of these lines; a split of None is left out."""
    (root / "images" / "a").mkdir(parents=True, exist_ok=True)
    for i in images:
        Image.new("RGB", (4, 4), (i, 0, 0)).save(root / "images" / "a" / f"{i}.png")
    (root / "labels.txt").write_text(labels)
    defaults = {"train": [line(1), line(2, "waffle")], "val": [line(3, "sushi")], "test": [line(4)]}
    for split, lines in {**defaults, **splits}.items():
        if lines is not None:
            (root / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def message_of(root, error=ValueError, **settings):
    with pytest.raises(error) as raised:
        read_jsonl_folder(root, **settings)
    return str(raised.value)


def test_samples_are_read_as_they_stand(tmp_path):
    root = write(
        tmp_path,
        train=["\ufeff" + line(1), "", line("b", "waffle", text="ü\n", img="images/a/2.png", more=[1]), line(2, " sushi ")],
    )
    splits = read_jsonl_folder(str(root))
    assert list(splits) == ["train", "val", "test"]
    train = splits["train"]
    assert [(post.id, post.text, post.label) for post in train] == [("1", "text 1", 0), ("b", "ü\n", 2), ("2", "text 2", 1)]
    assert {split.class_names for split in splits.values()} == {("pizza", "sushi", "waffle")}
    assert train[0].image == root / "images" / "a" / "1.png"
    assert train[0].open_image().getpixel((0, 0)) == (1, 0, 0)
    assert not train.multi_label


def test_windows_line_ends(tmp_path):
    root = write(tmp_path, labels=NAMES.replace("\n", "\r\n"))
    (root / "train.jsonl").write_bytes(f"{line(1)}\r\n{line(2, 'waffle')}\r\n".encode())
    assert read_jsonl_folder(root)["train"].labels.tolist() == [0, 2]


def test_lists_of_labels_make_a_multi_label_set(tmp_path):
    root = write(tmp_path, train=[line(1, ["sushi", "pizza"]), line(2, []), line(3, ["waffle"])], val=None, test=None)
    train = read_jsonl_folder(root, ["train"])["train"]
    assert train.multi_label
    assert torch.equal(train.labels, torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]]))
    assert repr(train) == "Posts(3; pizza: 1, sushi: 1, waffle: 1)"


def test_samples_of_the_same_classes_share_memory(tmp_path):
    root = write(tmp_path, train=[line(1, ["sushi"]), line(2, ["sushi"])])
    train = read_jsonl_folder(root, ["train"])["train"]
    assert train[0].label is train[1].label


def test_dev_stands_in_for_val(tmp_path):
    root = write(tmp_path, val=None, dev=[line(5, "waffle")])
    assert read_jsonl_folder(root)["val"].labels.tolist() == [2]
    assert "val.jsonl is not there" in message_of(write(tmp_path / "other", val=None), FileNotFoundError)


@pytest.mark.parametrize(
    "img",
    [
        None,
        "",
        "images/a/gone.png",
        "no/such/folder/1.png",
        "images/a",
        "images/",
        ".",
        "images/dangling.png",
        "a" * 300 + "/1.png",
        "nul\0l/1.png",
    ],
    ids=range(10),
)
def test_missing_images(tmp_path, img):
    root = write(tmp_path, train=[line(1), line(2, img=img)])
    (root / "images" / "dangling.png").symlink_to(root / "nothing.png")
    message = message_of(root)
    assert "1 problem in" in message
    assert 'train.jsonl:\nline 2: field "img": ' in message
    assert 'missing_images="skip"' in message
    skipped = read_jsonl_folder(root, missing_images="skip")["train"]
    assert len(skipped) == 1
    assert skipped.dropped == {"no image": ("2",)}
    grey = read_jsonl_folder(root, missing_images="grey")["train"]
    assert grey[1].image is None
    picture = grey[1].open_image()
    assert picture.size == (256, 256)
    assert picture.getcolors() == [(256 * 256, (128, 128, 128))]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ('{"id": 1, "text": ', "not JSON"),
        ("[1, 2]", "expected an object with id, text, img and label"),
        (line(2, "piza"), """field "label": 'piza' is not in labels.txt; is it 'pizza'?"""),
        (line(2, "xyz"), """field "label": 'xyz' is not in labels.txt"""),
        (line(2, ["pizza"]), """field "label": expected one name as above, got ['pizza']"""),
        (line(2, 3), 'field "label": expected a name or a list of names, got 3'),
        (line(2, None), 'field "label": expected a name or a list of names, got None'),
        (line(2, text=None), 'field "text": expected a text, got None'),
        (line(2, text="\ud800"), 'field "text" is not UTF-8'),
        (line(True), 'field "id": expected a text or an integer, got True'),
        (line(2, img=7), 'field "img": expected a path or null, got 7'),
        (json.dumps({"id": 1, "sentence": "a"}), "lacks 'text', 'label'; it has ['id', 'sentence']"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_broken_line_is_named_with_its_field(tmp_path, bad, expected):
    message = message_of(write(tmp_path, train=[line(1), "", bad]))
    assert f"1 problem in {tmp_path / 'train.jsonl'}:\nline 3: {expected}" in message
    assert len(message) < 600


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    root = write(tmp_path)
    (root / "train.jsonl").write_bytes(line(1, text="caf?").replace("?", "\xe9").encode("latin-1"))
    assert 'line 1: field "text" is not UTF-8' in message_of(root)


def test_all_problems_of_a_file_come_in_one_message(tmp_path):
    message = message_of(write(tmp_path, train=[line(1), *(line(2, "piza") for _ in range(12))]))
    assert message.startswith("12 problems in")
    assert message.count("'piza'") == 10
    assert message.endswith("... and 2 more")


def test_an_empty_split_is_an_error(tmp_path):
    assert message_of(write(tmp_path, val=[])).endswith("val.jsonl has no sample: the file is empty")
    root = write(tmp_path / "other", val=[line(5, img=None)])
    assert message_of(root, missing_images="skip").endswith("val.jsonl has no sample: all 1 have no image")


def test_splits_of_different_kinds_are_an_error(tmp_path):
    message = message_of(write(tmp_path, val=[line(3, ["sushi"])]))
    assert "label is a list in ['val'] and one name in the other splits" in message


@pytest.mark.parametrize(
    ("labels", "expected"),
    [("a\nb\na\n", "has ['a'] more than once"), ("a\n", "at least two classes"), ("", "at least two classes")],
)
def test_labels_file(tmp_path, labels, expected):
    assert expected in message_of(write(tmp_path, labels=labels))


def test_labels_that_are_not_utf8_are_named(tmp_path):
    (write(tmp_path) / "labels.txt").write_bytes("pizza\ncafé\n".encode("latin-1"))
    assert f"1 problem in {tmp_path / 'labels.txt'}:\nline 2: not UTF-8" in message_of(tmp_path)


def test_accents_are_the_same_however_they_are_written(tmp_path):
    root = write(tmp_path, labels="cafe\u0301\npizza\n", train=[line(1, "caf\u00e9")], val=[line(2)], test=[line(3)])
    assert read_jsonl_folder(root)["train"].labels.tolist() == [0]


def test_a_file_full_of_mistakes_is_told_quickly(tmp_path, monkeypatch):
    calls, near = [], difflib.get_close_matches
    monkeypatch.setattr(difflib, "get_close_matches", lambda *arguments: calls.append(1) or near(*arguments))
    message_of(write(tmp_path, train=[line(2, "piza") for _ in range(500)]))
    assert len(calls) == 10


def test_missing_files_are_named(tmp_path):
    root = write(tmp_path, test=None)
    assert "test.jsonl is not there: expected a line {" in message_of(root, FileNotFoundError)
    assert list(read_jsonl_folder(root, ["train", "val"])) == ["train", "val"]
    os.remove(root / "labels.txt")
    assert "labels.txt is not there: write the name of each class" in message_of(root, FileNotFoundError)


def test_unknown_setting(tmp_path):
    with pytest.raises(TypeError, match=r"splits must be a list of names, got 'train': give \['train'\]"):
        read_jsonl_folder(tmp_path, "train")
    assert "missing_images must be one of ('error', 'skip', 'grey'), got 'gray'" in message_of(tmp_path, missing_images="gray")


def test_an_unreadable_image_is_named_when_it_is_opened(tmp_path):
    root = write(tmp_path)
    (root / "images" / "a" / "2.png").write_bytes((root / "images" / "a" / "2.png").read_bytes()[:40])
    with pytest.raises(OSError, match=r"the image of post 2 can't be read: .*2\.png"):
        read_jsonl_folder(root)["train"][1].open_image()
