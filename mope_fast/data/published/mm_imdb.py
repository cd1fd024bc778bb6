"""MM-IMDB: the genres of a movie, by its poster and its plot."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..images import Hdf5Image, hdf5
from ..lines import decoded, json_object
from ..plain_pickle import load_pickled_object
from ..posts import Posts
from .common import NO_IMAGE, Reading, Split, field

TITLE = "MM-IMDB"
GENRES = (
    "Drama", "Family", "Comedy", "Biography", "Romance", "War", "Thriller", "History", "Crime", "Music", "Action", "Animation",
    "Adventure", "Musical", "Horror", "Western", "Documentary", "Sport", "Mystery", "Short", "Sci-Fi", "Film-Noir", "Fantasy",
)  # fmt: skip
"""The 23 classes, in the order of MoPE's release."""
_LEFT_OUT = {"News", "Reality-TV", "Talk-Show"}
_TELEVISION, _OTHER, _NO_PLOT = "News, Reality-TV or Talk-Show", "a genre of no class", "no plot"
_SPLITS = {"train": "train", "val": "dev", "test": "test"}


def read_mm_imdb(
    folder: str | os.PathLike[str], *, missing_images: str = "error", outside: Iterable[str | os.PathLike[str]] = ()
) -> dict[str, Posts]:
    """Read MM-IMDB (Arevalo et al. 2017) in either format of its authors: 23 genres, several per movie.

    **Files**: ``split.json`` has ids under train, dev and test. ``dataset/<id>.json`` has ``plot``, a list of texts of which the
    longest is used, and ``genres``, a list of names. ``dataset/<id>.jpeg`` is the poster. Movies of the genres News, Reality-TV or
    Talk-Show are left out, as by the scripts of MMBT and MoPE. So are movies with any other genre than the 23, and those with an
    empty plot. ``dropped`` lists them. Bytes that aren't UTF-8 are read as Windows-1252.

    **HDF5**, if ``split.json`` does not exist: ``multimodal_imdb.hdf5`` and ``metadata.npy``, which has the vocabulary. Texts are
    made of ``sequences``: lower-case words, numbers as "N", as the authors' ``make_dataset.py`` leaves them. Posters are 160 x 256
    pixels and are read when they are opened. This format has only the 23 genres, so no movie is left out by its genre, and results
    on it can't be compared with results on the files. ``metadata.npy`` is a pickle: it is read as data, and nothing that it names
    is called.

    Written from public code and descriptions, not run on the owner's files.

    Args:
        folder: the folder with ``split.json`` and ``dataset``, or with ``multimodal_imdb.hdf5``.
        missing_images: "error", "skip" or "grey", as in :func:`read_jsonl_folder`.
        outside: other folders that a link may lead to; a file that is anywhere else is an error.

    Returns:
        train, val (the authors' dev), test.

    Raises:
        FileNotFoundError: the folder or a file does not exist, or the folder is of another set, which the message names.
        ImportError: h5py, which the HDF5 format needs, is not installed.
        OSError: a file or folder can't be read.
        TypeError: ``outside`` is not a list.
        ValueError: ``missing_images`` has another value, or the set has problems. One exception has the first ten and the number.
    """
    reading = Reading(folder, TITLE, missing_images, outside)
    return _read_files(reading) if (reading.root / "split.json").exists() else _read_hdf5(reading)


