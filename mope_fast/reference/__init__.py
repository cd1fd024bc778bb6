"""The equations in plain PyTorch: any device, any float dtype, nothing fused. These functions define what is right."""

from .attention import prompt_attention, receptive_field_attention
from .importance import importance_loss
from .layer_prompts import layer_prompts
from .mope import dynamic_prompt, prompted_sequence, routing_scores
from .route_and_mix import route_and_mix
from .window_attention import window_prompt_attention

__all__ = [
    "dynamic_prompt",
    "importance_loss",
    "layer_prompts",
    "prompt_attention",
    "prompted_sequence",
    "receptive_field_attention",
    "route_and_mix",
    "routing_scores",
    "window_prompt_attention",
]
