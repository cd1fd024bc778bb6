"""A frozen encoder that takes prompts as keys and values of its layers."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..modules.rows import Prefix
from .families import Inputs, PromptedLayer, family_of
from .frozen import freeze
from .pooling import Pool

_SLOT = "_mope_fast_slot"


class PromptProvider(Protocol):
    """Where the prompts of one forward come from. Any function of this signature will do."""

    def __call__(self, index: int, hidden_states: Tensor, pool: Pool) -> tuple[Sequence[Prefix], Tensor | None]:
        """(layer index, its input, how this encoder pools it) -> up to two key/value prefixes, and its routing scores or None."""


class _Slot:
    """Carries one layer's prefixes to its attention, within one forward."""

    def __init__(self):
        self.prefixes: Sequence[Prefix] = ()
        self.read = False


class Encoded(NamedTuple):
    """What a prompted encoder gives."""

    feature: Tensor
    """(B, D), over tokens only."""
    scores: list[Tensor | None]
    """Routing scores (B, K) of each layer, or None; without prompts there are none."""
    feature_maps: tuple[Tensor, ...] | None = None
    """(B, C, H, W) of each stage, if asked for."""


@dataclass
class _Running:
    """A forward on its way."""

    prompts: PromptProvider
    pool: Pool
    scores: list[Tensor | None]  # of the layers that have run
    thread: int


def _thread() -> int:
    # a compiled graph runs where it was called, all of it
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def prefixes_of(attention: nn.Module) -> Sequence[Prefix]:
    """The prefixes this attention shall see in the running forward; none outside of one."""
    slot = getattr(attention, _SLOT, None)
    if slot is None:
        return ()
    slot.read = True
    return slot.prefixes


