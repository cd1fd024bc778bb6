"""A layer's prompts on Triton: router, mixture and the prompts beside it in one launch; on a GPU or in Triton's interpreter."""

import functools

import pytest
import torch
from harness import assert_all_close, assert_same_bits, changed, guarded, in_double, record_launches, transposed
from numerics import assert_as_good_as_eager
from op_recorder import Recorder
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mope_fast import reference
from mope_fast.ops import layer_prompts as ops
from mope_fast.ops.layer_prompts import layer_prompts

pytestmark = pytest.mark.kernel

NAMES = ("feature", "cross", "weight", "keys", "experts", "before", "after", "gram", "shift")
FORMS: dict[str, tuple[str, ...]] = {
    "everything": (),
    "before of each sample, after of all": ("swapped",),
    "no norm": ("gram", "shift"),
    "nothing behind": ("after",),
    "routed alone": ("before", "after", "gram", "shift"),
}
GATES = {"all": {}, "two": {"top_k": 2}, "two that add up to one": {"top_k": 2, "renormalize": True}}


def make_inputs(dtype, device, form="everything", *, batch=3, experts=5, length=2, width=20, dim=70, own=3, seed=0):
    """Leaves by name. ``gram`` is one of rows, as that of experts is."""
    generator, left_out = torch.Generator().manual_seed(seed), FORMS[form]

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device).requires_grad_()

    basis = torch.randn(length, experts, 8, generator=generator)
    inputs = {
        "feature": normal(batch, dim), "cross": normal(batch, experts), "weight": normal(own, dim, scale=dim**-0.5),
        "keys": normal(own, experts), "experts": normal(experts, length, width),
        "before": normal(batch if "swapped" in left_out else 1, 3, width),
        "after": normal(1 if "swapped" in left_out else batch, 1, width),
        "gram": ((basis @ basis.mT).transpose(0, 1) / 8).to(dtype).to(device).requires_grad_(), "shift": normal(width),
    }  # fmt: skip
    return {name: None if name in left_out else inputs[name] for name in NAMES}


def run(inputs, upstream, function=layer_prompts, **gate) -> dict[str, Tensor]:
    """Rows, scores, and the gradient of each input by its name."""
    settings = {"top_k": None, "renormalize": False, "eps": 1e-5, "dtype": inputs["experts"].dtype, **gate}
    rows, scores = function(*inputs.values(), **settings)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    upstream = [g.to(o.dtype) for g, o in zip(upstream, (rows, scores), strict=True)]
    grads = torch.autograd.grad(
        [rows, scores], leaves.values(), [g.to(o.dtype) for g, o in zip(upstream, (rows, scores), strict=True)]
    )
    return {"rows": rows, "scores": scores, **dict(zip(leaves, grads, strict=True))}


def random_upstream(inputs) -> tuple[Tensor, Tensor]:
    experts, (batch, _) = inputs["experts"], inputs["cross"].shape
    beside = sum(inputs[name].shape[1] for name in ("before", "after") if inputs[name] is not None)
    rows = torch.randn(batch, experts.shape[1] + beside, experts.shape[2], device=experts.device)
    return rows.to(experts.dtype), torch.randn(batch, experts.shape[0], device=experts.device)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
