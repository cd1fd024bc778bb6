"""What prompt_attention does with prefixes, padding and scales; that it equals its formula: ``test_attention_backends.py``."""

import math

import pytest
import torch

from mope_fast import functional

HEADS, QUERIES, HEAD_DIM = 3, 5, 8
BATCH = 4
IMPLS = ("sdpa", "reference")
# float64 on both sides: only the order of sums differs
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def make_inputs(prefix_batches=(), tokens=QUERIES):
    q, k, v = randn(BATCH, HEADS, QUERIES, HEAD_DIM), *(randn(BATCH, HEADS, tokens, HEAD_DIM) for _ in range(2))
    prefixes = [tuple(randn(b, HEADS, p + 2, HEAD_DIM) for _ in range(2)) for p, b in enumerate(prefix_batches)]
    return q, k, v, prefixes


def make_padding(tokens=QUERIES):
    """Ragged, with a hole in the middle of the first sample."""
    mask = torch.arange(tokens) < torch.tensor([tokens, 1, 3, tokens - 1])[:, None]
    mask[0, 2] = False
    return mask


def dense(q, k, v, prefixes, is_causal=False, mask=None, bias=None, scale=None):
    """One query at a time, over the list of keys that it sees."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                seen = [j for j in range(k.shape[2]) if mask is None or mask[b, j]]
                if is_causal:
                    seen = [j for j in seen if j <= i + k.shape[2] - q.shape[2]]
                prefix_keys, prefix_values = ([p[side][b % p[side].shape[0], h] for p in prefixes] for side in (0, 1))
                keys = torch.cat([*prefix_keys, k[b, h, seen]])
                values = torch.cat([*prefix_values, v[b, h, seen]])
                if len(keys) == 0:
                    rows.append(torch.zeros_like(q[b, h, i]))
                    continue
                logits = keys @ q[b, h, i] * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
                if bias is not None:
                    token_bias = bias[b % bias.shape[0], h % bias.shape[1], i, seen]
                    logits = logits + torch.cat([token_bias.new_zeros(len(keys) - len(seen)), token_bias])
                weights = (logits - logits.max()).exp()
                rows.append(weights @ values / weights.sum())
    return torch.stack(rows).view_as(q)


def leaves(q, k, v, prefixes, bias=None):
    return [q, k, v, *(t for pair in prefixes for t in pair), *([] if bias is None else [bias])]


def assert_equal_with_gradients(got, expected, inputs):
    torch.testing.assert_close(got, expected, **TOLERANCE)
    upstream = torch.randn_like(expected)
    grads = [torch.autograd.grad((out * upstream).sum(), inputs) for out in (got, expected)]
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_replaces_the_default(impl):
    torch.manual_seed(3)
    q, k, v, prefixes = make_inputs((1, BATCH))
    got = functional.prompt_attention(q, k, v, prefixes, scale=0.7, impl=impl)
    torch.testing.assert_close(got, dense(q, k, v, prefixes, scale=0.7), **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias_kind", ["no bias", "bias"])
def test_a_query_without_visible_key_gives_zeros_and_zero_gradients(impl, bias_kind):
    torch.manual_seed(4)
    q, k, v, _ = make_inputs()
    prefixes = [tuple(randn(1, HEADS, 0, HEAD_DIM) for _ in range(2))]
    bias = randn(1, HEADS, QUERIES, QUERIES) if bias_kind == "bias" else None
    mask = make_padding()
    mask[1] = False
    got = functional.prompt_attention(q, k, v, prefixes, is_causal=True, key_padding_mask=mask, bias=bias, impl=impl)
    assert torch.count_nonzero(got[1]) == 0
    assert_equal_with_gradients(got, dense(q, k, v, [], True, mask, bias), leaves(q, k, v, [], bias))
    again = functional.prompt_attention(q, k, v, prefixes, is_causal=True, key_padding_mask=mask, bias=bias, impl=impl)
    again.backward(torch.randn_like(again))
    assert all(torch.count_nonzero(t.grad[1]) == 0 for t in (q, k, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_sees_the_prefix_where_every_token_is_padding(impl):
    torch.manual_seed(5)
    q, k, v, prefixes = make_inputs((1, BATCH))
    mask = torch.zeros(BATCH, QUERIES, dtype=torch.bool)
    got = functional.prompt_attention(q, k, v, prefixes, key_padding_mask=mask, impl=impl)
    assert_equal_with_gradients(got, dense(q, k, v, prefixes, mask=mask), leaves(q, k, v, prefixes))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("prefix_batches", [(), (1, BATCH)], ids=str)
def test_garbage_in_padded_keys_and_values_changes_nothing(prefix_batches, impl):
    torch.manual_seed(6)
    q, k, v, prefixes = make_inputs(prefix_batches)
    mask = make_padding()
    clean = functional.prompt_attention(q, k, v, prefixes, key_padding_mask=mask, impl=impl)
    padded = ~mask[:, None, :, None]
    garbage = [t.detach().masked_fill(padded, 1e30) for t in (k, v)]
    assert torch.equal(functional.prompt_attention(q, *garbage, prefixes, key_padding_mask=mask, impl=impl), clean)
    clean.backward(torch.randn_like(clean))
    assert all(torch.count_nonzero(t.grad.masked_fill(~padded, 0.0)) == 0 for t in (k, v))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_in_its_own_sample(impl):
    torch.manual_seed(7)
    q, k, v, prefixes = make_inputs((1, BATCH))
    clean = functional.prompt_attention(q, k, v, prefixes, impl=impl)
    poisoned = v.detach().clone()
    poisoned[2] = float("nan")
    out = functional.prompt_attention(q, k, poisoned, prefixes, impl=impl)
    assert out[2].isnan().all()
    others = [0, 1, 3]
    torch.testing.assert_close(out[others], clean[others], **TOLERANCE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_has_the_queries_dtype(impl, dtype):
    torch.manual_seed(8)
    q, k, v, prefixes = make_inputs((1, BATCH))
    truth = functional.prompt_attention(q, k, v, prefixes, impl="reference")
    low = [t.to(dtype) for t in (q, k, v)]
    got = functional.prompt_attention(*low, [tuple(t.to(dtype) for t in pair) for pair in prefixes], impl=impl)
    assert got.dtype == dtype
    # inputs of size 1 are rounded to eps, weights add up to one
    assert (got - truth).abs().max() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a.update(q=a["q"][0]), ValueError, r"q must be \(B, H, S, Dh\), got \(3, 5, 8\)"),
        (lambda a: a.update(k=a["k"].long()), TypeError, r"k must have a floating-point dtype, got torch.int64"),
        (lambda a: a.update(v=None), TypeError, r"v must be a torch.Tensor, got NoneType"),
        (lambda a: a.update(k=a["k"][:, :2], v=a["v"][:, :2]), ValueError, "heads as q, or a divisor .*: q has 3 heads, k 2, v 2"),
        (lambda a: a.update(k=a["k"][:, :1], v=a["v"][:, :1]), ValueError, r"prefix 0 must be .*\(4 or 1, 1, P, 8\), got \(1, 3"),
        (lambda a: a.update(window=3), TypeError, r"window must be a pair \(left, right\) of integers or None for no limit, got 3"),
        (lambda a: a.update(window=(1, 2.0)), TypeError, r"window must be a pair .* got \(1, 2.0\)"),
        (lambda a: a.update(window=(-1, 0)), ValueError, r"window must have limits >= 0, or None for no limit, got \(-1, 0\)"),
        (lambda a: a.update(v=a["v"][:, :, :2]), ValueError, r"k and v must be .* k \(4, 3, 5, 8\), v \(4, 3, 2, 8\)"),
        (lambda a: a.update(k=a["k"][:1], v=a["v"][:1]), ValueError, r"k and v must be .* k \(1, 3, 5, 8\)"),
        (lambda a: a.update(is_causal=torch.tensor(True)), TypeError, r"is_causal must be True or False, got a tensor"),
        (lambda a: a.update(prefixes=a["prefixes"] * 3), ValueError, r"at most two \(key, value\) pairs, got 3: concatenate"),
        (lambda a: a.update(prefixes=[(a["k"][:2], a["v"][:2])]), ValueError, r"prefix 0 must be .*got \(2, 3, 5, 8\) and"),
        (lambda a: a.update(prefixes=[(a["k"], a["v"][..., :2])]), ValueError, r"prefix 0 must be .* and \(4, 3, 5, 2\)"),
        (lambda a: a.update(prefixes=[(a["k"][0], a["v"][0])]), ValueError, r"prefix 0 must be .*got \(3, 5, 8\)"),
        (lambda a: a.update(key_padding_mask=make_padding().long()), ValueError, r"key_padding_mask must be bool.*got torch.int64"),
        (lambda a: a.update(key_padding_mask=make_padding()[:, :2]), ValueError, r"key_padding_mask must be .*\(4, 5\).*\(4, 2\)"),
        (lambda a: a.update(bias=torch.zeros(5, 5)), ValueError, r"bias must be .*got \(5, 5\)"),
        (lambda a: a.update(bias=torch.zeros(1, 2, 5, 5)), ValueError, r"bias must be .*got \(1, 2, 5, 5\)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named_with_what_was_got(change, error, message):
    q, k, v, prefixes = make_inputs((1,))
    arguments = {"q": q, "k": k, "v": v, "prefixes": prefixes}
    change(arguments)
    with pytest.raises(error, match=message):
        functional.prompt_attention(**arguments)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("extras", [(), ("padding",), ("bias",), ("padding", "bias")], ids=str)
def test_a_masked_prefix_is_as_if_its_hidden_rows_were_not_there(impl, is_causal, extras):
    q, k, v = (torch.randn(3, 2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    shared = tuple(torch.randn(1, 2, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ragged = tuple(torch.randn(3, 2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    there = torch.tensor([[True, True, False, True], [False] * 4, [True] * 4])
    options = {"is_causal": is_causal, "impl": impl}
    if "padding" in extras:
        options["key_padding_mask"] = torch.tensor([[True] * 5, [True, True, False, False, True], [True] * 3 + [False] * 2])
    if "bias" in extras:
        options["bias"] = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    out = functional.prompt_attention(q, k, v, [shared, (*ragged, there)], **options)
    rows = []
    for i in range(3):
        one = {name: value[i : i + 1] if name == "key_padding_mask" else value for name, value in options.items()}
        prefix = tuple(part[i : i + 1, :, there[i]] for part in ragged)
        rows.append(functional.prompt_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], [shared, prefix], **one))
    expected, upstream = torch.cat(rows), torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves = [q, k, v, *shared, *ragged]
    grads = [torch.autograd.grad((x * upstream).sum(), leaves) for x in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    assert not grads[0][-1][1].any()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(3, 4), TypeError, "the mask of prefix 0 must be a bool tensor, got torch.float32"),
        ([True], TypeError, "the mask of prefix 0 must be a bool tensor, got list"),
        (torch.ones(3, 5, dtype=torch.bool), ValueError, r"mask of prefix 0 must be \(3 or 1, 4\), True = present; got \(3, 5\)"),
        (torch.ones(2, 4, dtype=torch.bool), ValueError, r"the mask of prefix 0 must be \(3 or 1, 4\)"),
    ],
)
def test_a_wrong_prefix_mask_is_named(mask, error, message):
    q, pair = torch.randn(3, 2, 5, 8), torch.randn(2, 3, 2, 4, 8)
    with pytest.raises(error, match=message):
        functional.prompt_attention(q, q, q, [(*pair, mask)])


@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("impl", IMPLS)
def test_causal_attention_takes_any_finite_scale(impl, scale):
    q, k, v = make_inputs()[:3]
    out = functional.prompt_attention(q, k, v, is_causal=True, scale=scale, impl=impl)
    visible = torch.ones(QUERIES, QUERIES).tril().bool()
    expected = (q @ k.mT * scale).masked_fill(~visible, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(out, expected, **TOLERANCE)