class PromptedEncoder(nn.Module):
    """Holds a supported encoder frozen and in eval mode, and hands prompts to its layers.

    The encoder stays the user's own object: called on its own it does what it always did; :meth:`detach` undoes everything.
    Several models can share one encoder by sharing this object: ``MoPEFusion(main=prompted, ...)``.

    Args:
        encoder: see :func:`mope_fast.supported_encoders`.

    Raises:
        TypeError: the encoder is not supported.
        ValueError: it takes prompts from another model already.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.family = family_of(encoder)
        facts = self.family.layers(encoder)
        if any(hasattr(layer.attention, _SLOT) for layer in facts):
            raise ValueError(
                f"this {type(encoder).__name__} already takes prompts from another model: unwrap() that one first, "
                "or let both share one PromptedEncoder"
            )
        for what, parts in (("layers", [layer.module for layer in facts]), ("attentions", [layer.attention for layer in facts])):
            if len({id(part) for part in parts}) < len(parts):
                raise ValueError(f"this {type(encoder).__name__} uses one module as several {what}: each needs prompts of its own")
        self.family.setup()
        self._thaw = freeze(encoder)
        self.encoder = encoder
        self._restore = self.family.attach(encoder)
        facts = self._facts = self.family.layers(encoder)
        self.widths = [layer.width for layer in facts]
        self.feature_width = self.family.feature_width(encoder)
        self.gradient_checkpointing = False
        """Recompute each layer and its prompts in the backward pass instead of keeping their activations."""
        self._running: _Running | None = None
        self._layers = [(layer.module, layer.attention) for layer in facts]
        # usually None: a library may have put a forward of its own on the object, in place of its class's
        self._previous = [vars(module).get("forward") for module, _ in self._layers]
        for index, (module, attention) in enumerate(self._layers):
            setattr(attention, _SLOT, _Slot())
            # a bound method, not a closure: a deep copy of the model gets one of its own
            module.forward = functools.partial(self._layer_forward, index)
        self._attached = True

    @property
    def layers(self) -> Sequence[PromptedLayer]:
        """Facts of the layers as they are now: a projection may have got a LoRA since the encoder was wrapped.

        While it compiles, as they were in the last call that wasn't: torch 2.11 can't make them in a graph.
        """
        if not torch.compiler.is_compiling():
            self._facts = self.family.layers(self.encoder)
        return self._facts

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder's weights."""
        return next(p.dtype for p in self.encoder.parameters() if p.is_floating_point())

    def forward(self, inputs: Tensor | Inputs, prompts: PromptProvider | None = None, *, feature_maps: bool = False) -> Encoded:
        """The encoder's global feature, its layers' routing scores and, if asked for, the maps of its stages.

        Args:
            inputs: the encoder's main input, or a dict of its keyword arguments.
            prompts: called once for each layer with its input; None for the plain encoder.
            feature_maps: see :class:`Encoded`.

        Raises:
            ValueError: feature maps of an encoder that has none.
            RuntimeError: the encoder was given back, runs in another forward, or does not ask for its prompts any more.
        """
        if not self._attached:
            raise RuntimeError("this model was unwrapped and has given its encoder back: make a new one on it")
        if self._running is not None:
            raise RuntimeError("this model is in another forward (of another thread?): run one at a time, or deep-copy the model")
        inputs = self.family.keyword_arguments(inputs)
        if prompts is None:
            return self._encode(inputs, [], feature_maps)
        slots = [getattr(attention, _SLOT) for _, attention in self._layers]
        for slot in slots:
            slot.read = False
        scores: list[Tensor | None] = []
        self._running = _Running(prompts, self.family.pool(self.encoder, inputs), scores, _thread())
        try:
            encoded = self._encode(inputs, scores, feature_maps)
        finally:
            self._running = None
        if not all(slot.read for slot in slots):
            raise RuntimeError(
                f"prompts did not reach layer {[slot.read for slot in slots].index(False)} of {type(self.encoder).__name__}: its "
                "attention was changed after wrapping (set_attn_implementation?), or this is a replica (use DDP)"
            )
        return encoded

    def _encode(self, inputs: Inputs, scores: list[Tensor | None], feature_maps: bool) -> Encoded:
        """``scores`` are filled by the layers on the way."""
        if feature_maps:
            feature, maps = self.family.encode_with_maps(self.encoder, inputs)
            return Encoded(feature, scores, maps)
        return Encoded(self.family.encode(self.encoder, inputs), scores)

    def _layer_forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """In place of the layer's own forward."""
        if self._running is None:
            return self._plain_layer(index, *args, **kwargs)
        prompts, pool, scores = self._running.prompts, self._running.pool, self._running.scores
        # a layer that is compiled on its own can't tell
        other_thread = 0 not in (thread := _thread(), self._running.thread) and thread != self._running.thread
        if other_thread or len(scores) != index:
            raise RuntimeError(
                f"layer {index} of this {type(self.encoder).__name__} was called by another thread, or by another forward within "
                "this one: run one at a time, or deep-copy the model"
            )
        run = functools.partial(self._prompted_layer, index, prompts, pool)
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # the frozen layer draws no random numbers; asking for the generator's state would break a graph capture
            random = getattr(prompts, "draws_random_numbers", False)
            output, layer_scores = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)
        else:
            output, layer_scores = run(*args, **kwargs)
        scores.append(layer_scores)
        return output

    def _prompted_layer(
        self, index: int, prompts: PromptProvider, pool: Pool, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor | None]:
        """The layer's output and its scores; all it needs are arguments, because checkpointing calls it again after forward."""
        slot = getattr(self._layers[index][1], _SLOT, None)
        if slot is None:
            raise RuntimeError("the model was unwrapped before the backward pass of its last step: call backward() first")
        slot.prefixes, scores = prompts(index, args[0] if args else kwargs["hidden_states"], pool)
        try:
            return self._plain_layer(index, *args, **kwargs), scores
        finally:
            slot.prefixes = ()

    def _plain_layer(self, index: int, *args: Any, **kwargs: Any) -> Any:
        module, previous = self._layers[index][0], self._previous[index]
        return type(module).forward(module, *args, **kwargs) if previous is None else previous(*args, **kwargs)

    def train(self, mode: bool = True) -> "PromptedEncoder":
        """Stays in eval mode: a frozen encoder has no dropout, whatever the fused model does."""
        return super().train(False)

    def detach(self) -> nn.Module:
        """Undo the wrapping and return the encoder as it was; this module can't be used afterwards."""
        if self._attached:
            self._attached = False
            for (module, attention), previous in zip(self._layers, self._previous, strict=True):
                del module.forward
                if previous is not None:
                    module.forward = previous
                delattr(attention, _SLOT)
            self._restore(self.encoder)
            self._thaw()
        return self.encoder

    def extra_repr(self) -> str:
        return f"family={self.family.name!r}, layers={len(self.widths)}"
