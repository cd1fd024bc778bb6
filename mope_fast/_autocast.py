"""Helpers for autocast: whether it is on, its dtype, and a way to turn it off."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def _is_on(device_type: str) -> bool:
    # is_autocast_enabled raises for a device without autocast; torch 2.11 can't compile the check whether a device has it
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Return a context in which autocast is off; costs nothing if it already is off."""
    return torch.autocast(device_type, enabled=False) if _is_on(device_type) else nullcontext()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``tensor.to(dtype)``, without the call if the dtype already matches: the time of small batches is mostly calls."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the autocast dtype if autocast is on and the tensor isn't float64, else the tensor's own dtype."""
    device_type = tensor.device.type
    if tensor.dtype != torch.float64 and _is_on(device_type):
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype
