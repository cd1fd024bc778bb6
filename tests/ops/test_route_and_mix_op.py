"""The registered op on the CPU: schema, fakes, autograd, compile, autocast, and what it refuses."""

import pytest
import torch
from op_calls import record_calls
from torch import Tensor

from mope_fast import functional
from mope_fast.ops import route_and_mix as ops

pytestmark = pytest.mark.skipif(
    ops.INTERPRETED, reason="the plain CPU implementation; the interpreter's kernels have their own tests"
)

GATES = [(None, False), (2, False), (2, True)]


def make_inputs(dtype=torch.float64, *, gram=True, permuted=False) -> dict[str, Tensor | None]:
    basis = torch.randn(2, 5, 8, dtype=torch.float64)
    inputs = {
        "logits": torch.randn(4, 5),
        "experts": torch.randn(5, 2, 6),
        "noise": torch.randn(4, 5) / 8,
        "gram": basis @ basis.mT / 8 if gram else None,
    }
    if permuted:
        inputs["logits"] = torch.randn(5, 4).T
        inputs["experts"] = torch.randn(6, 5, 2).permute(1, 2, 0)
    inputs = {name: None if value is None else value.to(dtype) for name, value in inputs.items()}
    for name in ("logits", "experts", "gram"):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    return inputs


def through_op(logits, experts, noise, gram, temperature=0.1, top_k=None, renormalize=False):
    return ops.route_and_mix(logits, experts, noise, gram, temperature, top_k, renormalize, 1e-5, experts.dtype)


