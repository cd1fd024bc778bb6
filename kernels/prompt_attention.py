"""Device code of attention with key/value prefixes and restricted receptive fields, forward and backward.

    s[i, j] = scale <q_i, k_j> + bias[i, j]       over the keys j of both prefixes and those tokens that row i sees
    out_i   = sum_j p[i, j] v_j,   p[i, j] = exp(s[i, j] - lse_i),   lse_i = log sum_j exp(s[i, j])

Backward, with g the gradient of ``out`` and delta_i = <g_i, out_i>:

    ds[i, j] = p[i, j] (<g_i, v_j> - delta_i)     = d bias
    d q_i    = scale sum_j ds[i, j] k_j
    d k_j    = scale sum_i ds[i, j] q_i
    d v_j    = sum_i p[i, j] g_i

Exponents are in base 2. ``statistics`` (B, H, Sq, 2) has each row's largest exponent and the log of its sum relative to that:
apart, so that a row whose bias is -1e9 everywhere keeps its gradients. A row that sees no key has (0, inf), so that all its p are
0. What a row sees is one of four kinds (``VISIBILITY``): ``field`` int32 (4 or 6, S) has the first and last key of each query and
the first and last query of each key (ranges without their end), for ``GROUPS`` also each position's group and the bits of the
groups that it sees. Each prefix is a tile of its own, never a choice of pointers. No kernel uses atomics: sums over the batch or
over parts of the queries are written apart and added later. Arguments in the plural (``q_strides``) are tuples. ``COMPUTE``,
``DOT``, ``ACC``: see ``products.py``.
"""

import triton
import triton.language as tl

from .products import LOG2_E, dot

FULL: tl.constexpr = tl.constexpr(0)
CAUSAL: tl.constexpr = tl.constexpr(1)
INTERVALS: tl.constexpr = tl.constexpr(2)
GROUPS: tl.constexpr = tl.constexpr(3)


