"""Wrap and unwrap an encoder, and hand each of its layers its prompts during a forward."""

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._checks import check_number_of_prefixes, check_prefixes
from .._locks import Guarded
from ..modules.prompts import PromptContext
from ..modules.tables import Prefix
from .families import EncoderFamily, Inputs
from .frozen import freeze, is_thawed, thaw_held
from .pooling import Pool

_SLOT = "_mope_fast_slot"


class PromptProvider(Protocol):
    """Provides the prompts of one forward. Any function with this signature is accepted."""

    def __call__(self, index: int, hidden_states: Tensor, pool: Pool) -> tuple[Sequence[Prefix], Tensor | None]:
        """Return a layer's prefixes and its routing scores.

        Args:
            index: index of the layer.
            hidden_states: the layer's input.
            pool: how this encoder pools the layer's input.

        Returns:
            Up to two key/value prefixes, and the routing scores of the layer or None.
        """


class Encoded(NamedTuple):
    """The output of a prompted encoder."""

    feature: Tensor
    """(B, D) pooled feature, over tokens only (not over prompts)."""
    scores: list[Tensor | None]
    """Routing scores (B, K) of each layer, or None for a layer without routing; an empty list without prompts."""
    feature_maps: tuple[Tensor, ...] | None = None
    """(B, C, H, W) for each stage, if requested; an encoder without stages gives one map, of its last layer's patches."""
    tokens: Tensor | None = None
    """(B, S, D) tokens of the last layer, if requested, normed in the same way as the encoder's own last hidden state."""


class Wanted(NamedTuple):
    """The outputs requested from a forward in addition to the feature."""

    feature_maps: bool = False
    tokens: bool = False


@dataclass
class _Running:
    """State of a running forward."""

    prompts: PromptProvider | None
    pool: Pool | None
    gradient_checkpointing: bool
    takes_gradients: bool
    scores: list[Tensor | None]  # of the layers that have run so far
    thread: int
    last: Tensor | None = None  # output of the layer that ran last


class _State:
    """Holds the running forward. It is not a module: its attribute is set in one step, which a Ctrl-C can't interrupt."""

    running: _Running | None = None


class _Call:
    """One call of one layer, with the prefixes for its attention."""

    def __init__(self, attention: nn.Module, prefixes: Sequence[Prefix]):
        self.attention, self.prefixes = attention, prefixes
        self.read = False


def is_wrapped(attention: nn.Module) -> bool:
    """Return whether this attention belongs to an encoder that is currently wrapped."""
    return _SLOT in vars(attention)


def prefixes_of(attention: nn.Module) -> Sequence[Prefix]:
    """Return the prefixes for this attention in the running forward; an empty sequence outside of a forward."""
    attachment: Attachment | None = getattr(attention, _SLOT, None)
    if attachment is None:
        return ()
    call = attachment.traced
    if call is None and not torch.compiler.is_dynamo_compiling():
        call = attachment.calls.get(threading.get_ident())
    if call is None or call.attention is not attention:
        return ()
    call.read = True
    return call.prefixes


def _hidden_states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _is_trained(prompts: PromptProvider) -> bool:
    """Return whether the prompts are trained; True for a user's own function, because it can't be known there."""
    return not isinstance(prompts, PromptContext) or (prompts.trained is not None and prompts.trained())


def _check_given(prefixes: Sequence[Prefix], hidden_states: Tensor, heads: int) -> None:
    """Check prefixes from a user's own provider; those of the library itself are not checked in every layer."""
    check_number_of_prefixes(prefixes)
    for prefix in prefixes:
        head_dim = prefix[0].shape[-1] if isinstance(prefix[0], Tensor) else 0
        check_prefixes([prefix], hidden_states, "hidden_states", hidden_states.shape[0], heads, head_dim)


