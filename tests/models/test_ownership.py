"""What a model does to other people's objects, and what it gives back; changes behind its back."""

import copy

import pytest
import torch
from tiny_fusion import SETTINGS, close, make_bert, make_dinov2, make_fusion, make_images, make_text
from torch import nn
from transformers import BartConfig, BartModel, BertModel

from mope_fast import MoPEConfig, MoPEFusion, MultiAdapter, PromptedEncoder, PromptTuned


class Lora(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.delta = nn.Parameter(0.3 * torch.randn_like(linear.weight))

    def forward(self, x):
        return self.linear(x) + x @ self.delta.T


@pytest.mark.parametrize("mixing", ["prompt", "kv"])
def test_projections_replaced_after_wrapping_are_those_of_the_prompts_too(mixing):
    encoder, text, cross = make_bert(), make_text(6), torch.randn(6, 20, dtype=torch.float64)
    model = make_fusion(encoder, None, cross_dim=20, mixing=mixing)
    before, state = model(text, cross).features, model.trained_state_dict()
    for layer in encoder.encoder.layer:
        layer.attention.self.key = Lora(layer.attention.self.key)
    after, folded = model(text, cross).features, model.fold()(text, cross).features
    model.unwrap()
    again = make_fusion(encoder, None, cross_dim=20, mixing=mixing)
    again.load_state_dict(state, strict=False)
    assert not torch.allclose(after, before, atol=1e-3)
    close(after, again(text, cross).features)
    close(folded, after)


def test_a_norm_with_hooks_is_called_for_prompts_too():
    encoder, images, cross = make_dinov2(), make_images(6), torch.randn(6, 20, dtype=torch.float64)
    model = make_fusion(encoder, None, cross_dim=20, mixing="auto")
    plain = model(images, cross).features
    for layer in encoder.encoder.layer:
        layer.norm1.register_forward_hook(lambda module, args, output: 2 * output)
    hooked, state = model(images, cross).features, model.trained_state_dict()
    assert not torch.allclose(hooked, plain, atol=1e-3)
    model.unwrap()
    prompt_space = make_fusion(encoder, None, cross_dim=20, mixing="prompt")
    prompt_space.load_state_dict(state, strict=False)
    close(hooked, prompt_space(images, cross).features)
    with pytest.raises(ValueError, match="which is no layer norm or RMS norm of a known class, or has hooks"):
        prompt_space.fold()


def test_a_projection_with_hooks_is_called_within_its_layer():
    encoder, text, cross = make_bert(), make_text(6), torch.randn(6, 20, dtype=torch.float64)
    model = make_fusion(encoder, None, cross_dim=20)
    order = []
    for index, layer in enumerate(encoder.encoder.layer):
        layer.attention.register_forward_pre_hook(lambda module, args, index=index: order.append(f"layer {index}"))
        layer.attention.self.key.register_forward_hook(lambda module, args, output, index=index: order.append(f"key {index}"))
    plain = model(text, cross).features
    # prompts, then the layer with its tokens; as what gathers or moves weights expects it
    assert order == [f"{what} {index}" for index in range(2) for what in ("key", "layer", "key")]
    for layer in encoder.encoder.layer:
        layer.attention.self.key._forward_hooks.clear()
    close(model(text, cross).features, plain)


def test_one_module_as_several_layers_is_refused_before_it_is_touched():
    encoder = make_bert().train()
    encoder.encoder.layer[1] = encoder.encoder.layer[0]
    with pytest.raises(ValueError, match="this BertModel uses one module as several layers: each needs prompts of its own"):
        PromptedEncoder(encoder)
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())


def test_encoders_that_share_a_config_do_not_disturb_each_other():
    config = make_bert().config
    first, second = (BertModel(config).double().eval() for _ in range(2))
    implementation, text = config._attn_implementation, make_text(3)
    one, two = PromptTuned(first, 2).double().eval(), PromptTuned(second, 3).double().eval()
    expected = two(text).features
    assert one.unwrap() is first
    assert torch.equal(two(text).features, expected)
    two.unwrap()
    assert first.config is second.config is config
    assert config._attn_implementation == implementation


def test_a_decoder_keeps_its_own_attention_and_its_dropout():
    config = BartConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=24, attention_dropout=0.5, dropout=0.0,
    )  # fmt: skip
    bart = BartModel(config).train()
    PromptTuned(bart.encoder, 2)
    ids = make_text(3)["input_ids"]
    runs = [bart(input_ids=ids, decoder_input_ids=ids).last_hidden_state for _ in range(2)]
    assert not torch.equal(*runs)


