"""Get features from a call of the model itself, so that everything attached to that call runs: hooks, FSDP, offloading."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

from .._locks import Guarded

_FRONT = "_mope_fast_front"
_METHODS = ("forward_features", "forward_head")
_putting = Guarded()
"""Its lock is held while methods are set on an object or removed from it, never while a model runs."""


class _Asked:
    """One call of the model that returns features."""

    def __init__(self, maps: bool):
        self.maps = maps
        self.done = False
        self.got: tuple[Tensor, ...] | None = None


class Front:
    """Replaces ``forward_features`` and ``forward_head`` of a timm model, on the object.

    In a call made by :meth:`ask`, which returns features, the head leaves out the classifier. All other calls, including those of
    other threads, behave as before. The replacement exists while the model is wrapped; on a model that isn't wrapped it exists
    only during :meth:`ask`.
    """

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self.wrapped = False
        self.asked: dict[int, _Asked] = {}
        self.latest: _Asked | None = None  # for a graph of the encoder itself, which has no thread
        self.traced: _Asked | None = None  # while a graph that contains such a call is traced
        self.previous = {name: vars(encoder)[name] for name in _METHODS if name in vars(encoder)}
        # in one step, which a Ctrl-C can't interrupt
        vars(encoder).update({_FRONT: self, "forward_features": self._features, "forward_head": self._head})

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "asked": {}, "latest": None, "traced": None}

    @staticmethod
    def of(encoder: nn.Module) -> "Front | None":
        return getattr(encoder, _FRONT, None)

    @staticmethod
    def wrap(encoder: nn.Module) -> None:
        """Replace the methods until :meth:`unwrap`."""
        with _putting.lock:
            (Front.of(encoder) or Front(encoder)).wrapped = True

    @staticmethod
    def unwrap(encoder: nn.Module) -> None:
        """Restore the methods once no call of :meth:`ask` is running any more."""
        with _putting.lock:
            if (front := Front.of(encoder)) is not None:
                front.wrapped = False
                front._go_if_unused()

    def _go_if_unused(self) -> None:
        if not self.wrapped and not self.asked:
            own = vars(self.encoder)
            for name in _METHODS:
                own.pop(name, None)
            own.update(self.previous)
            del own[_FRONT]  # last: the replaced methods are found through it

    @staticmethod
    def ask(encoder: nn.Module, inputs: dict[str, Any], *, maps: bool = False) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Call the model and return its feature (B, D) and the maps (B, C, H, W) of its stages, or None.

        Raises:
            RuntimeError: the model's forward does not end in ``forward_head``, or this is compiled and the model is not wrapped.
        """
        asked = _Asked(maps)
        if torch.compiler.is_dynamo_compiling():
            front = Front.of(encoder)
            if front is None:
                raise RuntimeError(
                    f"this {type(encoder).__name__} has hooks or a forward of its own, with which its features can't be "
                    "compiled: wrap it in a PromptedEncoder, or leave it out of the graph with torch.compiler.disable"
                )
            front.traced = asked
            try:
                feature = encoder(**inputs)
            finally:
                front.traced = None
        else:
            feature = Front._asked_here(encoder, inputs, asked)
        if not asked.done:
            raise RuntimeError(
                f"the forward of this {type(encoder).__name__} is not timm's (was it replaced on the object?): it must end in "
                "forward_head, which returns the feature"
            )
        return feature, asked.got

    @staticmethod
    def _asked_here(encoder: nn.Module, inputs: dict[str, Any], asked: _Asked) -> Tensor:
        thread, front = threading.get_ident(), None
        try:
            with _putting.lock:
                front = Front.of(encoder) or Front(encoder)
                outer = front.asked.get(thread)
                front.asked[thread] = front.latest = asked
            return encoder(**inputs)
        finally:
            # no function is called here, so that a Ctrl-C can't interrupt it
            if front is not None and thread in front.asked and front.asked[thread] is asked:
                front.latest = outer
                if outer is None:
                    del front.asked[thread]
                else:
                    front.asked[thread] = outer
            if front is not None and not front.wrapped:
                with _putting.lock:
                    front._go_if_unused()

    def _asked(self) -> _Asked | None:
        if self.traced is not None:
            return self.traced
        return self.latest if torch.compiler.is_dynamo_compiling() else self.asked.get(threading.get_ident())

    def _features(self, *args: Any, **kwargs: Any) -> Tensor:
        asked = self._asked()
        if asked is None or not asked.maps:
            return self._own("forward_features", *args, **kwargs)
        tokens, maps = self.encoder.forward_intermediates(*args, **kwargs)
        asked.got = tuple(maps)
        return tokens

    def _head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked = self._asked()
        if asked is None:
            return self._own("forward_head", x, *args, **kwargs)
        asked.done = True
        return self._own("forward_head", x, pre_logits=True)

    def _own(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        if name in self.previous:
            return self.previous[name](*args, **kwargs)
        return getattr(type(self.encoder), name)(self.encoder, *args, **kwargs)
