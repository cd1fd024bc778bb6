"""Launch parameters: small tables, pure functions of shape and dtype. Nothing is tuned at run time.

The entries are reasoned (see ``benchmarks/NOTES.md``) until a device's results under ``benchmarks/results/`` back them.
"""

from typing import NamedTuple

TARGET_PROGRAMS = 528
"""Four programs for each multiprocessor of the largest supported GPU (132)."""


class MixLaunch(NamedTuple):
    """``mix_kernel``: tile sizes and warps."""

    block_b: int
    block_k: int
    block_m: int
    k_padded: int
    num_warps: int


class MixtureGradsLaunch(NamedTuple):
    """``mixture_grads_kernel``: parts of the batch, tile sizes, warps."""

    splits: int
    block_b: int
    block_k: int
    block_m: int
    num_warps: int


class AttentionLaunch(NamedTuple):
    """One kernel of ``prompt_attention``: tile sizes over queries and keys, warps, loads in flight."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class WindowLaunch(NamedTuple):
    """``window_attention``: queries at a time, tiles of keys (first, size), windows of one program, warps, loads in flight."""

    block_q: int
    tiles: tuple[tuple[int, int], ...]
    windows: int
    num_warps: int
    num_stages: int


class RouterGradsLaunch(NamedTuple):
    """``router_grads_kernel``: parts of the batch, Gram rows a step, warps."""

    splits: int
    block_i: int
    k_padded: int
    num_warps: int


def _power_of_2_in(n: int, low: int, high: int) -> int:
    """The power of two at or above n, held between low and high."""
    return max(low, min(high, 1 << max(n - 1, 0).bit_length()))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def mix_launch(batch: int, experts: int, width: int, itemsize: int, *, gram: bool, layer: bool = False) -> MixLaunch:
    """Tile sizes of the forward kernel; a whole layer has the same for every batch, and spills with more rows.

    block_b stays below 64 for every batch: the same matrix instruction, so a sample's bits don't depend on its neighbours.
    float32 products (the Gram form's always are) run on FMA units and hold operands in registers: smaller tiles, or they spill.
    Twice the warps on twice the rows leave each thread the same experts, so sums over experts keep their order.
    """
    block_k = _power_of_2_in(experts, 16, 64 if itemsize == 2 and not gram else 32)
    block_m = _power_of_2_in(width, 16, 128 if itemsize == 2 else 64)
    block_b = 16 if batch <= 256 or layer else 32
    num_warps = 8 if itemsize > 2 and not gram and block_b * block_k == 1024 else 4
    return MixLaunch(block_b, block_k, block_m, _round_up(experts, block_k), num_warps)


FEATURE_BLOCK = 64
"""Columns of a layer's own feature that go into its router's query at a time."""
GRADS_BLOCK = 32
"""Columns of that feature's gradient, and of the weight's that it meets, at a time."""
SAMPLE_BLOCK = 16
"""Samples whose gradients by their experts, and of their logits, one program makes: the same in any batch, as their bits."""
SUM_BLOCK = 64
"""Rows of gradients that are added at a time where all samples share a prompt, or all prompts a shift."""
MAX_OWN, MAX_ROUTED = 16, 512
"""Numbers of a layer's own query, and experts, up to which kernels make the products of its router."""


def mixture_grads_launch(batch: int, experts: int, rows: int, width: int, itemsize: int) -> MixtureGradsLaunch:
    """Tile sizes, the same for every batch; sums over a large batch are made in parts, so that programs fill the GPU."""
    block_k = _power_of_2_in(experts, 16, 64 if itemsize == 2 else 16)
    block_m = _power_of_2_in(width, 16, 64 if itemsize == 2 else 32)
    tiles = rows * -(-width // block_m) * -(-experts // block_k)
    splits = max(1, min(-(-TARGET_PROGRAMS // tiles), batch // 128))
    return MixtureGradsLaunch(splits, 32 if itemsize == 2 else 16, block_k, block_m, 4)


def router_grads_launch(batch: int, experts: int) -> RouterGradsLaunch:
    """The whole row of experts in one tile, since their softmax goes backward; sums over a batch in parts of 64 samples."""
    k_padded = _power_of_2_in(experts, 16, 1024)
    return RouterGradsLaunch(max(1, min(batch // 64, 64)), 16, k_padded, _power_of_2_in(k_padded // 32, 4, 16))


# by padded head dim: 16-bit, then 32-bit. float32 products run on FMA units and hold their operands in registers: small tiles
_ATTENTION = {
    64: (AttentionLaunch(128, 64, 4, 3), AttentionLaunch(32, 32, 8, 1)),
    128: (AttentionLaunch(128, 64, 8, 2), AttentionLaunch(16, 16, 4, 1)),
    256: (AttentionLaunch(64, 32, 8, 2), AttentionLaunch(16, 16, 4, 1)),
}
_QUERY_GRADS = {
    64: (AttentionLaunch(64, 64, 4, 2), AttentionLaunch(16, 32, 4, 1)),
    128: (AttentionLaunch(64, 64, 8, 2), AttentionLaunch(16, 16, 8, 1)),
    256: (AttentionLaunch(32, 32, 4, 1), AttentionLaunch(16, 16, 8, 1)),
}
# two accumulators: fewer queries at a time leave registers for a third program on a multiprocessor
_KEY_GRADS = {
    64: (AttentionLaunch(32, 64, 4, 2), AttentionLaunch(16, 32, 8, 1)),
    128: (AttentionLaunch(32, 64, 8, 2), AttentionLaunch(16, 16, 8, 1)),
    256: (AttentionLaunch(32, 32, 4, 1), AttentionLaunch(16, 16, 8, 1)),
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two at or above it that matrix products take."""
    return _power_of_2_in(head_dim, 16, 256)


def _tiles(table: dict[int, tuple[AttentionLaunch, ...]], head_dim: int, itemsize: int) -> AttentionLaunch:
    """The table's entry, whatever the lengths, since other tiles are other kernels to compile; the batch would change bits."""
    return table[max(64, padded_head_dim(head_dim))][itemsize > 2]


def attention_launch(queries: int, head_dim: int, itemsize: int) -> AttentionLaunch:
    """Tiles of the forward kernel."""
    launch = _tiles(_ATTENTION, head_dim, itemsize)
    # a few more than a multiple of 128 queries: tiles of 64 leave fewer rows empty; of wider heads they spill
    if launch.block_q == 128 and launch.num_warps == 4 and queries <= 512 and -(-queries // 64) % 2:
        return launch._replace(block_q=64)
    return launch


def query_grads_launch(head_dim: int, itemsize: int) -> AttentionLaunch:
    """Tiles of the gradients of queries and of the bias."""
    return _tiles(_QUERY_GRADS, head_dim, itemsize)


def key_grads_launch(head_dim: int, itemsize: int) -> AttentionLaunch:
    """Tiles of the gradients of keys and values, of tokens and prefixes."""
    return _tiles(_KEY_GRADS, head_dim, itemsize)


def prefix_block(length: int) -> int:
    """Keys of a prefix in one tile; 0 where there is no prefix."""
    return _power_of_2_in(length, 16, 32) if length else 0


def prefix_splits(queries: int) -> int:
    """Parts of the queries that a prefix's gradient is summed over side by side."""
    return max(1, min(16, queries // 256))


MAX_WINDOW_KEYS = 384
MAX_KEY_BYTES = {2: 24576, 4: 32768, 8: 65536}
"""By itemsize: keys of a window and its prompts, times padded head dim and itemsize, whose programs fit into 99 KiB."""


def key_tiles(keys: int) -> tuple[tuple[int, int], ...]:
    """First key and size of tiles that hold this many with less than 16 to spare: powers of two, falling."""
    rest = _round_up(keys, 16)
    sizes = [1 << bit for bit in reversed(range(rest.bit_length())) if rest & (1 << bit)]
    return tuple((sum(sizes[:i]), size) for i, size in enumerate(sizes))


def fits_window_attention(keys: int, head_dim: int, itemsize: int) -> bool:
    """Whether the kernels can hold all keys of a window at once, on any supported GPU."""
    keys = _round_up(keys, 16)
    return keys <= MAX_WINDOW_KEYS and keys * padded_head_dim(head_dim) * itemsize <= MAX_KEY_BYTES.get(itemsize, 0)


def window_launch(area: int, keys: int, windows: int, head_dim: int, itemsize: int) -> WindowLaunch:
    """Of windows with ``area`` tokens that see ``keys`` keys, ``windows`` of them in an image.

    The batch has no say in the number of windows a program sums a prompt's gradient over: a sample keeps its bits in any batch.
    """
    tiles = key_tiles(keys)
    wide = _round_up(keys, 16) * padded_head_dim(head_dim) >= 4096 or itemsize > 2
    # few queries at a time where their products with all keys would not fit the registers
    block_q = _power_of_2_in(area, 16, 16 if wide else 64)
    return WindowLaunch(block_q, tiles, 8 if windows >= 32 else 4, 8 if itemsize > 2 else 4, 1 if wide else 2)


def forward_windows(windows: int, units: int) -> int:
    """Windows of one forward program, at most ``windows``: few enough that the ``units`` of all images and heads fill the GPU."""
    return max(1, min(windows, units // TARGET_PROGRAMS))


def window_splits(units: int, programs: int) -> int:
    """Parts of the windows of all images that a bias' gradient is summed over side by side."""
    return max(1, min(units, TARGET_PROGRAMS // programs))
