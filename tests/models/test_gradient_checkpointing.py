import pytest
import torch
from tiny_fusion import CLASSES, DETERMINISTIC, INPUTS, make_fusion, make_images, make_text, trained

OTHER = {"bert": "dinov2", "dinov2": "bert"}


def step(model, main_inputs, complementary_inputs, size):
    """Loss, scores and all gradients of one training step, with the random numbers of a fixed seed."""
    torch.manual_seed(7)
    output = model(main_inputs, complementary_inputs, torch.arange(size) % CLASSES)
    return [output.loss, output.scores, *torch.autograd.grad(output.loss, list(trained(model).values()))]


@pytest.mark.parametrize("main", ["bert", "dinov2"])
@pytest.mark.parametrize(
    "settings", [{}, {"dynamic_dropout": 0.3}, {"mixing": "kv", "top_k": 2}, {"mixing": "prompt", "dynamic_dropout": 0.3}], ids=str
)
def test_recomputing_gives_the_same_step_to_the_bit(main, settings):
    model = make_fusion(main, OTHER[main], **settings).train()
    inputs = INPUTS[main](6), INPUTS[OTHER[main]](6), 6
    plain = step(model, *inputs)
    model.gradient_checkpointing_enable()
    for name, expected, got in zip(["loss", "scores", *trained(model)], plain, step(model, *inputs), strict=True):
        assert torch.equal(got, expected), name


class Saved:
    """Bytes that a forward keeps for its backward, parameters left out."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.total = 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


def test_it_keeps_far_less_for_the_backward_pass():
    model = make_fusion("dinov2", None, cross_dim=20).train()
    images, features = make_images(16), torch.randn(16, 20, dtype=torch.float64)
    kept = []
    for enable in (False, True):
        (model.gradient_checkpointing_enable if enable else model.gradient_checkpointing_disable)()
        saved = Saved(model)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            output = model(images, features)
        del output
        kept.append(saved.total)
    assert kept[1] < kept[0] / 3


def test_layers_run_again_in_the_backward_pass_only():
    model = make_fusion("bert", None, cross_dim=20).train()
    model.gradient_checkpointing_enable()
    calls = []
    model.main.layers[0].k_proj.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    text, features = make_text(6), torch.randn(6, 20, dtype=torch.float64)
    loss = model(text, features, torch.arange(6) % CLASSES).loss
    forward = len(calls)
    loss.backward()
    assert len(calls) == 2 * forward
    calls.clear()
    with torch.no_grad():
        model(text, features)
    assert len(calls) == forward


def test_both_sides_are_checkpointed_and_reentrant_is_refused():
    model = make_fusion()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.main.gradient_checkpointing
    assert model.complementary.main.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.main.gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant=True is not supported"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    for settings in ({"every_n_layers": 2}, {"offload": True}):
        with pytest.raises(ValueError, match="expected every_n_layers=1 and offload=False, got every_n_layers="):
            model.activation_checkpointing_enable(**settings)
    assert not model.main.gradient_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=1)
    assert model.main.gradient_checkpointing


def test_the_plain_encoder_is_not_affected():
    model = make_fusion()
    model.gradient_checkpointing_enable()
    text = make_text(3)
    encoder = model.main.encoder
    assert torch.equal(encoder(**text).last_hidden_state[:, 0], model.main(text)[0])


def test_compiled_with_the_switch_that_torch_asks_for():
    torch._dynamo.reset()
    model = make_fusion(**DETERMINISTIC).train()
    text, images = make_text(6), make_images(6)
    expected = step(model, text, images, 6)
    model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # the layer's slot for prompts is set within the checkpointed part; setting it again in backward would do nothing
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        got = step(compiled, text, images, 6)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-10)
