"""The registered op on the CPU: schema, fakes, autograd, compile, and what it refuses."""

import itertools
import math

import pytest
import torch
from op_calls import Silent, record_calls
from tiers import slow_but
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mope_fast import ReceptiveField, functional
from mope_fast.ops import prompt_attention as ops

pytestmark = pytest.mark.skipif(
    ops.INTERPRETED, reason="the plain CPU implementation; the interpreter's kernels have their own tests"
)

CPU = torch.device("cpu")
BATCH, HEADS, QUERIES, KEYS, HEAD_DIM = 3, 2, 5, 7, 6
LENGTHS = {"lp": 1, "text": 3, "empty": 0, "image": 2, "vp": 1}
INTERVALS = ReceptiveField(
    LENGTHS, {"lp": ["lp", "text"], "text": ["text"], "empty": ["lp"], "image": ["text", "image", "vp"], "vp": []}
)
GAPS = ReceptiveField(LENGTHS, {"lp": ["lp", "vp"], "text": ["text", "vp"], "empty": [], "image": ["lp", "image"], "vp": []})
NAMES = ("q", "k", "v", "pk0", "pv0", "pk1", "pv1", "field", "padding", "bias")

PROBLEMS = {
    "plain": {},
    "a shared prefix": {"prefixes": [1]},
    "both prefixes": {"prefixes": [1, BATCH]},
    "both prefixes the other way round, bias": {"prefixes": [BATCH, 1], "bias": (1, HEADS)},
    "everything": {"prefixes": [1, BATCH], "padding": True, "bias": (BATCH, 1), "window": (None, 0)},
    "a window": {"window": (2, 1)},
    "shared keys, a window, masked prefixes, bias": {
        "key_heads": 1,
        "prefixes": [BATCH, 1],
        "padding": "all",
        "window": (1, 2),
        "bias": (1, HEADS),
    },
    "shared keys, gaps": {"key_heads": 1, "field": GAPS},
    "padding, bias": {"padding": True, "bias": (1, 1)},
    "intervals": {"field": INTERVALS},
    "gaps, padding, bias": {"field": GAPS, "padding": True, "bias": (BATCH, HEADS)},
}
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def make_inputs(
    dtype=torch.float64,
    *,
    prefixes=(),
    padding=False,
    bias=None,
    field=None,
    window=None,
    permuted=False,
    batch=BATCH,
    key_heads=HEADS,
) -> dict[str, Tensor | None]:
    """Leaves by the names of the op's arguments, without ``window``: a problem can be unpacked whole."""

    def normal(*shape):
        values = torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))) if permuted else torch.randn(*shape)
        return values.to(dtype).requires_grad_()

    queries = KEYS if field is not None else QUERIES
    inputs = {"q": normal(batch, HEADS, queries, HEAD_DIM)}
    inputs |= {name: normal(batch, key_heads, KEYS, HEAD_DIM) for name in ("k", "v")}
    for i in range(2):
        for side in ("pk", "pv"):
            inputs[f"{side}{i}"] = normal(prefixes[i], key_heads, i + 2, HEAD_DIM) if i < len(prefixes) else None
    inputs["field"] = None if field is None else field.lowered(CPU)
    inputs["padding"] = None
    if padding:  # a hole in the middle of the first sample, nothing but padding in the last
        inputs["padding"] = torch.arange(KEYS) < torch.tensor([KEYS, 4, 0])[:, None]
        inputs["padding"][0, 3] = False
    if padding == "all":  # of all keys: nothing is there for the last sample
        there = torch.tensor([[True, False, True, True, False], [False] * 2 + [True] * 3, [False] * 5])
        inputs["padding"] = torch.cat([there, inputs["padding"]], dim=1)
    inputs["bias"] = None if bias is None else normal(*bias, queries, KEYS)
    return inputs


def leaves(inputs) -> list[Tensor]:
    return [t for name, t in inputs.items() if t is not None and name not in ("field", "padding")]


def detached(inputs) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in inputs.values()]


def limits(problem):
    return problem.get("window", (None, None))


def through_op(inputs, window=(None, None), scale=None) -> Tensor:
    q, k, v, pk0, pv0, pk1, pv1, field, padding, bias = inputs.values()
    prefixes = [pair for pair in ((pk0, pv0), (pk1, pv1)) if pair[0] is not None]
    return ops.prompt_attention(q, k, v, prefixes, field=field, window=window, key_padding_mask=padding, bias=bias, scale=scale)


