"""Whole models: fused, prompt-tuned, and folded for inference."""

from .check_encoder import check_encoder
from .dense import SETRHead, SimplePyramid, segmentation_loss
from .fit_head import fit_head
from .folded import FoldedModel
from .fusion import MoPEFusion
from .mope_baf import BAFConfig, MoPEBAF
from .multi_adapter import MultiAdapter
from .output import FusionOutput
from .prompt_tuned import PromptTuned
from .sides import Side
from .start_prompts import start_prompts
from .vlmo import VLMo, VLMoConfig, VLMoOutput, VLMoProcessor
from .warmup import warmup

__all__ = [
    "BAFConfig",
    "FoldedModel",
    "FusionOutput",
    "MoPEBAF",
    "MoPEFusion",
    "MultiAdapter",
    "PromptTuned",
    "SETRHead",
    "Side",
    "SimplePyramid",
    "VLMo",
    "VLMoConfig",
    "VLMoOutput",
    "VLMoProcessor",
    "check_encoder",
    "fit_head",
    "segmentation_loss",
    "start_prompts",
    "warmup",
]
