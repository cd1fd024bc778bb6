"""RefCOCO, RefCOCO+ and RefCOCOg: which object of a picture does a phrase name?"""

import json
import os
import re
from collections.abc import Iterable
from typing import Any

from ..lines import check_choice, decoded, is_unicode, problems_in
from ..plain_pickle import load_plain_pickle
from ..referring import Reference, References
from .common import NO_IMAGE, Reading, field

TITLES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}
_SPLIT_BY = {"refcoco": ("unc", "google"), "refcoco+": ("unc",), "refcocog": ("umd", "google")}
_IMAGES = ("../images/mscoco/images/train2014", "../images/train2014", "../train2014", "train2014", "images")


def read_refcoco(
    folder: str | os.PathLike[str],
    variant: str = "refcoco",
    *,
    split_by: str | None = None,
    images: str | os.PathLike[str] | None = None,
    missing_images: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> dict[str, References]:
    """Read RefCOCO, RefCOCO+ (Yu et al. 2016) or RefCOCOg (Mao et al. 2016) as published with the REFER toolkit.

    ``refs(<split_by>).p`` is a pickled list of objects, each with ``ref_id``, ``ann_id``, ``image_id``, ``split`` and
    ``sentences``, whose ``sent`` are the phrases. ``instances.json`` has COCO's ``images`` and ``annotations`` with their
    ``segmentation``. The pickle is read as data: nothing that it names is imported or called.

    Written from public code and descriptions, not run on the owner's files.

    Args:
        folder: the folder of one set, such as ``refcoco+``, with these two files.
        variant: "refcoco", "refcoco+" or "refcocog".
        split_by: "unc" (default) or "google" for RefCOCO, "unc" for RefCOCO+, "umd" (default) or "google" for RefCOCOg.
        images: folder of COCO's train2014, absolute or relative to ``folder``. Default: the first that exists of those that REFER
            and others use, beside the sets (``../images/mscoco/images/train2014``, ...) or in ``folder``.
        missing_images: "error", or "skip" to leave out objects whose picture is missing and list them in ``dropped["no image"]``.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Returns:
        The splits that the file names, such as train, val, testA, testB.

    Raises:
        FileNotFoundError: the folder or a file does not exist, or the folder is of another set, which the message names.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: an argument has another value, or the set has problems. One exception lists the first ten and the number of all.
    """
    check_choice("variant", variant, tuple(TITLES))
    split_by = _SPLIT_BY[variant][0] if split_by is None else split_by
    check_choice("split_by", split_by, _SPLIT_BY[variant])
    check_choice("missing_images", missing_images, ("error", "skip"))
    reading = Reading(folder, TITLES[variant], missing_images, outside)
    root = reading.root
    places = [root / each for each in (_IMAGES if images is None else (images,))]
    pictures = next((each for each in places if each.is_dir()), places[0])
    reading.files.allow(pictures)
    if missing_images == "error" and not pictures.is_dir():
        raise FileNotFoundError(f"{pictures} does not exist: expected the folder of COCO's train2014; pass it as images=...")
    path = root / f"refs({split_by}).p"
    if (file := reading.files.find(path)) is None:
        raise FileNotFoundError(f"{path} does not exist: expected REFER's file of that name")
    with open(file, "rb") as opened:
        try:
            refs = load_plain_pickle(opened, encoding="latin1")
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
    if not isinstance(refs, list):
        raise ValueError(f"{path} must be a list of objects, got a {type(refs).__name__}")
    try:
        instances = json.loads(decoded(reading.read_bytes(root / "instances.json")))
        of_coco = {name: {row["id"]: row for row in instances[name]} for name in ("images", "annotations")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{root / 'instances.json'} is not in COCO's format ({type(error).__name__}: {error})") from None
    splits: dict[str, list[Reference]] = {}
    dropped: dict[str, list[str]] = {}
    for position, row in enumerate(refs):
        try:
            split, reference, picture = _reference(row, of_coco)
            splits.setdefault(split, [])
            if (found := reading.image(pictures / picture)) is None:
                dropped.setdefault(split, []).append(reference["id"])
            else:
                splits[split].append(Reference(image=found, **reference))
        except ValueError as error:
            reading.problem(f"{path}, object {position}", error)
    if not splits and not reading.problems:
        reading.problem(path, "it contains no object")
    if reading.problems:
        raise problems_in(root, reading.problems)
    return {split: References(tuple(own), {NO_IMAGE: dropped.get(split, [])}) for split, own in splits.items()}


def _reference(row: Any, of_coco: dict[str, dict[Any, Any]]) -> tuple[str, dict[str, Any], str]:
    """Return a reference's split, its keyword arguments, and the file name of its picture."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {row!r:.120}")
    split, ref, sentences = field(row, "split", str, "a name"), field(row, "ref_id", int, "a number"), row.get("sentences")
    if not re.fullmatch(r"\w+", split, re.ASCII):
        raise ValueError(f"split {split!r:.80} is not a name")
    sentences = sentences if isinstance(sentences, list) else [None]
    phrases = [sentence.get("sent") if isinstance(sentence, dict) else None for sentence in sentences]
    if not phrases or not all(isinstance(phrase, str) and is_unicode(phrase) for phrase in phrases):
        raise ValueError(f"each of sentences must have a string under sent, got {sentences!r:.120}")
    annotation, image = of_coco["annotations"].get(row.get("ann_id")), of_coco["images"].get(row.get("image_id"))
    if annotation is None or image is None:
        what = "annotation" if annotation is None else "image"
        raise ValueError(f"{what} {row.get('ann_id' if annotation is None else 'image_id')!r:.80} is not in instances.json")
    if not isinstance(segmentation := annotation.get("segmentation"), (list, dict)):
        raise ValueError(f"annotation {row['ann_id']}: segmentation must be polygons or run lengths, got {segmentation!r:.80}")
    height, width = (field(image, name, int, "pixels") for name in ("height", "width"))
    name = field(image, "file_name", str, "a name")
    # checked because it becomes a path
    if not re.fullmatch(r"[\w-]+\.\w+", name, re.ASCII):
        raise ValueError(f"file_name {name!r:.80} of its image is not a file name")
    reference = {"id": str(ref), "phrases": tuple(phrases), "segmentation": segmentation, "size": (height, width)}
    return split, reference, name
