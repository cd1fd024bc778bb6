"""The Triton kernels of prompt_attention and receptive_field_attention, on a GPU or in Triton's interpreter."""

import functools
import math

import pytest
import torch
from harness import (
    CPU,
    assert_all_close,
    assert_mixed_dtypes_are_right,
    assert_same_bits,
    changed,
    expanded,
    guarded,
    in_double,
    interpreted,
    mixed_dtypes,
    record_launches,
    sentinels,
    shuffle_programs,
    spread,
    through_a_cuda_graph,
    transposed,
)
from numerics import assert_as_good_as_eager
from tiers import slow_but
from torch import Tensor

from mope_fast import ReceptiveField
from mope_fast.functional import prompt_attention, receptive_field_attention

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["attention_kernel", "query_grads_kernel", "key_grads_kernel", "bias_grads_kernel"]

# an empty group, a group that sees nothing (vp) and one that nobody sees (blind); 18 positions
LENGTHS = {"lp": 2, "text": 5, "empty": 0, "image": 7, "blind": 2, "vp": 2}
INTERVALS = ReceptiveField(
    LENGTHS,
    {
        "lp": ["lp", "text"],
        "text": ["lp", "text", "empty", "image"],
        "empty": ["vp"],
        "image": ["text", "image"],
        "blind": ["vp"],
        "vp": [],
    },
)
GAPS = ReceptiveField(
    LENGTHS,
    {
        "lp": ["lp", "image"],
        "text": ["lp", "text", "vp"],
        "empty": ["vp"],
        "image": ["text", "vp"],
        "blind": ["lp", "vp"],
        "vp": [],
    },
)
FIELDS = {"intervals": INTERVALS, "gaps": GAPS}


