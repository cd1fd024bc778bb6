"""window_prompt_attention on the CPU, against timm's own block."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from timm_windows import shifted_windows, swin_transformer
from torch import Tensor, nn

from mope_fast import _dispatch, _implementations
from mope_fast.functional import window_prompt_attention
from mope_fast.reference import window_attention

BATCH, HEADS, HEAD_DIM = 3, 2, 6
IMPLS = ("cpu", "sdpa", "reference")
impls = pytest.mark.parametrize("impl", IMPLS)
# float64 on both sides: only the order of sums differs
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_prefix(batch, length, masks=None, *, heads=HEADS, head_dim=HEAD_DIM):
    """Keys and values, and a mask of ``masks`` rows if it is given: the first with a hole, the last (of several) all hidden."""
    pair = (randn(batch, heads, length, head_dim), randn(batch, heads, length, head_dim))
    if masks is None:
        return pair
    there = torch.arange(length).expand(masks, -1) != 1
    there[-1] = masks == 1
    return (*pair, there)


def make_inputs(image=(7, 5), window=(4, 3), shift=(2, 1), prefixes=(), *, batch=BATCH, heads=HEADS, head_dim=HEAD_DIM, pad=True):
    """Arguments of the function; ``prefixes`` has those of ``make_prefix``."""
    area = math.prod(window)
    return {
        "qkv": randn(batch, *image, 3, heads, head_dim),
        "prefixes": [make_prefix(*prefix, heads=heads, head_dim=head_dim) for prefix in prefixes],
        "relative_position_bias": randn(heads, area, area),
        "pad_qkv": randn(3, heads, head_dim) if pad else None,
        "window_size": window,
        "shift_size": shift,
    }


def leaves(inputs) -> list[Tensor]:
    prefixes = [t for prefix in inputs["prefixes"] for t in prefix[:2]]
    return [t for t in (inputs["qkv"], *prefixes, inputs["relative_position_bias"], inputs["pad_qkv"]) if t is not None]


def changed(inputs, function):
    """Every tensor but the masks through ``function``, as leaves again."""

    def new(t):
        return None if t is None else function(t.detach()).detach().requires_grad_()

    prefixes = [(new(pk), new(pv), *there) for pk, pv, *there in inputs["prefixes"]]
    return {**inputs, "prefixes": prefixes, **{name: new(inputs[name]) for name in ("qkv", "relative_position_bias", "pad_qkv")}}


class Plus(nn.Module):
    """A projection whose weight is 1."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias

    def forward(self, x):
        return x + self.bias


class Widened(nn.Module):
    """An output projection that keeps what it gets, in as many columns as timm's partition has in front."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        return F.pad(x, (0, self.width - x.shape[-1]))


def timm_block(inputs, scale=None):
    """timm's block, its projection and bias such that its attention takes ``qkv`` minus what padding has."""
    _, *image, _, heads, head_dim = inputs["qkv"].shape
    block = swin_transformer.SwinTransformerBlock(
        3 * heads * head_dim, image, heads, head_dim, inputs["window_size"], inputs["shift_size"], True, dtype=torch.float64
    )
    assert (block.window_size, block.shift_size) == (inputs["window_size"], inputs["shift_size"])
    padding = torch.zeros(3, heads, head_dim) if inputs["pad_qkv"] is None else inputs["pad_qkv"]
    block.attn.qkv, block.attn.proj = Plus(padding.flatten()), Widened(block.dim)
    block.attn.fused_attn, block.attn.scale = False, head_dim**-0.5 if scale is None else scale
    block.attn._get_rel_pos_bias = lambda: inputs["relative_position_bias"][None]
    return block


def by_timm(inputs, scale=None) -> Tensor:
    """Without prompts timm's own method; with them its windows, image by image, concatenated with the prompts that are there."""
    block, width = timm_block(inputs, scale), inputs["qkv"][0, 0, 0, 0].numel()
    x = inputs["qkv"].flatten(3) - block.attn.qkv.bias
    if not inputs["prefixes"]:
        return block._attn(x)[..., :width]
    rows = []
    for i in range(len(x)):
        prompts = torch.cat([seen_prompts(prefix, i) for prefix in inputs["prefixes"]]) - block.attn.qkv.bias
        rows.append(shifted_windows(block, x[i : i + 1], prompts[None])[..., :width])
    return torch.cat(rows)


def seen_prompts(prefix, i) -> Tensor:
    """(P, 3 * H * Dh) of image i, with queries that are cut later."""
    pk, pv, *there = (t[i % len(t)] for t in prefix)
    rows = torch.stack([torch.zeros_like(pk), pk, pv]).permute(2, 0, 1, 3).flatten(1)
    return rows[there[0]] if there else rows


def gradients(out, inputs, upstream):
    return torch.autograd.grad(out, leaves(inputs), upstream, materialize_grads=True)


