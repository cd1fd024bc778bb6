"""The Triton kernels of route_and_mix, on a GPU or in Triton's interpreter."""

import itertools

import pytest
import torch
from harness import (
    CPU,
    assert_mixed_dtypes_are_right,
    assert_same_bits,
    changed,
    guarded,
    in_double,
    interpreted,
    mixed_dtypes,
    record_launches,
    sentinels,
    shuffle_programs,
    spread,
    through_a_cuda_graph,
)
from numerics import assert_as_good_as_eager
from tiers import slow_but
from torch import Tensor

from mope_fast.functional import route_and_mix

pytestmark = pytest.mark.kernel

GATES = [(None, False), (2, False), (2, True)]


def make_inputs(batch, experts, rows, width, dtype, device, *, gram=False, noise=False, seed=0) -> dict[str, Tensor | None]:
    """Random leaves, rounded to dtype; the Gram matrices are positive semi-definite, as real ones are."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    basis = torch.randn(rows, experts, 12, generator=generator)
    return {
        "logits": normal(batch, experts).requires_grad_(),
        "experts": normal(experts, rows, width).requires_grad_(),
        "noise": normal(batch, experts) / 8 if noise else None,
        "gram": (basis @ basis.mT / 12).to(torch.promote_types(dtype, torch.float32)).to(device).requires_grad_() if gram else None,
    }


def run(inputs, upstream, impl="triton", **settings) -> dict[str, Tensor]:
    """The outputs, and the gradient of each differentiable input by its name."""
    mixed, scores = route_and_mix(**inputs, impl=impl, **settings)
    leaves = {name: inputs[name] for name in ("logits", "experts", "gram") if inputs[name] is not None}
    upstream = [u.to(o.dtype) for u, o in zip(upstream, (mixed, scores), strict=True)]
    grads = torch.autograd.grad([mixed, scores], leaves.values(), upstream)
    return {"mixed": mixed, "scores": scores, **dict(zip(leaves, grads, strict=True))}


def check_against_truth(inputs, dtype, **settings):
    batch, experts, (rows, width) = *inputs["logits"].shape, inputs["experts"].shape[1:]
    device = inputs["logits"].device
    upstream = [torch.randn(batch, rows, width, device=device).to(dtype), torch.randn(batch, experts, device=device)]
    got, eager = (run(inputs, upstream, impl, **settings) for impl in ("triton", "reference"))
    truth = run(in_double(inputs), upstream, "reference", **settings)
    for name, value in got.items():
        # the scores and the Gram gradient are float32 even for 16-bit tables, but a 16-bit product is behind the gradients
        own = torch.float32 if name == "scores" and dtype != torch.float64 else dtype
        assert_as_good_as_eager(name, value, eager[name], truth[name], own)


@pytest.mark.parametrize(
    ("batch", "experts", "rows", "width", "dtype"),
    slow_but(
        [
            (40, 16, 6, 48, torch.bfloat16),
            (33, 7, 2, 34, torch.float32),
            (33, 7, 2, 34, torch.float16),
            (65, 33, 1, 130, torch.float32),
        ],
        [(*sizes, dtype) for sizes in ((40, 16, 6, 48), (33, 7, 2, 34)) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        + [(1, 1, 1, 1, torch.float32), (65, 33, 1, 130, torch.float32)],
    ),
    ids=str,
)
@pytest.mark.parametrize("gram", [False, True])
def test_outputs_and_gradients_are_as_good_as_eager(batch, experts, rows, width, dtype, gram, device):
    inputs = make_inputs(batch, experts, rows, width, dtype, device, gram=gram, noise=True)
    check_against_truth(inputs, dtype, top_k=None)


@pytest.mark.parametrize(("top_k", "renormalize"), GATES[1:])
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("experts", [5, 80])
def test_gates_are_as_good_as_eager(top_k, renormalize, gram, experts, device):
    inputs = make_inputs(48, experts, 2, 20, torch.float32, device, gram=gram, noise=True)
    check_against_truth(inputs, torch.float32, top_k=top_k, renormalize=renormalize)


def test_a_large_batch_is_split_and_added_in_float32(device, monkeypatch):
    """The split path of the experts' gradient, on sizes that the interpreter can carry."""
    from mope_fast.kernels import launch

    original = launch.mixture_grads_launch
    monkeypatch.setattr(launch, "mixture_grads_launch", lambda *args: original(*args)._replace(splits=3))
    check_against_truth(make_inputs(70, 6, 2, 20, torch.bfloat16, device), torch.bfloat16)


