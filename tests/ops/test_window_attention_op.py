"""The registered op of window_prompt_attention on the CPU: schema, fakes, autograd, compile, and what it refuses."""

import functools
import math

import pytest
import torch
from op_calls import Silent, record_calls
from tiers import slow_but
from torch import Tensor

from mope_fast import functional
from mope_fast.ops import cpu_window_attention
from mope_fast.ops import window_attention as ops

pytestmark = pytest.mark.skipif(
    ops.INTERPRETED, reason="the plain CPU implementation; the interpreter's kernels have their own tests"
)

BATCH, HEADS, HEAD_DIM = 3, 2, 6
IMAGE, WINDOW, SHIFT = (5, 4), (3, 2), (1, 1)
NAMES = ("qkv", "pk0", "pv0", "pk1", "pv1", "there", "bias", "pad")
FLOATS = tuple(name for name in NAMES if name != "there")
WINDOWS = {"window_size": WINDOW, "shift_size": SHIFT}
RAW = (list(WINDOW), list(SHIFT), 0.4)
"""What the raw op takes behind the tensors."""

PROBLEMS = {
    "no prefixes": {},
    "a shared prefix, padding": {"prefixes": [1], "pad": True},
    "both prefixes": {"prefixes": [1, BATCH]},
    "both prefixes the other way round, padding": {"prefixes": [BATCH, 1], "pad": True},
    "everything": {"prefixes": [1, BATCH], "masked": True, "pad": True},
}
EVERYTHING = PROBLEMS["everything"]
problems = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
NEEDS = pytest.mark.parametrize(
    "needs",
    [[True] * 5, *([i == j for j in range(5)] for i in range(5)), [False] * 5, [True, False, True, False, False]],
    ids=lambda needs: "".join(map(str, map(int, needs))),
)


def make_inputs(
    dtype=torch.float64, *, prefixes=(), masked=False, pad=False, permuted=False, batch=BATCH, image=IMAGE
) -> dict[str, Tensor | None]:
    """Leaves by the names of the op's arguments."""

    def normal(*shape):
        values = torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))) if permuted else torch.randn(*shape)
        return values.to(dtype).requires_grad_()

    inputs = dict.fromkeys(NAMES)
    inputs["qkv"] = normal(batch, *image, 3, HEADS, HEAD_DIM)
    for i, prefix_batch in enumerate(prefixes):
        inputs[f"pk{i}"], inputs[f"pv{i}"] = (normal(prefix_batch, HEADS, i + 2, HEAD_DIM) for _ in range(2))
    if masked:  # of both prefixes' 5 keys some in the middle of each image, none in the last
        inputs["there"] = (torch.arange(5) != torch.arange(batch)[:, None] + 1) & (torch.arange(batch) < batch - 1)[:, None]
    inputs["bias"] = normal(HEADS, math.prod(WINDOW), math.prod(WINDOW))
    inputs["pad"] = normal(3, HEADS, HEAD_DIM) if pad else None
    return inputs


def leaves(inputs) -> list[Tensor]:
    return [inputs[name] for name in FLOATS if inputs[name] is not None]


def detached(inputs) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in inputs.values()]


def prefixes_of(inputs) -> list:
    pairs = [(inputs[f"pk{i}"], inputs[f"pv{i}"]) for i in range(2) if inputs[f"pk{i}"] is not None]
    if inputs["there"] is None:
        return pairs
    return [(*pair, mask) for pair, mask in zip(pairs, inputs["there"].split([pk.shape[2] for pk, _ in pairs], 1), strict=True)]


def through_op(inputs, scale=None) -> Tensor:
    return ops.window_prompt_attention(
        inputs["qkv"], prefixes_of(inputs), inputs["bias"], **WINDOWS, pad_qkv=inputs["pad"], scale=scale
    )


def through_functional(inputs, impl, scale=None) -> Tensor:
    return functional.window_prompt_attention(
        inputs["qkv"], prefixes_of(inputs), inputs["bias"], **WINDOWS, pad_qkv=inputs["pad"], scale=scale, impl=impl
    )


def gradients(out, inputs, upstream):
    return torch.autograd.grad(out, leaves(inputs), upstream, materialize_grads=True)


