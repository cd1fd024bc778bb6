"""A frozen encoder that takes prompts as keys and values of its layers."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..modules.output import Prefix
from .families import family_of

PromptProvider = Callable[[int, Tensor], Sequence[Prefix]]
"""(layer index, its input (B, S, D)) -> up to two key/value prefixes for its attention."""

_SLOT = "_mope_fast_slot"


class _Slot:
    """Carries one layer's prefixes from its hook to its attention, within one forward."""

    def __init__(self):
        self.prefixes: Sequence[Prefix] = ()
        self.read = False


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

    Args:
        encoder: see :func:`mope_fast.supported_encoders`.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.family = family_of(encoder)
        if any(hasattr(layer.attention, _SLOT) for layer in self.family.layers(encoder)):
            raise ValueError(f"this {type(encoder).__name__} already takes prompts from another model: unwrap() that one first")
        self._before = (encoder.training, [p.requires_grad for p in encoder.parameters()])
        self.encoder = encoder.requires_grad_(False).eval()
        self.layers = self.family.layers(encoder)
        self.widths = [layer.width for layer in self.layers]
        self.feature_width = self.family.feature_width(encoder)
        self._provider: PromptProvider | None = None
        self.family.setup()
        self._restore = self.family.attach(encoder)
        self._attached = True
        self._hooks = []
        for index, layer in enumerate(self.layers):
            setattr(layer.attention, _SLOT, _Slot())
            # a bound method, not a closure: a deep copy of the model gets hooks of its own
            hook = functools.partial(self._provide, index)
            self._hooks.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))

    def _provide(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        prefixes = () if self._provider is None else self._provider(index, hidden_states)
        getattr(self.layers[index].attention, _SLOT).prefixes = prefixes

    def forward(self, inputs: Tensor | dict[str, Any], prompts: PromptProvider | None = None) -> Tensor:
        """The encoder's global feature (B, D), over tokens only.

        Args:
            inputs: the encoder's main input, or a dict of its keyword arguments.
            prompts: called once for each layer with its input; None for the plain encoder.
        """
        if not self._attached:
            raise RuntimeError("this model was unwrapped and has given its encoder back: make a new one on it")
        if self._provider is not None:
            raise RuntimeError("this model is in another forward (of another thread?): run one at a time, or deep-copy the model")
        if isinstance(inputs, Tensor):
            inputs = {self.family.input_name: inputs}
        slots = [getattr(layer.attention, _SLOT) for layer in self.layers]
        for slot in slots:
            slot.read = False
        self._provider = prompts
        try:
            output = self.encoder(**inputs)
        finally:
            self._provider = None
            for slot in slots:
                slot.prefixes = ()
        if prompts is not None and not all(slot.read for slot in slots):
            raise RuntimeError(
                f"prompts did not reach layer {[slot.read for slot in slots].index(False)} of {type(self.encoder).__name__}: its "
                "attention was changed after wrapping (set_attn_implementation?), or this is a replica (use DDP)"
            )
        if isinstance(output, tuple):
            raise ValueError(f"{type(self.encoder).__name__} gave a tuple: leave return_dict at its default")
        return self.family.feature(output, inputs)

    def train(self, mode: bool = True) -> "PromptedEncoder":
        """Stays in eval mode: a frozen encoder has no dropout, whatever the fused model does."""
        return super().train(False)

    def detach(self) -> nn.Module:
        """Undo the wrapping and return the encoder as it was; this module can't be used afterwards."""
        if self._attached:
            for hook in self._hooks:
                hook.remove()
            for layer in self.layers:
                delattr(layer.attention, _SLOT)
            self._restore(self.encoder)
            training, requires_grad = self._before
            self.encoder.train(training)
            for parameter, flag in zip(self.encoder.parameters(), requires_grad, strict=True):
                parameter.requires_grad_(flag)
            self._attached = False
        return self.encoder

    def extra_repr(self) -> str:
        return f"family={self.family.name!r}, layers={len(self.widths)}"