class Attachment(Guarded):
    """The wrapping of one encoder.

    The encoder's own layers hold a reference to it, so that it can be undone even after every model that used it is gone.

    A lock lets one thread at a time run a prompted forward. The lock and the set of owners are not copied: deep copies and pickles
    start with a free lock and without owners. A compiled forward doesn't take the lock, because its prompts are values of its
    graph.

    Raises:
        ValueError: the encoder takes prompts from another model that is alive, or uses one module as several layers.
    """

    def __init__(self, encoder: nn.Module, family: EncoderFamily, pooling: str | None = None, router_pooling: str | None = None):
        family.check_pooling(pooling, router_pooling)
        layers = [(layer.module, layer.attention) for layer in family.layers(encoder)]
        for what, parts in zip(("layers", "attentions"), zip(*layers, strict=True), strict=True):
            if len({id(part) for part in parts}) < len(parts):
                raise ValueError(f"this {type(encoder).__name__} uses one module as several {what}: each needs prompts of its own")
        _take_over(encoder)
        family.setup()
        self.encoder, self.family = encoder, family
        self.pooling, self.router_pooling = pooling, router_pooling
        super().__init__()
        self.owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.layers: list[tuple[nn.Module, nn.Module]] = []
        self._forwards: list[Callable[..., Any]] = []
        self._previous: list[Callable[..., Any] | None] = []
        self._restore: Callable[[nn.Module], None] | None = None
        self._thaw = freeze(encoder)
        self.active, self._given_back = True, False
        try:
            self._restore = family.attach(encoder)
            # the family may have replaced attentions with the library's own
            self.layers = [(layer.module, layer.attention) for layer in family.layers(encoder)]
            self._forwards = [functools.partial(self._layer_forward, index) for index in range(len(self.layers))]
            # usually None; another library may have set a forward on the object that overrides the one of its class
            self._previous = [vars(module).get("forward") for module, _ in self.layers]
            for (module, attention), forward in zip(self.layers, self._forwards, strict=True):
                setattr(attention, _SLOT, self)
                module.forward = forward
        except BaseException:  # including Ctrl-C
            self.detach()
            raise

    def renew(self) -> None:
        """Reset to the state in which no forward is running."""
        super().renew()
        self._eager, self._traced = _State(), _State()
        self.calls: dict[int, _Call] = {}  # by thread: a thread that recomputes a layer has its own entry
        self.traced: _Call | None = None  # used while compiling: a graph has no thread

    def __getstate__(self) -> dict[str, Any]:
        own = ("owners", "lock", "_eager", "_traced", "calls", "traced")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.owners = weakref.WeakSet()
        vars(self).update(state)

    def run(self, inputs: Inputs, prompts: PromptProvider | None, wanted: Wanted, *, gradient_checkpointing: bool) -> Encoded:
        """Run the encoder; see :meth:`PromptedEncoder.forward`."""
        if torch.compiler.is_dynamo_compiling():
            return self._run(self._traced, 0, inputs, prompts, wanted, gradient_checkpointing)
        with self.lock:
            if self._eager.running is not None:
                raise RuntimeError(
                    f"this {type(self.encoder).__name__} was called again from within its own forward (by a hook, or by the "
                    "function that provides the prompts?): let one forward end before the next starts, or deep-copy the model"
                )
            return self._run(self._eager, threading.get_ident(), inputs, prompts, wanted, gradient_checkpointing)

    def _run(
        self,
        state: _State,
        thread: int,
        inputs: Inputs,
        prompts: PromptProvider | None,
        wanted: Wanted,
        gradient_checkpointing: bool,
    ) -> Encoded:
        if not self.active:
            raise RuntimeError("this model was unwrapped and its encoder was restored: build a new model on the encoder")
        if self.encoder.training and not torch.compiler.is_dynamo_compiling():
            # set by its own train(), or by train() of another module that contains it
            self.encoder.eval()
        scores: list[Tensor | None] = []
        if prompts is None and wanted == Wanted():
            return Encoded(self.family.encode(self.encoder, inputs, self.pooling), scores)
        pool = None if prompts is None else self.family.router_pool(self.encoder, inputs, self.router_pooling)
        running = _Running(prompts, pool, gradient_checkpointing, torch.is_grad_enabled(), scores, thread)
        state.running = running
        try:
            encoded = self._encode(inputs, running, wanted)
        finally:
            if state.running is running:  # else another forward started meanwhile, and must detect the conflict itself
                state.running = None
        if prompts is not None and len(scores) < len(self.layers):
            raise RuntimeError(
                f"only {len(scores)} of {len(self.layers)} layers of this {type(self.encoder).__name__} took their prompts: the "
                "other layers were skipped or replaced after wrapping, or ran in another thread, or this is a replica (use DDP)"
            )
        return encoded

    def _encode(self, inputs: Inputs, running: _Running, wanted: Wanted) -> Encoded:
        """Run the family's encode function; the layers append their scores to ``running``."""
        if wanted == Wanted():
            return Encoded(self.family.encode(self.encoder, inputs, self.pooling), running.scores)
        feature, maps, tokens = self.family.encode_more(
            self.encoder, inputs, self.pooling, lambda: running.last, feature_maps=wanted.feature_maps, tokens=wanted.tokens
        )
        return Encoded(feature, running.scores, maps, tokens)

    def _layer_forward(self, index: int, /, *args: Any, **kwargs: Any) -> Any:
        """Run in place of the layer's own forward."""
        running = self._traced.running
        if running is None:
            running = self._eager.running
            # a layer that is compiled on its own can't tell which thread it runs in
            if running is not None and not torch.compiler.is_dynamo_compiling() and running.thread != threading.get_ident():
                running = None
        if running is None:
            return self._plain_layer(index, *args, **kwargs)
        if running.prompts is None:
            output = self._plain_layer(index, *args, **kwargs)
            running.last = _hidden_states(output)
            return output
        if len(running.scores) != index:
            raise RuntimeError(
                f"layer {index} of this {type(self.encoder).__name__} was called out of order, by another forward within this one: "
                "let one forward end before the next starts, or deep-copy the model"
            )
        if running.takes_gradients and not torch.is_grad_enabled() and _is_trained(running.prompts):
            raise RuntimeError(
                f"layer {index} of this {type(self.encoder).__name__} runs with gradients disabled in a forward that needs them, "
                "so its prompts would not be trained: if the layer is checkpointed by other code (use_reentrant=True, fairscale), "
                "remove that and call gradient_checkpointing_enable() on the fused model"
            )
        run = functools.partial(self._prompted_layer, index, running.prompts, running.pool)
        if running.gradient_checkpointing and torch.is_grad_enabled():
            # the frozen layer draws no random numbers; reading the generator's state would break a graph capture
            random = getattr(running.prompts, "draws_random_numbers", False)
            output, layer_scores = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=random, **kwargs)
        else:
            output, layer_scores = run(*args, **kwargs)
        running.scores.append(layer_scores)
        running.last = _hidden_states(output)
        return output

    def _prompted_layer(
        self, index: int, prompts: PromptProvider, pool: Pool, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, Tensor | None]:
        """Return the layer's output and its scores.

        Everything it needs is an argument, because checkpointing calls it again after the forward.
        """
        if not self.active:
            raise RuntimeError("the model was unwrapped before the backward pass of its last step: call backward() first")
        hidden_states = args[0] if args else kwargs["hidden_states"]
        prefixes, scores = prompts(index, hidden_states, pool)
        if not isinstance(prompts, PromptContext) and not torch.compiler.is_dynamo_compiling():
            _check_given(prefixes, hidden_states, self.family.layers(self.encoder)[index].num_heads)
        call = _Call(self.layers[index][1], prefixes)
        if torch.compiler.is_dynamo_compiling():
            self.traced = call
            try:
                output = self._plain_layer(index, *args, **kwargs)
            finally:
                self.traced = None
        else:
            thread = threading.get_ident()
            self.calls[thread] = call
            try:
                output = self._plain_layer(index, *args, **kwargs)
            finally:
                del self.calls[thread]
        if not call.read:
            raise RuntimeError(
                f"prompts did not reach layer {index} of {type(self.encoder).__name__}: its attention was changed after wrapping "
                "(set_attn_implementation?)"
            )
        return output, scores

    def _plain_layer(self, index: int, /, *args: Any, **kwargs: Any) -> Any:
        module, previous = self.layers[index][0], self._previous[index]
        return type(module).forward(module, *args, **kwargs) if previous is None else previous(*args, **kwargs)

    def is_thawed(self) -> bool:
        """Return whether other code has set ``requires_grad`` on all of the encoder's parameters."""
        return is_thawed(self._thaw)

    def detach(self) -> None:
        """Restore the encoder to its state before wrapping, after waiting for a forward of another thread to end.

        If this is interrupted, the next call finishes it.
        """
        with self.lock:
            if not self._given_back:
                self._give_back()

    def _give_back(self) -> None:
        self.active = False
        self._thaw()
        for (module, _), forward, previous in zip(self.layers, self._forwards, self._previous, strict=False):
            if vars(module).get("forward") is forward:
                if previous is None:
                    del module.forward
                else:
                    module.forward = previous
        if self._restore is not None:
            self._restore(self.encoder)
        # last, because an encoder's wrapping is found through these attributes
        for _, attention in self.layers:
            vars(attention).pop(_SLOT, None)
        self._given_back = True