def test_what_was_passed_in_wrapped_or_tuned_outlives_the_model():
    side = PromptTuned(make_dinov2(), 3).double().eval()
    images = make_images(3)
    expected = side(images).features
    model = make_fusion(make_bert(), side)
    assert model.unwrap()[1] is side
    assert torch.equal(side(images).features, expected)
    make_fusion(make_bert(), side)


def test_a_failed_load_leaves_the_users_prompts_alone(tmp_path):
    make_fusion(make_bert(), PromptTuned(make_dinov2(), 2)).save_pretrained(tmp_path)
    side, images = PromptTuned(make_dinov2(), 3).double().eval(), make_images(3)
    expected = side(images).features
    with pytest.raises(ValueError, match=r"complementary.bank.stacks.48.static_prompt: saved \(3, 2, 48\), expected \(3, 3, 48\)"):
        MoPEFusion.from_pretrained(tmp_path, make_bert(), side)
    assert torch.equal(side(images).features, expected)


def test_a_black_box_is_given_back_as_it_was():
    box = nn.Sequential(nn.Linear(6, 20), nn.Dropout(0.5)).double().train()
    box[0].bias.requires_grad_(False)
    model = make_fusion("bert", box, cross_dim=20).train()
    assert not any(module.training for module in box.modules())
    model.unwrap()
    assert all(module.training for module in box.modules())
    assert [p.requires_grad for p in box.parameters()] == [True, False]


def test_one_encoder_on_both_sides_is_not_saved(tmp_path):
    shared = PromptedEncoder(make_bert())
    model = MoPEFusion(shared, shared, 3, MoPEConfig(**SETTINGS)).double().eval()
    assert not any(".encoder." in key for key in model.trained_state_dict())
    model.save_pretrained(tmp_path)
    text = make_text(4)
    again = MoPEFusion.from_pretrained(tmp_path, shared, shared).double()
    close(again(text, text).logits, model(text, text).logits, 1e-6)


def test_a_failing_constructor_leaves_nothing_attached():
    bert, dinov2 = make_bert().train(), make_dinov2().train()
    for build in (lambda: PromptTuned(bert, 2, True), lambda: MoPEFusion(bert, dinov2, True)):
        with pytest.raises(ValueError, match="num_classes must be an integer >= 1, got True"):
            build()
    head = bert.pooler
    with pytest.raises(ValueError, match="head is a part of a frozen module and would not be trained"):
        MoPEFusion(bert, dinov2, head=head)
    assert bert.training
    assert dinov2.training
    make_fusion(bert, dinov2)


def test_a_model_that_can_not_be_a_side_is_refused():
    fusion = make_fusion("bert", None, cross_dim=20)
    multi = MultiAdapter({"a": PromptTuned(PromptedEncoder(make_dinov2()), 2)})
    for side in (fusion, multi):
        with pytest.raises(TypeError, match=f"complementary can't be a {type(side).__name__}: pass PromptTuned, a folded model"):
            make_fusion("dinov2", side)


def test_a_folded_model_can_be_a_side_and_is_not_saved_with_the_fusion():
    tuned, images = PromptTuned(make_dinov2(), 2).double().eval(), make_images(4)
    model = make_fusion("bert", tuned.fold())
    assert model.config.cross_dim == 48
    assert not any(key.startswith("complementary.") for key in model.trained_state_dict())
    twin = make_fusion(model.unwrap()[0], tuned)
    twin.load_state_dict(model.trained_state_dict(), strict=False)
    close(twin(make_text(4), images).features.shape, torch.Size([4, 32]))


def test_unwrapping_after_parts_were_replaced_restores_what_is_left():
    encoder = make_bert().train()
    model = make_fusion(encoder, None, cross_dim=20)
    encoder.pooler = None
    assert model.unwrap()[0] is encoder
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())
    make_fusion(copy.deepcopy(encoder), None, cross_dim=20)


def test_backward_after_unwrap_says_so():
    model, text, cross = make_fusion("bert", None, cross_dim=20), make_text(3), torch.randn(3, 20, dtype=torch.float64)
    model.gradient_checkpointing_enable()
    loss = model(text, cross, torch.zeros(3, dtype=torch.long)).loss
    model.unwrap()
    with pytest.raises(RuntimeError, match="unwrapped before the backward pass"):
        loss.backward()


def test_embeddings_resized_meanwhile_are_given_back_trainable():
    encoder = make_bert()
    model = make_fusion(encoder, None, cross_dim=20)
    encoder.resize_token_embeddings(60)
    model.unwrap()
    assert encoder.get_input_embeddings().weight.shape[0] == 60
    assert all(p.requires_grad for p in encoder.parameters())
