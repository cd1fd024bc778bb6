"""The Triton kernels of window_prompt_attention, on a GPU or in Triton's interpreter."""

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

from mope_fast import _implementations
from mope_fast.functional import window_prompt_attention

pytestmark = pytest.mark.kernel

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = ["window_attention_kernel", "window_grads_kernel", "window_bias_grads_kernel"]
PARTS = {"qkv": 3, "pad": 0}
"""Where queries, keys and values lie side by side."""


def make_inputs(
    dtype,
    device,
    *,
    image=(5, 4),
    window=(3, 4),
    shift=(2, 2),
    batch=2,
    heads=1,
    head_dim=8,
    prefixes=(),
    pad=True,
    seed=0,
) -> dict:
    """Random leaves, rounded to dtype: qkv, pk0 to pv1, bias, pad; masks there0 and there1; window and shift.

    ``prefixes`` has (batch, length) pairs, or (batch, length, rows of its mask). Logits have a standard deviation of 1/2, as in
    the tests of ``prompt_attention``. Padding shares its side of the seam with tokens: across it there is next to no gradient.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device).requires_grad_()

    inputs: dict = {"qkv": normal(batch, *image, 3, heads, head_dim)}
    with torch.no_grad():
        inputs["qkv"][:, :, :, 0] *= 0.5
    for i in range(2):
        prefix_batch, length, *masks = prefixes[i] if i < len(prefixes) else (0, 0)
        for side in ("pk", "pv"):
            inputs[f"{side}{i}"] = normal(prefix_batch, heads, length, head_dim) if i < len(prefixes) else None
        inputs[f"there{i}"] = make_mask(masks[0], length).to(device) if masks else None
    area = math.prod(window)
    inputs["bias"] = normal(heads, area, area, scale=0.5)
    inputs["pad"] = normal(3, heads, head_dim) if pad else None
    return {**inputs, "window": window, "shift": shift}


def make_mask(rows, length) -> Tensor:
    """A hole in the first row; nothing in the last of several."""
    there = (torch.arange(length) != length // 2).repeat(rows, 1)
    there[-1] &= rows == 1
    return there


def attend(inputs, impl="triton", scale=None) -> Tensor:
    prefixes = []
    for i in range(2):
        if inputs[f"pk{i}"] is not None:
            there = inputs[f"there{i}"]
            prefixes.append((inputs[f"pk{i}"], inputs[f"pv{i}"], *([] if there is None else [there])))
    return window_prompt_attention(
        inputs["qkv"], prefixes, inputs["bias"], window_size=inputs["window"], shift_size=inputs["shift"],
        pad_qkv=inputs["pad"], scale=scale, impl=impl,
    )  # fmt: skip


def leaves(inputs) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.items() if isinstance(t, Tensor) and not name.startswith("there")}


def run(inputs, upstream, impl="triton", **settings) -> dict[str, Tensor]:
    """The output, and the gradient of each differentiable input by its name."""
    out = attend(inputs, impl, **settings)
    names = leaves(inputs)
    grads = torch.autograd.grad(out, names.values(), upstream, materialize_grads=True)
    return {"out": out, **dict(zip(names, grads, strict=True))}


def in_parts(results) -> dict[str, Tensor]:
    """Queries, keys and values apart: their gradients differ in size."""
    parts = {}
    for name, value in results.items():
        dim = PARTS.get(name)
        parts |= {name: value} if dim is None else {f"{part} of {name}": value.select(dim, i) for i, part in enumerate("qkv")}
    return parts


def random_upstream(inputs) -> Tensor:
    qkv = inputs["qkv"]
    batch, height, width, _, heads, head_dim = qkv.shape
    return torch.randn(batch, height, width, heads * head_dim, device=qkv.device).to(qkv.dtype)


def check_against_truth(inputs, dtype, **settings):
    upstream = random_upstream(inputs)
    got, eager = (in_parts(run(inputs, upstream, impl, **settings)) for impl in ("triton", "reference"))
    truth = in_parts(run(in_double(inputs), upstream.double(), "reference", **settings))
    for name, value in got.items():
        assert_as_good_as_eager(name, value, eager[name], truth[name], dtype)


def check_equals_truth(inputs, **settings):
    upstream = random_upstream(inputs)
    truth = run(in_double(inputs), upstream.double(), "reference", **settings)
    assert_all_close(run(inputs, upstream, **settings), {name: t.float() for name, t in truth.items()})


def set_launch(monkeypatch, **changes):
    """Other tiles than the table's: ``block_q``, ``windows`` of a program, or a size of every tile of keys."""
    from mope_fast.kernels import launch

    def other(area, keys, *args):
        size = changes.get("tile")
        tiles = {"tiles": tuple((start, size) for start in range(0, keys, size))} if size else {}
        return original(area, keys, *args)._replace(**{n: v for n, v in changes.items() if n != "tile"}, **tiles)

    original = launch.window_launch
    monkeypatch.setattr(launch, "window_launch", other)


