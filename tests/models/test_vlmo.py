"""How a VLMo behaves: what doesn't change its results, in which precisions and modes it runs, and what it refuses."""

import copy
import pickle

import pytest
import torch
from numerics import assert_as_good_as_eager
from op_recorder import Recorder
from tiny_vlmo import BATCH, close, given, make_inputs, make_vlmo, weighted
from torch import nn

from mope_fast import ReceptiveField
from mope_fast.models.vlmo.layers import Visibility

NAMES = ["base_plus", "base"]
MODALITIES = ["joint", "text", "image"]


def gradients(model, inputs):
    parameters = dict(model.named_parameters())
    outputs = given(model(**inputs))
    found = torch.autograd.grad(weighted(outputs), list(parameters.values()), materialize_grads=True)
    return outputs, dict(zip(parameters, found, strict=True))


def assert_same_step(got, expected, tolerance=1e-10):
    close(got[0], expected[0], tolerance)
    close(got[1], expected[1], tolerance)


@pytest.mark.parametrize("modality", ["joint", "text"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing_else(name, modality):
    model, inputs = make_vlmo(name), make_inputs(modality)
    real = inputs["attention_mask"].bool()
    other = inputs | {"input_ids": torch.where(real, inputs["input_ids"], inputs["input_ids"] % 29 + 1)}
    assert not torch.equal(other["input_ids"], inputs["input_ids"])
    expected, got = model(**inputs), model(**other)
    close(got.text[real], expected.text[real])
    if modality == "joint":
        close([got.image, got.pooled], [expected.image, expected.pooled])
    for b in range(BATCH):
        length = int(real[b].sum())
        cut = {key: value[b : b + 1, :length] if key != "pixel_values" else value[b : b + 1] for key, value in inputs.items()}
        del cut["attention_mask"]
        close(model(**cut).text[0], expected.text[b, :length])


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_neighbours(name, modality):
    model, inputs = make_vlmo(name), make_inputs(modality)
    together = given(model(**inputs))
    for b in range(BATCH):
        alone = given(model(**{key: value[b : b + 1] for key, value in inputs.items()}))
        close(alone, [out[b : b + 1] for out in together])


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name, modality):
    model = make_vlmo(name)
    outputs, grads = gradients(model, {key: value[:0] for key, value in make_inputs(modality).items()})
    assert [out.shape[0] for out in outputs] == [0] * len(outputs)
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_booleans_and_numbers_and_token_ids_of_32_bits(name):
    model, inputs = make_vlmo(name), make_inputs()
    expected = model(**inputs)
    for dtype in (torch.bool, torch.int32, torch.float64):
        got = model(**inputs | {"attention_mask": inputs["attention_mask"].to(dtype), "input_ids": inputs["input_ids"].int()})
        for mine, truth in zip(got, expected, strict=True):
            assert torch.equal(mine, truth)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("name", NAMES)
def test_implementations_agree(name, modality):
    model, inputs = make_vlmo(name, impl="reference"), make_inputs(modality)
    sdpa, asked = copy.deepcopy(model), []
    for block in sdpa.transformer.blocks:
        block.attn.impl = "sdpa"
        block.attn.register_forward_hook(lambda module, args, output: asked.append(module.impl))
    assert_same_step(gradients(sdpa, inputs), gradients(model, inputs))
    assert asked == ["sdpa"] * 3
    with pytest.raises(ValueError, match="prompt_attention got impl='flash', expected one of"):
        make_vlmo(name, impl="flash")(**inputs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_good_as_eager(name, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    eager, inputs = make_vlmo(name, impl="reference").to(dtype), make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    model, truth = copy.deepcopy(eager), copy.deepcopy(eager).double()
    for block in model.transformer.blocks:
        block.attn.impl = "auto"
    true_outputs, true_grads = gradients(truth, inputs | {"pixel_values": inputs["pixel_values"].double()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs, grads = gradients(model, inputs)
        eager_outputs, eager_grads = gradients(eager, inputs)
    for key, *values in zip(("text", "image", "pooled"), outputs, eager_outputs, true_outputs, strict=True):
        assert_as_good_as_eager(key, *values, torch.bfloat16)
    for key, grad in grads.items():
        assert grad.dtype == dtype
        assert_as_good_as_eager(key, grad, eager_grads[key], true_grads[key], torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "modality"), [("base", "joint"), ("base", "text"), ("base_plus", "image")])
def test_compiles_as_one_graph_for_every_batch_size(name, modality):
    torch._dynamo.reset()
    model = make_vlmo(name, num_layers=2, first_fusion_layer=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 2, 5):  # 3 would be the channels too, which are fixed
            inputs = make_inputs(modality, batch)
            outputs = given(compiled(**inputs))
            grads = torch.autograd.grad(weighted(outputs), list(model.parameters()), materialize_grads=True)
            expected_outputs, expected = gradients(model, inputs)
            close(outputs, expected_outputs)
            close(grads, tuple(expected.values()))


def test_a_step_never_waits_for_the_device():
    model, inputs = make_vlmo("base", impl="reference").train(), make_inputs()
    with Recorder() as recorder:
        gradients(model, inputs)
    assert {"embedding", "_softmax", "bernoulli_"} <= set(recorder.names)
    assert recorder.waits() == set()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_step(name):
    model, inputs = make_vlmo(name, drop_path_rate=0.4).train(), make_inputs(batch=8)
    calls = []
    model.transformer.blocks[1].attn.proj.register_forward_hook(lambda module, args, output: calls.append(1))

    def step():
        torch.manual_seed(5)
        return gradients(model, inputs)

    expected = step()
    assert len(calls) == 1
    model.gradient_checkpointing = True
    outputs, grads = step()
    assert len(calls) == 3  # the layer ran once more in the backward pass
    assert all(torch.equal(got, truth) for got, truth in zip(outputs, expected[0], strict=True))
    assert all(torch.equal(grads[key], truth) for key, truth in expected[1].items())
    with torch.no_grad():
        model(**inputs)
    assert len(calls) == 4


def test_training_mode_draws_and_evaluation_does_not():
    model, inputs = make_vlmo("base", drop_path_rate=0.5), make_inputs(batch=16)
    expected = model(**inputs)
    model.train()
    first, second = model(**inputs), model(**inputs)
    assert not torch.equal(first.image, second.image)
    model.eval()
    assert all(torch.equal(got, truth) for got, truth in zip(model(**inputs), expected, strict=True))


def test_drop_path_draws_for_samples_branches_and_modalities():
    model = make_vlmo("base", drop_path_rate=0.5).train()
    block, x = model.transformer.blocks[1], torch.randn(200, 17, 24, dtype=torch.float64)
    with torch.no_grad():
        block.gamma_1.zero_()  # no attention
        change = block(x, Visibility(), {"text": 7, "imag": 10}) - x
        block.eval()
        whole = block(x, Visibility(), {"text": 7, "imag": 10}) - x
    kept = change.abs().amax(-1) > 0
    text, image = kept[:, 0], kept[:, -1]
    assert torch.equal(kept, torch.cat([text[:, None].expand(-1, 7), image[:, None].expand(-1, 10)], dim=1))
    close(change[kept], whole[kept] / 0.75)  # the middle one of three layers drops a quarter
    assert 0.6 < kept.double().mean() < 0.9
    assert (text != image).any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_the_same_and_independent(name, copied):
    model, inputs = make_vlmo(name), make_inputs()
    expected = model(**inputs)
    other = copied(model)
    with torch.no_grad():
        model.transformer.cls_token.add_(1)
    assert all(torch.equal(got, truth) for got, truth in zip(other(**inputs), expected, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_materialised_from_the_meta_device(name):
    model, inputs = make_vlmo(name), make_inputs()
    expected = model(**inputs)
    with torch.device("meta"):
        empty = make_vlmo(name)
    loaded = empty.to_empty(device="cpu")
    for parameter in loaded.parameters():
        nn.init.constant_(parameter, float("nan"))
    loaded.load_state_dict(model.state_dict())
    assert all(torch.equal(got, truth) for got, truth in zip(loaded(**inputs), expected, strict=True))


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


def with_doubled_weight(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for block in other.transformer.blocks:
            block.attn.qkv.weight.mul_(2)
    return other


def replaced(attention):
    attention.qkv = Doubled(attention.qkv)


def hooked(attention):
    attention.qkv.register_forward_hook(lambda module, args, output: output * 2)


def parametrized(attention):
    nn.utils.parametrize.register_parametrization(attention.qkv, "weight", Twice())


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def given_a_bias(attention):
    weight, (width, k) = attention.qkv.weight, attention.qkv.weight.shape
    attention.qkv = nn.Linear(k, width).double()
    with torch.no_grad():
        attention.qkv.weight.copy_(2 * weight)
        attention.qkv.bias.zero_()
        attention.qkv.bias[:k] = attention.q_bias
        attention.q_bias.zero_()


@pytest.mark.parametrize("change", [replaced, hooked, parametrized, given_a_bias])
def test_a_changed_projection_is_not_bypassed(change):
    model, inputs = make_vlmo("base"), make_inputs()
    expected = given(with_doubled_weight(model)(**inputs))
    for block in model.transformer.blocks:
        change(block.attn)
    close(given(model(**inputs)), expected)


def test_lora_of_peft():
    peft = pytest.importorskip("peft")
    model, inputs = make_vlmo("base_plus"), make_inputs()
    plain = given(model(**inputs))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)).double()
    outputs = given(adapted(**inputs))
    assert (outputs[0] - plain[0]).abs().max() > 1e-3
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3
    for name, grad in zip(trained, torch.autograd.grad(weighted(outputs), list(trained.values())), strict=True):
        assert grad.any(), name
    close(given(adapted.merge_and_unload()(**inputs)), outputs)


def test_biases_and_masks_leave_room_for_prompts():
    model = make_vlmo("base")
    plain, wide = model.position_biases(4, 10), model.position_biases(4, 10, before=2, after=3)
    assert len(wide) == 3
    for bias, expected in zip(wide, plain, strict=True):
        assert bias.shape == (1, 3, 19, 19)
        inside = torch.zeros(19, 19, dtype=torch.bool)
        inside[2:16, 2:16] = True
        assert torch.equal(bias[..., 2:16, 2:16], expected)
        assert not bias[..., ~inside].any()
    text = make_inputs("text")
    mask = model.key_padding_mask(text["attention_mask"], text["input_ids"], before=2, after=3)
    real = torch.ones(BATCH, 1, dtype=torch.bool)
    assert torch.equal(mask, torch.cat([real.expand(-1, 2), text["attention_mask"].bool(), real.expand(-1, 3)], dim=1))


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_attention_within_a_receptive_field(impl):
    model = make_vlmo("base", impl=impl)
    attention, x = model.transformer.blocks[0].attn, torch.randn(2, 9, 24, dtype=torch.float64)
    bias = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    field = ReceptiveField({"a": 2, "b": 7}, {"a": ["a"], "b": ["a", "b"]})
    hidden = bias.clone()
    hidden[..., :2, 2:] = float("-inf")
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    close(attention(x, Visibility(mask, field, bias)), attention(x, Visibility(mask, bias=hidden)))


IDS, IMAGES = make_inputs("text")["input_ids"], make_inputs("image")["pixel_values"]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, "neither input_ids nor pixel_values: give one of them, or both"),
        ({"input_ids": IDS[:2], "pixel_values": IMAGES}, ValueError, "the same number of samples, got 2 and 4"),
        ({"pixel_values": IMAGES, "attention_mask": IDS}, ValueError, "attention_mask belongs to the text: give input_ids with it"),
        ({"input_ids": IDS, "attention_mask": [[1] * 7] * 4}, TypeError, r"attention_mask must be a tensor \(B, S\), got list"),
        (
            {"input_ids": IDS, "attention_mask": IDS[:, :3]},
            ValueError,
            r"attention_mask must be \(B, S\) as input_ids \(4, 7\), .* got \(4, 3\)",
        ),
        ({"input_ids": IDS.tolist()}, TypeError, r"input_ids must be an int64 tensor \(B, T\), got list: VLMoProcessor"),
        ({"input_ids": IDS.float()}, TypeError, "got torch.float32: VLMoProcessor creates it from text"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \(B, T\) with 1 to 7 tokens, got \(7,\)"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"got \(4, 0\)"),
        ({"input_ids": IDS.repeat(1, 2)}, ValueError, r"with 1 to 7 tokens, got \(4, 14\): truncate them"),
        ({"pixel_values": IMAGES.byte()}, TypeError, r"pixel_values must be a float tensor \(B, 3, H, W\), got torch.uint8"),
        ({"pixel_values": "cat.png"}, TypeError, "got str: VLMoProcessor creates it from images"),
        ({"pixel_values": IMAGES[0]}, ValueError, r"pixel_values must be \(B, 3, 12, 12\), got \(3, 12, 12\): resize"),
        ({"pixel_values": IMAGES[:, :1]}, ValueError, r"got \(4, 1, 12, 12\)"),
        ({"pixel_values": IMAGES[..., :8]}, ValueError, r"got \(4, 3, 12, 8\): resize the images, or load the checkpoint with"),
    ],
)
def test_wrong_inputs(inputs, error, message):
    with pytest.raises(error, match=message):
        make_vlmo("base")(**inputs)