def through_functional(inputs, problem, impl, scale=None) -> Tensor:
    q, k, v, pk0, pv0, pk1, pv1, _, padding, bias = inputs.values()
    masking = {"key_padding_mask": padding, "bias": bias, "scale": scale, "impl": impl}
    if "field" in problem:
        return functional.receptive_field_attention(q, k, v, problem["field"], **masking)
    prefixes = [pair for pair in ((pk0, pv0), (pk1, pv1)) if pair[0] is not None]
    if problem.get("padding") == "all":
        of_prefixes, masking["key_padding_mask"] = padding.split([padding.shape[1] - KEYS, KEYS], dim=1)
        lengths = [keys.shape[2] for keys, _ in prefixes]
        prefixes = [(*pair, mask) for pair, mask in zip(prefixes, of_prefixes.split(lengths, dim=1), strict=True)]
    return functional.prompt_attention(q, k, v, prefixes, window=problem.get("window"), **masking)


@problems
@pytest.mark.parametrize("scale", [None, 0.7])
def test_op_and_its_backward_equal_the_differentiated_reference(problem, scale):
    inputs = make_inputs(**problem)
    got = through_op(inputs, limits(problem), scale)
    expected = through_functional(inputs, problem, "reference", scale)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, leaves(inputs), upstream) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_results_have_the_dtypes_and_layout_of_their_inputs(dtype):
    inputs = make_inputs(dtype, **PROBLEMS["everything"])
    inputs["pk0"], inputs["pv0"], inputs["bias"] = (inputs[n].detach().float().requires_grad_() for n in ("pk0", "pv0", "bias"))
    out = through_op(inputs, (None, 0))
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out, leaves(inputs), torch.randn_like(out))
    for leaf, grad in zip(leaves(inputs), grads, strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)
    _, statistics = ops.prompt_attention_forward(*detached(inputs), 0.5, None, 0)
    assert statistics.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_statistics_are_the_largest_exponent_and_the_log_of_the_sum_in_base_2_infinite_where_nothing_is_seen():
    inputs = make_inputs(**PROBLEMS["padding, bias"])
    _, statistics = ops.prompt_attention_forward(*detached(inputs), 0.5, None, None)
    weights = (0.5 * inputs["q"] @ inputs["k"].mT + inputs["bias"]).masked_fill(~inputs["padding"][:, None, None, :], float("-inf"))
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(statistics[:2].sum(-1), weights[:2].exp().sum(-1).log2(), **exact)
    torch.testing.assert_close(statistics[:2, ..., 0], weights[:2].amax(-1) * math.log2(math.e), **exact)
    assert (statistics[2, ..., 0] == 0).all()
    assert (statistics[2, ..., 1] == float("inf")).all()


