"""Readers of published data sets of posts, from their files as published. Nothing is downloaded and no image is opened."""

import ast
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .folder import Folder
from .lines import check_choice, decoded, is_unicode, problems_in, read_lines
from .posts import Post, Posts

_TWITTER = "Cai et al. 2019, https://github.com/headacheboy/data-of-multimodal-sarcasm-detection"
_MVSA = "Niu et al. 2016, http://mcrlab.net/research/mvsa-sentiment-analysis-on-multi-view-social-data"
_IMAGES = "dataset_image"
_SPLITS = {"train": "train.txt", "valid": "valid2.txt", "test": "test2.txt"}
_CUES = {"exgag", "sarcasm", "sarcastic", "reposting", "<url>", "joke", "humour", "humor", "jokes", "irony", "ironic"}
_SENTIMENTS = ("negative", "neutral", "positive")
_LONGEST = 10_000
"""Maximum characters in a line. The sarcasm set's longest has 695; literal_eval's time and stack depth grow with the line."""


def read_twitter_sarcasm(
    folder: str | os.PathLike[str],
    split: str,
    *,
    images: str | os.PathLike[str] = _IMAGES,
    missing_images: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> Posts:
    """Read the image-text tweets of Cai et al. 2019: 0 is not sarcastic, 1 sarcastic.

    The files are those of https://github.com/headacheboy/data-of-multimodal-sarcasm-detection, with one Python list per line:
    ``text/train.txt`` with ``[id, text, label]``, ``text/valid2.txt`` and ``text/test2.txt`` with ``[id, text, label by hashtag,
    label by an annotator]``. As in the authors' ``codes/loadData.py``, the last label is used. Posts with a word that gives the
    label away (sarcasm, irony, joke, ``<url>``, ...) are left out and listed in ``dropped["tells the label"]``: their images are
    not published. If all images are present, train, valid and test have 19816, 2410 and 2409 posts.

    Args:
        folder: the folder with ``text`` and the images.
        split: "train", "valid" or "test".
        images: folder of ``<id>.jpg``, absolute or relative to ``folder``; a folder other than the default may be anywhere.
        missing_images: "error", or "skip" to leave out posts whose image is missing and list them in ``dropped["no image"]``.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Raises:
        FileNotFoundError: the file or the image folder does not exist.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: ``split`` or ``missing_images`` has another value, or the set has problems: malformed lines, ids that occur
            twice or are not digits, missing images, files outside of the folder. One exception lists the first ten with file and
            line, and the number of all.
    """
    check_choice("split", split, tuple(_SPLITS))
    path, pictures = Path(folder) / "text" / _SPLITS[split], Path(folder) / images
    check_choice("missing_images", missing_images, ("error", "skip"))
    files = Folder(Path(folder), outside)
    lines = _lines(files, path, _TWITTER)
    if os.fspath(images) != _IMAGES:
        files = Folder(pictures, outside)
    _check_images(pictures, _TWITTER)
    form = ["id of digits", "text", *["label 0 or 1"] * (1 if split == "train" else 2)]
    problems, posts, seen = [], [], set()
    dropped: dict[str, list[str]] = {"tells the label": [], "no image": []}
    for number, line in lines:
        row = _literal(line)
        if not _is_tweet(row, len(form)):
            problems.append(f"{path}, line {number}: expected [{', '.join(form)}], got {line!r:.120}")
            continue
        post, text, *labels = row
        if post in seen:
            problems.append(f"{path}, line {number}: id {post} occurs twice")
            continue
        seen.add(post)
        if not _CUES.isdisjoint(text.split()):
            dropped["tells the label"].append(post)
        else:
            try:
                if image := _image(files, pictures / f"{post}.jpg", missing_images):
                    posts.append(Post(post, text, image, labels[-1]))
                else:
                    dropped["no image"].append(post)
            except ValueError as error:
                problems.append(f"{path}, line {number}: {error}")
    return _finish(path, problems, posts, ("not sarcastic", "sarcastic"), dropped)


def read_mvsa_single(
    folder: str | os.PathLike[str], *, missing_images: str = "error", outside: Iterable[str | os.PathLike[str]] = ()
) -> Posts:
    """Read the image-text tweets of MVSA-Single (Niu et al. 2016): 0 is negative, 1 neutral, 2 positive.

    ``labelResultAll.txt`` has a header, ``ID<tab>text,image``, and for each post the sentiments of its text and of its image,
    ``1<tab>neutral,positive``. ``data`` has ``<id>.jpg`` and ``<id>.txt``. The two sentiments are combined as by Xu and Mao 2017
    (https://github.com/xunan0812/MultiSentiNet). Equal ones are kept. If one is neutral, the other is used. A post that is positive
    in one and negative in the other is left out and listed in ``dropped["positive against negative"]``.

    Not all texts are UTF-8. The others are read as Windows-1252, with U+FFFD for its undefined bytes. White space around a text is
    removed.

    Args:
        folder: the folder with ``labelResultAll.txt`` and ``data``.
        missing_images: "error", or "skip" to leave out posts whose image is missing and list them in ``dropped["no image"]``.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Raises:
        FileNotFoundError: the file or the folder ``data`` does not exist.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: ``missing_images`` has another value, or the set has problems: malformed lines, repeated ids, missing texts or
            images, files outside of the folder. One exception lists the first ten with file and line, and the number of all.
    """
    path, data = Path(folder) / "labelResultAll.txt", Path(folder) / "data"
    check_choice("missing_images", missing_images, ("error", "skip"))
    files = Folder(Path(folder), outside)
    lines = _lines(files, path, _MVSA)
    _check_images(data, _MVSA)
    problems, posts, seen = [], [], set()
    dropped: dict[str, list[str]] = {"positive against negative": [], "no image": []}
    header, *rows = lines or [(1, "")]
    if header[1].split() != ["ID", "text,image"]:
        problems.append(f"{path}, line {header[0]}: expected MVSA-Single's header, ID<tab>text,image; got {header[1]!r:.120}")
    form = re.compile("([0-9]+)\t({0}),({0})".format("|".join(_SENTIMENTS)))
    for number, line in rows:
        match = form.fullmatch(line.strip())
        if match is None:
            problems.append(f"{path}, line {number}: expected id<tab>sentiment,sentiment of {_SENTIMENTS}; got {line!r:.120}")
            continue
        post, *sentiments = match.groups()
        if post in seen:
            problems.append(f"{path}, line {number}: id {post} occurs twice")
            continue
        seen.add(post)
        label = _combine(*map(_SENTIMENTS.index, sentiments))
        if label is None:
            dropped["positive against negative"].append(post)
            continue
        try:
            image = _image(files, data / f"{post}.jpg", missing_images)
            if image is None:
                dropped["no image"].append(post)
            elif (text := files.find(data / f"{post}.txt")) is None:
                raise ValueError(f"its text is missing, {data / f'{post}.txt'}")
            else:
                posts.append(Post(post, decoded(text.read_bytes()).strip(), image, label))
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    return _finish(path, problems, posts, _SENTIMENTS, dropped)


def _literal(line: str) -> object:
    """Return the value of a line that is a Python literal, None for any other line."""
    try:
        return ast.literal_eval(line) if len(line) <= _LONGEST else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _is_tweet(row: object, fields: int) -> bool:
    if (
        not isinstance(row, list)
        or len(row) != fields
        or not all(isinstance(value, str) and is_unicode(value) for value in row[:2])
    ):
        return False
    # digits only, because the id becomes a path
    return re.fullmatch("[0-9]+", row[0]) is not None and all(type(label) is int and label in (0, 1) for label in row[2:])


def _combine(text: int, image: int) -> int | None:
    """Combine two sentiments; None if they contradict each other."""
    neutral = _SENTIMENTS.index("neutral")
    if text == image or image == neutral:
        return text
    return image if text == neutral else None


def _lines(files: Folder, path: Path, source: str) -> list[tuple[int, str]]:
    if (found := files.find(path)) is None:
        raise FileNotFoundError(f"{path} does not exist: expected the file of that name from {source}")
    return read_lines(found)


def _check_images(folder: Path, source: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist: expected a folder with the images <id>.jpg of {source}")


def _image(files: Folder, path: Path, missing_images: str) -> Path | None:
    """Return the image file, or None if it is missing and that is allowed."""
    found = files.find(path)
    if found is None and missing_images == "error":
        raise ValueError(f"its image is missing, {path}; missing_images='skip' leaves such posts out")
    return found


def _finish(
    path: Path, problems: list[str], posts: list[Post], class_names: tuple[str, ...], dropped: dict[str, list[str]]
) -> Posts:
    if not posts and not problems:
        counts = ", ".join(f"{reason}: {len(ids)}" for reason, ids in dropped.items())
        problems = [f"{path}: no post is left; dropped: {counts}"]
    if problems:
        raise problems_in(path, problems)
    return Posts(tuple(posts), class_names, dropped)