@interpreted
@pytest.mark.parametrize(
    ("gram", "top_k", "renormalize"),
    slow_but([(True, None, False), (True, 2, True)], [(gram, *gate) for gram in (False, True) for gate in GATES]),
)
def test_gradcheck_in_float64_goes_through_the_kernels(top_k, renormalize, gram):
    inputs = make_inputs(2, 3, 1, 2, torch.float64, CPU, gram=gram, noise=True)
    differentiable = [name for name in ("logits", "experts", "gram") if inputs[name] is not None]

    def function(*leaves):
        values = dict(inputs, **dict(zip(differentiable, leaves, strict=True)))
        # a temperature of 1 keeps the gate's order away from finite-difference steps
        return route_and_mix(**values, temperature=1.0, top_k=top_k, renormalize=renormalize, impl="triton")

    assert torch.autograd.gradcheck(function, [inputs[name] for name in differentiable], atol=1e-7)


@interpreted
@mixed_dtypes
@pytest.mark.parametrize("table", ["experts", "logits"])
def test_bfloat16_and_float64_meet(table, own, other):
    inputs = make_inputs(4, 5, 2, 20, other, CPU, gram=True, noise=True)
    inputs = changed(inputs, lambda name, t: t.to(own) if name == table else t)
    upstream = [torch.randn(4, 2, 20), torch.randn(4, 5)]
    assert_mixed_dtypes_are_right(inputs, lambda inputs, impl: run(inputs, upstream, impl))


def test_views_inside_nan_give_the_same_bits(device):
    inputs = make_inputs(5, 6, 2, 20, torch.float32, device, gram=True, noise=True)
    upstream = [torch.randn(5, 2, 20, device=device), torch.randn(5, 6, device=device)]
    views = changed(inputs, lambda name, t: guarded(t))
    assert_same_bits(run(views, [guarded(u) for u in upstream]), run(inputs, upstream))


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
def test_other_strides_give_the_same_bits(layout, device):
    inputs = make_inputs(4, 6, 3, 20, torch.float32, device)
    if layout == "transposed":
        views = {
            "logits": inputs["logits"].detach().T.contiguous().T.requires_grad_(),
            "experts": inputs["experts"].detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_(),
        }
    else:
        inputs["logits"] = inputs["logits"].detach()[:1].repeat(4, 1).requires_grad_()
        inputs["experts"] = inputs["experts"].detach()[:, :1].repeat(1, 3, 1).requires_grad_()
        views = {
            "logits": inputs["logits"].detach()[:1].expand(4, 6).requires_grad_(),
            "experts": inputs["experts"].detach()[:, :1].expand(6, 3, 20).requires_grad_(),
        }
    upstream = [torch.randn(4, 3, 20, device=device), torch.randn(4, 6, device=device)]
    assert_same_bits(run({**inputs, **views}, upstream), run(inputs, upstream))


def test_outputs_are_written_once_and_nothing_around_them_is(device, monkeypatch):
    inputs = make_inputs(5, 6, 2, 20, torch.float32, device, gram=True)
    upstream = [torch.randn(5, 2, 20, device=device), torch.randn(5, 6, device=device)]
    with sentinels(monkeypatch) as storages:
        run(inputs, upstream, top_k=3)
    assert len(storages) >= 7


