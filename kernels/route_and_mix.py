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

``expert_grads_kernel`` reads g once for both of its products; ``router_grads_kernel`` adds its partial sums in a fixed order.
No kernel uses atomics.

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
    scores_ptr, rstd_ptr, rows, columns, in_batch, K, L, M, D, OWN, inv_temperature, eps,
    logits_strides, noise_strides, feature_strides, weight_strides, keys_strides, experts_strides, gram_strides, shift_stride,
    TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    K_PADDED: tl.constexpr, OWN_PADDED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One routed prompt, of each sample, to ``to`` [rows, columns]; its first program writes scores, and of each row's norm."""
    OPERANDS: tl.constexpr = operand_type(to.dtype.element_ty, ACC)
    query = _own_query(
        feature_ptr, weight_ptr, rows, in_batch, D, OWN, feature_strides, weight_strides, BLOCK_B, BLOCK_D, OWN_PADDED, ACC
    )
    top, row_max, row_sum, kth_value, kth_index = _row_statistics(
        logits_ptr, noise_ptr, query, keys_ptr, rows, in_batch, K, OWN, inv_temperature,
        logits_strides, noise_strides, keys_strides, TOP_K, RENORMALIZE, BLOCK_B, BLOCK_K, K_PADDED, OWN_PADDED, ACC,
    )  # fmt: skip

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
    mixed_ptr, scores_ptr, rstd_ptr,
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
        shift_ptr, scores_ptr, rstd_ptr, rows, columns, in_batch, K, L, M, D, OWN, inv_temperature, eps,
        logits_strides, noise_strides, feature_strides, weight_strides, keys_strides, experts_strides, gram_strides, shift_stride,
        TOP_K, RENORMALIZE, BLOCK_B, BLOCK_K, BLOCK_M, BLOCK_D, K_PADDED, OWN_PADDED, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "splits"])
