"""What all registered ops share: nobody gets a second derivative that isn't there."""

import pytest
import torch

from mope_fast.ops import _registration, prompt_attention, route_and_mix, window_attention

X = torch.randn(6, 6, dtype=torch.float64)


def mix(x, weight):
    experts = torch.ones(6, 2, 3, dtype=x.dtype)
    return route_and_mix.route_and_mix(x @ weight, experts, None, None, 0.5, None, False, 1e-5, x.dtype)[1]


def attend(x, weight):
    q = (x @ weight)[None, None]
    masking = {"field": None, "window": (None, None), "key_padding_mask": None, "bias": None, "scale": None}
    return prompt_attention.prompt_attention(q, q, q, [], **masking)


def attend_in_windows(x, weight):
    qkv = (x @ weight).view(1, 2, 3, 3, 1, 2)
    sizes = {"window_size": (2, 3), "shift_size": (0, 1), "pad_qkv": None, "scale": None}
    return window_attention.window_prompt_attention(qkv, [], X[None], **sizes)


def make_loss(op):
    return lambda x, weight: op(x, weight).pow(3).sum()


def penalty(loss, x, weight):
    (grad,) = torch.autograd.grad(loss(x, weight), x, create_graph=True)
    return grad.square().sum()


SECOND = {
    "of a penalty, for all": lambda loss, x, w: penalty(loss, x, w).backward(),
    "of a penalty, for the weight": lambda loss, x, w: torch.autograd.grad(penalty(loss, x, w), w),
    "of a penalty, into the weight": lambda loss, x, w: penalty(loss, x, w).backward(inputs=[w]),
    "times a vector": lambda loss, x, w: torch.autograd.functional.hvp(lambda x: loss(x, w), x, X),
    "forward over reverse": lambda loss, x, w: torch.autograd.functional.jvp(lambda x: loss(x, w), x, X),
    "functional": lambda loss, x, w: torch.func.grad(lambda x: torch.func.grad(loss)(x, w).square().sum())(x.detach()),
}


@pytest.mark.parametrize("op", [mix, attend, attend_in_windows])
@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
def test_every_way_to_a_second_derivative_raises(op, second):
    x, weight = (torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="once_differentiable: impl='reference' has one"):
        second(make_loss(op), x, weight)


@pytest.mark.parametrize("op", [mix, attend, attend_in_windows])
def test_a_first_derivative_with_a_graph_is_the_one_without(op):
    x, weight = (torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = make_loss(op)
    expected = torch.autograd.grad(loss(x, weight), (x, weight))
    got = torch.autograd.grad(loss(x, weight), (x, weight), create_graph=True)
    functional = torch.func.grad(loss, argnums=(0, 1))(x.detach(), weight.detach())
    for truth, *others in zip(expected, got, functional, strict=True):
        for other in others:
            torch.testing.assert_close(other, truth)


@pytest.mark.parametrize("capturing", [True, False])
def test_a_first_launch_within_a_capture_says_what_to_do(capturing, monkeypatch):
    def launch(tensor):
        raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    with pytest.raises(RuntimeError, match=r"call mope_fast\.warmup\(model, \*inputs\) before" if capturing else "Triton Error"):
        _registration._on_their_device(launch)(torch.zeros(1))
