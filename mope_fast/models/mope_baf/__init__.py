"""MoPE-BAF: prompts with restricted receptive fields and block-aware fusion on VLMo."""

from .config import BAFConfig
from .model import MoPEBAF

__all__ = ["BAFConfig", "MoPEBAF"]