def check_against_timm(inputs, impl, scale=None):
    got, expected = window_prompt_attention(**inputs, scale=scale, impl=impl), by_timm(inputs, scale)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    upstream = torch.randn_like(expected)
    for ours, truth in zip(*(gradients(out, inputs, upstream) for out in (got, expected)), strict=True):
        torch.testing.assert_close(ours, truth, **TOLERANCE)


GEOMETRIES = {
    "windows that fit": ((6, 8), (3, 4), (0, 0)),
    "shifted": ((6, 8), (3, 4), (1, 2)),
    "shifted up only": ((6, 8), (3, 4), (2, 0)),
    "shifted left only": ((6, 8), (3, 4), (0, 3)),
    "a row of windows": ((3, 12), (3, 4), (2, 1)),
    "padding": ((7, 5), (4, 3), (0, 0)),
    "padding, shifted": ((7, 5), (4, 3), (3, 1)),
    "padding below, shifted left": ((7, 6), (4, 3), (0, 2)),
    "padding on the right, shifted up": ((8, 7), (2, 5), (1, 0)),
    "a window of the image's size": ((4, 5), (4, 5), (0, 0)),
    "a window of the image's size, shifted": ((4, 5), (4, 5), (2, 1)),
    "a larger window": ((3, 2), (5, 4), (0, 0)),
    "a larger window, shifted by more than the image": ((3, 2), (5, 4), (4, 3)),
    "one token, shifted": ((1, 1), (2, 2), (1, 1)),
    "windows of one token": ((3, 2), (1, 1), (0, 0)),
}
PREFIXES = {
    "none": [],
    "shared": [(1, 3)],
    "for each image": [(BATCH, 2)],
    "shared, for each image": [(1, 3), (BATCH, 2)],
    "for each image, shared": [(BATCH, 1), (1, 4)],
    "masked": [(BATCH, 4, BATCH)],
    "shared, masked": [(1, 2), (BATCH, 4, BATCH)],
    "a shared mask, a mask of a shared prefix": [(BATCH, 3, 1), (1, 4, BATCH)],
    "without keys": [(1, 0), (BATCH, 2)],
}
geometries = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
every_prefix = pytest.mark.parametrize("prefixes", PREFIXES.values(), ids=PREFIXES)
PADDED = {name: geometry for name, geometry in GEOMETRIES.items() if any(n % w for n, w in zip(*geometry[:2], strict=True))}


PAIRS = {
    f"{prefixes}-{geometry}": (PREFIXES[prefixes], GEOMETRIES[geometry])
    for prefixes in PREFIXES
    for geometry in GEOMETRIES
    if prefixes in ("none", "shared, masked") or geometry in ("shifted", "padding, shifted", "one token, shifted")
}
"""Each geometry without prompts and with a masked prefix, each prefix in windows that fit, that don't, and of one token."""


@impls
@pytest.mark.parametrize(("prefixes", "geometry"), PAIRS.values(), ids=PAIRS)
def test_output_and_gradients_are_those_of_timms_block(prefixes, geometry, impl):
    check_against_timm(make_inputs(*geometry, prefixes), impl)


@impls
@pytest.mark.parametrize("geometry", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("prefixes", [[], [(1, 3), (BATCH, 2)]], ids=["no prefixes", "prefixes"])
def test_padding_is_zeros_without_a_bias_of_the_projection(prefixes, geometry, impl):
    check_against_timm(make_inputs(*geometry, prefixes, pad=False), impl)


@impls
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (3, 5), (2, 32), (1, 34)])
def test_any_head_dim_is_that_of_timm(heads, head_dim, impl):
    check_against_timm(make_inputs(prefixes=[(1, 2), (BATCH, 3)], heads=heads, head_dim=head_dim), impl)


@impls
@pytest.mark.parametrize("scale", [0.7, 0.0, -0.5])
def test_scale_replaces_the_default(scale, impl):
    check_against_timm(make_inputs(prefixes=[(1, 2), (BATCH, 3)]), impl, scale)


@impls
@pytest.mark.parametrize("always_partition", [False, True])
@pytest.mark.parametrize("image", [(4, 4), (8, 8), (7, 9), (3, 10)], ids=str)
def test_a_whole_block_of_timm_with_its_own_projections_is_reproduced(image, always_partition, impl):
    block = swin_transformer.SwinTransformerBlock(12, image, HEADS, None, 4, 2, always_partition, dtype=torch.float64)
    attention = block.attn
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = randn(BATCH, *image, 12)
    got = window_prompt_attention(
        attention.qkv(x).unflatten(-1, (3, HEADS, -1)), (), attention._get_rel_pos_bias()[0], window_size=block.window_size,
        shift_size=block.shift_size, pad_qkv=attention.qkv.bias.view(3, HEADS, -1), impl=impl,
    )  # fmt: skip
    got, expected = attention.proj(got), block._attn(x)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    upstream, inputs = torch.randn_like(expected), [x, *attention.parameters()]
    for ours, truth in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (got, expected)), strict=True):
        torch.testing.assert_close(ours, truth, **TOLERANCE)


