"""Public functions: what they mean, and the check of their arguments; ``_dispatch`` does the rest.

Letters in shapes: B batch, S tokens, H heads, Dh head dim, D model dim, K experts, L prompt length, M table width, N layers,
P prefix length, Hi and Wi height and width of an image in tokens, W tokens of a window.
``impl``: "auto" takes the best implementation that can run, a name takes that one or raises an error saying why it can't.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from . import _dispatch, reference
from ._checks import (
    check_importance_loss,
    check_prompt_attention,
    check_receptive_field_attention,
    check_route_and_mix,
    check_window_prompt_attention,
)
from ._distributed import sum_over_ranks
from .receptive_field import ReceptiveField
from .reference.importance import importance_loss_of_sums

__all__ = [
    "ReceptiveField",
    "importance_loss",
    "prompt_attention",
    "receptive_field_attention",
    "route_and_mix",
    "window_prompt_attention",
]


def route_and_mix(
    logits: Tensor,
    experts: Tensor,
    *,
    temperature: float = 0.1,
    noise: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = False,
    gram: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Route every sample over K prompt experts and mix them (MoPE, arXiv 2403.10568, equations 3 and 4).

    ``scores = gate(softmax(logits / temperature + noise))`` and ``mixed[b, l] = sum_k scores[b, k] experts[k, l]``,
    with ``gram`` divided by ``sqrt(max(scores' gram[l] scores, 0) + eps)``: the mixture of experts that a layer norm and a
    projection have already been through (K/V-space mixing, see :class:`mope_fast.PromptBank`).
    Nothing of shape (B, K, L, M) is ever made.

    Args:
        logits: (B, K), any float dtype; softmax and sums are taken in float32 (float64 for float64). B may be 0, K is 1 to 1024.
        experts: (K, L, M), any float dtype, any strides.
        temperature: tau > 0.
        noise: (B, K), added after the temperature; a constant, it gets no gradient.
        top_k: keep the k largest scores of each sample (ties: the lower index) and set the others to zero; None keeps all.
        renormalize: divide the kept scores by their sum.
        gram: (L, K, K) or None.
        eps: added below the root, at least 1e-25; only used with ``gram``.
        impl: "auto", "triton" or "reference".

    Returns:
        mixed (B, L, M) in the autocast dtype if autocast is on, else in the experts' dtype, and the scores (B, K) after the gate
        in float32 (float64 for float64). Both are differentiable in logits, experts and gram. A NaN stays in its own sample.

    Raises:
        TypeError, ValueError: an argument has a wrong type, rank, size or value.
        RuntimeError: ``impl`` can't run here.
    """
    check_route_and_mix(logits, experts, temperature, noise, top_k, renormalize, gram, eps)
    return _dispatch.route_and_mix(
        logits, experts, temperature=temperature, noise=noise, top_k=top_k, renormalize=renormalize, gram=gram, eps=eps, impl=impl
    )


