"""Public functions: their documentation and the checks of their arguments; ``_dispatch`` does the rest.

Letters in shapes: B batch, S tokens, H heads, Dh head dim, D model dim, K experts, L prompt length, M table width, N layers,
P prefix length, Hi and Wi height and width of an image in tokens, W number of tokens in a window.
``impl``: "auto" uses the best implementation that can run; a name uses that one, or raises an error that says why it can't run.
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

    ``scores = gate(softmax(logits / temperature + noise))`` and ``mixed[b, l] = sum_k scores[b, k] experts[k, l]``.
    With ``gram`` the mixture is divided by ``sqrt(max(scores' gram[l] scores, 0) + eps)``: this is the mixture of experts to which
    a layer norm and a projection have already been applied (K/V-space mixing, see :class:`mope_fast.PromptBank`).
    No tensor of shape (B, K, L, M) is created.

    Args:
        logits: (B, K), any float dtype; softmax and sums are taken in float32 (float64 for float64). B may be 0, K is 1 to 1024.
        experts: (K, L, M), any float dtype, any strides.
        temperature: the temperature tau of the softmax, > 0.
        noise: (B, K), added after the division by the temperature; a constant without gradient. None adds nothing.
        top_k: keep the k largest scores of each sample (ties: the lower index) and set the others to zero; None keeps all.
        renormalize: divide the kept scores by their sum.
        gram: (L, K, K), see above; None for no division.
        eps: added under the root, at least 1e-25; only used with ``gram``.
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
    """Measure how unevenly a batch uses its experts (MoPE, arXiv 2403.10568, equation 5): squared coefficient of variation.

    ``Imp_k = sum_b scores[b, k]``, ``loss = var(Imp) / mean(Imp)^2`` with the unbiased variance. A layer whose loss is
    <= ``threshold`` counts as 0, without gradient. The losses are averaged over layers. The result lies between 0 (even use) and K
    (one expert takes all). The threshold is compared with the squared value, as in the released code.

    Args:
        scores: (B, K) or (N, B, K), any float dtype; sums are taken in float32 (float64 for float64). K = 1 or B = 0 gives 0.
        threshold: largest loss of a layer that counts as 0; >= 0.
        process_group: sum the importance over the ranks of this group first (one all-reduce of (N, K) numbers, none in the backward
            pass). Each rank then returns the loss of the whole batch, with a gradient that is already multiplied by the number of
            ranks, so that the average taken by DDP and FSDP is exactly the gradient of one such loss: don't scale it further. None
            for this process's batch alone.

    Returns:
        A scalar tensor. The call never waits for the device.
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
    """Compute attention whose queries also see up to two key/value prefixes: prompts that are keys and values only.

    Every query sees every prefix key; padding, causality, windows and bias apply to token keys only. There is no attention dropout:
    frozen encoders are in eval mode. Softmax and sums are taken in float32 (float64 for float64).

    Args:
        q: (B, H, Sq, Dh), Dh at most 256. All tensors may have any strides.
        k, v: (B, Hkv, Sk, Dh), in the dtype of q. Hkv is H or a divisor of it: H / Hkv consecutive heads of q share one head of k
            and v (grouped-query attention).
        prefixes: up to two pairs of keys and values, each (B or 1, Hkv, P, Dh), of any float dtype. Batch 1 is shared by all
            samples. An optional third member, (B or 1, P) bool, is True for the prefix keys that are present in a sample.
        is_causal: query i sees the token keys up to its own position, ``i + Sk - Sq``.
        window: (left, right), both inclusive: a query sees ``left`` token keys before its own position and ``right`` after it; None
            for no limit. With ``is_causal`` it sees none after it.
        key_padding_mask: (B, Sk) bool, True = a real token, in any positions. None: all tokens are real.
        bias: (B or 1, H or 1, Sq, Sk), any float dtype, added to the scaled products with token keys; gets a gradient if it
            requires one. To mask out a key use -inf: with -1e9 in a whole row, torch's kernels lose the row's gradients.
        scale: factor of the products; default ``Dh ** -0.5``.
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
    """Compute self-attention in which each group of positions sees only some groups (MoPE-BAF, arXiv 2403.11311).

    With ``impl="triton"`` no mask tensor is created; if every group sees consecutive positions, keys outside are skipped.

    Args:
        q, k, v: (B, H, S, Dh) in one dtype, Dh at most 256, S the sum of the field's lengths; any strides. k and v may have fewer
            heads, as in :func:`prompt_attention`.
        field: the groups, and which group sees which.
        key_padding_mask: (B, S) bool, True = a real token, in any positions; combined with the field. None: all tokens are real.
        bias: (B or 1, H or 1, S, S), any float dtype, added to the scaled products; gets a gradient if it requires one.
        scale: factor of the products; default ``Dh ** -0.5``.
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
    """Compute self-attention in shifted windows of an image (Swin, arXiv 2103.14030); queries also see prompts of their image.

    Roll, padding, partition, their inverses and the mask between parts that the shift brought together are those of timm's
    ``SwinTransformerBlock``. With ``impl="triton"`` they are index arithmetic inside one kernel: the image is not copied.

    Args:
        qkv: (B, Hi, Wi, 3, H, Dh), the packed projection of an image's tokens in their own order; any strides.
        prefixes: of images, in the form of :func:`prompt_attention`; all windows of an image see its prefixes.
        relative_position_bias: (H, W, W), the W tokens of a window in row order; any float dtype; gets a gradient if it requires
            one.
        window_size: side of the windows, or (height, width), in tokens. Images of any size are padded at the bottom and right.
        shift_size: at least 0 and less than ``window_size``; an int, or (height, width). If it is not 0, tokens from different
            sides of the image meet in the last windows: -100 is added between them, as in Swin. (With "cpu" and "sdpa" on a CPU,
            such tokens don't see each other at all in 32 bits or fewer, because exp(-100) is a denormal number there. The result is
            the same, unless a masked product is more than 80 above all others.)
        pad_qkv: (3, H, Dh), the values of q, k and v at padding positions, which are not masked. timm pads before the projection,
            so they are the projection's bias. None for zeros. Gets a gradient if it requires one.
        scale: factor of the products; default ``Dh ** -0.5``.
        impl: "auto", "triton", "cpu" (torch's own ops, a few images at a time), "sdpa" or "reference".

    Returns:
        (B, Hi, Wi, H * Dh), in image order, in the autocast dtype if autocast is on, else in that of ``qkv``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, rank, size or value.
        RuntimeError: ``impl`` can't run here.
    """
    window, shift = check_window_prompt_attention(qkv, prefixes, relative_position_bias, window_size, shift_size, pad_qkv, scale)
    settings: dict[str, Any] = {"window_size": window, "shift_size": shift, "pad_qkv": pad_qkv, "scale": scale}
    return _dispatch.window_prompt_attention(qkv, prefixes, relative_position_bias, impl=impl, **settings)
