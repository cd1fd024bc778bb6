"""Holding other people's modules frozen, and giving them back as they were."""

import functools
from collections.abc import Callable

from torch import nn


def freeze(module: nn.Module) -> Callable[[], None]:
    """Eval mode and no gradients; what it returns gives every part its mode and every parameter its flag back."""
    modes = [(part, part.training) for part in module.modules()]
    # by name: FSDP puts a shard in a parameter's place, and a reference here would keep the whole one in memory
    flags = [(part, name, p.requires_grad) for part in module.modules() for name, p in part.named_parameters(recurse=False)]
    module.requires_grad_(False).eval()
    # no closure: it is deep-copied and pickled with the model that holds it
    return functools.partial(_thaw, modes, flags)


def _thaw(modes: list[tuple[nn.Module, bool]], flags: list[tuple[nn.Module, str, bool]]) -> None:
    for part, training in modes:
        part.training = training
    for part, name, flag in flags:
        # or what took its place meanwhile, as timm's set_input_size has it
        if (parameter := dict(part.named_parameters(recurse=False)).get(name)) is not None:
            parameter.requires_grad_(flag)