def recorded(monkeypatch) -> list[tuple[str, dict]]:
    """Launches to come, each with its arguments."""
    from mope_fast.kernels import window_attention as kernels

    return record_launches(monkeypatch, kernels, KERNELS)


PROBLEMS = {
    "no prefixes": {},
    "a shared prefix": {"prefixes": [(1, 6)], "shift": (0, 0)},
    "a prefix for each image": {"prefixes": [(2, 6)], "shift": (2, 0)},
    "both prefixes": {"prefixes": [(2, 9), (1, 1)], "shift": (0, 2)},
    "a masked prefix": {"prefixes": [(2, 6, 2)], "pad": False},
    "everything": {"prefixes": [(1, 6, 1), (2, 7, 2)]},
}
EVERYTHING = PROBLEMS["everything"]
problems = pytest.mark.parametrize("sizes", PROBLEMS.values(), ids=PROBLEMS)
MANY_ROWS = {"image": (7, 13), "window": (7, 7), "head_dim": 32}
"""For a comparison of largest errors: in a few rows luck decides."""


@problems
def test_float32_output_and_gradients_are_as_good_as_eager(sizes, device):
    check_against_truth(make_inputs(torch.float32, device, **sizes, **MANY_ROWS), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", ["no prefixes", "both prefixes", "everything"])
def test_16_bit_output_and_gradients_are_as_good_as_eager(name, dtype, device):
    check_against_truth(make_inputs(dtype, device, **PROBLEMS[name], **MANY_ROWS), dtype, scale=0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("side", "prompts", "tiles"),
    slow_but(
        [(7, 13, [64]), (8, 13, [64, 16]), (12, 13, [128, 32])],
        [
            (2, 0, [16]),
            (7, 0, [64]),
            (7, 13, [64]),
            (8, 13, [64, 16]),
            (12, 0, [128, 16]),
            (12, 13, [128, 32]),
        ],
    ),
)
def test_the_tables_launches_of_swins_windows_are_as_good_as_eager(side, prompts, tiles, dtype, device, monkeypatch):
    launches = recorded(monkeypatch)
    shared = prompts // 2
    sizes = {"window": (side, side), "image": (side, side - 1), "shift": ((side - 1) // 2,) * 2, "batch": 1, "head_dim": 32}
    inputs = make_inputs(dtype, device, **sizes, prefixes=[(1, shared), (1, prompts - shared)] if prompts else [])
    check_against_truth(inputs, dtype)
    assert [name for name, _ in launches] == KERNELS
    assert all([size for _, size in arguments["TILES"]] == tiles for _, arguments in launches)
    blocks = [arguments["ROWS"] // arguments["BLOCK_Q"] for _, arguments in launches]
    assert min(blocks) == max(blocks)
    assert (blocks[0] > 1) == (side == 12 or (dtype == torch.float32 and side > 2))


@pytest.mark.parametrize(
    "changes",
    slow_but(
        [({"block_q": 16},), ({"windows": 3, "block_q": 16, "tile": 32},)],
        [
            ({"block_q": 16},),
            ({"block_q": 32, "tile": 16},),
            ({"windows": 1},),
            ({"windows": 3, "block_q": 16, "tile": 32},),
            ({"windows": 100},),
        ],
    ),
    ids=str,
)
def test_any_launch_equals_the_reference(changes, device, monkeypatch):
    """Four windows of 18 tokens: chunks of one window, and of three and one."""
    set_launch(monkeypatch, **changes)
    sizes = {"image": (11, 5), "window": (6, 3), "shift": (2, 1)}
    check_equals_truth(make_inputs(torch.float32, device, **sizes, **EVERYTHING))


@pytest.mark.parametrize("splits", [1, 3, 4])
def test_windows_are_split_and_added_for_the_gradient_of_the_bias(splits, device, monkeypatch):
    """Four windows in one part, in three of which one is empty, in four."""
    from mope_fast.kernels import launch

    monkeypatch.setattr(launch, "window_splits", lambda units, programs: splits)
    launches = recorded(monkeypatch)
    check_equals_truth(make_inputs(torch.float32, device, prefixes=[(2, 3)]))
    arguments = dict(launches)["window_bias_grads_kernel"]
    assert (arguments["units"], len(arguments["grad_bias_ptr"])) == (4, splits)


@pytest.mark.parametrize(("batch", "windows", "chunks"), [(1, 1, 2), (2, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_prefixes_are_added_in_float32(batch, windows, chunks, dtype, device, monkeypatch):
    set_launch(monkeypatch, windows=windows)
    launches = recorded(monkeypatch)
    inputs = make_inputs(dtype, device, batch=batch, prefixes=[(1, 3), (batch, 2)], head_dim=32)
    check_against_truth(inputs, dtype)
    arguments = dict(launches)["window_grads_kernel"]
    assert arguments["grads0_ptr"].shape == (2, batch, chunks, 1, 3, 32)
    assert arguments["grads0_ptr"].dtype == torch.float32
    alone = chunks == 1
    assert arguments["grads1_ptr"].dtype == (dtype if alone else torch.float32)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(41, 70), (0, 130), (130, 3)])
def test_prefixes_longer_than_the_window_are_as_good_as_eager(lengths, dtype, device):
    first, second = lengths
    inputs = make_inputs(dtype, device, image=(3, 4), head_dim=16, prefixes=[(1, first), (2, second, 2)])
    check_against_truth(inputs, dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(d, torch.float32) for d in (1, 6, 16, 34, 80, 256)] + [(34, torch.bfloat16), (64, torch.bfloat16), (80, torch.float16)],
    ids=str,
)
def test_any_head_dim_is_as_good_as_eager(head_dim, dtype, device):
    # a gradient of one number is a matter of luck
    inputs = make_inputs(dtype, device, batch=1, head_dim=head_dim, prefixes=[(1, 3), (1, 2)], pad=head_dim > 1)
    check_against_truth(inputs, dtype)


GEOMETRIES = {
    "a window larger than the image": ((3, 2), (5, 4), (0, 0)),
    "a larger window, shifted by more than the image": ((2, 3), (5, 4), (4, 3)),
    "one token, shifted": ((1, 1), (2, 2), (1, 1)),
    "windows of one token": ((2, 3), (1, 1), (0, 0)),
    "a row of windows, shifted": ((2, 8), (2, 3), (1, 2)),
    "a column of windows, shifted left only": ((5, 3), (2, 3), (0, 2)),
    "nothing to pad": ((4, 6), (2, 3), (1, 1)),
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("pad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_any_geometry_equals_the_reference(geometry, pad, device):
    image, window, shift = geometry
    inputs = make_inputs(torch.float32, device, image=image, window=window, shift=shift, batch=1, prefixes=[(1, 2)], pad=pad)
    check_equals_truth(inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_float32_prompts_bias_and_padding_meet_16_bit_tokens_and_get_float32_gradients(dtype, device):
    inputs = make_inputs(dtype, device, **EVERYTHING)
    upstream = random_upstream(inputs)
    wide = changed(inputs, lambda name, t: t.float() if t.is_floating_point() and name != "qkv" else t)
    got, expected = run(wide, upstream), run(inputs, upstream)
    assert got["out"].dtype == dtype
    for name in ("out", "qkv"):
        assert torch.equal(got[name], expected[name]), name
    for name in leaves(inputs).keys() - {"qkv"}:
        assert got[name].dtype == torch.float32
        # one rounding apart; the interpreter cuts bfloat16 off
        torch.testing.assert_close(got[name], expected[name].float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@interpreted
@mixed_dtypes
def test_bfloat16_and_float64_meet(own, other):
    inputs = make_inputs(other, CPU, batch=2, prefixes=[(1, 2), (2, 3)], pad=True)
    inputs = changed(inputs, lambda name, t: t.to(own) if name == "qkv" else t)
    upstream = random_upstream(inputs)
    assert_mixed_dtypes_are_right(inputs, lambda inputs, impl: run(inputs, upstream.to(inputs["qkv"].dtype), impl))


def test_large_logits_choose_one_key(device):
    """Token i of 12 looks at token i + 5."""
    inputs = make_inputs(torch.float32, device, image=(3, 4), shift=(0, 0), head_dim=16, prefixes=[(1, 1)], pad=False)
    with torch.no_grad():
        inputs["qkv"][:, :, :, 0, 0] = 1e4 * torch.eye(12, 16).view(3, 4, 16)
        inputs["qkv"][:, :, :, 1, 0] = torch.eye(12, 16).roll(5, 0).view(3, 4, 16)
        inputs["pk0"].fill_(-1.0)
    upstream = random_upstream(inputs)
    got = run(inputs, upstream)
    values = inputs["qkv"][:, :, :, 2, 0].flatten(1, 2)
    assert torch.equal(got["out"].flatten(1, 2), values.roll(-5, 1))
    assert torch.equal(got["qkv"][:, :, :, 2, 0].flatten(1, 2), upstream.flatten(1, 2).roll(5, 1))
    assert torch.count_nonzero(got["pk0"]) == torch.count_nonzero(got["pv0"]) == torch.count_nonzero(got["bias"]) == 0


def test_large_logits_see_over_a_seam(device):
    """-100 is a number: a logit that is larger by more wins."""
    inputs = make_inputs(torch.float32, device, image=(3, 4), shift=(1, 2), pad=False)
    with torch.no_grad():
        inputs["qkv"][:, :, :, :2] *= 40
    check_equals_truth(inputs)


GRADCHECKS = {
    "padding, prefixes": {"image": (3, 2), "window": (2, 2), "shift": (1, 1), "prefixes": [(1, 2), (1, 1)]},
    "masked prefixes, two images": {
        "image": (2, 2),
        "window": (2, 2),
        "shift": (1, 0),
        "batch": 2,
        "prefixes": [(1, 1), (2, 3, 2)],
    },
    "no prefixes": {"image": (2, 3), "window": (2, 2), "shift": (0, 1)},
}


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(sizes, id=name, marks=pytest.mark.slow if name == "padding, prefixes" else ())
        for name, sizes in GRADCHECKS.items()
    ],
)
def test_gradcheck_in_float64_goes_through_the_kernels(sizes):
    inputs = make_inputs(torch.float64, CPU, **{"batch": 1, "head_dim": 2, **sizes})
    names = leaves(inputs)

    def function(*values):
        return attend({**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, tuple(names.values()), fast_mode=True)


@interpreted
@problems
def test_float64_equals_the_reference(sizes):
    inputs = in_double(make_inputs(torch.float32, CPU, **sizes))
    upstream = random_upstream(inputs)
    got, expected = (run(inputs, upstream, impl) for impl in ("triton", "reference"))
    assert_all_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("view", [guarded, transposed])
def test_views_inside_nan_and_other_strides_give_the_same_bits(view, device):
    inputs = make_inputs(torch.float32, device, heads=2, **EVERYTHING)
    upstream = random_upstream(inputs)
    views = changed(inputs, lambda name, t: view(t))
    assert not views["qkv"].is_contiguous()
    assert_same_bits(run(views, view(upstream)), run(inputs, upstream))


@pytest.mark.parametrize("dim", [0, 1, 3])
def test_expanded_tensors_give_the_same_bits(dim, device):
    inputs = make_inputs(torch.float32, device, image=(3, 3), window=(3, 4), shift=(1, 1), heads=2, prefixes=[(2, 3), (2, 4)])
    upstream = expanded(random_upstream(inputs), dim)
    views = changed(inputs, lambda name, t: expanded(t, dim))
    repeated = changed(views, lambda name, t: t.contiguous())
    assert views["qkv"].stride(dim) == 0
    assert_same_bits(run(views, upstream), run(repeated, upstream.contiguous()))


@pytest.mark.parametrize("windows", [1, 4])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_outputs_are_written_and_nothing_around_them_is(windows, head_dim, device, monkeypatch):
    set_launch(monkeypatch, windows=windows)
    inputs = make_inputs(torch.float32, device, head_dim=head_dim, **EVERYTHING)
    upstream = random_upstream(inputs)
    with sentinels(monkeypatch) as storages:
        run(inputs, upstream)
    # out, a gradient of each input (those of a prefix's keys and values are one), parts of sums: prefix 0, padding, bias
    assert len(storages) >= 1 + len(leaves(inputs)) - 2 + 3


ASKED = [("qkv",), ("pk0",), ("pv1",), ("bias",), ("pad",), ("pk0", "pv0", "pk1", "pv1"), ("qkv", "pv0"), ("pk1", "bias", "pad")]


@pytest.mark.parametrize("needs", ASKED, ids=" ".join)
def test_only_asked_for_gradients_are_computed(needs, device, monkeypatch):
    inputs = make_inputs(torch.float32, device, image=(2, 1), window=(2, 2), shift=(1, 0), prefixes=[(1, 3), (2, 2)])
    upstream = random_upstream(inputs)
    full = run(inputs, upstream)
    launches = recorded(monkeypatch)
    for name, tensor in leaves(inputs).items():
        tensor.requires_grad_(name in needs)
    attend(inputs).backward(upstream)
    for name, tensor in leaves(inputs).items():
        assert (tensor.grad is not None) == (name in needs)
        if name in needs:
            torch.testing.assert_close(tensor.grad, full[name])
    prefix0, prefix1 = (any(n in needs for n in names) for names in (("pk0", "pv0"), ("pk1", "pv1")))
    tokens = "qkv" in needs or "pad" in needs or prefix0 or prefix1
    assert [name for name, _ in launches] == KERNELS[:1] + KERNELS[1:2] * tokens + KERNELS[2:] * ("bias" in needs)
    if tokens:
        arguments = dict(launches)["window_grads_kernel"]
        written = [arguments[name] is not None for name in ("grad_qkv_ptr", "grads0_ptr", "grads1_ptr", "grad_pad_ptr")]
        assert written == ["qkv" in needs, prefix0, prefix1, "pad" in needs]


def test_padding_is_not_computed_where_there_is_none(device, monkeypatch):
    launches = recorded(monkeypatch)
    inputs = make_inputs(torch.float32, device, image=(3, 4))
    got = run(inputs, random_upstream(inputs))
    assert torch.count_nonzero(got["pad"]) == 0
    assert all(arguments["pad_ptr"] is None for _, arguments in launches)
    assert dict(launches)["window_grads_kernel"]["grad_pad_ptr"] is None


@pytest.mark.parametrize("shift", [(0, 0), (0, 1), (1, 0)])
def test_without_a_shift_seams_are_compiled_away(shift, device, monkeypatch):
    launches = recorded(monkeypatch)
    inputs = make_inputs(torch.float32, device, image=(3, 4), shift=shift)
    run(inputs, random_upstream(inputs))
    assert [arguments["SHIFTED"] for _, arguments in launches] == [any(shift)] * 3


@pytest.mark.parametrize("prefixes", [[], [(1, 0)], [(2, 3, 2)]], ids=["no prefixes", "no keys", "masked"])
def test_a_token_that_sees_nothing_gives_zeros_and_zero_gradients(prefixes, device):
    """Rows of the bias at minus infinity; of a masked prefix the last image has nothing."""
    inputs = make_inputs(torch.float32, device, image=(3, 4), shift=(0, 0), prefixes=prefixes)
    with torch.no_grad():
        inputs["bias"][:, 4:6] = float("-inf")
    upstream = random_upstream(inputs)
    got, expected = run(inputs, upstream), run(inputs, upstream, "reference")
    assert all(value.isfinite().all() for value in got.values())
    assert torch.count_nonzero(got["bias"][:, 4:6]) == 0
    for blind in (got["out"][1].flatten(0, 1), got["qkv"][1, :, :, 0].flatten(0, 1)):
        assert torch.count_nonzero(blind[4:6]) == 0
        assert (blind[:4].flatten(1) != 0).any(1).all()
    assert_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_where_nothing_at_all_is_seen_everything_is_zero(device):
    inputs = make_inputs(torch.float32, device)
    with torch.no_grad():
        inputs["bias"].fill_(float("-inf"))
    assert all(torch.count_nonzero(value) == 0 for value in run(inputs, random_upstream(inputs)).values())


@pytest.mark.parametrize("prefixes", [[], [(1, 3), (2, 2)]], ids=["no prefixes", "prefixes"])
def test_a_bias_of_minus_infinity_hides_a_token(prefixes, device):
    inputs = make_inputs(torch.float32, device, prefixes=prefixes)
    hidden = (torch.rand(1, 12, 12) < 0.4).to(device) & ~torch.eye(12, dtype=torch.bool, device=device)
    with torch.no_grad():
        inputs["bias"].masked_fill_(hidden, float("-inf"))
    upstream = random_upstream(inputs)
    got, expected = (run(inputs, upstream, impl) for impl in ("triton", "reference"))
    assert torch.count_nonzero(got["bias"][hidden]) == 0
    assert_all_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [-1e9, -1e38, torch.finfo(torch.float32).min])
def test_a_row_with_the_same_large_bias_everywhere_keeps_its_output_and_gradients(value, device):
    """Next to such numbers logits vanish: tokens count the same."""
    inputs = make_inputs(torch.float32, device, image=(3, 4), shift=(0, 0), batch=1)
    with torch.no_grad():
        inputs["bias"][:, 4] = value
    upstream = random_upstream(inputs)
    got, eager = run(inputs, upstream), run(inputs, upstream, "reference")
    torch.testing.assert_close(got["out"][0, 1, 0], inputs["qkv"][0, :, :, 2, 0].mean((0, 1)))
    assert_all_close(got, eager)


def test_a_row_of_the_lowest_float64_biases_keeps_its_output(device):
    inputs = make_inputs(torch.float32, device, image=(3, 4), shift=(0, 0), batch=1)
    inputs["bias"] = inputs["bias"].detach().double()
    inputs["bias"][:, 4] = torch.finfo(torch.float64).min
    torch.testing.assert_close(attend(inputs)[0, 1, 0], inputs["qkv"][0, :, :, 2, 0].mean((0, 1)))


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min])
def test_with_prompts_a_row_of_low_biases_sees_prompts_alone(value, device):
    inputs = make_inputs(torch.float32, device, image=(3, 4), batch=1, prefixes=[(1, 3)])
    hidden = changed(inputs, lambda name, t: t)
    with torch.no_grad():
        inputs["bias"][:, 4], hidden["bias"][:, 4] = value, float("-inf")
    upstream = random_upstream(inputs)
    assert_same_bits(run(inputs, upstream), run(hidden, upstream))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_garbage_in_hidden_rows_of_a_prefix_changes_no_bit(dtype, device):
    inputs = make_inputs(dtype, device, prefixes=[(1, 2), (2, 5, 2)])
    upstream = random_upstream(inputs)
    hidden = ~inputs["there1"][:, None, :, None]
    clean = run(inputs, upstream)
    garbage = torch.finfo(dtype).max
    spoilt = changed(inputs, lambda name, t: t.masked_fill(hidden, garbage) if name in ("pk1", "pv1") else t)
    assert_same_bits(run(spoilt, upstream), clean)
    for name in ("pk1", "pv1"):
        assert torch.count_nonzero(clean[name].masked_fill(~hidden, 0.0)) == 0
        assert torch.count_nonzero(clean[name]) > 0


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("name", ["qkv", "pk1", "pv1", "upstream"])
def test_nan_stays_in_its_image(name, device):
    inputs = make_inputs(torch.float32, device, image=(3, 4), batch=3, prefixes=[(1, 3), (3, 2)])
    upstream = random_upstream(inputs)
    clean = run(inputs, upstream)
    poisoned = upstream if name == "upstream" else inputs[name]
    with torch.no_grad():
        poisoned[1] = float("nan")
    got = run(inputs, upstream)
    for output in ("out", "qkv", "pk1", "pv1"):
        assert torch.equal(got[output][[0, 2]], clean[output][[0, 2]]), output
    assert got["qkv" if name == "upstream" else "out"][1].isnan().all()


def test_nan_of_a_token_stays_in_its_window(device):
    inputs = make_inputs(torch.float32, device, image=(6, 4), shift=(0, 0), prefixes=[(1, 3)])
    clean = attend(inputs)
    with torch.no_grad():
        inputs["qkv"][:, 1, 2] = float("nan")
    got = attend(inputs)
    assert torch.equal(got[:, 3:], clean[:, 3:])
    assert got[:, :3].isnan().all()


@pytest.mark.usefixtures("rowwise_products")
@pytest.mark.parametrize(
    ("windows", "dtype"), [pytest.param(1, torch.float32, marks=pytest.mark.slow), (4, torch.bfloat16)], ids=str
)
def test_an_image_has_the_same_bits_alone_and_in_a_batch(windows, dtype, device, monkeypatch):
    set_launch(monkeypatch, windows=windows)
    inputs = make_inputs(dtype, device, batch=3, prefixes=[(3, 2), (3, 3, 3)])
    upstream = random_upstream(inputs)
    together = run(inputs, upstream)
    for b in range(3):
        one = changed(inputs, lambda name, t, b=b: t[b : b + 1] if name not in ("bias", "pad") else t)
        for name, value in run(one, upstream[b : b + 1]).items():
            if name not in ("bias", "pad"):
                assert torch.equal(value[0], together[name][b]), name


def test_eight_images_have_the_bits_of_one(device):
    inputs = make_inputs(torch.float32, device, image=(3, 4), batch=8, prefixes=[(1, 2), (8, 3)])
    together = attend(inputs)
    for b in range(8):
        one = changed(inputs, lambda name, t, b=b: t[b : b + 1] if len(t) == 8 else t)
        assert torch.equal(attend(one)[0], together[b])


def test_three_runs_have_the_same_bits(device):
    inputs = make_inputs(torch.bfloat16, device, **EVERYTHING)
    upstream = random_upstream(inputs)
    first, *others = [run(inputs, upstream) for _ in range(3)]
    for other in others:
        assert_same_bits(other, first)


@interpreted
@pytest.mark.slow
def test_programs_may_run_in_any_order_and_twice(monkeypatch):
    set_launch(monkeypatch, windows=1)
    inputs = make_inputs(torch.float32, CPU, **EVERYTHING)
    upstream = random_upstream(inputs)
    plain = run(inputs, upstream)
    orders = shuffle_programs(monkeypatch)
    got = run(inputs, upstream)
    assert max(map(len, orders)) >= 8, "the grid was shuffled"
    assert_same_bits(got, plain)


@pytest.mark.parametrize("prefixes", [[], [(1, 3), (0, 2)], [(0, 3, 1)]], ids=["no prefixes", "prefixes", "masked"])
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(prefixes, device):
    inputs = make_inputs(torch.float32, device, batch=0, prefixes=prefixes)
    got = run(inputs, random_upstream(inputs))
    assert got["out"].shape == (0, 5, 4, 8)
    for name, value in leaves(inputs).items():
        assert got[name].shape == value.shape
        assert torch.count_nonzero(got[name]) == 0


@pytest.mark.parametrize("prefix_batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_prefix_without_keys_changes_no_bit_and_has_an_empty_gradient(prefix_batch, masked, device):
    plain = make_inputs(torch.float32, device, image=(3, 4), prefixes=[(1, 4)])
    upstream = random_upstream(plain)
    expected = run(plain, upstream)
    empty = [torch.zeros(prefix_batch, 1, 0, 8, device=device, requires_grad=True) for _ in range(2)]
    there = torch.ones(2, 0, dtype=torch.bool, device=device) if masked else None
    got = run({**plain, "pk1": empty[0], "pv1": empty[1], "there1": there}, upstream)
    assert got.pop("pk1").shape == got.pop("pv1").shape == (prefix_batch, 1, 0, 8)
    assert_same_bits(got, expected)
    swapped = {"pk0": empty[0], "pv0": empty[1], "there0": there, "pk1": plain["pk0"], "pv1": plain["pv0"]}
    first = run({**plain, **swapped}, upstream)
    assert torch.equal(first["out"], expected["out"])
    assert torch.equal(first["pk1"], expected["pk0"])


@pytest.mark.parametrize(("padded", "dtype"), [(40, torch.float32), (64, torch.bfloat16)], ids=str)
def test_zeros_behind_the_head_dim_change_no_bit(padded, dtype, device):
    inputs = make_inputs(dtype, device, image=(3, 3), head_dim=34, **EVERYTHING)
    upstream = random_upstream(inputs)
    plain = run(inputs, upstream)

    def pad(name, t):
        return torch.nn.functional.pad(t, (0, padded - 34)) if name in (*PARTS, "pk0", "pv0", "pk1", "pv1", "upstream") else t

    got = run(changed(inputs, pad), pad("upstream", upstream), scale=34**-0.5)
    for name, value in got.items():
        if name != "bias":
            assert torch.count_nonzero(value[..., 34:]) == 0, name
            value = value[..., :34]
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(
    ("name", "axis"),
    slow_but(
        [("qkv", 1), ("qkv", 3), ("qkv", 5), ("prefixes", 0), ("prefixes", 2), ("upstream", 1), ("upstream", 2)],
        [("qkv", axis) for axis in range(6)] + [(name, axis) for name in ("prefixes", "upstream") for axis in range(4)],
    ),
)
def test_addresses_past_2_31_elements(name, axis, device):
    inputs, expected = compact_run(axis == 0, axis == (1 if name == "prefixes" else 4), device)
    chosen = ["pk0", "pv0", "pk1", "pv1"] if name == "prefixes" else [name]
    views = {**inputs, **dict(zip(chosen, spread([inputs[each] for each in chosen], axis), strict=True))}
    upstream = views.pop("upstream")
    assert_same_bits(run(views, upstream), expected)


@functools.cache
def compact_run(images, heads, device):
    """One window, 3 images or heads if asked, otherwise one; its upstream gradient among the inputs, and its results."""
    sizes = {"batch": 3 if images else 1, "heads": 3 if heads else 1, "image": (3, 3), "window": (3, 3), "shift": (1, 1)}
    inputs = make_inputs(torch.float16, device, **sizes, head_dim=3, prefixes=[(sizes["batch"], 3)] * 2)
    upstream = random_upstream(inputs)
    return {**inputs, "upstream": upstream}, run(inputs, upstream)


def test_autocast_casts_tokens_and_returns_gradients_in_their_dtype(device):
    inputs = make_inputs(torch.float32, device, **EVERYTHING)
    rounded = changed(inputs, lambda name, t: t.bfloat16() if name == "qkv" else t)
    upstream = random_upstream(rounded)
    expected = run(rounded, upstream)
    with torch.autocast(device.type, torch.bfloat16):
        got = run(inputs, upstream)
    assert got["out"].dtype == torch.bfloat16
    assert torch.equal(got["out"], expected["out"])
    for name, value in leaves(inputs).items():
        assert got[name].dtype == value.dtype == torch.float32
        assert torch.equal(got[name], expected[name].float())


@interpreted
def test_auto_takes_sdpa_on_a_cpu_and_triton_on_request(device, monkeypatch):
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "auto")
    launches = recorded(monkeypatch)
    inputs = make_inputs(torch.float32, device, image=(3, 4), batch=1)
    assert torch.equal(attend(inputs, "auto"), attend(inputs, "sdpa"))
    assert not launches
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "triton")
    assert torch.equal(attend(inputs, "auto"), attend(inputs, "triton"))
    assert [name for name, _ in launches] == KERNELS[:1] * 2


def test_more_keys_than_fit_are_refused(device):
    inputs = make_inputs(torch.float32, device, batch=1, head_dim=64, prefixes=[(1, 116)])
    check_equals_truth(inputs)
    with pytest.raises(RuntimeError, match="a window with its prompts has 129 keys of head dimension 64, more than the kernel"):
        attend(make_inputs(torch.float32, device, batch=1, head_dim=64, prefixes=[(1, 117)]))


@pytest.mark.gpu
def test_auto_takes_the_kernels_while_keys_fit(device, monkeypatch):
    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "auto")
    launches = recorded(monkeypatch)
    attend(make_inputs(torch.bfloat16, device, batch=1, head_dim=64, prefixes=[(1, 180)]), "auto")
    assert [name for name, _ in launches] == KERNELS[:1]
    attend(make_inputs(torch.bfloat16, device, batch=1, head_dim=64, prefixes=[(1, 181)]), "auto")
    assert len(launches) == 1


@pytest.mark.gpu
@problems
def test_captured_in_a_cuda_graph(sizes, device):
    inputs = make_inputs(torch.bfloat16, device, **sizes)
    upstream = random_upstream(inputs)
    expected = run(inputs, upstream)
    assert_same_bits(through_a_cuda_graph(lambda: run(inputs, upstream)), expected)


@pytest.mark.gpu
@problems
@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
def test_nothing_waits_for_the_gpu(sizes, impl, device):
    inputs = make_inputs(torch.bfloat16, device, **sizes)
    upstream = random_upstream(inputs)
    run(inputs, upstream, impl)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(inputs, upstream, impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


SWIN = {"window": (7, 7), "shift": (3, 3), "head_dim": 32, "prefixes": [(1, 6), (8, 7)]}
FULL_SIZES = {
    "the first stage of Swin-B": {**SWIN, "image": (56, 56), "heads": 4},
    "the third stage of Swin-B": {**SWIN, "image": (14, 14), "heads": 16},
    "padding, masked prompts": {**SWIN, "image": (30, 37), "heads": 4, "prefixes": [(1, 6, 8), (8, 7, 8)]},
    "no prompts": {**SWIN, "image": (28, 28), "heads": 8, "prefixes": []},
    "windows of 8": {**SWIN, "image": (32, 32), "heads": 8, "window": (8, 8), "shift": (4, 4)},
    "windows of 12": {**SWIN, "image": (24, 24), "heads": 8, "window": (12, 12), "shift": (6, 6)},
    "many prompts": {**SWIN, "image": (14, 14), "heads": 8, "prefixes": [(8, 64), (1, 65)]},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", FULL_SIZES.values(), ids=FULL_SIZES)
def test_full_sizes_are_as_good_as_eager(sizes, dtype, device):
    check_against_truth(make_inputs(dtype, device, batch=8, **sizes), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_sizes_have_the_same_bits_three_times_and_alone(dtype, device):
    inputs = make_inputs(dtype, device, batch=8, **FULL_SIZES["padding, masked prompts"])
    upstream = random_upstream(inputs)
    first, *others = [run(inputs, upstream) for _ in range(3)]
    for other in others:
        assert_same_bits(other, first)
    per_image = ("qkv", "pk1", "pv1", "there0", "there1")
    one = changed(inputs, lambda name, t: t[3:4] if name in per_image else t)
    alone = run(one, upstream[3:4])
    for name in ("out", "qkv", "pk1", "pv1"):
        assert torch.equal(alone[name][0], first[name][3]), name
