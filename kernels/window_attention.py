"""Device code of shifted window attention with prompts, forward and backward, on the packed projection of the whole image.

    s[i, j] = scale <q_i, k_j> + bias[i, j] - 100 [a seam lies between i and j]      over the tokens j of i's window
    s[i, j] = scale <q_i, k_j>                                                       over the prompts j of i's image
    out_i   = sum_j p[i, j] v_j,   p[i, :] = softmax(s[i, :])

Backward, with g the gradient of ``out``:

    ds[i, j] = p[i, j] (<g_i, v_j> - sum_j p[i, j] <g_i, v_j>)     = d bias
    d q_i    = scale sum_j ds[i, j] k_j,   d k_j = scale sum_i ds[i, j] q_i,   d v_j = sum_i p[i, j] g_i

Roll, padding and partition are index arithmetic (``_locate``). The keys at hand are a window's AREA tokens, then its image's
prompts, in tiles of ``TILES`` keys, powers of two, as few as hold them all: prompts ride in what the tokens' last tile has to
spare, so 13 prompts beside 49 tokens make no product larger. A row's softmax is therefore whole: nothing but the arguments is
kept for the backward pass, and there one pass over a window gives all its gradients but the bias'. A token is in one window, so
its gradient is written once. Prompts are in all of them: their gradients are summed over the windows of a program and written
apart, to be added later. No kernel uses atomics.

qkv and its gradient are (B, Hi, Wi, 3, H, Dh). ``bias`` (H, ROWS, sum(TILES)) has zeros around (H, AREA, AREA), so that it is read
without a mask. ``mask`` (B, P0 + P1) is True for the prompts that an image has, ``pad`` (3, H, Dh) is what padding holds.
Exponents are in base 2. Pairs are (vertical, horizontal) or of the two prefixes.

Pointers are ``*_ptr``, their strides tuples. A tensor that isn't there is None, and so is a gradient that nobody asked for.
``ACC`` is what sums are in; qkv and g have one type, which tiles of prompts take too: see ``products.py``.
"""

import triton
import triton.language as tl

from .products import LOG2_E, dot, sum_type

SEAM: tl.constexpr = tl.constexpr(-100.0)
_SIZES = ["H", "chunks", "per_chunk", "units", "per_split", "windows", "image_size", "shift", "roll", "lengths"]
"""Arguments whose values make no other kernel."""


@triton.jit
def _locate(positions, window, image_size, shift, roll, WINDOW: tl.constexpr):
    """Of positions in a window: row and column in the image, whether there is a token, and the side of the seams it lies on.

    Sides are bits, 1 to 8; what is behind the window's tokens lies on all of them.
    """
    windows_x = tl.cdiv(image_size[1], WINDOW[1])
    y = window // windows_x * WINDOW[0] + positions // WINDOW[1]
    x = window % windows_x * WINDOW[1] + positions % WINDOW[1]
    inside = (positions < WINDOW[0] * WINDOW[1]) & (y < image_size[0]) & (x < image_size[1])
    below = y >= tl.cdiv(image_size[0], WINDOW[0]) * WINDOW[0] - shift[0]
    right = x >= windows_x * WINDOW[1] - shift[1]
    side = tl.where(positions < WINDOW[0] * WINDOW[1], 1 << (below.to(tl.int32) * 2 + right.to(tl.int32)), 15)
    y += roll[0]
    x += roll[1]
    return tl.where(y < image_size[0], y, y - image_size[0]), tl.where(x < image_size[1], x, x - image_size[1]), inside, side


