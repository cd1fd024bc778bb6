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
0. What a row sees is one of five kinds (``VISIBILITY``): all tokens; of ``CAUSAL`` those up to ``right`` behind its place, the last
query's place being the last key's; of a ``WINDOW`` of these those from ``left`` before it on; of the others what ``field`` says,
int32 (4 or 6, S): the first and last key of each query and the first and last query of each key (ranges without their end), for
``GROUPS`` also each position's group and the bits of the groups that it sees. ``padding`` (B, Sk) is about tokens, with
``MASKED_PREFIXES`` (B, P0 + P1 + Sk) about prefixes too. ``GROUP`` query heads share a head of keys and values. No kernel
uses atomics: sums over the batch or over parts of the queries are written apart and added later.

Pointers are ``*_ptr``, their strides tuples. A tensor that isn't there is None, and so is a gradient that nobody asked for.
``ACC`` is what sums are in; queries, keys, values, prefixes and g have one type: see ``products.py``.

Of a query's keys those tiles that all rows of a program see whole are masked nowhere. The last tile has prefixes behind its tokens.
Where there is no bias, exponents are products not yet scaled: the scale goes with the subtraction of the largest into one fused
multiply and add. So ``scale`` must not be negative.
"""

import triton
import triton.language as tl

from .products import LOG2_E, dot, sum_type

FULL: tl.constexpr = tl.constexpr(0)
CAUSAL: tl.constexpr = tl.constexpr(1)
WINDOW: tl.constexpr = tl.constexpr(2)
INTERVALS: tl.constexpr = tl.constexpr(3)
GROUPS: tl.constexpr = tl.constexpr(4)

_SIZES = ("H", "Sq", "Sk", "P0", "P1", "left", "right", "padding_row")
"""No kernel of its own for those that are 1 or a multiple of 16."""


@triton.jit
def _head(tensor_ptr, strides, batch, head):
    """Where the rows of one sample and head begin."""
    return tensor_ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _head_if_there(tensor_ptr, strides, batch, head):
    """As :func:`_head`; None of a tensor that isn't there."""
    first = tensor_ptr
    if tensor_ptr is not None:
        first = _head(tensor_ptr, strides, batch, head)
    return first