@triton.jit
def _head(tensor, strides, batch, head):
    """Where the rows of one sample and head begin."""
    return tensor + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _load_rows(base, rows, inside, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros outside."""
    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(
        base + rows[:, None].to(tl.int64) * strides[2] + columns[None, :].to(tl.int64) * strides[3], mask=mask, other=0.0
    )


@triton.jit
def _store_rows(base, rows, inside, strides, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    at = base + rows[:, None].to(tl.int64) * strides[2] + columns[None, :].to(tl.int64) * strides[3]
    tl.store(at, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _sight(field, rows, Sq, Sk, VISIBILITY: tl.constexpr):
    """What each row sees: keys [first, last), and of those the groups whose bits are set. Rows past Sq see nothing."""
    inside = rows < Sq
    first = tl.zeros_like(rows)
    last = tl.where(inside, Sk, 0)
    bits = tl.zeros_like(rows)
    if VISIBILITY == CAUSAL:
        last = tl.minimum(last, rows + (Sk - Sq + 1))
    if VISIBILITY >= INTERVALS:
        first = tl.load(field + rows, mask=inside, other=Sk)
        last = tl.load(field + Sk + rows, mask=inside, other=0)
    if VISIBILITY == GROUPS:
        bits = tl.load(field + 5 * Sk + rows, mask=inside, other=0)
    return first, last, bits


@triton.jit
def _key_range(first, last, last_row, Sq, Sk, VISIBILITY: tl.constexpr):
    """The keys that any row of a tile sees, [first, last)."""
    if VISIBILITY >= INTERVALS:
        return tl.min(first, 0), tl.max(last, 0)
    if VISIBILITY == CAUSAL:
        return 0, tl.minimum(Sk, last_row + (Sk - Sq + 1))
    return 0, Sk


@triton.jit
def _query_range(field, keys, first_key, Sq, Sk, VISIBILITY: tl.constexpr):
    """The queries that see any key of a tile, [first, last)."""
    if VISIBILITY >= INTERVALS:
        first = tl.load(field + 2 * Sk + keys, mask=keys < Sk, other=Sq)
        last = tl.load(field + 3 * Sk + keys, mask=keys < Sk, other=0)
        return tl.min(first, 0), tl.max(last, 0)
    if VISIBILITY == CAUSAL:
        return tl.maximum(0, first_key - (Sk - Sq)), Sq
    return 0, Sq


@triton.jit
def _token_exponents(
    a, b, rows, keys, first, last, bits, field, padding, bias, Sq, Sk, scale_log2, padding_stride, bias_strides,
    VISIBILITY: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s of token keys in base 2, -inf where a row sees nothing. Either way round: a @ b is q @ k' or k @ q'.

    What belongs to rows and to keys comes as [rows, 1] and [1, keys], or as [1, rows] and [keys, 1].
    """
    s = dot(a, b, None, COMPUTE, DOT, ACC) * scale_log2
    if HAS_BIAS:
        at = bias + rows.to(tl.int64) * bias_strides[2] + keys.to(tl.int64) * bias_strides[3]
        b = tl.load(at, mask=(rows < Sq) & (keys < Sk), other=0.0).to(ACC)
        # in base 2 the least float32 would become -inf, which hides a key
        s += tl.where((b < -2e38) & (b > float("-inf")), -2e38, b) * LOG2_E
    seen = keys < Sk
    if VISIBILITY != FULL:
        seen = (keys >= first) & (keys < last)
    if VISIBILITY == GROUPS:
        group = tl.load(field + 4 * Sk + keys, mask=keys < Sk, other=0)
        seen = seen & (((bits >> group) & 1) != 0)
    if HAS_PADDING:
        seen = seen & tl.load(padding + keys.to(tl.int64) * padding_stride, mask=keys < Sk, other=0).to(tl.int1)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _prefix_exponents(a, b, keys, P, scale_log2, COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    """s of prefix keys in base 2, either way round: every row sees all of them."""
    return tl.where(keys < P, dot(a, b, None, COMPUTE, DOT, ACC) * scale_log2, float("-inf"))


@triton.jit
def _accumulate(acc, row_max, row_sum, s, v, COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr):
    """One step of the online softmax: sums over the keys seen so far, relative to the largest exponent so far."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    # -inf as long as a row has seen no key: 0 in its place keeps -inf - -inf out of the exponent
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(row_max - shift)
    return dot(p, v, acc * fade[:, None], COMPUTE, DOT, ACC), new_max, row_sum * fade + tl.sum(p, 1)


@triton.jit
def _attend_to_prefix(
    acc, row_max, row_sum, q_tile, k, v, k_strides, v_strides, P, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    for start in tl.range(0, P, BLOCK_P, num_stages=1):  # one step as a rule: nothing to pipeline
        keys = start + tl.arange(0, BLOCK_P)
        k_tile = _load_rows(k, keys, keys < P, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v, keys, keys < P, v_strides, HEAD_DIM, BLOCK_D)
        s = _prefix_exponents(q_tile, tl.trans(k_tile), keys[None, :], P, scale_log2, COMPUTE, DOT, ACC)
        acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, s, v_tile, COMPUTE, DOT, ACC)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "P0", "P1"])
def attention_kernel(
    q, k, v, pk0, pv0, pk1, pv1, field, padding, bias, out, statistics,
    H, Sq, Sk, P0, P1, scale_log2,
    q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides, padding_strides, bias_strides, out_strides,
    VISIBILITY: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P0: tl.constexpr, BLOCK_P1: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one sample and head, over all their keys."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(Sq, BLOCK_Q)
    batch, head = pid // tiles // H, pid // tiles % H
    rows = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < Sq
    q_tile = _load_rows(_head(q, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_Q], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_Q], ACC)
    if BLOCK_P0 > 0:
        acc, row_max, row_sum = _attend_to_prefix(
            acc, row_max, row_sum, q_tile, _head(pk0, pk0_strides, batch, head), _head(pv0, pv0_strides, batch, head),
            pk0_strides, pv0_strides, P0, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P0, COMPUTE, DOT, ACC,
        )  # fmt: skip
    if BLOCK_P1 > 0:
        acc, row_max, row_sum = _attend_to_prefix(
            acc, row_max, row_sum, q_tile, _head(pk1, pk1_strides, batch, head), _head(pv1, pv1_strides, batch, head),
            pk1_strides, pv1_strides, P1, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P1, COMPUTE, DOT, ACC,
        )  # fmt: skip

    k_head, v_head = _head(k, k_strides, batch, head), _head(v, v_strides, batch, head)
    padding_row = padding + batch.to(tl.int64) * padding_strides[0] if HAS_PADDING else padding
    bias_head = _head(bias, bias_strides, batch, head) if HAS_BIAS else bias
    first, last, bits = _sight(field, rows, Sq, Sk, VISIBILITY)
    first_key, last_key = _key_range(first, last, pid % tiles * BLOCK_Q + BLOCK_Q - 1, Sq, Sk, VISIBILITY)
    for start in range(first_key, last_key, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k_tile = _load_rows(k_head, keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v_head, keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
        s = _token_exponents(
            q_tile, tl.trans(k_tile), rows[:, None], keys[None, :], first[:, None], last[:, None], bits[:, None],
            field, padding_row, bias_head, Sq, Sk, scale_log2, padding_strides[1], bias_strides,
            VISIBILITY, HAS_PADDING, HAS_BIAS, COMPUTE, DOT, ACC,
        )  # fmt: skip
        acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, s, v_tile, COMPUTE, DOT, ACC)

    fully_masked = row_sum == 0.0
    row_sum = tl.where(fully_masked, 1.0, row_sum)
    _store_rows(_head(out, out_strides, batch, head), rows, inside, out_strides, acc / row_sum[:, None], HEAD_DIM, BLOCK_D)
    at = statistics + ((pid // tiles).to(tl.int64) * Sq + rows) * 2
    tl.store(at, tl.where(fully_masked, 0.0, row_max), mask=inside)
    tl.store(at + 1, tl.where(fully_masked, float("inf"), tl.log2(row_sum)), mask=inside)


@triton.jit
def _load_statistics(statistics, at, inside):
    """Largest exponent and log of the sum of each row; outside as of a row that sees no key."""
    row_max = tl.load(statistics + at * 2, mask=inside, other=0.0)
    return row_max, tl.load(statistics + at * 2 + 1, mask=inside, other=float("inf"))


@triton.jit
def _logit_gradients(s, row_max, log_sum, g_dot_v, delta):
    """p and ds, from s in base 2; whatever an unseen key holds, its ds is 0."""
    p = tl.exp2((s - row_max) - log_sum)
    return p, tl.where(s == float("-inf"), 0.0, p * (g_dot_v - delta))


@triton.jit
def _prefix_to_query_gradient(
    grad, q_tile, g_tile, row_max, log_sum, delta, k, v, k_strides, v_strides, P, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    for start in tl.range(0, P, BLOCK_P, num_stages=1):  # one step as a rule: nothing to pipeline
        keys = start + tl.arange(0, BLOCK_P)
        k_tile = _load_rows(k, keys, keys < P, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v, keys, keys < P, v_strides, HEAD_DIM, BLOCK_D)
        s = _prefix_exponents(q_tile, tl.trans(k_tile), keys[None, :], P, scale_log2, COMPUTE, DOT, ACC)
        g_dot_v = dot(g_tile, tl.trans(v_tile), None, COMPUTE, DOT, ACC)
        _, ds = _logit_gradients(s, row_max[:, None], log_sum[:, None], g_dot_v, delta[:, None])
        grad = dot(ds, k_tile, grad, COMPUTE, DOT, ACC)
    return grad


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "P0", "P1"])
def query_grads_kernel(
    grad_out, q, k, v, pk0, pv0, pk1, pv1, field, padding, bias, out, statistics, delta, grad_q,
    H, Sq, Sk, P0, P1, scale, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides,
    padding_strides, bias_strides, out_strides, grad_q_strides,
    NEED_Q: tl.constexpr, VISIBILITY: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P0: tl.constexpr, BLOCK_P1: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: delta and, with NEED_Q, d q of BLOCK_Q queries of one sample and head."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(Sq, BLOCK_Q)
    batch, head = pid // tiles // H, pid // tiles % H
    rows = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < Sq
    g_tile = _load_rows(_head(grad_out, grad_out_strides, batch, head), rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
    out_tile = _load_rows(_head(out, out_strides, batch, head), rows, inside, out_strides, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(g_tile.to(ACC) * out_tile.to(ACC), 1)
    at = (pid // tiles).to(tl.int64) * Sq + rows
    tl.store(delta + at, row_delta, mask=inside)
    if NEED_Q:
        q_tile = _load_rows(_head(q, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        row_max, log_sum = _load_statistics(statistics, at, inside)
        grad = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
        if BLOCK_P0 > 0:
            grad = _prefix_to_query_gradient(
                grad, q_tile, g_tile, row_max, log_sum, row_delta,
                _head(pk0, pk0_strides, batch, head), _head(pv0, pv0_strides, batch, head), pk0_strides,
                pv0_strides, P0, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P0, COMPUTE, DOT, ACC,
            )  # fmt: skip
        if BLOCK_P1 > 0:
            grad = _prefix_to_query_gradient(
                grad, q_tile, g_tile, row_max, log_sum, row_delta,
                _head(pk1, pk1_strides, batch, head), _head(pv1, pv1_strides, batch, head), pk1_strides,
                pv1_strides, P1, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P1, COMPUTE, DOT, ACC,
            )  # fmt: skip

        k_head, v_head = _head(k, k_strides, batch, head), _head(v, v_strides, batch, head)
        padding_row = padding + batch.to(tl.int64) * padding_strides[0] if HAS_PADDING else padding
        bias_head = _head(bias, bias_strides, batch, head) if HAS_BIAS else bias
        first, last, bits = _sight(field, rows, Sq, Sk, VISIBILITY)
        first_key, last_key = _key_range(first, last, pid % tiles * BLOCK_Q + BLOCK_Q - 1, Sq, Sk, VISIBILITY)
        for start in range(first_key, last_key, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            k_tile = _load_rows(k_head, keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
            v_tile = _load_rows(v_head, keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
            s = _token_exponents(
                q_tile, tl.trans(k_tile), rows[:, None], keys[None, :], first[:, None], last[:, None], bits[:, None],
                field, padding_row, bias_head, Sq, Sk, scale_log2, padding_strides[1], bias_strides,
                VISIBILITY, HAS_PADDING, HAS_BIAS, COMPUTE, DOT, ACC,
            )  # fmt: skip
            g_dot_v = dot(g_tile, tl.trans(v_tile), None, COMPUTE, DOT, ACC)
            _, ds = _logit_gradients(s, row_max[:, None], log_sum[:, None], g_dot_v, row_delta[:, None])
            grad = dot(ds, k_tile, grad, COMPUTE, DOT, ACC)
        _store_rows(_head(grad_q, grad_q_strides, batch, head), rows, inside, grad_q_strides, grad * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _prefix_gradients(
    part, q, grad_out, k, v, statistics, delta, grads, batch, head, H, Sq, P, scale, scale_log2,
    q_strides, grad_out_strides, k_strides, v_strides, grads_strides,
    SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d k and d v of BLOCK_P keys of a prefix, over one of SPLITS parts of the queries: grads (2, B, SPLITS, H, P, Dh)."""
    split = part % SPLITS
    keys = part // SPLITS * BLOCK_P + tl.arange(0, BLOCK_P)
    k_tile = _load_rows(_head(k, k_strides, batch, head), keys, keys < P, k_strides, HEAD_DIM, BLOCK_D)
    v_tile = _load_rows(_head(v, v_strides, batch, head), keys, keys < P, v_strides, HEAD_DIM, BLOCK_D)
    q_head, g_head = _head(q, q_strides, batch, head), _head(grad_out, grad_out_strides, batch, head)
    first_row = (batch * H + head).to(tl.int64) * Sq
    grad_k = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    grad_v = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    per_split = tl.cdiv(tl.cdiv(Sq, SPLITS), BLOCK_Q) * BLOCK_Q
    for start in range(split * per_split, tl.minimum(Sq, (split + 1) * per_split), BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        inside = rows < Sq
        q_tile = _load_rows(q_head, rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        g_tile = _load_rows(g_head, rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        row_max, log_sum = _load_statistics(statistics, first_row + rows, inside)
        row_delta = tl.load(delta + first_row + rows, mask=inside, other=0.0)
        s = _prefix_exponents(k_tile, tl.trans(q_tile), keys[:, None], P, scale_log2, COMPUTE, DOT, ACC)
        v_dot_g = dot(v_tile, tl.trans(g_tile), None, COMPUTE, DOT, ACC)
        p, ds = _logit_gradients(s, row_max[None, :], log_sum[None, :], v_dot_g, row_delta[None, :])
        grad_v = dot(p, g_tile, grad_v, COMPUTE, DOT, ACC)
        grad_k = dot(ds, q_tile, grad_k, COMPUTE, DOT, ACC)
    to_k = _head(grads, grads_strides[1:], batch, split) + head.to(tl.int64) * grads_strides[3]
    _store_rows(to_k, keys, keys < P, grads_strides[2:], grad_k * scale, HEAD_DIM, BLOCK_D)
    _store_rows(to_k + grads_strides[0], keys, keys < P, grads_strides[2:], grad_v, HEAD_DIM, BLOCK_D)


@triton.jit
def _token_gradients(
    tile, q, k, v, grad_out, field, padding, bias, statistics, delta, grad_k, grad_v, batch, head, H, Sq, Sk, scale, scale_log2,
    q_strides, k_strides, v_strides, grad_out_strides, padding_strides, bias_strides, grad_k_strides, grad_v_strides,
    VISIBILITY: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d k and d v of BLOCK_K tokens of one sample and head, over the queries that see any of them."""
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = _load_rows(_head(k, k_strides, batch, head), keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
    v_tile = _load_rows(_head(v, v_strides, batch, head), keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
    q_head, g_head = _head(q, q_strides, batch, head), _head(grad_out, grad_out_strides, batch, head)
    padding_row = padding + batch.to(tl.int64) * padding_strides[0] if HAS_PADDING else padding
    bias_head = _head(bias, bias_strides, batch, head) if HAS_BIAS else bias
    first_row = (batch * H + head).to(tl.int64) * Sq
    to_k = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    to_v = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    first_query, last_query = _query_range(field, keys, tile * BLOCK_K, Sq, Sk, VISIBILITY)
    for start in range(first_query, last_query, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        inside = rows < Sq
        q_tile = _load_rows(q_head, rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        g_tile = _load_rows(g_head, rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        row_max, log_sum = _load_statistics(statistics, first_row + rows, inside)
        row_delta = tl.load(delta + first_row + rows, mask=inside, other=0.0)
        first, last, bits = _sight(field, rows, Sq, Sk, VISIBILITY)
        s = _token_exponents(
            k_tile, tl.trans(q_tile), rows[None, :], keys[:, None], first[None, :], last[None, :], bits[None, :],
            field, padding_row, bias_head, Sq, Sk, scale_log2, padding_strides[1], bias_strides,
            VISIBILITY, HAS_PADDING, HAS_BIAS, COMPUTE, DOT, ACC,
        )  # fmt: skip
        v_dot_g = dot(v_tile, tl.trans(g_tile), None, COMPUTE, DOT, ACC)
        p, ds = _logit_gradients(s, row_max[None, :], log_sum[None, :], v_dot_g, row_delta[None, :])
        to_v = dot(p, g_tile, to_v, COMPUTE, DOT, ACC)
        to_k = dot(ds, q_tile, to_k, COMPUTE, DOT, ACC)
    _store_rows(_head(grad_k, grad_k_strides, batch, head), keys, keys < Sk, grad_k_strides, to_k * scale, HEAD_DIM, BLOCK_D)
    _store_rows(_head(grad_v, grad_v_strides, batch, head), keys, keys < Sk, grad_v_strides, to_v, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "P0", "P1", "token_tiles", "parts0", "parts1"])
def key_grads_kernel(
    grad_out, q, k, v, pk0, pv0, pk1, pv1, field, padding, bias, statistics, delta, grad_k, grad_v, grads0, grads1,
    H, Sq, Sk, P0, P1, token_tiles, parts0, parts1, scale, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides,
    padding_strides, bias_strides, grad_k_strides, grad_v_strides, grads0_strides, grads1_strides,
    NEED_TOKENS: tl.constexpr, NEED_P0: tl.constexpr, NEED_P1: tl.constexpr, SPLITS: tl.constexpr,
    VISIBILITY: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P0: tl.constexpr, BLOCK_P1: tl.constexpr, COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a tile of token keys, or a part of a prefix's work, of one sample and head.

    Of one sample and head there are token_tiles + parts0 + parts1 programs, in this order.
    """
    pid = tl.program_id(0)
    work = token_tiles + parts0 + parts1
    batch, head, index = pid // work // H, pid // work % H, pid % work
    if NEED_TOKENS:  # noqa: SIM102 - the outer condition is the compiler's
        if index < token_tiles:
            _token_gradients(
                index, q, k, v, grad_out, field, padding, bias, statistics, delta, grad_k, grad_v,
                batch, head, H, Sq, Sk, scale, scale_log2,
                q_strides, k_strides, v_strides, grad_out_strides, padding_strides, bias_strides, grad_k_strides, grad_v_strides,
                VISIBILITY, HAS_PADDING, HAS_BIAS, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, COMPUTE, DOT, ACC,
            )  # fmt: skip
    if NEED_P0:  # noqa: SIM102
        if (index >= token_tiles) & (index < token_tiles + parts0):
            _prefix_gradients(
                index - token_tiles, q, grad_out, pk0, pv0, statistics, delta, grads0,
                batch, head, H, Sq, P0, scale, scale_log2, q_strides, grad_out_strides, pk0_strides, pv0_strides, grads0_strides,
                SPLITS, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_P0, COMPUTE, DOT, ACC,
            )  # fmt: skip
    if NEED_P1:  # noqa: SIM102
        if index >= token_tiles + parts0:
            _prefix_gradients(
                index - token_tiles - parts0, q, grad_out, pk1, pv1, statistics, delta, grads1,
                batch, head, H, Sq, P1, scale, scale_log2, q_strides, grad_out_strides, pk1_strides, pv1_strides, grads1_strides,
                SPLITS, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_P1, COMPUTE, DOT, ACC,
            )  # fmt: skip


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "batches", "heads", "bias_heads"])
def bias_grads_kernel(
    grad_out, q, k, v, field, padding, bias, statistics, delta, grad_bias,
    H, Sq, Sk, batches, heads, bias_heads, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, padding_strides, bias_strides,
    VISIBILITY: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_BIAS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: one tile of d bias, summed in order over the ``batches`` samples and ``heads`` heads that share it."""
    pid = tl.program_id(0)
    k_tiles = tl.cdiv(Sk, BLOCK_K)
    tiles = tl.cdiv(Sq, BLOCK_Q) * k_tiles
    shared, tile = pid // tiles, pid % tiles
    rows = tile // k_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tile % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = rows < Sq
    first, last, bits = _sight(field, rows, Sq, Sk, VISIBILITY)
    grad = tl.zeros([BLOCK_Q, BLOCK_K], ACC)
    for i in range(batches * heads):
        batch = shared // bias_heads + i // heads
        head = shared % bias_heads + i % heads
        q_tile = _load_rows(_head(q, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        g_tile = _load_rows(_head(grad_out, grad_out_strides, batch, head), rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        k_tile = _load_rows(_head(k, k_strides, batch, head), keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(_head(v, v_strides, batch, head), keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
        at = (batch * H + head).to(tl.int64) * Sq + rows
        row_max, log_sum = _load_statistics(statistics, at, inside)
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        padding_row = padding + batch.to(tl.int64) * padding_strides[0] if HAS_PADDING else padding
        s = _token_exponents(
            q_tile, tl.trans(k_tile), rows[:, None], keys[None, :], first[:, None], last[:, None], bits[:, None],
            field, padding_row, _head(bias, bias_strides, batch, head), Sq, Sk, scale_log2, padding_strides[1], bias_strides,
            VISIBILITY, HAS_PADDING, HAS_BIAS, COMPUTE, DOT, ACC,
        )  # fmt: skip
        g_dot_v = dot(g_tile, tl.trans(v_tile), None, COMPUTE, DOT, ACC)
        _, ds = _logit_gradients(s, row_max[:, None], log_sum[:, None], g_dot_v, row_delta[:, None])
        grad += ds
    to = grad_bias + (shared.to(tl.int64) * Sq + rows[:, None]) * Sk + keys[None, :]
    tl.store(to, grad.to(grad_bias.dtype.element_ty), mask=inside[:, None] & (keys < Sk)[None, :])