@impls
def test_integers_stand_for_both_axes(impl):
    inputs = make_inputs((5, 6), (3, 3), (1, 1), [(1, 2)])
    expected = window_prompt_attention(**inputs, impl=impl)
    for window, shift in ((3, 1), ([3, 3], (1, 1)), (3, [1, 1])):
        got = window_prompt_attention(**{**inputs, "window_size": window, "shift_size": shift}, impl=impl)
        assert torch.equal(got, expected)


@impls
@pytest.mark.parametrize("geometry", [(4, 3), (5, 3)], ids=["4 by 3", "5 by 3"])
def test_a_masked_prefix_is_as_if_its_hidden_rows_were_not_there(geometry, impl):
    inputs = make_inputs((7, 5), geometry, (1, 2), [(1, 2), (BATCH, 4, BATCH)])
    shared, (pk, pv, there) = inputs["prefixes"]
    got = window_prompt_attention(**inputs, impl=impl)
    rows = []
    for i in range(BATCH):
        prefix = (pk[i : i + 1, :, there[i]], pv[i : i + 1, :, there[i]])
        rows.append(window_prompt_attention(**{**inputs, "qkv": inputs["qkv"][i : i + 1], "prefixes": [shared, prefix]}, impl=impl))
    expected, upstream = torch.cat(rows), torch.randn_like(got)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    grads = [gradients(out, inputs, upstream) for out in (got, expected)]
    torch.testing.assert_close(*grads, **TOLERANCE)
    hidden = ~there[:, None, :, None].expand_as(pk)
    assert hidden.any()
    assert all(torch.count_nonzero(grad[hidden]) == 0 for grad in grads[0][3:5])


@impls
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_garbage_in_hidden_rows_of_a_prefix_changes_no_bit(value, impl):
    inputs = make_inputs(prefixes=[(BATCH, 4, BATCH)])
    pk, pv, there = inputs["prefixes"][0]
    clean = window_prompt_attention(**inputs, impl=impl)
    garbage = [t.detach().masked_fill(~there[:, None, :, None], value) for t in (pk, pv)]
    assert torch.equal(window_prompt_attention(**{**inputs, "prefixes": [(*garbage, there)]}, impl=impl), clean)


@impls
def test_nothing_comes_from_padding_that_does_not_exist(impl):
    inputs = make_inputs((8, 6), (4, 3), (2, 1), [(1, 2)])
    got = window_prompt_attention(**inputs, impl=impl)
    assert torch.equal(got, window_prompt_attention(**{**inputs, "pad_qkv": None}, impl=impl))
    (grad,) = torch.autograd.grad(got, inputs["pad_qkv"], torch.randn_like(got), materialize_grads=True)
    assert torch.count_nonzero(grad) == 0


@impls
@pytest.mark.parametrize("prefixes", [[], [(1, 2), (BATCH, 3, BATCH)]], ids=["no prefixes", "prefixes"])
def test_any_strides_give_the_same(prefixes, impl):
    inputs = make_inputs(prefixes=prefixes)
    upstream = torch.randn(BATCH, 7, 5, HEADS * HEAD_DIM, dtype=torch.float64)

    def transposed(t):
        order = tuple(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)

    def sliced(t):
        view = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))[..., 1::2]
        return view.copy_(t)

    def expanded(t):
        return t[:1].expand_as(t)

    for view in (transposed, sliced, expanded):
        same = changed(inputs, lambda t, view=view: view(t).contiguous())
        viewed = changed(same, view)
        assert not viewed["qkv"].is_contiguous()
        got, expected = window_prompt_attention(**viewed, impl=impl), window_prompt_attention(**same, impl=impl)
        torch.testing.assert_close(got, expected, **TOLERANCE)
        grads = gradients(got, viewed, transposed(upstream)), gradients(expected, same, upstream)
        torch.testing.assert_close(*grads, **TOLERANCE)


@impls
def test_heads_that_overlap_in_memory_count_as_their_copies(impl):
    # one window, as many keys as a mask takes: the only case in which torch's attention gets a view of qkv
    inputs = make_inputs((4, 4), (4, 4), (0, 0))
    inputs["relative_position_bias"] = inputs["relative_position_bias"].detach()
    sizes, dense = inputs["qkv"].shape, inputs["qkv"].stride()
    qkv = inputs["qkv"].detach().as_strided(sizes, (*dense[:4], 1, 1)).requires_grad_()
    upstream = torch.randn(BATCH, 4, 4, HEADS * HEAD_DIM, dtype=torch.float64)
    results = []
    for given in (qkv, qkv.detach().contiguous().requires_grad_()):
        out = window_prompt_attention(**{**inputs, "qkv": given}, impl=impl)
        results.append([out, *torch.autograd.grad(out, given, upstream)])
    torch.testing.assert_close(*results, **TOLERANCE)


