import sys
import time

import pytest
import torch
from published_sets import TWEETS, make_mvsa, make_twitter, save_image

from mope_fast.data import FewShotSplit, Post, Posts, read_mvsa_single, read_twitter_sarcasm


def problems(error) -> list[str]:
    return str(error.value).splitlines()


def test_twitter_train_leaves_out_what_tells_the_label(tmp_path):
    posts = read_twitter_sarcasm(make_twitter(tmp_path), "train")
    assert [post.id for post in posts] == ["840006160660983809", "725333760762363905", "725333760762363907"]
    assert posts.texts == ["<user> thanks for showing up today . ", "it 's \"great\" , isn't it", "an ironically nice day"]
    assert posts.class_names == ("not sarcastic", "sarcastic")
    assert posts.labels.dtype == torch.int64
    assert posts.labels.tolist() == [0, 1, 0]
    assert posts.dropped == {"tells the label": ["910308516510011393", "725333760762363906"], "no image": []}
    assert posts[0].image == tmp_path / "dataset_image" / "840006160660983809.jpg"
    assert repr(posts) == "Posts(3; not sarcastic: 2, sarcastic: 1; dropped, tells the label: 2; dropped, no image: 0)"


@pytest.mark.parametrize(("split", "labels"), [("valid", [0, 1]), ("test", [1, 0])])
def test_twitter_valid_and_test_take_the_annotators_label(tmp_path, split, labels):
    assert read_twitter_sarcasm(make_twitter(tmp_path, newline="\n"), split).labels.tolist() == labels


def test_twitter_images_may_be_elsewhere(tmp_path):
    folder = make_twitter(tmp_path / "set")
    elsewhere = (folder / "dataset_image").rename(tmp_path / "pictures")
    for images in (elsewhere, "../pictures"):
        assert read_twitter_sarcasm(folder, "test", images=images)[0].open_image().size == (40, 30)


@pytest.mark.parametrize("way", ["folder", "file"])
def test_a_link_out_of_the_set_is_refused(tmp_path, way):
    folder = make_twitter(tmp_path / "set")
    linked = folder / "dataset_image" / ("862902619928506372.jpg" if way == "file" else "")
    moved = linked.rename(tmp_path / "moved")
    linked.symlink_to(moved)
    with pytest.raises(ValueError, match=rf"line 1: .* is {moved}.*, outside of {folder}: .*outside=\['{tmp_path}") as error:
        read_twitter_sarcasm(folder, "test", missing_images="skip")
    assert len(problems(error)) == (2 if way == "file" else 3)
    assert len(read_twitter_sarcasm(folder, "test", outside=[tmp_path])) == 2
    if way == "folder":
        assert len(read_twitter_sarcasm(folder, "test", images=moved)) == 2


@pytest.mark.parametrize("name", ["3.txt", "3.jpg"])
def test_a_link_out_of_mvsa_is_refused(tmp_path, name):
    folder = make_mvsa(tmp_path / "set")
    moved = (folder / "data" / name).rename(tmp_path / name)
    (folder / "data" / name).symlink_to(moved)
    with pytest.raises(ValueError, match=rf"1 problem in .*\n.*line 4: .* is {moved}, outside of {folder}"):
        read_mvsa_single(folder)
    assert len(read_mvsa_single(folder, outside=[tmp_path])) == 5


def test_twitter_missing_images(tmp_path):
    folder = make_twitter(tmp_path)
    (folder / "dataset_image" / "862902619928506372.jpg").unlink()
    with pytest.raises(ValueError, match=r"line 1: its image is missing, .*862902619928506372.jpg; missing_images='skip' leaves"):
        read_twitter_sarcasm(folder, "test")
    posts = read_twitter_sarcasm(folder, "test", missing_images="skip")
    assert [post.id for post in posts] == ["892551658487631873"]
    assert posts.dropped["no image"] == ["862902619928506372"]
    (folder / "dataset_image" / "892551658487631873.jpg").unlink()
    with pytest.raises(ValueError, match="no post is left; dropped: tells the label: 0, no image: 2"):
        read_twitter_sarcasm(folder, "test", missing_images="skip")


BROKEN_TWEETS = [
    "['1', 'no label']",
    "['1', 'two labels', 1, 1]",
    "['1', 'label', 2]",
    "['1', 'label', True]",
    "['1', 'label', '1']",
    "[1, 'id', 1]",
    "['1', None, 1]",
    "('1', 'a tuple', 1)",
    "{'1': 0, 'a dict': 0, 1: 0}",
    "['../../x', 'id', 1]",
    "['..', 'id', 1]",
    "['\uff11', 'id', 1]",
    "['1\\n', 'id', 1]",
    "['', 'id', 1]",
    "['1', 'cut off",
    "5",
    "__import__('os').abort()",
    "{[]: 1}",
    "['1', 'null \0 byte', 1]",
    "['1', 'not utf-8 \udcff', 1]",
    "['1', 'half a pair \\ud800', 1]",
    f"['1', '{'long ' * 2000}', 1]",
    "[" * 9000,
    "-" * 9000 + "1",
    "1+" * 4000 + "1",
]


