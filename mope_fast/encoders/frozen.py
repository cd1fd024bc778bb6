"""Freeze a user's modules, and restore them as they were."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

_FROZEN = "_mope_fast_frozen"


class _Flag(NamedTuple):
    """The ``requires_grad`` flag of a parameter.

    The parameter is found by name, not referenced: FSDP replaces it by a shard, and a reference would keep the whole one in memory.
    """

    path: str
    part: nn.Module
    name: str
    requires_grad: bool


def freeze(module: nn.Module) -> Callable[[], None]:
    """Set eval mode and turn gradients off; return a function that restores every part's mode and every parameter's flag."""
    modes = [(part, part.training) for part in module.modules()]
    flags = [
        _Flag(f"{path}.{name}" if path else name, part, name, parameter.requires_grad)
        for path, part in module.named_modules()
        for name, parameter in part.named_parameters(recurse=False)
    ]
    # not a closure: it is deep-copied and pickled with the model that holds it
    thaw = functools.partial(_thaw, module, modes, flags)
    try:
        module.requires_grad_(False).eval()
    except BaseException:  # including Ctrl-C
        thaw()
        raise
    return thaw


def _thaw(module: nn.Module, modes: list[tuple[nn.Module, bool]], flags: list[_Flag]) -> None:
    for part, training in modes:
        part.training = training
    now = dict(module.named_parameters(remove_duplicate=False))
    for path, part, name, flag in flags:
        # the parameter in its original module, wherever that is now, and one that replaced it (resize_token_embeddings)
        for parameter in (dict(part.named_parameters(recurse=False)).get(name), now.get(path)):
            if parameter is not None:
                parameter.requires_grad_(flag)


def is_thawed(thaw: Callable[[], None]) -> bool:
    """Return whether everything that :func:`freeze` froze has ``requires_grad`` set again; ``thaw`` is what it returned."""
    _, _, flags = thaw.args
    return all(getattr(flag.part._parameters.get(flag.name), "requires_grad", False) for flag in flags)


class Hold:
    """One model's hold on a module that it keeps frozen. The module is thawed when its last hold is released.

    Holds of models that were dropped no longer count: the next model to hold the module first restores it to its state before
    them. A deep copy or a pickle of a model holds its own copy of the module.
    """

    def __init__(self, module: nn.Module):
        frozen = vars(module).get(_FROZEN)
        if frozen is not None and not frozen.holds:
            frozen.thaw()
            frozen = None
        self.frozen = _Frozen(module) if frozen is None else frozen
        self.frozen.holds.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.frozen.holds.add(self)

    def release(self) -> None:
        self.frozen.holds.discard(self)
        if not self.frozen.holds:
            self.frozen.thaw()


class _Frozen:
    """The state of a frozen module before it was frozen, stored on the module itself."""

    def __init__(self, module: nn.Module):
        self.module, self._thaw = module, freeze(module)
        self.holds: weakref.WeakSet[Hold] = weakref.WeakSet()
        vars(module)[_FROZEN] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "holds": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, holds=weakref.WeakSet())

    def thaw(self) -> None:
        if vars(self.module).get(_FROZEN) is self:
            self._thaw()
            del vars(self.module)[_FROZEN]


def thaw_held(module: nn.Module) -> None:
    """Thaw a module and its parts, whichever models keep them frozen."""
    for part in list(module.modules()):
        if (frozen := vars(part).get(_FROZEN)) is not None:
            frozen.thaw()