def make_padding(batch, tokens, device):
    """Ragged, with a hole in the middle of the first sample; nothing but padding in the last of several."""
    lengths = torch.tensor([max(tokens - 3 * b, 1) for b in range(batch)])
    mask = torch.arange(tokens) < lengths[:, None]
    mask[:1, tokens // 3 : tokens // 2] = False
    if batch > 1:
        mask[-1] = False
    return mask.to(device)


def make_inputs(
    dtype,
    device,
    *,
    batch=2,
    heads=2,
    queries=18,
    keys=18,
    head_dim=8,
    prefixes=(),
    padding=False,
    bias=None,
    key_heads=None,
    masked_prefixes=False,
    seed=0,
) -> dict[str, Tensor | None]:
    """Random leaves, rounded to dtype: q, k, v, pk0 to pv1, bias; and masks. ``prefixes``: (batch, length) pairs.

    Logits have a standard deviation of 1/2. Sharper ones make the largest error of every online softmax (torch's, too) a matter of
    luck beside eager's: p comes back from a rounded logarithm, and <g, out> cancels with an output that was rounded.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device).requires_grad_()

    inputs = {"q": normal(batch, heads, queries, head_dim, scale=0.5)}
    key_heads = heads if key_heads is None else key_heads
    inputs |= {name: normal(batch, key_heads, keys, head_dim) for name in ("k", "v")}
    for i in range(2):
        for side in ("pk", "pv"):
            shape = None if i >= len(prefixes) else (prefixes[i][0], key_heads, prefixes[i][1], head_dim)
            inputs[f"{side}{i}"] = None if shape is None else normal(*shape)
    inputs["bias"] = None if bias is None else normal(*bias, queries, keys, scale=0.5)
    inputs["padding"] = make_padding(batch, keys, device) if padding else None
    for i, (_, length) in enumerate(prefixes if masked_prefixes else ()):
        # of another sample each a key is there, of the last of several none
        inputs[f"mask{i}"] = (torch.arange(length) + torch.arange(batch)[:, None]) % 3 > 0
        inputs[f"mask{i}"][1:][-1:] = False
        inputs[f"mask{i}"] = inputs[f"mask{i}"].to(device)
    return inputs


def attend(inputs, impl, *, field=None, is_causal=False, window=None, scale=None) -> Tensor:
    q, k, v = (inputs[name] for name in ("q", "k", "v"))
    masking = {"key_padding_mask": inputs["padding"], "bias": inputs["bias"], "scale": scale, "impl": impl}
    if field is not None:
        return receptive_field_attention(q, k, v, field, **masking)
    members = [[inputs.get(f"{name}{i}") for name in ("pk", "pv", "mask")] for i in range(2)]
    prefixes = [tuple(t for t in prefix if t is not None) for prefix in members if prefix[0] is not None]
    return prompt_attention(q, k, v, prefixes, is_causal=is_causal, window=window, **masking)


def leaves(inputs) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.items() if t is not None and t.is_floating_point()}


def run(inputs, upstream, impl="triton", **settings) -> dict[str, Tensor]:
    """The output, and the gradient of each differentiable input by its name."""
    out = attend(inputs, impl, **settings)
    names = leaves(inputs)
    return {"out": out, **dict(zip(names, torch.autograd.grad(out, names.values(), upstream), strict=True))}


def random_upstream(inputs) -> Tensor:
    return torch.randn(inputs["q"].shape, device=inputs["q"].device).to(inputs["q"].dtype)


def one_head(sizes):
    """A cheaper form of the same problem."""
    return {**sizes, "heads": 1, "key_heads": 1, "bias": (sizes["bias"][0], 1)}


def many_rows(sizes, settings):
    """The same problem for a comparison of largest errors, which needs many rows: in a few, luck decides.

    Every row sees several keys: with one or two, eager's errors cancel to nothing.
    """
    if "field" in settings:
        field = settings["field"]
        lengths = {group: 5 * length for group, length in zip(field.groups, field.lengths, strict=True)}
        settings = {**settings, "field": ReceptiveField(lengths, dict(zip(field.groups, field.visible, strict=True)))}
    keys = 110 if {"is_causal", "window"} & set(settings) else 90
    if "window" in settings:
        settings = {**settings, "window": tuple(None if limit is None else 9 * limit for limit in settings["window"])}
    return {**sizes, "queries": 90, "keys": keys, "head_dim": 32}, settings


def check_against_truth(inputs, dtype, **settings):
    upstream = random_upstream(inputs)
    got = run(inputs, upstream, **settings)
    eager = run(inputs, upstream, "reference", **settings)
    truth = run(in_double(inputs), upstream.double(), "reference", **settings)
    for name, value in got.items():
        assert_as_good_as_eager(name, value, eager[name], truth[name], dtype)


def check_equals_truth(inputs, **settings):
    upstream = random_upstream(inputs)
    truth = run(in_double(inputs), upstream.double(), "reference", **settings)
    assert_all_close(run(inputs, upstream, **settings), {name: t.float() for name, t in truth.items()})


def set_tiles(monkeypatch, block_q, block_k):
    """Tiles that make many of them on sizes which the interpreter can carry."""
    from mope_fast.kernels import launch

    for name in ("attention_launch", "query_grads_launch", "key_grads_launch"):
        monkeypatch.setattr(launch, name, lambda *args: launch.AttentionLaunch(block_q, block_k, 4, 1))


@pytest.fixture
def small_tiles(monkeypatch):
    set_tiles(monkeypatch, 16, 16)


def recorded(monkeypatch) -> list[tuple[str, dict]]:
    """Launches to come, each with its arguments."""
    from mope_fast.kernels import prompt_attention as kernels

    return record_launches(monkeypatch, kernels, KERNELS)


PROBLEMS = {
    "none": ({}, {}),
    "a shared prefix": ({"prefixes": [(1, 6)]}, {}),
    "a prefix for each sample": ({"prefixes": [(2, 6)]}, {}),
    "both prefixes": ({"prefixes": [(2, 17), (1, 1)]}, {}),
    "causal": ({}, {"is_causal": True}),
    "padding": ({"padding": True}, {}),
    "bias": ({"bias": (1, 1)}, {}),
    "bias for each head": ({"bias": (1, 2)}, {}),
    "bias for each sample": ({"bias": (2, 1)}, {}),
    "bias for each sample and head": ({"bias": (2, 2)}, {}),
    "prefixes, padding, bias, causal, scale": (
        {"prefixes": [(1, 6), (2, 7)], "padding": True, "bias": (1, 2)},
        {"is_causal": True, "scale": 0.5},
    ),
    "a window": ({}, {"window": (3, 2)}),
    "a window behind": ({"prefixes": [(1, 6)]}, {"window": (None, 2)}),
    "shared keys, a causal window, masked prefixes, bias, negative scale": (
        {"heads": 4, "key_heads": 2, "prefixes": [(1, 6), (2, 7)], "masked_prefixes": True, "bias": (2, 1)},
        {"is_causal": True, "window": (5, 2), "scale": -0.5},
    ),
    "shared keys, padding, masked prefixes": (
        {"heads": 2, "key_heads": 1, "prefixes": [(2, 17)], "padding": True, "masked_prefixes": True},
        {"window": (4, 3)},
    ),
    "shared keys, gaps": ({"heads": 2, "key_heads": 1}, {"field": GAPS}),
    "intervals": ({}, {"field": INTERVALS}),
    "gaps": ({}, {"field": GAPS}),
    "intervals, padding": ({"padding": True}, {"field": INTERVALS}),
    "gaps, padding, bias": ({"padding": True, "bias": (1, 1)}, {"field": GAPS}),
    "intervals, padding, bias, scale": ({"padding": True, "bias": (2, 2)}, {"field": INTERVALS, "scale": 0.5}),
}
EVERYTHING = {
    name: PROBLEMS[name]
    for name in (
        "prefixes, padding, bias, causal, scale",
        "intervals, padding, bias, scale",
        "gaps, padding, bias",
        "shared keys, a causal window, masked prefixes, bias, negative scale",
    )
}
IN_OTHERS = ("a prefix for each sample", "bias for each head", "bias for each sample and head", "intervals", "gaps")
"""What another problem has too."""
everything = pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        pytest.param(*problem, id=name, marks=pytest.mark.slow if name.startswith("intervals") else ())
        for name, problem in EVERYTHING.items()
    ],
)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [pytest.param(*problem, id=name, marks=pytest.mark.slow if name in IN_OTHERS else ()) for name, problem in PROBLEMS.items()],
)
def test_float32_output_and_gradients_are_as_good_as_eager(sizes, settings, device, monkeypatch):
    set_tiles(monkeypatch, 64, 64)
    sizes, settings = many_rows(sizes, settings)
    check_against_truth(make_inputs(torch.float32, device, **sizes), torch.float32, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["both prefixes", "bias for each sample", *EVERYTHING])
def test_16_bit_output_and_gradients_are_as_good_as_eager(name, dtype, device):
    sizes, settings = many_rows(*PROBLEMS[name])
    check_against_truth(make_inputs(dtype, device, **sizes), dtype, **settings)


@everything
def test_the_float32_tiles_of_the_launch_tables_equal_the_reference(sizes, settings, device):
    check_equals_truth(make_inputs(torch.float32, device, **sizes), **settings)


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize(
    "settings",
    [{"is_causal": True}, {"window": (9, 4)}, {"window": (0, 38)}, {"field": GAPS}, {"field": INTERVALS}],
    ids=["causal", "window", "window ahead", "gaps", "intervals"],
)
def test_any_tiles_equal_the_reference(block_q, block_k, settings, device, monkeypatch):
    set_tiles(monkeypatch, block_q, block_k)
    sizes = {"batch": 1, **({} if "field" in settings else {"queries": 33, "keys": 40})}
    check_equals_truth(make_inputs(torch.float32, device, **sizes), **settings)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(d, torch.float32) for d in (1, 8, 16, 34, 64, 80, 128, 256)]
    + [(34, torch.bfloat16), (64, torch.bfloat16), (80, torch.float16)],
    ids=str,
)
def test_any_head_dim_is_as_good_as_eager(head_dim, dtype, device):
    inputs = make_inputs(dtype, device, batch=1, queries=19, keys=21, head_dim=head_dim, prefixes=[(1, 3), (1, 2)])
    check_against_truth(inputs, dtype)


@pytest.mark.parametrize(("prefixes", "is_causal"), [([(1, 2)], False), ([], True)], ids=["prefix", "causal"])
@pytest.mark.parametrize(("queries", "keys"), slow_but([(1, 37), (33, 17)], [(1, 37), (37, 1), (5, 40), (40, 5), (33, 17)]))
def test_other_numbers_of_queries_than_keys_equal_the_reference(queries, keys, prefixes, is_causal, device, small_tiles):
    inputs = make_inputs(torch.float32, device, batch=1, queries=queries, keys=keys, prefixes=prefixes, bias=(1, 1))
    check_equals_truth(inputs, is_causal=is_causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefixes_longer_than_a_tile_are_as_good_as_eager(dtype, device, small_tiles):
    inputs = make_inputs(dtype, device, heads=1, queries=17, keys=5, head_dim=32, prefixes=[(1, 41), (2, 70)])
    check_against_truth(inputs, dtype)


@pytest.mark.parametrize(
    ("batch", "queries", "dtype"), [(1, 20, torch.float32), (2, 70, torch.float32), (2, 20, torch.bfloat16)], ids=str
)
def test_queries_are_split_and_added_in_float32(batch, queries, dtype, device, small_tiles, monkeypatch):
    """The split path of the prefixes' gradients, on sizes that the interpreter can carry; of 20 queries a part is empty."""
    from mope_fast.kernels import launch

    monkeypatch.setattr(launch, "prefix_splits", lambda queries: 3)
    launches = recorded(monkeypatch)
    inputs = make_inputs(dtype, device, batch=batch, queries=queries, keys=5, head_dim=32, prefixes=[(1, 35), (batch, 3)])
    check_against_truth(inputs, dtype)
    arguments = dict(launches)["key_grads_kernel"]
    assert (arguments["splits"], arguments["parts0"], arguments["parts1"]) == (3, 6, 3)
    assert arguments["grads0_ptr"].dtype == arguments["grads1_ptr"].dtype == torch.float32
    assert arguments["grads0_ptr"].shape == (2, batch, 3, 2, 35, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_prefixes_and_bias_meet_16_bit_tokens_and_get_float32_gradients(dtype, device):
    inputs = make_inputs(dtype, device, prefixes=[(1, 6), (2, 7)], bias=(1, 2))
    upstream = random_upstream(inputs)
    constant = ("q", "k", "v", "padding")
    wide = changed(inputs, lambda name, t: t if name in constant else t.float())
    got, expected = run(wide, upstream), run(inputs, upstream)
    assert got["out"].dtype == dtype
    assert torch.equal(got["out"], expected["out"])
    for name in leaves(inputs):
        if name in constant:
            assert torch.equal(got[name], expected[name])
        else:
            assert got[name].dtype == torch.float32
            # one rounding apart; the interpreter cuts bfloat16 off
            torch.testing.assert_close(got[name], expected[name].float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
            assert not torch.equal(got[name], expected[name].float())


def test_large_logits_choose_one_key(device, small_tiles):
    inputs = make_inputs(torch.float32, device, queries=40, keys=40, head_dim=40, prefixes=[(1, 3)])
    with torch.no_grad():
        inputs["q"].copy_(1e4 * torch.eye(40))
        inputs["k"].copy_(torch.eye(40).roll(7, 0))
        inputs["pk0"].fill_(-1.0)
    upstream = random_upstream(inputs)
    got = run(inputs, upstream)
    assert torch.equal(got["out"], inputs["v"].roll(-7, 2))
    assert torch.equal(got["v"], upstream.roll(7, 2))
    assert torch.count_nonzero(got["pk0"]) == torch.count_nonzero(got["pv0"]) == 0


GRADCHECKS = {
    "prefixes, padding": ({"prefixes": [(1, 2), (2, 1)], "padding": True}, {}),
    "prefixes, bias, causal": ({"prefixes": [(1, 2), (2, 1)], "bias": (2, 1)}, {"is_causal": True}),
    "intervals": (
        {"queries": 4, "keys": 4},
        {"field": ReceptiveField({"a": 2, "b": 1, "c": 1}, {"a": ["a", "b"], "b": ["b"], "c": []})},
    ),
    "gaps, padding, bias": (
        {"queries": 4, "keys": 4, "padding": True, "bias": (1, 1)},
        {"field": ReceptiveField({"a": 2, "b": 1, "c": 1}, {"a": ["a", "c"], "b": ["b"], "c": ["a", "c"]})},
    ),
}


@interpreted
@pytest.mark.parametrize(("sizes", "settings"), GRADCHECKS.values(), ids=GRADCHECKS)
def test_gradcheck_in_float64_goes_through_the_kernels(sizes, settings):
    sizes = {"batch": 2, "heads": 1, "queries": 3, "keys": 4, "head_dim": 2, **sizes}
    inputs = make_inputs(torch.float64, CPU, **sizes)
    names = leaves(inputs)

    def function(*values):
        return attend({**inputs, **dict(zip(names, values, strict=True))}, "triton", **settings)

    assert torch.autograd.gradcheck(function, tuple(names.values()), fast_mode=True)


@interpreted
@everything
def test_float64_equals_the_reference(sizes, settings, small_tiles):
    inputs = in_double(make_inputs(torch.float32, CPU, **one_head(sizes)))
    upstream = random_upstream(inputs)
    got, expected = (run(inputs, upstream, impl, **settings) for impl in ("triton", "reference"))
    assert_all_close(got, expected, rtol=1e-11, atol=1e-12)


@everything
def test_views_inside_nan_give_the_same_bits(sizes, settings, device):
    inputs = make_inputs(torch.float32, device, **sizes)
    upstream = random_upstream(inputs)
    views = changed(inputs, lambda name, t: guarded(t))
    assert_same_bits(run(views, guarded(upstream), **settings), run(inputs, upstream, **settings))


def packed(inputs):
    """q, k and v as slices of one projection's output (B, S, heads of all, Dh)."""
    parts = [inputs[name].detach().transpose(1, 2) for name in ("q", "k", "v")]
    slices = torch.cat(parts, dim=2).split([part.shape[2] for part in parts], dim=2)
    return {**inputs, **{name: rows.transpose(1, 2).requires_grad_() for name, rows in zip(("q", "k", "v"), slices, strict=True)}}


@everything
def test_other_strides_give_the_same_bits(sizes, settings, device):
    inputs = make_inputs(torch.float32, device, **sizes)
    upstream = random_upstream(inputs)
    expected = run(inputs, upstream, **settings)
    assert_same_bits(run(packed(inputs), upstream, **settings), expected)
    turned = changed(inputs, lambda name, t: transposed(t))
    assert_same_bits(run(turned, transposed(upstream), **settings), expected)


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded_tensors_give_the_same_bits(dim, device):
    inputs = make_inputs(torch.float32, device, queries=5, keys=5, prefixes=[(2, 5), (2, 6)], bias=(2, 2), padding=True)
    upstream = expanded(random_upstream(inputs), dim)
    views = changed(inputs, lambda name, t: expanded(t, dim))
    repeated = changed(views, lambda name, t: t.contiguous())
    assert views["q"].stride(dim) == 0
    assert_same_bits(run(views, upstream), run(repeated, upstream.contiguous()))


@everything
def test_outputs_are_written_and_nothing_around_them_is(sizes, settings, device, monkeypatch, small_tiles):
    inputs = make_inputs(torch.float32, device, **sizes)
    upstream = random_upstream(inputs)
    with sentinels(monkeypatch) as storages:
        run(inputs, upstream, **settings)
    # out, statistics, delta, and a gradient of each input; those of a prefix's keys and values are one
    written = 3 + len(leaves(inputs)) - len(sizes.get("prefixes", ()))
    assert len(storages) >= written


@pytest.mark.parametrize(
    "needs",
    [
        ("q",),
        ("k",),
        ("v",),
        ("pk0",),
        ("pv1",),
        ("bias",),
        ("pk0", "pv0", "pk1", "pv1"),
        ("q", "pv0"),
        ("k", "pk1", "bias"),
        ("q", "k", "v", "pk0", "pv0", "pk1", "pv1", "bias"),
    ],
    ids=" ".join,
)
def test_only_asked_for_gradients_are_computed(needs, device, monkeypatch):
    inputs = make_inputs(torch.float32, device, heads=1, queries=5, prefixes=[(1, 3), (2, 2)], bias=(1, 1), padding=True)
    upstream = random_upstream(inputs)
    full = run(inputs, upstream)
    launches = recorded(monkeypatch)
    for name, tensor in leaves(inputs).items():
        tensor.requires_grad_(name in needs)
    attend(inputs, "triton").backward(upstream)
    for name, tensor in leaves(inputs).items():
        assert (tensor.grad is not None) == (name in needs)
        if name in needs:
            torch.testing.assert_close(tensor.grad, full[name])
    tokens, prefix0, prefix1 = (any(n in needs for n in names) for names in (("k", "v"), ("pk0", "pv0"), ("pk1", "pv1")))
    any_keys = tokens or prefix0 or prefix1
    assert [name for name, _ in launches] == KERNELS[:2] + KERNELS[2:3] * any_keys + KERNELS[3:] * ("bias" in needs)
    arguments = dict(launches)
    assert (arguments["query_grads_kernel"]["grad_q_ptr"] is not None) == ("q" in needs)
    if any_keys:
        keys = arguments["key_grads_kernel"]
        written = [keys[name] is not None for name in ("grad_k_ptr", "grad_v_ptr", "grads0_ptr", "grads1_ptr")]
        assert written == [tokens, tokens, prefix0, prefix1]
        # 2 samples of one tile each
        assert keys["grid"] == (2 * (tokens + prefix0 + prefix1),)


@pytest.mark.parametrize(
    ("sizes", "settings", "constants"),
    [
        ({}, {}, ("FULL", False, False, 0, 0)),
        ({"prefixes": [(1, 6), (2, 17)]}, {"is_causal": True}, ("CAUSAL", False, False, 16, 32)),
        ({}, {"is_causal": True, "window": (3, 3)}, ("WINDOW", False, False, 0, 0)),
        ({"prefixes": [(1, 70)], "padding": True}, {}, ("FULL", True, False, 32, 0)),
        ({"prefixes": [(1, 0), (2, 3)]}, {}, ("FULL", False, False, 0, 16)),
        ({"bias": (1, 1)}, {"field": INTERVALS}, ("INTERVALS", False, True, 0, 0)),
        ({"padding": True}, {"field": GAPS}, ("GROUPS", True, False, 0, 0)),
    ],
)
def test_what_is_absent_is_compiled_away(sizes, settings, constants, device, monkeypatch):
    from mope_fast.kernels import prompt_attention as kernels

    launches = recorded(monkeypatch)
    inputs = make_inputs(torch.float32, device, heads=1, **sizes)
    run(inputs, random_upstream(inputs), **settings)
    visibility, has_padding, has_bias, block_p0, block_p1 = constants
    assert [name for name, _ in launches][:3] == KERNELS[:3]
    for name, arguments in launches:
        assert arguments["VISIBILITY"] == getattr(kernels, visibility).value
        assert (arguments["padding_ptr"] is not None) == has_padding
        if name != "bias_grads_kernel":
            assert (arguments["bias_ptr"] is not None) == has_bias
            assert (arguments["pk0_ptr"] is not None, arguments["pk1_ptr"] is not None) == (block_p0 > 0, block_p1 > 0)
        if name == "key_grads_kernel":
            assert (arguments["BLOCK_P0"], arguments["BLOCK_P1"]) == (block_p0, block_p1)


BLIND = {
    "a window beyond the keys": ({"keys": 5, "bias": (1, 1)}, {"window": (1, 2)}),
    "padding": ({"padding": True, "bias": (2, 1)}, {}),
    "causal with fewer keys": ({"keys": 5, "bias": (1, 1)}, {"is_causal": True}),
    "intervals": ({}, {"field": INTERVALS}),
    "gaps": ({"padding": True}, {"field": GAPS}),
    "a prefix without keys": ({"prefixes": [(1, 0)], "padding": True}, {}),
}


@pytest.mark.parametrize(("sizes", "settings"), BLIND.values(), ids=BLIND)
def test_a_query_without_a_key_gives_zeros_and_zero_gradients(sizes, settings, device, small_tiles):
    inputs = make_inputs(torch.float32, device, heads=1, **sizes)
    queries, keys = inputs["q"].shape[2], inputs["k"].shape[2]
    visible = torch.ones(2, queries, keys, dtype=torch.bool, device=device)
    if settings.get("is_causal"):
        visible = visible.tril(keys - queries)
    if "window" in settings:
        left, right = settings["window"]
        visible = visible.tril(keys - queries + right).triu(keys - queries - left)
    if "field" in settings:
        visible = visible & settings["field"].mask(device)
    if inputs["padding"] is not None:
        visible = visible & inputs["padding"][:, None, :]
    blind, unseen = ~visible.any(2), ~visible.any(1)
    assert blind.any()
    assert not blind.all()
    got = run(inputs, random_upstream(inputs), **settings)
    assert all(value.isfinite().all() for value in got.values())
    for name, nothing in (("out", blind), ("q", blind), ("k", unseen), ("v", unseen)):
        rows = got[name].transpose(1, 2)
        assert torch.count_nonzero(rows[nothing]) == 0, name
        # of queries and keys with one counterpart the gradient is 0, too
        assert name in ("q", "k") or (rows[~nothing] != 0).all(), name
    if inputs["bias"] is not None:
        seen = visible if inputs["bias"].shape[0] == 2 else visible.any(0, keepdim=True)
        assert torch.count_nonzero(got["bias"][:, 0][~seen]) == 0
        assert torch.count_nonzero(got["bias"][:, 0][seen]) > 0


def test_statistics_are_in_base_2_and_infinite_without_a_key(device, small_tiles):
    from mope_fast.ops.prompt_attention import prompt_attention_forward

    inputs = make_inputs(torch.float32, device, prefixes=[(1, 0)], padding=True, bias=(1, 2))
    arguments = [None if t is None else t.detach() for t in (inputs[n] for n in ("q", "k", "v", "pk0", "pv0", "pk1", "pv1"))]
    bias = inputs["bias"].detach()
    _, statistics = prompt_attention_forward(*arguments, None, inputs["padding"], bias, 0.5, None, None)
    weights = (0.5 * arguments[0].double() @ arguments[1].double().mT + bias).masked_fill(
        ~inputs["padding"][:, None, None, :], float("-inf")
    )
    torch.testing.assert_close(statistics[0].sum(-1), weights[0].exp().sum(-1).log2().float())
    torch.testing.assert_close(statistics[0, ..., 0], (weights[0].amax(-1) * math.log2(math.e)).float())
    assert (statistics[1, ..., 1] == float("inf")).all()


@pytest.mark.parametrize("value", [-1e9, -1e38, torch.finfo(torch.float32).min])
def test_a_row_with_the_same_large_bias_everywhere_keeps_its_output_and_gradients(value, device, small_tiles):
    """As masks that encoders add leave it for a padded query: next to such numbers the logits vanish, so keys count the same."""
    inputs = make_inputs(torch.float32, device, batch=1, bias=(1, 1))
    with torch.no_grad():
        inputs["bias"][:, :, 3] = value
    upstream = random_upstream(inputs)
    got, eager = run(inputs, upstream), run(inputs, upstream, "reference")
    torch.testing.assert_close(got["out"][0, :, 3], inputs["v"][0].mean(1))
    assert_all_close(got, eager)


def test_a_bias_of_minus_infinity_hides_a_key(device, small_tiles):
    inputs = make_inputs(torch.float32, device, prefixes=[(1, 0)], bias=(1, 1))
    hidden = torch.rand(18, 18, device=device) < 0.4
    hidden[4] = True
    with torch.no_grad():
        inputs["bias"].masked_fill_(hidden, float("-inf"))
    upstream = random_upstream(inputs)
    got, expected = (run(inputs, upstream, impl) for impl in ("triton", "reference"))
    assert torch.count_nonzero(got["out"][:, :, 4]) == 0
    assert torch.count_nonzero(got["bias"][0, 0][hidden]) == 0
    assert_all_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_garbage_in_padded_keys_and_values_changes_no_bit(dtype, device, small_tiles):
    check_garbage({}, {}, dtype, torch.finfo(dtype).max, device)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("garbage", [pytest.param(1e30, marks=pytest.mark.slow), torch.finfo(torch.float32).max])
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [({}, {}), ({"prefixes": [(1, 6), (2, 7)]}, {"is_causal": True}), ({"bias": (2, 1)}, {}), ({"bias": (1, 1)}, {"field": GAPS})],
    ids=["plain", "prefixes, causal", "bias", "gaps"],
)
def test_garbage_in_padded_keys_and_values_changes_no_bit(sizes, settings, garbage, device, small_tiles):
    check_garbage(sizes, settings, torch.float32, garbage, device)


def check_garbage(sizes, settings, dtype, garbage, device):
    inputs = make_inputs(dtype, device, heads=1, padding=True, **sizes)
    upstream = random_upstream(inputs)
    padded = ~inputs["padding"]

    def spoil(name, t):
        if name in ("k", "v"):
            return t.masked_fill(padded[:, None, :, None], garbage)
        return t.masked_fill(padded[:, None, None, :], garbage) if name == "bias" and t.shape[0] == 2 else t

    clean = run(inputs, upstream, **settings)
    assert_same_bits(run(changed(inputs, spoil), upstream, **settings), clean)
    for name in ("k", "v"):
        assert torch.count_nonzero(clean[name].transpose(1, 2)[padded]) == 0


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("name", ["q", "k", "v", "pk1", "bias", "upstream"])
def test_nan_stays_in_its_sample(name, device, small_tiles):
    inputs = make_inputs(torch.float32, device, batch=3, heads=1, queries=4, keys=5, prefixes=[(1, 3), (3, 2)], bias=(3, 1))
    upstream = random_upstream(inputs)
    clean = run(inputs, upstream)
    poisoned = upstream if name == "upstream" else inputs[name]
    with torch.no_grad():
        poisoned[1, :, 0, 0] = float("nan")
    got = run(inputs, upstream)
    for output, value in got.items():
        if output not in ("pk0", "pv0"):  # shared: sums over the samples
            assert torch.equal(value[[0, 2]], clean[output][[0, 2]]), output
    # a query's own NaN stays with that query, a key's or a value's reaches every query that sees it
    spoilt = {"q": got["out"][1, :, 0], "k": got["out"][1], "pk1": got["out"][1], "v": got["out"][1, :, :, 0]}
    spoilt |= {"bias": got["out"][1, :, 0], "upstream": got["q"][1, :, 0]}
    assert spoilt[name].isnan().all()
    if name in ("q", "bias"):
        assert torch.equal(got["out"][1, :, 1:], clean["out"][1, :, 1:])


@pytest.mark.usefixtures("rowwise_products")
@everything
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(sizes, settings, device):
    inputs = make_inputs(torch.float32, device, **sizes)
    upstream = random_upstream(inputs)
    together = run(inputs, upstream, **settings)
    for b in range(2):
        one = changed(inputs, lambda name, t, b=b: t[b : b + 1] if t.shape[0] == 2 else t)
        for name, value in run(one, upstream[b : b + 1], **settings).items():
            if name == "out" or inputs[name].shape[0] == 2:
                assert torch.equal(value[0], together[name][b]), name


@everything
def test_three_runs_have_the_same_bits(sizes, settings, device):
    inputs = make_inputs(torch.bfloat16, device, **one_head(sizes))
    upstream = random_upstream(inputs)
    first, *others = [run(inputs, upstream, **settings) for _ in range(3)]
    for other in others:
        assert_same_bits(other, first)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefixes, padding, bias, causal, scale", "gaps, padding, bias"])
def test_programs_may_run_in_any_order_and_twice(name, monkeypatch, small_tiles):
    sizes, settings = PROBLEMS[name]
    inputs = make_inputs(torch.float32, CPU, **one_head(sizes))
    upstream = random_upstream(inputs)
    plain = run(inputs, upstream, **settings)
    orders = shuffle_programs(monkeypatch)
    got = run(inputs, upstream, **settings)
    assert max(map(len, orders)) >= 8, "the grid was shuffled"
    assert_same_bits(got, plain)


@pytest.mark.parametrize("field", [None, "intervals", "gaps"])
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(field, device):
    prefixes = [(1, 3), (0, 2)] if field is None else []
    inputs = make_inputs(torch.float32, device, batch=0, prefixes=prefixes, bias=(1, 2), padding=True)
    got = run(inputs, random_upstream(inputs), **({} if field is None else {"field": FIELDS[field]}))
    assert got["out"].shape == (0, 2, 18, 8)
    for name, value in leaves(inputs).items():
        assert got[name].shape == value.shape
        assert torch.count_nonzero(got[name]) == 0


def test_no_queries_give_an_empty_output_and_zero_gradients(device):
    inputs = make_inputs(torch.float32, device, queries=0, prefixes=[(1, 3), (2, 2)], padding=True)
    got = run(inputs, random_upstream(inputs))
    assert got["out"].shape == (2, 2, 0, 8)
    for name in ("k", "v", "pk0", "pv0", "pk1", "pv1"):
        assert got[name].shape == inputs[name].shape
        assert torch.count_nonzero(got[name]) == 0


@pytest.mark.parametrize("prefix_batch", [1, 2])
def test_a_prefix_without_keys_changes_no_bit_and_has_an_empty_gradient(prefix_batch, device):
    plain = make_inputs(torch.float32, device, heads=1, prefixes=[(1, 4)])
    upstream = random_upstream(plain)
    expected = run(plain, upstream)
    empty = [torch.zeros(prefix_batch, 1, 0, 8, device=device, requires_grad=True) for _ in range(2)]
    got = run({**plain, "pk1": empty[0], "pv1": empty[1]}, upstream)
    assert got.pop("pk1").shape == got.pop("pv1").shape == (prefix_batch, 1, 0, 8)
    assert_same_bits(got, expected)
    first = run({**plain, "pk0": empty[0], "pv0": empty[1], "pk1": plain["pk0"], "pv1": plain["pv0"]}, upstream)
    assert torch.equal(first["out"], expected["out"])
    assert torch.equal(first["pk1"], expected["pk0"])


@pytest.mark.parametrize(("is_causal", "masked"), [(False, False), (True, True)])
def test_without_tokens_the_prefixes_are_attended_to(is_causal, masked, device):
    inputs = make_inputs(torch.float32, device, keys=0, prefixes=[(1, 5), (2, 35)], padding=masked, bias=(1, 2) if masked else None)
    check_against_truth(inputs, torch.float32, is_causal=is_causal)


def test_without_any_key_everything_is_zero(device):
    inputs = make_inputs(torch.float32, device, keys=0, prefixes=[(1, 0)])
    got = run(inputs, random_upstream(inputs))
    assert got["out"].shape == got["q"].shape == inputs["q"].shape
    assert torch.count_nonzero(got["out"]) == torch.count_nonzero(got["q"]) == 0


def op(inputs, upstream, field: Tensor) -> dict[str, Tensor]:
    from mope_fast.ops.prompt_attention import prompt_attention as op

    names = leaves(inputs)
    out = op(
        *(inputs[name] for name in ("q", "k", "v")), (), field=field, window=(None, None), key_padding_mask=inputs["padding"],
        bias=inputs["bias"], scale=None,
    )  # fmt: skip
    return {"out": out, **dict(zip(names, torch.autograd.grad(out, names.values(), upstream), strict=True))}


@pytest.mark.parametrize(("dtype", "padding", "bias"), [(torch.bfloat16, False, None), (torch.float32, True, (1, 1))], ids=str)
def test_intervals_and_bit_rows_have_the_same_bits(dtype, padding, bias, device, small_tiles, monkeypatch):
    inputs = make_inputs(dtype, device, padding=padding, bias=bias)
    upstream = random_upstream(inputs)
    lowered = INTERVALS.lowered(device)
    assert lowered.shape == (4, 18)
    groups, bits = [], []
    for index, (group, length) in enumerate(LENGTHS.items()):
        seen = INTERVALS.visible[INTERVALS.groups.index(group)]
        groups += [index] * length
        bits += [sum(1 << INTERVALS.groups.index(other) for other in seen)] * length
    rows = torch.tensor([groups, bits], dtype=torch.int32, device=device)
    launches = recorded(monkeypatch)
    as_intervals = op(inputs, upstream, lowered)
    as_bits = op(inputs, upstream, torch.cat([lowered, rows]))
    assert len({arguments["VISIBILITY"] for _, arguments in launches}) == 2
    assert_same_bits(as_bits, as_intervals)


def test_bits_alone_decide_inside_a_hull(device, small_tiles):
    """The last of 32 groups is the sign bit."""
    names = [f"g{i}" for i in range(32)]
    visible = {name: [names[(7 * i) % 32], names[31]] for i, name in enumerate(names)}
    visible["g31"] = ["g0", "g31"]
    field = ReceptiveField(dict.fromkeys(names, 1), visible)
    assert not field.is_interval
    check_against_truth(make_inputs(torch.float32, device, batch=1, queries=32, keys=32), torch.float32, field=field)


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_its_mask(name, device, small_tiles):
    field = FIELDS[name]
    inputs = make_inputs(torch.float32, device)
    upstream = random_upstream(inputs)
    double = in_double(inputs)
    mask = torch.zeros(18, 18, dtype=torch.bool)
    start = {group: sum(field.lengths[:i]) for i, group in enumerate(field.groups)}
    for group, seen in zip(field.groups, field.visible, strict=True):
        for other in seen:
            mask[start[group] : start[group] + LENGTHS[group], start[other] : start[other] + LENGTHS[other]] = True
    weights = (double["q"] @ double["k"].mT * 8**-0.5).masked_fill(~mask.to(device), float("-inf"))
    # rows without a key are 0 / 0
    expected = torch.softmax(weights, -1).nan_to_num() @ double["v"]
    got = run(inputs, upstream, field=field)
    torch.testing.assert_close(got["out"].double(), expected, rtol=1e-5, atol=1e-5)
    seeing = mask.any(1)
    (truth,) = torch.autograd.grad(
        torch.softmax(weights[:, :, seeing], -1) @ double["v"], double["v"], upstream.double()[:, :, seeing]
    )
    torch.testing.assert_close(got["v"].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"field": ReceptiveField({"a": 16, "b": 16, "c": 16}, {"a": ["a"], "b": ["b"], "c": ["a", "b"]})},
        {"window": (None, 0)},
        {"window": (7, 0)},
    ],
    ids=["intervals", "causal", "window"],
)
def test_keys_that_no_query_of_a_tile_sees_are_skipped(settings, device, monkeypatch):
    """Garbage that would turn products into NaN is never read."""
    set_tiles(monkeypatch, 16, 16)
    inputs = make_inputs(torch.float32, device, batch=1, queries=48, keys=48)
    clean = attend(inputs, "triton", **settings)
    with torch.no_grad():
        for name in ("k", "v"):
            inputs[name][:, :, 32:] = float("nan")
    rows = slice(None) if "field" in settings else slice(0, 32)
    assert torch.equal(attend(inputs, "triton", **settings)[:, :, rows], clean[:, :, rows])