def importance_loss(
    scores: Tensor, *, threshold: float = 0.1, process_group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """How unevenly a batch uses its experts (MoPE, arXiv 2403.10568, equation 5): squared coefficient of variation.

    ``Imp_k = sum_b scores[b, k]``, ``loss = var(Imp) / mean(Imp)^2`` with the unbiased variance; 0 without gradient for a layer
    where that is <= ``threshold``; averaged over layers. It lies between 0 (even use) and K (one expert takes all).
    The threshold meets the squared value, as in the released code.

    Args:
        scores: (B, K) or (N, B, K), any float dtype; sums are taken in float32 (float64 for float64). K = 1 or B = 0 gives 0.
        threshold: >= 0.
        process_group: sum the importance over its ranks first (one all-reduce of (N, K) numbers, none in the backward pass). Each
            rank then returns the loss of the whole batch, with a gradient that is already multiplied by the number of ranks, so
            that the average of DDP and FSDP is exactly the gradient of one such loss: multiply it by nothing.

    Returns:
        A scalar. It never waits for the device.
    """
    check_importance_loss(scores, threshold)
    if process_group is None:
        return reference.importance_loss(scores, threshold=threshold)
    sums = scores.to(torch.promote_types(scores.dtype, torch.float32)).sum(-2)
    return importance_loss_of_sums(sum_over_ranks([sums], process_group)[0], threshold=threshold)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]] = (),
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention whose queries also see up to two key/value prefixes: prompts that are keys and values only.

    Every query sees every prefix key; padding, causality, windows and bias are about token keys. There is no attention dropout:
    frozen encoders are in eval mode. Softmax and sums are taken in float32 (float64 for float64).

    Args:
        q: (B, H, Sq, Dh), Dh at most 256. Any strides, as everything here.
        k, v: (B, Hkv, Sk, Dh), in the dtype of q. Hkv is H or a divisor of it: H / Hkv heads of q after each other share one
            (grouped-query attention).
        prefixes: up to two pairs of keys and values, each (B or 1, Hkv, P, Dh), of any float dtype. Batch 1 is shared by all
            samples. A third member (B or 1, P) bool says which of a sample's prefix keys are there (True).
        is_causal: query i sees the token keys up to its place, ``i + Sk - Sq``.
        window: (left, right), both inclusive: of the token keys a query sees ``left`` before its place and ``right`` behind it;
            None for no limit. With ``is_causal`` none behind it.
        key_padding_mask: (B, Sk) bool, True = a real token, in any positions.
        bias: (B or 1, H or 1, Sq, Sk), any float dtype, added to the scaled products with token keys; gets a gradient on
            request. To hide a key use -inf: where torch's kernels see -1e9 in a whole row, their gradients lose it.
        scale: default ``Dh ** -0.5``.
        impl: "auto", "triton", "xformers", "sdpa" or "reference".

    Returns:
        (B, H, Sq, Dh) in the autocast dtype if autocast is on, else in q's. A query without a key gives zeros and zero gradients.

    Raises:
        TypeError, ValueError: an argument has a wrong type, rank, size or value.
        RuntimeError: ``impl`` can't run here.
    """
    check_prompt_attention(q, k, v, prefixes, key_padding_mask, bias, scale, is_causal, window)
    masking: dict[str, Any] = {"window": window, "key_padding_mask": key_padding_mask, "bias": bias, "scale": scale}
    return _dispatch.prompt_attention(q, k, v, prefixes, is_causal=is_causal, impl=impl, **masking)


def receptive_field_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    field: ReceptiveField,
    *,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Self-attention in which each group of positions sees only some groups (MoPE-BAF, arXiv 2403.11311).

    With ``impl="triton"`` no mask tensor is made; where every group sees consecutive positions, the work outside is skipped.

    Args:
        q, k, v: (B, H, S, Dh) in one dtype, Dh at most 256, S the sum of the field's lengths; any strides. Heads of k and v as of
            :func:`prompt_attention`.
        field: which group sees which.
        key_padding_mask: (B, S) bool, True = a real token, in any positions; on top of the field.
        bias: (B or 1, H or 1, S, S), any float dtype, added to the scaled products; gets a gradient on request.
        scale: default ``Dh ** -0.5``.
        impl: "auto", "triton", "xformers", "sdpa" or "reference".

    Returns:
        (B, H, S, Dh) in the autocast dtype if autocast is on, else in q's. A query without a key gives zeros and zero gradients.

    Raises:
        TypeError, ValueError: an argument has a wrong type, rank, size or value.
        RuntimeError: ``impl`` can't run here.
    """
    check_receptive_field_attention(q, k, v, field, key_padding_mask, bias, scale)
    masking: dict[str, Any] = {"key_padding_mask": key_padding_mask, "bias": bias, "scale": scale}
    return _dispatch.receptive_field_attention(q, k, v, field, impl=impl, **masking)


def window_prompt_attention(
    qkv: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]],
    relative_position_bias: Tensor,
    *,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int],
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Self-attention in shifted windows of an image (Swin, arXiv 2103.14030) whose queries also see prompts of their image.

    Roll, padding, partition, their inverses and the mask between parts that the shift brought together are those of timm's
    ``SwinTransformerBlock``. With ``impl="triton"`` they are index arithmetic inside one kernel: no copy is made of the image.

    Args:
        qkv: (B, Hi, Wi, 3, H, Dh), the packed projection of an image's tokens in their own order; any strides.
        prefixes: as of :func:`prompt_attention`, of images: all windows of an image see them.
        relative_position_bias: (H, W, W), W the tokens of a window in row order; any float dtype; gets a gradient on request.
        window_size: side of the windows, or (height, width). Images of any size: they are padded at the bottom and right.
        shift_size: 0 or more and less than ``window_size``. Where it is not 0, tokens from different sides of the image meet in
            the last windows: -100 is added between them, as in Swin. (With "cpu" and "sdpa" on a CPU they don't see each
            other at all in 32 bits and fewer, because exp(-100) is a denormal number there: the same, unless a hidden product
            is more than 80 above all others.)
        pad_qkv: (3, H, Dh), what padding has for q, k and v; it is not masked. timm pads in front of the projection, so it is that
            one's bias. None for zeros. Gets a gradient on request.
        scale: default ``Dh ** -0.5``.
        impl: "auto", "triton", "cpu" (torch's own ops, some images at a time), "sdpa" or "reference".

    Returns:
        (B, Hi, Wi, H * Dh), in image order, in the autocast dtype if autocast is on, else in that of ``qkv``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, rank, size or value.
        RuntimeError: ``impl`` can't run here.
    """
    window, shift = check_window_prompt_attention(qkv, prefixes, relative_position_bias, window_size, shift_size, pad_qkv, scale)
    settings: dict[str, Any] = {"window_size": window, "shift_size": shift, "pad_qkv": pad_qkv, "scale": scale}
    return _dispatch.window_prompt_attention(qkv, prefixes, relative_position_bias, impl=impl, **settings)
