"""References: phrases that refer to one object of a picture, with the object's mask."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from .folder import Folder
from .images import load_image, pillow
from .lines import is_unicode, json_object, problems_in, read_lines

if TYPE_CHECKING:
    from PIL import Image

_EXPECTED = "expected a line with id, texts, img and mask for each object"
Segmentation = list[list[float]] | Mapping[str, Any] | Path
"""COCO polygons, COCO run lengths, or the path of a picture that is nonzero at the object's pixels."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One object of a picture.

    Attributes:
        phrases: referring phrases; each one alone identifies the object.
        size: height and width of the picture in pixels; needed if the segmentation is in COCO's format.
    """

    id: str
    phrases: tuple[str, ...]
    image: Path
    segmentation: Segmentation
    size: tuple[int, int] | None = None

    def open_image(self) -> "Image.Image":
        """Open the picture as a viewer shows it, in RGB (:func:`load_image`).

        Raises:
            ImportError: Pillow is not installed.
            OSError: the picture is missing (FileNotFoundError), or can't be shown; the message names it.
        """
        return load_image(self.image)

    def open_mask(self) -> np.ndarray:
        """Load the object's mask, bool (H, W), True at its pixels.

        Raises:
            ImportError: pycocotools (for COCO segmentations) or Pillow is not installed.
            OSError: a mask picture is missing or can't be read.
            ValueError: the segmentation is not in one of COCO's formats.
        """
        if isinstance(self.segmentation, Path):
            try:
                with pillow().open(self.segmentation) as mask:
                    values = np.asarray(mask)
            except OSError as error:
                raise type(error)(f"the mask of reference {self.id} can't be read: {self.segmentation} ({error})") from error
            return values.any(-1) if values.ndim == 3 else values != 0
        return _decoded(self)


def _decoded(reference: Reference) -> np.ndarray:
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError("COCO segmentations need pycocotools: pip install 'mope_fast[data]'") from error
    segmentation, (height, width) = reference.segmentation, reference.size
    try:
        if isinstance(segmentation, Mapping) and not isinstance(segmentation["counts"], list):
            runs = dict(segmentation)
        else:
            runs = coco.frPyObjects(segmentation, height, width)
            runs = coco.merge(runs) if isinstance(runs, list) else runs
        mask = coco.decode(runs).astype(bool)
    except Exception as error:  # pycocotools raises many types
        raise ValueError(f"the segmentation of reference {reference.id} can't be read ({type(error).__name__}: {error})") from error
    if mask.shape != (height, width):
        raise ValueError(f"the segmentation of reference {reference.id} has shape {mask.shape}, its picture {(height, width)}")
    return mask


@dataclass(frozen=True, repr=False)
class References(Sequence[Reference]):
    """References of one split, in its order. An integer index gives a :class:`Reference`, a slice ``References``.

    Attributes:
        dropped: the reasons why the reader left references out -> their ids.
    """

    references: tuple[Reference, ...]
    dropped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    class_names = ()

    def __len__(self) -> int:
        return len(self.references)

    @overload
    def __getitem__(self, index: int) -> Reference: ...
    @overload
    def __getitem__(self, index: slice) -> "References": ...
    def __getitem__(self, index: int | slice) -> "Reference | References":
        return References(self.references[index]) if isinstance(index, slice) else self.references[index]

    def __repr__(self) -> str:
        phrases = sum(len(reference.phrases) for reference in self.references)
        dropped = "".join(f"; dropped, {reason}: {len(ids)}" for reason, ids in self.dropped.items())
        return f"References({len(self)}; {phrases} phrases{dropped})"


def read_reference_folder(
    root: str | os.PathLike[str], splits: Iterable[str] | None = None, *, outside: Iterable[str | os.PathLike[str]] = ()
) -> dict[str, References]:
    """Read a folder of JSON Lines files with masks.

    Each line of ``<split>.jsonl`` is ``{"id": ..., "texts": [...], "img": ..., "mask": ...}``, or has ``"text"`` for a single
    phrase. ``img`` and ``mask`` are paths relative to ``root``. A mask is a picture of the same size that is 0 outside the object.

    Args:
        root: the folder.
        splits: names of the splits to read; default: every ``*.jsonl`` file in the folder.
        outside: folders outside of ``root`` that its files may be in too.

    Raises:
        FileNotFoundError: a file does not exist, or the folder has no ``*.jsonl`` file.
        OSError: a file or folder can't be read.
        TypeError: ``splits`` or ``outside`` is not a list.
        ValueError: a file has problems. One exception lists the first ten with their lines, and the number of all.
    """
    if isinstance(splits, str):
        raise TypeError(f"splits must be a list of names, got {splits!r}: give [{splits!r}]")
    root = Path(root)
    folder = Folder(root, outside)
    names = sorted(path.stem for path in root.glob("*.jsonl")) if splits is None else list(splits)
    if not names:
        raise FileNotFoundError(
            f"{root} has no file like train.jsonl: expected a line with id, texts, img and mask for each object"
        )
    return {name: _read_split(folder, root / f"{name}.jsonl") for name in names}


def _read_split(folder: Folder, path: Path) -> References:
    if (found := folder.find(path)) is None:
        raise FileNotFoundError(f"{path} does not exist: {_EXPECTED}")
    problems, references = [], []
    for number, line in read_lines(found):
        try:
            row = json_object(line)
            if "id" not in row or not ({"text", "texts"} & row.keys()):
                raise ValueError(f"expected fields id, texts, img and mask, got {list(row)!r:.120}")
            phrases = row["texts"] if "texts" in row else [row["text"]]
            if (
                not isinstance(phrases, list)
                or not phrases
                or not all(isinstance(text, str) and is_unicode(text) for text in phrases)
            ):
                raise ValueError(f"texts must be a list of strings, got {phrases!r:.120}")
            references.append(Reference(str(row["id"]), tuple(phrases), *(_file(folder, row, name) for name in ("img", "mask"))))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if not references and not problems:
        problems = ["the file is empty"]
    if problems:
        raise problems_in(path, problems)
    return References(tuple(references))


def _file(folder: Folder, row: Mapping[str, Any], name: str) -> Path:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f'field "{name}": expected a path, got {value!r:.120}')
    if (found := folder.find(folder.root / value)) is None:
        raise ValueError(f'field "{name}": {folder.root / value} does not exist')
    return found