@pytest.mark.parametrize(("padded", "dtype"), [(40, torch.float32), (64, torch.bfloat16)], ids=str)
def test_zeros_behind_the_head_dim_change_no_bit(padded, dtype, device):
    inputs = make_inputs(dtype, device, head_dim=34, prefixes=[(1, 6), (2, 7)], padding=True, bias=(1, 2))
    upstream = random_upstream(inputs)
    plain = run(inputs, upstream)

    def pad(name, t):
        return t if name in ("padding", "bias") else torch.nn.functional.pad(t, (0, padded - 34))

    got = run(changed(inputs, pad), pad("", upstream), scale=34**-0.5)
    for name, value in got.items():
        if name != "bias":
            assert torch.count_nonzero(value[..., 34:]) == 0, name
            value = value[..., :34]
        assert torch.equal(value, plain[name]), name


@interpreted
@mixed_dtypes
@pytest.mark.parametrize("batch", [1, 2])
def test_bfloat16_and_float64_meet(batch, own, other):
    inputs = make_inputs(other, CPU, batch=2, heads=1, prefixes=[(batch, 3)], bias=(batch, 1))
    inputs = changed(inputs, lambda name, t: t.to(own) if name in ("q", "k", "v") else t)
    upstream = random_upstream(inputs)
    assert_mixed_dtypes_are_right(inputs, lambda inputs, impl: run(inputs, upstream.to(inputs["q"].dtype), impl))


