"""Holding other people's modules frozen, and giving them back as they were."""

import functools
from collections.abc import Callable

from torch import nn


def freeze(module: nn.Module) -> Callable[[], None]:
    """Eval mode and no gradients; what it returns gives every part its mode and every parameter its flag back."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False).eval()
    # no closure: it is deep-copied and pickled with the model that holds it
    return functools.partial(_thaw, modes, flags)


def _thaw(modes: list[tuple[nn.Module, bool]], flags: list[tuple[nn.Parameter, bool]]) -> None:
    for part, training in modes:
        part.training = training
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