def _read_files(reading: Reading) -> dict[str, Posts]:
    path = reading.root / "split.json"
    try:
        ids = json_object(decoded(reading.read_bytes(path)))
        ids = {name: field(ids, theirs, list, "a list of ids") for name, theirs in _SPLITS.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    index, seen = {genre: i for i, genre in enumerate(GENRES)}, set()
    splits = {name: Split(reading, _TELEVISION, _OTHER, _NO_PLOT, NO_IMAGE) for name in ids}
    for name, split in splits.items():
        for movie in ids[name]:
            # checked because it becomes a path
            if not re.fullmatch(r"\w+", movie, re.ASCII) or movie in seen:
                reading.problem(path, f"id {movie!r:.80} " + ("occurs twice" if movie in seen else "is no id"))
                continue
            seen.add(movie)
            file = reading.root / "dataset" / f"{movie}.json"
            try:
                row = json_object(decoded(reading.read_bytes(file)))
                genres = field(row, "genres", list, "a list of names")
                plot = max(field(row, "plot", list, "a list of strings"), key=len, default="")
                if not _LEFT_OUT.isdisjoint(genres):
                    split.dropped[_TELEVISION].append(movie)
                elif not index.keys() >= set(genres):
                    split.dropped[_OTHER].append(movie)
                elif not plot.strip():
                    split.dropped[_NO_PLOT].append(movie)
                else:
                    poster = reading.image(file.with_suffix(".jpeg"), file.with_suffix(".jpg"))
                    split.add(movie, plot, poster, tuple(int(genre in genres) for genre in GENRES))
            except (ValueError, FileNotFoundError) as error:
                reading.problem(file, error)
    return reading.finish(splits, GENRES)


def _read_hdf5(reading: Reading) -> dict[str, Posts]:
    path, words = reading.files.find(reading.root / "multimodal_imdb.hdf5"), reading.files.find(reading.root / "metadata.npy")
    if words is None:
        raise FileNotFoundError(f"{reading.root / 'metadata.npy'} does not exist: it has the vocabulary of multimodal_imdb.hdf5")
    vocabulary = load_pickled_object(words)
    vocabulary = vocabulary.get("ix_to_word") if isinstance(vocabulary, dict) else None
    if not isinstance(vocabulary, dict) or not all(isinstance(word, str) for word in vocabulary.values()):
        raise ValueError(f"{words} must have ix_to_word, a dict from numbers to words")
    try:
        file = hdf5().File(path, "r")
    except OSError as error:
        raise OSError(f"{path} can't be read as HDF5 ({error})") from error
    with file:
        try:
            ranges = _ranges(file)
            genres, ids, sequences = (file[name][:] for name in ("genres", "imdb_ids", "sequences"))
            names = tuple(json.loads(file["genres"].attrs["target_names"]))
            shape, some = file["images"].shape, file["images"][:8]
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path} is not as make_dataset.py of MM-IMDB's authors writes it: {error}") from None
    count = len(ids)
    if genres.shape != (count, len(names)) or len(sequences) != count or len(shape) != 4 or shape[:2] != (count, 3):
        shapes = f"images {shape}, genres {genres.shape}, {len(names)} names of genres, {len(sequences)} sequences, {count} ids"
        raise ValueError(f"{path} must have images (N, 3, H, W), genres (N, names) and N ids and sequences, got {shapes}")
    class_names = GENRES if set(names) == set(GENRES) else names
    order = [names.index(genre) for genre in class_names]
    # make_dataset.py stores Caffe inputs (mean subtracted): one poster may lack negative values, all of the first eight won't
    caffe = bool((some < 0).any())
    splits = {name: Split(reading, _NO_PLOT) for name in _SPLITS}
    for name, split in splits.items():
        start, stop = ranges[_SPLITS[name]]
        for i in range(max(start, 0), min(stop, count)):
            movie = ids[i].decode("ascii", "replace")
            if unknown := [number for number in sequences[i].tolist() if number not in vocabulary]:
                reading.problem(f"{path}, movie {movie}", f"word {unknown[0]} is not in metadata.npy")
            elif not len(sequences[i]):
                split.dropped[_NO_PLOT].append(movie)
            elif not np.isin(genres[i], (0, 1)).all():
                reading.problem(f"{path}, movie {movie}", f"genres must be 0 or 1, got {genres[i].tolist()}")
            else:
                plot = " ".join(vocabulary[number] for number in sequences[i].tolist())
                split.add(movie, plot, Hdf5Image(path, "images", i, caffe), tuple(genres[i][order].tolist()))
    return reading.finish(splits, class_names)


def _ranges(file: Any) -> dict[str, tuple[int, int]]:
    """Return the row range (start, stop) of each split, as stored by Fuel."""
    rows = [row for row in file.attrs["split"] if row["source"] == b"genres" and row["available"]]
    ranges = {row["split"].decode(): (int(row["start"]), int(row["stop"])) for row in rows}
    if lacking := set(_SPLITS.values()) - ranges.keys():
        raise ValueError(f"the splits lack {sorted(lacking)}")
    return ranges