@impls
@pytest.mark.parametrize("prefixes", [[], [(1, 2), (0, 3)], [(0, 3, 1), (1, 2, 1)]], ids=["no prefixes", "prefixes", "masked"])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(prefixes, impl):
    inputs = make_inputs(prefixes=prefixes, batch=0)
    got = window_prompt_attention(**inputs, impl=impl)
    assert got.shape == (0, 7, 5, HEADS * HEAD_DIM)
    for leaf, grad in zip(leaves(inputs), gradients(got, inputs, torch.randn_like(got)), strict=True):
        assert grad.shape == leaf.shape
        assert torch.count_nonzero(grad) == 0


@impls
@pytest.mark.parametrize("asked", range(6))
def test_each_gradient_alone_is_that_of_all_together(asked, impl):
    inputs = make_inputs(prefixes=[(1, 2), (BATCH, 3)])
    got = window_prompt_attention(**inputs, impl=impl)
    upstream = torch.randn_like(got)
    every = gradients(got, inputs, upstream)
    for i, leaf in enumerate(leaves(inputs)):
        leaf.requires_grad_(i == asked)
    window_prompt_attention(**inputs, impl=impl).backward(upstream)
    for i, leaf in enumerate(leaves(inputs)):
        assert (leaf.grad is not None) == (i == asked)
    torch.testing.assert_close(leaves(inputs)[asked].grad, every[asked], **TOLERANCE)


@impls
@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_of_one_image_changes_no_bit_of_another(masked, impl):
    inputs = make_inputs(prefixes=[(1, 2), (BATCH, 4, *([BATCH] if masked else []))])
    shared, (pk, pv, *there) = inputs["prefixes"]
    before = window_prompt_attention(**inputs, impl=impl)
    pk, pv = pk.detach().clone(), pv.detach().clone()
    pk[1] += 1
    pv[1] *= 2
    after = window_prompt_attention(**{**inputs, "prefixes": [shared, (pk, pv, *there)]}, impl=impl)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] != before[1]).all()


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_eight_images_are_eight_times_one(dtype, impl):
    inputs = changed(make_inputs(prefixes=[(1, 2), (8, 3)], batch=8), lambda t: t.to(dtype))
    together = window_prompt_attention(**inputs, impl=impl)
    shared, each = inputs["prefixes"]
    for i in range(8):
        prefixes = [shared, tuple(t[i : i + 1] for t in each)]
        alone = window_prompt_attention(**{**inputs, "qkv": inputs["qkv"][i : i + 1], "prefixes": prefixes}, impl=impl)
        assert torch.equal(alone[0], together[i])


def set_bias(inputs, value, hidden):
    """The same inputs with ``value`` where ``hidden`` (H, W, W)."""
    bias = inputs["relative_position_bias"].detach().masked_fill(hidden, value).requires_grad_()
    return {**inputs, "relative_position_bias": bias}


def some_of(inputs) -> Tensor:
    """Entries of the bias: about a third, never all of a row."""
    hidden = torch.rand(inputs["relative_position_bias"].shape) < 0.3
    return hidden & ~torch.eye(hidden.shape[-1], dtype=torch.bool)


@impls
@every_prefix
def test_a_bias_of_minus_infinity_hides_a_token(prefixes, impl):
    inputs = make_inputs(prefixes=prefixes)
    hidden = some_of(inputs)
    inputs = set_bias(inputs, float("-inf"), hidden)
    check_against_timm(inputs, impl)
    out = window_prompt_attention(**inputs, impl=impl)
    (grad,) = torch.autograd.grad(out, inputs["relative_position_bias"], torch.randn_like(out))
    assert torch.count_nonzero(grad[hidden]) == 0
    assert torch.count_nonzero(grad[~hidden]) > 0


@impls
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_a_very_low_bias_hides_a_token_as_minus_infinity_does(value, dtype, impl):
    inputs = changed(make_inputs(prefixes=[(1, 2), (BATCH, 3)]), lambda t: t.to(dtype))
    inputs["relative_position_bias"] = inputs["relative_position_bias"].detach().float()
    hidden = some_of(inputs)
    low, none = (set_bias(inputs, x, hidden) for x in (value, float("-inf")))
    outs = [window_prompt_attention(**each, impl=impl) for each in (low, none)]
    torch.testing.assert_close(*outs)
    upstream = torch.randn_like(outs[0])
    grads = [gradients(out, each, upstream) for out, each in zip(outs, (low, none), strict=True)]
    torch.testing.assert_close(*grads)


