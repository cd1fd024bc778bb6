"""A method of ours on an encoder's attention, in place of its class's."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .attachment import is_wrapped


def replace_methods(parts: Iterable[tuple[nn.Module, Callable[..., Any]]], method: str = "forward") -> Callable[[nn.Module], None]:
    """Put on each module a function that is called with the module first; return what takes them away, called with the encoder."""
    parts = list(parts)
    detach = functools.partial(_put_back, [part for part, _ in parts], method)
    try:
        for part, ours in parts:
            setattr(part, method, functools.partial(ours, part))
    except BaseException:  # a Ctrl-C too
        detach(None)
        raise
    return detach


def _put_back(parts: list[nn.Module], method: str, encoder: nn.Module | None) -> None:
    for part in parts:
        vars(part).pop(method, None)


def forward_problem(where: str, attention: nn.Module) -> str | None:
    """Why an attention's forward can't be replaced, or None."""
    if "forward" in vars(attention) and not is_wrapped(attention):
        return f"the attention of its {where} has a forward of its own on the object, which prompts would not pass"
    return None