@triton.jit
def _load_rows(head_ptr, rows, inside, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros outside. ``inside`` is None where all rows are."""
    columns = tl.arange(0, BLOCK_D)
    at = head_ptr + rows[:, None].to(tl.int64) * strides[2] + columns[None, :].to(tl.int64) * strides[3]
    if inside is not None:
        mask = inside[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (columns < HEAD_DIM)[None, :]
        tile = tl.load(at, mask=mask, other=0.0)
    elif HEAD_DIM < BLOCK_D:
        tile = tl.load(at, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def _load_last(
    tokens_ptr, prefix0_ptr, prefix1_ptr, numbers, start, tokens, P0, P1, token_strides, strides0, strides1,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows by their numbers: ``tokens`` of them from ``start`` on, then those of both prefixes; zeros behind these."""
    columns = tl.arange(0, BLOCK_D)
    at = tokens_ptr + (start + numbers)[:, None].to(tl.int64) * token_strides[2] + columns[None, :].to(tl.int64) * token_strides[3]
    # a choice of addresses: of loaded tiles it would be one of numbers, in registers
    if prefix0_ptr is not None:
        row = (numbers - tokens)[:, None]
        at = tl.where(row >= 0, prefix0_ptr + row.to(tl.int64) * strides0[2] + columns[None, :].to(tl.int64) * strides0[3], at)
    if prefix1_ptr is not None:
        row = (numbers - tokens - P0)[:, None]
        at = tl.where(row >= 0, prefix1_ptr + row.to(tl.int64) * strides1[2] + columns[None, :].to(tl.int64) * strides1[3], at)
    mask = (numbers < tokens + P0 + P1)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _store_rows(head_ptr, rows, inside, strides, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (columns < HEAD_DIM)[None, :]
    at = head_ptr + rows[:, None].to(tl.int64) * strides[2] + columns[None, :].to(tl.int64) * strides[3]
    tl.store(at, tile.to(head_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _padding_of_tokens(padding_ptr, padding_row, batch, P0, P1, MASKED_PREFIXES: tl.constexpr):
    """Where one sample's mask of tokens begins, behind that of its prefixes; None without a mask."""
    row = padding_ptr
    if padding_ptr is not None:
        row = padding_ptr + batch.to(tl.int64) * padding_row
    if MASKED_PREFIXES:
        row += P0 + P1
    return row


@triton.jit
def _mask_of_prefix(tokens_ptr, before, MASKED_PREFIXES: tl.constexpr):
    """Where the mask of a prefix begins, ``before`` that of tokens; None of prefixes that are all there."""
    first = None
    if MASKED_PREFIXES:
        first = tokens_ptr - before
    return first


@triton.jit
def _is_there(padding_ptr, keys, inside):
    return tl.load(padding_ptr + keys, mask=inside, other=0).to(tl.int1)


@triton.jit
def _visible_range(field_ptr, rows, Sq, Sk, left, right, VISIBILITY: tl.constexpr):
    """What each row sees: keys [first, last), and of those the groups whose bits are set. Rows past Sq see nothing."""
    inside = rows < Sq
    first = tl.zeros_like(rows)
    last = tl.where(inside, Sk, 0)
    bits = tl.zeros_like(rows)
    if VISIBILITY != FULL and VISIBILITY <= WINDOW:
        last = tl.minimum(last, rows + (Sk - Sq) + right + 1)
    if VISIBILITY == WINDOW:
        first = tl.maximum(first, rows + (Sk - Sq) - left)
    if VISIBILITY >= INTERVALS:
        first = tl.load(field_ptr + rows, mask=inside, other=Sk)
        last = tl.load(field_ptr + Sk + rows, mask=inside, other=0)
    if VISIBILITY == GROUPS:
        bits = tl.load(field_ptr + 5 * Sk + rows, mask=inside, other=0)
    return first, last, bits


@triton.jit
def _key_range(
    first, last, first_row, last_row, Sq, Sk, left, right, padding_ptr, VISIBILITY: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Where the keys that any row of a tile sees begin and end, in tiles from there those that need no mask, and the last tile.

    (begin, unmasked from, to, last tile, end): tiles that all rows see whole are unmasked, unless some tokens are padding.
    """
    begin, end = 0, Sk
    if VISIBILITY == WINDOW:
        begin = tl.maximum(0, first_row + (Sk - Sq) - left)
    if VISIBILITY != FULL and VISIBILITY <= WINDOW:
        end = tl.maximum(begin, tl.minimum(Sk, last_row + (Sk - Sq) + right + 1))
    if VISIBILITY >= INTERVALS:
        begin, end = tl.min(first, 0), tl.max(last, 0)
        end = tl.maximum(begin, end)
    last_tile = begin + (end - begin) // BLOCK_K * BLOCK_K
    whole_from, whole_to = last_tile, last_tile
    if padding_ptr is None:
        if VISIBILITY <= CAUSAL:
            whole_from = begin
        if VISIBILITY == WINDOW:
            seen_from = tl.maximum(begin, tl.minimum(last_row, Sq - 1) + (Sk - Sq) - left)
            whole_from = tl.minimum(last_tile, begin + tl.cdiv(seen_from - begin, BLOCK_K) * BLOCK_K)
        if VISIBILITY != FULL and VISIBILITY <= WINDOW:
            seen_to = tl.maximum(begin, tl.minimum(Sk, first_row + (Sk - Sq) + right + 1))
            whole_to = tl.maximum(whole_from, begin + (seen_to - begin) // BLOCK_K * BLOCK_K)
    return begin, whole_from, whole_to, last_tile, end


@triton.jit
def _query_range(field_ptr, keys, first_key, last_key, Sq, Sk, left, right, VISIBILITY: tl.constexpr):
    """The queries that see any key of a tile, [first, last)."""
    if VISIBILITY >= INTERVALS:
        first = tl.load(field_ptr + 2 * Sk + keys, mask=keys < Sk, other=Sq)
        last = tl.load(field_ptr + 3 * Sk + keys, mask=keys < Sk, other=0)
        return tl.min(first, 0), tl.max(last, 0)
    if VISIBILITY == WINDOW:
        return tl.maximum(0, first_key - (Sk - Sq) - right), tl.minimum(Sq, last_key - (Sk - Sq) + left + 1)
    if VISIBILITY == CAUSAL:
        return tl.maximum(0, first_key - (Sk - Sq) - right), Sq
    return 0, Sq


@triton.jit
def _less(s, subtracted, scale_log2, bias_ptr):
    """Exponents in base 2 less a number of each row; of products, which a bias would have scaled, by one operation."""
    return tl.fma(s, scale_log2, -subtracted) if bias_ptr is None else s - subtracted


@triton.jit
def _with_bias(s, rows, keys, inside, bias_ptr, Sq, scale_log2, bias_strides):
    """Products scaled to exponents in base 2, plus the bias; without one as they are, see :func:`_less`."""
    if bias_ptr is not None:
        at = bias_ptr + rows.to(tl.int64) * bias_strides[2] + keys.to(tl.int64) * bias_strides[3]
        b = tl.load(at, mask=(rows < Sq) & inside, other=0.0).to(s.dtype)
        # in base 2 the least float32 would become -inf, which hides a key
        s = s * scale_log2 + tl.where((b < -2e38) & (b > float("-inf")), -2e38, b) * LOG2_E
    return s


@triton.jit
def _masked(s, keys, inside, first, last, bits, field_ptr, padding_ptr, Sk, VISIBILITY: tl.constexpr):
    """-inf where a row doesn't see a token, of keys ``inside`` the tokens. Either way round.

    What belongs to rows and to keys comes as [rows, 1] and [1, keys], or as [1, rows] and [keys, 1].
    """
    if VISIBILITY != FULL:
        seen = keys < last
        if VISIBILITY >= WINDOW:
            seen = seen & (keys >= first)
        if VISIBILITY == GROUPS:
            group = tl.load(field_ptr + 4 * Sk + keys, mask=inside, other=0)
            seen = seen & (((bits >> group) & 1) != 0)
        s = tl.where(seen, s, float("-inf"))
    if padding_ptr is not None:
        s = tl.where(_is_there(padding_ptr, keys, inside), s, float("-inf"))
    return s


@triton.jit
def _last_masked(
    s, numbers, tokens, prefixes, keys, first, last, bits, field_ptr, padding_ptr, Sk,
    VISIBILITY: tl.constexpr, MASKED_PREFIXES: tl.constexpr,
):  # fmt: skip
    """As :func:`_masked`, for what :func:`_load_last` gives: of ``tokens`` and then ``prefixes`` keys."""
    of_token = numbers < tokens
    there = numbers < tokens + prefixes
    if MASKED_PREFIXES:
        in_prefix = (numbers >= tokens) & there
        there = of_token | (in_prefix & _is_there(padding_ptr, numbers - tokens - prefixes, in_prefix))
    masked = _masked(s, keys, of_token, first, last, bits, field_ptr, padding_ptr, Sk, VISIBILITY)
    return tl.where(there, tl.where(of_token, masked, s), float("-inf"))


@triton.jit
def _accumulate(acc, row_max, row_sum, s, v, scale_log2, bias_ptr):
    """One step of the online softmax: sums over the keys seen so far, relative to the largest exponent so far."""
    tile_max = tl.max(s, 1)
    if bias_ptr is None:
        tile_max *= scale_log2
    new_max = tl.maximum(row_max, tile_max)
    # -inf as long as a row has seen no key: 0 in its place keeps -inf - -inf out of the exponent
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(_less(s, shift[:, None], scale_log2, bias_ptr))
    fade = tl.exp2(row_max - shift)
    return dot(p, v, acc * fade[:, None]), new_max, row_sum * fade + tl.sum(p, 1)


@triton.jit
def _attend_to_tokens(
    acc, row_max, row_sum, q_tile, k_ptr, v_ptr, rows, start, end, first, last, bits, field_ptr, padding_ptr, bias_ptr,
    Sq, Sk, scale_log2, k_strides, v_strides, bias_strides,
    VISIBILITY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Whole tiles of tokens."""
    for at in range(start, end, BLOCK_K):
        keys = at + tl.arange(0, BLOCK_K)
        k_tile = _load_rows(k_ptr, keys, None, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v_ptr, keys, None, v_strides, HEAD_DIM, BLOCK_D)
        inside = (keys < Sk)[None, :]
        s = dot(q_tile, tl.trans(k_tile), None)
        s = _with_bias(s, rows[:, None], keys[None, :], inside, bias_ptr, Sq, scale_log2, bias_strides)
        s = _masked(
            s, keys[None, :], inside, first[:, None], last[:, None], bits[:, None], field_ptr, padding_ptr, Sk,
            VISIBILITY,
        )  # fmt: skip
        acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, s, v_tile, scale_log2, bias_ptr)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=[*_SIZES])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, field_ptr, padding_ptr, bias_ptr, out_ptr, statistics_ptr,
    H, Sq, Sk, P0, P1, left, right, padding_row, scale_log2,
    q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides, bias_strides, out_strides,
    VISIBILITY: tl.constexpr, MASKED_PREFIXES: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of one sample and head, over all their keys."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    tiles = tl.cdiv(Sq, BLOCK_Q)
    batch, head = pid // tiles // H, pid // tiles % H
    of_keys = head // GROUP
    first_row = pid % tiles * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    inside = rows < Sq
    q_tile = _load_rows(_head(q_ptr, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)
    k_head, v_head = _head(k_ptr, k_strides, batch, of_keys), _head(v_ptr, v_strides, batch, of_keys)
    token_padding_ptr = _padding_of_tokens(padding_ptr, padding_row, batch, P0, P1, MASKED_PREFIXES)
    bias_head = _head_if_there(bias_ptr, bias_strides, batch, head)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_Q], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_Q], ACC)
    first, last, bits = _visible_range(field_ptr, rows, Sq, Sk, left, right, VISIBILITY)
    begin, whole_from, whole_to, last_tile, end = _key_range(
        first, last, first_row, first_row + BLOCK_Q - 1, Sq, Sk, left, right, padding_ptr, VISIBILITY, BLOCK_K
    )
    if VISIBILITY >= WINDOW or padding_ptr is not None:
        acc, row_max, row_sum = _attend_to_tokens(
            acc, row_max, row_sum, q_tile, k_head, v_head, rows, begin, whole_from, first, last, bits, field_ptr, token_padding_ptr,
            bias_head, Sq, Sk, scale_log2, k_strides, v_strides, bias_strides,
            VISIBILITY, HEAD_DIM, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    if VISIBILITY <= WINDOW and padding_ptr is None:
        acc, row_max, row_sum = _attend_to_tokens(
            acc, row_max, row_sum, q_tile, k_head, v_head, rows, whole_from, whole_to, first, last, bits, None, None, bias_head,
            Sq, Sk, scale_log2, k_strides, v_strides, bias_strides, FULL, HEAD_DIM, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    if VISIBILITY != FULL and VISIBILITY <= WINDOW and padding_ptr is None:
        acc, row_max, row_sum = _attend_to_tokens(
            acc, row_max, row_sum, q_tile, k_head, v_head, rows, whole_to, last_tile, first, last, bits, None, None, bias_head,
            Sq, Sk, scale_log2, k_strides, v_strides, bias_strides, VISIBILITY, HEAD_DIM, BLOCK_D, BLOCK_K,
        )  # fmt: skip

    tokens = end - last_tile
    for number in tl.range(0, tokens + P0 + P1, BLOCK_K, num_stages=1):  # one step as a rule: nothing to pipeline
        numbers = number + tl.arange(0, BLOCK_K)
        keys = last_tile + numbers
        k_tile = _load_last(
            k_head, _head_if_there(pk0_ptr, pk0_strides, batch, of_keys), _head_if_there(pk1_ptr, pk1_strides, batch, of_keys),
            numbers, last_tile, tokens, P0, P1, k_strides, pk0_strides, pk1_strides, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        s = dot(q_tile, tl.trans(k_tile), None)
        of_token = (numbers < tokens)[None, :]
        s = _with_bias(s, rows[:, None], keys[None, :], of_token, bias_head, Sq, scale_log2, bias_strides)
        s = _last_masked(
            s, numbers[None, :], tokens, P0 + P1, keys[None, :], first[:, None], last[:, None], bits[:, None],
            field_ptr, token_padding_ptr, Sk, VISIBILITY, MASKED_PREFIXES,
        )  # fmt: skip
        v_tile = _load_last(
            v_head, _head_if_there(pv0_ptr, pv0_strides, batch, of_keys), _head_if_there(pv1_ptr, pv1_strides, batch, of_keys),
            numbers, last_tile, tokens, P0, P1, v_strides, pv0_strides, pv1_strides, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        acc, row_max, row_sum = _accumulate(acc, row_max, row_sum, s, v_tile, scale_log2, bias_ptr)

    fully_masked = row_sum == 0.0
    row_sum = tl.where(fully_masked, 1.0, row_sum)
    _store_rows(_head(out_ptr, out_strides, batch, head), rows, inside, out_strides, acc / row_sum[:, None], HEAD_DIM, BLOCK_D)
    at = statistics_ptr + ((pid // tiles).to(tl.int64) * Sq + rows) * 2
    tl.store(at, tl.where(fully_masked, 0.0, row_max), mask=inside)
    tl.store(at + 1, tl.where(fully_masked, float("inf"), tl.log2(row_sum)), mask=inside)


@triton.jit
def _load_statistics(statistics_ptr, at, inside, dtype: tl.constexpr, bias_ptr):
    """Largest exponent and log of the sum of each row; outside as of a row that sees no key.

    Their sum and zero, which costs nothing to subtract, where its rounding is below that of the products' operands: exponents of
    products alone are not large.
    """
    row_max = tl.load(statistics_ptr + at * 2, mask=inside, other=0.0)
    log_sum = tl.load(statistics_ptr + at * 2 + 1, mask=inside, other=float("inf"))
    if dtype.primitive_bitwidth == 16 and bias_ptr is None:
        row_max += log_sum
        log_sum = tl.zeros_like(log_sum)
    return row_max, log_sum


@triton.jit
def _logit_gradients(s, row_max, log_sum, g_dot_v, delta, scale_log2, bias_ptr, MASKED: tl.constexpr):
    """p and ds; whatever an unseen key holds, its ds is 0."""
    p = tl.exp2(_less(s, row_max, scale_log2, bias_ptr) - log_sum)
    ds = p * (g_dot_v - delta)
    if MASKED:
        ds = tl.where(s == float("-inf"), 0.0, ds)
    return p, ds


@triton.jit
def _query_gradient(
    grad, q_tile, g_tile, row_max, log_sum, delta, k_ptr, v_ptr, rows, start, end, first, last, bits,
    field_ptr, padding_ptr, bias_ptr, Sq, Sk, scale_log2, k_strides, v_strides, bias_strides,
    VISIBILITY: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of whole tiles of tokens."""
    MASKED: tl.constexpr = VISIBILITY != FULL or padding_ptr is not None or bias_ptr is not None
    for at in range(start, end, BLOCK_K):
        keys = at + tl.arange(0, BLOCK_K)
        k_tile = _load_rows(k_ptr, keys, None, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(v_ptr, keys, None, v_strides, HEAD_DIM, BLOCK_D)
        inside = (keys < Sk)[None, :]
        s = dot(q_tile, tl.trans(k_tile), None)
        s = _with_bias(s, rows[:, None], keys[None, :], inside, bias_ptr, Sq, scale_log2, bias_strides)
        s = _masked(
            s, keys[None, :], inside, first[:, None], last[:, None], bits[:, None], field_ptr, padding_ptr, Sk,
            VISIBILITY,
        )  # fmt: skip
        g_dot_v = dot(g_tile, tl.trans(v_tile), None)
        _, ds = _logit_gradients(s, row_max[:, None], log_sum[:, None], g_dot_v, delta[:, None], scale_log2, bias_ptr, MASKED)
        grad = dot(ds, k_tile, grad)
    return grad


@triton.jit(do_not_specialize=[*_SIZES])
def query_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, field_ptr, padding_ptr, bias_ptr,
    out_ptr, statistics_ptr, delta_ptr, grad_q_ptr,
    H, Sq, Sk, P0, P1, left, right, padding_row, scale, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides,
    bias_strides, out_strides, grad_q_strides,
    VISIBILITY: tl.constexpr, MASKED_PREFIXES: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: delta and, unless grad_q is None, d q of BLOCK_Q queries of one sample and head."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    tiles = tl.cdiv(Sq, BLOCK_Q)
    batch, head = pid // tiles // H, pid // tiles % H
    of_keys = head // GROUP
    first_row = pid % tiles * BLOCK_Q
    rows = first_row + tl.arange(0, BLOCK_Q)
    inside = rows < Sq
    g_tile = _load_rows(_head(grad_out_ptr, grad_out_strides, batch, head), rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
    out_tile = _load_rows(_head(out_ptr, out_strides, batch, head), rows, inside, out_strides, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(g_tile.to(ACC) * out_tile.to(ACC), 1)
    at = (pid // tiles).to(tl.int64) * Sq + rows
    tl.store(delta_ptr + at, row_delta, mask=inside)
    if grad_q_ptr is not None:
        q_tile = _load_rows(_head(q_ptr, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        k_head, v_head = _head(k_ptr, k_strides, batch, of_keys), _head(v_ptr, v_strides, batch, of_keys)
        token_padding_ptr = _padding_of_tokens(padding_ptr, padding_row, batch, P0, P1, MASKED_PREFIXES)
        bias_head = _head_if_there(bias_ptr, bias_strides, batch, head)
        row_max, log_sum = _load_statistics(statistics_ptr, at, inside, q_ptr.dtype.element_ty, bias_ptr)
        grad = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
        first, last, bits = _visible_range(field_ptr, rows, Sq, Sk, left, right, VISIBILITY)
        begin, whole_from, whole_to, last_tile, end = _key_range(
            first, last, first_row, first_row + BLOCK_Q - 1, Sq, Sk, left, right, padding_ptr, VISIBILITY, BLOCK_K
        )
        if VISIBILITY >= WINDOW or padding_ptr is not None:
            grad = _query_gradient(
                grad, q_tile, g_tile, row_max, log_sum, row_delta, k_head, v_head, rows, begin, whole_from, first, last, bits,
                field_ptr, token_padding_ptr, bias_head, Sq, Sk, scale_log2, k_strides, v_strides, bias_strides,
                VISIBILITY, HEAD_DIM, BLOCK_D, BLOCK_K,
            )  # fmt: skip
        if VISIBILITY <= WINDOW and padding_ptr is None:
            grad = _query_gradient(
                grad, q_tile, g_tile, row_max, log_sum, row_delta, k_head, v_head, rows, whole_from, whole_to, first, last, bits,
                None, None, bias_head, Sq, Sk, scale_log2, k_strides, v_strides, bias_strides, FULL, HEAD_DIM, BLOCK_D, BLOCK_K,
            )  # fmt: skip
        if VISIBILITY != FULL and VISIBILITY <= WINDOW and padding_ptr is None:
            grad = _query_gradient(
                grad, q_tile, g_tile, row_max, log_sum, row_delta, k_head, v_head, rows, whole_to, last_tile, first, last, bits,
                None, None, bias_head, Sq, Sk, scale_log2, k_strides, v_strides, bias_strides,
                VISIBILITY, HEAD_DIM, BLOCK_D, BLOCK_K,
            )  # fmt: skip

        tokens = end - last_tile
        for number in tl.range(0, tokens + P0 + P1, BLOCK_K, num_stages=1):  # one step as a rule: nothing to pipeline
            numbers = number + tl.arange(0, BLOCK_K)
            keys = last_tile + numbers
            k_tile = _load_last(
                k_head, _head_if_there(pk0_ptr, pk0_strides, batch, of_keys), _head_if_there(pk1_ptr, pk1_strides, batch, of_keys),
                numbers, last_tile, tokens, P0, P1, k_strides, pk0_strides, pk1_strides, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            v_tile = _load_last(
                v_head, _head_if_there(pv0_ptr, pv0_strides, batch, of_keys), _head_if_there(pv1_ptr, pv1_strides, batch, of_keys),
                numbers, last_tile, tokens, P0, P1, v_strides, pv0_strides, pv1_strides, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            s = dot(q_tile, tl.trans(k_tile), None)
            of_token = (numbers < tokens)[None, :]
            s = _with_bias(s, rows[:, None], keys[None, :], of_token, bias_head, Sq, scale_log2, bias_strides)
            s = _last_masked(
                s, numbers[None, :], tokens, P0 + P1, keys[None, :], first[:, None], last[:, None], bits[:, None],
                field_ptr, token_padding_ptr, Sk, VISIBILITY, MASKED_PREFIXES,
            )  # fmt: skip
            g_dot_v = dot(g_tile, tl.trans(v_tile), None)
            _, ds = _logit_gradients(
                s, row_max[:, None], log_sum[:, None], g_dot_v, row_delta[:, None], scale_log2, bias_ptr, True
            )  # fmt: skip
            grad = dot(ds, k_tile, grad)
        _store_rows(_head(grad_q_ptr, grad_q_strides, batch, head), rows, inside, grad_q_strides, grad * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _prefix_gradients(
    part, q_ptr, grad_out_ptr, k_ptr, v_ptr, padding_ptr, statistics_ptr, delta_ptr, grads_ptr,
    batch, of_keys, H, Sq, P, scale, scale_log2, q_strides, grad_out_strides, k_strides, v_strides, bias_ptr,
    grads_strides, splits, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """d k and d v of BLOCK_P keys of a prefix, over one of ``splits`` parts of the queries: grads (2, B, splits, Hkv, P, Dh)."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    split = part % splits
    keys = part // splits * BLOCK_P + tl.arange(0, BLOCK_P)
    k_tile = _load_rows(_head(k_ptr, k_strides, batch, of_keys), keys, keys < P, k_strides, HEAD_DIM, BLOCK_D)
    v_tile = _load_rows(_head(v_ptr, v_strides, batch, of_keys), keys, keys < P, v_strides, HEAD_DIM, BLOCK_D)
    grad_k = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    grad_v = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    per_split = tl.cdiv(tl.cdiv(Sq, splits), BLOCK_Q) * BLOCK_Q
    for member in range(GROUP):
        head = of_keys * GROUP + member
        q_head, g_head = _head(q_ptr, q_strides, batch, head), _head(grad_out_ptr, grad_out_strides, batch, head)
        statistics_row = (batch * H + head).to(tl.int64) * Sq
        for start in range(split * per_split, tl.minimum(Sq, (split + 1) * per_split), BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            inside = rows < Sq
            q_tile = _load_rows(q_head, rows, inside, q_strides, HEAD_DIM, BLOCK_D)
            g_tile = _load_rows(g_head, rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
            row_max, log_sum = _load_statistics(statistics_ptr, statistics_row + rows, inside, q_ptr.dtype.element_ty, bias_ptr)
            row_delta = tl.load(delta_ptr + statistics_row + rows, mask=inside, other=0.0)
            s = dot(k_tile, tl.trans(q_tile), None)
            if bias_ptr is not None:
                s = s * scale_log2
            if padding_ptr is not None:
                s = tl.where(_is_there(padding_ptr, keys, keys < P)[:, None], s, float("-inf"))
            v_dot_g = dot(v_tile, tl.trans(g_tile), None)
            MASKED: tl.constexpr = padding_ptr is not None
            p, ds = _logit_gradients(
                s, row_max[None, :], log_sum[None, :], v_dot_g, row_delta[None, :], scale_log2, bias_ptr, MASKED
            )  # fmt: skip
            grad_v = dot(p, g_tile, grad_v)
            grad_k = dot(ds, q_tile, grad_k)
    to_k = _head(grads_ptr, grads_strides[1:], batch, split) + of_keys.to(tl.int64) * grads_strides[3]
    _store_rows(to_k, keys, keys < P, grads_strides[2:], grad_k * scale, HEAD_DIM, BLOCK_D)
    _store_rows(to_k + grads_strides[0], keys, keys < P, grads_strides[2:], grad_v, HEAD_DIM, BLOCK_D)


@triton.jit
def _token_gradients(
    tile, q_ptr, k_ptr, v_ptr, grad_out_ptr, field_ptr, padding_ptr, bias_ptr, statistics_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    batch, of_keys, H, Sq, Sk, left, right, scale, scale_log2,
    q_strides, k_strides, v_strides, grad_out_strides, bias_strides, grad_k_strides, grad_v_strides,
    VISIBILITY: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d k and d v of BLOCK_K tokens of one sample and head, over the queries that see any of them."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    MASKED: tl.constexpr = VISIBILITY != FULL or padding_ptr is not None or bias_ptr is not None
    keys = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_tile = _load_rows(_head(k_ptr, k_strides, batch, of_keys), keys, keys < Sk, k_strides, HEAD_DIM, BLOCK_D)
    v_tile = _load_rows(_head(v_ptr, v_strides, batch, of_keys), keys, keys < Sk, v_strides, HEAD_DIM, BLOCK_D)
    to_k = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    to_v = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    first_query, last_query = _query_range(
        field_ptr, keys, tile * BLOCK_K, tile * BLOCK_K + BLOCK_K - 1, Sq, Sk, left, right, VISIBILITY
    )
    for member in range(GROUP):
        head = of_keys * GROUP + member
        q_head, g_head = _head(q_ptr, q_strides, batch, head), _head(grad_out_ptr, grad_out_strides, batch, head)
        bias_head = _head_if_there(bias_ptr, bias_strides, batch, head)
        statistics_row = (batch * H + head).to(tl.int64) * Sq
        for start in range(first_query, last_query, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            inside = rows < Sq
            q_tile = _load_rows(q_head, rows, inside, q_strides, HEAD_DIM, BLOCK_D)
            g_tile = _load_rows(g_head, rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
            row_max, log_sum = _load_statistics(statistics_ptr, statistics_row + rows, inside, q_ptr.dtype.element_ty, bias_ptr)
            row_delta = tl.load(delta_ptr + statistics_row + rows, mask=inside, other=0.0)
            first, last, bits = _visible_range(field_ptr, rows, Sq, Sk, left, right, VISIBILITY)
            of_token = (keys < Sk)[:, None]
            s = dot(k_tile, tl.trans(q_tile), None)
            s = _with_bias(s, rows[None, :], keys[:, None], of_token, bias_head, Sq, scale_log2, bias_strides)
            s = _masked(
                s, keys[:, None], of_token, first[None, :], last[None, :], bits[None, :],
                field_ptr, padding_ptr, Sk, VISIBILITY,
            )  # fmt: skip
            v_dot_g = dot(v_tile, tl.trans(g_tile), None)
            p, ds = _logit_gradients(
                s, row_max[None, :], log_sum[None, :], v_dot_g, row_delta[None, :], scale_log2, bias_ptr, MASKED
            )  # fmt: skip
            to_v = dot(p, g_tile, to_v)
            to_k = dot(ds, q_tile, to_k)
    _store_rows(_head(grad_k_ptr, grad_k_strides, batch, of_keys), keys, keys < Sk, grad_k_strides, to_k * scale, HEAD_DIM, BLOCK_D)
    _store_rows(_head(grad_v_ptr, grad_v_strides, batch, of_keys), keys, keys < Sk, grad_v_strides, to_v, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=[*_SIZES, "token_tiles", "parts0", "parts1", "splits"])
def key_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, field_ptr, padding_ptr, bias_ptr,
    statistics_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, grads0_ptr, grads1_ptr,
    H, Sq, Sk, P0, P1, left, right, padding_row, token_tiles, parts0, parts1, splits, scale, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides,
    bias_strides, grad_k_strides, grad_v_strides, grads0_strides, grads1_strides,
    VISIBILITY: tl.constexpr, MASKED_PREFIXES: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P0: tl.constexpr, BLOCK_P1: tl.constexpr,
):  # fmt: skip
    """One program: a tile of token keys, or a part of a prefix's work, of one sample and head of keys.

    Of one sample and head there are token_tiles + parts0 + parts1 programs, in this order.
    """
    pid = tl.program_id(0)
    work = token_tiles + parts0 + parts1
    key_heads = H // GROUP
    batch, of_keys, index = pid // work // key_heads, pid // work % key_heads, pid % work
    token_padding_ptr = _padding_of_tokens(padding_ptr, padding_row, batch, P0, P1, MASKED_PREFIXES)
    if grad_k_ptr is not None:  # noqa: SIM102 - the outer condition is the compiler's
        if index < token_tiles:
            _token_gradients(
                index, q_ptr, k_ptr, v_ptr, grad_out_ptr, field_ptr, token_padding_ptr, bias_ptr, statistics_ptr, delta_ptr,
                grad_k_ptr, grad_v_ptr, batch, of_keys, H, Sq, Sk, left, right, scale, scale_log2,
                q_strides, k_strides, v_strides, grad_out_strides, bias_strides, grad_k_strides, grad_v_strides,
                VISIBILITY, GROUP, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
    if grads0_ptr is not None:  # noqa: SIM102
        if (index >= token_tiles) & (index < token_tiles + parts0):
            _prefix_gradients(
                index - token_tiles, q_ptr, grad_out_ptr, pk0_ptr, pv0_ptr,
                _mask_of_prefix(token_padding_ptr, P0 + P1, MASKED_PREFIXES), statistics_ptr, delta_ptr, grads0_ptr,
                batch, of_keys, H, Sq, P0, scale, scale_log2,
                q_strides, grad_out_strides, pk0_strides, pv0_strides, bias_ptr, grads0_strides, splits,
                GROUP, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_P0,
            )  # fmt: skip
    if grads1_ptr is not None:  # noqa: SIM102
        if index >= token_tiles + parts0:
            _prefix_gradients(
                index - token_tiles - parts0, q_ptr, grad_out_ptr, pk1_ptr, pv1_ptr,
                _mask_of_prefix(token_padding_ptr, P1, MASKED_PREFIXES), statistics_ptr, delta_ptr, grads1_ptr,
                batch, of_keys, H, Sq, P1, scale, scale_log2,
                q_strides, grad_out_strides, pk1_strides, pv1_strides, bias_ptr, grads1_strides, splits,
                GROUP, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_P1,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*_SIZES, "batches", "heads", "bias_heads"])
def bias_grads_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, field_ptr, padding_ptr, bias_ptr, statistics_ptr, delta_ptr, grad_bias_ptr,
    H, Sq, Sk, P0, P1, left, right, padding_row, batches, heads, bias_heads, scale_log2,
    grad_out_strides, q_strides, k_strides, v_strides, bias_strides,
    VISIBILITY: tl.constexpr, MASKED_PREFIXES: tl.constexpr, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of d bias, summed in order over the ``batches`` samples and ``heads`` heads that share it."""
    ACC: tl.constexpr = sum_type(q_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    k_tiles = tl.cdiv(Sk, BLOCK_K)
    tiles = tl.cdiv(Sq, BLOCK_Q) * k_tiles
    shared, tile = pid // tiles, pid % tiles
    rows = tile // k_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = tile % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, of_token = rows < Sq, keys < Sk
    first, last, bits = _visible_range(field_ptr, rows, Sq, Sk, left, right, VISIBILITY)
    grad = tl.zeros([BLOCK_Q, BLOCK_K], ACC)
    for i in range(batches * heads):
        batch = shared // bias_heads + i // heads
        head = shared % bias_heads + i % heads
        of_keys = head // GROUP
        q_tile = _load_rows(_head(q_ptr, q_strides, batch, head), rows, inside, q_strides, HEAD_DIM, BLOCK_D)
        g_tile = _load_rows(_head(grad_out_ptr, grad_out_strides, batch, head), rows, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        k_tile = _load_rows(_head(k_ptr, k_strides, batch, of_keys), keys, of_token, k_strides, HEAD_DIM, BLOCK_D)
        v_tile = _load_rows(_head(v_ptr, v_strides, batch, of_keys), keys, of_token, v_strides, HEAD_DIM, BLOCK_D)
        at = (batch * H + head).to(tl.int64) * Sq + rows
        row_max, log_sum = _load_statistics(statistics_ptr, at, inside, q_ptr.dtype.element_ty, bias_ptr)
        row_delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        token_padding_ptr = _padding_of_tokens(padding_ptr, padding_row, batch, P0, P1, MASKED_PREFIXES)
        s = dot(q_tile, tl.trans(k_tile), None)
        bias_head = _head(bias_ptr, bias_strides, batch, head)
        s = _with_bias(s, rows[:, None], keys[None, :], of_token[None, :], bias_head, Sq, scale_log2, bias_strides)
        s = _masked(
            s, keys[None, :], of_token[None, :], first[:, None], last[:, None], bits[:, None], field_ptr, token_padding_ptr, Sk,
            VISIBILITY,
        )  # fmt: skip
        g_dot_v = dot(g_tile, tl.trans(v_tile), None)
        _, ds = _logit_gradients(
            s, row_max[:, None], log_sum[:, None], g_dot_v, row_delta[:, None], scale_log2, bias_ptr, True
        )  # fmt: skip
        grad += ds
    to = grad_bias_ptr + (shared.to(tl.int64) * Sq + rows[:, None]) * Sk + keys[None, :]
    tl.store(to, grad.to(grad_bias_ptr.dtype.element_ty), mask=inside[:, None] & of_token[None, :])
