"""MUStARD: is an utterance in a television show sarcastic?"""

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..lines import check_choice, decoded, json_object
from ..posts import Post, Posts
from .common import Reading, Split, field, hold_out

TITLE = "MUStARD"
CLASSES = ("not sarcastic", "sarcastic")
_FRAMES = ("utterances_final/filtered", "frames/utterances_final", "frames")
_TRAIN = 334
_NO_AUDIO, _NO_FRAMES = "no sound", "no frames"


def read_mustard(
    folder: str | os.PathLike[str],
    *,
    split: str = "speaker-dependent",
    val: int = 34,
    seed: int = 0,
    frames: str | os.PathLike[str] | None = None,
    num_frames: int | None = 8,
    missing_media: str = "error",
    outside: Iterable[str | os.PathLike[str]] = (),
) -> dict[str, Posts]:
    """Read MUStARD (Castro et al. 2019) as published: 0 is not sarcastic, 1 sarcastic; text, sound and frames of a video.

    ``sarcasm_data.json``, or ``data/sarcasm_data.json``, has for each id ``utterance``, ``speaker``, ``show``, ``sarcasm`` and a
    context that isn't read. The text is "SPEAKER: utterance", as in MoPE's released code. The published videos,
    ``utterances_final/<id>.mp4``, aren't read: convert each with ffmpeg to ``utterances_final/<id>.wav`` and a folder ``<id>`` of
    frames, whose names sort in their order.

    Written from public code and descriptions, not run on the owner's videos; the authors' ``sarcasm_data.json`` was read.

    Args:
        folder: the folder with ``sarcasm_data.json`` and ``utterances_final``.
        split: "speaker-dependent", as in MoPE's released code: the first 334 are train, the others test. "speaker-independent", as
            by the authors: the 356 utterances of the show FRIENDS are test, the others train.
        val: number of train samples to hold out as val, stratified by class; 0 for none. The released code selects by test.
        seed: seed of that draw.
        frames: folder of the folders of frames, absolute or relative to ``folder``. Default: the first that exists of
            utterances_final/filtered, frames/utterances_final, frames.
        num_frames: how many of an utterance's frames are taken, evenly spaced; None for all.
        missing_media: what to do if the sound or the frames are missing: "error"; "skip" leaves the utterance out and lists it in
            ``dropped["no sound"]`` or ``dropped["no frames"]``; "none" gives a post without that side.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Returns:
        train, val, test.

    Raises:
        FileNotFoundError: the folder or a file does not exist, or the folder is of another set, which the message names.
        ImportError: scikit-learn, which draws val, is not installed.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: an argument has another value, or the set has problems. One exception lists the first ten and the number of all.
    """
    check_choice("split", split, ("speaker-dependent", "speaker-independent"))
    check_choice("missing_media", missing_media, ("error", "skip", "none"))
    if num_frames is not None and (not isinstance(num_frames, int) or isinstance(num_frames, bool) or num_frames < 1):
        raise ValueError(f"num_frames must be an integer >= 1 or None for all, got {num_frames!r}")
    reading = Reading(folder, TITLE, "error", outside)
    root = reading.root
    if frames is not None:  # a folder named explicitly may be anywhere
        reading.files.allow(root / frames)
    places = _FRAMES if frames is None else (frames,)
    pictures = next((root / each for each in places if (root / each).is_dir()), root / places[0])
    path = next(each for each in (root / "sarcasm_data.json", root / "data" / "sarcasm_data.json") if each.exists())
    try:
        rows = json_object(decoded(reading.read_bytes(path)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    splits = {name: Split(reading, _NO_AUDIO, _NO_FRAMES) for name in ("train", "test")}
    for position, (name, row) in enumerate(rows.items()):
        try:
            post, show = _utterance(name, row)
            of_train = position < _TRAIN if split == "speaker-dependent" else show != "FRIENDS"
            part = splits["train" if of_train else "test"]
            post = replace(post, audio=_sound(reading, name), frames=_frames(reading, pictures / name, num_frames))
            lacking = {_NO_AUDIO: post.audio is None, _NO_FRAMES: not post.frames}
            if any(lacking.values()) and missing_media == "error":
                where = {_NO_AUDIO: root / "utterances_final" / f"{name}.wav", _NO_FRAMES: pictures / name}
                what = "; ".join(f"{why}, {where[why]} does not exist" for why, lacks in lacking.items() if lacks)
                raise ValueError(f"{what}; missing_media='skip' leaves such utterances out, 'none' reads them without")
            if any(lacking.values()) and missing_media == "skip":
                part.dropped[next(why for why, lacks in lacking.items() if lacks)].append(name)
            else:
                part.posts.append(post)
        except ValueError as error:
            reading.problem(f"{path}, {name!r:.80}", error)
    return hold_out(reading.finish(splits, CLASSES), val, seed)


def _utterance(name: str, row: Any) -> tuple[Post, str]:
    """Return an utterance as a post without sound and frames, and its show."""
    # checked because it becomes a path
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise ValueError("the id must be digits and _")
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, got {row!r:.120}")
    text, speaker, show = (field(row, key, str, "a string") for key in ("utterance", "speaker", "show"))
    return Post(name, f"{speaker}: {text}", None, int(field(row, "sarcasm", bool, "true or false"))), show


def _sound(reading: Reading, name: str) -> Path | None:
    return reading.files.find(reading.root / "utterances_final" / f"{name}.wav")


def _frames(reading: Reading, folder: Path, count: int | None) -> tuple[Path, ...]:
    files, _ = reading.files.entries(folder)
    files = [path for path in files if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp")]
    if count is not None and len(files) > count:
        files = [files[(2 * i + 1) * len(files) // (2 * count)] for i in range(count)]
    return tuple(found for path in files if (found := reading.files.find(path)) is not None)
