"""Laws of window_prompt_attention for any sizes, on every implementation that can run here."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mope_fast.functional import window_prompt_attention
from mope_fast.ops.window_attention import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_cpus = pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="for CPU tensors, outside of the interpreter")
implementations = pytest.mark.parametrize(
    "impl", ["reference", "sdpa", pytest.param("cpu", marks=on_cpus), pytest.param("triton", marks=pytest.mark.kernel)]
)
SMALL = 7 if INTERPRETED else 20
"""Largest image; the interpreter takes 30 ms for a window."""


def laws(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


many, some = laws(200), laws(8 if INTERPRETED else 50)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator).to(DEVICE)


@st.composite
def axes(draw, whole=False, shifted=True):
    """(size, window, shift) along one axis of an image; ``whole``: nothing to pad."""
    window = draw(st.integers(2 if INTERPRETED else 1, 6))
    size = window * draw(st.integers(1, max(SMALL // window, 1))) if whole else draw(st.integers(1, SMALL))
    return size, window, draw(st.integers(0, window - 1)) if shifted else 0


@st.composite
def problems(draw, max_prefixes=2, **settings):
    """Arguments of the function in float32, as the kernels take it."""
    (height, rows, up), (width, columns, left) = draw(axes(**settings)), draw(axes(**settings))
    batch, heads, head_dim = (
        draw(st.integers(1, 2)),
        1 if INTERPRETED else draw(st.integers(1, 2)),
        draw(st.sampled_from([2, 5, 16])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    prefixes = []
    for _ in range(draw(st.integers(0, max_prefixes))):
        shape = (draw(st.sampled_from([1, batch])), heads, draw(st.integers(0, 6)), head_dim)
        there = torch.rand(draw(st.sampled_from([1, batch])), shape[2], generator=generator).to(DEVICE) < 0.6
        prefixes.append((normal(generator, *shape), normal(generator, *shape), *([there] if draw(st.booleans()) else [])))
    return {
        "qkv": normal(generator, batch, height, width, 3, heads, head_dim),
        "prefixes": prefixes,
        "relative_position_bias": normal(generator, heads, rows * columns, rows * columns),
        "window_size": (rows, columns),
        "shift_size": (up, left),
        "pad_qkv": normal(generator, 3, heads, head_dim) if draw(st.booleans()) else None,
    }


def places(size, window, shift) -> list[tuple[int | None, int, bool]]:
    """Of each place along an axis of the rolled, padded image: its token (None: padding), window, whether behind the seam."""
    padded = math.ceil(size / window) * window
    return [((place + shift) % size if place < size else None, place // window, place >= padded - shift) for place in range(padded)]


def windows_with_places(problem) -> list[list[tuple]]:
    """For each window its places in row order: (token (y, x) or None, (behind the seam below, behind that on the right))."""
    _, height, width, *_ = problem["qkv"].shape
    (rows, columns), (up, left) = problem["window_size"], problem["shift_size"]
    windows: dict = {}
    for (y, row, below), (x, column, right) in itertools.product(places(height, rows, up), places(width, columns, left)):
        token = None if y is None or x is None else (y, x)
        windows.setdefault((row, column), []).append((token, (below, right)))
    return list(windows.values())


def seen_prompts(problem, image) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (H, P, Dh) that are there for an image, in float64."""
    keys, values = [], []
    for pk, pv, *there in problem["prefixes"]:
        rows = there[0][image % len(there[0])] if there else slice(None)
        keys.append(pk[image % len(pk)][:, rows].double())
        values.append(pv[image % len(pv)][:, rows].double())
    nothing = problem["qkv"].new_zeros(problem["qkv"].shape[4], 0, problem["qkv"].shape[5]).double()
    return torch.cat([*keys, nothing], 1), torch.cat([*values, nothing], 1)


def one_token_at_a_time(problem) -> torch.Tensor:
    """The definition, in float64: a list of keys for each token of each window."""
    qkv = problem["qkv"].double()
    batch, height, width, _, heads, head_dim = qkv.shape
    bias, pad = problem["relative_position_bias"].double(), problem["pad_qkv"]
    pad = qkv.new_zeros(3, heads, head_dim) if pad is None else pad.double()
    out = qkv.new_full((batch, height, width, heads, head_dim), float("nan"))
    for image, places in itertools.product(range(batch), windows_with_places(problem)):
        prompt_keys, prompt_values = seen_prompts(problem, image)
        rows = [pad if token is None else qkv[image, token[0], token[1]] for token, _ in places]
        keys = torch.cat([torch.stack([row[1] for row in rows], 1), prompt_keys], 1)
        values = torch.cat([torch.stack([row[2] for row in rows], 1), prompt_values], 1)
        for i, (token, side) in enumerate(places):
            if token is None:
                continue
            logits = (keys @ rows[i][0][:, :, None])[..., 0] * head_dim**-0.5
            for j, (_, other) in enumerate(places):
                logits[:, j] += bias[:, i, j] - (100 if side != other else 0)
            weights = (logits - logits.amax(1, keepdim=True)).exp()
            out[image, token[0], token[1]] = (weights[:, None] @ values)[:, 0] / weights.sum(1, keepdim=True)
    return out.flatten(3)


