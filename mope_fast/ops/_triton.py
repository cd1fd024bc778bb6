"""What launches of Triton kernels share."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own interpreter runs the kernels on CPU tensors; it must be chosen before triton is imported."""


@functools.cache
def triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def product_dtypes(operands: torch.dtype, acc: torch.dtype) -> dict[str, Any]:
    """Types of the matrix products: operands in a 16-bit type, else in the accumulator's."""
    compute = operands if operands.itemsize == 2 else acc
    dot = torch.float32 if INTERPRETED and compute == torch.bfloat16 else compute
    return {"COMPUTE": triton_dtype(compute), "DOT": triton_dtype(dot), "ACC": triton_dtype(acc)}


def strides(tensor: Tensor | None, rank: int) -> tuple[int, ...]:
    """Zeros for a tensor that isn't there."""
    return (0,) * rank if tensor is None else tensor.stride()
