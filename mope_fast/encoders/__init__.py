"""Prompts for frozen encoders: one small adapter for each encoder family."""

from . import multihead, timm_encoders, timm_positions, vit_pytorch_encoders  # noqa: F401  these imports register the encoder families
from .attachment import Encoded, PromptProvider, prefixes_of, unwrap_encoder
from .families import EncoderFamily, Inputs, PromptedLayer, encode, family_of, find_family, register_encoder, supported_encoders
from .pooling import Pool, first_token, last_real_token, masked_mean, token_at, token_mean
from .prompted import PromptedEncoder
from .transformers_encoders import register_transformers_encoder

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