@pytest.mark.parametrize("line", BROKEN_TWEETS, ids=range(len(BROKEN_TWEETS)))
def test_twitter_broken_line(tmp_path, line):
    folder = make_twitter(tmp_path, {"train.txt": [TWEETS["train.txt"][1], "", line]})
    with pytest.raises(ValueError, match=r"1 problem in .*train.txt:\n.*train.txt, line 3: expected \[id of digits, text, label 0"):
        read_twitter_sarcasm(folder, "train")


def test_twitter_line_of_another_split(tmp_path):
    folder = make_twitter(tmp_path, {"valid2.txt": TWEETS["train.txt"][:1]})
    with pytest.raises(ValueError, match=r"expected \[id of digits, text, label 0 or 1, label 0 or 1\], got .\['910308516510"):
        read_twitter_sarcasm(folder, "valid")


def test_all_problems_are_counted_and_ten_shown(tmp_path):
    row = ["1", "text", 0]
    folder = make_twitter(tmp_path, {"train.txt": [row, row, "broken", *([str(i), "no image", 0] for i in range(2, 14))]})
    for i in range(2, 14):
        (folder / "dataset_image" / f"{i}.jpg").unlink()
    with pytest.raises(ValueError, match="14 problems") as error:
        read_twitter_sarcasm(folder, "train")
    _, *shown, last = problems(error)
    assert len(shown) == 10
    assert "line 2: id 1 occurs twice" in shown[0]
    assert "line 3: expected" in shown[1]
    assert "line 4: its image is missing" in shown[2]
    assert last == "... and 4 more"


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train.txt does not exist.*headacheboy/data-of-multimodal-sarcasm-detection"):
        read_twitter_sarcasm(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"labelResultAll.txt does not exist.*mcrlab.net"):
        read_mvsa_single(tmp_path)
    make_twitter(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"image folder does not exist: expected a folder with the images <id>.jpg of Cai"):
        read_twitter_sarcasm(tmp_path, "train", images="image folder", missing_images="skip")
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'valid', 'test'\), got 'dev'"):
        read_twitter_sarcasm(tmp_path, "dev")
    with pytest.raises(ValueError, match=r"missing_images must be one of .*, got 'ignore'"):
        read_twitter_sarcasm(tmp_path, "train", missing_images="ignore")


