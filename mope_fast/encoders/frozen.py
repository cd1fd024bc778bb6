"""Holding other people's modules frozen, and giving them back as they were."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class _Flag(NamedTuple):
    """Of a parameter, which is found by name: FSDP puts a shard in its place, and must not leave the whole one in memory."""

    path: str
    part: nn.Module
    name: str
    requires_grad: bool


def freeze(module: nn.Module) -> Callable[[], None]:
    """Eval mode and no gradients; what it returns gives every part its mode and every parameter its flag back."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [
        _Flag(f"{path}.{name}" if path else name, part, name, parameter.requires_grad)
        for path, part in module.named_modules()
        for name, parameter in part.named_parameters(recurse=False)
    ]
    # no closure: it is deep-copied and pickled with the model that holds it
    thaw = functools.partial(_thaw, module, modes, flags)
    try:
        module.requires_grad_(False).eval()
    except BaseException:  # a Ctrl-C too
        thaw()
        raise
    return thaw


def _thaw(module: nn.Module, modes: list[tuple[nn.Module, bool]], flags: list[_Flag]) -> None:
    for part, training in modes:
        part.training = training
    now = dict(module.named_parameters(remove_duplicate=False))
    for path, part, name, flag in flags:
        # in its own module, wherever that is now; and what took its place, as transformers' resize_token_embeddings has it
        for parameter in (dict(part.named_parameters(recurse=False)).get(name), now.get(path)):
            if parameter is not None:
                parameter.requires_grad_(flag)
