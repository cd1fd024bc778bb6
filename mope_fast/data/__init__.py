"""Data tools: an on-disk cache of frozen encoders' features, readers of data sets, batch collation, few-shot training, metrics."""

from .audio import load_audio
from .collator import EachFrame, FusionCollator, StackEach, TimmTransform
from .feature_cache import FeatureCache
from .few_shot import FewShotSplit
from .images import load_image
from .jsonl import read_jsonl_folder
from .metrics import Summary, classification_metrics, multi_label_metrics, overlap_metrics, segmentation_metrics, summarize
from .posts import Post, Posts
from .published import (
    PUBLISHED_SETS,
    compare_counts,
    read_food101,
    read_hateful_memes,
    read_mm_imdb,
    read_mustard,
    read_refcoco,
    read_snli_ve,
)
from .readers import read_mvsa_single, read_twitter_sarcasm
from .recipe import FewShotRecipe, FewShotRun, predict
from .referring import Reference, References, read_reference_folder
from .writer import write_jsonl_folder

__all__ = [
    "PUBLISHED_SETS",
    "EachFrame",
    "FeatureCache",
    "FewShotRecipe",
    "FewShotRun",
    "FewShotSplit",
    "FusionCollator",
    "Post",
    "Posts",
    "Reference",
    "References",
    "StackEach",
    "Summary",
    "TimmTransform",
    "classification_metrics",
    "compare_counts",
    "load_audio",
    "load_image",
    "multi_label_metrics",
    "overlap_metrics",
    "predict",
    "read_food101",
    "read_hateful_memes",
    "read_jsonl_folder",
    "read_mm_imdb",
    "read_mustard",
    "read_mvsa_single",
    "read_refcoco",
    "read_reference_folder",
    "read_snli_ve",
    "read_twitter_sarcasm",
    "segmentation_metrics",
    "summarize",
    "write_jsonl_folder",
]
