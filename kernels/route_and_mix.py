"""Device code of ``route_and_mix``: router softmax, gate and expert mixing (MoPE, arXiv 2403.10568, equations 3 and 4).

    x      = logits / temperature + noise                        (B, K)
    scores = gate(softmax(x))                                    (B, K)
    mixed  = sum_k scores[:, k] * experts[k] / norm              (B, L, M)
    norm   = sqrt(max(scores' gram[l] scores, 0) + eps), or 1    (B, L)

Of a whole layer ``mix_kernel`` makes all prompts, [before | mixed + shift | after], and routes by the layer's own feature:

    x      = logits + feature weight' keys                       (B, K), with logits all that doesn't depend on the feature

Backward, with g the gradient of ``mixed``, du[b, l, k] = <g[b, l], experts[k, l]> and r = 1 / norm:

    d experts[k, l] = sum_b scores[b, k] r[b, l] g[b, l]
    d norm_sq[b, l] = -1/2 r^3 <scores[b], du[b, l]>, or 0 where it was below 0: there ``rstd`` is -r
    d scores        = d scores(given) + sum_l r du + d norm_sq (gram + gram') scores
    d gram[l]       = sum_b d norm_sq[b, l] scores[b] scores[b]'

and of a layer's own router, with query = feature weight' and d x what the gate and the softmax make of d scores:

    d feature = d x keys' weight,   d weight = sum_b (keys d x[b]) feature[b]',   d keys = sum_b query[b] d x[b]'

``mixture_grads_kernel`` makes du and all that is a sum of g, ``router_grads_kernel`` all that comes behind du. Who sums over the
batch makes d x of all its samples again: cheaper than a third launch. No kernel uses atomics: parts of a batch are written apart
and added later.

Pointers are ``*_ptr``, their strides tuples. A tensor that isn't there is None, and so is a gradient that nobody asked for.
``ACC`` is what sums are in, as the scores are; products are of ``OPERANDS``, which follow from ``mixed`` or g: see ``products.py``.
"""

import triton
import triton.language as tl

from .products import dot, operand_type, sum_type


