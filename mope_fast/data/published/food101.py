"""UPMC Food-101: pictures of dishes with the text, or the title, of the web page that each was found on."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..lines import check_choice, decoded
from ..posts import Posts
from .common import NO_IMAGE, Reading, Split, hold_out

TITLE = "UPMC Food-101"
_PUNCTUATION = str.maketrans(dict.fromkeys("<>/\\+=-_[]{}'\":;.,()*&^%$#@!~`", " "))
_NO_TEXT = "no text"


def read_food101(
    folder: str | os.PathLike[str],
    *,
    text: str | None = None,
    val: int = 5000,
    seed: int = 0,
    missing_images: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> dict[str, Posts]:
    """Read UPMC Food-101 (Wang et al. 2015) as published: 101 dishes, one class per sample.

    ``images/train`` and ``images/test`` have a folder for each class with ``<class>_<number>.jpg``. Texts of pages are in
    ``texts_txt/<class>/<class>_<number>.txt``. Titles are in ``texts/train_titles.csv`` and ``texts/test_titles.csv``, with rows of
    image, title, class and no header; a folder ``text`` is accepted in place of ``texts``, as in MoPE's release. Pictures without a
    text are left out and listed in ``dropped["no text"]``. Texts are cleaned as by the scripts of MMBT and MoPE: punctuation and
    line ends become spaces, runs of white space become one space, and letters become lower-case. Bytes that aren't UTF-8 are read
    as Windows-1252.

    Written from public code and descriptions, not run on the owner's files.

    Args:
        folder: the folder with ``images`` and the texts.
        text: "pages" or "titles"; default: pages if ``texts_txt`` exists, as in MoPE's released code, else titles.
        val: number of train samples to hold out as val, stratified by class; the set has no val of its own. The released scripts
            draw 5,000 without a seed.
        seed: seed of that draw.
        missing_images: what to do if the picture of a title is missing: "error", "skip" or "grey", as in
            :func:`read_jsonl_folder`.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Returns:
        train, val, test. Classes are the folders of train in alphabetical order.

    Raises:
        FileNotFoundError: the folder or a file does not exist, or the folder is of another set, which the message names.
        ImportError: scikit-learn, which draws val, is not installed.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: an argument has another value, or the set has problems. One exception lists the first ten and the number of all.
    """
    reading = Reading(folder, TITLE, missing_images, outside)
    root = reading.root
    if text is None:
        text = "pages" if (root / "texts_txt").is_dir() else "titles"
    check_choice("text", text, ("pages", "titles"))
    class_names = tuple(folder.name for folder in _dishes(reading, "train"))
    splits = {name: Split(reading, _NO_TEXT, NO_IMAGE) for name in ("train", "test")}
    for name, split in splits.items():
        read = _read_titles if text == "titles" else _read_pages
        read(reading, name, split, {each: index for index, each in enumerate(class_names)})
    return hold_out(reading.finish(splits, class_names), val, seed)


def _read_pages(reading: Reading, name: str, split: Split, classes: dict[str, int]) -> None:
    for image in _images(reading, name, classes):
        dish = image.parent.name
        try:
            page = reading.files.find(reading.root / "texts_txt" / dish / f"{image.stem}.txt")
        except ValueError as error:
            reading.problem(image, error)
            continue
        if page is None:
            split.dropped[_NO_TEXT].append(image.stem)
        else:
            split.add(image.stem, _cleaned(decoded(page.read_bytes())), image, classes[dish])


def _read_titles(reading: Reading, name: str, split: Split, classes: dict[str, int]) -> None:
    folders = [reading.root / each for each in ("texts", "text")]
    found = next((each for each in folders if each.is_dir()), folders[0]) / f"{name}_titles.csv"
    seen = set()
    rows = csv.reader(io.StringIO(decoded(reading.read_bytes(found)), newline=""))
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            reading.problem(f"{found}, line {rows.line_num}", error)
            break
        if not row:
            continue
        place = f"{found}, line {rows.line_num}"
        # checked because it becomes a path
        if len(row) != 3 or row[2] not in classes or not re.fullmatch(r"[\w-]+\.\w+", row[0]):
            reading.problem(place, f"expected image, title, class of images/train; got {row!r:.120}")
        elif row[0] in seen:
            reading.problem(place, f"image {row[0]} occurs twice")
        else:
            seen.add(row[0])
            try:
                image = reading.image(reading.root / "images" / name / row[2] / row[0])
                split.add(Path(row[0]).stem, _cleaned(row[1]), image, classes[row[2]])
            except ValueError as error:
                reading.problem(place, error)
    split.dropped[_NO_TEXT] += [image.stem for image in _images(reading, name, classes) if image.name not in seen]


def _images(reading: Reading, name: str, classes: dict[str, int]) -> Iterator[Path]:
    """Yield the image files of one split, class by class."""
    for folder in _dishes(reading, name):
        if folder.name not in classes:
            reading.problem(folder, "not a class of images/train")
            continue
        try:
            for path in reading.files.entries(folder)[0]:
                if (image := reading.files.find(path)) is not None:
                    yield image
        except ValueError as error:
            reading.problem(folder, error)


def _dishes(reading: Reading, name: str) -> list[Path]:
    return [folder for folder in reading.files.entries(reading.root / "images" / name)[1] if folder.is_dir()]


def _cleaned(text: str) -> str:
    return re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).lower().strip()