@impls
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [-1e9, -1e38, "lowest"])
def test_where_all_tokens_are_equally_low_all_count_the_same(value, bias_dtype, impl):
    """Next to such numbers logits vanish, without prompts."""
    inputs = changed(make_inputs((4, 3), (4, 3), (0, 0), pad=False), lambda t: t.float())
    inputs["relative_position_bias"] = inputs["relative_position_bias"].detach().to(bias_dtype)
    row = torch.zeros(HEADS, 12, 12, dtype=torch.bool)
    row[:, 4] = True
    inputs = set_bias(inputs, torch.finfo(bias_dtype).min if value == "lowest" else value, row)
    out = window_prompt_attention(**inputs, impl=impl)
    v = inputs["qkv"][:, :, :, 2].flatten(3).flatten(1, 2)
    torch.testing.assert_close(out.flatten(1, 2)[:, 4], v.mean(1), rtol=1e-5, atol=1e-5)


def make_large_products(dtype):
    """Inputs whose products differ by more than 100."""
    inputs = changed(make_inputs(pad=False), lambda t: t.to(dtype))
    with torch.no_grad():
        inputs["qkv"][:, :, :, :2] *= 40
    return inputs


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [(impl, torch.float64) for impl in IMPLS] + [("reference", torch.float32)],  # the others hide in float32, as documented
    ids=str,
)
def test_a_product_that_is_larger_by_more_than_100_sees_over_a_seam(impl, dtype):
    inputs = make_large_products(dtype)
    expected = window_prompt_attention(**changed(inputs, lambda t: t.double()), impl="reference")
    torch.testing.assert_close(window_prompt_attention(**inputs, impl=impl).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["cpu", "sdpa"])
def test_on_a_cpu_in_float32_nothing_is_seen_over_a_seam(impl, monkeypatch):
    inputs = make_large_products(torch.float32)
    out, doubled = window_prompt_attention(**inputs, impl=impl).double(), changed(inputs, lambda t: t.double())
    expected = window_prompt_attention(**doubled, impl="reference")
    assert (out - expected).abs().max() > 0.1, "the reference sees over seams here"
    # with a seam so deep that no product reaches over it, both are the same
    monkeypatch.setattr(window_attention, "SEAM", -1e9)
    torch.testing.assert_close(out, window_prompt_attention(**doubled, impl="reference"), rtol=1e-4, atol=1e-4)


@impls
@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_with_prompts_a_row_of_low_biases_sees_prompts_alone(value, impl):
    inputs = make_inputs((4, 3), (4, 3), (0, 0), [(1, 2), (BATCH, 3)])
    row = torch.zeros(HEADS, 12, 12, dtype=torch.bool)
    row[:, 4] = True
    low, none = (set_bias(inputs, x, row) for x in (value, float("-inf")))
    check_against_timm(none, impl)
    outs = [window_prompt_attention(**each, impl=impl) for each in (low, none)]
    torch.testing.assert_close(*outs)
    upstream = torch.randn_like(outs[0])
    grads = [gradients(out, each, upstream) for out, each in zip(outs, (low, none), strict=True)]
    torch.testing.assert_close(*grads)


@impls
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefixes", [[], [(1, 0)], [(BATCH, 4, BATCH)]], ids=["no prefixes", "no keys", "masked"])
def test_a_token_that_sees_nothing_gives_zeros_and_zero_gradients(prefixes, dtype, impl):
    """Rows of the bias at minus infinity, and no prompts, or none that is there for the last image."""
    inputs = changed(make_inputs((4, 3), (4, 3), (0, 0), prefixes), lambda t: t.to(dtype))
    rows = torch.zeros(HEADS, 12, 12, dtype=torch.bool)
    rows[:, 4:6] = True
    inputs = set_bias(inputs, float("-inf"), rows)
    out = window_prompt_attention(**inputs, impl=impl)
    grads = gradients(out, inputs, torch.randn_like(out))
    assert all(t.isfinite().all() for t in (out, *grads))
    out, grad_q = out.flatten(1, 2), grads[0][:, :, :, 0].flatten(1, 2)
    for blind in (out[-1], grad_q[-1]):
        assert torch.count_nonzero(blind[4:6]) == 0
        assert (blind[:4].flatten(1) != 0).any(1).all()
    bias_at = [leaf is inputs["relative_position_bias"] for leaf in leaves(inputs)].index(True)
    assert torch.count_nonzero(grads[bias_at][rows]) == 0
    if len(prefixes) == 1 and len(prefixes[0]) == 3:
        assert (out[0, 4:6] != 0).all(), "its prompts are there"


@impls
def test_where_nothing_at_all_is_seen_everything_is_zero(impl):
    inputs = set_bias(make_inputs(), float("-inf"), torch.tensor(True))
    out = window_prompt_attention(**inputs, impl=impl)
    assert all(torch.count_nonzero(t) == 0 for t in (out, *gradients(out, inputs, torch.randn_like(out))))


