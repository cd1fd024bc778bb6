"""Every transformers family against its library's own layers, and what users do with a wrapped encoder."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers as hf
from op_recorder import Recorder
from tiers import slow_but
from tiny_mechanisms import ALIASES, MECHANISMS
from tiny_transformers import (
    CASES,
    END_OF_TEXT,
    FORWARDS,
    ONE_OF_EACH,
    SETTINGS,
    close,
    frames,
    make_cross,
    make_fusion,
    make_text,
    make_waveform,
    trained,
)
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.models.bert.modeling_bert import eager_attention_forward

from mope_fast import MoPEConfig, MoPEFusion, PromptedEncoder, supported_encoders

every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("name", ONE_OF_EACH)
# the eager attention of ViT, CLIP and SigLIP takes its softmax in float32
AttentionInterface.register("eager_in_float64", eager_attention_forward)


def plain_copy(encoder):
    encoder = copy.deepcopy(encoder).requires_grad_(False)
    encoder.set_attn_implementation("eager_in_float64")
    return encoder


def first_layers_input(encoder, layers, inputs):
    seen = []

    def look(layer, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = layers[0].register_forward_pre_hook(look, with_kwargs=True)
    encoder(**inputs)
    handle.remove()
    return seen[0]


def additive_mask(prompts: int, seen: Tensor | None, causal: bool, like: Tensor) -> Tensor:
    """(B, 1, P + S, P + S): prompts are visible to everyone."""
    batch, tokens = like.shape[:2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool)
    visible = (visible.tril() if causal else visible).repeat(batch, 1, 1)
    if seen is not None:
        visible &= seen.bool()[:, None, :]
    visible = nn.functional.pad(visible, (prompts, 0, prompts, 0), value=True)
    return torch.zeros(visible.shape, dtype=like.dtype).masked_fill(~visible, float("-inf"))[:, None]


def concatenated_feature(case, encoder, inputs, prompts_of_layer):
    """The library's own layers, one by one, on [prompts | tokens]; prompts' outputs are cut."""
    layers = case.layers(encoder)
    x, seen = first_layers_input(encoder, layers, inputs), case.seen(inputs)
    for i, layer in enumerate(layers):
        prompts = prompts_of_layer(i, case.pool(inputs, x))
        length = prompts.shape[1]
        # DINOv2's layer took none until transformers 5.17
        masked = "attention_mask" in inspect.signature(type(layer).forward).parameters
        mask = {"attention_mask": additive_mask(length, seen, case.causal, x)} if masked else {}
        x = layer(torch.cat([prompts, x], dim=1), **mask)[:, length:]
    return case.finish(encoder, inputs, x)


@every_case
@pytest.mark.parametrize("mixing", ["prompt", "kv"])
def test_fusion_equals_the_librarys_layers_on_concatenated_prompts(name, mixing):
    case = CASES[name]
    encoder = case.make(layers=3)
    plain = plain_copy(encoder)
    model, inputs, cross = make_fusion(encoder, mixing=mixing, learn_keys=True), case.inputs(6), make_cross(6)
    context, scores = model.bank.prepare(cross), []

    def routed(i, pooled):
        out = model.bank.layer(i, pooled, context)
        scores.append(out.scores)
        return out.prompts

    expected = concatenated_feature(case, plain, inputs, routed)
    output = model(inputs, cross)
    close(output.features, expected)
    close(output.scores, torch.stack(scores))

    parameters, upstream = trained(model), torch.randn_like(expected)
    grads = [torch.autograd.grad((feature * upstream).sum(), list(parameters.values())) for feature in (output.features, expected)]
    for name, got, truth in zip(parameters, *grads, strict=True):
        assert truth.abs().max() > 1e-8, name
        # gradients up to 1e2 through several layers
        close(got, truth, 1e-9)


def test_every_registered_family_is_here():
    ours = {family for family, models in supported_encoders().items() if models[0].startswith("transformers.")}
    by_check_encoder = {name.partition(":")[0] for name in (*MECHANISMS, *ALIASES)}
    assert {case.family for case in CASES.values()} == {CASES[name].family for name in ONE_OF_EACH} == ours - by_check_encoder


# Padding


def garbage(inputs):
    """Other tokens or samples where the mask is zero."""
    real = inputs["attention_mask"].bool()
    if "input_values" in inputs:
        values = inputs["input_values"]
        return {**inputs, "input_values": torch.where(real, values, 100 * torch.randn_like(values))}
    return {**inputs, "input_ids": torch.where(real, inputs["input_ids"], (inputs["input_ids"] + 17) % 40 + 5)}


def longer(inputs, by):
    return {key: nn.functional.pad(value, (0, by), value=0 if key == "attention_mask" else 7) for key, value in inputs.items()}


PADDED = [name for name in CASES if {"input_ids", "input_values"} & set(CASES[name].inputs(2))]


def without_group_norm(name):
    """A group norm in the convolutions has its statistics from all samples, padding included."""
    return {"feat_extract_norm": "layer"} if CASES[name].family in ("wav2vec2", "hubert") else {}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("mixing", ["prompt", "kv"])
def test_what_padding_holds_changes_nothing(name, mixing):
    case = CASES[name]
    model = make_fusion(case.make(**without_group_norm(name)), mixing=mixing)
    inputs, cross = case.inputs(6), make_cross(6)
    before, after = model(inputs, cross), model(garbage(inputs), cross)
    assert torch.equal(after.features, before.features)
    assert torch.equal(after.scores, before.scores)
    seen = {key: value for key, value in garbage(inputs).items() if key != "attention_mask"}
    assert not torch.allclose(model(seen, cross).features, before.features, atol=1e-3)


@pytest.mark.parametrize("name", PADDED)
def test_padding_to_a_longer_length_changes_nothing(name):
    case = CASES[name]
    model = make_fusion(case.make(**without_group_norm(name)))
    inputs, cross = case.inputs(6), make_cross(6)
    before, after = model(inputs, cross), model(longer(inputs, 12 if "input_values" in inputs else 5), cross)
    close(after.features, before.features)
    close(after.scores, before.scores)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("name", ["bart", "gpt2", "clip_text", "wav2vec2, adapter", "hubert"])
def test_padding_masks_of_any_dtype_mean_the_same(name, dtype):
    case = CASES[name]
    model, inputs, cross = make_fusion(case.make()), case.inputs(3), make_cross(3)
    same = {**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}
    close(model(same, cross).features, model(inputs, cross).features, 0)


@pytest.mark.parametrize("name", ["wav2vec2, stable", "wav2vec2, adapter", "hubert"])
def test_without_a_mask_all_frames_are_real(name):
    case = CASES[name]
    model, inputs, cross = make_fusion(case.make()), case.inputs(3), make_cross(3)
    bare = {"input_values": inputs["input_values"]}
    full = {**bare, "attention_mask": torch.ones_like(inputs["attention_mask"])}
    close(model(bare, cross).features, model(full, cross).features)


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2, adapter", "hubert"])
def test_the_frames_counted_as_real_are_the_librarys(name):
    encoder, inputs = CASES[name].make(), make_waveform(8)
    mask, count = inputs["attention_mask"], frames(inputs["input_values"].shape[1])
    variants = (
        [(count, {})] if name == "hubert" else [(count, {"add_adapter": False}), ((count - 1) // 2 + 1, {"add_adapter": True})]
    )
    for length, adapter in variants:
        before = encoder._get_feature_vector_attention_mask(length, mask, **adapter)
        model = make_fusion(encoder)
        assert torch.equal(encoder._get_feature_vector_attention_mask(length, mask, **adapter), before)
        model.unwrap()


@pytest.mark.parametrize("name", ["wav2vec2", "hubert"])
def test_the_group_norm_of_base_models_sees_padding_without_prompts_too(name):
    case = CASES[name]
    encoder, inputs = case.make(), case.inputs(3)
    before, after = (encoder(**i).last_hidden_state[:, 0] for i in (inputs, garbage(inputs)))
    assert not torch.allclose(after, before, atol=1e-3)


def test_left_padded_gpt2_equals_unpadded_with_position_ids():
    case = CASES["gpt2"]
    model, cross = make_fusion(case.make()), make_cross(3)
    ids = make_text(3, 6)["input_ids"]
    padded = {"input_ids": nn.functional.pad(ids, (3, 0), value=7), "attention_mask": (torch.arange(9) > 2).long().expand(3, -1)}
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    expected = model(ids, cross).features
    close(model({**padded, "position_ids": positions}, cross).features, expected)
    assert not torch.allclose(model(padded, cross).features, expected, atol=1e-3)


def test_packed_sequences_are_refused():
    model = make_fusion(CASES["gpt2"].make())
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]]).expand(3, -1)
    with pytest.raises(ValueError, match="several sequences packed into one"):
        model({"input_ids": make_text(3)["input_ids"], "position_ids": positions}, make_cross(3))


def test_masks_for_each_query_are_refused():
    model, ids = make_fusion(CASES["bert"].make()), make_text(3)["input_ids"]
    with pytest.raises(ValueError, match=r"attention_mask must be \(B, S\).*real; got \(3, 1, 9, 9\)"):
        model({"input_ids": ids, "attention_mask": torch.ones(3, 1, 9, 9)}, make_cross(3))


# The encoder itself


def run_alone(encoder, inputs):
    return encoder(**inputs).last_hidden_state


def public_state(encoder):
    """Everything that wrapping could leave behind."""
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in encoder.modules())
    return hooks, {name: set(vars(module)) for name, module in encoder.named_modules()}, encoder.config._attn_implementation


@every_family
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_wrapped_encoder_alone_gives_what_it_gave_and_unwrap_restores_it(name, implementation):
    case = CASES[name]
    encoder, inputs = case.make(), case.inputs(4)
    if case.causal:
        # what a query gives that sees nothing, left padding, is the library's own affair
        inputs["attention_mask"][:, 0] = 1
    encoder.set_attn_implementation(implementation)
    before, state = run_alone(encoder, inputs), public_state(encoder)
    model = make_fusion(encoder)
    model(inputs, make_cross(4))
    # the eager attention of some families takes its softmax in float32
    close(run_alone(encoder, inputs), before, 1e-5 if implementation == "eager" else 1e-10)
    assert public_state(encoder) != state
    assert model.unwrap()[0] is encoder
    assert public_state(encoder) == state
    assert torch.equal(run_alone(encoder, inputs), before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "whisper", "vit"])
def test_wrapping_twice_is_refused(name):
    encoder = CASES[name].make(layers=1)
    model = make_fusion(encoder)
    with pytest.raises(ValueError, match=r"already takes prompts from another model"):
        make_fusion(encoder)
    assert model.unwrap()[0] is encoder


def check_twin(model, twin, inputs, cross):
    before = model(inputs, cross).features
    assert torch.equal(twin(inputs, cross).features, before)
    for parameter in (*twin.bank.parameters(), *twin.main.encoder.parameters()):
        parameter.data.zero_()
        assert torch.equal(model(inputs, cross).features, before)
    assert not torch.allclose(twin(inputs, cross).features, before)
    twin.unwrap()
    assert torch.equal(model(inputs, cross).features, before)


@pytest.mark.parametrize("name", ["gpt2", "wav2vec2, adapter", "siglip_vision"])
def test_a_deep_copy_fuses_like_the_original(name):
    case = CASES[name]
    model = make_fusion(case.make(layers=1))
    check_twin(model, copy.deepcopy(model), case.inputs(6), make_cross(6))


@pytest.mark.parametrize("name", ["gpt2", "siglip_vision", "clip_text"])
def test_a_pickled_model_fuses_like_the_original(name):
    case = CASES[name]
    model = make_fusion(case.make(layers=1))
    check_twin(model, pickle.loads(pickle.dumps(model)), case.inputs(6), make_cross(6))


def randomized(model):
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    return model.double().eval()


def whole(name, model, **settings):
    case = CASES[name]
    return randomized(model(case.config(**{**case.settings, case.depth: 2, **settings}))), case.inputs(4)


def test_a_decoder_beside_a_wrapped_encoder_generates_as_before():
    model, inputs = whole("bart", hf.BartForConditionalGeneration)

    def generate():
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=2)

    before = generate()
    fusion = make_fusion(model.model.encoder)
    fusion(inputs, make_cross(4))
    assert torch.equal(generate(), before)


def test_whisper_as_a_whole_gives_what_it_gave_with_its_encoder_wrapped():
    model, inputs = whole("whisper", hf.WhisperModel)
    inputs["decoder_input_ids"] = torch.randint(5, 40, (4, 5))
    before = run_alone(model, inputs)
    make_fusion(model.encoder)
    close(run_alone(model, inputs), before)


def test_gpt2_generates_as_before_while_it_is_wrapped():
    model, inputs = whole("gpt2", hf.GPT2LMHeadModel, pad_token_id=0)

    def generate(**cache):
        return model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **cache)

    before = generate()
    fusion = make_fusion(model.transformer)
    fusion(inputs, make_cross(4))
    assert torch.equal(generate(), before)
    with pytest.raises(ValueError, match=r"can't fill a static cache|attention_mask must be"):
        generate(cache_implementation="static")
    with pytest.raises(NotImplementedError, match="can't generate"):
        fusion.generate(inputs)


def make_clip():
    text, vision = ({**CASES[name].settings, "num_hidden_layers": 2} for name in ("clip_text", "clip_vision"))
    return randomized(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


def test_both_halves_of_clip_can_be_fused():
    clip = make_clip()
    inputs = {**CASES["clip_text"].inputs(4), **CASES["clip_vision"].inputs(4)}
    before = clip(**inputs).logits_per_image
    model = MoPEFusion(clip.vision_model, clip.text_model, None, MoPEConfig(**{**SETTINGS, "cross_dim": None})).double().eval()
    images, words = {"pixel_values": inputs["pixel_values"]}, {key: inputs[key] for key in ("input_ids", "attention_mask")}
    features = model(images, words).features
    other = {**words, "input_ids": torch.where(words["input_ids"] == END_OF_TEXT, END_OF_TEXT, 7)}
    assert not torch.allclose(model(images, other).features, features, atol=1e-4)
    close(clip(**inputs).logits_per_image, before)


@pytest.mark.parametrize(
    ("name", "model", "part"),
    [
        ("whisper", hf.WhisperModel, "encoder"),
        ("whisper", hf.WhisperForConditionalGeneration, "model.encoder"),
        ("bart", hf.BartModel, "encoder"),
        ("bert", hf.BertForSequenceClassification, "bert"),
        ("gpt2", hf.GPT2LMHeadModel, "transformer"),
        ("wav2vec2", hf.Wav2Vec2ForSequenceClassification, "wav2vec2"),
        ("vit", hf.ViTForImageClassification, "vit"),
        ("clip_text", hf.CLIPTextModelWithProjection, "text_model"),
        ("clip", hf.CLIPModel, r"text_model or \.vision_model"),
    ],
)
def test_a_whole_model_is_refused_with_the_name_of_the_part_to_pass(name, model, part):
    encoder = make_clip() if name == "clip" else whole(name, model)[0]
    with pytest.raises(TypeError, match=rf"{model.__name__} is not a supported encoder: its submodule \.{part} is supported"):
        PromptedEncoder(encoder)


def test_a_bert_decoder_is_refused():
    with pytest.raises(TypeError, match="it is a decoder"):
        PromptedEncoder(CASES["bert"].make(is_decoder=True))


@every_family
def test_keyword_arguments_reach_the_encoder(name):
    case = CASES[name]
    encoder, inputs, cross = case.make(), case.inputs(3), make_cross(3)
    wanted = {**inputs, "output_hidden_states": True}
    before = encoder(**wanted).hidden_states
    model, outputs = make_fusion(encoder), []
    encoder.register_forward_hook(lambda module, args, output: outputs.append(output))
    features = model(wanted, cross).features
    close(features, model(inputs, cross).features, 0)
    prompted, plain = outputs
    assert [h.shape for h in prompted.hidden_states] == [h.shape for h in before]
    assert plain.hidden_states is None
    close(prompted.hidden_states[0], before[0], 0)
    assert not torch.allclose(prompted.hidden_states[1], before[1], atol=1e-3)
    with pytest.raises(ValueError, match="leave return_dict at its default"):
        model({**inputs, "return_dict": False}, cross)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "clip_text"])
def test_position_ids_are_used(name):
    case = CASES[name]
    model, inputs, cross = make_fusion(case.make()), case.inputs(3), make_cross(3)
    shifted = {**inputs, "position_ids": torch.arange(9).expand(3, -1) + 5}
    assert not torch.allclose(model(shifted, cross).features, model(inputs, cross).features, atol=1e-4)


# Training steps


@every_case
def test_a_training_step_never_waits_for_the_host(name):
    case = CASES[name]
    model, inputs, cross = make_fusion(case.make(), num_classes=5).train(), case.inputs(6), make_cross(6)
    labels = torch.randint(5, (6,))
    with Recorder() as recorder:
        model(inputs, cross, labels).loss.backward()
    assert not recorder.waits()
    assert len(recorder.names) > 100


def test_the_recorder_sees_hidden_waits():
    x = torch.ones(4)
    with Recorder() as recorder:
        x[x > 0] = 0
        assert not recorder.waits()
        x[:, None][torch.tensor([1, 2]), torch.tensor([0, 0])] = 0
    assert recorder.waits() == {"copy_from_host"}
    with Recorder() as recorder:
        _ = x[x > 0]
    assert recorder.waits() == {"nonzero"}


@pytest.mark.parametrize("autocast", [False, True])
def test_bart_waits_in_each_layer_if_its_weights_are_in_half_precision(autocast):
    case = CASES["bart"]
    encoder = case.make()
    model, inputs, cross = make_fusion(encoder.float() if autocast else encoder.half()), case.inputs(3), make_cross(3)
    with torch.autocast("cpu", torch.float16, enabled=autocast), Recorder() as recorder:
        model(inputs, cross.to(next(encoder.parameters()).dtype))
    assert recorder.names.count("_local_scalar_dense") == (0 if autocast else 2)


@pytest.mark.parametrize("pad_token_id", [None, 7])
def test_gpt2_never_waits_without_a_mask_either(pad_token_id):
    model, cross = make_fusion(CASES["gpt2"].make(pad_token_id=pad_token_id)), make_cross(3)
    ids = make_text(3)["input_ids"]
    with Recorder() as recorder:
        features = model(ids, cross).features
    assert not recorder.waits()
    close(model({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cross).features, features, 0)
    embedded = {"inputs_embeds": model.main.encoder.wte(ids)}
    close(model(embedded, cross).features, features, 0)


def test_gpt2_waits_if_it_gets_positions_and_no_mask():
    model, ids = make_fusion(CASES["gpt2"].make()), make_text(3)["input_ids"]
    with Recorder() as recorder:
        model({"input_ids": ids, "position_ids": torch.arange(9).expand(3, -1)}, make_cross(3))
    assert recorder.waits() == {"_local_scalar_dense"}


@every_family
def test_gradient_checkpointing_changes_no_gradient(name):
    case = CASES[name]
    model, inputs, cross = make_fusion(case.make(), num_classes=5).train(), case.inputs(6), make_cross(6)
    parameters, results = list(trained(model).values()), []
    for enable in (False, True):
        torch.manual_seed(1)
        if enable:
            model.gradient_checkpointing_enable()
        loss = model(inputs, cross, torch.arange(6) % 5).loss
        results.append((loss, *torch.autograd.grad(loss, parameters)))
    for expected, got in zip(*results, strict=True):
        close(got, expected)


@every_case
def test_folded_model_gives_the_same(name):
    case = CASES[name]
    model, inputs, cross = make_fusion(case.make(), num_classes=5), case.inputs(6), make_cross(6)
    expected, folded = model(inputs, cross), model.fold()(inputs, cross)
    close(folded.logits, expected.logits)
    close(folded.scores, expected.scores)


# bert and dinov2: tests/models/test_fusion_steps.py
@pytest.mark.parametrize("name", slow_but([("gpt2",)], [(name,) for name in FORWARDS]))
def test_compiled_step_equals_eager_for_every_batch_size_without_recompiling(name):
    torch._dynamo.reset()
    case = CASES[name]
    model = make_fusion(case.make(layers=1), num_classes=5, dropout=0.0, noise_std=0.0).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = list(trained(model).values())
    # modules' floats as constants, which halves the time
    with torch._dynamo.config.patch(error_on_recompile=True, specialize_float=True):
        for size in (6, 9):
            batch = case.inputs(size), make_cross(size), torch.randint(5, (size,))
            results = []
            for step in (model, compiled):
                output = step(*batch)
                results.append((output.logits, output.scores, *torch.autograd.grad(output.loss, parameters)))
            for expected, got in zip(*results, strict=True):
                close(got, expected, 1e-9)


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_step_is_finite_and_near_float32(name, dtype):
    case = CASES[name]
    model = make_fusion(case.make().float(), num_classes=5)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in case.inputs(6).items()}
    cross, parameters = make_cross(6).float(), list(trained(model).values())
    expected = model(inputs, cross).features
    with torch.autocast("cpu", dtype):
        output = model(inputs, cross, torch.randint(5, (6,)))
    grads = torch.autograd.grad(output.loss, parameters)
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)
    error = (output.features.float() - expected).norm() / expected.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
