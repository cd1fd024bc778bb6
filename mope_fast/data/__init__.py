"""Features of frozen encoders, computed once and kept on disk; few-shot splits, training and metrics; readers of posts."""

from .feature_cache import FeatureCache
from .few_shot import FewShotSplit
from .metrics import Summary, classification_metrics, summarize
from .posts import Post, Posts
from .readers import read_mvsa_single, read_twitter_sarcasm
from .recipe import FewShotRecipe, FewShotRun, predict

__all__ = [
    "FeatureCache",
    "FewShotRecipe",
    "FewShotRun",
    "FewShotSplit",
    "Post",
    "Posts",
    "Summary",
    "classification_metrics",
    "predict",
    "read_mvsa_single",
    "read_twitter_sarcasm",
    "summarize",
]