@impls
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_tokens_and_returns_gradients_in_their_dtype(dtype, impl):
    inputs = changed(make_inputs(prefixes=[(1, 2), (BATCH, 3, BATCH)]), lambda t: t.float())
    rounded = {**inputs, "qkv": inputs["qkv"].detach().to(dtype).requires_grad_()}
    expected = window_prompt_attention(**rounded, impl=impl)
    upstream = torch.randn_like(expected)
    with torch.autocast("cpu", dtype):
        got = window_prompt_attention(**inputs, impl=impl)
    assert got.dtype == expected.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=4 * eps, atol=4 * eps)
    grads = gradients(got, inputs, upstream), gradients(expected, rounded, upstream)
    for leaf, ours, truth in zip(leaves(inputs), *grads, strict=True):
        assert ours.dtype == leaf.dtype == torch.float32
        torch.testing.assert_close(ours, truth.float(), rtol=4 * eps, atol=4 * eps * truth.abs().max().item())


@impls
def test_autocast_leaves_float64_alone(impl):
    inputs = make_inputs(prefixes=[(1, 2)])
    with torch.autocast("cpu", torch.bfloat16):
        got = window_prompt_attention(**inputs, impl=impl)
    assert torch.equal(got, window_prompt_attention(**inputs, impl=impl))


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_output_has_the_tokens_dtype_and_every_gradient_that_of_its_input(dtype, impl):
    wide = make_inputs(prefixes=[(1, 2), (BATCH, 3)])
    truth = window_prompt_attention(**wide, impl="reference")
    inputs = {**changed(wide, lambda t: t.float()), "qkv": wide["qkv"].detach().to(dtype).requires_grad_()}
    got = window_prompt_attention(**inputs, impl=impl)
    assert got.dtype == dtype
    # inputs of size 1 are rounded to eps, weights add up to one
    assert (got - truth).abs().max() < 32 * torch.finfo(dtype).eps
    for leaf, grad in zip(leaves(inputs), gradients(got, inputs, torch.randn_like(got)), strict=True):
        assert (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)


def call(**changes):
    """qkv (3, 7, 5, 3, 2, 6), windows of 4 by 3."""
    inputs = changed(make_inputs(prefixes=[(1, 2)]), lambda t: t.float())
    return window_prompt_attention(**{**inputs, **changes})


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def prefix(batch=1, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32, mask=()):
    return (zeros(batch, heads, 2, head_dim, dtype=dtype), zeros(batch, heads, 2, head_dim), *mask)


