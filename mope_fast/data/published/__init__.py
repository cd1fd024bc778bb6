"""Readers of the data sets that MoPE was evaluated on, from the files that their owners publish. Nothing is downloaded."""

from .food101 import read_food101
from .hateful_memes import read_hateful_memes
from .mm_imdb import read_mm_imdb
from .mustard import read_mustard
from .refcoco import read_refcoco
from .sets import PUBLISHED_SETS, PublishedSet, compare_counts
from .snli_ve import read_snli_ve

__all__ = [
    "PUBLISHED_SETS",
    "PublishedSet",
    "compare_counts",
    "read_food101",
    "read_hateful_memes",
    "read_mm_imdb",
    "read_mustard",
    "read_refcoco",
    "read_snli_ve",
]
