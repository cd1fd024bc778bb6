"""Features of frozen encoders, computed once and kept on disk."""

from .feature_cache import FeatureCache

__all__ = ["FeatureCache"]