@pytest.mark.parametrize(
    ("name", "axis"),
    slow_but(
        [("q", 0), ("k", 1), ("v", 2), ("prefixes", 3), ("bias", 0), ("upstream", 1), ("padding", 1)],
        [(name, axis) for name in ("q", "k", "v", "prefixes", "bias", "upstream") for axis in range(4)]
        + [("padding", 0), ("padding", 1)],
    ),
)
def test_addresses_past_2_31_elements(name, axis, device):
    inputs, expected = compact_run(axis, device)
    chosen = ["pk0", "pv0", "pk1", "pv1"] if name == "prefixes" else [name]
    views = {**inputs, **dict(zip(chosen, spread([inputs[each] for each in chosen], axis), strict=True))}
    upstream = views.pop("upstream")
    assert_same_bits(run(views, upstream), expected)


@functools.cache
def compact_run(axis, device):
    """A problem with 3 along the axis, its upstream gradient among the inputs, and its results."""
    batch, heads = (3 if axis == i else 1 for i in range(2))
    sizes = {"batch": batch, "heads": heads, "queries": 3, "keys": 3, "head_dim": 3}
    inputs = make_inputs(torch.float16, device, **sizes, prefixes=[(batch, 3)] * 2, bias=(batch, heads))
    # the far end must matter
    inputs["padding"] = torch.tensor([[True, False, True], [False, True, True], [True, True, False]], device=device)[:batch]
    upstream = random_upstream(inputs)
    return {**inputs, "upstream": upstream}, run(inputs, upstream)


