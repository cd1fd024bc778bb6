"""Features out of a model's own call, so that whatever stands at its front door takes part: hooks, FSDP, offloading."""

import threading
from typing import Any

import torch
from torch import Tensor, nn

_FRONT = "_mope_fast_front"
_METHODS = ("forward_features", "forward_head")


class _Asked:
    """One call that shall give features."""

    def __init__(self, maps: bool):
        self.maps = maps
        self.done = False
        self.got: tuple[Tensor, ...] | None = None


class Front:
    """Stands in for a timm model's ``forward_features`` and ``forward_head``, on the object.

    Where a call of the model shall give features, by :meth:`ask`, its head leaves the classifier out. Other calls, those of other
    threads too, are as before.
    """

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self.asked: dict[int, _Asked] = {}
        self.traced: _Asked | None = None  # while it compiles: a graph has no thread
        if (other := Front.of(encoder)) is not None:  # of a wrapping that was interrupted
            other.remove()
        self.previous = {name: vars(encoder)[name] for name in _METHODS if name in vars(encoder)}
        setattr(encoder, _FRONT, self)
        encoder.forward_features = self._features
        encoder.forward_head = self._head

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "asked": {}, "traced": None}

    @staticmethod
    def of(encoder: nn.Module) -> "Front | None":
        return getattr(encoder, _FRONT, None)

    def remove(self) -> None:
        """Undo it; again, if that was interrupted."""
        for name in _METHODS:
            vars(self.encoder).pop(name, None)
        vars(self.encoder).update(self.previous)
        vars(self.encoder).pop(_FRONT, None)

    def ask(self, inputs: dict[str, Any], *, maps: bool = False) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """(feature (B, D), maps (B, C, H, W) of the stages or None) of a call of the model.

        Raises:
            RuntimeError: the model's forward does not end in ``forward_head``.
        """
        asked = _Asked(maps)
        if torch.compiler.is_dynamo_compiling():
            self.traced = asked
            try:
                feature = self.encoder(**inputs)
            finally:
                self.traced = None
        else:
            thread = threading.get_ident()
            self.asked[thread] = asked
            try:
                feature = self.encoder(**inputs)
            finally:
                del self.asked[thread]
        if not asked.done:
            name = type(self.encoder).__name__
            raise RuntimeError(
                f"the forward of this {name} is not timm's (was it replaced on the object?): it has to end in forward_head, which "
                "gives the feature"
            )
        return feature, asked.got

    def _asked(self) -> _Asked | None:
        if self.traced is not None or torch.compiler.is_dynamo_compiling():
            return self.traced
        return self.asked.get(threading.get_ident())

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
