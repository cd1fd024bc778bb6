"""Which implementation each function would use, and why the others would not. Nothing here queries a device at import."""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from .ops.route_and_mix import INTERPRETED

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEFAULT_IMPL = os.environ.get("MOPE_FAST_IMPL", "auto")
"""Read once, at import: the implementation that ``impl="auto"`` stands for, where a function has it."""

Reason = Callable[[torch.device, torch.dtype], str | None]


_cached_capability = functools.cache(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return _cached_capability(device)


def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed (Linux: pip install triton)"
    if INTERPRETED:
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 takes CPU tensors, these are on {device.type}"
    if device.type != "cuda":
        return f"the tensors are on {device.type}; move them to a GPU, or set TRITON_INTERPRET=1 before starting Python"
    if dtype == torch.float64:
        return "float64 runs on the reference (or in Triton's interpreter)"
    if torch.version.hip is None and _compute_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


IMPLEMENTATIONS: dict[str, dict[str, Reason]] = {
    "route_and_mix": {"triton": _why_not_triton, "reference": _always},
    "prompt_attention": {"sdpa": _always, "reference": _always},
    "importance_loss": {"reference": _always},
}
"""For each function its implementations, the best first, with the reason why one can't run (None: it can)."""


def why_not(function: str, device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each implementation of ``function`` the reason why it can't run on such tensors, or None."""
    return {name: reason(device, dtype) for name, reason in IMPLEMENTATIONS[function].items()}


def choose(function: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation to run.

    Raises:
        ValueError: ``function`` has no implementation of that name.
        RuntimeError: it has, but it can't run on such tensors; the message says why and what can.
    """
    candidates = IMPLEMENTATIONS[function]
    if impl == "auto" and DEFAULT_IMPL != "auto":
        known = sorted({name for of_function in IMPLEMENTATIONS.values() for name in of_function})
        if DEFAULT_IMPL not in known:
            raise RuntimeError(f"the environment has MOPE_FAST_IMPL={DEFAULT_IMPL!r}, expected one of {['auto', *known]}")
        impl = DEFAULT_IMPL if DEFAULT_IMPL in candidates else impl
    if impl == "auto":
        for name, reason in candidates.items():
            if reason(device, dtype) is None:
                return name
    if impl not in candidates:
        raise ValueError(f"{function} got impl={impl!r}, expected one of {['auto', *candidates]}")
    if (problem := candidates[impl](device, dtype)) is not None:
        able = [name for name, reason in candidates.items() if reason(device, dtype) is None]
        raise RuntimeError(
            f"{function} got impl={impl!r}, which can't run on {str(dtype).removeprefix('torch.')} tensors on {device}: {problem}. "
            f"Here it can run as {able}; impl='auto' chooses {able[0]!r}"
        )
    return impl