@pytest.mark.parametrize(("top_k", "renormalize"), GATES)
@pytest.mark.parametrize("gram", [False, True, "below 0"])
@pytest.mark.parametrize("upstream", ["both", "mixed", "scores"])
def test_op_and_its_backward_equal_the_differentiated_reference(top_k, renormalize, gram, upstream):
    inputs = make_inputs(gram=gram)
    if gram == "below 0":  # in the first of both rows
        inputs["gram"] = (inputs["gram"].detach() - torch.eye(5) * torch.tensor([9.0, 0.0])[:, None, None]).requires_grad_()
    leaves = [value for name, value in inputs.items() if name != "noise" and value is not None]
    results = []
    for function in (
        lambda: through_op(**inputs, top_k=top_k, renormalize=renormalize),
        lambda: functional.route_and_mix(**inputs, top_k=top_k, renormalize=renormalize, impl="reference"),
    ):
        outputs = [o for o, name in zip(function(), ("mixed", "scores"), strict=True) if upstream in ("both", name)]
        torch.manual_seed(1)
        grads = torch.autograd.grad(outputs, leaves, [torch.randn_like(o) for o in outputs], allow_unused=True)
        results.append([*outputs, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(permuted, gram, dtype):
    inputs = {k: None if v is None else v.detach() for k, v in make_inputs(dtype, gram=gram, permuted=permuted).items()}
    args = (inputs["logits"], inputs["experts"], inputs["noise"], inputs["gram"], 0.1, 3, False, 1e-5, dtype)
    torch.library.opcheck(ops.route_and_mix_forward, args)
    mixed, scores, rstd = ops.route_and_mix_forward(*args)
    for needs in ([True, True, gram], [False, True, False], [True, False, False]):
        torch.library.opcheck(ops.route_and_mix_backward, (mixed, scores, *args[:4], scores, rstd, *args[4:8], needs))


def test_gradcheck():
    inputs = make_inputs()
    leaves = (inputs["logits"], inputs["experts"], inputs["gram"])
    assert torch.autograd.gradcheck(lambda x, e, g: through_op(x, e, inputs["noise"], g, temperature=1.0, top_k=3), leaves)


def test_only_needed_gradients_are_computed(monkeypatch):
    calls = record_calls(monkeypatch, ops, "route_and_mix_backward")
    inputs = make_inputs()
    inputs["experts"].requires_grad_(False)
    mixed, _ = through_op(**inputs)
    mixed.backward(torch.randn_like(mixed))
    assert [arguments[-1] for arguments, _ in calls] == [[True, False, True]]


@pytest.mark.parametrize("route", [through_op, functional.route_and_mix], ids=["op", "functional"])
def test_compiles_in_one_graph_without_recompiling_for_a_new_batch(route):
    inputs = make_inputs(torch.float32)
    compiled = torch.compile(route, fullgraph=True, dynamic=True, backend="aot_eager")

    def step(function, batch):
        values = dict(inputs, logits=torch.randn(batch, 5, requires_grad=True), noise=None)
        mixed, scores = function(**values)
        torch.manual_seed(2)
        grads = torch.autograd.grad(
            [mixed, scores], [values["logits"], values["experts"]], [torch.randn_like(mixed), torch.randn_like(scores)]
        )
        return [mixed, scores, *grads]

    torch.manual_seed(3)
    step(compiled, 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (7, 64):
            torch.manual_seed(batch)
            got = step(compiled, batch)
            torch.manual_seed(batch)
            for a, b in zip(got, step(route, batch), strict=True):
                torch.testing.assert_close(a, b)


def test_a_raw_op_refuses_inputs_that_require_grad():
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match=r"raw op has no gradient: call mope_fast\.functional\.route_and_mix"):
        ops.route_and_mix_forward(*inputs.values(), 0.1, None, False, 1e-5, torch.float64)
    with torch.no_grad():
        ops.route_and_mix_forward(*inputs.values(), 0.1, None, False, 1e-5, torch.float64)


@pytest.mark.parametrize("upstream", ["constant", "of the output"])
def test_a_second_derivative_raises(upstream):
    inputs = make_inputs()
    mixed, _ = through_op(**inputs)
    loss = (mixed if upstream == "constant" else mixed.square()).sum()
    (grad,) = torch.autograd.grad(loss, inputs["logits"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_forward_mode_raises():
    inputs = make_inputs()
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        torch.func.jvp(lambda x: through_op(x, inputs["experts"], None, None)[0], (inputs["logits"],), (inputs["logits"],))


def test_vmap_raises():
    inputs = make_inputs()
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: through_op(x[None], inputs["experts"], None, None)[0])(inputs["logits"])


def test_the_reference_takes_second_derivatives():
    inputs = make_inputs(gram=False)
    leaves = (inputs["logits"], inputs["experts"])
    assert torch.autograd.gradgradcheck(lambda x, e: functional.route_and_mix(x, e, temperature=1.0), leaves)


@pytest.mark.parametrize("route", ["op", "reference"])
@pytest.mark.parametrize("gram", [False, True])
def test_autocast_mixes_in_its_dtype_and_routes_in_float32(route, gram):
    inputs = make_inputs(torch.float32, gram=gram)
    with torch.autocast("cpu", torch.bfloat16):
        if route == "op":
            mixed, scores = ops.route_and_mix(*inputs.values(), 0.1, None, False, 1e-5, torch.bfloat16)
        else:
            mixed, scores = functional.route_and_mix(**inputs)
    plain_mixed, plain_scores = functional.route_and_mix(**inputs)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(scores, plain_scores), "the softmax is not autocast"
    torch.testing.assert_close(mixed.float(), plain_mixed, rtol=0.05, atol=0.02)
    mixed.backward(torch.randn_like(mixed))
    assert inputs["experts"].grad.dtype == inputs["logits"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_of_the_results(dtype):
    inputs = make_inputs(dtype)
    mixed, scores = functional.route_and_mix(**inputs)
    assert mixed.dtype == dtype
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


X, E = torch.zeros(4, 5), torch.zeros(5, 2, 6)
BAD_INPUTS = {
    "rank of logits": ((torch.zeros(4), E), {}, ValueError, r"logits must be \(B, K\), got \(4\)"),
    "rank of experts": ((X, torch.zeros(5, 6)), {}, ValueError, r"experts must be \(K, L, M\), got \(5, 6\)"),
    "number of experts": ((X, torch.zeros(3, 2, 6)), {}, ValueError, r"\(4, 5\) and experts \(3, 2, 6\) must have the same K"),
    "no expert": ((torch.zeros(4, 0), torch.zeros(0, 2, 6)), {}, ValueError, "K must be 1 to 1024, got 0"),
    "too many experts": ((torch.zeros(1, 1025), torch.zeros(1025, 1, 1)), {}, ValueError, "K must be 1 to 1024, got 1025"),
    "no prompt": ((X, torch.zeros(5, 0, 6)), {}, ValueError, r"L >= 1 and width M >= 1, got \(5, 0, 6\)"),
    "integer logits": ((X.long(), E), {}, TypeError, r"logits must have a floating-point dtype, got torch\.int64"),
    "not a tensor": (([[1.0]], E), {}, TypeError, r"logits must be a torch\.Tensor, got list"),
    "devices": ((X, E.to("meta")), {}, ValueError, "logits is on cpu and experts on meta: move them to one device"),
    "temperature 0": ((X, E), {"temperature": 0.0}, ValueError, r"temperature must be > 1e-30 and finite in float32, got 0\.0"),
    "temperature NaN": ((X, E), {"temperature": float("nan")}, ValueError, "> 1e-30 and finite in float32, got nan"),
    "temperature tensor": (
        (X, E),
        {"temperature": torch.tensor(0.1)},
        TypeError,
        "temperature must be a Python float, got a tensor",
    ),
    "temperature text": ((X, E), {"temperature": "a"}, TypeError, "temperature must be a Python float, got 'a'"),
    "top_k fraction": (
        (X, E),
        {"top_k": 1.5},
        ValueError,
        r"top_k must be 1 to the number of experts 5, or None for all; got 1\.5",
    ),
    "noise shape": (
        (X, E),
        {"noise": torch.zeros(4, 4)},
        ValueError,
        r"noise must have the shape of logits \(4, 5\), got \(4, 4\)",
    ),
    "noise grad": ((X, E), {"noise": torch.zeros(4, 5, requires_grad=True)}, ValueError, r"pass noise\.detach\(\)"),
    "top_k 0": ((X, E), {"top_k": 0}, ValueError, "top_k must be 1 to the number of experts 5, or None for all; got 0"),
    "top_k 6": ((X, E), {"top_k": 6}, ValueError, "top_k must be 1 to the number of experts 5, or None for all; got 6"),
    "renormalize": ((X, E), {"renormalize": True}, ValueError, "renormalize=True needs top_k"),
    "gram shape": ((X, E), {"gram": torch.zeros(5, 5)}, ValueError, r"gram must be \(L, K, K\) = \(2, 5, 5\), got \(5, 5\)"),
    "gram eps": ((X, E), {"gram": torch.zeros(2, 5, 5), "eps": 0.0}, ValueError, r"eps must be >= 1e-25 and .*, got 0\.0"),
    "unknown impl": ((X, E), {"impl": "cuda"}, ValueError, r"got impl='cuda', expected one of \['auto', 'triton', 'reference'\]"),
    "triton on CPU": (
        (X, E),
        {"impl": "triton"},
        RuntimeError,
        r"can't run on float32 tensors on cpu: .*Here it can run as \['reference'\]",
    ),
}


@pytest.mark.parametrize(("args", "settings", "error", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_gets_one_clear_error(args, settings, error, message):
    with pytest.raises(error, match=message):
        functional.route_and_mix(*args, **settings)


def test_the_environment_sets_the_default(monkeypatch):
    from mope_fast import _implementations

    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "triton")
    with pytest.raises(RuntimeError, match="impl='triton', which can't run on float32 tensors on cpu"):
        functional.route_and_mix(X, E)
    scores = torch.full((2, 4), 0.25)
    assert functional.importance_loss(scores) == 0, "a function without that implementation keeps its own choice"


def test_a_mistyped_environment_is_refused(monkeypatch):
    from mope_fast import _implementations

    monkeypatch.setattr(_implementations, "DEFAULT_IMPL", "trition")
    names = "'auto', 'cpu', 'reference', 'sdpa', 'triton', 'xformers'"
    with pytest.raises(RuntimeError, match=rf"MOPE_FAST_IMPL='trition', expected one of \[{names}\]"):
        functional.route_and_mix(X, E)