def expert_grads_kernel(
    grad_mixed_ptr, scores_ptr, rstd_ptr, experts_ptr, grad_experts_ptr, partials_ptr,
    B, K, L, M, splits,
    grad_mixed_strides, experts_strides,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one prompt row's experts against one of splits parts of the batch.

    Writes its part of d experts to grad_experts (splits, K, L, M) and du over its columns to partials (L, m_tiles, B, K).
    """
    ACC: tl.constexpr = sum_type(scores_ptr.dtype.element_ty)
    OPERANDS: tl.constexpr = operand_type(grad_mixed_ptr.dtype.element_ty, ACC)
    pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    k_tiles = tl.cdiv(K, BLOCK_K)
    tile = pid % (L * m_tiles)
    row = (tile // m_tiles).to(tl.int64)
    split = (pid // (L * m_tiles * k_tiles)).to(tl.int64)
    cols = (pid // (L * m_tiles)) % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = (tile % m_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)

    if partials_ptr is not None:
        e = _load_experts(experts_ptr, cols, row, columns, K, M, experts_strides)
    grad = tl.zeros([BLOCK_K, BLOCK_M], ACC)
    per_split = tl.cdiv(tl.cdiv(B, splits), BLOCK_B) * BLOCK_B
    first = split * per_split
    for b0 in range(first, tl.minimum(first + per_split, B), BLOCK_B):
        rows = b0 + tl.arange(0, BLOCK_B).to(tl.int64)
        in_batch = rows < B
        at = grad_mixed_ptr + rows[:, None] * grad_mixed_strides[0] + row * grad_mixed_strides[1]
        at += columns[None, :] * grad_mixed_strides[2]
        g = tl.load(at, mask=in_batch[:, None] & (columns < M)[None, :], other=0.0).to(OPERANDS)  # [BLOCK_B, BLOCK_M]
        if partials_ptr is not None:
            du = dot(g, tl.trans(e).to(OPERANDS), tl.zeros([BLOCK_B, BLOCK_K], ACC))
            at = partials_ptr + (tile.to(tl.int64) * B + rows[:, None]) * K + cols[None, :]
            tl.store(at, du, mask=in_batch[:, None] & (cols < K)[None, :])
        if grad_experts_ptr is not None:
            s = tl.load(scores_ptr + rows[:, None] * K + cols[None, :], mask=in_batch[:, None] & (cols < K)[None, :], other=0.0)
            if rstd_ptr is not None:
                s *= tl.abs(tl.load(rstd_ptr + rows * L + row, mask=in_batch, other=0.0))[:, None]
            grad = dot(tl.trans(s), g, grad)
    if grad_experts_ptr is not None:
        at = grad_experts_ptr + ((split * K + cols[:, None]) * L + row) * M + columns[None, :]
        tl.store(at, grad.to(grad_experts_ptr.dtype.element_ty), mask=(cols < K)[:, None] & (columns < M)[None, :])


@triton.jit(do_not_specialize=["B"])
def router_grads_kernel(
    partials_ptr, grad_scores_ptr, logits_ptr, noise_ptr, scores_ptr, rstd_ptr, gram_ptr, grad_logits_ptr, grad_norm_sq_ptr,
    B, K, L, M_TILES, inv_temperature,
    grad_scores_strides, logits_strides, noise_strides, gram_strides,
    RECOMPUTE_SOFTMAX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr, K_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: one sample. Adds the partial sums, then goes back through the norm, the gate and the softmax.

    RECOMPUTE_SOFTMAX: a gate that doesn't renormalise also moves dropped logits, whose probability is not in ``scores``.
    """
    ACC: tl.constexpr = sum_type(scores_ptr.dtype.element_ty)
    b = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, K_PADDED)
    wide_cols = cols.to(tl.int64)
    in_row = cols < K
    s = tl.load(scores_ptr + b * K + cols, mask=in_row, other=0.0)
    ds = tl.zeros([K_PADDED], ACC)
    if grad_scores_ptr is not None:
        source = grad_scores_ptr + b * grad_scores_strides[0] + wide_cols * grad_scores_strides[1]
        ds += tl.load(source, mask=in_row, other=0.0).to(ACC)
    if partials_ptr is not None:
        if gram_ptr is not None:
            gram_row = gram_ptr
        for row in range(L):
            du = tl.zeros([K_PADDED], ACC)
            for p0 in range(0, M_TILES, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                at = partials_ptr + ((row * M_TILES + p).to(tl.int64)[:, None] * B + b) * K + cols[None, :]
                du += tl.sum(tl.load(at, mask=(p < M_TILES)[:, None] & in_row[None, :], other=0.0), 0)
            if gram_ptr is not None:
                r = tl.load(rstd_ptr + b * L + row)
                # 0 where the root's argument was held at 0; NaN stays
                d_norm_sq = tl.where(r < 0.0, 0.0, -0.5 * r * r * r * tl.sum(s * du, 0))
                r = tl.abs(r)
                tl.store(grad_norm_sq_ptr + b * L + row, d_norm_sq)
                ds += r * du
                for i0 in range(0, K, BLOCK_I):
                    i = i0 + tl.arange(0, BLOCK_I)
                    wide_i = i.to(tl.int64)
                    mask = (i < K)[:, None] & in_row[None, :]
                    at = gram_row + wide_i[:, None] * gram_strides[1] + wide_cols[None, :] * gram_strides[2]
                    g = tl.load(at, mask=mask, other=0.0).to(ACC)
                    at = gram_row + wide_cols[None, :] * gram_strides[1] + wide_i[:, None] * gram_strides[2]
                    g += tl.load(at, mask=mask, other=0.0).to(ACC)
                    s_i = tl.load(scores_ptr + b * K + i, mask=i < K, other=0.0)
                    ds += d_norm_sq * tl.sum(g * s_i[:, None], 0)
                gram_row += gram_strides[0]
            else:
                ds += du

    if grad_logits_ptr is not None:
        total = tl.sum(s * ds, 0)
        if RECOMPUTE_SOFTMAX:
            at = logits_ptr + b * logits_strides[0] + wide_cols * logits_strides[1]
            x = tl.load(at, mask=in_row, other=float("-inf")).to(ACC)
            x = (x - tl.max(x, 0)) * inv_temperature
            if noise_ptr is not None:
                at = noise_ptr + b * noise_strides[0] + wide_cols * noise_strides[1]
                x += tl.load(at, mask=in_row, other=0.0).to(ACC)
            p = tl.exp(x - tl.max(x, 0))
            p = p / tl.sum(p, 0)
            dx = p * (tl.where(s == 0.0, 0.0, ds) - total)
        else:
            dx = s * (ds - total)
        grad = (dx * inv_temperature).to(grad_logits_ptr.dtype.element_ty)
        tl.store(grad_logits_ptr + b * K + cols, grad, mask=in_row)