PAIRS = r"prefixes must be a sequence of \(key, value\) pairs or \(key, value, mask\) triples, \(\) for none"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"qkv": None}, TypeError, "qkv must be a torch.Tensor, got NoneType"),
        ({"qkv": zeros(3, 7, 5, 3, 2, 6, dtype=torch.int)}, TypeError, r"qkv must have a floating-point dtype, got torch.int32"),
        (
            {"qkv": zeros(3, 35, 3, 2, 6)}, ValueError,
            r"qkv must be \(B, Hi, Wi, 3, H, Dh\), got \(3, 35, 3, 2, 6\): unflatten the last dimension of the projection",
        ),
        ({"qkv": zeros(3, 7, 5, 2, 3, 6)}, ValueError, r"qkv must be \(B, Hi, Wi, 3, H, Dh\), got \(3, 7, 5, 2, 3, 6\)"),
        ({"qkv": zeros(3, 0, 5, 3, 2, 6)}, ValueError, r"qkv must have at least one token and one head, got \(3, 0, 5, 3, 2, 6\)"),
        ({"qkv": zeros(3, 7, 0, 3, 2, 6)}, ValueError, r"qkv must have at least one token and one head, got \(3, 7, 0, 3, 2, 6\)"),
        ({"qkv": zeros(3, 7, 5, 3, 0, 6)}, ValueError, r"qkv must have at least one token and one head, got \(3, 7, 5, 3, 0, 6\)"),
        ({"qkv": zeros(3, 7, 5, 3, 2, 0)}, ValueError, "the head dimension Dh must be 1 to 256, got 0"),
        ({"qkv": zeros(3, 7, 5, 3, 2, 257)}, ValueError, "the head dimension Dh must be 1 to 256, got 257"),
        ({"window_size": 4.0}, TypeError, r"window_size must be an integer or a pair \(height, width\), got 4.0"),
        ({"window_size": True}, TypeError, r"window_size must be an integer or a pair \(height, width\), got True"),
        ({"window_size": (4, 3, 2)}, TypeError, r"window_size must be an integer or a pair \(height, width\), got \(4, 3, 2\)"),
        ({"window_size": torch.tensor(4)}, TypeError, r"window_size must be an integer or a pair \(height, width\), got a tensor"),
        ({"window_size": (4, 0), "shift_size": 0}, ValueError, r"window_size must be >= 1, got \(4, 0\)"),
        ({"window_size": -1, "shift_size": 0}, ValueError, r"window_size must be >= 1, got -1"),
        ({"shift_size": None}, TypeError, r"shift_size must be an integer or a pair \(height, width\), got None"),
        ({"shift_size": (1, 0.5)}, TypeError, r"shift_size must be an integer or a pair \(height, width\), got \(1, 0.5\)"),
        ({"shift_size": (4, 1)}, ValueError, r"shift_size must be >= 0 and less than window_size \(4, 3\), got \(4, 1\)"),
        ({"shift_size": 3}, ValueError, r"shift_size must be >= 0 and less than window_size \(4, 3\), got 3"),
        ({"shift_size": (-1, 0)}, ValueError, r"shift_size must be >= 0 and less than window_size \(4, 3\), got \(-1, 0\)"),
        ({"prefixes": None}, TypeError, PAIRS),
        ({"prefixes": prefix()}, TypeError, PAIRS),
        ({"prefixes": [prefix()[:1]]}, TypeError, PAIRS),
        ({"prefixes": [prefix()] * 3}, ValueError, r"must hold at most two \(key, value\) pairs, got 3: concatenate"),
        ({"prefixes": [(None, zeros(1, 2, 2, 6))]}, TypeError, "prefix 0 must be a torch.Tensor, got NoneType"),
        ({"prefixes": [prefix(), prefix(dtype=torch.int)]}, TypeError, "prefix 1 must have a floating-point dtype, got torch.int"),
        ({"prefixes": [prefix(dtype=torch.half)]}, TypeError, "of prefix 0 must have one dtype, got torch.float16 and torch"),
        ({"prefixes": [prefix(2)]}, ValueError, r"prefix 0 must be two tensors \(3 or 1, 2, P, 6\), got \(2, 2, 2, 6\) and"),
        ({"prefixes": [prefix(), prefix(heads=1)]}, ValueError, r"prefix 1 must be two tensors \(3 or 1, 2, P, 6\), got \(1, 1, 2"),
        ({"prefixes": [prefix(head_dim=5)]}, ValueError, r"prefix 0 must be two tensors \(3 or 1, 2, P, 6\), got \(1, 2, 2, 5\)"),
        ({"prefixes": [(zeros(1, 2, 2, 6), zeros(1, 2, 3, 6))]}, ValueError, r"got \(1, 2, 2, 6\) and \(1, 2, 3, 6\)"),
        ({"prefixes": [(zeros(2, 2, 6), zeros(2, 2, 6))]}, ValueError, r"prefix 0 must be two tensors .*, got \(2, 2, 6\)"),
        (
            {"prefixes": [(zeros(1, 2, 2, 6, device="meta"),) * 2]}, ValueError,
            "qkv is on cpu and prefix 0 on meta: move them to one device",
        ),
        ({"prefixes": [prefix(mask=(zeros(1, 2),))]}, TypeError, "the mask of prefix 0 must be a bool tensor, got torch.float32"),
        ({"prefixes": [prefix(mask=([True],))]}, TypeError, "the mask of prefix 0 must be a bool tensor, got list"),
        (
            {"prefixes": [prefix(mask=(zeros(1, 3).bool(),))]}, ValueError,
            r"the mask of prefix 0 must be \(3 or 1, 2\), True = present; got \(1, 3\)",
        ),
        ({"prefixes": [prefix(mask=(zeros(2, 2).bool(),))]}, ValueError, r"the mask of prefix 0 must be \(3 or 1, 2\).*\(2, 2\)"),
        ({"prefixes": [prefix(mask=(zeros(2).bool(),))]}, ValueError, r"the mask of prefix 0 must be \(3 or 1, 2\).*got \(2\)"),
        (
            {"prefixes": [prefix(mask=(zeros(1, 2, device="meta").bool(),))]}, ValueError,
            "qkv is on cpu and the mask of prefix 0 on meta: move them to one device",
        ),
        ({"relative_position_bias": None}, TypeError, "relative_position_bias must be a torch.Tensor, got NoneType"),
        ({"relative_position_bias": zeros(2, 12, 12).bool()}, TypeError, "position_bias must have a floating-point dtype"),
        (
            {"relative_position_bias": zeros(2, 4, 12)}, ValueError,
            r"relative_position_bias must be \(H, W, W\) = \(2, 12, 12\), where W is .*; got \(2, 4, 12\)",
        ),
        ({"relative_position_bias": zeros(1, 12, 12)}, ValueError, r"relative_position_bias must be .*; got \(1, 12, 12\)"),
        ({"relative_position_bias": zeros(1, 2, 12, 12)}, ValueError, r"relative_position_bias must be .*; got \(1, 2, 12, 12\)"),
        ({"relative_position_bias": zeros(2, 12, 12, device="meta")}, ValueError, "cpu and relative_position_bias on meta: move"),
        ({"pad_qkv": [0.0]}, TypeError, "pad_qkv must be a torch.Tensor, got list"),
        ({"pad_qkv": zeros(3, 2, 6).long()}, TypeError, "pad_qkv must have a floating-point dtype, got torch.int64"),
        ({"pad_qkv": zeros(36)}, ValueError, r"pad_qkv must be \(3, 2, 6\), the projection's bias; got \(36\)"),
        ({"pad_qkv": zeros(3, 2, 6, device="meta")}, ValueError, "qkv is on cpu and pad_qkv on meta: move them to one device"),
        ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a Python float, got a tensor: reading"),
        ({"scale": "1"}, TypeError, "scale must be a Python float, got '1'"),
        ({"scale": float("inf")}, ValueError, "scale must be finite in float32, got inf"),
        ({"scale": float("nan")}, ValueError, "scale must be finite in float32, got nan"),
        (
            {"impl": "xformers"}, ValueError,
            r"window_prompt_attention got impl='xformers', expected one of \['auto', 'triton', 'cpu', 'sdpa', 'reference'\]",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_with_what_was_got(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="Triton runs here")
def test_triton_without_a_gpu_says_what_to_do():
    with pytest.raises(
        RuntimeError,
        match=r"window_prompt_attention got impl='triton', which can't run on float32 tensors on cpu: .*(GPU|not installed).*"
        r"Here it can run as \['cpu', 'sdpa', 'reference'\]; impl='auto' chooses 'cpu'",
    ):
        call(impl="triton")


@pytest.fixture
def on_an_able_gpu(monkeypatch):
    """As if Triton could run; nothing is launched."""
    monkeypatch.setattr(_implementations, "_why_not_triton", lambda problem: None)
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "auto")


