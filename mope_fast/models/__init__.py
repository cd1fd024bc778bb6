"""Whole fused models."""

from .fusion import MoPEFusion
from .output import FusionOutput

__all__ = ["FusionOutput", "MoPEFusion"]