@problems
@pytest.mark.parametrize(("dtype", "permuted"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_opcheck_of_the_forward_op(problem, permuted, dtype):
    inputs = detached(make_inputs(dtype, **problem, permuted=permuted))
    torch.library.opcheck(ops.prompt_attention_forward, (*inputs, 0.4, *limits(problem)))


@pytest.mark.parametrize(
    "name", ["a shared prefix", "everything", "gaps, padding, bias", "shared keys, a window, masked prefixes, bias"]
)
@pytest.mark.parametrize(("dtype", "permuted"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize(
    "needs",
    [
        [True] * 6,
        [True, False, False, False, False, False],
        [False, False, True, False, False, False],
        [False, False, False, True, True, False],
        [False, False, False, False, False, True],
    ],
    ids=lambda needs: "".join(map(str, map(int, needs))),
)
def test_opcheck_of_the_backward_op(name, permuted, dtype, needs):
    problem = PROBLEMS[name]
    inputs = detached(make_inputs(dtype, **problem, permuted=permuted))
    window = limits(problem)
    out, statistics = ops.prompt_attention_forward(*inputs, 0.4, *window)
    grad_out = torch.randn(HEAD_DIM, *inputs[0].shape[:3]).permute(1, 2, 3, 0).to(dtype) if permuted else torch.randn_like(out)
    torch.library.opcheck(ops.prompt_attention_backward, (grad_out, *inputs, out, statistics, 0.4, *window, needs))


@problems
def test_gradcheck(problem):
    inputs = make_inputs(**problem)
    names = [name for name, t in inputs.items() if t is not None and name not in ("field", "padding")]

    def function(*values):
        return through_op({**inputs, **dict(zip(names, values, strict=True))}, limits(problem))

    assert torch.autograd.gradcheck(function, leaves(inputs), fast_mode=True)


def test_gradcheck_of_every_element():
    inputs = {name: None if t is None else t[..., :2, :2] for name, t in make_inputs(prefixes=[1], batch=2).items()}
    inputs = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    names = [name for name, t in inputs.items() if t is not None]
    assert torch.autograd.gradcheck(lambda *t: through_op({**inputs, **dict(zip(names, t, strict=True))}), leaves(inputs))


SINGLE = [("q",), ("k",), ("v",), ("pk0",), ("pv0",), ("pk1",), ("pv1",), ("bias",)]


@pytest.mark.parametrize("needs", [*SINGLE, ("q", "pv0"), ("pk0", "pv0", "pk1", "pv1"), ("v", "bias")], ids=" ".join)
def test_only_needed_gradients_are_computed(needs, monkeypatch):
    inputs = make_inputs(prefixes=[1, BATCH], bias=(1, 1))
    upstream = torch.randn_like(inputs["q"])
    full = dict(zip((*NAMES[:7], "bias"), torch.autograd.grad(through_op(inputs), leaves(inputs), upstream), strict=True))
    calls = record_calls(monkeypatch, ops, "prompt_attention_backward")
    for name in full:
        inputs[name].requires_grad_(name in needs)
    through_op(inputs).backward(upstream)
    for name, grad in full.items():
        assert (inputs[name].grad is not None) == (name in needs)
        if name in needs:
            torch.testing.assert_close(inputs[name].grad, grad, rtol=1e-12, atol=1e-12)
    prefix0, prefix1 = (any(n in needs for n in pair) for pair in (("pk0", "pv0"), ("pk1", "pv1")))
    [(arguments, results)] = calls
    assert arguments[-1] == [*(n in needs for n in ("q", "k", "v")), prefix0, prefix1, "bias" in needs]
    tokens = "k" in needs or "v" in needs
    assert [grad.numel() > 0 for grad in results] == ["q" in needs, tokens, tokens, prefix0, prefix1, "bias" in needs]


def test_without_a_gradient_of_the_output_none_is_computed(monkeypatch):
    inputs = make_inputs(prefixes=[1])
    out = Silent.apply(through_op(inputs))
    monkeypatch.delattr(ops, "prompt_attention_backward")
    out.backward(torch.randn_like(out))
    assert all(leaf.grad is None for leaf in leaves(inputs))


def step(function, batch, problem=None):
    """Output and gradients of one forward and backward at a batch size, with the same numbers for each function."""
    torch.manual_seed(batch)
    problem = problem or {}
    sizes = {"batch": batch, "prefixes": [1, batch], **problem}
    inputs = make_inputs(torch.float32, **{name: value for name, value in sizes.items() if name != "window"})
    inputs["padding"] = torch.rand(batch, KEYS) < 0.7
    out = function(inputs)
    return [out, *torch.autograd.grad(out, leaves(inputs), torch.randn_like(out))]


def check_compiled(function, problem):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    step(compiled, 4, problem)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (7, 32):
            for a, b in zip(step(compiled, batch, problem), step(function, batch, problem), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [(None, None), (2, 1)])
def test_the_op_compiles_in_one_graph_without_recompiling_for_a_new_batch(window):
    check_compiled(lambda inputs: through_op(inputs, window), {"bias": (1, HEADS), "window": window})


@pytest.mark.parametrize("field", [INTERVALS, GAPS], ids=["intervals", "gaps"])
def test_the_op_compiles_with_a_field(field):
    def function(inputs):
        return through_op({**inputs, "field": field.lowered(inputs["q"].device)})

    check_compiled(function, {"prefixes": [], "field": field})


@pytest.mark.parametrize(
    ("impl", "bias"),
    slow_but([("auto", (1, HEADS))], [("auto", (1, HEADS)), ("sdpa", None), ("reference", (1, HEADS))]),
)
def test_prompt_attention_compiles_in_one_graph_without_recompiling_for_a_new_batch(impl, bias):
    for window in (None, (None, 0), (2, 1)):
        problem = {"bias": bias, "window": window}
        check_compiled(lambda inputs, problem=problem: through_functional(inputs, problem, impl), problem)


@pytest.mark.parametrize(
    ("impl", "field"),
    slow_but([("auto", INTERVALS)], [("auto", INTERVALS), ("sdpa", GAPS), ("reference", INTERVALS)]),
    ids=lambda value: {INTERVALS: "intervals", GAPS: "gaps"}.get(value, value),
)
def test_receptive_field_attention_compiles_in_one_graph_without_recompiling_for_a_new_batch(impl, field):
    problem = {"prefixes": [], "field": field, "bias": (1, 1)}
    check_compiled(lambda inputs: through_functional(inputs, problem, impl), problem)


@pytest.mark.parametrize("field", [INTERVALS, GAPS], ids=["intervals", "gaps"])
@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("used_before", [False, True])
def test_receptive_field_attention_takes_fake_tensors(impl, field, used_before):
    field = ReceptiveField(dict(zip(field.groups, field.lengths, strict=True)), dict(zip(field.groups, field.visible, strict=True)))
    q = torch.randn(2, HEADS, KEYS, HEAD_DIM)
    if used_before:
        functional.receptive_field_attention(q, q, q, field, impl=impl)
    with FakeTensorMode():
        fake = torch.empty(2, HEADS, KEYS, HEAD_DIM)
        assert functional.receptive_field_attention(fake, fake, fake, field, impl=impl).shape == fake.shape
    functional.receptive_field_attention(q, q, q, field, impl=impl)


def test_raw_ops_refuse_inputs_that_require_grad():
    for name in ("q", "pv1", "bias"):
        inputs = make_inputs(**PROBLEMS["everything"])
        for leaf in leaves(inputs):
            leaf.requires_grad_(False)
        inputs[name].requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"raw op has no gradient: call mope_fast\.functional\.prompt_attention"):
            ops.prompt_attention_forward(*inputs.values(), 0.5, None, 0)
        with torch.no_grad():
            out, statistics = ops.prompt_attention_forward(*inputs.values(), 0.5, None, 0)
        with pytest.raises(RuntimeError, match=r"prompt_attention_backward got an input that requires grad"):
            ops.prompt_attention_backward(torch.randn_like(out), *inputs.values(), out, statistics, 0.5, None, 0, [True] * 6)


@pytest.mark.parametrize("upstream", ["constant", "of the output"])
def test_a_second_derivative_raises(upstream):
    inputs = make_inputs(**PROBLEMS["everything"])
    out = through_op(inputs, (None, 0))
    out = out if upstream == "constant" else out.square()
    (grad,) = torch.autograd.grad(out, inputs["q"], torch.randn_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.backward(torch.randn_like(grad))


def test_forward_mode_raises():
    inputs = make_inputs()
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(lambda q: through_op({**inputs, "q": q}), (inputs["q"],), (inputs["q"],))


def test_vmap_raises():
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda q: through_op({**inputs, "q": q[None], "k": inputs["k"][:1], "v": inputs["v"][:1]}))(inputs["q"])


@pytest.mark.parametrize("name", ["both prefixes", "padding, bias", "gaps, padding, bias"])
def test_the_reference_takes_second_derivatives(name):
    problem = PROBLEMS[name]
    inputs = make_inputs(**problem)
    names = [name for name, t in inputs.items() if t is not None and name not in ("field", "padding")]

    def function(*values):
        return through_functional({**inputs, **dict(zip(names, values, strict=True))}, problem, "reference")

    assert torch.autograd.gradgradcheck(function, leaves(inputs), fast_mode=True)


@pytest.mark.parametrize("problem", [{"prefixes": [1, 0], "bias": (1, 1)}, {"field": INTERVALS}, {"field": GAPS}])
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(problem):
    inputs = make_inputs(**problem, batch=0)
    out = through_op(inputs)
    assert out.shape == inputs["q"].shape
    grads = torch.autograd.grad(out, leaves(inputs), torch.randn_like(out))
    for leaf, grad in zip(leaves(inputs), grads, strict=True):
        assert grad.shape == leaf.shape
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize(("first", "second"), list(itertools.product([1, BATCH], repeat=2)))
def test_a_prefix_of_one_for_all_equals_its_copies(first, second):
    inputs = make_inputs(prefixes=[first, second])
    copies = {
        name: t if t is None or not name.startswith("p") else t.detach().expand(BATCH, -1, -1, -1).requires_grad_()
        for name, t in inputs.items()
    }
    upstream = torch.randn_like(inputs["q"])
    got, expected = (torch.autograd.grad(through_op(each), leaves(each), upstream) for each in (inputs, copies))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.sum_to_size(a.shape), rtol=1e-12, atol=1e-12)
