"""Laws of attention with prefixes and receptive fields for any input, on every implementation that can run here."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mope_fast import ReceptiveField
from mope_fast.functional import prompt_attention, receptive_field_attention
from mope_fast.ops.prompt_attention import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
implementations = pytest.mark.parametrize("impl", ["reference", "sdpa", pytest.param("triton", marks=pytest.mark.kernel)])


def laws(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


many, some = laws(200), laws(10 if INTERPRETED else 80)


@st.composite
def fields(draw, max_groups=5, max_length=7):
    """Groups of any length, empty ones too, and any groups that they see."""
    lengths = draw(st.lists(st.integers(0, max_length), min_size=1, max_size=max_groups))
    names = [f"g{i}" for i in range(len(lengths))]
    visible = {name: draw(st.lists(st.sampled_from(names), unique=True)) for name in names}
    return ReceptiveField(dict(zip(names, lengths, strict=True)), visible)


def positions(field, group) -> slice:
    start = sum(field.lengths[:group])
    return slice(start, start + field.lengths[group])


def seen(field, group) -> list[int]:
    """The groups with positions that ``group`` sees."""
    return [i for i, name in enumerate(field.groups) if name in field.visible[group] and field.lengths[i]]


def normal(generator, *shape):
    return torch.randn(shape, generator=generator).to(DEVICE)


@st.composite
def generators(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


def tokens(draw, generator, queries, keys):
    """q, k, v in float32, as the kernels take it."""
    batch, heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 3]))
    head_dim = draw(st.sampled_from([2, 5, 16, 34]))
    return [normal(generator, batch, n, length, head_dim) for n, length in ((heads * group, queries), (heads, keys), (heads, keys))]


@st.composite
def field_problems(draw):
    """(field, q, k, v)."""
    field = draw(fields())
    return field, *tokens(draw, draw(generators()), field.size, field.size)


def windows():
    limit = st.none() | st.integers(0, 8)
    return st.none() | st.tuples(limit, limit)


@st.composite
def prompt_problems(draw, max_prefixes=2, causal=True):
    """(q, k, v, prefixes, settings); causal or a window only where no query is before the first key."""
    queries, keys = draw(st.integers(1, 20)), draw(st.integers(0, 20))
    generator = draw(generators())
    q, k, v = tokens(draw, generator, queries, keys)
    batch, heads, _, head_dim = k.shape
    prefixes = []
    for _ in range(draw(st.integers(0, max_prefixes))):
        shape = (draw(st.sampled_from([1, batch])), heads, draw(st.integers(0, 6)), head_dim)
        prefixes.append((normal(generator, *shape), normal(generator, *shape)))
    padding = torch.rand(batch, keys, generator=generator).to(DEVICE) < draw(st.sampled_from([0.0, 0.6, 0.9]))
    options = {
        "is_causal": causal and queries <= keys and draw(st.booleans()),
        "window": draw(windows()) if causal and queries <= keys else None,
        "key_padding_mask": padding if draw(st.booleans()) else None,
    }
    return q, k, v, prefixes, options


def perturbed(tensor, rows: slice):
    other = tensor.clone()
    other[:, :, rows] = other[:, :, rows].flip(-1) * 1.5 + 1
    return other


def groups_that_differ(field, a, b) -> set[int]:
    """Groups in which every row of every sample and head differs; a group may not differ in part of its rows."""
    different = set()
    for i, length in enumerate(field.lengths):
        rows = (a != b).any(-1)[:, :, positions(field, i)]
        if length and rows.any():
            assert rows.all(), f"some rows of group {i} differ, others don't"
            different.add(i)
    return different


@implementations
@some
@given(problem=field_problems(), data=st.data())
def test_exactly_the_groups_that_see_a_group_notice_its_keys_and_values(problem, data, impl):
    field, q, k, v = problem
    group = data.draw(st.integers(0, len(field.groups) - 1))
    rows = positions(field, group)
    plain = receptive_field_attention(q, k, v, field, impl=impl)
    changed = receptive_field_attention(q, perturbed(k, rows), perturbed(v, rows), field, impl=impl)
    expected = {i for i, length in enumerate(field.lengths) if length and group in seen(field, i)}
    assert groups_that_differ(field, plain, changed) == expected


@implementations
@some
@given(problem=field_problems(), data=st.data())
def test_exactly_the_group_itself_notices_its_queries(problem, data, impl):
    field, q, k, v = problem
    group = data.draw(st.integers(0, len(field.groups) - 1))
    plain = receptive_field_attention(q, k, v, field, impl=impl)
    changed = receptive_field_attention(perturbed(q, positions(field, group)), k, v, field, impl=impl)
    # with one key, or none, there is nothing to weigh
    weighs = field.lengths[group] and sum(field.lengths[i] for i in seen(field, group)) > 1
    assert groups_that_differ(field, plain, changed) == ({group} if weighs else set())


@implementations
@some
@given(problem=field_problems(), data=st.data())
def test_a_gradient_reaches_exactly_the_groups_that_are_seen(problem, data, impl):
    field, q, k, v = problem
    group = data.draw(st.integers(0, len(field.groups) - 1))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    upstream = torch.zeros_like(q)
    rows = positions(field, group)
    upstream[:, :, rows] = torch.rand_like(upstream[:, :, rows]) + 0.5
    grad_q, grad_k, grad_v = torch.autograd.grad(receptive_field_attention(*leaves, field, impl=impl), leaves, upstream)
    reached = set(seen(field, group)) if field.lengths[group] else set()
    zeros = torch.zeros_like(grad_v)
    assert groups_that_differ(field, grad_v, zeros) == reached
    others = [i for i in range(len(field.groups)) if i not in reached]
    assert all(torch.count_nonzero(grad_k[:, :, positions(field, i)]) == 0 for i in others)
    assert all(torch.count_nonzero(grad_q[:, :, positions(field, i)]) == 0 for i in range(len(field.groups)) if i != group)


@implementations
@some
@given(problem=field_problems())
def test_a_field_equals_its_mask_in_double(problem, impl):
    field, q, k, v = problem
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    weights = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    weights = weights.masked_fill(~field.mask(DEVICE), float("-inf"))
    # rows without a key are 0 / 0
    expected = torch.softmax(weights, -1).nan_to_num() @ v.double()
    torch.testing.assert_close(receptive_field_attention(q, k, v, field, impl=impl).double(), expected, rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=prompt_problems())
def test_prompts_equal_the_reference_in_double(problem, impl):
    q, k, v, prefixes, options = problem
    got = prompt_attention(q, k, v, prefixes, **options, impl=impl)
    double = [tuple(t.double() for t in pair) for pair in prefixes]
    expected = prompt_attention(q.double(), k.double(), v.double(), double, **options, impl="reference")
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=prompt_problems())
def test_an_output_lies_between_the_values_that_its_query_sees(problem, impl):
    q, k, v, prefixes, options = problem
    out = prompt_attention(q, k, v, prefixes, **options, impl=impl)
    (batch, _, queries, _), keys = q.shape, k.shape[2]
    visible = torch.ones(batch, queries, keys, dtype=torch.bool, device=DEVICE)
    left, right = options["window"] or (None, None)
    right = 0 if options["is_causal"] else right
    ahead = torch.arange(keys, device=DEVICE) - torch.arange(queries, device=DEVICE)[:, None] - keys + queries
    far = keys + queries
    visible &= (ahead >= -(far if left is None else left)) & (ahead <= (far if right is None else right))
    if options["key_padding_mask"] is not None:
        visible &= options["key_padding_mask"][:, None, :]
    values = torch.cat([*(pv.expand(batch, -1, -1, -1) for _, pv in prefixes), v], dim=2)
    visible = torch.cat([visible.new_ones(batch, queries, values.shape[2] - keys), visible], dim=2)
    values = values.repeat_interleave(q.shape[1] // values.shape[1], dim=1)
    for b in range(batch):
        for i in range(queries):
            hull = values[b][:, visible[b, i]]
            if not hull.shape[1]:
                assert torch.count_nonzero(out[b, :, i]) == 0
                continue
            slack = 1e-5 * hull.abs().max()
            assert (out[b, :, i] >= hull.amin(1) - slack).all()
            assert (out[b, :, i] <= hull.amax(1) + slack).all()


@implementations
@some
@given(problem=prompt_problems(), random=st.randoms(use_true_random=False))
def test_a_permutation_of_prefix_keys_changes_nothing(problem, random, impl):
    q, k, v, prefixes, options = problem
    permuted = []
    for pk, pv in prefixes:
        order = list(range(pk.shape[2]))
        random.shuffle(order)
        permuted.append((pk[:, :, order], pv[:, :, order]))
    a, b = (prompt_attention(q, k, v, p, **options, impl=impl) for p in (prefixes, reversed_pairs(permuted)))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def reversed_pairs(prefixes):
    """Which prefix comes first is an order of keys, too."""
    return prefixes[::-1]


@implementations
@some
@given(problem=prompt_problems())
def test_a_prefix_is_tokens_before_the_first(problem, impl):
    q, k, v, prefixes, options = problem
    assume(options["window"] is None or options["window"][0] is None)  # a limit on that side would hide such tokens
    batch = q.shape[0]
    keys, values = (torch.cat([*(p[side].expand(batch, -1, -1, -1) for p in prefixes), t], dim=2) for side, t in ((0, k), (1, v)))
    mask = options["key_padding_mask"]
    if mask is not None:
        mask = torch.cat([mask.new_ones(batch, keys.shape[2] - k.shape[2]), mask], dim=1)
    a = prompt_attention(q, k, v, prefixes, **options, impl=impl)
    b = prompt_attention(q, keys, values, **{**options, "key_padding_mask": mask}, impl=impl)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@implementations
@some
@given(problem=prompt_problems(max_prefixes=0), generator=generators(), shift=st.floats(-50, 50))
def test_a_shift_of_a_row_of_the_bias_changes_nothing(problem, generator, shift, impl):
    q, k, v, _, options = problem
    # quarters: the shifted bias is exact
    bias = (normal(generator, 1, 1, q.shape[2], k.shape[2]) * 4).round() / 4
    row = torch.arange(q.shape[2], device=DEVICE)[:, None] % 3 == 0
    shifted = bias + row * (round(shift * 4) / 4)
    a, b = (prompt_attention(q, k, v, bias=each, **options, impl=impl) for each in (bias, shifted))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@implementations
@some
@given(problem=prompt_problems(max_prefixes=1), shift=st.floats(2, 50))
def test_with_a_prefix_a_shift_of_the_bias_moves_weight_between_tokens_and_prefix(problem, shift, impl):
    q, k, v, prefixes, options = problem
    keys = k.shape[2]
    # values 1 for tokens and 0 for prefixes: the output is the weight of the tokens
    v, prefixes = torch.ones_like(v), [(pk, torch.zeros_like(pv)) for pk, pv in prefixes]
    bias = torch.zeros(1, 1, q.shape[2], keys, device=DEVICE)
    low, high = (prompt_attention(q, k, v, prefixes, bias=bias + s, **options, impl=impl)[..., 0].double() for s in (0, shift))
    odds = low / (1 - low) * torch.tensor(shift, dtype=torch.float64).exp()
    expected = torch.where(low < 1 - 1e-3, odds / (1 + odds), torch.ones_like(low))
    torch.testing.assert_close(high, torch.where(low == 0, low, expected), rtol=1e-3, atol=1e-3)


@st.composite
def overlapping(draw, generator, dtype, *shape):
    """(B, H, S, Dh) with small strides, as ``unfold`` and ``as_strided`` give it: many of its elements share their memory."""
    strides = [draw(st.sampled_from([0, 1, 2, shape[-1] - 1, shape[-1], 50])) for _ in shape[:-1]]
    strides.append(draw(st.sampled_from([1, 1, 0, 3])))
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    return normal(generator, size).to(dtype).as_strided(shape, strides)


@implementations
@some
@given(data=st.data(), generator=generators(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_elements_that_share_memory_count_as_their_copies(data, generator, dtype, impl):
    batch, heads, queries, keys, prefix, head_dim = 2, 2, 9, 12, 3, data.draw(st.sampled_from([2, 5, 34]))
    shapes = [(batch, heads, n, head_dim) for n in (queries, keys, keys, prefix, prefix, queries)]
    shapes += [(1, heads, queries, keys)] * data.draw(st.booleans())
    tensors = [data.draw(overlapping(generator, dtype, *shape)) for shape in shapes]

    def run(tensors, impl):
        upstream = tensors[5]
        leaves = [tensor.detach().requires_grad_() for tensor in (*tensors[:5], *tensors[6:])]
        q, k, v, pk, pv, *bias = leaves
        prefixes = [(pk, pv)] if with_prefix else []
        out = prompt_attention(q, k, v, prefixes, bias=bias[0] if bias else None, impl=impl)
        return [out, *torch.autograd.grad(out, [q, k, v, *bias, *(t for pair in prefixes for t in pair)], upstream)]

    with_prefix = data.draw(st.booleans())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    expected = run([tensor.double().contiguous() for tensor in tensors], "reference")
    for got, truth in zip(run(tensors, impl), expected, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=tolerance * (1 + truth.abs().max().item()))


@many
@given(field=fields())
def test_a_field_is_an_interval_field_if_every_row_of_its_mask_is_contiguous(field):
    rows = [[i for i, visible in enumerate(row) if visible] for row in field.mask().tolist()]
    assert field.is_interval == all(row == list(range(row[0], row[-1] + 1)) for row in rows if row)


@many
@given(field=fields())
def test_lowered_reproduces_the_mask(field):
    lowered, mask = field.lowered(torch.device("cpu")).tolist(), field.mask().tolist()
    assert len(lowered) == (4 if field.is_interval else 6)
    for i, row in enumerate(mask):
        inside = [lowered[0][i] <= j < lowered[1][i] for j in range(field.size)]
        if not field.is_interval:
            inside = [a and bool(lowered[5][i] >> lowered[4][j] & 1) for j, a in enumerate(inside)]
        assert inside == row
        # hulls, and no wider
        keys, queries = [j for j, visible in enumerate(row) if visible], [j for j, other in enumerate(mask) if other[i]]
        for first, last, members in ((lowered[0][i], lowered[1][i], keys), (lowered[2][i], lowered[3][i], queries)):
            assert (first, last) == ((members[0], members[-1] + 1) if members else (field.size, 0))


@many
@given(field=fields())
def test_slices_reproduce_the_mask(field):
    if not field.is_interval:
        with pytest.raises(ValueError, match="has no slices"):
            field.slices()
        return
    blocks = field.slices()
    mask = torch.zeros(field.size, field.size, dtype=torch.bool)
    for rows, keys in blocks:
        if keys is not None:
            mask[rows, keys] = True
    assert torch.equal(mask, field.mask())
    # every row is in one block, in order, and neighbours differ
    assert [i for rows, _ in blocks for i in range(rows.start, rows.stop)] == list(range(field.size))
    assert all(a.keys != b.keys for a, b in itertools.pairwise(blocks))


@many
@given(field=fields())
def test_a_field_is_rebuilt_from_what_it_shows(field):
    again = ReceptiveField(dict(zip(field.groups, field.lengths, strict=True)), dict(zip(field.groups, field.visible, strict=True)))
    assert again == field
    assert hash(again) == hash(field)
    assert repr(again) == repr(field)
    assert torch.equal(again.mask(), field.mask())
