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
over parts of the queries are written apart and added later.

Pointers are ``*_ptr``, their strides tuples. A tensor that isn't there is None, and so is a gradient that nobody asked for.
``ACC`` is what sums are in; queries, keys, values and g have one type, which tiles of prefixes take too: see ``products.py``.
"""

import triton
import triton.language as tl

from .products import LOG2_E, dot, sum_type

FULL: tl.constexpr = tl.constexpr(0)
CAUSAL: tl.constexpr = tl.constexpr(1)
INTERVALS: tl.constexpr = tl.constexpr(2)
GROUPS: tl.constexpr = tl.constexpr(3)


@triton.jit
def _head(tensor_ptr, strides, batch, head):
    """Where the rows of one sample and head begin."""
    return tensor_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _load_rows(head_ptr, rows, inside, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros outside."""
    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(
        head_ptr + rows[:, None].to(tl.int64) * strides[2] + columns[None, :].to(tl.int64) * strides[3], mask=mask, other=0.0
    )


@triton.jit
def _store_rows(head_ptr, rows, inside, strides, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    at = head_ptr + rows[:, None].to(tl.int64) * strides[2] + columns[None, :].to(tl.int64) * strides[3]
    tl.store(at, tile.to(head_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sight(field_ptr, rows, Sq, Sk, VISIBILITY: tl.constexpr):
    """What each row sees: keys [first, last), and of those the groups whose bits are set. Rows past Sq see nothing."""
    inside = rows < Sq
    first = tl.zeros_like(rows)
    last = tl.where(inside, Sk, 0)
    bits = tl.zeros_like(rows)
    if VISIBILITY == CAUSAL:
        last = tl.minimum(last, rows + (Sk - Sq + 1))
    if VISIBILITY >= INTERVALS:
        first = tl.load(field_ptr + rows, mask=inside, other=Sk)
        last = tl.load(field_ptr + Sk + rows, mask=inside, other=0)
    if VISIBILITY == GROUPS:
        bits = tl.load(field_ptr + 5 * Sk + rows, mask=inside, other=0)
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
def _query_range(field_ptr, keys, first_key, Sq, Sk, VISIBILITY: tl.constexpr):
    """The queries that see any key of a tile, [first, last)."""
    if VISIBILITY >= INTERVALS:
        first = tl.load(field_ptr + 2 * Sk + keys, mask=keys < Sk, other=Sq)
        last = tl.load(field_ptr + 3 * Sk + keys, mask=keys < Sk, other=0)
        return tl.min(first, 0), tl.max(last, 0)
    if VISIBILITY == CAUSAL:
        return tl.maximum(0, first_key - (Sk - Sq)), Sq
    return 0, Sq


@triton.jit
def _token_exponents(
    a, b, rows, keys, first, last, bits, field_ptr, padding_ptr, bias_ptr, Sq, Sk, scale_log2, padding_stride, bias_strides,
    VISIBILITY: tl.constexpr,
):  # fmt: skip
    """s of token keys in base 2, -inf where a row sees nothing. Either way round: a @ b is q @ k' or k @ q'.

    What belongs to rows and to keys comes as [rows, 1] and [1, keys], or as [1, rows] and [keys, 1].
    """
    s = dot(a, b, None) * scale_log2
    if bias_ptr is not None:
        at = bias_ptr + rows.to(tl.int64) * bias_strides[2] + keys.to(tl.int64) * bias_strides[3]
        b = tl.load(at, mask=(rows < Sq) & (keys < Sk), other=0.0).to(s.dtype)
        # in base 2 the least float32 would become -inf, which hides a key
        s += tl.where((b < -2e38) & (b > float("-inf")), -2e38, b) * LOG2_E
    seen = keys < Sk
    if VISIBILITY != FULL:
        seen = (keys >= first) & (keys < last)
    if VISIBILITY == GROUPS:
        group = tl.load(field_ptr + 4 * Sk + keys, mask=keys < Sk, other=0)
        seen = seen & (((bits >> group) & 1) != 0)
    if padding_ptr is not None:
        seen = seen & tl.load(padding_ptr + keys.to(tl.int64) * padding_stride, mask=keys < Sk, other=0).to(tl.int1)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _prefix_exponents(a, b, keys, P, scale_log2):
    """s of prefix keys in base 2, either way round: every row sees all of them."""
    return tl.where(keys < P, dot(a, b, None) * scale_log2, float("-inf"))


@triton.jit
def _accumulate(acc, row_max, row_sum, s, v):
    """One step of the online softmax: sums over the keys seen so far, relative to the largest exponent so far."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    # -inf as long as a row has seen no key: 0 in its place keeps -inf - -inf out of the exponent
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(row_max - shift)
    return dot(p, v, acc * fade[:, None]), new_max, row_sum * fade + tl.sum(p, 1)


@triton.jit
def _attend_to_prefix(
    acc, row_max, row_sum, q_tile, k_ptr, v_ptr, k_strides, v_strides, P, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    for start in tl.range(0, P, BLOCK_P, num_stages=1):  # one step as a rule: nothing to pipeline
        keys = start + tl.arange(0, BLOCK_P)
        k_tile = _load_rows(k_ptr, keys, keys < P, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v_ptr, keys, keys < P, v_strides, HEAD_DIM, BLOCK_D)
        s = _prefix_exponents(q_tile, tl.trans(k_tile).to(q_tile.dtype), keys[None, :], P, scale_log2)
        acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, s, v_tile.to(q_tile.dtype))
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "P0", "P1"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, field_ptr, padding_ptr, bias_ptr, out_ptr, statistics_ptr,
    H, Sq, Sk, P0, P1, scale_log2,
    q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides, padding_strides, bias_strides, out_strides,
    VISIBILITY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P0: tl.constexpr, BLOCK_P1: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one sample and head, over all their keys."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    tiles = tl.cdiv(Sq, BLOCK_Q)
    batch, head = pid // tiles // H, pid // tiles % H
    rows = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < Sq
    q_tile = _load_rows(_head(q_ptr, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_Q], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_Q], ACC)
    if pk0_ptr is not None:
        acc, row_max, row_sum = _attend_to_prefix(
            acc, row_max, row_sum, q_tile, _head(pk0_ptr, pk0_strides, batch, head), _head(pv0_ptr, pv0_strides, batch, head),
            pk0_strides, pv0_strides, P0, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P0,
        )  # fmt: skip
    if pk1_ptr is not None:
        acc, row_max, row_sum = _attend_to_prefix(
            acc, row_max, row_sum, q_tile, _head(pk1_ptr, pk1_strides, batch, head), _head(pv1_ptr, pv1_strides, batch, head),
            pk1_strides, pv1_strides, P1, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P1,
        )  # fmt: skip

    k_head, v_head = _head(k_ptr, k_strides, batch, head), _head(v_ptr, v_strides, batch, head)
    padding_row = padding_ptr + batch.to(tl.int64) * padding_strides[0] if padding_ptr is not None else None
    bias_head = _head(bias_ptr, bias_strides, batch, head) if bias_ptr is not None else None
    first, last, bits = _sight(field_ptr, rows, Sq, Sk, VISIBILITY)
    first_key, last_key = _key_range(first, last, pid % tiles * BLOCK_Q + BLOCK_Q - 1, Sq, Sk, VISIBILITY)
    for start in range(first_key, last_key, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k_tile = _load_rows(k_head, keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v_head, keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
        s = _token_exponents(
            q_tile, tl.trans(k_tile), rows[:, None], keys[None, :], first[:, None], last[:, None], bits[:, None],
            field_ptr, padding_row, bias_head, Sq, Sk, scale_log2, padding_strides[1], bias_strides, VISIBILITY,
        )  # fmt: skip
        acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, s, v_tile)

    fully_masked = row_sum == 0.0
    row_sum = tl.where(fully_masked, 1.0, row_sum)
    _store_rows(_head(out_ptr, out_strides, batch, head), rows, inside, out_strides, acc / row_sum[:, None], HEAD_DIM, BLOCK_D)
    at = statistics_ptr + ((pid // tiles).to(tl.int64) * Sq + rows) * 2
    tl.store(at, tl.where(fully_masked, 0.0, row_max), mask=inside)
    tl.store(at + 1, tl.where(fully_masked, float("inf"), tl.log2(row_sum)), mask=inside)


@triton.jit
def _load_statistics(statistics_ptr, at, inside):
    """Largest exponent and log of the sum of each row; outside as of a row that sees no key."""
    row_max = tl.load(statistics_ptr + at * 2, mask=inside, other=0.0)
    return row_max, tl.load(statistics_ptr + at * 2 + 1, mask=inside, other=float("inf"))


@triton.jit
def _logit_gradients(s, row_max, log_sum, g_dot_v, delta):
    """p and ds, from s in base 2; whatever an unseen key holds, its ds is 0."""
    p = tl.exp2((s - row_max) - log_sum)
    return p, tl.where(s == float("-inf"), 0.0, p * (g_dot_v - delta))


@triton.jit
def _prefix_to_query_gradient(
    grad, q_tile, g_tile, row_max, log_sum, delta, k_ptr, v_ptr, k_strides, v_strides, P, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    for start in tl.range(0, P, BLOCK_P, num_stages=1):  # one step as a rule: nothing to pipeline
        keys = start + tl.arange(0, BLOCK_P)
        k_tile = _load_rows(k_ptr, keys, keys < P, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v_ptr, keys, keys < P, v_strides, HEAD_DIM, BLOCK_D)
        s = _prefix_exponents(q_tile, tl.trans(k_tile).to(q_tile.dtype), keys[None, :], P, scale_log2)
        g_dot_v = dot(g_tile, tl.trans(v_tile).to(q_tile.dtype), None)
        _, ds = _logit_gradients(s, row_max[:, None], log_sum[:, None], g_dot_v, delta[:, None])
        grad = dot(ds, k_tile.to(q_tile.dtype), grad)
    return grad


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "P0", "P1"])
def query_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, field_ptr, padding_ptr, bias_ptr,
    out_ptr, statistics_ptr, delta_ptr, grad_q_ptr,
    H, Sq, Sk, P0, P1, scale, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides,
    padding_strides, bias_strides, out_strides, grad_q_strides,
    VISIBILITY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P0: tl.constexpr, BLOCK_P1: tl.constexpr,
):  # fmt: skip
    """One program: delta and, unless grad_q is None, d q of BLOCK_Q queries of one sample and head."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    tiles = tl.cdiv(Sq, BLOCK_Q)
    batch, head = pid // tiles // H, pid // tiles % H
    rows = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = rows < Sq
    g_tile = _load_rows(_head(grad_out_ptr, grad_out_strides, batch, head), rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
    out_tile = _load_rows(_head(out_ptr, out_strides, batch, head), rows, inside, out_strides, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(g_tile.to(ACC) * out_tile.to(ACC), 1)
    at = (pid // tiles).to(tl.int64) * Sq + rows
    tl.store(delta_ptr + at, row_delta, mask=inside)
    if grad_q_ptr is not None:
        q_tile = _load_rows(_head(q_ptr, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        row_max, log_sum = _load_statistics(statistics_ptr, at, inside)
        grad = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
        if pk0_ptr is not None:
            grad = _prefix_to_query_gradient(
                grad, q_tile, g_tile, row_max, log_sum, row_delta,
                _head(pk0_ptr, pk0_strides, batch, head), _head(pv0_ptr, pv0_strides, batch, head), pk0_strides, pv0_strides,
                P0, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P0,
            )  # fmt: skip
        if pk1_ptr is not None:
            grad = _prefix_to_query_gradient(
                grad, q_tile, g_tile, row_max, log_sum, row_delta,
                _head(pk1_ptr, pk1_strides, batch, head), _head(pv1_ptr, pv1_strides, batch, head), pk1_strides, pv1_strides,
                P1, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_P1,
            )  # fmt: skip

        k_head, v_head = _head(k_ptr, k_strides, batch, head), _head(v_ptr, v_strides, batch, head)
        padding_row = padding_ptr + batch.to(tl.int64) * padding_strides[0] if padding_ptr is not None else None
        bias_head = _head(bias_ptr, bias_strides, batch, head) if bias_ptr is not None else None
        first, last, bits = _sight(field_ptr, rows, Sq, Sk, VISIBILITY)
        first_key, last_key = _key_range(first, last, pid % tiles * BLOCK_Q + BLOCK_Q - 1, Sq, Sk, VISIBILITY)
        for start in range(first_key, last_key, BLOCK_K):
            keys = start + tl.arange(0, BLOCK_K)
            k_tile = _load_rows(k_head, keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
            v_tile = _load_rows(v_head, keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
            s = _token_exponents(
                q_tile, tl.trans(k_tile), rows[:, None], keys[None, :], first[:, None], last[:, None], bits[:, None],
                field_ptr, padding_row, bias_head, Sq, Sk, scale_log2, padding_strides[1], bias_strides, VISIBILITY,
            )  # fmt: skip
            g_dot_v = dot(g_tile, tl.trans(v_tile), None)
            _, ds = _logit_gradients(s, row_max[:, None], log_sum[:, None], g_dot_v, row_delta[:, None])
            grad = dot(ds, k_tile, grad)
        _store_rows(_head(grad_q_ptr, grad_q_strides, batch, head), rows, inside, grad_q_strides, grad * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _prefix_gradients(
    part, q_ptr, grad_out_ptr, k_ptr, v_ptr, statistics_ptr, delta_ptr, grads_ptr, batch, head, H, Sq, P, scale, scale_log2,
    q_strides, grad_out_strides, k_strides, v_strides, grads_strides,
    SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """d k and d v of BLOCK_P keys of a prefix, over one of SPLITS parts of the queries: grads (2, B, SPLITS, H, P, Dh)."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    split = part % SPLITS
    keys = part // SPLITS * BLOCK_P + tl.arange(0, BLOCK_P)
    k_tile = _load_rows(_head(k_ptr, k_strides, batch, head), keys, keys < P, k_strides, HEAD_DIM, BLOCK_D)
    v_tile = _load_rows(_head(v_ptr, v_strides, batch, head), keys, keys < P, v_strides, HEAD_DIM, BLOCK_D)
    k_tile, v_tile = k_tile.to(q_ptr.dtype.element_ty), v_tile.to(q_ptr.dtype.element_ty)
    q_head, g_head = _head(q_ptr, q_strides, batch, head), _head(grad_out_ptr, grad_out_strides, batch, head)
    first_row = (batch * H + head).to(tl.int64) * Sq
    grad_k = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    grad_v = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    per_split = tl.cdiv(tl.cdiv(Sq, SPLITS), BLOCK_Q) * BLOCK_Q
    for start in range(split * per_split, tl.minimum(Sq, (split + 1) * per_split), BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        inside = rows < Sq
        q_tile = _load_rows(q_head, rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        g_tile = _load_rows(g_head, rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        row_max, log_sum = _load_statistics(statistics_ptr, first_row + rows, inside)
        row_delta = tl.load(delta_ptr + first_row + rows, mask=inside, other=0.0)
        s = _prefix_exponents(k_tile, tl.trans(q_tile), keys[:, None], P, scale_log2)
        v_dot_g = dot(v_tile, tl.trans(g_tile), None)
        p, ds = _logit_gradients(s, row_max[None, :], log_sum[None, :], v_dot_g, row_delta[None, :])
        grad_v = dot(p, g_tile, grad_v)
        grad_k = dot(ds, q_tile, grad_k)
    to_k = _head(grads_ptr, grads_strides[1:], batch, split) + head.to(tl.int64) * grads_strides[3]
    _store_rows(to_k, keys, keys < P, grads_strides[2:], grad_k * scale, HEAD_DIM, BLOCK_D)
    _store_rows(to_k + grads_strides[0], keys, keys < P, grads_strides[2:], grad_v, HEAD_DIM, BLOCK_D)


@triton.jit
def _token_gradients(
    tile, q_ptr, k_ptr, v_ptr, grad_out_ptr, field_ptr, padding_ptr, bias_ptr, statistics_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    batch, head, H, Sq, Sk, scale, scale_log2,
    q_strides, k_strides, v_strides, grad_out_strides, padding_strides, bias_strides, grad_k_strides, grad_v_strides,
    VISIBILITY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d k and d v of BLOCK_K tokens of one sample and head, over the queries that see any of them."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = _load_rows(_head(k_ptr, k_strides, batch, head), keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
    v_tile = _load_rows(_head(v_ptr, v_strides, batch, head), keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
    q_head, g_head = _head(q_ptr, q_strides, batch, head), _head(grad_out_ptr, grad_out_strides, batch, head)
    padding_row = padding_ptr + batch.to(tl.int64) * padding_strides[0] if padding_ptr is not None else None
    bias_head = _head(bias_ptr, bias_strides, batch, head) if bias_ptr is not None else None
    first_row = (batch * H + head).to(tl.int64) * Sq
    to_k = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    to_v = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    first_query, last_query = _query_range(field_ptr, keys, tile * BLOCK_K, Sq, Sk, VISIBILITY)
    for start in range(first_query, last_query, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        inside = rows < Sq
        q_tile = _load_rows(q_head, rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        g_tile = _load_rows(g_head, rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        row_max, log_sum = _load_statistics(statistics_ptr, first_row + rows, inside)
        row_delta = tl.load(delta_ptr + first_row + rows, mask=inside, other=0.0)
        first, last, bits = _sight(field_ptr, rows, Sq, Sk, VISIBILITY)
        s = _token_exponents(
            k_tile, tl.trans(q_tile), rows[None, :], keys[:, None], first[None, :], last[None, :], bits[None, :],
            field_ptr, padding_row, bias_head, Sq, Sk, scale_log2, padding_strides[1], bias_strides, VISIBILITY,
        )  # fmt: skip
        v_dot_g = dot(v_tile, tl.trans(g_tile), None)
        p, ds = _logit_gradients(s, row_max[None, :], log_sum[None, :], v_dot_g, row_delta[None, :])
        to_v = dot(p, g_tile, to_v)
        to_k = dot(ds, q_tile, to_k)
    _store_rows(_head(grad_k_ptr, grad_k_strides, batch, head), keys, keys < Sk, grad_k_strides, to_k * scale, HEAD_DIM, BLOCK_D)
    _store_rows(_head(grad_v_ptr, grad_v_strides, batch, head), keys, keys < Sk, grad_v_strides, to_v, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "P0", "P1", "token_tiles", "parts0", "parts1"])
def key_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, field_ptr, padding_ptr, bias_ptr,
    statistics_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, grads0_ptr, grads1_ptr,
    H, Sq, Sk, P0, P1, token_tiles, parts0, parts1, scale, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides,
    padding_strides, bias_strides, grad_k_strides, grad_v_strides, grads0_strides, grads1_strides,
    VISIBILITY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P0: tl.constexpr, BLOCK_P1: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of token keys, or a part of a prefix's work, of one sample and head.

    Of one sample and head there are token_tiles + parts0 + parts1 programs, in this order.
    """
    pid = tl.program_id(0)
    work = token_tiles + parts0 + parts1
    batch, head, index = pid // work // H, pid // work % H, pid % work
    if grad_k_ptr is not None:  # noqa: SIM102 - the outer condition is the compiler's
        if index < token_tiles:
            _token_gradients(
                index, q_ptr, k_ptr, v_ptr, grad_out_ptr, field_ptr, padding_ptr, bias_ptr, statistics_ptr, delta_ptr,
                grad_k_ptr, grad_v_ptr, batch, head, H, Sq, Sk, scale, scale_log2,
                q_strides, k_strides, v_strides, grad_out_strides, padding_strides, bias_strides, grad_k_strides, grad_v_strides,
                VISIBILITY, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    if grads0_ptr is not None:  # noqa: SIM102
        if (index >= token_tiles) & (index < token_tiles + parts0):
            _prefix_gradients(
                index - token_tiles, q_ptr, grad_out_ptr, pk0_ptr, pv0_ptr, statistics_ptr, delta_ptr, grads0_ptr,
                batch, head, H, Sq, P0, scale, scale_log2, q_strides, grad_out_strides, pk0_strides, pv0_strides, grads0_strides,
                SPLITS, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_P0,
            )  # fmt: skip
    if grads1_ptr is not None:  # noqa: SIM102
        if index >= token_tiles + parts0:
            _prefix_gradients(
                index - token_tiles - parts0, q_ptr, grad_out_ptr, pk1_ptr, pv1_ptr, statistics_ptr, delta_ptr, grads1_ptr,
                batch, head, H, Sq, P1, scale, scale_log2, q_strides, grad_out_strides, pk1_strides, pv1_strides, grads1_strides,
                SPLITS, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_P1,
            )  # fmt: skip


@triton.jit(do_not_specialize=["H", "Sq", "Sk", "batches", "heads", "bias_heads"])
def bias_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, field_ptr, padding_ptr, bias_ptr, statistics_ptr, delta_ptr, grad_bias_ptr,
    H, Sq, Sk, batches, heads, bias_heads, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, padding_strides, bias_strides,
    VISIBILITY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of d bias, summed in order over the ``batches`` samples and ``heads`` heads that share it."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    k_tiles = tl.cdiv(Sk, BLOCK_K)
    tiles = tl.cdiv(Sq, BLOCK_Q) * k_tiles
    shared, tile = pid // tiles, pid % tiles
    rows = tile // k_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tile % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = rows < Sq
    first, last, bits = _sight(field_ptr, rows, Sq, Sk, VISIBILITY)
    grad = tl.zeros([BLOCK_Q, BLOCK_K], ACC)
    for i in range(batches * heads):
        batch = shared // bias_heads + i // heads
        head = shared % bias_heads + i % heads
        q_tile = _load_rows(_head(q_ptr, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        g_tile = _load_rows(_head(grad_out_ptr, grad_out_strides, batch, head), rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        k_tile = _load_rows(_head(k_ptr, k_strides, batch, head), keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(_head(v_ptr, v_strides, batch, head), keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
        at = (batch * H + head).to(tl.int64) * Sq + rows
        row_max, log_sum = _load_statistics(statistics_ptr, at, inside)
        row_delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        padding_row = padding_ptr + batch.to(tl.int64) * padding_strides[0] if padding_ptr is not None else None
        s = _token_exponents(
            q_tile, tl.trans(k_tile), rows[:, None], keys[None, :], first[:, None], last[:, None], bits[:, None],
            field_ptr, padding_row, _head(bias_ptr, bias_strides, batch, head), Sq, Sk, scale_log2, padding_strides[1],
            bias_strides, VISIBILITY,
        )  # fmt: skip
        g_dot_v = dot(g_tile, tl.trans(v_tile), None)
        _, ds = _logit_gradients(s, row_max[:, None], log_sum[:, None], g_dot_v, row_delta[:, None])
        grad += ds
    to = grad_bias_ptr + (shared.to(tl.int64) * Sq + rows[:, None]) * Sk + keys[None, :]
    tl.store(to, grad.to(grad_bias_ptr.dtype.element_ty), mask=inside[:, None] & (keys < Sk)[None, :])
