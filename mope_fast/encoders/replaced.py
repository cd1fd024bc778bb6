"""Replace a method of an encoder's attention, on the object, by one of this library."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .attachment import is_wrapped


def replace_methods(parts: Iterable[tuple[nn.Module, Callable[..., Any]]], method: str = "forward") -> Callable[[nn.Module], None]:
    """Set a function as the method of each module; it is called with the module as first argument.

    Args:
        parts: pairs of a module and its function.
        method: name of the method to replace.

    Returns:
        A function that removes them again; it is called with the encoder.
    """
    parts = list(parts)
    detach = functools.partial(_put_back, [part for part, _ in parts], method)
    try:
        for part, ours in parts:
            setattr(part, method, functools.partial(ours, part))
    except BaseException:  # including Ctrl-C
        detach(None)
        raise
    return detach


def _put_back(parts: list[nn.Module], method: str, encoder: nn.Module | None) -> None:
    for part in parts:
        vars(part).pop(method, None)


def forward_problem(where: str, attention: nn.Module) -> str | None:
    """Return why an attention's forward can't be replaced, or None."""
    if "forward" in vars(attention) and not is_wrapped(attention):
        return f"the attention of its {where} has a forward set on the object, which prompts would not pass through"
    return None
