"""An attention and a mask function for transformers' own extension points, through which prompts reach its layers.

The attention is registered with ``AttentionInterface``. The mask function is registered with ``AttentionMaskInterface``: it passes
the (B, S) padding mask on unchanged, together with a layer's window. Without a mask function transformers passes no mask at all,
and its own ones build a 4-D mask and wait for the device. No model is changed.
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
    """The mask of a layer that attends within a window."""

    padding: Tensor | None
    """(B, S) bool, True = a real token; None without padding."""
    window: Window


_OTHER_ATTENTION = {
    "softcap": "a cap on its logits",
    "s_aux": "attention sinks",
    "rel_pos": "a bias by position",
    "bias": "a bias",
}
"""Arguments that an encoder may pass to transformers' attention and that change its result, with their meaning."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Mask | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with prompts, in transformers' attention signature.

    Inputs are (B, H, S, Dh), the output is (B, S, H, Dh); keys and values may have fewer heads. A bias by token position comes as
    ``position_bias`` (T5) or as a floating-point mask (BEiT), both (B or 1, H or 1, S, S).
    """
    window, bias, prefixes = None, kwargs.get("position_bias"), prefixes_of(module)
    if isinstance(attention_mask, _Mask):
        attention_mask, window = attention_mask
    elif kwargs.get("sliding_window") is not None:
        raise ValueError(
            f"{type(module).__name__} attends within a window of {kwargs['sliding_window']} tokens, but the mask it was given "
            "has none: the tokens that it sees are unknown"
        )
    for name, meaning in _OTHER_ATTENTION.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name}, {meaning}, which attention with prompts does not support")
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.is_floating_point():
        attention_mask, bias = None, attention_mask if bias is None else bias + attention_mask
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, S), True = real; got {tuple(attention_mask.shape)}")
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    is_causal = is_causal and window is None  # a window includes causality
    # matching arguments need no check; for others the public function raises the error
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
    """Return the (B, S) mask unchanged, with the window that transformers' mask function of positions describes, if it has one."""
    # not getattr with a default: Dynamo returns the default for every nested function
    kind = "" if mask_function is None or isinstance(mask_function, functools.partial) else mask_function.__qualname__
    if mask_function is None or kind == "bidirectional_mask_function":
        return attention_mask
    if isinstance(q_offset, Tensor) or kv_offset + kv_length != q_offset + q_length:
        raise ValueError("an encoder that takes prompts can't fill a static cache: unwrap() it first, or use a dynamic cache")
    return _Mask(attention_mask, _window_of(mask_function))


_UNKNOWN = "a layer of this encoder has a mask by {}, which attention with prompts does not support"


def _window_of(function: Callable[..., Any]) -> Window:
    """Return the window (left, right) of one of transformers' mask functions of positions.

    Raises:
        ValueError: the function is not one of those that are known to describe a window.
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
    if name == "Gemma3TextModel.forward.<locals>.<lambda>":  # joined with the causal function it leaves all tokens visible
        return UNLIMITED
    if name in _WINDOWS:
        return _WINDOWS[name](inside["sliding_window"].cell_contents)
    if "packed_sequence" in name:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # then transformers treats any position_ids as packed
            return _window_of(inside["mask_function"].cell_contents) if "mask_function" in inside else UNLIMITED
        raise ValueError(
            "position_ids are not consecutive and there is no attention_mask: transformers treats that as several sequences packed "
            "into one, which can't have prompts of their own; pass an attention_mask"
        )
    raise ValueError(_UNKNOWN.format(name))


_WINDOWS: dict[str, Callable[[int], Window]] = {
    "sliding_window_overlay": lambda size: (size - 1, None),
    "sliding_window_bidirectional_overlay": lambda size: (size, size),
    "_bidirectional_window_overlay": lambda size: (size - 1, size - 1),
}
"""Name of the function that creates one of transformers' mask functions -> its window (left, right) for a size."""


def _strictest(limits: Sequence[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _widest(limits: Sequence[int | None]) -> int | None:
    return None if None in limits else max(limits)


def _replace_config(old: Any, new: Any, encoder: nn.Module) -> None:
    """Replace the config in the encoder and in all its submodules that have the old one."""
    for module in encoder.modules():
        if getattr(module, "config", None) is old:
            module.config = new


def register_interfaces() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def attach(encoder: nn.Module) -> Callable[[nn.Module], None]:
    """Make an encoder's attention call the library's; return a function that undoes this.

    Raises:
        TypeError: no module that defines its class or a base class uses transformers' attention interface.
    """
    files = {cls.__module__ for cls in type(encoder).__mro__} - {"transformers.modeling_utils"}  # which has it in any case
    if not any(hasattr(sys.modules.get(file), "ALL_ATTENTION_FUNCTIONS") for file in files):
        raise TypeError(
            f"{type(encoder).__name__} doesn't go through transformers' attention interface, where prompts enter, in this version "
            "of transformers (docs/own_transformer.md says how to attach to another attention)"
        )
    # a copy of the config: the user's may be shared with a decoder or another encoder
    config, ours = encoder.config, copy.copy(encoder.config)
    undo = functools.partial(_replace_config, ours, config)
    try:
        _replace_config(config, ours, encoder)
        encoder.set_attn_implementation(NAME)
    except BaseException:  # including Ctrl-C
        undo(encoder)
        raise
    return undo
