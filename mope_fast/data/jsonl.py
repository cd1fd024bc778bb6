"""Read folders in the format of MoPE's released code: one JSON object per line, one image file for each."""

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from .folder import Folder
from .lines import SHOWN, check_choice, is_unicode, json_object, problems_in, read_lines
from .posts import Post, Posts

MISSING_IMAGES = ("error", "skip", "grey")
_NO_IMAGE = "no image"


def read_jsonl_folder(
    root: str | os.PathLike[str],
    splits: Iterable[str] | None = None,
    *,
    missing_images: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> dict[str, Posts]:
    """Read the splits of a folder as MoPE's released code (arXiv 2403.10568) reads it.

    Each line of ``<split>.jsonl`` is ``{"id": ..., "text": ..., "img": ..., "label": ...}``; other fields are ignored. ``img`` is a
    path relative to ``root``. ``label`` is a name from ``labels.txt``; if a sample may have several classes or none, it is a list
    of such names in every line. ``labels.txt`` has one name per line, class 0 first; white space around names is dropped. If
    ``val.jsonl`` is absent, ``dev.jsonl`` is read instead: the released scripts write that one.

    If any name in ``labels.txt`` is a number, an integer label stands for the name with these digits. Otherwise it is a line number
    of ``labels.txt``, counted from 0. Data in which no sample has label 0 is then refused, because it may count from 1.

    If no line of a split has a label, or all have null, its samples' labels are None: the split is for prediction only.

    A line may have ``audio``, the path of a sound file, and ``frames``, a list of paths of a video's frames. If they are absent or
    null, the sample has none. A line with one of these fields needs no ``img``. A path to a file that doesn't exist is an error.

    File names may be composed (NFC) here and decomposed (NFD) on disk, or the other way round. Paths may have Windows separators.

    Nothing is decoded: an image that can't be read raises when it is opened, see :meth:`Post.open_image` and
    :meth:`Posts.check_images`. Ids need not be unique.

    Args:
        root: the folder.
        splits: names of the splits to read. Default: train and val, and test if it exists.
        missing_images: what to do if an image is absent, null or names no file: "error"; "skip" leaves the sample out and lists its
            id in ``dropped["no image"]``; "grey" gives it a grey picture, as the released code does.
        outside: folders outside of ``root`` that its files may be in too. A path that leads anywhere else, by an absolute path,
            ``..`` or a link, is an error, because the file's content would be shown in reports.

    Returns:
        A dict from split to its samples, all with the same ``class_names``.

    Raises:
        FileNotFoundError: a file does not exist.
        OSError: a file or folder can't be read.
        TypeError: ``splits`` or ``outside`` is not a list.
        ValueError: ``missing_images`` has another value, a split has no samples, or the files have problems. One exception per file
            lists the first ten problems with line and field, and the number of all.
    """
    check_choice("missing_images", missing_images, MISSING_IMAGES)
    if isinstance(splits, str):
        raise TypeError(f"splits must be a list of names, got {splits!r}: give [{splits!r}]")
    root = Path(root)
    folder = Folder(root, outside)
    classes = _Classes(_read_labels(folder, root / "labels.txt"))
    if splits is None:
        splits = ("train", "val", *(["test"] if folder.find(root / "test.jsonl") else []))
    posts = {split: _read_split(_file_of(folder, split), folder, classes, missing_images) for split in splits}
    kinds = {split: each.multi_label for split, each in posts.items() if each.labelled}
    if len(set(kinds.values())) > 1:
        several = [split for split, kind in kinds.items() if kind]
        raise ValueError(f"{root}: label is a list in {several} and one name in the other splits: use lists in all or in none")
    if classes.counted and 0 not in classes.counted:
        raise ValueError(
            f"{root}: labels are numbers, {min(classes.counted)} to {max(classes.counted)}, and no sample of {list(posts)} has 0, "
            "which is the first line of labels.txt: if your labels count from 1, replace them by names; if class 0 has no sample "
            "in these splits, read them together with a split in which it has one"
        )
    return posts


def read_unlabelled(
    path: str | os.PathLike[str],
    *,
    fields: Collection[str] = ("text", "image"),
    missing_images: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> Posts:
    """Read one file as :func:`read_jsonl_folder` reads a split, ignoring labels.

    Args:
        path: the file; paths in it are relative to its folder.
        fields: which of text, image, audio and frames to read. Other fields may be absent or have any value, and posts don't have
            them.
        missing_images, outside: as in :func:`read_jsonl_folder`.

    Raises:
        FileNotFoundError, OSError, TypeError, ValueError: as in :func:`read_jsonl_folder`.
    """
    check_choice("missing_images", missing_images, MISSING_IMAGES)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist: expected a line {{"id": ..., "text": ..., "img": ...}} for each sample')
    folder, problems, posts, dropped = Folder(path.parent, outside), [], [], []
    read = ("id", *("img" if field == "image" else field for field in fields))
    for number, line in read_lines(path):
        try:
            row = _fields(line, read)
            needed, *media = _media(folder, row, missing_images, wanted="image" in fields)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if needed and media[0] is None and missing_images == "skip":
            dropped.append(str(row["id"]))
        else:
            image, *others = media
            posts.append(Post(str(row["id"]), row["text"], image, None, *others))
    return _posts(path, posts, (), problems, dropped)


def _file_of(folder: Folder, split: str) -> Path:
    path = folder.root / f"{split}.jsonl"
    found = folder.find(path) or (folder.find(folder.root / "dev.jsonl") if split == "val" else None)
    if found is None:
        raise FileNotFoundError(
            f'{path} does not exist: expected a line {{"id": ..., "text": ..., "img": ..., "label": ...}} for each sample'
        )
    return found


def _read_labels(folder: Folder, path: Path) -> tuple[str, ...]:
    if (found := folder.find(path)) is None:
        raise FileNotFoundError(f"{path} does not exist: write the name of each class on a line of its own, class 0 first")
    lines = [(number, _class_name(name)) for number, name in read_lines(found)]
    if bad := [f"line {number}: not UTF-8: {name!r:.80}" for number, name in lines if not is_unicode(name)]:
        raise problems_in(path, bad)
    names = [name for _, name in lines]
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{path} has {repeated} more than once: expected one line per class")
    if len(names) < 2:
        raise ValueError(f"{path} must name at least two classes, one per line, got {names}")
    return tuple(names)


def _class_name(name: str) -> str:
    # one accented letter may be one character or two
    return unicodedata.normalize("NFC", name.strip())


def _read_split(path: Path, folder: Folder, classes: "_Classes", missing_images: str) -> Posts:
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    problems, posts, dropped, several = [], [], [], None
    with_label, without_label = None, []
    for number, line in read_lines(path):
        try:
            row = _fields(line, ("id", "text", "img", "label", "audio", "frames"))
            label = row["label"]
            if label is None:
                without_label.append(number)
            else:
                with_label = with_label or number
                if several is None:
                    several = isinstance(label, list)
                # searching for similar names is slow
                label = classes.label(label, several, hint=len(problems) < SHOWN)
            needed, image, *others = _media(folder, row, missing_images)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if needed and image is None and missing_images == "skip":
            dropped.append(str(row["id"]))
        else:
            # samples of the same classes share one tuple
            label = shared.setdefault(label, label) if several else label
            posts.append(Post(str(row["id"]), row["text"], image, label, *others))
    if with_label:
        problems += [
            f"line {number}: has no label, line {with_label} has one: label all lines, or none" for number in without_label
        ]
    return _posts(path, posts, classes.names, problems, dropped)


def _posts(path: Path, posts: list[Post], class_names: tuple[str, ...], problems: list[str], dropped: list[str]) -> Posts:
    if not posts and not problems:
        why = f": all {len(dropped)} have no image" if dropped else ": the file is empty"
        raise ValueError(f"{path} has no sample{why}")
    if problems:
        raise problems_in(path, problems)
    return Posts(tuple(posts), class_names, {_NO_IMAGE: tuple(dropped)} if dropped else {})


def _media(
    folder: Folder, row: dict[str, Any], missing_images: str, *, wanted: bool = True
) -> tuple[bool, Path | None, Path | None, tuple[Path, ...]]:
    """Return whether a line needs an image, and its image, sound and frames."""
    # a line with only sound or a video needs no image
    needed = wanted and (row["img"] is not None or not {"audio", "frames"} & row.keys())
    image = _image(folder, row["img"], missing_images) if needed else None
    audio = _file(folder, "audio", row["audio"]) if row.get("audio") else None
    return needed, image, audio, tuple(_file(folder, "frames", frame) for frame in row.get("frames") or ())


def _image(folder: Folder, img: str | None, missing_images: str) -> Path | None:
    """Return the image file, or None if it is missing and that is allowed."""
    found = _find(folder, "img", img) if img else None
    if found is None and missing_images == "error":
        what = f"{folder.root / img} does not exist" if img else "is absent or null"
        raise ValueError(f'field "img": {what}; missing_images="skip" leaves such samples out, "grey" gives a grey picture')
    return found


def _file(folder: Folder, field: str, name: str) -> Path:
    if (found := _find(folder, field, name)) is None:
        raise ValueError(f'field "{field}": {folder.root / name} does not exist; use null for a sample without it')
    return found


def _find(folder: Folder, field: str, name: str) -> Path | None:
    try:
        # the second lookup is for a file written on Windows
        return folder.find(folder.root / name) or ("\\" in name and folder.find(folder.root / name.replace("\\", "/"))) or None
    except ValueError as error:
        raise ValueError(f'field "{field}": {error}') from None


def _fields(line: str, read: tuple[str, ...] = ("id", "text", "img", "label")) -> dict[str, Any]:
    """Parse a line and check the types of the fields to read."""
    row = json_object(line)
    if lacking := [name for name in ("id", "text") if name in read and name not in row]:
        raise ValueError(f"lacks {', '.join(map(repr, lacking))}; it has {list(row)!r:.200}")
    row = {"text": "", "img": None, "label": None, **{name: value for name, value in row.items() if name in read}}
    none = type(None)
    kinds = {
        "id": (str, int), "text": (str,), "img": (str, none), "label": (str, int, list, none), "audio": (str, none),
        "frames": (list, none),
    }  # fmt: skip
    expected = {
        "id": "a string or an integer", "text": "a string", "img": "a path or null", "label": "a name, a list of names or null",
        "audio": "a path or null", "frames": "a list of paths or null",
    }  # fmt: skip
    for name, kind in kinds.items():
        if name not in row:
            continue
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f'field "{name}": expected {expected[name]}, got {row[name]!r:.120}')
        if isinstance(row[name], str) and not is_unicode(row[name]):
            raise ValueError(f'field "{name}" is not UTF-8: {row[name]!r:.120}')
    if bad := [frame for frame in row.get("frames") or () if not (isinstance(frame, str) and frame)]:
        raise ValueError(f'field "frames": expected {expected["frames"]}, got {bad[0]!r:.120} in it')
    return row


class _Classes:
    """Looks up classes by the names or numbers that samples give as labels."""

    def __init__(self, names: tuple[str, ...]):
        self.names = names
        self.counted: set[int] = set()
        """Integer labels that were read as line numbers of labels.txt, counted from 0."""
        self._index = {name: i for i, name in enumerate(names)}
        self._numbered = any(_is_number(name) for name in names)

    def label(self, value: str | int | list[Any], several: bool, hint: bool) -> int | tuple[int, ...]:
        """Return the class index; or, for a list, 0 or 1 for each class."""
        if isinstance(value, list) != several:
            raise ValueError(f'field "label": expected {"a list of names" if several else "one name"} as above, got {value!r:.120}')
        if not several:
            return self._class(value, hint)
        numbers = [each for each in value if isinstance(each, int)]
        if len(set(numbers)) < len(numbers) or (len(numbers) == len(self.names) and {*numbers} <= {0, 1}):
            raise ValueError(f'field "label": {value!r:.120} looks like 0 or 1 for each class: expected the names of the classes')
        chosen = {self._class(each, hint) for each in value}
        return tuple(int(i in chosen) for i in range(len(self.names)))

    def _class(self, value: Any, hint: bool) -> int:
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if is_integer and not self._numbered:
            if not 0 <= value < len(self.names):
                raise ValueError(f'field "label": {value} is not a line number of labels.txt, 0 to {len(self.names) - 1}')
            self.counted.add(value)
            return value
        name = str(value) if is_integer else _class_name(value) if isinstance(value, str) else value
        if isinstance(name, str) and name in self._index:
            return self._index[name]
        near = difflib.get_close_matches(name, self._index, 1) if hint and isinstance(name, str) else []
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f'field "label": {name!r:.80} is not in labels.txt{meant}')


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
