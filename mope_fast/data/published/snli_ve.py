"""SNLI-VE: does a picture entail a sentence?"""

import os
import re
from collections.abc import Iterable

from ..lines import json_object, read_lines
from ..posts import Posts
from .common import NO_IMAGE, Reading, Split, field

TITLE = "SNLI-VE"
CLASSES = ("contradiction", "entailment", "neutral")
_IMAGES = ("Flickr30K/flickr30k_images", "flickr30k_images", "flickr30k-images")
_NO_GOLD = "no gold label"


def read_snli_ve(
    folder: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    missing_images: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> dict[str, Posts]:
    """Read SNLI-VE (Xie et al. 2019) as published: 0 is contradiction, 1 entailment, 2 neutral.

    ``snli_ve_train.jsonl``, ``snli_ve_dev.jsonl`` and ``snli_ve_test.jsonl`` have an object in each line: ``Flickr30K_ID`` is the
    picture, ``sentence2`` the text, ``gold_label`` the class, ``pairID`` the id. ``sentence1``, which describes the picture, isn't
    read, as in MoPE's released code. Lines whose ``gold_label`` is "-" are left out and listed in ``dropped["no gold label"]``.

    Written from public code and descriptions, not run on the owner's files.

    Args:
        folder: the folder with the three files.
        images: folder of Flickr30K's ``<Flickr30K_ID>.jpg``, absolute or relative to ``folder``. Default: the first that exists of
            Flickr30K/flickr30k_images, flickr30k_images, flickr30k-images.
        missing_images: "error", "skip" or "grey", as in :func:`read_jsonl_folder`.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Returns:
        train, val (the authors' dev), test.

    Raises:
        FileNotFoundError: the folder or a file does not exist, or the folder is of another set, which the message names.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: ``missing_images`` has another value, or the set has problems. One exception has the first ten and the number.
    """
    reading = Reading(folder, TITLE, missing_images, outside)
    if images is not None:  # a folder named explicitly may be anywhere
        reading.files.allow(reading.root / images)
    places = _IMAGES if images is None else (images,)
    pictures = next((reading.root / each for each in places if (reading.root / each).is_dir()), reading.root / places[0])
    if missing_images == "error" and not pictures.is_dir():
        raise FileNotFoundError(f"{pictures} does not exist: expected the folder of Flickr30K's images; pass it as images=...")
    splits = {}
    for name, theirs in {"train": "train", "val": "dev", "test": "test"}.items():
        path = reading.root / f"snli_ve_{theirs}.jsonl"
        if (found := reading.files.find(path)) is None:
            raise FileNotFoundError(f"{path} does not exist: expected the file of that name of {TITLE}")
        split = splits[name] = Split(reading, _NO_GOLD, NO_IMAGE)
        for number, line in read_lines(found):
            try:
                row = json_object(line)
                pair = str(row.get("pairID", f"{theirs}-{number}"))
                picture, text, label = (field(row, key, str, "a string") for key in ("Flickr30K_ID", "sentence2", "gold_label"))
                if label == "-":
                    split.dropped[_NO_GOLD].append(pair)
                    continue
                if label not in CLASSES:
                    raise ValueError(f"field 'gold_label': expected one of {CLASSES} or '-', got {label!r:.80}")
                # checked because it becomes a path
                if not re.fullmatch(r"\w+", picture, re.ASCII):
                    raise ValueError(f"field 'Flickr30K_ID': expected digits, got {picture!r:.80}")
                split.add(pair, text, reading.image(pictures / f"{picture}.jpg"), CLASSES.index(label))
            except ValueError as error:
                reading.problem(f"{found}, line {number}", error)
    return reading.finish(splits, CLASSES)
