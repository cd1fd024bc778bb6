"""``prompt_attention`` and ``receptive_field_attention`` on xformers' memory_efficient_attention, within what its kernels accept.

Those take a last dimension in multiples of 8 (here zeros are added: they change no product), no boolean mask, and a tensor bias
only with rows of a multiple of 8 elements. So fields without padding run as one call for each block, causality as xformers' own
structured mask, and the rest as a tensor bias.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..receptive_field import ReceptiveField
from ..reference.attention import CAUSAL, UNLIMITED, Window, window_mask
from .sdpa_attention import concatenated, in_range, over_all_keys, repeated

ALIGNMENT = 8
_RUNTIME = "libcudart.so.12"


@functools.cache
def why_not_loaded() -> str | None:
    """Why xformers' CUDA operators can't be had in this process; None if they can. Loads them on the first call."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed (pip install 'mope_fast[xformers]')"
    preloaded = _preload_cuda_12_runtime()
    import xformers._cpp_lib as library

    if library._cpp_library_load_exception is None:
        return None
    hint = "" if preloaded else f"; its library needs {_RUNTIME} (pip install nvidia-cuda-runtime-cu12)"
    return f"xformers can't load its operators{hint}: {str(library._cpp_library_load_exception).splitlines()[0]}"


def _preload_cuda_12_runtime() -> bool:
    """xformers is built for CUDA 12; torch for CUDA 13 does not bring that runtime, nvidia-cuda-runtime-cu12 does."""
    spec = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") else None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        if (library := Path(folder) / "lib" / _RUNTIME).exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor]],
    *,
    window: Window,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """memory_efficient_attention on concatenated keys; a tensor bias only for padding, a window or a bias."""
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    queries, tokens = q.shape[2], k.shape[2]
    prefix_length = sum(pk.shape[2] for pk, _ in prefixes)
    k, v = concatenated(k, v, prefixes)
    # aligned to the last key, the triangle leaves every prefix key visible; with fewer tokens than queries it doesn't
    if window == CAUSAL and key_padding_mask is None and bias is None and queries <= tokens:
        return _attention(q, k, v, LowerTriangularFromBottomRightMask(), scale)
    # xformers' own window would hide prefixes too, and of its operators those for CUDA that come with it don't take it
    visible = None if window == UNLIMITED else window_mask(queries, tokens, window, q.device)
    return _with_tensor_bias(q, k, v, visible, key_padding_mask, bias, prefix_length, scale)


def receptive_field_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: ReceptiveField,
    *,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
) -> Tensor:
    """One call for each block of an unpadded interval field, else one with a tensor bias."""
    blocks = field.slices() if field.is_interval and key_padding_mask is None and bias is None else []
    if any(keys for _, keys in blocks):
        outs = [
            _attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], None, scale) if keys else torch.zeros_like(q[:, :, rows])
            for rows, keys in blocks
        ]
        return torch.cat(outs, dim=2)
    return _with_tensor_bias(q, k, v, field.kept_mask(q.device), key_padding_mask, bias, 0, scale)


def _with_tensor_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    key_padding_mask: Tensor | None,
    bias: Tensor | None,
    prefix_length: int,
    scale: float | None,
) -> Tensor:
    bias = None if bias is None else in_range(bias, q.dtype)
    visible, bias, fully_masked = over_all_keys(visible, key_padding_mask, bias, prefix_length, k.shape[2] - prefix_length)
    if visible is None and bias is None:
        return _attention(q, k, v, None, scale)
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    tensor = q.new_zeros(1, 1, queries, keys) if bias is None else bias
    tensor = tensor if visible is None else tensor.masked_fill(~visible, float("-inf"))
    tensor = tensor if fully_masked is None else tensor.masked_fill(fully_masked, 0.0)
    # rows of the storage are a multiple of the alignment, the tensor is a view of their beginning
    tensor = F.pad(tensor, (0, -keys % ALIGNMENT)).contiguous()[..., :keys].expand(batch, heads, -1, -1)
    if torch.is_grad_enabled() and tensor.requires_grad and not any(t.requires_grad for t in (q, k, v)):
        q = q.detach().requires_grad_()  # xformers asks only q, k and v whether there will be a backward
    out = _attention(q, k, v, tensor, scale)
    return out if fully_masked is None else out.masked_fill(fully_masked, 0.0)


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float | None) -> Tensor:
    """(B, H, S, Dh) in and out; xformers has tokens before heads."""
    from xformers.ops import memory_efficient_attention

    k, v = repeated(q, k, v)
    if q.numel() == 0 or k.shape[2] == 0:
        return q @ k.mT @ v  # zeros that know where they come from
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    q, k, v = (_aligned(t).transpose(1, 2) for t in (q, k, v))
    out = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    return out.transpose(1, 2)[..., :head_dim]


def _aligned(tensor: Tensor) -> Tensor:
    """Dense rows of a multiple of 8 elements that begin at one."""
    if tensor.shape[-1] % ALIGNMENT:
        tensor = F.pad(tensor, (0, -tensor.shape[-1] % ALIGNMENT))
    strides = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    aligned = tensor.stride(-1) == 1 and not any(start % ALIGNMENT for start in (tensor.storage_offset(), *strides))
    return tensor if aligned else tensor.clone(memory_format=torch.contiguous_format)
