"""Folders in the format of MoPE's released code: a JSON object in each line, an image file for each."""

import difflib
import functools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .lines import SHOWN, check_choice, is_unicode, problems_in, read_lines
from .posts import Post, Posts

MISSING_IMAGES = ("error", "skip", "grey")
_NO_IMAGE = "no image"


def read_jsonl_folder(
    root: str | os.PathLike[str], splits: Iterable[str] = ("train", "val", "test"), *, missing_images: str = "error"
) -> dict[str, Posts]:
    """The splits of a folder as MoPE's released code (arXiv 2403.10568) reads it.

    ``<split>.jsonl`` has in each line ``{"id": ..., "text": ..., "img": ..., "label": ...}``; other fields are left alone. ``img``
    is a path from ``root``; ``label`` is a name out of ``labels.txt``, or a list of such names in every line where a sample may
    have several classes or none. ``labels.txt`` has a name in each line, class 0 first; white space around names is dropped.
    Without ``val.jsonl`` there may be ``dev.jsonl``: the released scripts write that one.

    Nothing is decoded: an image that can't be read raises when it is opened, see :meth:`Post.open_image` and
    :meth:`Posts.check_images`. Ids need not be unique.

    Args:
        root: the folder.
        splits: which to read.
        missing_images: what to do where ``img`` is absent, null or names no file: "error"; "skip" leaves the sample out, into
            ``dropped["no image"]``; "grey" gives it a grey picture, as the released code does.

    Returns:
        Split -> its samples, of the same ``class_names``.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: another ``missing_images``; a split without samples; problems in the files. One exception for each file has the
            first ten with line and field, and their number.
    """
    check_choice("missing_images", missing_images, MISSING_IMAGES)
    if isinstance(splits, str):
        raise TypeError(f"splits must be a list of names, got {splits!r}: give [{splits!r}]")
    root = Path(root)
    class_names = _read_labels(root / "labels.txt")
    # listed once: a look at each of thousands takes long on a network disk
    listing = functools.cache(_file_names)
    posts = {split: _read_split(_file_of(root, split), root, class_names, missing_images, listing) for split in splits}
    kinds = {split: each.multi_label for split, each in posts.items()}
    if len(set(kinds.values())) > 1:
        several = [split for split, kind in kinds.items() if kind]
        raise ValueError(f"{root}: label is a list in {several} and one name in the other splits: use lists in all, or in none")
    return posts


def _file_of(root: Path, split: str) -> Path:
    path, dev = root / f"{split}.jsonl", root / "dev.jsonl"
    if split == "val" and not path.exists() and dev.is_file():
        return dev
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is not there: expected a line {{"id": ..., "text": ..., "img": ..., "label": ...}} for each sample'
        )
    return path


def _read_labels(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: write the name of each class in a line of its own, class 0 first")
    lines = [(number, _class_name(name)) for number, name in read_lines(path)]
    if bad := [f"line {number}: not UTF-8: {name!r:.80}" for number, name in lines if not is_unicode(name)]:
        raise problems_in(path, bad)
    names = [name for _, name in lines]
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{path} has {repeated} more than once: each class has one line")
    if len(names) < 2:
        raise ValueError(f"{path} must name at least two classes, a line each, got {names}")
    return tuple(names)


def _class_name(name: str) -> str:
    # one accented letter may be one character or two
    return unicodedata.normalize("NFC", name.strip())


def _file_names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (OSError, ValueError):  # not there, no folder, or no name that a folder could have
        return frozenset()


def _read_split(path: Path, root: Path, class_names: tuple[str, ...], missing_images: str, listing: Any) -> Posts:
    classes = {name: i for i, name in enumerate(class_names)}
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    problems, posts, dropped, several = [], [], [], None
    for number, line in read_lines(path):
        try:
            row = _fields(line)
            if several is None:
                several = isinstance(row["label"], list)
            # looking for what was meant takes a while
            label = _label(row["label"], classes, several, hint=len(problems) < SHOWN)
            image = None if not row["img"] else root / row["img"]
            there = image is not None and image.name in listing(image.parent)
            if not there and missing_images == "error":
                what = "there is none" if image is None else f"{image} is not there"
                raise ValueError(f'field "img": {what}; missing_images="skip" leaves such samples out, "grey" gives a grey picture')
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if there or missing_images == "grey":
            # samples of the same classes share one tuple
            label = shared.setdefault(label, label) if several else label
            posts.append(Post(str(row["id"]), row["text"], image if there else None, label))
        else:
            dropped.append(str(row["id"]))
    if not posts and not problems:
        why = f": all {len(dropped)} have no image" if dropped else ": the file is empty"
        raise ValueError(f"{path} has no sample{why}")
    if problems:
        raise problems_in(path, problems)
    return Posts(tuple(posts), class_names, {_NO_IMAGE: tuple(dropped)} if dropped else {})


def _fields(line: str) -> dict[str, Any]:
    """A line's object, its fields of the right types."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {line!r:.120}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with id, text, img and label, got {line!r:.120}")
    if lacking := [name for name in ("id", "text", "label") if name not in row]:
        raise ValueError(f"lacks {', '.join(map(repr, lacking))}; it has {list(row)!r:.200}")
    row.setdefault("img", None)
    kinds = {"id": (str, int), "text": (str,), "img": (str, type(None)), "label": (str, list)}
    expected = {"id": "a text or an integer", "text": "a text", "img": "a path or null", "label": "a name or a list of names"}
    for name, kind in kinds.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f'field "{name}": expected {expected[name]}, got {row[name]!r:.120}')
        if isinstance(row[name], str) and not is_unicode(row[name]):
            raise ValueError(f'field "{name}" is not UTF-8: {row[name]!r:.120}')
    return row


def _label(value: Any, classes: dict[str, int], several: bool, hint: bool) -> int | tuple[int, ...]:
    if isinstance(value, list) != several:
        raise ValueError(f'field "label": expected {"a list of names" if several else "one name"} as above, got {value!r:.120}')
    names = [_class_name(name) if isinstance(name, str) else name for name in (value if several else [value])]
    for name in names:
        if not isinstance(name, str) or name not in classes:
            near = difflib.get_close_matches(name, classes, 1) if hint and isinstance(name, str) else []
            meant = f"; is it {near[0]!r}?" if near else ""
            raise ValueError(f'field "label": {name!r:.80} is not in labels.txt{meant}')
    if not several:
        return classes[names[0]]
    return tuple(int(name in names) for name in classes)
