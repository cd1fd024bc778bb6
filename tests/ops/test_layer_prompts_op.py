"""The registered op of a layer's prompts, on the CPU: its reference differentiated, schema, fakes, compilation, autocast."""

import dataclasses
import functools

import pytest
import torch
from op_calls import record_calls
from torch import Tensor

from mope_fast import _dispatch, _implementations, reference
from mope_fast.modules.router import Router
from mope_fast.modules.tables import Tables
from mope_fast.ops import layer_prompts as ops

pytestmark = pytest.mark.skipif(ops.INTERPRETED, reason="the plain CPU implementation; the interpreter's kernels have their own")

BATCH, EXPERTS, LENGTH, WIDTH, DIM, OWN = 4, 5, 2, 6, 7, 3
TENSORS = ("feature", "cross", "weight", "keys", "experts", "before", "after", "gram", "shift")
FORMS = {
    "everything": (),
    "before of each sample, after of all": ("swapped",),
    "no norm": ("gram", "shift"),
    "routed alone": ("before", "after", "gram", "shift"),
}


def make_inputs(dtype=torch.float64, form="everything", batch=BATCH) -> dict[str, Tensor | None]:
    basis, left_out = torch.randn(LENGTH, EXPERTS, 8), FORMS[form]
    shapes = {
        "feature": (batch, DIM), "cross": (batch, EXPERTS), "weight": (OWN, DIM), "keys": (OWN, EXPERTS),
        "experts": (EXPERTS, LENGTH, WIDTH), "before": (1, 3, WIDTH), "after": (batch, 1, WIDTH), "shift": (WIDTH,),
    }  # fmt: skip
    if "swapped" in left_out:
        shapes |= {"before": (batch, 3, WIDTH), "after": (1, 1, WIDTH)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()} | {"gram": (basis @ basis.mT).transpose(0, 1) / 8}
    return {name: None if name in left_out else tensors[name].to(dtype).requires_grad_() for name in TENSORS}


def through_op(inputs, *, top_k=None, renormalize=False, dtype=None):
    gate = {"top_k": top_k, "renormalize": renormalize}
    return ops.layer_prompts(*inputs.values(), **gate, eps=1e-5, dtype=dtype or inputs["experts"].dtype)


def by_the_equations(feature, cross, weight, keys, experts, before, after, gram, shift):
    logits = cross + feature @ weight.T @ keys
    routed, _ = reference.route_and_mix(logits, experts, temperature=1.0, gram=None if gram is None else gram.transpose(0, 1))
    routed = routed if shift is None else routed + shift
    rows = [before, routed, after]
    return torch.cat([part.expand(len(feature), -1, -1) for part in rows if part is not None], dim=1), torch.softmax(logits, -1)


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_equations(form):
    inputs = make_inputs(form=form)
    for got, expected in zip(reference.layer_prompts(*inputs.values()), by_the_equations(**inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("top_k", "renormalize"), [(None, False), (2, False), (2, True)])
@pytest.mark.parametrize("upstream", ["both", "rows", "scores"])
def test_op_and_its_backward_equal_the_differentiated_reference(form, top_k, renormalize, upstream):
    inputs, gate = make_inputs(form=form), {"top_k": top_k, "renormalize": renormalize}
    leaves, results = [value for value in inputs.values() if value is not None], []
    for outputs in (through_op(inputs, **gate), reference.layer_prompts(*inputs.values(), **gate)):
        outputs = [o for o, name in zip(outputs, ("rows", "scores"), strict=True) if upstream in ("both", name)]
        torch.manual_seed(1)
        grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(o) for o in outputs], allow_unused=True)
        results.append([*outputs, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(form, dtype):
    tensors = [None if value is None else value.detach() for value in make_inputs(dtype, form).values()]
    settings = (2, False, 1e-5)
    torch.library.opcheck(ops.layer_prompts_forward, (*tensors, *settings, dtype))
    rows, scores, *saved = ops.layer_prompts_forward(*tensors, *settings, dtype)
    there = [tensor is not None for tensor in tensors]
    for needs in (there, [False] * 4 + there[4:], [True] + [False] * 8):
        torch.library.opcheck(ops.layer_prompts_backward, (rows, scores, *tensors, scores, *saved, *settings, needs))


def test_only_needed_gradients_are_computed(monkeypatch):
    calls = record_calls(monkeypatch, ops, "layer_prompts_backward")
    inputs = make_inputs()
    for name in ("experts", "cross"):
        inputs[name].requires_grad_(False)
    through_op(inputs)[0].sum().backward()
    assert [arguments[-1] for arguments, _ in calls] == [[name not in ("experts", "cross") for name in TENSORS]]


def test_a_second_derivative_raises_and_the_reference_has_one():
    inputs = make_inputs()
    (grad,) = torch.autograd.grad(through_op(inputs)[0].square().sum(), inputs["feature"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(reference.layer_prompts(*inputs.values())[0].square().sum(), inputs["feature"], create_graph=True)
    grad.sum().backward()


def test_compiles_in_one_graph_without_recompiling_for_a_new_batch():
    compiled = torch.compile(through_op, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7, 64):
        inputs = make_inputs(torch.float32, batch=batch)
        with torch._dynamo.config.patch(error_on_recompile=True):
            results = [
                (*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].square().sum(), list(inputs.values())))
                for outputs in (compiled(inputs), through_op(inputs))
            ]
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_under_autocast_tables_mix_in_its_dtype_and_route_in_float32(impl, monkeypatch):
    monkeypatch.setattr(_dispatch, "choose", lambda function, asked, problem: impl)
    feature, *router, experts, before, after, gram, shift = make_inputs(torch.float32).values()
    tables = Tables(before, after, Router(*router), experts, gram, shift)
    plain_rows, plain_scores = tables.mixed(feature)
    with torch.autocast("cpu", torch.bfloat16):
        rows, scores = tables.mixed(feature)
        # chosen before autocast began
        mixed, same = dataclasses.replace(tables, mix=functools.partial(reference.layer_prompts, dtype=torch.float32)).mixed(
            feature
        )
    assert rows.dtype == torch.bfloat16
    assert torch.equal(scores, plain_scores)
    assert torch.equal(same, plain_scores)
    torch.testing.assert_close(mixed, plain_rows)
    torch.testing.assert_close(rows.float(), plain_rows, rtol=0.05, atol=0.05)


def test_without_triton_it_is_the_reference():
    assert (
        _implementations.choose("route_and_mix", "auto", _implementations.Problem(torch.device("cpu"), torch.float32)) != "triton"
    )


def test_an_empty_batch():
    rows, scores = through_op(make_inputs(batch=0))
    assert rows.shape == (0, 3 + LENGTH + 1, WIDTH)
    assert scores.shape == (0, EXPERTS)