wrapping = Guarded()
"""Its lock is held by a thread while it takes over an encoder, wraps it and becomes its owner."""


def _attachments(module: nn.Module) -> list[Attachment]:
    found = [vars(part)[_SLOT] for part in module.modules() if _SLOT in vars(part)]
    return list({id(attachment): attachment for attachment in found}.values())


def _take_over(encoder: nn.Module) -> None:
    """Undo wrappings without an owner; raise ValueError if a wrapping still has one."""
    attachments = _attachments(encoder)
    if any(attachment.owners for attachment in attachments):
        gc.collect()  # a dropped model may not have been collected yet
    if any(attachment.owners for attachment in attachments):
        raise ValueError(
            f"this {type(encoder).__name__} already takes prompts from another model, or from another side of this one: unwrap() "
            "that model first, let both share one PromptedEncoder, or restore it with mope_fast.unwrap_encoder(encoder)"
        )
    for attachment in attachments:
        attachment.detach()


def unwrap_encoder(encoder: nn.Module) -> nn.Module:
    """Restore an encoder to its state before a model of this library wrapped it, even if that model is still referenced.

    Models that still hold the encoder can't be used afterwards. This also restores an encoder whose models are gone, a deep copy
    or a pickle of a wrapped encoder alone, and a module that models only keep frozen, such as a black box or a VLMo. It does
    nothing if the encoder is neither wrapped nor frozen.

    Args:
        encoder: the encoder, or a module that contains it.

    Returns:
        The same object as ``encoder``.

    Examples:
        >>> model = MoPEFusion(bert, dinov2, num_classes=13)    # a notebook cell, which is then run again:
        >>> unwrap_encoder(bert), unwrap_encoder(dinov2)
        >>> model = MoPEFusion(bert, dinov2, num_classes=13)
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"unwrap_encoder expects an encoder (a torch.nn.Module), got {type(encoder).__name__}")
    for attachment in _attachments(encoder):
        attachment.detach()
    thaw_held(encoder)
    return encoder
