"""Shared by cases of whole models: modes, inputs, counting operations."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

INFERENCE, TRAINING = MODES = ("inference", "training")
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def padded_text(batch: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Make padded text in which from a quarter of the tokens to all of them are real, unordered."""
    least = tokens // 4
    lengths = least + torch.arange(batch, device=device) * 7919 % (tokens - least + 1)
    mask = torch.arange(tokens, device=device) < lengths[:, None]
    return {"input_ids": torch.randint(1, 100, (batch, tokens), device=device) * mask, "attention_mask": mask.long()}


def count_flops(first_layer: nn.Module, run: Callable[[], Tensor], *, backward: bool, cut: bool) -> int:
    """Count the matrix products of ``run``, with ``backward`` also of its backward pass; ``cut`` ends that at the first layer."""
    from torch.utils.flop_counter import FlopCounterMode

    def start(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0].detach().requires_grad_(), *args[1:]

    if cut:
        first_layer.register_forward_pre_hook(start)
    with FlopCounterMode(display=False) as counter:
        features = run()
        if backward:
            features.sum().backward()
    return counter.get_total_flops()