@pytest.mark.parametrize("needs", [s for s in itertools.product([False, True], repeat=3) if any(s)], ids=str)
def test_only_asked_for_gradients_are_computed(needs, device, monkeypatch):
    from mope_fast.kernels import route_and_mix as kernels

    launches = record_launches(monkeypatch, kernels, ["mixture_grads_kernel", "router_grads_kernel"])
    inputs = make_inputs(4, 5, 2, 20, torch.float32, device, gram=True)
    names = ("logits", "experts", "gram")
    upstream = torch.randn(4, 2, 20, device=device)
    full = run(inputs, [upstream, torch.zeros(4, 5, device=device)])
    launches.clear()
    for name, need in zip(names, needs, strict=True):
        inputs[name].requires_grad_(need)
    mixed, _ = route_and_mix(**inputs, impl="triton")
    mixed.backward(upstream)
    for name, need in zip(names, needs, strict=True):
        assert (inputs[name].grad is not None) == need
        if need:
            torch.testing.assert_close(inputs[name].grad, full[name])
    expected = ["mixture_grads_kernel"] + (["router_grads_kernel"] if needs[0] or needs[2] else [])
    assert [name for name, _ in launches] == expected
    assert (launches[0][1]["grad_experts_ptr"] is not None) == needs[1]
    assert (launches[0][1]["du_ptr"] is not None) == (needs[0] or needs[2])
    assert all((arguments["grad_logits_ptr"] is not None) == needs[0] for _, arguments in launches[1:])


def test_a_gradient_of_the_scores_alone_reads_no_expert(device, monkeypatch):
    from mope_fast.kernels import route_and_mix as kernels

    monkeypatch.delattr(kernels, "mixture_grads_kernel")
    inputs = make_inputs(4, 5, 2, 20, torch.float32, device)
    upstream = torch.randn(4, 5, device=device)
    _, scores = route_and_mix(**inputs, impl="triton")
    (got,) = torch.autograd.grad(scores, inputs["logits"], upstream)
    _, scores = route_and_mix(**inputs, impl="reference")
    (expected,) = torch.autograd.grad(scores, inputs["logits"], upstream)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("gram", [False, True])
def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(gram, device):
    inputs = make_inputs(0, 5, 2, 20, torch.float32, device, gram=gram)
    got = run(inputs, [torch.zeros(0, 2, 20, device=device), torch.zeros(0, 5, device=device)])
    assert got["mixed"].shape == (0, 2, 20)
    assert got["scores"].shape == (0, 5)
    assert all((value == 0).all() for value in got.values())


@pytest.mark.parametrize(("top_k", "renormalize"), GATES)
@pytest.mark.parametrize("gram", [False, True])
def test_nan_stays_in_its_sample(top_k, renormalize, gram, device):
    inputs = make_inputs(5, 6, 2, 20, torch.float32, device, gram=gram)
    settings = {"top_k": top_k, "renormalize": renormalize, "impl": "triton"}
    clean, clean_scores = route_and_mix(**inputs, **settings)
    with torch.no_grad():
        inputs["logits"][2, 3] = float("nan")
    mixed, scores = route_and_mix(**inputs, **settings)
    others = [0, 1, 3, 4]
    assert torch.equal(mixed[others], clean[others])
    assert torch.equal(scores[others], clean_scores[others])
    assert mixed[2].isnan().all()
    (grad,) = torch.autograd.grad(mixed, inputs["logits"], torch.randn_like(mixed))
    assert grad[others].isfinite().all()
    assert grad[2].isnan().any()


def test_a_gate_of_all_experts_is_no_gate(device):
    inputs = make_inputs(4, 5, 2, 20, torch.float32, device)
    gated, plain = (route_and_mix(**inputs, top_k=k, impl="triton") for k in (5, None))
    assert all(torch.equal(a, b) for a, b in zip(gated, plain, strict=True))


@pytest.mark.parametrize("value", [1e4, -1e4, float("-inf")])
def test_extreme_logits(value, device):
    logits = torch.zeros(2, 4, device=device)
    logits[0, 1] = value
    experts = torch.randn(4, 2, 20, device=device)
    mixed, scores = route_and_mix(logits, experts, impl="triton")
    expected = torch.softmax(logits / 0.1, -1)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(mixed, torch.einsum("bk,klm->blm", expected, experts))