@triton.jit
def _own_query(
    feature_ptr, weight_ptr, rows, in_batch, D, OWN, feature_strides, weight_strides,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, OWN_PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """feature weight' [rows, OWN_PADDED], zeros from OWN on; None without a feature."""
    query = None
    if feature_ptr is not None:
        own = tl.arange(0, OWN_PADDED)
        query = tl.zeros([BLOCK_B, OWN_PADDED], ACC)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            at = feature_ptr + rows[:, None] * feature_strides[0] + d[None, :].to(tl.int64) * feature_strides[1]
            x = tl.load(at, mask=in_batch[:, None] & (d < D)[None, :], other=0.0).to(ACC)
            at = weight_ptr + own[None, :].to(tl.int64) * weight_strides[0] + d[:, None].to(tl.int64) * weight_strides[1]
            w = tl.load(at, mask=(own < OWN)[None, :] & (d < D)[:, None], other=0.0).to(ACC)
            query = dot(x, w, query)
    return query


@triton.jit
def _load_logits(
    logits_ptr, query, keys_ptr, rows, cols, in_batch, K, OWN, strides, keys_strides, OWN_PADDED: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """logits [rows, cols], with what the query gives; columns past K are -inf, rows outside the batch are finite."""
    mask = in_batch[:, None] & (cols < K)[None, :]
    x = tl.load(logits_ptr + rows[:, None] * strides[0] + cols[None, :].to(tl.int64) * strides[1], mask=mask, other=0.0).to(ACC)
    if query is not None:
        own = tl.arange(0, OWN_PADDED)
        at = keys_ptr + own[:, None].to(tl.int64) * keys_strides[0] + cols[None, :].to(tl.int64) * keys_strides[1]
        x = dot(query, tl.load(at, mask=(own < OWN)[:, None] & (cols < K)[None, :], other=0.0).to(ACC), x)
    return tl.where((cols < K)[None, :], x, float("-inf"))


@triton.jit
def _router_input(
    logits_ptr, noise_ptr, query, keys_ptr, rows, cols, in_batch, top, K, OWN, inv_temperature,
    logits_strides, noise_strides, keys_strides, OWN_PADDED: tl.constexpr,
):  # fmt: skip
    """x [rows, cols] less the row's largest logit / temperature: what decides the softmax then has small, exact numbers."""
    x = _load_logits(
        logits_ptr, query, keys_ptr, rows, cols, in_batch, K, OWN, logits_strides, keys_strides, OWN_PADDED, top.dtype
    )  # fmt: skip
    x = (x - top[:, None]) * inv_temperature
    if noise_ptr is not None:
        mask = in_batch[:, None] & (cols < K)[None, :]
        at = noise_ptr + rows[:, None] * noise_strides[0] + cols[None, :].to(tl.int64) * noise_strides[1]
        x += tl.load(at, mask=mask, other=0.0).to(top.dtype)
    return x


@triton.jit
def _dropped(x, cols, kth_value, kth_index):
    """True behind the k-th largest entry (ties: the lower index is larger); never for NaN, so NaN reaches the output."""
    return (x < kth_value[:, None]) | ((x == kth_value[:, None]) & (cols[None, :] > kth_index[:, None]))


@triton.jit
def _row_statistics(
    logits_ptr, noise_ptr, query, keys_ptr, rows, in_batch, K, OWN, inv_temperature,
    logits_strides, noise_strides, keys_strides, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, K_PADDED: tl.constexpr, OWN_PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Largest logit, largest x, softmax denominator, and (value, index) of the last kept entry of each row, all [BLOCK_B]."""
    top = tl.full([BLOCK_B], float("-inf"), ACC)
    for k0 in range(0, K_PADDED, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)
        x = _load_logits(logits_ptr, query, keys_ptr, rows, cols, in_batch, K, OWN, logits_strides, keys_strides, OWN_PADDED, ACC)
        top = tl.maximum(top, tl.max(x, 1))
    row_max = tl.full([BLOCK_B], float("-inf"), ACC)
    for k0 in range(0, K_PADDED, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)
        x = _router_input(
            logits_ptr, noise_ptr, query, keys_ptr, rows, cols, in_batch, top, K, OWN, inv_temperature,
            logits_strides, noise_strides, keys_strides, OWN_PADDED,
        )  # fmt: skip
        row_max = tl.maximum(row_max, tl.max(x, 1))

    kth_value = tl.full([BLOCK_B], float("inf"), ACC)
    kth_index = tl.full([BLOCK_B], -1, tl.int32)
    if TOP_K > 0:
        for _ in range(TOP_K):  # walk down the row, in the order (value falling, index rising)
            next_value = tl.full([BLOCK_B], float("-inf"), ACC)
            next_index = tl.full([BLOCK_B], K_PADDED, tl.int32)
            for k0 in range(0, K_PADDED, BLOCK_K):
                cols = k0 + tl.arange(0, BLOCK_K)
                x = _router_input(
                    logits_ptr, noise_ptr, query, keys_ptr, rows, cols, in_batch, top, K, OWN, inv_temperature,
                    logits_strides, noise_strides, keys_strides, OWN_PADDED,
                )  # fmt: skip
                behind = _dropped(x, cols, kth_value, kth_index) & (cols < K)[None, :]
                value = tl.max(tl.where(behind, x, float("-inf")), 1)
                index = tl.min(tl.where(behind & (x == value[:, None]), cols[None, :], K_PADDED), 1)
                better = (value > next_value) | ((value == next_value) & (index < next_index))
                next_value = tl.where(better, value, next_value)
                next_index = tl.where(better, index, next_index)
            kth_value = next_value
            kth_index = next_index

    row_sum = tl.zeros([BLOCK_B], ACC)
    for k0 in range(0, K_PADDED, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)
        x = _router_input(
            logits_ptr, noise_ptr, query, keys_ptr, rows, cols, in_batch, top, K, OWN, inv_temperature,
            logits_strides, noise_strides, keys_strides, OWN_PADDED,
        )  # fmt: skip
        p = tl.exp(x - row_max[:, None])
        if RENORMALIZE:
            p = tl.where(_dropped(x, cols, kth_value, kth_index), 0.0, p)
        row_sum += tl.sum(p, 1)
    return top, row_max, row_sum, kth_value, kth_index


@triton.jit
def _scores(x, cols, row_max, row_sum, kth_value, kth_index, TOP_K: tl.constexpr):
    """Routing scores after the gate, for one tile of x."""
    s = tl.exp(x - row_max[:, None]) / row_sum[:, None]
    if TOP_K > 0:
        s = tl.where(_dropped(x, cols, kth_value, kth_index), 0.0, s)
    return s


@triton.jit
def _load_experts(experts_ptr, cols, row, columns, K, M, strides):
    """[cols, columns] of one prompt row; zeros outside."""
    at = experts_ptr + cols[:, None].to(tl.int64) * strides[0] + row * strides[1] + columns[None, :] * strides[2]
    return tl.load(at, mask=(cols < K)[:, None] & (columns < M)[None, :], other=0.0)


@triton.jit
def _mix_prompt(
    row, m_tile, to, logits_ptr, noise_ptr, feature_ptr, weight_ptr, keys_ptr, experts_ptr, gram_ptr, shift_ptr,
    scores_ptr, rstd_ptr, query_ptr, rows, columns, in_batch, K, L, M, D, OWN, inv_temperature, eps,
    logits_strides, noise_strides, feature_strides, weight_strides, keys_strides, experts_strides, gram_strides, shift_stride,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    K_PADDED: tl.constexpr, OWN_PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One routed prompt of each sample to ``to`` [rows, columns], and its norms; the first one also writes scores and query."""
    OPERANDS: tl.constexpr = operand_type(to.dtype.element_ty, ACC)
    query = _own_query(
        feature_ptr, weight_ptr, rows, in_batch, D, OWN, feature_strides, weight_strides, BLOCK_B, BLOCK_D, OWN_PADDED, ACC
    )
    top, row_max, row_sum, kth_value, kth_index = _row_statistics(
        logits_ptr, noise_ptr, query, keys_ptr, rows, in_batch, K, OWN, inv_temperature,
        logits_strides, noise_strides, keys_strides, TOP_K, RENORMALIZE, BLOCK_B, BLOCK_K, K_PADDED, OWN_PADDED, ACC,
    )  # fmt: skip
    if query_ptr is not None:  # noqa: SIM102 - the outer condition is the compiler's
        if (row == 0) & (m_tile == 0):
            own = tl.arange(0, OWN_PADDED)
            tl.store(query_ptr + rows[:, None] * OWN + own[None, :], query, mask=in_batch[:, None] & (own < OWN)[None, :])

    acc = tl.zeros([BLOCK_B, BLOCK_M], ACC)
    norm_sq = tl.zeros([BLOCK_B], ACC)
    for k0 in range(0, K_PADDED, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)
        x = _router_input(
            logits_ptr, noise_ptr, query, keys_ptr, rows, cols, in_batch, top, K, OWN, inv_temperature,
            logits_strides, noise_strides, keys_strides, OWN_PADDED,
        )  # fmt: skip
        s = _scores(x, cols, row_max, row_sum, kth_value, kth_index, TOP_K)
        if (row == 0) & (m_tile == 0):
            tl.store(scores_ptr + rows[:, None] * K + cols[None, :], s, mask=in_batch[:, None] & (cols < K)[None, :])
        acc = dot(s, _load_experts(experts_ptr, cols, row, columns, K, M, experts_strides).to(OPERANDS), acc)
        if gram_ptr is not None:
            for j0 in range(0, K, BLOCK_K):
                others = j0 + tl.arange(0, BLOCK_K)
                x_other = _router_input(
                    logits_ptr, noise_ptr, query, keys_ptr, rows, others, in_batch, top, K, OWN, inv_temperature,
                    logits_strides, noise_strides, keys_strides, OWN_PADDED,
                )  # fmt: skip
                s_other = _scores(x_other, others, row_max, row_sum, kth_value, kth_index, TOP_K)
                at = gram_ptr + row * gram_strides[0] + cols[:, None].to(tl.int64) * gram_strides[1]
                at += others[None, :].to(tl.int64) * gram_strides[2]
                g = tl.load(at, mask=(cols < K)[:, None] & (others < K)[None, :], other=0.0).to(ACC)  # [BLOCK_K, BLOCK_K]
                norm_sq += tl.sum(dot(s, g, None) * s_other, 1)

    if gram_ptr is not None:
        # not tl.maximum, which makes a number of NaN
        below = norm_sq < 0.0
        inv_norm = 1.0 / tl.sqrt(tl.where(below, 0.0, norm_sq) + eps)
        acc *= inv_norm[:, None]
        if m_tile == 0:
            tl.store(rstd_ptr + rows * L + row, tl.where(below, -inv_norm, inv_norm), mask=in_batch)
    if shift_ptr is not None:
        acc += tl.load(shift_ptr + columns * shift_stride, mask=columns < M, other=0.0).to(ACC)[None, :]
    tl.store(to, acc.to(to.dtype.element_ty), mask=in_batch[:, None] & (columns < M)[None, :])


@triton.jit
def _copy_prompt(from_ptr, to, rows, row, columns, in_batch, M, strides):
    """One prompt that isn't routed, of each sample, to ``to`` [rows, columns]."""
    mask = in_batch[:, None] & (columns < M)[None, :]
    at = from_ptr + rows[:, None] * strides[0] + row * strides[1] + columns[None, :] * strides[2]
    tl.store(to, tl.load(at, mask=mask, other=0.0).to(to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def mix_kernel(
    logits_ptr, noise_ptr, feature_ptr, weight_ptr, keys_ptr, experts_ptr, before_ptr, after_ptr, gram_ptr, shift_ptr,
    mixed_ptr, scores_ptr, rstd_ptr, query_ptr,
    B, K, L, M, D, OWN, P_BEFORE, P_AFTER, inv_temperature, eps,
    logits_strides, noise_strides, feature_strides, weight_strides, keys_strides, experts_strides, before_strides, after_strides,
    gram_strides, shift_stride,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    K_PADDED: tl.constexpr, OWN_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B samples of one prompt, BLOCK_M of its columns; first the P_BEFORE prompts, then L routed ones.

    Every program of a routed prompt redoes the router of its samples, and what makes its logits: cheaper than a second launch.
    """
    ACC: tl.constexpr = sum_type(scores_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    prompts = P_BEFORE + L + P_AFTER
    tile = pid % (prompts * m_tiles)
    prompt = (tile // m_tiles).to(tl.int64)
    rows = (pid // (prompts * m_tiles)).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = (tile % m_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_batch = rows < B
    to = mixed_ptr + (rows[:, None] * prompts + prompt) * M + columns[None, :]
    if before_ptr is not None:  # noqa: SIM102 - the outer condition is the compiler's
        if prompt < P_BEFORE:
            _copy_prompt(before_ptr, to, rows, prompt, columns, in_batch, M, before_strides)
            return
    if after_ptr is not None:  # noqa: SIM102
        if prompt >= P_BEFORE + L:
            _copy_prompt(after_ptr, to, rows, prompt - P_BEFORE - L, columns, in_batch, M, after_strides)
            return
    _mix_prompt(
        prompt - P_BEFORE, tile % m_tiles, to, logits_ptr, noise_ptr, feature_ptr, weight_ptr, keys_ptr, experts_ptr, gram_ptr,
        shift_ptr, scores_ptr, rstd_ptr, query_ptr, rows, columns, in_batch, K, L, M, D, OWN, inv_temperature, eps,
        logits_strides, noise_strides, feature_strides, weight_strides, keys_strides, experts_strides, gram_strides, shift_stride,
        TOP_K, RENORMALIZE, BLOCK_B, BLOCK_K, BLOCK_M, BLOCK_D, K_PADDED, OWN_PADDED, ACC,
    )  # fmt: skip


@triton.jit
def _load_grads(grad_ptr, rows, prompts, columns, B, M, strides):
    """g [rows, columns] of prompts by their places; zeros outside."""
    at = grad_ptr + rows[:, None] * strides[0] + prompts * strides[1] + columns[None, :] * strides[2]
    return tl.load(at, mask=(rows < B)[:, None] & (columns < M)[None, :], other=0.0)


@triton.jit
def _part_of_batch(split, splits, B, BLOCK_B: tl.constexpr):
    """The samples [first, last) of one part."""
    size = tl.cdiv(tl.cdiv(B, splits), BLOCK_B) * BLOCK_B
    return split * size, tl.minimum(split * size + size, B)


@triton.jit
def _grads_by_experts(
    index, grad_ptr, experts_ptr, du_ptr, B, K, L, M, P_BEFORE, grad_strides, experts_strides,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """du (L, B, K) of BLOCK_B samples, one prompt and BLOCK_K experts."""
    k_tiles = tl.cdiv(K, BLOCK_K)
    row = (index % L).to(tl.int64)
    cols = index // L % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = (index // L // k_tiles).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    du = tl.zeros([BLOCK_B, BLOCK_K], ACC)
    for m0 in range(0, M, BLOCK_M):
        columns = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        g = _load_grads(grad_ptr, rows, P_BEFORE + row, columns, B, M, grad_strides).to(OPERANDS)
        e = _load_experts(experts_ptr, cols, row, columns, K, M, experts_strides).to(OPERANDS)
        du = dot(g, tl.trans(e), du)
    tl.store(du_ptr + (row * B + rows[:, None]) * K + cols[None, :], du, mask=(rows < B)[:, None] & (cols < K)[None, :])


@triton.jit
def _experts_grads(
    index, grad_ptr, scores_ptr, rstd_ptr, grad_experts_ptr, B, K, L, M, P_BEFORE, splits, grad_strides,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr, OPERANDS: tl.constexpr,
):  # fmt: skip
    """d experts (splits, K, L, M) of one prompt, BLOCK_M of its columns and BLOCK_K experts, over a part of the batch."""
    m_tiles, k_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    row = (index // m_tiles % L).to(tl.int64)
    columns = (index % m_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = index // (L * m_tiles) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    split = (index // (L * m_tiles * k_tiles)).to(tl.int64)
    grad = tl.zeros([BLOCK_K, BLOCK_M], ACC)
    first, last = _part_of_batch(split, splits, B, BLOCK_B)
    for b0 in range(first, last, BLOCK_B):
        rows = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        g = _load_grads(grad_ptr, rows, P_BEFORE + row, columns, B, M, grad_strides).to(OPERANDS)
        s = tl.load(scores_ptr + rows[:, None] * K + cols[None, :], mask=(rows < B)[:, None] & (cols < K)[None, :], other=0.0)
        if rstd_ptr is not None:
            s *= tl.abs(tl.load(rstd_ptr + rows * L + row, mask=rows < B, other=0.0))[:, None]
        grad = dot(tl.trans(s), g, grad)
    at = grad_experts_ptr + ((split * K + cols[:, None]) * L + row) * M + columns[None, :]
    tl.store(at, grad.to(grad_experts_ptr.dtype.element_ty), mask=(cols < K)[:, None] & (columns < M)[None, :])


@triton.jit
def _sum_grads(
    index, to_ptr, grad_ptr, first_prompt, prompts, count, B, M, splits, grad_strides,
    BLOCK_M: tl.constexpr, SUMMED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of g over a part of the batch, and over groups of ``count`` prompts: (splits, prompts / count, M)."""
    m_tiles, groups = tl.cdiv(M, BLOCK_M), prompts // count
    columns = (index % m_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = index // m_tiles % groups
    split = (index // m_tiles // groups).to(tl.int64)
    first, last = _part_of_batch(split, splits, B, SUMMED)
    acc = tl.zeros([BLOCK_M], ACC)
    for at in range(first * count, last * count, SUMMED):
        each = at + tl.arange(0, SUMMED)
        prompt = first_prompt + group * count + each % count
        rows = (each // count).to(tl.int64)
        acc += tl.sum(_load_grads(grad_ptr, rows, prompt[:, None], columns, B, M, grad_strides).to(ACC), 0)
    to = to_ptr + (split * groups + group) * M + columns
    tl.store(to, acc.to(to_ptr.dtype.element_ty), mask=columns < M)


@triton.jit(do_not_specialize=["B", "splits", "du_programs", "experts_programs", "before_programs", "after_programs"])
def mixture_grads_kernel(
    grad_ptr, scores_ptr, rstd_ptr, experts_ptr, du_ptr, grad_experts_ptr, grad_before_ptr, grad_after_ptr, grad_shift_ptr,
    B, K, L, M, P_BEFORE, P_AFTER, splits, du_programs, experts_programs, before_programs, after_programs,
    grad_strides, experts_strides,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, SAMPLES: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """One program: a tile of du, of d experts, of d before or d after (of all samples together), or of d shift; in this order."""
    ACC: tl.constexpr = sum_type(scores_ptr.dtype.element_ty)
    OPERANDS: tl.constexpr = operand_type(grad_ptr.dtype.element_ty, ACC)
    index = tl.program_id(0)
    if du_ptr is not None:
        if index < du_programs:
            _grads_by_experts(
                index, grad_ptr, experts_ptr, du_ptr, B, K, L, M, P_BEFORE, grad_strides, experts_strides,
                SAMPLES, BLOCK_K, BLOCK_M, ACC, OPERANDS,
            )  # fmt: skip
            return
        index -= du_programs
    if grad_experts_ptr is not None:
        if index < experts_programs:
            _experts_grads(
                index, grad_ptr, scores_ptr, rstd_ptr, grad_experts_ptr, B, K, L, M, P_BEFORE, splits, grad_strides,
                BLOCK_B, BLOCK_K, BLOCK_M, ACC, OPERANDS,
            )  # fmt: skip
            return
        index -= experts_programs
    if grad_before_ptr is not None:
        if index < before_programs:
            _sum_grads(index, grad_before_ptr, grad_ptr, 0, P_BEFORE, 1, B, M, splits, grad_strides, BLOCK_M, SUMMED, ACC)
            return
        index -= before_programs
    if grad_after_ptr is not None:
        if index < after_programs:
            first = P_BEFORE + L
            _sum_grads(index, grad_after_ptr, grad_ptr, first, P_AFTER, 1, B, M, splits, grad_strides, BLOCK_M, SUMMED, ACC)
            return
        index -= after_programs
    if grad_shift_ptr is not None:
        _sum_grads(index, grad_shift_ptr, grad_ptr, P_BEFORE, L, L, B, M, splits, grad_strides, BLOCK_M, SUMMED, ACC)


@triton.jit
def _load_2d(tensor_ptr, rows, columns, row_end, column_end, strides, ACC: tl.constexpr):
    """[rows, columns]; zeros outside."""
    at = tensor_ptr + rows[:, None].to(tl.int64) * strides[0] + columns[None, :].to(tl.int64) * strides[1]
    return tl.load(at, mask=(rows < row_end)[:, None] & (columns < column_end)[None, :], other=0.0).to(ACC)


@triton.jit
def _store_2d(tensor_ptr, tile, rows, columns, row_end, column_end):
    """As :func:`_load_2d`, to a contiguous tensor."""
    at = tensor_ptr + rows[:, None].to(tl.int64) * column_end + columns[None, :]
    tl.store(at, tile.to(tensor_ptr.dtype.element_ty), mask=(rows < row_end)[:, None] & (columns < column_end)[None, :])


@triton.jit
def _norm_grads(du, s, rstd_ptr, rows, row, L, B):
    """d norm_sq and r of each sample [BLOCK_B]; 0 where the root's argument was held at 0, NaN stays."""
    r = tl.load(rstd_ptr + rows * L + row, mask=rows < B, other=0.0)
    return tl.where(r < 0.0, 0.0, -0.5 * r * r * r * tl.sum(s * du, 1)), tl.abs(r)


@triton.jit
def _logits_grads(
    rows, du_ptr, grad_scores_ptr, logits_ptr, noise_ptr, query, keys_ptr, scores_ptr, rstd_ptr, gram_ptr,
    B, K, L, OWN, inv_temperature, grad_scores_strides, logits_strides, noise_strides, keys_strides, gram_strides,
    RECOMPUTE_SOFTMAX: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, K_PADDED: tl.constexpr,
    OWN_PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d logits [rows, K_PADDED], zeros outside: d scores, back through the norm, the gate and the softmax.

    RECOMPUTE_SOFTMAX: a gate that doesn't renormalise also moves dropped logits, whose probability is not in ``scores``.
    """
    cols = tl.arange(0, K_PADDED)
    mask = (rows < B)[:, None] & (cols < K)[None, :]
    wide = cols[None, :].to(tl.int64)
    s = tl.load(scores_ptr + rows[:, None] * K + wide, mask=mask, other=0.0)
    ds = tl.zeros([BLOCK_B, K_PADDED], ACC)
    if grad_scores_ptr is not None:
        at = grad_scores_ptr + rows[:, None] * grad_scores_strides[0] + wide * grad_scores_strides[1]
        ds += tl.load(at, mask=mask, other=0.0).to(ACC)
    if du_ptr is not None:
        for row in range(L):
            du = tl.load(du_ptr + (tl.cast(row, tl.int64) * B + rows[:, None]) * K + wide, mask=mask, other=0.0)
            if gram_ptr is not None:
                d_norm_sq, r = _norm_grads(du, s, rstd_ptr, rows, row, L, B)
                ds += r[:, None] * du
                gram_row = gram_ptr + tl.cast(row, tl.int64) * gram_strides[0]
                for i0 in range(0, K, BLOCK_I):
                    i = i0 + tl.arange(0, BLOCK_I)
                    g = _load_2d(gram_row, i, cols, K, K, (gram_strides[1], gram_strides[2]), ACC)
                    g += _load_2d(gram_row, i, cols, K, K, (gram_strides[2], gram_strides[1]), ACC)
                    ds = dot(_load_2d(scores_ptr, rows, i, B, K, (K, 1), ACC) * d_norm_sq[:, None], g, ds)
            else:
                ds += du
    total = tl.sum(s * ds, 1)[:, None]
    if RECOMPUTE_SOFTMAX:
        x = _load_logits(
            logits_ptr, query, keys_ptr, rows, cols, rows < B, K, OWN, logits_strides, keys_strides, OWN_PADDED, ACC
        )  # fmt: skip
        x = (x - tl.max(x, 1)[:, None]) * inv_temperature
        if noise_ptr is not None:
            x += tl.load(noise_ptr + rows[:, None] * noise_strides[0] + wide * noise_strides[1], mask=mask, other=0.0).to(ACC)
        p = tl.exp(x - tl.max(x, 1)[:, None])
        dx = p / tl.sum(p, 1)[:, None] * (tl.where(s == 0.0, 0.0, ds) - total)
    else:
        dx = s * (ds - total)
    return dx * inv_temperature


@triton.jit
def _load_query(query_ptr, rows, B, OWN, OWN_PADDED: tl.constexpr, ACC: tl.constexpr):
    """Of a layer's own router [rows, OWN_PADDED]; None without one."""
    query = None
    if query_ptr is not None:
        query = _load_2d(query_ptr, rows, tl.arange(0, OWN_PADDED), B, OWN, (OWN, 1), ACC)
    return query


@triton.jit
def _router_grads(
    index, du_ptr, grad_scores_ptr, logits_ptr, noise_ptr, scores_ptr, rstd_ptr, gram_ptr, feature_ptr, weight_ptr, keys_ptr,
    query_ptr, grad_logits_ptr, grad_feature_ptr, grad_weight_ptr, grad_keys_ptr,
    B, K, L, D, OWN, splits, sample_programs, weight_programs, inv_temperature,
    grad_scores_strides, logits_strides, noise_strides, gram_strides, feature_strides, weight_strides, keys_strides,
    RECOMPUTE_SOFTMAX: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, K_PADDED: tl.constexpr,
    OWN_PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What d logits lead to: those of BLOCK_B samples and d feature, or d weight or d keys of a part of the batch."""
    d_tiles, sample_tiles = tl.cdiv(D, BLOCK_D), tl.cdiv(B, BLOCK_B)
    own, cols = tl.arange(0, OWN_PADDED), tl.arange(0, K_PADDED)
    of_part = index - sample_programs
    of_samples, of_weight = of_part < 0, (of_part >= 0) & (of_part < weight_programs)
    d_tile = tl.where(of_samples, index // sample_tiles, of_part % d_tiles)
    first, last = _part_of_batch(tl.where(of_weight, of_part // d_tiles, of_part - weight_programs), splits, B, BLOCK_B)
    if of_samples:
        first = index % sample_tiles * BLOCK_B
        last = first + 1
    columns = d_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    if keys_ptr is not None:
        keys = _load_2d(keys_ptr, own, cols, OWN, K, keys_strides, ACC)
        to_weight = tl.zeros([OWN_PADDED, BLOCK_D], ACC)
        to_keys = tl.zeros([OWN_PADDED, K_PADDED], ACC)
    for b0 in range(first, last, BLOCK_B):
        rows = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        query = _load_query(query_ptr, rows, B, OWN, OWN_PADDED, ACC)
        grad = _logits_grads(
            rows, du_ptr, grad_scores_ptr, logits_ptr, noise_ptr, query, keys_ptr, scores_ptr, rstd_ptr, gram_ptr,
            B, K, L, OWN, inv_temperature, grad_scores_strides, logits_strides, noise_strides, keys_strides, gram_strides,
            RECOMPUTE_SOFTMAX, BLOCK_B, BLOCK_I, K_PADDED, OWN_PADDED, ACC,
        )  # fmt: skip
        if grad_logits_ptr is not None:  # noqa: SIM102 - the outer condition is the compiler's
            if of_samples & (d_tile == 0):
                _store_2d(grad_logits_ptr, grad, rows, cols, B, K)
        if grad_feature_ptr is not None:  # noqa: SIM102
            if of_samples:
                to_query = dot(grad, tl.trans(keys), None)
                to_feature = dot(to_query, _load_2d(weight_ptr, own, columns, OWN, D, weight_strides, ACC), None)
                _store_2d(grad_feature_ptr, to_feature, rows, columns, B, D)
        if grad_weight_ptr is not None:  # noqa: SIM102
            if of_weight:
                to_query = dot(keys, tl.trans(grad), None)
                to_weight = dot(to_query, _load_2d(feature_ptr, rows, columns, B, D, feature_strides, ACC), to_weight)
        if grad_keys_ptr is not None:  # noqa: SIM102
            if of_part >= weight_programs:
                to_keys = dot(tl.trans(query), grad, to_keys)
    if grad_weight_ptr is not None:  # noqa: SIM102
        if of_weight:
            _store_2d(grad_weight_ptr + (of_part // d_tiles).to(tl.int64) * OWN * D, to_weight, own, columns, OWN, D)
    if grad_keys_ptr is not None:  # noqa: SIM102
        if of_part >= weight_programs:
            _store_2d(grad_keys_ptr + (of_part - weight_programs).to(tl.int64) * OWN * K, to_keys, own, cols, OWN, K)


@triton.jit
def _gram_grads(
    index, du_ptr, scores_ptr, rstd_ptr, grad_gram_ptr, B, K, L, splits, grad_gram_strides,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, K_PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d gram (splits, L, K, K), by its strides, of one prompt and BLOCK_I experts, over a part of the batch."""
    i_tiles = tl.cdiv(K, BLOCK_I)
    row, split = (index // i_tiles % L).to(tl.int64), index // i_tiles // L
    i, cols = index % i_tiles * BLOCK_I + tl.arange(0, BLOCK_I), tl.arange(0, K_PADDED)
    to_gram = tl.zeros([BLOCK_I, K_PADDED], ACC)
    first, last = _part_of_batch(split, splits, B, BLOCK_B)
    for b0 in range(first, last, BLOCK_B):
        rows = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        s = _load_2d(scores_ptr, rows, cols, B, K, (K, 1), ACC)
        du = _load_2d(du_ptr + row * B * K, rows, cols, B, K, (K, 1), ACC)
        d_norm_sq, _ = _norm_grads(du, s, rstd_ptr, rows, row, L, B)
        s_i = _load_2d(scores_ptr, rows, i, B, K, (K, 1), ACC)
        to_gram = dot(tl.trans(s_i * d_norm_sq[:, None]), s, to_gram)
    at = grad_gram_ptr + split.to(tl.int64) * L * K * K + row * grad_gram_strides[0]
    at += i[:, None].to(tl.int64) * grad_gram_strides[1] + cols[None, :].to(tl.int64) * grad_gram_strides[2]
    tl.store(at, to_gram.to(grad_gram_ptr.dtype.element_ty), mask=(i < K)[:, None] & (cols < K)[None, :])


@triton.jit(do_not_specialize=["B", "splits", "sample_programs", "weight_programs", "keys_programs"])
def router_grads_kernel(
    du_ptr, grad_scores_ptr, logits_ptr, noise_ptr, scores_ptr, rstd_ptr, gram_ptr, feature_ptr, weight_ptr, keys_ptr, query_ptr,
    grad_logits_ptr, grad_gram_ptr, grad_feature_ptr, grad_weight_ptr, grad_keys_ptr,
    B, K, L, D, OWN, splits, sample_programs, weight_programs, keys_programs, inv_temperature,
    grad_scores_strides, logits_strides, noise_strides, gram_strides, feature_strides, weight_strides, keys_strides,
    grad_gram_strides,
    RECOMPUTE_SOFTMAX: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr, K_PADDED: tl.constexpr,
    OWN_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_B samples, with a tile of d feature; or a tile of d weight, d keys or d gram over a part of the batch.

    In this order. What is summed over the batch is (splits, ...) in memory, d gram by its strides.
    """
    ACC: tl.constexpr = sum_type(scores_ptr.dtype.element_ty)
    index = tl.program_id(0)
    if index < sample_programs + weight_programs + keys_programs:
        _router_grads(
            index, du_ptr, grad_scores_ptr, logits_ptr, noise_ptr, scores_ptr, rstd_ptr, gram_ptr, feature_ptr, weight_ptr,
            keys_ptr, query_ptr, grad_logits_ptr, grad_feature_ptr, grad_weight_ptr, grad_keys_ptr,
            B, K, L, D, OWN, splits, sample_programs, weight_programs, inv_temperature,
            grad_scores_strides, logits_strides, noise_strides, gram_strides, feature_strides, weight_strides, keys_strides,
            RECOMPUTE_SOFTMAX, BLOCK_B, BLOCK_D, BLOCK_I, K_PADDED, OWN_PADDED, ACC,
        )  # fmt: skip
    elif grad_gram_ptr is not None:
        _gram_grads(
            index - sample_programs - weight_programs - keys_programs, du_ptr, scores_ptr, rstd_ptr, grad_gram_ptr,
            B, K, L, splits, grad_gram_strides, BLOCK_B, BLOCK_I, K_PADDED, ACC,
        )  # fmt: skip
