"""Helpers shared by readers of published sets: one error for all problems, samples left out, and recognition of a set's folder."""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..folder import Folder
from ..images import Hdf5Image
from ..jsonl import MISSING_IMAGES
from ..lines import check_choice, is_unicode, problems_in
from ..posts import Post, Posts

NO_IMAGE = "no image"
LOOKS = {
    "UPMC Food-101": tuple(("images/train", "images/test", texts) for texts in ("texts_txt", "texts", "text")),
    "MM-IMDB": (("split.json",), ("multimodal_imdb.hdf5",)),
    "SNLI-VE": (("snli_ve_train.jsonl",), ("snli_ve_dev.jsonl",), ("snli_ve_test.jsonl",)),
    "MUStARD": (("sarcasm_data.json",), ("data/sarcasm_data.json",)),
    "Hateful Memes": (("train.jsonl", "dev_seen.jsonl"), ("train.jsonl", "dev_unseen.jsonl"), ("train.jsonl", "dev.jsonl", "img")),
    **{f"RefCOCO{name}": (("refs(unc).p",), ("refs(google).p",), ("refs(umd).p",)) for name in ("", "+", "g")},
    "the sarcasm tweets of Cai et al. 2019": (("text/train.txt",),),
    "MVSA": (("labelResultAll.txt",),),
    "a folder of JSON lines, for read_jsonl_folder": (("labels.txt", "train.jsonl"),),
}
"""Set -> alternatives; a folder looks like the set if all files and folders of one alternative exist in it."""


class Reading:
    """State of reading one set.

    Args:
        folder: the set's folder.
        title: the set's name, a key of :data:`LOOKS`.
        missing_images: "error", "skip" or "grey", as in :func:`read_jsonl_folder`.
        outside: other folders that a link may lead to.

    Raises:
        FileNotFoundError: the folder does not exist, or is not of this set.
        TypeError: ``outside`` is not a list.
        ValueError: ``missing_images`` has another value.
    """

    def __init__(
        self, folder: str | os.PathLike[str], title: str, missing_images: str, outside: Iterable[str | os.PathLike[str]] = ()
    ):
        check_choice("missing_images", missing_images, MISSING_IMAGES)
        self.root, self.missing_images = Path(folder), missing_images
        self.files = Folder(self.root, outside)
        self.problems: list[str] = []
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is not a folder: expected the folder of {title}")
        if title not in (found := looks_like(self.root)):
            wanted = "; or ".join(" and ".join(names) for names in LOOKS[title])
            like = f": it looks like {found[0]}" if found else ""
            raise FileNotFoundError(f"{self.root} is not {title}, which has {wanted}{like}")

    def problem(self, place: object, what: object) -> None:
        """Record a problem for the single error that :meth:`finish` raises."""
        self.problems.append(f"{place}: {what}")

    def image(self, *paths: Path) -> Path | None:
        """Return the first of these paths that exists; None if none does and that is allowed.

        Raises:
            ValueError: none exists although ``missing_images`` is "error", or a file is outside of the set's folder.
        """
        for path in paths:
            if (found := self.files.find(path)) is not None:
                return found
        if self.missing_images == "error":
            raise ValueError(
                f"its image is missing, {paths[0]}; missing_images='skip' leaves such samples out, 'grey' gives a grey picture"
            )
        return None

    def read_bytes(self, path: Path) -> bytes:
        """Read a file's bytes.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is outside of the set's folder.
        """
        if (found := self.files.find(path)) is None:
            raise FileNotFoundError(f"{path} does not exist")
        return found.read_bytes()

    def finish(self, splits: "dict[str, Split]", class_names: tuple[str, ...]) -> dict[str, Posts]:
        """Return all splits, with the same classes.

        Raises:
            ValueError: problems were recorded, or a split has no samples.
        """
        for name, split in splits.items():
            if not split.posts and not self.problems:
                left_out = ", ".join(f"{reason}: {len(ids)}" for reason, ids in split.dropped.items() if ids)
                self.problem(name, "no sample is left" + (f"; left out: {left_out}" if left_out else ""))
        if self.problems:
            raise problems_in(self.root, self.problems)
        return {name: Posts(tuple(split.posts), class_names, split.dropped) for name, split in splits.items()}


class Split:
    """Samples of one split while they are read, and the ids of samples left out by reason."""

    def __init__(self, reading: Reading, *reasons: str):
        self.posts: list[Post] = []
        self.dropped: dict[str, list[str]] = {reason: [] for reason in reasons}
        self._skips = reading.missing_images == "skip"

    def add(self, name: str, text: str, image: Path | Hdf5Image | None, label: int | tuple[int, ...] | None) -> None:
        """Add a sample, or leave it out if it has no image and ``missing_images`` is "skip"."""
        if image is None and self._skips:
            self.dropped[NO_IMAGE].append(name)
        else:
            self.posts.append(Post(name, text, image, label))


def looks_like(folder: Path) -> list[str]:
    """Return the sets that a folder may belong to, judged by its files; the most likely first."""
    return [title for title, ways in LOOKS.items() if any(all((folder / name).exists() for name in names) for names in ways)]


def field(row: dict[str, Any], name: str, kind: type, what: str) -> Any:
    """Return a field of a JSON object.

    Raises:
        ValueError: the field is absent or has a wrong type; ``what`` describes the expected type in the message.
    """
    if name not in row:
        raise ValueError(f"lacks {name!r}; it has {list(row)!r:.200}")
    value = row[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"field {name!r}: expected {what}, got {value!r:.120}")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(value, list) and not isinstance(text, str):
            raise ValueError(f"field {name!r}: expected {what}, got {text!r:.120} in it")
        if isinstance(text, str) and not is_unicode(text):
            raise ValueError(f"field {name!r} is not UTF-8: {text!r:.120}")
    return value


def hold_out(splits: dict[str, Posts], count: int, seed: int) -> dict[str, Posts]:
    """Hold out samples of ``train`` as ``val``, stratified by class; the order of samples is kept.

    Args:
        count: number of val samples; 0 for none.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError, ValueError: ``count`` or ``seed`` is not an integer >= 0, or so many samples can't be held out.
    """
    for name, value in (("val", count), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not count:
        return splits
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("holding out val needs scikit-learn, pip install 'mope_fast[data]'; or give val=0") from error
    train = splits["train"]
    labels = train.labels.tolist()
    try:
        chosen = set(train_test_split(range(len(labels)), test_size=count, random_state=seed, stratify=labels)[1])
    except ValueError as error:
        raise ValueError(f"val={count} can't be held out of {len(labels)} samples ({error}): give another, or 0 for none") from None
    parts = (tuple(post for i, post in enumerate(train.posts) if (i in chosen) == held) for held in (False, True))
    kept, held = (Posts(part, train.class_names) for part in parts)
    others = {name: posts for name, posts in splits.items() if name != "train"}
    return {"train": replace(kept, dropped=train.dropped), "val": held, **others}
