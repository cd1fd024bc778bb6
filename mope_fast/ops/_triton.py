"""What launches of Triton kernels share."""

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own interpreter runs the kernels on CPU tensors; it must be chosen before triton is imported."""


@functools.cache
def kernels_of(name: str) -> ModuleType:
    """A module of device code. Imported when it is first needed, because that imports Triton."""
    return importlib.import_module(f"..kernels.{name}", __package__)


def launch_kernel(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launch with arguments by name, of which a kernel takes what it has parameters for; Triton binds them faster in order."""
    # a product and a sum are one instruction, whatever a release of Triton has as its default
    options: dict[str, Any] = {"enable_fp_fusion": True}
    options |= {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    kernel[(programs,)](*[arguments[name] for name in kernel.arg_names], **options)


def castable(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    """What meets tensors of ``dtype`` in a kernel that Triton's interpreter runs: bfloat16 and float64 don't meet there.

    It gives bfloat16 the bits of an integer on the way from float64. Gradients come back in the tensors' own dtypes.
    """
    pair, wide = {torch.bfloat16, torch.float64}, torch.promote_types(dtype, torch.float32)
    return [tensor if tensor is None or {tensor.dtype, dtype} != pair else tensor.to(wide) for tensor in tensors]


def strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    """None for a tensor that isn't there."""
    return None if tensor is None else tensor.stride()


def not_empty(tensor: Tensor | None) -> Tensor | None:
    """None for a tensor without elements: kernels leave out what isn't there."""
    return tensor if tensor is None or tensor.numel() else None


def prefix_targets(grads: Sequence[Tensor], batch: int, parts: int, dtype: torch.dtype) -> list[Tensor | None]:
    """Where programs write gradients (2, B or 1, H, P, Dh) of prefixes: (2, B, parts, H, P, Dh), or None for one without elements.

    A gradient itself if each number of it is one program's, else memory in ``dtype`` for :func:`sum_parts`.
    """
    targets: list[Tensor | None] = []
    for grad in grads:
        if grad.numel() == 0:
            targets.append(None)
        elif grad.shape[1] == batch and parts == 1:
            targets.append(grad.unsqueeze(2))
        else:
            targets.append(grad.new_empty((2, batch, parts, *grad.shape[2:]), dtype=dtype))
    return targets


def sum_parts(grads: Sequence[Tensor], targets: Sequence[Tensor | None]) -> None:
    """Into gradients of prefixes what programs wrote apart: summed over parts, and over samples that share the prefix."""
    for grad, target in zip(grads, targets, strict=True):
        if target is not None and target.shape[1:3] != (grad.shape[1], 1):
            grad.copy_(target.sum((1, 2) if grad.shape[1] < target.shape[1] else 2).view(grad.shape))
