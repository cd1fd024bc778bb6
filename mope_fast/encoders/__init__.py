"""Prompts for frozen encoders: one small adapter for each encoder family."""

from . import multihead as _multihead  # noqa: F401
from . import timm as _timm  # noqa: F401
from . import timm_positions as _timm_positions  # noqa: F401
from . import transformers as _transformers  # noqa: F401
from . import vit_pytorch as _vit_pytorch  # noqa: F401  these imports register the encoder families
from .attachment import Encoded, PromptProvider, prefixes_of, unwrap_encoder
from .families import EncoderFamily, Inputs, PromptedLayer, encode, family_of, find_family, register_encoder, supported_encoders
from .pooling import Pool, first_token, last_real_token, masked_mean, token_at, token_mean
from .prompted import PromptedEncoder
from .transformers import register_transformers_encoder

__all__ = [
    "Encoded",
    "EncoderFamily",
    "Inputs",
    "Pool",
    "PromptProvider",
    "PromptedEncoder",
    "PromptedLayer",
    "encode",
    "family_of",
    "find_family",
    "first_token",
    "last_real_token",
    "masked_mean",
    "prefixes_of",
    "register_encoder",
    "register_transformers_encoder",
    "supported_encoders",
    "token_at",
    "token_mean",
    "unwrap_encoder",
]
