"""Whole models: fused, prompt-tuned, and folded for inference."""

from .folded import FoldedModel
from .fusion import MoPEFusion
from .output import FusionOutput
from .prompt_tuned import PromptTuned

__all__ = ["FoldedModel", "FusionOutput", "MoPEFusion", "PromptTuned"]
