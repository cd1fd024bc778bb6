"""Features of frozen encoders, computed once and kept on disk; few-shot splits, training and metrics; readers of posts."""

from .feature_cache import FeatureCache
from .few_shot import FewShotSplit
from .metrics import Summary, classification_metrics, summarize
from .recipe import FewShotRecipe, FewShotRun, predict

__all__ = [
    "FeatureCache",
    "FewShotRecipe",
    "FewShotRun",
    "FewShotSplit",
    "Summary",
    "classification_metrics",
    "predict",
    "summarize",
]