@implementations
@some
@given(problem=problems())
def test_it_is_the_definition_one_token_at_a_time(problem, impl):
    got = window_prompt_attention(**problem, impl=impl)
    torch.testing.assert_close(got.double(), one_token_at_a_time(problem), rtol=1e-5, atol=1e-5)


def companions(problem, token) -> list[tuple[int, int]]:
    """The tokens that see ``token``: of its window, and on its side of the seams."""
    for places in windows_with_places(problem):
        for other, side in places:
            if other == token:
                return [mate for mate, mates_side in places if mate is not None and mates_side == side]
    raise AssertionError("every token is in a window")


@many
@given(problem=problems(max_prefixes=0))
def test_every_token_is_in_one_window(problem):
    _, height, width, *_ = problem["qkv"].shape
    tokens = [token for places in windows_with_places(problem) for token, _ in places if token is not None]
    assert sorted(tokens) == list(itertools.product(range(height), range(width)))
    assert all(len(places) == math.prod(problem["window_size"]) for places in windows_with_places(problem))


@implementations
@some
@given(problem=problems(), data=st.data())
def test_exactly_the_tokens_of_its_window_and_side_notice_a_token(problem, data, impl):
    _, height, width, *_ = problem["qkv"].shape
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    changed = problem["qkv"].clone()
    changed[:, y, x, 2] = changed[:, y, x, 2] * 1.5 + 1
    before, after = (window_prompt_attention(**{**problem, "qkv": qkv}, impl=impl) for qkv in (problem["qkv"], changed))
    different = (before != after).any(-1)
    expected = companions(problem, (y, x))
    assert [tuple(token) for token in different[0].nonzero().tolist()] == sorted(expected)
    assert (different == different[:1]).all(), "every image alike"


@implementations
@some
@given(problem=problems(), data=st.data())
def test_a_gradient_reaches_exactly_the_tokens_of_its_window_and_side(problem, data, impl):
    _, height, width, *_ = problem["qkv"].shape
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    qkv = problem["qkv"].requires_grad_()
    out = window_prompt_attention(**{**problem, "qkv": qkv}, impl=impl)
    upstream = torch.zeros_like(out)
    upstream[:, y, x] = torch.rand_like(upstream[:, y, x]) + 0.5
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    # over a seam there is exp(-100) of it
    reached = (grad[:, :, :, 2].abs() > 1e-30).flatten(3).any(-1)
    assert [tuple(token) for token in reached[0].nonzero().tolist()] == sorted(companions(problem, (y, x)))
    assert (reached == reached[:1]).all()
    others = torch.ones(height, width, dtype=torch.bool)
    others[y, x] = False
    assert torch.count_nonzero(grad[:, others.to(DEVICE)][:, :, 0]) == 0, "queries are their own tokens'"


@implementations
@some
@given(problem=problems())
def test_an_output_lies_between_the_values_that_its_window_sees(problem, impl):
    out = window_prompt_attention(**problem, impl=impl).double()
    out = out.unflatten(-1, problem["qkv"].shape[4:])
    pad = torch.zeros_like(problem["qkv"][0, 0, 0]) if problem["pad_qkv"] is None else problem["pad_qkv"]
    for image, places in itertools.product(range(len(out)), windows_with_places(problem)):
        tokens = [token for token, _ in places if token is not None]
        values = [problem["qkv"][image, y, x, 2] for y, x in tokens] + [pad[2]] * (len(tokens) < len(places))
        hull = torch.cat([torch.stack(values, 1).double(), seen_prompts(problem, image)[1]], 1)
        slack = 1e-5 * hull.abs().max()
        for y, x in tokens:
            assert (out[image, y, x] >= hull.amin(1) - slack).all()
            assert (out[image, y, x] <= hull.amax(1) + slack).all()


