"""Folders of JSON lines: what is read, and one message for all that is wrong."""

import difflib
import json
import os
import unicodedata

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
    assert "val.jsonl does not exist" in message_of(write(tmp_path / "other", val=None), FileNotFoundError)


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
        "a/" * 1900 + "1.png",
        "nul\0l/1.png",
    ],
    ids=range(11),
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
        (line(2, "piza"), """field "label": 'piza' is not in labels.txt; did you mean 'pizza'?"""),
        (line(2, "xyz"), """field "label": 'xyz' is not in labels.txt"""),
        (line(2, ["pizza"]), """field "label": expected one name as above, got ['pizza']"""),
        (line(2, 3), 'field "label": 3 is not a line number of labels.txt, 0 to 2'),
        (line(2, -1), 'field "label": -1 is not a line number of labels.txt'),
        (line(2, 1.0), 'field "label": expected a name, a list of names or null, got 1.0'),
        (line(2, True), 'field "label": expected a name, a list of names or null, got True'),
        (line(2, None), "has no label, line 1 has one: label all lines, or none"),
        (line(2, text=None), 'field "text": expected a string, got None'),
        (line(2, text="\ud800"), 'field "text" is not UTF-8'),
        (line(True), 'field "id": expected a string or an integer, got True'),
        (line(2, img=7), 'field "img": expected a path or null, got 7'),
        (json.dumps({"id": 1, "sentence": "a"}), "lacks 'text'; it has ['id', 'sentence']"),
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
    assert "test.jsonl does not exist: expected a line {" in message_of(root, FileNotFoundError, splits=["train", "val", "test"])
    assert list(read_jsonl_folder(root)) == ["train", "val"]
    os.remove(root / "labels.txt")
    assert "labels.txt does not exist: write the name of each class" in message_of(root, FileNotFoundError)


def test_unknown_setting(tmp_path):
    with pytest.raises(TypeError, match=r"splits must be a list of names, got 'train': give \['train'\]"):
        read_jsonl_folder(tmp_path, "train")
    assert "missing_images must be one of ('error', 'skip', 'grey'), got 'gray'" in message_of(tmp_path, missing_images="gray")
    assert "outside must be a list of folders, got '/data': give ['/data']" in message_of(tmp_path, TypeError, outside="/data")


def test_an_unreadable_image_is_named_when_it_is_opened(tmp_path):
    root = write(tmp_path)
    (root / "images" / "a" / "2.png").write_bytes((root / "images" / "a" / "2.png").read_bytes()[:40])
    with pytest.raises(OSError, match=r"the image of post 2 can't be read: .*2\.png"):
        read_jsonl_folder(root)["train"][1].open_image()


def test_a_split_without_labels_is_there_to_be_predicted(tmp_path):
    unlabelled = [json.dumps({k: v for k, v in json.loads(line(i)).items() if k != "label"}) for i in (1, 2)]
    splits = read_jsonl_folder(write(tmp_path, test=[*unlabelled, line(3, None)]))
    test = splits["test"]
    assert [post.label for post in test] == [None] * 3
    assert (test.labelled, splits["val"].labelled) == (False, True)
    assert repr(test) == "Posts(3; no labels)"
    with pytest.raises(ValueError, match=r"these posts have no labels \(labelled is False\)"):
        _ = test.labels
    assert repr(test[1:]) == "Posts(2; no labels)"


def test_lines_that_lack_the_label_of_others_are_named(tmp_path):
    message = message_of(write(tmp_path, train=[line(1, None), line(2), line(3, None)]))
    assert message.splitlines()[1:] == [
        f"line {number}: has no label, line 2 has one: label all lines, or none" for number in (1, 3)
    ]


def test_a_split_without_labels_goes_with_lists(tmp_path):
    splits = read_jsonl_folder(write(tmp_path, train=[line(1, ["pizza"])], val=[line(2, [])], test=[line(3, None)]))
    assert [splits[name].multi_label for name in splits] == [True, True, False]


def test_integers_count_the_lines_of_names(tmp_path):
    root = write(tmp_path, train=[line(1, 2), line(2, 0)], val=[line(3, 1)], test=[line(4, "pizza")])
    splits = read_jsonl_folder(root)
    assert [splits[name].labels.tolist() for name in splits] == [[2, 0], [1], [0]]
    root = write(tmp_path / "lists", train=[line(1, [2, 0]), line(2, [])], val=[line(3, [1])], test=[line(4, [])])
    assert read_jsonl_folder(root)["train"].labels.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_integers_that_may_count_from_one_are_refused(tmp_path):
    root = write(tmp_path, train=[line(1, 1), line(2, 2)], val=[line(3, 1)], test=[line(4, 2)])
    message = message_of(root)
    assert "labels are numbers, 1 to 2, and no sample of ['train', 'val', 'test'] has 0" in message
    assert "if your labels count from 1, replace them by names" in message


