"""Forms of prompt and receptive-field attention. Everything that doesn't depend on inputs, such as masks, is made in ``build``."""

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from benchmarks.cases.attention import AttentionCase
from mope_fast import _implementations, functional
from mope_fast.functional import ReceptiveField

Prefixes = Sequence[tuple[Tensor, Tensor]]
Provider = Callable[[Tensor, Tensor, Tensor, Prefixes], Tensor]
ALIGNMENT = 8
"""Kernels with a mask tensor need head dims in multiples of this (in 16-bit elements), and xformers also the mask's rows."""


def concatenated(k: Tensor, v: Tensor, prefixes: Prefixes) -> tuple[Tensor, Tensor]:
    """Concatenate prefixes before keys and values, (B, H, P + S, Dh)."""
    if not prefixes:
        return k, v
    keys, values = zip(*prefixes, strict=True)
    keys, values = ([p.expand(k.shape[0], -1, -1, -1) for p in part] for part in (keys, values))
    return torch.cat([*keys, k], dim=2), torch.cat([*values, v], dim=2)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key and value heads to one for each query head, for kernels that need that."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))


def aligned(tensor: Tensor) -> Tensor:
    """Pad the last dimension with zeros to a multiple of ALIGNMENT; they change no product."""
    return F.pad(tensor, (0, -tensor.shape[-1] % ALIGNMENT)) if tensor.shape[-1] % ALIGNMENT else tensor


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Run SDPA with head dims padded where needed.

    On CUDA, with a mask and an unaligned head dim, only the math backend would be left; without a mask torch pads itself.
    """
    head_dim = q.shape[-1]
    if mask is not None:
        k, v = repeated(q, k, v)  # with shared key heads torch would use the math backend
        if q.is_cuda:
            q, k, v = map(aligned, (q, k, v))
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=head_dim**-0.5, enable_gqa=shared)[..., :head_dim]


def sdpa(case: AttentionCase, device: torch.device) -> Provider:
    """SDPA on concatenated keys; for an interval field each group runs on its slice of keys; a mask is used only where needed."""
    if case.field is not None and case.field.is_interval:
        return _sdpa_on_slices(case, device)
    mask = case.visible(device) if case.masked else None
    if case.causal and case.window is None and case.ragged is None and device.type == "cuda":
        mask = causal_lower_right(case.tokens, case.keys)  # a causal mask that CUDA kernels apply without a tensor
    return lambda q, k, v, prefixes: masked_sdpa(q, *concatenated(k, v, prefixes), mask)


def _sdpa_on_slices(case: AttentionCase, device: torch.device) -> Provider:
    padding = case.padding(device)
    blocks = [(rows, keys, None if padding is None else padding[:, None, None, keys]) for rows, keys in case.field.slices()]

    def attention(q: Tensor, k: Tensor, v: Tensor, _: Prefixes) -> Tensor:
        return torch.cat([masked_sdpa(q[:, :, rows], k[:, :, keys], v[:, :, keys], mask) for rows, keys, mask in blocks], dim=2)

    return attention


def sdpa_mask(case: AttentionCase, device: torch.device) -> Provider:
    """SDPA on concatenated keys with a boolean mask (B or 1, 1, S, P + S), even where it is not needed."""
    mask = case.visible(device)
    return lambda q, k, v, prefixes: masked_sdpa(q, *concatenated(k, v, prefixes), mask)


def sees_token(
    field: ReceptiveField | None, is_causal: bool, device: torch.device, window: tuple[int, int] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function that says whether a query sees a token. It uses plain tensor operations only, because it is traced."""
    if window is not None:
        before, behind = window
        return lambda query, token: (token >= query - before) & (token <= query + (0 if is_causal else behind))
    if field is None:
        return (lambda query, token: token <= query) if is_causal else (lambda query, token: token >= 0)
    if field.is_interval:
        first, last = field.lowered(device)[:2]
        return lambda query, token: (token >= first[query]) & (token < last[query])
    visible = field.mask(device)
    return lambda query, token: visible[query, token]