def test_empty_files(tmp_path):
    with pytest.raises(ValueError, match="no post is left"):
        read_twitter_sarcasm(make_twitter(tmp_path, {"train.txt": []}), "train")
    make_mvsa(tmp_path).joinpath("labelResultAll.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"line 1: expected MVSA-Single's header.*got ''"):
        read_mvsa_single(tmp_path)


def test_thirty_thousand_tweets_are_read_fast_and_no_image_is_opened(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "dataset_image").mkdir()
    rows = [[str(i), "some text # of usual length <num> emoji_92 " * 2, i % 2] for i in range(30_000)]
    (tmp_path / "text" / "train.txt").write_text("".join(f"{row!r}\n" for row in rows))
    for row in rows:
        (tmp_path / "dataset_image" / f"{row[0]}.jpg").touch()
    start = time.process_time()  # other programs don't count
    posts = read_twitter_sarcasm(tmp_path, "train")
    assert time.process_time() - start < 10
    assert len(posts) == 30_000


def test_mvsa_combines_sentiments(tmp_path):
    posts = read_mvsa_single(make_mvsa(tmp_path))
    assert posts.class_names == ("negative", "neutral", "positive")
    assert [(post.id, post.label) for post in posts] == [("1", 2), ("3", 0), ("4", 1), ("5", 2), ("7", 0)]
    assert posts.dropped == {"positive against negative": ["2", "6"], "no image": []}


def test_mvsa_texts_are_utf_8_or_windows_1252(tmp_path):
    assert read_mvsa_single(make_mvsa(tmp_path, newline="\n")).texts == ["Fun times! ☀", "café “closed” �", "meh", "", "no"]


def test_mvsa_missing_files(tmp_path):
    folder = make_mvsa(tmp_path)
    (folder / "data" / "1.jpg").unlink()
    (folder / "data" / "2.jpg").unlink()  # contradicts itself anyway
    with pytest.raises(ValueError, match=r"1 problem in .*\n.*line 2: its image is missing, .*1.jpg"):
        read_mvsa_single(folder)
    assert read_mvsa_single(folder, missing_images="skip").dropped["no image"] == ["1"]
    (folder / "data" / "3.txt").unlink()
    with pytest.raises(ValueError, match=r"line 4: its text is missing, .*3.txt"):
        read_mvsa_single(folder, missing_images="skip")


@pytest.mark.parametrize(
    "line",
    ["8\tneutral", "8\tneutral,happy", "8 neutral,neutral", "../8\tneutral,neutral", "x\tneutral,neutral", "8\tneutral,\udcff"],
)
def test_mvsa_broken_line(tmp_path, line):
    folder = make_mvsa(tmp_path)
    with open(folder / "labelResultAll.txt", "ab") as file:
        file.write(f"\r\n{line}\r\n7\tneutral,neutral".encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="2 problems") as error:
        read_mvsa_single(folder)
    _, broken, twice = problems(error)
    assert "line 10: expected id<tab>sentiment,sentiment of ('negative', 'neutral', 'positive'); got" in broken
    assert "line 11: id 7 occurs twice" in twice


def test_mvsa_multiple_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected MVSA-Single's header, ID<tab>text,image; got .ID.ttext,image.ttext,image"):
        read_mvsa_single(make_mvsa(tmp_path, header="ID\ttext,image\ttext,image\ttext,image"))


def make_posts(count=6) -> Posts:
    return Posts(tuple(Post(str(i), f"text {i}", f"{i}.jpg", i % 2) for i in range(count)), ("no", "yes"), {"gone": ["9"]})


def test_posts_index():
    posts = make_posts()
    assert posts[-1].id == posts[torch.tensor(5)].id == "5"
    assert [post.id for post in posts] == list("012345")
    for index, ids in (
        (slice(1, 4, 2), "13"),
        (torch.tensor([4, 0, 4, -1]), "4045"),
        (torch.arange(6) > 3, "45"),
        (torch.tensor([], dtype=torch.int64), ""),
    ):
        part = posts[index]
        assert "".join(post.id for post in part) == ids
        assert part.class_names == posts.class_names
        assert part.dropped == {}
        assert part.labels.tolist() == [int(i) % 2 for i in ids]
    for index in (6, torch.tensor([6])):
        with pytest.raises(IndexError):
            posts[index]


def test_a_label_without_a_class_is_refused():
    for label in (-1, 2):
        with pytest.raises(ValueError, match=rf"post 7 has label {label}, expected 0 to 1 for \('no', 'yes'\)"):
            Posts((Post("7", "text", "7.jpg", label),), ("no", "yes"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([(1, 0), (1,)], r"post 1 has labels \(1,\), expected 0 or 1 for each of \('no', 'yes'\)"),
        ([(1, 2)], r"post 0 has labels \(1, 2\), expected 0 or 1"),
        ([1, (1, 0)], r"post 1 has label \(1, 0\), expected one class as in post 0"),
        ([0, [1]], r"post 1 has label \[1\], expected 0 to 1"),
        ([(1, 0), 1], "post 1 has label 1, expected 0 or 1 for each class as in post 0"),
        ([1, None], "post 1 has label None, expected 0 to 1"),
        ([None, 1], "post 1 has label 1, expected None as in post 0"),
    ],
)
def test_labels_of_several_classes_are_checked(labels, message):
    with pytest.raises(ValueError, match=message):
        Posts(tuple(Post(str(i), "", None, label) for i, label in enumerate(labels)), ("no", "yes"))


def test_posts_are_split():
    posts = make_posts(12)
    split = FewShotSplit(posts.labels, shots=2)
    assert posts[split.train].labels.bincount().tolist() == [2, 2]


def test_image_is_rgb_whatever_the_file_has(tmp_path):
    for name, settings in {"grey": {"mode": "L", "color": 9}, "png": {"mode": "RGBA", "format": "PNG"}}.items():
        save_image(tmp_path / f"{name}.jpg", **settings)
        image = Post(name, "", tmp_path / f"{name}.jpg", 0).open_image()
        assert (image.mode, image.size) == ("RGB", (40, 30))


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pictures need Pillow: pip install pillow"):
        make_posts()[0].open_image()


def test_image_that_cant_be_read(tmp_path):
    path = tmp_path / "7.jpg"
    post = Post("7", "", path, 0)
    with pytest.raises(FileNotFoundError, match=r"the image of post 7 is missing: .*7.jpg"):
        post.open_image()
    path.mkdir()
    with pytest.raises(OSError, match=r"the image of post 7 can't be read: .*7.jpg \(IsADirectoryError"):
        post.open_image()
    path.rmdir()
    save_image(path)
    whole = path.read_bytes()
    for data in (b"", b"<html>gone</html>", whole[: len(whole) // 2], whole[:-20]):
        path.write_bytes(data)
        with pytest.raises(OSError, match=r"the image of post 7 can't be read: .*7.jpg \(.*download it again or leave"):
            post.open_image()
