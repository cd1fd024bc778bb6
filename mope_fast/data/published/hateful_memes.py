"""Hateful Memes: is a picture with its caption hateful?"""

import os
from collections.abc import Iterable

from ..lines import check_choice, json_object, read_lines
from ..posts import Posts
from .common import NO_IMAGE, Reading, Split, field

TITLE = "Hateful Memes"
CLASSES = ("not hateful", "hateful")


def read_hateful_memes(
    folder: str | os.PathLike[str],
    *,
    part: str = "seen",
    missing_images: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> dict[str, Posts]:
    """Read Hateful Memes (Kiela et al. 2020) as published: 0 is not hateful, 1 hateful.

    ``train.jsonl``, ``dev_seen.jsonl``, ``dev_unseen.jsonl``, ``test_seen.jsonl`` and ``test_unseen.jsonl`` have ``{"id": ...,
    "img": "img/<id>.png", "label": 0 or 1, "text": ...}`` in each line. Test files without labels give samples whose label is
    None. The first release has ``dev.jsonl`` and ``test.jsonl``, which are its "seen" files.

    Written from public code and descriptions, not run on the owner's files.

    Args:
        folder: the folder with the files and ``img``.
        part: which dev and test files to read: "seen", of the paper, or "unseen", of the competition's second phase.
        missing_images: "error", "skip" or "grey", as in :func:`read_jsonl_folder`.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Returns:
        train, val (the authors' dev), and test if its file exists.

    Raises:
        FileNotFoundError: the folder or a file does not exist, or the folder is of another set, which the message names.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: an argument has another value, or the set has problems. One exception lists the first ten and the number of all.
    """
    check_choice("part", part, ("seen", "unseen"))
    reading = Reading(folder, TITLE, missing_images, outside)
    splits = {}
    for name, theirs in {"train": "train", "val": f"dev_{part}", "test": f"test_{part}"}.items():
        path = reading.root / f"{theirs}.jsonl"
        found = reading.files.find(path)
        if found is None and part == "seen":
            found = reading.files.find(reading.root / f"{theirs.removesuffix('_seen')}.jsonl")
        if found is None:
            if name == "test":
                continue
            raise FileNotFoundError(f"{path} does not exist: expected the file of that name of {TITLE}")
        split, with_label, without = Split(reading, NO_IMAGE), None, []
        for number, line in read_lines(found):
            try:
                row = json_object(line)
                label = row.get("label")
                if label is None:
                    without.append(number)
                elif isinstance(label, bool) or label not in (0, 1):
                    raise ValueError(f"field 'label': expected 0 or 1, got {label!r:.80}")
                else:
                    with_label = with_label or number
                picture, text = (field(row, key, str, "a string") for key in ("img", "text"))
                if "id" not in row or isinstance(row["id"], bool) or not isinstance(row["id"], (int, str)):
                    raise ValueError(f"field 'id': expected a number or a string, got {row.get('id')!r:.80}")
                split.add(str(row["id"]), text, reading.image(reading.root / picture), None if label is None else int(label))
            except ValueError as error:
                reading.problem(f"{found}, line {number}", error)
        if with_label or name != "test":
            why = f"has no label, line {with_label} has one" if with_label else "has no label"
            reading.problems += [f"{found}, line {number}: {why}" for number in without]
        splits[name] = split
    return reading.finish(splits, CLASSES)
