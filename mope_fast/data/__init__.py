"""Features of frozen encoders, computed once and kept on disk; readers of samples, batches of them; few-shot training; metrics."""

from .collator import EachFrame, FusionCollator, StackEach, TimmTransform
from .feature_cache import FeatureCache
from .few_shot import FewShotSplit
from .images import load_image
from .jsonl import read_jsonl_folder
from .metrics import Summary, classification_metrics, multi_label_metrics, summarize
from .posts import Post, Posts
from .readers import read_mvsa_single, read_twitter_sarcasm
from .recipe import FewShotRecipe, FewShotRun, predict

__all__ = [
    "EachFrame",
    "FeatureCache",
    "FewShotRecipe",
    "FewShotRun",
    "FewShotSplit",
    "FusionCollator",
    "Post",
    "Posts",
    "StackEach",
    "Summary",
    "TimmTransform",
    "classification_metrics",
    "load_image",
    "multi_label_metrics",
    "predict",
    "read_jsonl_folder",
    "read_mvsa_single",
    "read_twitter_sarcasm",
    "summarize",
]
