"""transformers' own extension points: an attention and a mask function through which prompts reach its layers.

``AttentionInterface`` gets our attention, ``AttentionMaskInterface`` a mask function that hands the (B, S) padding mask through
untouched, with a layer's window beside it: without one transformers passes no mask at all, and the stock ones build a 4-D mask and
wait for the device. No model is changed.
"""

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from .._dispatch import prompt_attention
from ..reference.attention import CAUSAL, UNLIMITED, Window
from .attachment import prefixes_of

NAME = "mope_fast"


class _Mask(NamedTuple):
    """What the tokens of a layer that attends within a window see."""

    padding: Tensor | None
    """(B, S) bool, True = real."""
    window: Window


_OTHER_ATTENTION = {
    "softcap": "a cap on its products",
    "s_aux": "attention sinks",
    "rel_pos": "a bias by position",
    "bias": "a bias",
}
"""What encoders may ask of transformers' attention that changes its result."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Mask | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: (B, H, S, Dh) in, (B, S, H, Dh) out; keys and values may have fewer heads.

    A bias of tokens by position comes as ``position_bias`` (T5) or as a mask of numbers, both (B or 1, H or 1, S, S) (BEiT).
    """
    window, bias, prefixes = None, kwargs.get("position_bias"), prefixes_of(module)
    if isinstance(attention_mask, _Mask):
        attention_mask, window = attention_mask
    elif kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"{type(module).__name__} attends within a window of {kwargs['sliding_window']} tokens, but the mask that it was given "
            "has none: what it sees can't be told"
        )
    for name, meaning in _OTHER_ATTENTION.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for {name}, {meaning}, which attention with prompts does not have")
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.is_floating_point():
        attention_mask, bias = None, attention_mask if bias is None else bias + attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, S), True = real; got {tuple(attention_mask.shape)}")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    is_causal = is_causal and window is None  # a mask with a window says all of it
    # what fits needs no check; the public function says what doesn't
    fits = (
        bias is None
        and all(prefix[0].shape[1] == key.shape[1] and prefix[0].shape[3] == key.shape[3] for prefix in prefixes)
        and (
            attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape == (key.shape[0], key.shape[2]))
        )
    )
    attend = prompt_attention if fits else functional.prompt_attention
    masking = {"is_causal": is_causal, "window": window, "key_padding_mask": attention_mask, "bias": bias}
    return attend(query, key, value, prefixes, scale=scaling, **masking).transpose(1, 2), None


def _mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    **kwargs: Any,
) -> Tensor | _Mask | None:
    """The (B, S) mask as it is, with the window that transformers' function of places leaves, if it leaves one."""
    # not getattr with a default, which Dynamo gives for every function within a function
    kind = "" if mask_function is None or isinstance(mask_function, functools.partial) else mask_function.__qualname__
    if mask_function is None or kind == "bidirectional_mask_function":
        return attention_mask
    if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise ValueError("an encoder that takes prompts can't fill a static cache: unwrap() it first, or use a dynamic one")
    return _Mask(attention_mask, _window_of(mask_function))


_UNKNOWN = "a layer of this encoder has a mask by {}, which attention with prompts does not have"


def _window_of(function: Callable[..., Any]) -> Window:
    """(left, right) of one of transformers' functions of places.

    Raises:
        ValueError: it is none of those that are known to leave a window.
    """
    if isinstance(function, functools.partial):
        raise ValueError(_UNKNOWN.format("partial"))
    name = function.__qualname__.removesuffix(".<locals>.inner_mask")
    if name == "causal_mask_function":
        return CAUSAL
    if name == "bidirectional_mask_function":
        return UNLIMITED
    inside = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in ("and_masks.<locals>.and_mask", "or_masks.<locals>.or_mask"):
        limits = zip(*map(_window_of, inside["mask_functions"].cell_contents), strict=True)
        return tuple(_strictest(each) if name.startswith("and") else _widest(each) for each in limits)
    if name == "Gemma3TextModel.forward.<locals>.<lambda>":  # joined to the causal one it lets all be seen
        return UNLIMITED
    if name in _WINDOWS:
        return _WINDOWS[name](inside["sliding_window"].cell_contents)
    if "packed_sequence" in name:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # then transformers takes any position_ids for packed ones
            return _window_of(inside["mask_function"].cell_contents) if "mask_function" in inside else UNLIMITED
        raise ValueError(
            "position_ids jump and there is no attention_mask: transformers takes that for several sequences packed into one, "
            "which can't have prompts of their own; pass an attention_mask"
        )
    raise ValueError(_UNKNOWN.format(name))


_WINDOWS: dict[str, Callable[[int], Window]] = {
    "sliding_window_overlay": lambda size: (size - 1, None),
    "sliding_window_bidirectional_overlay": lambda size: (size, size),
    "_bidirectional_window_overlay": lambda size: (size - 1, size - 1),
}
"""transformers' functions of places, by the name of what makes them, and how far each lets a token see."""


def _strictest(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _widest(limits: Sequence[int | None]) -> int | None:
    return None if None in limits else max(limits)


def _replace_config(old: Any, new: Any, encoder: nn.Module) -> None:
    """In the encoder and all its parts that have the old one."""
    for module in encoder.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def register_interfaces() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def attach(encoder: nn.Module) -> Callable[[nn.Module], None]:
    """Have an encoder's attention call ours; return what undoes that.

    Raises:
        TypeError: no file that its class comes from knows transformers' attention interface.
    """
    files = {cls.__module__ for cls in type(encoder).__mro__} - {"transformers.modeling_utils"}  # which knows it in any case
    if not any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files):
        raise TypeError(
            f"{type(encoder).__name__} doesn't go through transformers' attention interface in this version of it, where prompts "
            "enter (docs/own_transformer.md says how to attach to another attention)"
        )
    # a config of its own: the user's may be a decoder's or another encoder's too
    config, ours = encoder.config, copy.copy(encoder.config)
    undo = functools.partial(_replace_config, ours, config)
    try:
        _replace_config(config, ours, encoder)
        encoder.set_attn_implementation(NAME)
    except BaseException:  # a Ctrl-C too
        undo(encoder)
        raise
    return undo
