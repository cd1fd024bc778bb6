"""Holding other people's modules frozen, and giving them back as they were."""

import functools
from collections.abc import Callable

from torch import nn


def freeze(module: nn.Module) -> Callable[[], None]:
    """Eval mode and no gradients; what it returns gives every part its mode and every parameter its flag back."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [(name, parameter, parameter.requires_grad) for name, parameter in module.named_parameters()]
    module.requires_grad_(False).eval()
    # no closure: it is deep-copied and pickled with the model that holds it
    return functools.partial(_thaw, module, modes, flags)


def _thaw(module: nn.Module, modes: list[tuple[nn.Module, bool]], flags: list[tuple[str, nn.Parameter, bool]]) -> None:
    for part, training in modes:
        part.training = training
    now = dict(module.named_parameters())
    for name, parameter, flag in flags:
        parameter.requires_grad_(flag)
        # what took its place meanwhile, as timm's set_input_size has it
        if (other := now.get(name)) is not None:
            other.requires_grad_(flag)
