"""The published sets by name, with their published sample counts."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..posts import Posts
from ..referring import References
from . import food101, hateful_memes, mm_imdb, mustard, refcoco, snli_ve

ALL = ()
"""Stands for the whole set in place of names of splits."""


@dataclass(frozen=True)
class PublishedSet:
    """A published set, its reader, and its published sample counts.

    Attributes:
        read: reader; maps the folder to a dict from split to samples.
        classes: number of classes; 0 for references.
        counts: names of one or several splits, or :data:`ALL` -> source -> number of samples, including those that the reader
            leaves out. If sources differ, each has an entry.
    """

    title: str
    read: Callable[..., dict[str, Posts] | dict[str, References]]
    classes: int
    counts: Mapping[tuple[str, ...], Mapping[str, int]]


_UMD_OR_GOOGLE = "umd's split", "google's"
_COUNTS: dict[str, dict[tuple[str, ...], dict[str, int]]] = {
    "refcoco": {("train",): {"unc's split": 42_404}, ("val",): {"unc's split": 3_811}, ("testA",): {"unc's split": 1_975}}
    | {("testB",): {"unc's split": 1_810}},
    "refcoco+": {("train",): {"the authors": 42_278}, ("val",): {"the authors": 3_805}, ("testA",): {"the authors": 1_975}}
    | {("testB",): {"the authors": 1_798}},
    "refcocog": {
        ("train",): dict(zip(_UMD_OR_GOOGLE, (42_226, 44_822), strict=True)),
        ("val",): dict(zip(_UMD_OR_GOOGLE, (2_573, 5_000), strict=True)),
    },
}
PUBLISHED_SETS = {
    "food101": PublishedSet(
        food101.TITLE,
        food101.read_food101,
        101,
        {("test",): {"test_titles.csv": 22_716}, ALL: {"MoPE's paper": 90_840}},
    ),
    "mm-imdb": PublishedSet(
        mm_imdb.TITLE,
        mm_imdb.read_mm_imdb,
        23,
        {
            ("train",): {"the authors": 15_552},
            ("val",): {"the authors": 2_608},
            ("test",): {"the authors": 7_799},
            ALL: {"the authors": 25_959, "MoPE's paper": 25_956},
        },
    ),
    "snli-ve": PublishedSet(
        snli_ve.TITLE,
        snli_ve.read_snli_ve,
        3,
        {
            ("train",): {"the authors": 529_527},
            ("val",): {"the authors": 17_858},
            ("test",): {"the authors": 17_901},
            ALL: {"the authors and MoPE's paper": 565_286},
        },
    ),
    "mustard": PublishedSet(
        mustard.TITLE,
        mustard.read_mustard,
        2,
        {
            ("train", "val"): {"the authors and MoPE's release": 334},
            ("test",): {"the authors and MoPE's release": 356},
            ALL: {"the authors": 690},
        },
    ),
    "hateful-memes": PublishedSet(
        hateful_memes.TITLE,
        hateful_memes.read_hateful_memes,
        2,
        {
            ("train",): {"the authors": 8_500},
            ("val",): {"the authors, seen": 500, "unseen": 540},
            ("test",): {"the authors, seen": 1_000, "unseen": 2_000},
        },
    ),
    **{
        name: PublishedSet(title, functools.partial(refcoco.read_refcoco, variant=name), 0, _COUNTS[name])
        for name, title in refcoco.TITLES.items()
    },
}
"""Name on the command line -> set."""


def compare_counts(name: str, splits: Mapping[str, Posts | References]) -> list[str]:
    """Compare the number of samples that a reader found with the published counts.

    Samples that the reader left out are counted too, because the published counts are of the whole set.

    Args:
        name: a key of :data:`PUBLISHED_SETS`.
        splits: the splits that its reader returned.

    Returns:
        A sentence for each difference; an empty list if all counts are as published.

    Raises:
        ValueError: ``name`` is not a key of :data:`PUBLISHED_SETS`.
    """
    if name not in PUBLISHED_SETS:
        raise ValueError(f"name must be one of {list(PUBLISHED_SETS)}, got {name!r}")
    published, found = PUBLISHED_SETS[name], []
    for part, counts in published.counts.items():
        got = count(splits, part or tuple(splits))
        if got not in counts.values():
            said = ", ".join(f"{expected:,} by {who}" for who, expected in counts.items())
            found.append(f"{' + '.join(part) or 'all'}: {got:,} samples are here, {said}")
    classes = {len(posts.class_names) for posts in splits.values()}
    if classes != {published.classes}:
        found.append(f"{', '.join(map(str, sorted(classes)))} classes are here, {published.classes} are published")
    return found


def count(splits: Mapping[str, Posts | References], part: Sequence[str]) -> int:
    """Return the number of samples of these splits, including those that were left out."""
    return sum(len(posts) + sum(map(len, posts.dropped.values())) for name, posts in splits.items() if name in part)
