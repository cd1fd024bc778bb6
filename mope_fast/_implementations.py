"""Choose the implementation of each function, with the reasons against the others. Nothing here queries a device at import."""

import functools
import importlib.util
import itertools
import os
import shutil
import sysconfig
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .ops import xformers_attention
from .ops._triton import INTERPRETED

HAS_TRITON = importlib.util.find_spec("triton") is not None
DEFAULT_IMPL = os.environ.get("MOPE_FAST_IMPL", "auto")
"""Read once, at import: the implementation that ``impl="auto"`` means for functions that have it."""


class Problem(NamedTuple):
    """Everything the choice may depend on; never the batch, so that a sample's bits don't depend on the rest of its batch."""

    device: torch.device
    dtype: torch.dtype
    keys: int = 0
    """For attention: the number of prefix and token keys."""
    masked: bool = False
    """For attention: torch's kernels would need a mask tensor."""
    head_dim: int = 0
    """For attention in windows: the head dimension."""


Reason = Callable[[Problem], str | None]


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let Dynamo call ``function`` and treat its result as constant, as ``torch.compiler.assume_constant_result`` does."""
    # torch's own decorator imports all of Dynamo, which takes half as long as importing torch
    vars(function)["_dynamo_marked_constant"] = True
    return function


_cached_capability = functools.cache(torch.cuda.get_device_capability)


@_constant
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return _cached_capability(device)


@functools.cache
def _found_no_compiler() -> str | None:
    """Return why Triton can't build its kernel launchers, or None if it can. Looks where Triton itself looks."""
    named = os.environ.get("CC")
    has_compiler = any(map(shutil.which, ("gcc", "clang") if named is None else (named,)))
    headers = _folders_of_headers()
    if has_compiler and any(os.path.isfile(os.path.join(folder, "Python.h")) for folder in headers):
        return None
    from triton import knobs

    if knobs.build.impl is not None:
        return None
    if has_compiler:
        return f"Triton needs Python's headers to launch kernels, and {headers[0]} has no Python.h (apt install python3-dev)"
    got = "neither gcc nor clang is on the PATH" if named is None else f"CC={named!r} is not a program"
    return f"Triton needs a C compiler to launch kernels, and {got}: install gcc (apt install gcc) or set CC to a compiler"


def _folders_of_headers() -> list[str]:
    scheme = sysconfig.get_default_scheme()
    # Debian's default scheme has a prefix that differs from that of its headers
    own = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    more = [os.environ.get(name, "").split(os.pathsep) for name in ("CPATH", "C_INCLUDE_PATH")]
    return [own, *filter(None, itertools.chain(*more))]


@_constant
def _why_not_compiled() -> str | None:
    return _found_no_compiler()


def _why_not_triton(problem: Problem) -> str | None:
    device = problem.device
    if not HAS_TRITON:
        return "triton is not installed (Linux: pip install triton)"
    if INTERPRETED:
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 needs CPU tensors, these are on {device.type}"
    if device.type != "cuda":
        return f"the tensors are on {device.type}; move them to a GPU, or set TRITON_INTERPRET=1 before starting Python"
    if problem.dtype == torch.float64:
        return "float64 runs on the reference (or in Triton's interpreter)"
    if torch.version.hip is None and _compute_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return _why_not_compiled()


def _why_not_triton_in_windows(problem: Problem) -> str | None:
    if (reason := _why_not_triton(problem)) is not None or not problem.keys:
        return reason
    from .kernels.launch import fits_window_attention

    if fits_window_attention(problem.keys, problem.head_dim, problem.dtype.itemsize):
        return None
    return f"a window with its prompts has {problem.keys} keys of head dimension {problem.head_dim}, more than the kernel can hold"


@_constant
def _why_not_loaded_xformers() -> str | None:
    return xformers_attention.why_not_loaded()


def _why_not_xformers(problem: Problem) -> str | None:
    if problem.device.type != "cuda":
        return f"xformers has operators for CUDA only; the tensors are on {problem.device.type}"
    if problem.dtype == torch.float64:
        return "xformers takes float16, bfloat16 and float32"
    return _why_not_loaded_xformers()


def _why_not_cpu(problem: Problem) -> str | None:
    if problem.device.type != "cpu":
        return f"it is for CPUs; the tensors are on {problem.device.type}"
    return "TRITON_INTERPRET=1 runs the Triton kernels in its place" if INTERPRETED else None


def _always(problem: Problem) -> str | None:
    return None


TRITON_KEYS = 512
"""Up to this many keys Triton's attention is meant to be the fastest.

For what speaks against it, until it is measured on a GPU, see ``benchmarks/NOTES.md``.
"""


def _why_not_first(problem: Problem) -> str | None:
    """Return why ``auto`` chooses another implementation on a GPU although Triton can run, or None."""
    return "impl='auto' leaves it out on ROCm, where its kernels have not been run" if torch.version.hip is not None else None


