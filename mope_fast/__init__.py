"""Routed prompts that fuse frozen pretrained encoders, on Triton kernels in drop-in torch modules."""

from importlib.util import find_spec

if find_spec(f"{__name__}.kernels") is None:
    # without this check, an import from a source tree would work until the first use of a GPU
    raise ImportError(
        f"mope_fast is imported from {__path__[0]}, a source tree whose kernels are in another folder: run from elsewhere, or "
        'make an editable install: pip install -e "."'
    )

from . import functional
from .data import FeatureCache, FusionCollator
from .encoders import (
    PromptedEncoder,
    register_encoder,
    register_transformers_encoder,
    supported_encoders,
    unwrap_encoder,
)
from .models import (
    BAFConfig,
    FoldedModel,
    FusionOutput,
    MoPEBAF,
    MoPEFusion,
    MultiAdapter,
    PromptTuned,
    Side,
    VLMo,
    VLMoConfig,
    VLMoProcessor,
    check_encoder,
    fit_head,
    start_prompts,
    warmup,
)
from .modules import MoPEConfig, MoPELayer, MoPEOutput, PromptAttention, PromptBank, PromptMapper
from .prediction import Prediction, Predictor
from .receptive_field import ReceptiveField

__version__ = "0.1.0"
__all__ = [
    "BAFConfig",
    "FeatureCache",
    "FoldedModel",
    "FusionCollator",
    "FusionOutput",
    "MoPEBAF",
    "MoPEConfig",
    "MoPEFusion",
    "MoPELayer",
    "MoPEOutput",
    "MultiAdapter",
    "Prediction",
    "Predictor",
    "PromptAttention",
    "PromptBank",
    "PromptMapper",
    "PromptTuned",
    "PromptedEncoder",
    "ReceptiveField",
    "Side",
    "VLMo",
    "VLMoConfig",
    "VLMoProcessor",
    "check_encoder",
    "fit_head",
    "functional",
    "register_encoder",
    "register_transformers_encoder",
    "start_prompts",
    "supported_encoders",
    "unwrap_encoder",
    "warmup",
]