@pytest.mark.usefixtures("rowwise_products")
@pytest.mark.parametrize("gram", [False, True])
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(gram, device):
    inputs = make_inputs(37, 6, 2, 20, torch.float32, device, gram=gram, noise=True)
    mixed, scores = route_and_mix(**inputs, impl="triton")
    for b in (0, 15, 16, 36):
        one = dict(inputs, logits=inputs["logits"][b : b + 1], noise=inputs["noise"][b : b + 1])
        alone, alone_scores = route_and_mix(**one, impl="triton")
        assert torch.equal(alone[0], mixed[b])
        assert torch.equal(alone_scores[0], scores[b])


def test_three_runs_have_the_same_bits(device):
    inputs = make_inputs(40, 9, 2, 50, torch.bfloat16, device, gram=True, noise=True)
    upstream = [torch.randn(40, 2, 50, device=device), torch.randn(40, 9, device=device)]
    first, *others = [run(inputs, upstream) for _ in range(3)]
    for other in others:
        assert_same_bits(other, first)


@interpreted
@pytest.mark.slow
def test_programs_may_run_in_any_order_and_twice(monkeypatch):
    inputs = make_inputs(20, 6, 2, 50, torch.float32, CPU, gram=True, noise=True)
    upstream = [torch.randn(20, 2, 50), torch.randn(20, 6)]
    plain = run(inputs, upstream)
    orders = shuffle_programs(monkeypatch)
    got = run(inputs, upstream)
    assert max(map(len, orders)) >= 8, "the grid was shuffled"
    assert_same_bits(got, plain)


@pytest.mark.parametrize(
    ("name", "axis"),
    [("logits", 0), ("logits", 1), ("experts", 0), ("experts", 1), ("experts", 2), ("upstream", 0), ("upstream", 2)],
)
def test_addresses_past_2_31_elements(name, axis, device):
    inputs = make_inputs(3, 3, 3, 3, torch.float16, device)
    upstream = [torch.randn(3, 3, 3, device=device).half(), torch.randn(3, 3, device=device)]
    expected = run(inputs, upstream)
    tensors, key = (upstream, 0) if name == "upstream" else (inputs, name)
    (tensors[key],) = spread([tensors[key]], axis)
    assert_same_bits(run(inputs, upstream), expected)


def test_auto_takes_the_kernels(device, monkeypatch):
    from mope_fast.kernels import route_and_mix as kernels

    launches = record_launches(monkeypatch, kernels, ["mix_kernel"])
    route_and_mix(torch.randn(2, 3, device=device), torch.randn(3, 1, 4, device=device))
    assert len(launches) == 1


def test_autocast_reads_a_float32_table_and_mixes_in_bfloat16(device):
    inputs = make_inputs(4, 5, 2, 20, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        mixed, scores = route_and_mix(**inputs, impl="triton")
        eager, _ = route_and_mix(**inputs, impl="reference")
    assert mixed.dtype == torch.bfloat16
    assert scores.dtype == torch.float32
    truth, _ = route_and_mix(**in_double(inputs), impl="reference")
    assert_as_good_as_eager("mixed", mixed, eager, truth, torch.bfloat16)
    mixed.backward(torch.randn_like(mixed))
    assert inputs["experts"].grad.dtype == torch.float32


@pytest.mark.gpu
def test_captured_in_a_cuda_graph(device):
    inputs = make_inputs(64, 16, 6, 768, torch.bfloat16, device)
    upstream = [torch.randn(64, 6, 768, device=device), torch.randn(64, 16, device=device)]
    expected = run(inputs, upstream)
    assert_same_bits(through_a_cuda_graph(lambda: run(inputs, upstream)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "experts"), [(64, 16), (8192, 16), (512, 256), (64, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gram", [False, True])
def test_full_sizes_are_as_good_as_eager(batch, experts, dtype, gram, device):
    check_against_truth(make_inputs(batch, experts, 6, 768, dtype, device, gram=gram, noise=True), dtype)