@problems
@pytest.mark.parametrize("images", [1, 2, BATCH], ids="{} at once".format)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_op_and_its_backward_equal_the_differentiated_reference(problem, scale, images, monkeypatch):
    monkeypatch.setattr(cpu_window_attention, "_images_at_once", lambda batch, logits: images)
    inputs = make_inputs(**problem)
    got, expected = through_op(inputs, scale), through_functional(inputs, "reference", scale)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(expected)
    for a, b in zip(gradients(got, inputs, upstream), gradients(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_what_inference_mode_has_cached_serves_training_too():
    cpu_window_attention._rows.cache_clear()
    inputs = make_inputs(**EVERYTHING)
    with torch.inference_mode():
        expected = through_op(inputs)
    with torch.device("meta"):
        out = through_op(inputs)
    torch.testing.assert_close(out, expected.clone(), rtol=0, atol=0)
    assert all(grad.isfinite().all() for grad in gradients(out, inputs, torch.randn_like(out)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_results_have_the_dtypes_and_layout_of_their_inputs(dtype):
    inputs = make_inputs(dtype, **EVERYTHING)
    for name in ("pk0", "pv0", "bias", "pad"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    out = through_op(inputs)
    assert out.dtype == dtype
    assert out.is_contiguous()
    for leaf, grad in zip(leaves(inputs), gradients(out, inputs, torch.randn_like(out)), strict=True):
        assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)


@problems
@pytest.mark.parametrize(("dtype", "permuted"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_opcheck_of_the_forward_op(problem, permuted, dtype):
    torch.library.opcheck(ops.window_attention_forward, (*detached(make_inputs(dtype, **problem, permuted=permuted)), *RAW))


@NEEDS
@pytest.mark.parametrize("name", ["no prefixes", "a shared prefix, padding", "everything"])
@pytest.mark.parametrize(("dtype", "permuted"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_opcheck_of_the_backward_op(name, permuted, dtype, needs):
    inputs = detached(make_inputs(dtype, **PROBLEMS[name], permuted=permuted))
    grad_out = torch.randn(BATCH, *IMAGE, HEADS * HEAD_DIM).to(dtype)
    grad_out = grad_out.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) if permuted else grad_out
    torch.library.opcheck(ops.window_attention_backward, (grad_out, *inputs, *RAW, needs))


@problems
def test_gradcheck(problem):
    inputs = make_inputs(**problem)
    names = [name for name in FLOATS if inputs[name] is not None]

    def function(*values):
        return through_op({**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, leaves(inputs), fast_mode=True)


def test_gradcheck_of_every_element():
    inputs = make_inputs(prefixes=[1, 2], batch=2, pad=True, image=(2, 2))
    inputs = {name: None if t is None else t[..., :1, :2] if name in ("qkv", "pad") else t for name, t in inputs.items()}
    inputs |= {name: inputs[name][:, :1, :1, :2] for name in ("pk0", "pv0", "pk1", "pv1")}
    inputs["bias"] = inputs["bias"][:1]
    inputs = {name: None if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    names = [name for name in FLOATS if inputs[name] is not None]
    assert torch.autograd.gradcheck(lambda *t: through_op({**inputs, **dict(zip(names, t, strict=True))}), leaves(inputs))


ASKED = [*((name,) for name in FLOATS), ("qkv", "pv0"), ("pk0", "pv0", "pk1", "pv1"), ("bias", "pad")]


@pytest.mark.parametrize("needs", ASKED, ids=" ".join)
def test_only_needed_gradients_are_computed(needs, monkeypatch):
    inputs = make_inputs(**EVERYTHING)
    out = through_op(inputs)
    upstream = torch.randn_like(out)
    full = dict(zip(FLOATS, gradients(out, inputs, upstream), strict=True))
    calls = record_calls(monkeypatch, ops, "window_attention_backward")
    for name in full:
        inputs[name].requires_grad_(name in needs)
    through_op(inputs).backward(upstream)
    for name, grad in full.items():
        assert (inputs[name].grad is not None) == (name in needs)
        if name in needs:
            torch.testing.assert_close(inputs[name].grad, grad, rtol=1e-12, atol=1e-12)
    prefix0, prefix1 = (any(n in needs for n in pair) for pair in (("pk0", "pv0"), ("pk1", "pv1")))
    expected = ["qkv" in needs, prefix0, prefix1, "bias" in needs, "pad" in needs]
    [(arguments, results)] = calls
    assert arguments[-1] == expected
    assert [grad.numel() > 0 for grad in results] == expected


@problems
def test_the_arguments_are_all_that_is_kept_for_the_backward_pass(problem):
    inputs = make_inputs(torch.float32, **problem)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = through_op(inputs)
    given = {(t.data_ptr(), t.shape, t.stride()) for t in leaves(inputs)}
    masks = [t for t in kept if t.dtype == torch.bool]
    assert {(t.data_ptr(), t.shape, t.stride()) for t in kept if t.dtype != torch.bool} == given
    assert len(kept) == len(given) + len(masks)
    # one mask for both prefixes
    assert len(masks) == (inputs["there"] is not None)
    assert all(torch.equal(mask, inputs["there"]) for mask in masks)
    assert out.grad_fn is not None


def test_without_a_gradient_of_the_output_none_is_computed(monkeypatch):
    inputs = make_inputs(prefixes=[1])
    out = Silent.apply(through_op(inputs))
    monkeypatch.delattr(ops, "window_attention_backward")
    out.backward(torch.randn_like(out))
    assert all(leaf.grad is None for leaf in leaves(inputs))


def step(function, batch, image, problem):
    """Output and gradients of one forward and backward at a batch and image size, with the same numbers for each function."""
    torch.manual_seed(batch)
    prefixes = [1 if prefix == 1 else batch for prefix in problem.get("prefixes", ())]
    inputs = make_inputs(torch.float32, **{**problem, "prefixes": prefixes}, batch=batch, image=image)
    out = function(inputs)
    return [out, *gradients(out, inputs, torch.randn_like(out))]


def check_compiled(function, problem, warm, others):
    """After a step at each (batch, image) of ``warm`` those of ``others`` compile nothing."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, image in warm:
        step(compiled, batch, image, problem)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, image in others:
            for a, b in zip(step(compiled, batch, image, problem), step(function, batch, image, problem), strict=True):
                torch.testing.assert_close(a, b)


# sizes that no other dimension has, or torch takes them for one: the first warms up
PADDED = [(4, (7, 9)), (9, (7, 9)), (32, (10, 13)), (5, (13, 7))]
FITTING = [(9, (9, 8)), (11, (12, 7)), (7, (10, 14))]


@pytest.mark.parametrize(
    ("impl", "name"),
    slow_but([("op", "everything")], [("op", "everything"), ("op", "no prefixes"), ("reference", "both prefixes")]),
)
def test_it_compiles_in_one_graph_without_recompiling_for_a_new_batch_or_image_size(impl, name):
    function = through_op if impl == "op" else functools.partial(through_functional, impl=impl)
    check_compiled(function, PROBLEMS[name], PADDED[:1], PADDED[1:] + FITTING)


@pytest.mark.parametrize(
    ("impl", "name"),
    slow_but([("auto", "both prefixes")], [("auto", "both prefixes"), ("sdpa", "no prefixes"), ("sdpa", "everything")]),
)
def test_on_torchs_attention_another_batch_or_padded_image_size_compiles_nothing_anew(impl, name):
    """That has no padding to concatenate below, or on the right, where an image fits."""
    check_compiled(functools.partial(through_functional, impl=impl), PROBLEMS[name], PADDED[:1], PADDED[1:])


def test_raw_ops_refuse_inputs_that_require_grad():
    for name in FLOATS:
        inputs = make_inputs(**EVERYTHING)
        for leaf in leaves(inputs):
            leaf.requires_grad_(False)
        inputs[name].requires_grad_(True)
        with pytest.raises(RuntimeError, match=r"raw op has no gradient: call mope_fast\.functional\.window_prompt_attention"):
            ops.window_attention_forward(*inputs.values(), *RAW)
        with torch.no_grad():
            out = ops.window_attention_forward(*inputs.values(), *RAW)
        with pytest.raises(RuntimeError, match=r"window_prompt_attention_backward got an input that requires grad"):
            ops.window_attention_backward(torch.randn_like(out), *inputs.values(), *RAW, [True] * 5)


@pytest.mark.parametrize("upstream", ["constant", "of the output"])
def test_a_second_derivative_raises(upstream):
    inputs = make_inputs(**EVERYTHING)
    out = through_op(inputs)
    out = out if upstream == "constant" else out.square()
    (grad,) = torch.autograd.grad(out, inputs["qkv"], torch.randn_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.backward(torch.randn_like(grad))


def test_forward_mode_raises():
    inputs = make_inputs()
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(lambda qkv: through_op({**inputs, "qkv": qkv}), (inputs["qkv"],), (inputs["qkv"],))


def test_vmap_raises():
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda qkv: through_op({**inputs, "qkv": qkv[None]}))(inputs["qkv"])


@problems
@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_other_implementations_take_second_derivatives(problem, impl):
    inputs = make_inputs(**problem)
    names = [name for name in FLOATS if inputs[name] is not None]

    def function(*values):
        return through_functional({**inputs, **dict(zip(names, values, strict=True))}, impl)

    assert torch.autograd.gradgradcheck(function, leaves(inputs), fast_mode=True)


@pytest.mark.parametrize("problem", [{"prefixes": [1, 0]}, {"prefixes": [0, 1], "pad": True}, {}])
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(problem):
    inputs = make_inputs(**problem, batch=0)
    out = through_op(inputs)
    assert out.shape == (0, *IMAGE, HEADS * HEAD_DIM)
    for leaf, grad in zip(leaves(inputs), gradients(out, inputs, torch.randn_like(out)), strict=True):
        assert grad.shape == leaf.shape
        assert torch.count_nonzero(grad) == 0
    arguments = (*detached(inputs), *map(list, (WINDOW, SHIFT)), 0.4)
    torch.library.opcheck(ops.window_attention_backward, (out.detach(), *arguments, [True] * 5))


@pytest.mark.parametrize("impl", ["op", "sdpa", "reference"])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, BATCH), (BATCH, 1)])
def test_a_prefix_of_one_for_all_equals_its_copies(first, second, impl):
    inputs = make_inputs(prefixes=[first, second], pad=True)
    copies = {
        name: t if name[:2] not in ("pk", "pv") else t.detach().expand(BATCH, -1, -1, -1).requires_grad_()
        for name, t in inputs.items()
    }
    results = []
    upstream = torch.randn(BATCH, *IMAGE, HEADS * HEAD_DIM, dtype=torch.float64)
    for each in (inputs, copies):
        out = through_op(each) if impl == "op" else through_functional(each, impl)
        results.append([out, *gradients(out, each, upstream)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b.sum_to_size(a.shape), rtol=1e-12, atol=1e-12)