def mask_mod(case: AttentionCase, device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention's ``mask_mod``; keys are counted from the first prefix position."""
    length, padding = case.keys - case.tokens, case.padding(device)
    sees_it = sees_token(case.field, case.causal, device, case.window)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = torch.clamp(key - length, min=0)
        return (key < length) | sees_it(query, token)

    def sees_real(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        token = torch.clamp(key - length, min=0)
        return (key < length) | (sees_it(query, token) & padding[b, token])

    return sees if padding is None else sees_real


@functools.lru_cache(maxsize=1)
def flex(case: AttentionCase, device: torch.device) -> Provider:
    """FlexAttention compiled together with the concatenation, for this case only; a case's modes and timings run in a row and share
    it.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    batch = None if case.ragged is None else case.batch
    mask = create_block_mask(mask_mod(case, device), batch, None, case.tokens, case.keys, device=device) if case.masked else None

    def attention(q: Tensor, k: Tensor, v: Tensor, prefixes: Prefixes) -> Tensor:
        return flex_attention(q, *concatenated(k, v, prefixes), block_mask=mask, enable_gqa=case.key_heads is not None)

    return torch.compile(attention, fullgraph=True, dynamic=False)


def biased_xformers(visible: Tensor, batch: int, heads: int, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return memory_efficient_attention with a tensor bias of 0 where ``visible`` (B or 1, 1, S, keys) is True, else -inf."""
    from xformers.ops import memory_efficient_attention

    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))
    # a view into a tensor whose rows are padded to a multiple of ALIGNMENT
    bias = aligned(bias)[..., : visible.shape[-1]].expand(batch, heads, -1, -1)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head_dim = q.shape[-1]
        q, k, v = (aligned(t).transpose(1, 2) for t in (q, *repeated(q, k, v)))
        return memory_efficient_attention(q, k, v, attn_bias=bias, scale=head_dim**-0.5).transpose(1, 2)[..., :head_dim]

    return attention


def xformers_bias(case: AttentionCase, device: torch.device) -> Provider:
    """xformers on concatenated keys with a tensor bias, even where it is not needed."""
    biased = biased_xformers(case.visible(device), case.batch, case.heads, case.dtype)
    return lambda q, k, v, prefixes: biased(q, *concatenated(k, v, prefixes))


def _mope_fast(impl: str) -> Callable[[AttentionCase, torch.device], Provider]:
    """Use the public function, argument checks included."""

    def build(case: AttentionCase, device: torch.device) -> Provider:
        padding = case.padding(device)
        if case.field is not None:
            return lambda q, k, v, _: functional.receptive_field_attention(q, k, v, case.field, key_padding_mask=padding, impl=impl)
        return lambda q, k, v, prefixes: functional.prompt_attention(
            q, k, v, prefixes, is_causal=case.causal, window=case.window, key_padding_mask=padding, impl=impl
        )

    return build


PROVIDERS: dict[str, Callable[[AttentionCase, torch.device], Provider]] = {
    "sdpa": sdpa,
    "sdpa-mask": sdpa_mask,
    "flex": flex,
    "xformers-bias": xformers_bias,
    "xformers": _mope_fast("xformers"),
    "triton": _mope_fast("triton"),
    "auto": _mope_fast("auto"),
}
OURS = ("xformers", "triton", "auto")
NEEDS = {"xformers-bias": "xformers", "xformers": "xformers", "triton": "triton"}
"""Provider -> implementation of mope_fast that must be available for it."""


def _problem(case: AttentionCase, device: torch.device) -> _implementations.Problem:
    return _implementations.Problem(device, case.dtype, case.keys, case.masked)


def why_not_flex(device: torch.device, smoke: bool) -> str | None:
    """Return why FlexAttention isn't measured; None if it is."""
    if device.type != "cuda":
        return "FlexAttention has no backward on a CPU"
    return "a smoke run compiles nothing" if smoke else None


def why_not(name: str, case: AttentionCase, device: torch.device, smoke: bool) -> str | None:
    """Return why a provider isn't measured here; None if it is."""
    if name == "flex":
        return why_not_flex(device, smoke)
    return _implementations.why_not(case.op, _problem(case, device))[NEEDS[name]] if name in NEEDS else None


def implementation(name: str, case: AttentionCase, device: torch.device) -> str | None:
    """Return the implementation that ``auto`` chooses."""
    return _implementations.choose(case.op, "auto", _problem(case, device)) if name == "auto" else None