def test_the_output_is_laid_out_for_the_next_projection(device):
    inputs = make_inputs(torch.float32, device, prefixes=[(1, 3)])
    out = attend(inputs, "triton")
    assert out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("field", [None, GAPS], ids=["prompts", "gaps"])
def test_autocast_casts_tokens_and_returns_gradients_in_their_dtype(field, device):
    inputs = make_inputs(torch.float32, device, prefixes=[(1, 3), (2, 2)] if field is None else (), bias=(1, 1))
    rounded = changed(inputs, lambda name, t: t.bfloat16() if name in ("q", "k", "v") else t)
    upstream = random_upstream(rounded)
    expected = run(rounded, upstream, field=field)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(inputs, upstream, field=field)
    assert got["out"].dtype == torch.bfloat16
    assert torch.equal(got["out"], expected["out"])
    for name, value in leaves(inputs).items():
        assert got[name].dtype == value.dtype == torch.float32
        assert torch.equal(got[name], expected[name].float())


@interpreted
def test_auto_takes_sdpa_on_a_cpu(monkeypatch):
    launches = recorded(monkeypatch)
    inputs = make_inputs(torch.float32, CPU, batch=1)
    assert torch.equal(attend(inputs, "auto"), attend(inputs, "sdpa"))
    assert not launches


