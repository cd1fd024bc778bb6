"""How frozen encoders take prompts: one small adapter a family."""

from . import transformers as _transformers  # noqa: F401  it registers its families
from .families import EncoderFamily, PromptedLayer, find_family, register_encoder, supported_encoders
from .prompted import PromptedEncoder, prefixes_of

__all__ = [
    "EncoderFamily",
    "PromptedEncoder",
    "PromptedLayer",
    "find_family",
    "prefixes_of",
    "register_encoder",
    "supported_encoders",
]