@pytest.mark.parametrize(
    ("dtype", "keys", "head_dim", "fits"),
    [
        (torch.bfloat16, 384, 32, True),
        (torch.bfloat16, 385, 16, False),
        (torch.bfloat16, 192, 64, True),
        (torch.bfloat16, 193, 33, False),
        (torch.float32, 256, 32, True),
        (torch.float32, 257, 17, False),
    ],
)
def test_more_keys_than_the_kernels_hold_are_left_to_sdpa(dtype, keys, head_dim, fits, on_an_able_gpu):
    problem = _implementations.Problem(torch.device("cuda"), dtype, keys, head_dim=head_dim)
    assert _implementations.choose("window_prompt_attention", "auto", problem) == ("triton" if fits else "sdpa")
    if not fits:
        with pytest.raises(
            RuntimeError,
            match=rf"a window with its prompts has {keys} keys of head dimension {head_dim}, more than the kernel can hold\. Here "
            r"it can run as \['sdpa', 'reference'\]",
        ):
            _implementations.choose("window_prompt_attention", "triton", problem)


def test_prompts_count_as_keys_that_the_kernels_must_hold(on_an_able_gpu):
    long = (zeros(1, HEADS, 1013, HEAD_DIM), zeros(1, HEADS, 1013, HEAD_DIM))
    with pytest.raises(RuntimeError, match="a window with its prompts has 1025 keys of head dimension 6, more than the kernel"):
        call(prefixes=[long], impl="triton")


def test_auto_on_a_cpu_is_its_own_form_or_what_the_environment_names(monkeypatch):
    ran = []
    for name, module in (("sdpa", _dispatch.sdpa_window_attention), ("reference", _dispatch.reference)):
        monkeypatch.setattr(module, "window_prompt_attention", recording(module.window_prompt_attention, name, ran))
    monkeypatch.setattr(_dispatch, "_window_prompt_attention_op", recording(_dispatch._window_prompt_attention_op, "cpu", ran))
    # one that only other functions have stands for no other here
    for chosen, expected in (("auto", "cpu"), ("reference", "reference"), ("sdpa", "sdpa"), ("xformers", "cpu")):
        monkeypatch.setattr(_implementations, "DEFAULT_IMPL", chosen)
        call()
        assert ran.pop() == expected
        assert not ran
    call(impl="reference")
    assert ran.pop() == "reference", "an argument is stronger than the environment"
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "trition")
    with pytest.raises(RuntimeError, match="MOPE_FAST_IMPL='trition', expected one of"):
        call()


def recording(function, name, ran):
    def wrapper(*args, **kwargs):
        ran.append(name)
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.skipif(INTERPRETED, reason="Triton runs here")
def test_an_environment_that_names_triton_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "triton")
    with pytest.raises(RuntimeError, match="window_prompt_attention got impl='triton', which can't run on float32 tensors on cpu"):
        call()
