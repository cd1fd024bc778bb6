"""A warm-up goes the ways of a step and leaves no trace."""

import copy
import warnings

import pytest
import torch
from tiny_fusion import close, make_fusion, make_images, make_text
from torch import nn

from mope_fast import warmup

LABELS = torch.tensor([0, 4, 2])


def state_of(model):
    grads = {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {**model.state_dict(), **grads, "random": torch.get_rng_state()}


@pytest.mark.parametrize("return_logits", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_a_warm_up_leaves_the_model_as_it_was(training, return_logits):
    model = make_fusion(mapper_norm="batch").train()
    inputs, labels = (make_text(3), make_images(3)), {} if return_logits else {"labels": LABELS}
    model(*inputs, labels=LABELS).loss.backward()
    model.return_logits = return_logits
    model.train(training)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: copy.deepcopy(value) for name, value in state_of(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an importance loss that nobody took
        warmup(model, *inputs, **labels)
    after = state_of(model)
    for name, value in before.items():
        assert (after[name] is None) == (value is None), name
        if value is not None:
            close(after[name], value, 0)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_a_forward_that_fails_leaves_no_trace_either():
    model = make_fusion().train()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="complementary_inputs is None"):
        warmup(model, make_text(3))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_nothing_waits_for_a_parameters_gradient_and_a_graph_of_before_still_runs():
    model, seen = make_fusion(mapper_norm="batch").train(), []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    loss = model(make_text(3), make_images(3), labels=LABELS).loss
    warmup(model, make_text(3), make_images(3), labels=LABELS)
    assert not seen
    loss.backward()
    assert seen


def test_buffers_that_can_not_be_written_are_left_alone():
    model = make_fusion().train()
    model.register_buffer("shared", torch.zeros(1).expand(3))
    with torch.inference_mode():
        model.register_buffer("made_elsewhere", torch.zeros(3))
    warmup(model, make_text(3), make_images(3), labels=LABELS)
    assert model.training


def test_a_buffer_that_a_forward_replaces_is_put_back():
    class Counting(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, *inputs):
            self.calls = self.calls + 1
            return self.model(*inputs)

    model = Counting(make_fusion())
    warmup(model, make_text(3), make_images(3))
    assert model.calls == 0
