"""Drop-in modules: routed prompts and their settings."""

from .attention import PromptAttention
from .block_fusion import BlockAwareFusion
from .config import MoPEConfig
from .folded import FoldedBank
from .mapper import PromptMapper
from .output import MoPEOutput
from .prompts import MoPELayer, PromptBank, PromptContext

__all__ = [
    "BlockAwareFusion",
    "FoldedBank",
    "MoPEConfig",
    "MoPELayer",
    "MoPEOutput",
    "PromptAttention",
    "PromptBank",
    "PromptContext",
    "PromptMapper",
]