def _why_attention_is_not_first(problem: Problem) -> str | None:
    if (reason := _why_not_first(problem)) is not None or problem.masked:
        return reason
    if problem.keys > TRITON_KEYS:
        return f"impl='auto' leaves more than {TRITON_KEYS} keys without a mask tensor to torch's kernels, which are made for them"
    if problem.dtype == torch.float32:
        return "impl='auto' leaves float32 without a mask tensor to torch's kernels until a GPU has shown which is faster"
    return None


def _attention_order(problem: Problem) -> tuple[str, ...]:
    """Return implementations of attention, the best first."""
    if problem.device.type == "cuda" and _why_attention_is_not_first(problem) is None:
        return "triton", "sdpa", "xformers", "reference"
    return "sdpa", "triton", "xformers", "reference"


def _window_order(problem: Problem) -> tuple[str, ...]:
    """Return implementations of attention in windows, the best first."""
    if problem.device.type != "cuda":
        return "cpu", "sdpa", "triton", "reference"
    return ("triton", "sdpa", "reference") if _why_not_first(problem) is None else ("sdpa", "triton", "reference")


def _mixing_order(problem: Problem) -> tuple[str, ...]:
    """Return implementations of mixing experts, the best first."""
    return ("triton", "reference") if _why_not_first(problem) is None else ("reference", "triton")


_ATTENTION: dict[str, Reason] = {"triton": _why_not_triton, "xformers": _why_not_xformers, "sdpa": _always, "reference": _always}
_WINDOWS: dict[str, Reason] = {"triton": _why_not_triton_in_windows, "cpu": _why_not_cpu, "sdpa": _always, "reference": _always}
IMPLEMENTATIONS: dict[str, dict[str, Reason]] = {
    "route_and_mix": {"triton": _why_not_triton, "reference": _always},
    "prompt_attention": _ATTENTION,
    "receptive_field_attention": _ATTENTION,
    "window_prompt_attention": _WINDOWS,
    "importance_loss": {"reference": _always},
}
"""Function -> its implementations, each with a callable that returns why it can't run, or None if it can."""

_ORDER: dict[str, Callable[[Problem], tuple[str, ...]]] = {
    "route_and_mix": _mixing_order,
    "prompt_attention": _attention_order,
    "receptive_field_attention": _attention_order,
    "window_prompt_attention": _window_order,
    "importance_loss": lambda problem: ("reference",),
}
"""The implementations that ``auto`` tries, the best first. All such rules are here."""

_TORCHS_OWN = ("sdpa", "reference")


def _order(function: str, problem: Problem) -> list[str]:
    """Return what ``auto`` tries; torch.export gets torch's own ops first, so that its program can be loaded without mope_fast."""
    order = list(_ORDER[function](problem))
    if torch.compiler.is_exporting():
        order = [name for name in order if name in _TORCHS_OWN] + [name for name in order if name not in _TORCHS_OWN]
    return order


_NOT_FIRST: dict[str, Reason] = {
    "route_and_mix": _why_not_first,
    "prompt_attention": _why_attention_is_not_first,
    "receptive_field_attention": _why_attention_is_not_first,
    "window_prompt_attention": _why_not_first,
}


def why_not(function: str, problem: Problem) -> dict[str, str]:
    """Return the implementations that can't run on such tensors, or that ``auto`` leaves out on a GPU, with the reasons."""
    reasons = {name: reason(problem) for name, reason in IMPLEMENTATIONS[function].items()}
    if problem.device.type == "cuda" and "triton" in reasons:
        reasons["triton"] = reasons["triton"] or _NOT_FIRST[function](problem)
    return {name: reason for name, reason in reasons.items() if reason is not None}


def choose(function: str, impl: str, problem: Problem) -> str:
    """Return the name of the implementation to run.

    Raises:
        ValueError: ``function`` has no implementation named ``impl``.
        RuntimeError: it can't run on such tensors; the message says why, and which implementations can. Or MOPE_FAST_IMPL names no
            implementation.
    """
    candidates = IMPLEMENTATIONS[function]
    if impl == "auto" and DEFAULT_IMPL != "auto":
        known = sorted({name for of_function in IMPLEMENTATIONS.values() for name in of_function})
        if DEFAULT_IMPL not in known:
            raise RuntimeError(f"the environment has MOPE_FAST_IMPL={DEFAULT_IMPL!r}, expected one of {['auto', *known]}")
        impl = DEFAULT_IMPL if DEFAULT_IMPL in candidates else impl
    if impl == "auto":
        for name in _order(function, problem):
            if candidates[name](problem) is None:
                return name
    if impl not in candidates:
        raise ValueError(f"{function} got impl={impl!r}, expected one of {['auto', *candidates]}")
    if (reason := candidates[impl](problem)) is not None:
        able = [name for name in _order(function, problem) if candidates[name](problem) is None]
        raise RuntimeError(
            f"{function} got impl={impl!r}, which can't run on {str(problem.dtype).removeprefix('torch.')} tensors on "
            f"{problem.device}: {reason}. Here it can run as {able}; impl='auto' chooses {able[0]!r}"
        )
    return impl