def test_integers_are_names_where_names_are_numbers(tmp_path):
    root = write(tmp_path, labels="1\n2\n5\n", train=[line(1, 5), line(2, "1")], val=[line(3, 2)], test=[line(4, 1)])
    assert read_jsonl_folder(root)["train"].labels.tolist() == [2, 0]
    for labels in ("1\n2\n5\n", "0.0\n3.0\nx\n", "03\n04\n05\n"):
        root = write(tmp_path, labels=labels, train=[line(1, 3)], val=[line(3, 3)], test=None)
        assert """line 1: field "label": '3' is not in labels.txt""" in message_of(root)


@pytest.mark.parametrize("label", [[0, 1, 0], [1, 1], [True, False]])
def test_zeros_and_ones_are_no_lists_of_classes(tmp_path, label):
    message = message_of(write(tmp_path, labels="a\nb\n" if len(label) == 2 else NAMES, train=[line(1, label)]))
    assert f'field "label": {label} looks like 0 or 1 for each class: expected the names of the classes' in message


def test_two_integers_of_two_classes_are_no_list_of_classes(tmp_path):
    assert "looks like 0 or 1 for each class" in message_of(write(tmp_path, labels="a\nb\n", train=[line(1, [1, 0])]))


# images outside


@pytest.fixture
def elsewhere(tmp_path):
    """A picture that is none of the data set's, next to its folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Image.new("RGB", (4, 4), (99, 0, 0)).save(folder / "1.png")
    return folder


OUTSIDE = {
    "parent": lambda root, elsewhere: "../elsewhere/1.png",
    "parent later": lambda root, elsewhere: "images/a/../../../elsewhere/1.png",
    "absolute": lambda root, elsewhere: str(elsewhere / "1.png"),
    "link to a file": lambda root, elsewhere: (root / "images" / "x.png").symlink_to(elsewhere / "1.png") or "images/x.png",
    "link to a folder": lambda root, elsewhere: (root / "more").symlink_to(elsewhere) or "more/1.png",
    "link in between": lambda root, elsewhere: (root / "up").symlink_to(elsewhere.parent) or "up/elsewhere/1.png",
    "too long": lambda root, elsewhere: f"{elsewhere}/{'a' * 300}/1.png",
    "windows": lambda root, elsewhere: "..\\elsewhere\\1.png",
}


@pytest.mark.parametrize("way", OUTSIDE)
def test_an_image_outside_of_the_folder_is_refused(tmp_path, elsewhere, way):
    root = write(tmp_path / "set")
    img = OUTSIDE[way](root, elsewhere)
    write(root, train=[line(1), line(2, img=img)])
    message = message_of(root)
    assert message == message_of(root, missing_images="skip") == message_of(root, missing_images="grey")
    assert message.startswith(f'1 problem in {root / "train.jsonl"}:\nline 2: field "img": ')
    assert f", outside of {root}: if it belongs to the data, pass outside=[" in message
    assert str(elsewhere if way != "link in between" else tmp_path) in message.split("outside=[")[1]
    for allowed in () if way == "too long" else (elsewhere, tmp_path):
        image = read_jsonl_folder(root, outside=[allowed])["train"][1].open_image()
        assert image.getpixel((0, 0)) == (99, 0, 0)


def test_a_path_of_another_machine_never_leads_to_the_whole_disk(tmp_path):
    message = message_of(write(tmp_path / "set", train=[line(1, img="/not-here/a.png")]))
    assert message.endswith("pass outside=['/not-here']")


def test_what_the_message_says_lets_linked_images_in(tmp_path):
    root = write(tmp_path / "set")
    (root / "images").rename(tmp_path / "disk")
    (root / "images").symlink_to(tmp_path / "disk")
    message = message_of(root)
    assert "2 problems in" in message
    (way_out,) = {text.split("]")[0] for text in message.split("outside=")[1:]}
    assert way_out == f"[{str(tmp_path / 'disk')!r}"
    train = read_jsonl_folder(root, outside=[tmp_path / "disk"])["train"]
    assert train[0].image == root / "images" / "a" / "1.png"


def test_links_and_parents_that_stay_inside_are_as_good_as_files(tmp_path):
    root = write(tmp_path / "set")
    (tmp_path / "link").symlink_to(root)
    (root / "b").symlink_to(root / "images" / "a")
    (root / "images" / "c.png").symlink_to("a/7.png")
    imgs = ["b/7.png", "images/c.png", "images/../b/7.png", "./images//a/7.png", "images\\a\\7.png", str(root / "b" / "7.png")]
    write(root, train=[line(1, img=img) for img in imgs])
    for folder in (root, tmp_path / "link"):
        assert {post.open_image().getpixel((0, 0)) for post in read_jsonl_folder(folder)["train"]} == {(7, 0, 0)}


@pytest.mark.parametrize("name", ["labels.txt", "train.jsonl"])
def test_the_sets_own_files_are_not_outside_either(tmp_path, name):
    root = write(tmp_path / "set")
    (root / name).rename(tmp_path / name)
    (root / name).symlink_to(tmp_path / name)
    assert f"{root / name} is {tmp_path / name}, outside of {root}" in message_of(root)
    assert len(read_jsonl_folder(root, outside=[tmp_path])["train"]) == 2


def test_files_are_listed_and_not_looked_at_one_by_one(tmp_path, monkeypatch):
    root = write(tmp_path, train=[line(i) for i in range(20)] * 20)
    calls = []

    def count(call):
        return lambda *arguments, **settings: calls.append(call) or call(*arguments, **settings)

    for name in ("stat", "lstat", "scandir"):
        monkeypatch.setattr(os, name, count(getattr(os, name)))
    assert len(read_jsonl_folder(root)["train"]) == 400
    assert len(calls) < 100


def test_a_folder_that_cannot_be_listed_is_no_folder_without_images(tmp_path, monkeypatch):
    def refuse(folder):
        if str(folder).endswith("images/a"):
            raise PermissionError(13, "not yours", str(folder))
        return scandir(folder)

    scandir = os.scandir
    root = write(tmp_path)
    monkeypatch.setattr(os, "scandir", refuse)
    assert "not yours" in message_of(root, PermissionError, missing_images="skip")


def test_a_link_to_itself_is_missing_and_hides_no_other_file(tmp_path):
    root = write(tmp_path, train=[line(1), line(2, img="images/a/loop.png")])
    (root / "images" / "a" / "loop.png").symlink_to("loop.png")
    assert read_jsonl_folder(root, missing_images="skip")["train"].dropped == {"no image": ("2",)}


# names


@pytest.mark.parametrize(("written", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_file_names_in_either_form(tmp_path, written, on_disk):
    names = {form: unicodedata.normalize(form, "Köln/a/Café.png") for form in ("NFC", "NFD")}
    root = write(tmp_path, train=[line(1, img=names[written])])
    (root / names[on_disk]).parent.mkdir(parents=True)
    (root / "images" / "a" / "7.png").rename(root / names[on_disk])
    splits = {form: unicodedata.normalize(form, "fünf") for form in ("NFC", "NFD")}
    (root / "train.jsonl").rename(root / f"{splits[on_disk]}.jsonl")
    (post,) = read_jsonl_folder(root, [splits[written]])[splits[written]]
    assert post.open_image().getpixel((0, 0)) == (7, 0, 0)


def test_of_names_that_differ_in_accents_only_the_very_same_is_taken(tmp_path):
    forms = {form: unicodedata.normalize(form, "éé.png") for form in ("NFC", "NFD")}
    root = write(tmp_path, train=[line(1, img=f"images/a/{name}") for name in forms.values()])
    for number, name in zip((13, 14), forms.values(), strict=True):
        (root / "images" / "a" / f"{number}.png").rename(root / "images" / "a" / name)
    assert [post.open_image().getpixel((0, 0))[0] for post in read_jsonl_folder(root)["train"]] == [13, 14]
    write(root, train=[line(1, img="images/a/éé.png")])
    assert "which differ in how accents are written: rename one of them" in message_of(root)


def test_case_is_the_disks_matter(tmp_path, monkeypatch):
    root = write(tmp_path, train=[line(1, img="images/a/7.PNG")])
    assert "7.PNG does not exist" in message_of(root)
    isfile = os.path.isfile  # of a disk that ignores case
    monkeypatch.setattr(os.path, "isfile", lambda path: isfile(str(path).replace("PNG", "png")))
    assert read_jsonl_folder(root)["train"][0].open_image().getpixel((0, 0)) == (7, 0, 0)