@implementations
@some
@given(problem=problems())
def test_equal_values_are_the_output(problem, impl):
    qkv = problem["qkv"].clone()
    qkv[:, :, :, 2] = 0.75
    prefixes = [(pk, torch.full_like(pv, 0.75), *there) for pk, pv, *there in problem["prefixes"]]
    pad = torch.full_like(qkv[0, 0, 0], 0.75)
    out = window_prompt_attention(**{**problem, "qkv": qkv, "prefixes": prefixes, "pad_qkv": pad}, impl=impl)
    torch.testing.assert_close(out, torch.full_like(out, 0.75), rtol=1e-6, atol=0)


@implementations
@some
@given(problem=problems(), random=st.randoms(use_true_random=False))
def test_the_order_of_prompts_changes_nothing(problem, random, impl):
    permuted = []
    for pk, pv, *there in problem["prefixes"]:
        order = list(range(pk.shape[2]))
        random.shuffle(order)
        permuted.append((pk[:, :, order], pv[:, :, order], *(mask[:, order] for mask in there)))
    a, b = (
        window_prompt_attention(**{**problem, "prefixes": prefixes}, impl=impl)
        for prefixes in (problem["prefixes"], permuted[::-1])
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=problems())
def test_a_hidden_prompt_is_as_if_it_were_not_there(problem, impl):
    shared = [(pk, pv, there[0][:1]) if there else (pk, pv) for pk, pv, *there in problem["prefixes"]]
    kept = [(pk[:, :, there[0][0]], pv[:, :, there[0][0]]) if there else (pk, pv) for pk, pv, *there in shared]
    a, b = (window_prompt_attention(**{**problem, "prefixes": prefixes}, impl=impl) for prefixes in (shared, kept))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=problems(whole=True, shifted=False), down=st.integers(0, 3), right=st.integers(0, 3))
def test_an_image_moved_by_whole_windows_moves_its_output(problem, down, right, impl):
    steps = (down * problem["window_size"][0], right * problem["window_size"][1])
    moved = {**problem, "qkv": problem["qkv"].roll(steps, (1, 2))}
    a, b = window_prompt_attention(**problem, impl=impl).roll(steps, (1, 2)), window_prompt_attention(**moved, impl=impl)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=problems(whole=True))
def test_away_from_seams_a_shift_is_a_roll_of_the_image(problem, impl):
    """In all windows but the last row and column."""
    back = tuple(-s for s in problem["shift_size"])
    rolled = {**problem, "qkv": problem["qkv"].roll(back, (1, 2)), "shift_size": (0, 0)}
    a, b = window_prompt_attention(**problem, impl=impl).roll(back, (1, 2)), window_prompt_attention(**rolled, impl=impl)
    last = [
        size - (window if shift else 0)
        for size, window, shift in zip(a.shape[1:3], problem["window_size"], problem["shift_size"], strict=True)
    ]
    torch.testing.assert_close(a[:, : last[0], : last[1]], b[:, : last[0], : last[1]], rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=problems())
def test_rows_and_columns_are_alike(problem, impl):
    rows, columns = problem["window_size"]
    order = torch.arange(rows * columns, device=DEVICE).view(rows, columns).T.flatten()
    turned = {
        **problem,
        "qkv": problem["qkv"].transpose(1, 2),
        "window_size": (columns, rows),
        "shift_size": problem["shift_size"][::-1],
        "relative_position_bias": problem["relative_position_bias"][:, order][:, :, order],
    }
    a, b = window_prompt_attention(**problem, impl=impl), window_prompt_attention(**turned, impl=impl).transpose(1, 2)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=problems(max_prefixes=0), shift=st.floats(-50, 50))
def test_without_prompts_a_shift_of_a_row_of_the_bias_changes_nothing(problem, shift, impl):
    # quarters: the shifted bias is exact
    bias = (problem["relative_position_bias"] * 4).round() / 4
    row = torch.arange(bias.shape[1], device=DEVICE)[:, None] % 3 == 0
    shifted = bias + row * (round(shift * 4) / 4)
    a, b = (window_prompt_attention(**{**problem, "relative_position_bias": each}, impl=impl) for each in (bias, shifted))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@many
@given(keys=st.integers(1, 2000))
def test_tiles_of_keys_are_falling_powers_of_two_without_gaps_and_spare_less_than_16(keys):
    from mope_fast.kernels.launch import key_tiles

    tiles = key_tiles(keys)
    assert [start for start, _ in tiles] == [sum(size for _, size in tiles[:i]) for i in range(len(tiles))]
    sizes = [size for _, size in tiles]
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    assert sizes == sorted(set(sizes), reverse=True)
    assert 0 <= sum(sizes) - keys < 16
