"""VLMo, the backbone of MoPE-BAF."""

from .config import VLMoConfig
from .model import VLMo, VLMoOutput
from .processor import VLMoProcessor

__all__ = ["VLMo", "VLMoConfig", "VLMoOutput", "VLMoProcessor"]