@pytest.mark.parametrize("form", FORMS)
def test_rows_scores_and_gradients_are_those_of_the_reference(form, gate, device):
    inputs = make_inputs(torch.float32, device, form)
    upstream = random_upstream(inputs)
    truth = run(in_double(inputs), upstream, reference.layer_prompts, **gate)
    got = run(inputs, upstream, **gate)
    assert_all_close(got, {name: tensor.float() for name, tensor in truth.items()}, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 37},
        {"experts": 70, "length": 1},
        {"own": 17},
        {"own": 1200},
        {"experts": 520, "length": 1, "dim": 8},
        {"dim": 1},
        {"width": 130, "dim": 8},
    ],
    ids=lambda sizes: " ".join(sizes),
)
def test_any_sizes_are_those_of_the_reference(sizes, device):
    inputs = make_inputs(torch.float32, device, **sizes)
    upstream = random_upstream(inputs)
    truth = run(in_double(inputs), upstream, reference.layer_prompts)
    assert_all_close(run(inputs, upstream), {name: t.float() for name, t in truth.items()}, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_rows_and_gradients_are_as_good_as_eager(dtype, device):
    inputs = make_inputs(dtype, device, batch=130, width=64)  # sums over the batch in two parts, which are float32
    upstream = random_upstream(inputs)
    truth = run(in_double(inputs), upstream, reference.layer_prompts)
    eager, got = run(inputs, upstream, reference.layer_prompts), run(inputs, upstream)
    for name, tensor in got.items():
        assert_as_good_as_eager(name, tensor.to(dtype), eager[name].to(dtype), truth[name], dtype)


def test_views_and_other_strides_give_the_same_bits(device):
    inputs = make_inputs(torch.float32, device)
    upstream = random_upstream(inputs)
    expected = run(inputs, upstream)
    tokens = torch.stack([inputs["feature"].detach(), torch.full_like(inputs["feature"], float("nan"))], dim=1)
    others = [changed(inputs, lambda name, t: guarded(t)), changed(inputs, lambda name, t: transposed(t))]
    for views in (*others, {**inputs, "feature": tokens[:, 0].requires_grad_()}):
        assert_same_bits(run(views, upstream), expected)


@pytest.mark.usefixtures("rowwise_products")
def test_a_sample_has_the_same_bits_alone_and_in_a_batch_and_keeps_its_nan(device):
    inputs = make_inputs(torch.float32, device, batch=20)
    upstream = random_upstream(inputs)
    together = run(inputs, upstream)
    of_sample = ("cross", "after")
    one = changed(inputs, lambda name, t: t[7:8] if name in ("feature", *of_sample) else t)
    alone = run(one, tuple(g[7:8] for g in upstream))
    for name in ("rows", "scores", *of_sample):
        assert torch.equal(alone[name][0], together[name][7]), name
    with torch.no_grad():
        inputs["feature"][7, 0] = float("nan")
    poisoned = run(inputs, upstream)
    others = [i for i in range(20) if i != 7]
    assert poisoned["rows"][7, 3:5].isnan().all()
    for name in ("rows", "scores", *of_sample):
        assert torch.equal(poisoned[name][others], together[name][others]), name


def test_a_forward_is_one_launch_and_a_backward_two(device, monkeypatch):
    """And no operation of torch's that computes."""
    from mope_fast.kernels import route_and_mix as kernels

    launches = record_launches(monkeypatch, kernels, ["mix_kernel", "mixture_grads_kernel", "router_grads_kernel"])
    inputs = make_inputs(torch.float32, device, batch=40)
    upstream = random_upstream(inputs)
    rows, scores = layer_prompts(*inputs.values(), top_k=None, renormalize=False, eps=1e-5, dtype=torch.float32)
    assert [name for name, _ in launches] == ["mix_kernel"]
    launches.clear()
    monkeypatch.setattr(ops, "layer_prompts_backward", ops._triton_backward)  # a recorder doesn't see what an op calls
    with Recorder() as recorder:
        torch.autograd.grad([rows, scores], inputs.values(), upstream)
    assert [name for name, _ in launches] == ["mixture_grads_kernel", "router_grads_kernel"]
    memory, of_interpreter = (
        {"empty_like", "new_empty", "transpose", "split_with_sizes", "slice", "detach"},
        {"set_", "empty", "copy_"},
    )
    assert set(recorder.names) <= memory | of_interpreter, recorder.names


def test_parts_of_a_batch_are_summed_behind_the_launches(device, monkeypatch):
    from mope_fast.kernels import launch

    for name in ("mixture_grads_launch", "router_grads_launch"):
        original = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *args, original=original: original(*args)._replace(splits=3))
    inputs = make_inputs(torch.float32, device, batch=70)
    upstream = random_upstream(inputs)
    truth = run(in_double(inputs), upstream, reference.layer_prompts)
    assert_all_close(run(inputs, upstream), {name: t.float() for name, t in truth.items()}, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("upstream", ["rows", "scores", "one number for all"])
def test_gradients_of_one_result_and_expanded_ones_are_right(upstream, device):
    inputs, results = make_inputs(torch.float32, device), []
    for function, given in ((layer_prompts, inputs), (reference.layer_prompts, in_double(inputs))):
        rows, scores = function(*given.values(), top_k=None, renormalize=False, eps=1e-5, dtype=given["experts"].dtype)
        total = {"rows": rows.square().sum(), "scores": scores.square().sum(), "one number for all": rows.sum()}[upstream]
        results.append(torch.autograd.grad(total, list(given.values()), materialize_grads=True))
    for name, got, truth in zip(inputs, *results, strict=True):
        torch.testing.assert_close(got, truth.float(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_no_prompts_beside_have_empty_gradients(device):
    inputs = make_inputs(torch.float32, device)
    inputs["after"] = torch.zeros(3, 0, 20, device=device, requires_grad=True)
    inputs["before"] = torch.zeros(1, 0, 20, device=device, requires_grad=True)
    got = run(inputs, (torch.randn(3, 2, 20, device=device), torch.randn(3, 5, device=device)))
    assert got["after"].shape == (3, 0, 20)
    assert got["before"].shape == (1, 0, 20)


def test_checkpointing_computes_a_layer_again(device):
    inputs = make_inputs(torch.float32, device)
    upstream, settings = random_upstream(inputs), {"top_k": None, "renormalize": False, "eps": 1e-5, "dtype": torch.float32}
    again = checkpoint(functools.partial(layer_prompts, **settings), *inputs.values(), use_reentrant=False)
    leaves = list(inputs.values())
    grads = [torch.autograd.grad(outputs, leaves, upstream) for outputs in (again, layer_prompts(*inputs.values(), **settings))]
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("asked", [("weight",), ("keys",), ("feature",), ("cross",), ("gram",), ("shift", "before")], ids=str)
@pytest.mark.parametrize("own", [3, 17], ids=["in kernels", "by products"])
def test_only_asked_for_gradients_are_written(asked, own, device):
    inputs = make_inputs(torch.float32, device, own=own)
    upstream = random_upstream(inputs)
    expected = run(inputs, upstream)
    some = {name: tensor.detach().requires_grad_(name in asked) for name, tensor in inputs.items()}
    outputs = layer_prompts(*some.values(), top_k=None, renormalize=False, eps=1e-5, dtype=torch.float32)
    torch.autograd.backward(*zip(*[(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad], strict=True))
    for name, tensor in some.items():
        assert (tensor.grad is not None) == (name in asked), name
        if name in asked:
            torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_an_empty_batch_gives_empty_rows_and_zero_gradients(device):
    inputs = make_inputs(torch.float32, device, batch=0)
    got = run(inputs, random_upstream(inputs))
    assert got["rows"].shape == (0, 6, 20)
    for name in ("weight", "keys", "experts", "before", "shift"):
        assert torch.count_nonzero(got[name]) == 0, name
