"""Autocast: where it is on, what it asks for, and how to leave it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def _is_on(device_type: str) -> bool:
    # asking for a device without autocast raises; torch 2.11 can't compile the question whether it has one
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off; costs nothing where it already is."""
    return torch.autocast(device_type, enabled=False) if _is_on(device_type) else nullcontext()


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, but for the call where there is nothing to convert: small batches consist of calls."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on and the tensor isn't float64, else the tensor's own."""
    device_type = tensor.device.type
    if tensor.dtype != torch.float64 and _is_on(device_type):
        return torch.get_autocast_dtype(device_type)
    return tensor.dtype