@triton.jit
def _columns(inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The head dimension's positions, and the mask [rows, BLOCK_D] of what is there of the rows ``inside``."""
    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return columns[None, :].to(tl.int64), mask


@triton.jit
def _image_rows(tensor_ptr, y, x, strides):
    """Pointers [rows, 1] into an image (Hi, Wi, ...)."""
    return tensor_ptr + (y.to(tl.int64) * strides[1] + x.to(tl.int64) * strides[2])[:, None]


@triton.jit
def _part(tensor_ptr, image, part, head, strides):
    """Where the queries (part 0), keys (1) or values (2) of one image and head begin."""
    return tensor_ptr + image.to(tl.int64) * strides[0] + tl.full([], part, tl.int64) * strides[3] + head.to(tl.int64) * strides[4]


@triton.jit
def _load_tokens(qkv_ptr, image, part, head, y, x, inside, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D]; zeros where there is no token."""
    columns, mask = _columns(inside, HEAD_DIM, BLOCK_D)
    at = _image_rows(_part(qkv_ptr, image, part, head, strides), y, x, strides) + columns * strides[5]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _store_tokens(
    grad_qkv_ptr, image, part, head, y, x, inside, strides, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    columns, mask = _columns(inside, HEAD_DIM, BLOCK_D)
    at = _image_rows(_part(grad_qkv_ptr, image, part, head, strides), y, x, strides) + columns * strides[5]
    tl.store(at, tile.to(grad_qkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_upstream(grad_out_ptr, image, head, y, x, inside, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of the gradient (B, Hi, Wi, H * Dh) of the output; zeros where there is no token."""
    columns, mask = _columns(inside, HEAD_DIM, BLOCK_D)
    at = _image_rows(grad_out_ptr + image.to(tl.int64) * strides[0], y, x, strides) + (head * HEAD_DIM + columns) * strides[3]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _padded(tile, pad_ptr, part, head, padding, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys or values with those of padding in the rows ``padding``."""
    columns = tl.arange(0, BLOCK_D)
    at = pad_ptr + tl.full([], part, tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + columns.to(tl.int64) * strides[2]
    row = tl.load(at, mask=columns < HEAD_DIM, other=0.0).to(tile.dtype)  # as the projection rounds it
    return tl.where(padding[:, None], row[None, :], tile)


@triton.jit
def _prefix_rows(prompts_ptr, image, head, rows, present, length, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    columns, mask = _columns(present & (rows >= 0) & (rows < length), HEAD_DIM, BLOCK_D)
    start = prompts_ptr + image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    return tl.load(start + rows[:, None].to(tl.int64) * strides[2] + columns * strides[3], mask=mask, other=0.0)


@triton.jit
def _prompt_tile(
    prompts0_ptr, prompts1_ptr, mask_ptr, image, head, strides0, strides1, mask_strides, lengths,
    START: tl.constexpr, SIZE: tl.constexpr, AREA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys or values of those of an image's prompts that are there, behind a window's tokens; zeros elsewhere."""
    if START + SIZE <= AREA:
        tile = tl.zeros([1, 1], DTYPE)  # nobody reads it
    else:
        rows = START - AREA + tl.arange(0, SIZE)
        present = rows >= 0
        if mask_ptr is not None:
            at = mask_ptr + image.to(tl.int64) * mask_strides[0] + rows.to(tl.int64) * mask_strides[1]
            present = tl.load(at, mask=present & (rows < lengths[0] + lengths[1]), other=0).to(tl.int1)
        tile = tl.zeros([SIZE, BLOCK_D], DTYPE)
        if prompts0_ptr is not None:
            tile = _prefix_rows(prompts0_ptr, image, head, rows, present, lengths[0], strides0, HEAD_DIM, BLOCK_D).to(DTYPE)
        if prompts1_ptr is not None:
            behind = rows - lengths[0]
            second = _prefix_rows(prompts1_ptr, image, head, behind, present, lengths[1], strides1, HEAD_DIM, BLOCK_D).to(DTYPE)
            tile = tl.where((behind >= 0)[:, None], second, tile)
    return tile


@triton.jit
def _prompt_tiles(
    pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, mask_ptr, image, head,
    pk0_strides, pv0_strides, pk1_strides, pv1_strides, mask_strides, lengths,
    AREA: tl.constexpr, TILES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Keys and values of each tile."""
    keys, values = (), ()
    for i in tl.static_range(len(TILES)):
        k = _prompt_tile(
            pk0_ptr, pk1_ptr, mask_ptr, image, head, pk0_strides, pk1_strides, mask_strides, lengths,
            TILES[i][0], TILES[i][1], AREA, HEAD_DIM, BLOCK_D, DTYPE,
        )  # fmt: skip
        v = _prompt_tile(
            pv0_ptr, pv1_ptr, mask_ptr, image, head, pv0_strides, pv1_strides, mask_strides, lengths,
            TILES[i][0], TILES[i][1], AREA, HEAD_DIM, BLOCK_D, DTYPE,
        )  # fmt: skip
        keys, values = keys + (k,), values + (v,)
    return keys, values


@triton.jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    return tl.zeros([ROWS, COLUMNS], DTYPE)


@triton.jit
def _key_zeros(TILES: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr):
    """One accumulator [keys, BLOCK_D] for each tile."""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles = tiles + (_zeros(TILES[i][1], BLOCK_D, ACC),)
    return tiles


@triton.jit
def _positions(START: tl.constexpr, SIZE: tl.constexpr):
    return START + tl.arange(0, SIZE)


@triton.jit
def _bias_tiles(
    bias_ptr, mask_ptr, image, head, rows, mask_strides, lengths,
    AREA: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[rows, keys] in base 2: the bias for tokens, 0 for prompts, -inf for what is neither, or not there."""
    tiles = ()
    for i in tl.static_range(len(TILES)):
        positions = _positions(TILES[i][0], TILES[i][1])
        b = tl.load(bias_ptr + (head.to(tl.int64) * ROWS + rows[:, None]) * KEYS + positions[None, :]).to(ACC)
        # in base 2 the least float32 would become -inf, which hides a key, and the largest inf
        b = tl.where((b < -2e38) & (b > float("-inf")), -2e38, b)
        b = tl.where((b > 2e38) & (b < float("inf")), 2e38, b) * LOG2_E
        present = positions < AREA + lengths[0] + lengths[1]
        if mask_ptr is not None:
            at = mask_ptr + image.to(tl.int64) * mask_strides[0] + (positions - AREA).to(tl.int64) * mask_strides[1]
            present = present & tl.load(at, mask=present & (positions >= AREA), other=1).to(tl.int1)
        tiles = tiles + (tl.where(present[None, :], b, float("-inf")),)
    return tiles


@triton.jit
def _key_tile(
    qkv_ptr, pad_ptr, prompts, image, part, head, positions, y, x, inside, qkv_strides, pad_strides,
    START: tl.constexpr, SIZE: tl.constexpr, AREA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys or values of a window's tokens with the prompts behind them."""
    if START >= AREA:
        tile = prompts
    else:
        tile = _load_tokens(qkv_ptr, image, part, head, y, x, inside, qkv_strides, HEAD_DIM, BLOCK_D)
        if pad_ptr is not None:
            padding = (positions < AREA) & ~inside
            tile = _padded(tile, pad_ptr, part, head, padding, pad_strides, HEAD_DIM, BLOCK_D)
        if START + SIZE > AREA:
            tile = tl.where((positions < AREA)[:, None], tile, prompts)
    return tile


@triton.jit
def _window_keys(
    qkv_ptr, pad_ptr, prompt_keys, prompt_values, image, head, window, image_size, shift, roll, qkv_strides, pad_strides,
    WINDOW: tl.constexpr, AREA: tl.constexpr, TILES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All keys and values of a window, and the sides they lie on."""
    keys, values, sides = (), (), ()
    for i in tl.static_range(len(TILES)):
        positions = _positions(TILES[i][0], TILES[i][1])
        y, x, inside, side = _locate(positions, window, image_size, shift, roll, WINDOW)
        k = _key_tile(
            qkv_ptr, pad_ptr, prompt_keys[i], image, 1, head, positions, y, x, inside, qkv_strides, pad_strides,
            TILES[i][0], TILES[i][1], AREA, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        v = _key_tile(
            qkv_ptr, pad_ptr, prompt_values[i], image, 2, head, positions, y, x, inside, qkv_strides, pad_strides,
            TILES[i][0], TILES[i][1], AREA, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        keys, values, sides = keys + (k,), values + (v,), sides + (side,)
    return keys, values, sides


@triton.jit
def _weights(q, keys, biases, side, key_sides, scale_log2, TILES: tl.constexpr, SHIFTED: tl.constexpr):
    """exp(s) of each tile relative to the row's largest, and their sum over all tiles; a row that sees no key has sum 1."""
    exponents = ()
    row_max = tl.full([q.shape[0]], float("-inf"), biases[0].dtype)
    for i in tl.static_range(len(TILES)):
        s = dot(q, tl.trans(keys[i]), None) * scale_log2 + biases[i]
        if SHIFTED:
            s += tl.where((side[:, None] & key_sides[i][None, :]) == 0, SEAM * LOG2_E, 0.0)
        row_max = tl.maximum(row_max, tl.max(s, 1))
        exponents = exponents + (s,)
    # 0 in place of -inf keeps -inf - -inf out of the exponent
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = ()
    row_sum = tl.zeros_like(row_max)
    for i in tl.static_range(len(TILES)):
        p = tl.exp2(exponents[i] - row_max[:, None])
        row_sum += tl.sum(p, 1)
        weights = weights + (p,)
    return weights, tl.where(row_sum == 0.0, 1.0, row_sum)


@triton.jit
def _logit_gradients(weights, row_sum, g, values, TILES: tl.constexpr):
    """p and ds of each tile."""
    probabilities, products = (), ()
    delta = tl.zeros_like(row_sum)
    for i in tl.static_range(len(TILES)):
        p = weights[i] / row_sum[:, None]
        g_dot_v = dot(g, tl.trans(values[i]), None)
        delta += tl.sum(p * g_dot_v, 1)
        probabilities, products = probabilities + (p,), products + (g_dot_v,)
    gradients = ()
    for i in tl.static_range(len(TILES)):
        gradients = gradients + (probabilities[i] * (products[i] - delta[:, None]),)
    return probabilities, gradients


@triton.jit(do_not_specialize=_SIZES)
def window_attention_kernel(
    qkv_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, mask_ptr, bias_ptr, pad_ptr, out_ptr,
    H, chunks, per_chunk, windows, image_size, shift, roll, lengths, scale_log2,
    qkv_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides, mask_strides, pad_strides, out_strides,
    WINDOW: tl.constexpr, AREA: tl.constexpr, SHIFTED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: every window in a chunk of them, of one image and head."""
    ACC: tl.constexpr = sum_type(qkv_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    chunk, head, image = pid % chunks, pid // chunks % H, pid // chunks // H
    prompt_keys, prompt_values = _prompt_tiles(
        pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, mask_ptr, image, head,
        pk0_strides, pv0_strides, pk1_strides, pv1_strides, mask_strides, lengths,
        AREA, TILES, HEAD_DIM, BLOCK_D, qkv_ptr.dtype.element_ty,
    )  # fmt: skip
    # where all queries are one block, its bias stays in registers
    biases = _bias_tiles(
        bias_ptr, mask_ptr, image, head, tl.arange(0, BLOCK_Q), mask_strides, lengths, AREA, ROWS, KEYS, TILES, ACC
    )  # fmt: skip
    for window in range(chunk * per_chunk, tl.minimum(windows, (chunk + 1) * per_chunk)):
        keys, values, key_sides = _window_keys(
            qkv_ptr, pad_ptr, prompt_keys, prompt_values, image, head, window, image_size, shift, roll, qkv_strides, pad_strides,
            WINDOW, AREA, TILES, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        for start in range(0, ROWS, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            if BLOCK_Q < ROWS:
                biases = _bias_tiles(bias_ptr, mask_ptr, image, head, rows, mask_strides, lengths, AREA, ROWS, KEYS, TILES, ACC)
            y, x, inside, side = _locate(rows, window, image_size, shift, roll, WINDOW)
            q = _load_tokens(qkv_ptr, image, 0, head, y, x, inside, qkv_strides, HEAD_DIM, BLOCK_D)
            weights, row_sum = _weights(q, keys, biases, side, key_sides, scale_log2, TILES, SHIFTED)
            acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
            for i in tl.static_range(len(TILES)):
                acc = dot(weights[i], values[i], acc)
            columns, mask = _columns(inside, HEAD_DIM, BLOCK_D)
            at = _image_rows(out_ptr + image.to(tl.int64) * out_strides[0] + head * HEAD_DIM, y, x, out_strides) + columns
            tl.store(at, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prompts_only(tiles, AREA: tl.constexpr, TILES: tl.constexpr):
    """Rows of tokens set to 0."""
    cleared = ()
    for i in tl.static_range(len(TILES)):
        prompt = (_positions(TILES[i][0], TILES[i][1]) >= AREA)[:, None]
        cleared = cleared + (tl.where(prompt, tiles[i], 0.0),)
    return cleared


@triton.jit
def _store_prefix_gradients(
    grads_ptr, grad_k, grad_v, image, chunk, head, rows, length, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Into one chunk's part of grads (2, B, chunks, H, P, Dh)."""
    columns, mask = _columns((rows >= 0) & (rows < length), HEAD_DIM, BLOCK_D)
    start = grads_ptr + image.to(tl.int64) * strides[1] + chunk.to(tl.int64) * strides[2] + head.to(tl.int64) * strides[3]
    at = start + rows[:, None].to(tl.int64) * strides[4] + columns * strides[5]
    tl.store(at, grad_k.to(grads_ptr.dtype.element_ty), mask=mask)
    tl.store(at + strides[0], grad_v.to(grads_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def window_grads_kernel(
    grad_out_ptr, qkv_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, mask_ptr, bias_ptr, pad_ptr,
    grad_qkv_ptr, grads0_ptr, grads1_ptr, grad_pad_ptr,
    H, chunks, per_chunk, windows, image_size, shift, roll, lengths, scale, scale_log2,
    grad_out_strides, qkv_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides, mask_strides, pad_strides,
    grad_qkv_strides, grads0_strides, grads1_strides,
    WINDOW: tl.constexpr, AREA: tl.constexpr, SHIFTED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: every window in a chunk of them, of one image and head.

    Writes what isn't None: d qkv; the chunk's share of both prefixes' gradients, (2, B, chunks, H, P, Dh); that of padding's keys
    and values, (B, chunks, H, 2, BLOCK_D).
    """
    ACC: tl.constexpr = sum_type(qkv_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    chunk, head, image = pid % chunks, pid // chunks % H, pid // chunks // H
    prompt_keys, prompt_values = _prompt_tiles(
        pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, mask_ptr, image, head,
        pk0_strides, pv0_strides, pk1_strides, pv1_strides, mask_strides, lengths,
        AREA, TILES, HEAD_DIM, BLOCK_D, qkv_ptr.dtype.element_ty,
    )  # fmt: skip
    grads_k, grads_v = _key_zeros(TILES, BLOCK_D, ACC), _key_zeros(TILES, BLOCK_D, ACC)
    pad_grad_k, pad_grad_v = tl.zeros([BLOCK_D], ACC), tl.zeros([BLOCK_D], ACC)
    for window in range(chunk * per_chunk, tl.minimum(windows, (chunk + 1) * per_chunk)):
        keys, values, key_sides = _window_keys(
            qkv_ptr, pad_ptr, prompt_keys, prompt_values, image, head, window, image_size, shift, roll, qkv_strides, pad_strides,
            WINDOW, AREA, TILES, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        grads_k, grads_v = _prompts_only(grads_k, AREA, TILES), _prompts_only(grads_v, AREA, TILES)
        for start in range(0, ROWS, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            y, x, inside, side = _locate(rows, window, image_size, shift, roll, WINDOW)
            q = _load_tokens(qkv_ptr, image, 0, head, y, x, inside, qkv_strides, HEAD_DIM, BLOCK_D)
            g = _load_upstream(grad_out_ptr, image, head, y, x, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
            biases = _bias_tiles(bias_ptr, mask_ptr, image, head, rows, mask_strides, lengths, AREA, ROWS, KEYS, TILES, ACC)
            weights, row_sum = _weights(q, keys, biases, side, key_sides, scale_log2, TILES, SHIFTED)
            p, ds = _logit_gradients(weights, row_sum, g, values, TILES)
            to_k, to_v = (), ()
            for i in tl.static_range(len(TILES)):
                to_v = to_v + (dot(tl.trans(p[i]), g, grads_v[i]),)
                to_k = to_k + (dot(tl.trans(ds[i]), q, grads_k[i]),)
            grads_k, grads_v = to_k, to_v
            if grad_qkv_ptr is not None:
                grad_q = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
                for i in tl.static_range(len(TILES)):
                    grad_q = dot(ds[i], keys[i], grad_q)
                _store_tokens(
                    grad_qkv_ptr, image, 0, head, y, x, inside, grad_qkv_strides, grad_q * scale, HEAD_DIM, BLOCK_D
                )  # fmt: skip
        if grad_qkv_ptr is not None:
            for i in tl.static_range(len(TILES)):
                positions = _positions(TILES[i][0], TILES[i][1])
                y, x, inside, _ = _locate(positions, window, image_size, shift, roll, WINDOW)
                _store_tokens(
                    grad_qkv_ptr, image, 1, head, y, x, inside, grad_qkv_strides, grads_k[i] * scale, HEAD_DIM, BLOCK_D
                )  # fmt: skip
                _store_tokens(grad_qkv_ptr, image, 2, head, y, x, inside, grad_qkv_strides, grads_v[i], HEAD_DIM, BLOCK_D)
        if grad_pad_ptr is not None:
            for i in tl.static_range(len(TILES)):
                positions = _positions(TILES[i][0], TILES[i][1])
                _, _, inside, _ = _locate(positions, window, image_size, shift, roll, WINDOW)
                padding = ((positions < AREA) & ~inside)[:, None]
                pad_grad_k += tl.sum(tl.where(padding, grads_k[i], 0.0), 0)
                pad_grad_v += tl.sum(tl.where(padding, grads_v[i], 0.0), 0)
    for i in tl.static_range(len(TILES)):
        rows = _positions(TILES[i][0], TILES[i][1]) - AREA
        if grads0_ptr is not None:
            _store_prefix_gradients(
                grads0_ptr, grads_k[i] * scale, grads_v[i], image, chunk, head, rows, lengths[0], grads0_strides,
                HEAD_DIM, BLOCK_D,
            )  # fmt: skip
        if grads1_ptr is not None:
            _store_prefix_gradients(
                grads1_ptr, grads_k[i] * scale, grads_v[i], image, chunk, head, rows - lengths[0], lengths[1],
                grads1_strides, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    if grad_pad_ptr is not None:
        at = grad_pad_ptr + ((image * chunks + chunk).to(tl.int64) * H + head) * 2 * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(at, pad_grad_k * scale)
        tl.store(at + BLOCK_D, pad_grad_v)


@triton.jit(do_not_specialize=_SIZES)
def window_bias_grads_kernel(
    grad_out_ptr, qkv_ptr, pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, mask_ptr, bias_ptr, pad_ptr, grad_bias_ptr,
    H, units, per_split, windows, image_size, shift, roll, lengths, scale_log2,
    grad_out_strides, qkv_strides, pk0_strides, pv0_strides, pk1_strides, pv1_strides, mask_strides, pad_strides,
    WINDOW: tl.constexpr, AREA: tl.constexpr, SHIFTED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q rows of one head's d bias, summed over a part of the ``units`` windows of all images, in order.

    grad_bias (splits, H, ROWS, KEYS).
    """
    ACC: tl.constexpr = sum_type(qkv_ptr.dtype.element_ty)
    pid = tl.program_id(0)
    blocks: tl.constexpr = ROWS // BLOCK_Q
    head, split = pid // blocks % H, pid // blocks // H
    rows = pid % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    sums = ()
    for i in tl.static_range(len(TILES)):
        sums = sums + (_zeros(BLOCK_Q, TILES[i][1], ACC),)
    for unit in range(split * per_split, tl.minimum(units, (split + 1) * per_split)):
        image, window = unit // windows, unit % windows
        prompt_keys, prompt_values = _prompt_tiles(
            pk0_ptr, pv0_ptr, pk1_ptr, pv1_ptr, mask_ptr, image, head,
            pk0_strides, pv0_strides, pk1_strides, pv1_strides, mask_strides, lengths,
            AREA, TILES, HEAD_DIM, BLOCK_D, qkv_ptr.dtype.element_ty,
        )  # fmt: skip
        keys, values, key_sides = _window_keys(
            qkv_ptr, pad_ptr, prompt_keys, prompt_values, image, head, window, image_size, shift, roll, qkv_strides, pad_strides,
            WINDOW, AREA, TILES, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        y, x, inside, side = _locate(rows, window, image_size, shift, roll, WINDOW)
        q = _load_tokens(qkv_ptr, image, 0, head, y, x, inside, qkv_strides, HEAD_DIM, BLOCK_D)
        g = _load_upstream(grad_out_ptr, image, head, y, x, inside, grad_out_strides, HEAD_DIM, BLOCK_D)
        biases = _bias_tiles(bias_ptr, mask_ptr, image, head, rows, mask_strides, lengths, AREA, ROWS, KEYS, TILES, ACC)
        weights, row_sum = _weights(q, keys, biases, side, key_sides, scale_log2, TILES, SHIFTED)
        _, ds = _logit_gradients(weights, row_sum, g, values, TILES)
        added = ()
        for i in tl.static_range(len(TILES)):
            added = added + (sums[i] + ds[i],)
        sums = added
    for i in tl.static_range(len(TILES)):
        at = grad_bias_ptr + ((split * H + head).to(tl.int64) * ROWS + rows[:, None]) * KEYS
        tl.store(at + _positions(TILES[i][0], TILES[i][1])[None, :], sums[i])