@pytest.mark.gpu
@pytest.mark.parametrize(("keys", "expected"), [(500, ["attention_kernel"]), (501, [])])
def test_auto_takes_the_kernels_up_to_512_keys(keys, expected, device, monkeypatch):
    launches = recorded(monkeypatch)
    attend(make_inputs(torch.bfloat16, device, batch=1, keys=keys, prefixes=[(1, 5), (1, 7)]), "auto")
    assert [name for name, _ in launches] == expected
    launches.clear()
    field = ReceptiveField({"a": keys + 12}, {"a": ["a"]})
    attend(make_inputs(torch.bfloat16, device, batch=1, queries=keys + 12, keys=keys + 12), "auto", field=field)
    assert [name for name, _ in launches] == expected


@pytest.mark.gpu
@everything
def test_captured_in_a_cuda_graph(sizes, settings, device):
    inputs = make_inputs(torch.bfloat16, device, **sizes)
    upstream = random_upstream(inputs)
    expected = run(inputs, upstream, **settings)
    assert_same_bits(through_a_cuda_graph(lambda: run(inputs, upstream, **settings)), expected)


VLMO = {"lp": 10, "text": 40, "image": 197, "vp": 10}
FULL_SIZES = {
    "ViT-B with prefixes": ({"heads": 12, "queries": 197, "keys": 197, "head_dim": 64, "prefixes": [(1, 6), (8, 7)]}, {}),
    "ViT-B with prefixes, padded": (
        {"heads": 12, "queries": 197, "keys": 197, "head_dim": 64, "prefixes": [(8, 6), (1, 7)], "padding": True, "bias": (1, 12)},
        {},
    ),
    "decoder": ({"heads": 12, "queries": 320, "keys": 320, "head_dim": 64, "prefixes": [(1, 6), (8, 7)]}, {"is_causal": True}),
    "many queries": ({"heads": 2, "queries": 1030, "keys": 70, "head_dim": 64, "prefixes": [(1, 6), (8, 40)]}, {}),
    "VLMo, intervals": (
        {"heads": 16, "queries": 257, "keys": 257, "head_dim": 34, "padding": True},
        {
            "field": ReceptiveField(
                VLMO, {"lp": ["lp", "text"], "text": ["lp", "text", "image"], "image": ["text", "image"], "vp": ["image", "vp"]}
            )
        },
    ),
    "VLMo, gaps": (
        {"heads": 16, "queries": 257, "keys": 257, "head_dim": 34, "padding": True, "bias": (1, 16)},
        {
            "field": ReceptiveField(
                VLMO, {"lp": ["lp", "image"], "text": ["lp", "image"], "image": ["text", "vp"], "vp": ["text", "vp"]}
            )
        },
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "settings"), FULL_SIZES.values(), ids=FULL_SIZES)
def test_full_sizes_are_as_good_as_eager(sizes, settings, dtype, device):
    check_against_truth(make_inputs(dtype, device, batch=8, **sizes), dtype, **settings)
