"""Prompt tuning of one encoder, and encoders that several models share."""

import json

import pytest
import torch
from tiny_fusion import INPUTS, MAKE, close, make_bert, make_dinov2, make_images, make_text, trained

from mope_fast import MoPEConfig, MoPEFusion, PromptedEncoder, PromptTuned
from mope_fast.encoders import encode


def make(encoder, length=4, classes=3, **settings):
    return PromptTuned(encoder, length, classes, **settings).double().eval()


@pytest.mark.parametrize("name", list(MAKE))
def test_it_is_a_fusion_with_static_prompts_only(name):
    model = make(MAKE[name](), 4)
    config = MoPEConfig(prompt_length=4, use_dynamic=False, use_mapped=False)
    inputs = INPUTS[name](5)
    logits, state = model(inputs).logits, model.trained_state_dict()
    fusion = MoPEFusion(model.unwrap(), None, 3, config).double().eval()
    fusion.load_state_dict(state, strict=False)
    assert torch.equal(fusion(inputs).logits, logits)


def test_only_prompts_and_head_are_trained():
    model = make(make_bert()).train()
    output = model(make_text(5), torch.arange(5) % 3)
    output.loss.backward()
    assert set(trained(model)) == {"bank.stacks.32.static_prompt", "head.weight", "head.bias"}
    assert all(p.grad.abs().max() > 0 for p in trained(model).values())
    assert output.scores is None
    assert output.importance_loss is None
    assert torch.equal(output.loss, output.task_loss)
    (group,) = model.parameter_groups(1e-3)
    assert len(group["params"]) == 3


def test_length_zero_is_the_plain_encoder_without_gradient():
    encoder, text = make_bert(), make_text(4)
    plain = encode(encoder.eval(), text)
    model = make(encoder, 0)
    assert torch.equal(model(text).features, plain)
    assert set(trained(model)) == {"head.weight", "head.bias"}


def test_dropout_in_training_only():
    model, text = make(make_bert(), dropout=0.5), make_text(4)
    assert torch.equal(model(text).logits, model(text).logits)
    model.train()
    assert not torch.equal(model(text).logits, model(text).logits)


def test_saves_and_loads(tmp_path):
    encoder = make_dinov2()
    model, images = make(encoder, dropout=0.2, prompt_init=0.3), make_images(4)
    logits = model(images).logits
    model.save_pretrained(tmp_path)
    loaded = PromptTuned.from_pretrained(tmp_path, model.unwrap()).double()
    # saved in float64, made in float32
    close(loaded(images).logits, logits, 1e-6)
    assert loaded.settings == {"prompt_length": 4, "dropout": 0.2, "prompt_init": 0.3, "pooling": None}
    with pytest.raises(ValueError, match="was saved by PromptTuned, not by MoPEFusion: load it with PromptTuned"):
        MoPEFusion.from_pretrained(tmp_path, make_dinov2())
    with pytest.raises(ValueError, match=r"main: saved with .*dinov2.*, got .*bert"):
        PromptTuned.from_pretrained(tmp_path, make_bert())


@pytest.mark.parametrize(("name", "value"), [("prompt_length", None), ("dropout", "high")])
def test_a_damaged_description_is_named(tmp_path, name, value):
    make(make_bert()).save_pretrained(tmp_path)
    file = tmp_path / "mope_fast.json"
    description = json.loads(file.read_text())
    if value is None:
        del description["config"][name]
    else:
        description["config"][name] = value
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=rf"mope_fast.json is damaged: .*{name}"):
        PromptTuned.from_pretrained(tmp_path, make_bert())


@pytest.mark.parametrize("length", [-1, 1.5, True, "4"])
def test_a_wrong_length_is_refused_before_the_encoder_is_touched(length):
    encoder = make_bert().train()
    with pytest.raises(ValueError, match="prompt_length must be an integer >= 0, got"):
        PromptTuned(encoder, length)
    assert encoder.training


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="Linear is not a supported encoder"):
        PromptTuned(torch.nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="dropout must be in"):
        PromptTuned(make_bert(), 3, dropout=1.5)
    with pytest.raises(ValueError, match="the batch of bert is empty: it needs at least one sample"):
        make(make_bert())(make_text(4)["input_ids"][:0])
    with pytest.raises(TypeError, match="inputs of bert must be a tensor or a dict of keyword arguments, got list"):
        make(make_bert())([1, 2])
    with pytest.raises(TypeError, match=r"got list: tokenise texts first, tokenizer\(texts, padding=True"):
        make(make_bert())(["a text"])
    with pytest.raises(ValueError, match="labels need a head: give num_classes or head to PromptTuned"):
        make(make_bert(), classes=None)(make_text(3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(NotImplementedError, match="PromptTuned can't generate"):
        make(make_bert()).generate()


def test_as_the_complementary_side_its_prompts_are_trained_along():
    side = PromptTuned(make_dinov2(), 3, dropout=0.0).double()
    config = MoPEConfig(num_experts=4, prompt_length=3)
    model = MoPEFusion(make_bert(), side, 5, config).double().train()
    assert model.complementary is side
    assert model.config.cross_dim == 48
    model(make_text(6), make_images(6), torch.arange(6) % 5).loss.backward()
    assert side.bank.stacks["48"].static_prompt.grad.abs().max() > 0
    main, complementary = model.parameter_groups(1e-3, 2e-3)
    assert complementary["params"] == list(side.bank.parameters())
    assert (main["lr"], complementary["lr"]) == (1e-3, 2e-3)


def test_models_share_an_encoder_without_seeing_each_other():
    encoder, text = make_bert(), make_text(4)
    plain = encode(encoder.eval(), text)
    shared = PromptedEncoder(encoder)
    first, second = make(shared, 3), make(shared, 5)
    alone = make(make_copy(encoder), 3)
    alone.load_state_dict(first.trained_state_dict(), strict=False)
    before = first(text).logits
    second(text)
    assert torch.equal(first(text).logits, before)
    close(alone(text).logits, before)
    assert torch.equal(encode(encoder, text), plain)
    # a shared encoder is given back by its owner
    assert first.unwrap() is encoder
    assert torch.equal(second(text).logits, second(text).logits)
    assert shared.detach() is encoder
    with pytest.raises(RuntimeError, match="unwrapped"):
        second(text)


def make_copy(encoder):
    """The same weights in an encoder that nothing is attached to."""
    twin = make_bert()
    twin.load_state_dict(encoder.state_dict())
    return twin
