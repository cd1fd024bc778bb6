import copy

import pytest
import torch
from tiny_fusion import (
    CLASSES,
    INPUTS,
    MAKE,
    close,
    concatenated_feature,
    make_bert,
    make_dinov2,
    make_fusion,
    make_text,
    trained,
)

OTHER = {"bert": "dinov2", "dinov2": "bert"}


@pytest.mark.parametrize("mixing", ["prompt", "kv"])
@pytest.mark.parametrize(
    ("main", "main_settings", "settings"),
    [
        ("bert", {}, {}),
        ("bert", {"num_hidden_layers": 3, "hidden_size": 40, "num_attention_heads": 5}, {"top_k": 2, "learn_keys": True}),
        ("dinov2", {}, {}),
        ("dinov2", {"qkv_bias": False, "use_swiglu_ffn": True}, {"top_k": 2, "renormalize": True, "prompt_length": 1}),
    ],
)
def test_fusion_equals_the_librarys_layers_on_concatenated_prompts(main, main_settings, settings, mixing):
    torch.manual_seed(0)
    encoders = MAKE[main](**main_settings), MAKE[OTHER[main]]()
    plain = [copy.deepcopy(encoder).requires_grad_(False).eval() for encoder in encoders]
    for encoder in plain:
        encoder.set_attn_implementation("eager")
    model = make_fusion(*encoders, num_classes=None, mixing=mixing, **settings)
    inputs = INPUTS[main](6), INPUTS[OTHER[main]](6)

    side = model.complementary.bank
    vanilla = side.prepare()
    cross = concatenated_feature(plain[1], inputs[1], lambda i, x: side.layer(i, x, vanilla).prompts)
    context = model.bank.prepare(cross)
    scores = []

    def routed(i, x):
        out = model.bank.layer(i, x, context)
        scores.append(out.scores)
        return out.prompts

    expected = concatenated_feature(plain[0], inputs[0], routed)
    output = model(*inputs)
    close(output.features, expected)
    close(output.scores, torch.stack(scores))

    parameters = trained(model)
    upstream = torch.randn_like(expected)
    grads = [torch.autograd.grad((f * upstream).sum(), list(parameters.values())) for f in (output.features, expected)]
    for name, got, truth in zip(parameters, *grads, strict=True):
        assert truth.abs().max() > 1e-8, name
        # gradients up to 1e2 through several layers
        close(got, truth, 1e-9)


@pytest.mark.parametrize("mixing", ["prompt", "kv"])
def test_changing_a_pad_token_changes_no_logit(mixing):
    torch.manual_seed(1)
    model = make_fusion(mixing=mixing)
    text, images = make_text(6), INPUTS["dinov2"](6)
    padded = text["attention_mask"] == 0
    assert padded[0, 3:5].all()
    other = {**text, "input_ids": torch.where(padded, (text["input_ids"] + 17) % 50, text["input_ids"])}
    assert torch.equal(model(text, images).logits, model(other, images).logits)
    changed = {**text, "input_ids": (text["input_ids"] + 17) % 50}
    assert not torch.allclose(model(text, images).logits, model(changed, images).logits, atol=1e-3)


def test_changing_a_pad_token_of_the_complementary_text_changes_no_logit():
    torch.manual_seed(2)
    model = make_fusion("dinov2", "bert")
    text, images = make_text(6), INPUTS["dinov2"](6)
    other = {**text, "input_ids": torch.where(text["attention_mask"] == 0, 7, text["input_ids"])}
    assert torch.equal(model(images, text).logits, model(images, other).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_padding_masks_of_any_dtype_mean_the_same(dtype):
    torch.manual_seed(3)
    model = make_fusion()
    text, images = make_text(3), INPUTS["dinov2"](3)
    same = {**text, "attention_mask": text["attention_mask"].to(dtype)}
    close(model(same, images).logits, model(text, images).logits, 0)


def test_padding_to_a_longer_length_changes_no_logit():
    torch.manual_seed(4)
    model = make_fusion()
    text, images = make_text(3), INPUTS["dinov2"](3)
    longer = {key: torch.nn.functional.pad(value, (0, 4)) for key, value in text.items()}
    close(model(longer, images).logits, model(text, images).logits, 1e-12)


def test_samples_do_not_see_their_batch():
    torch.manual_seed(5)
    model = make_fusion()
    text, images = make_text(6), INPUTS["dinov2"](6)
    alone = [model({key: value[i : i + 1] for key, value in text.items()}, images[i : i + 1]).logits for i in range(6)]
    # six samples mix in K/V space, one in prompt space
    close(model(text, images).logits, torch.cat(alone))


def test_logits_depend_on_the_complementary_modality():
    torch.manual_seed(6)
    model = make_fusion()
    text, images = make_text(3), INPUTS["dinov2"](3)
    changed = images.clone()
    changed[1] += 1
    difference = (model(text, images).logits - model(text, changed).logits).abs().amax(-1)
    assert difference[1] > 1e-3
    assert difference[[0, 2]].max() < 1e-12


def test_encoders_keyword_arguments_reach_them():
    torch.manual_seed(7)
    model = make_fusion(make_bert(), make_dinov2())
    text, images = make_text(3), INPUTS["dinov2"](3)
    segments = {**text, "token_type_ids": (torch.arange(9) > 4).long().expand(3, -1)}
    assert model(text, {"pixel_values": images}).logits.shape == (3, CLASSES)
    assert not torch.allclose(model(text, images).logits, model(segments, images).logits, atol=1e-4)
    close(model(text["input_ids"], images).logits, model({"input_ids": text["input_ids"]}, images).logits, 0)
