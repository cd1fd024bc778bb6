"""Write samples as a folder of JSON Lines, with the files that they refer to."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._files import make_names_durable
from .._progress import tracked
from .images import Hdf5Image, pillow
from .lines import check_choice, is_unicode
from .posts import Post, Posts
from .referring import Reference, References

_MEDIA: dict[str, Callable[[Path, Path], Any]] = {
    "hardlink": os.link,
    "symlink": lambda source, target: os.symlink(os.path.abspath(source), target),
    "copy": shutil.copyfile,
}


def write_jsonl_folder(
    splits: Mapping[str, Posts] | Mapping[str, References],
    folder: str | os.PathLike[str],
    *,
    media: str = "copy",
    progress: bool = True,
) -> None:
    """Write samples as a folder that :func:`read_jsonl_folder` reads: ``<split>.jsonl``, ``labels.txt``, images, sound and frames.

    References are written as a folder that :func:`read_reference_folder` reads; masks given as polygons or run lengths become PNGs.

    The folder appears atomically: it is written next to its place under a temporary name and renamed at the end. A file that
    several samples refer to is written once. Images within HDF5 files are written as PNGs.

    Args:
        splits: split name -> samples, all with the same classes, as the readers of published sets return them.
        folder: must not exist, or be empty.
        media: how to place media files. "copy"; "hardlink", which takes no space but works on the same disk only; "symlink", which
            points to the present files and needs ``outside=[...]`` when the folder is read.
        progress: show a progress bar.

    Raises:
        FileExistsError: the folder is not empty.
        OSError: a file can't be read or written, or "hardlink" is used for a file on another disk.
        TypeError: ``splits`` is not a mapping of names to :class:`Posts`, or to :class:`References`.
        ValueError: ``media`` has another value, there is no split, splits have different classes, or the name of a split or a class
            can't be written as a file name or a line.
    """
    check_choice("media", media, tuple(_MEDIA))
    folder = Path(folder)
    names = _check(splits)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists and is not empty: give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent) as made:
        part = Path(made) / folder.name
        part.mkdir()
        places = _Places(part, _MEDIA[media])
        if names is not None:
            (part / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        for split, posts in splits.items():
            with open(part / f"{split}.jsonl", "w", encoding="utf-8") as file:
                for post in tracked(posts, f"writing {split}", "sample", shown=progress):
                    line = _reference(post, split, places) if names is None else dict(_line(post, names, places))
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(part, folder)
    make_names_durable(folder)


def _check(splits: object) -> tuple[str, ...] | None:
    """Check the splits; return the class names, or None for references."""
    kinds = {type(each) for each in splits.values()} if isinstance(splits, Mapping) else {object}
    if len(kinds) > 1 or not kinds <= {Posts, References}:
        raise TypeError(f"splits must be a dict of names to Posts, or to References, got {splits!r:.120}")
    if not splits:
        raise ValueError("splits must have at least one split, got none")
    if bad := [name for name in splits if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise ValueError(f"a split's name becomes a file name: expected letters, digits, . _ and -, got {bad[0]!r}")
    if kinds == {References}:
        return None
    (first, names), *others = ((split, posts.class_names) for split, posts in splits.items())
    for split, other in others:
        if other != names:
            raise ValueError(f"splits must have the same classes: {first} has {names!r:.200}, {split} {other!r:.200}")
    if bad := [name for name in names if not name.strip() or name != name.strip() or "\n" in name or not is_unicode(name)]:
        raise ValueError(f"a class is a line of labels.txt: expected a name without outer white space or line ends, got {bad[0]!r}")
    return names


def _line(post: Post, names: tuple[str, ...], places: "_Places") -> Iterator[tuple[str, Any]]:
    yield "id", post.id
    yield "text", post.text
    if post.image is not None:
        yield "img", places.image(post)
    if isinstance(post.label, tuple):
        yield "label", [name for name, present in zip(names, post.label, strict=True) if present]
    elif post.label is not None:
        yield "label", names[post.label]
    # a null "audio" tells the reader that this sample needs no image
    if post.audio is not None or (post.image is None and not post.frames):
        yield "audio", None if post.audio is None else places.file("audio", post.audio)
    if post.frames:
        yield "frames", [places.file("frames", frame) for frame in post.frames]


def _reference(reference: Reference, split: str, places: "_Places") -> dict[str, Any]:
    if isinstance(reference.segmentation, Path):
        mask = places.file("masks", reference.segmentation)
    else:
        mask = places.mask(split, reference)
    return {"id": reference.id, "texts": list(reference.phrases), "img": places.file("images", reference.image), "mask": mask}


class _Places:
    """Assigns each file a place in the new folder: KIND/NAME OF ITS PARENT FOLDER/FILE NAME."""

    def __init__(self, root: Path, put: Callable[[Path, Path], Any]):
        self._root, self._put = root, put
        self._of: dict[Path | Hdf5Image, str] = {}
        self._taken: set[str] = set()

    def image(self, post: Post) -> str:
        image = post.image
        if not isinstance(image, Hdf5Image):
            return self.file("images", image)
        if image not in self._of:
            place = self._new("images", image.file.stem, f"{image.index}.png")
            post.open_image().save(self._root / place)
            self._of[image] = place
        return self._of[image]

    def mask(self, split: str, reference: Reference) -> str:
        place = self._new("masks", split, f"{reference.id}.png")
        pillow().fromarray(reference.open_mask().astype("uint8") * 255).save(self._root / place)
        return place

    def file(self, kind: str, source: Path) -> str:
        if source not in self._of:
            place = self._new(kind, source.parent.name, source.name)
            self._put(source, self._root / place)
            self._of[source] = place
        return self._of[source]

    def _new(self, kind: str, folder: str, name: str) -> str:
        """Reserve a place that no other file has, not even on a case-insensitive disk."""
        number = 1
        while (place := f"{kind}/{folder or 'files'}{f'-{number}' if number > 1 else ''}/{name}").casefold() in self._taken:
            number += 1
        self._taken.add(place.casefold())
        (self._root / place).parent.mkdir(parents=True, exist_ok=True)
        return place
