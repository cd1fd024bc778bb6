"""Training steps of MoPE-BAF: compiled, in low precision, checkpointed, copied, and without a wait for the device."""

import copy
import pickle

import pytest
import torch
from numerics import assert_as_good_as_eager
from op_recorder import Recorder
from tiny_baf import CLASSES, SMALL, all_close, close, gradients, make_baf, make_inputs, make_vlmo, trained

SIZES = {**SMALL, "num_layers": 3, "first_fusion_layer": 2}


def small(name="base_plus", vlmo=None, **settings):
    return make_baf(make_vlmo(name, **SIZES) if vlmo is None else vlmo, **settings)


def small_batch(size=4, text=9, seed=3):
    return {**make_inputs(size, text, SIZES["image_size"], seed), "labels": torch.arange(size) % CLASSES}


def step(model, inputs, parameters=None):
    """Logits, loss and every gradient."""
    output = model(**inputs)
    one = torch.ones((), dtype=output.loss.dtype)
    return {"logits": output.logits, "loss": output.loss, **gradients(output.loss, parameters or trained(model), one)}


@pytest.mark.slow
def test_compiled_step_equals_eager_for_every_batch_size_without_recompiling():
    torch._dynamo.reset()
    model = small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def marked(size, text):
        inputs = small_batch(size, text)
        for value in inputs.values():
            torch._dynamo.mark_dynamic(value, 0)
        return inputs

    inputs = marked(4, 9)
    all_close(step(compiled, inputs, trained(model)), step(model, inputs), 1e-9)
    with torch.no_grad():
        compiled(**marked(4, 6))  # another length of text is compiled once
    model(**small_batch(2, 4))  # and one that isn't changes nothing
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (3, 7):
            inputs = small_batch(size)
            all_close(step(compiled, inputs, trained(model)), step(model, inputs), 1e-9)
            with torch.no_grad():
                close(compiled(**small_batch(size, 6)).logits, model(**small_batch(size, 6)).logits, 1e-9)


@pytest.mark.parametrize(
    "settings",
    [{"fusion_form": "G", "num_blocks": 2}, pytest.param({"fusion_form": "E", "freeze_backbone": True}, marks=pytest.mark.slow)],
)
def test_inference_compiles_too(settings):
    torch._dynamo.reset()
    model, inputs = small("base", **settings), small_batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["base_plus", "base"])
@pytest.mark.parametrize("settings", [{}, {"fusion_form": "C", "image_prompt_length": 3}, {"fusion_form": "G", "num_blocks": 2}])
def test_a_training_step_never_waits_for_the_host(name, settings):
    model = small(vlmo=make_vlmo(name, **SIZES, impl="reference"), **settings).train()  # SDPA looks at masks that are on a CPU
    inputs = small_batch()
    with Recorder() as recorder:
        model(**inputs).loss.backward()
    assert not recorder.waits()
    assert len(recorder.names) > 200


def test_a_step_of_a_verbalizer_never_waits_for_the_host():
    words = {"head": "verbalizer", "verbalizer": [[4], [5, 6], [7]], "mask_token_id": 3}
    model, inputs = small(vlmo=make_vlmo(**SIZES, mlm_head=True, impl="reference"), **words), small_batch()
    inputs["input_ids"][:, 1] = 3
    with Recorder() as recorder:
        model(**inputs).loss.backward()
    assert not recorder.waits()
    assert len(recorder.names) > 200


def test_bfloat16_is_as_good_as_eager():
    """The truth is in float64 with weights and images that are rounded already."""
    low = small().bfloat16()
    inputs = small_batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    results = []
    for impl, dtype in (("sdpa", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64)):
        model = copy.deepcopy(low).to(dtype)
        for block in model.backbone.transformer.blocks:
            block.attn.impl = impl
        results.append(step(model, {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}))
    got, eager, truth = results
    for name in ("logits", "text_prompt", "image_prompt", "unified_prompt"):
        assert_as_good_as_eager(name, got[name], eager[name], truth[name], torch.bfloat16)


def test_autocast_keeps_float32_gradients_close_to_those_without():
    model, inputs = small().float(), small_batch()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    expected = step(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, inputs)
    assert got["logits"].dtype == torch.bfloat16
    for name in ("text_prompt", "image_prompt", "unified_prompt"):
        assert got[name].dtype == torch.float32
        assert torch.cosine_similarity(got[name].flatten(), expected[name].flatten(), dim=0) > 0.98
    close(got["logits"].float(), expected["logits"], 0.05 * expected["logits"].abs().max().item())


@pytest.mark.parametrize("form", "ACFG")
def test_float32_prompts_on_a_frozen_bfloat16_vlmo(form):
    vlmo = make_vlmo(**SIZES).bfloat16()
    model = small(vlmo=vlmo, freeze_backbone=True, fusion_form=form, image_prompt_length=3).float()
    vlmo.bfloat16()
    inputs = small_batch()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    output = model(**inputs)
    assert output.features.dtype == torch.bfloat16
    assert output.logits.dtype == torch.float32
    output.loss.backward()
    for name, parameter in trained(model).items():
        assert not name.startswith("backbone.")
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["base_plus", "base"])
def test_gradient_checkpointing_gives_the_same_step_to_the_bit(name, frozen):
    model = small(name, vlmo=make_vlmo(name, **SIZES, drop_path_rate=0.3), freeze_backbone=frozen, fusion_form="D").train()
    inputs, steps = small_batch(), []
    for enable in (False, True):
        (model.gradient_checkpointing_enable if enable else model.gradient_checkpointing_disable)()
        torch.manual_seed(5)
        steps.append(step(model, inputs))
    for key, expected in steps[0].items():
        assert torch.equal(steps[1][key], expected), key


def test_checkpointed_layers_run_again_in_the_backward_pass():
    model, calls = small(), []
    model.gradient_checkpointing_enable()
    model.backbone.transformer.blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    loss = model(**small_batch()).loss
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


@pytest.mark.slow
def test_gradient_checkpointing_compiles():
    torch._dynamo.reset()
    model, inputs = small(), small_batch()
    expected = step(model, inputs)
    model.gradient_checkpointing_enable()
    all_close(step(torch.compile(model, backend="aot_eager", fullgraph=True), inputs, trained(model)), expected, 1e-9)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_copy_is_a_model_of_its_own(again, frozen):
    vlmo, inputs = make_vlmo(**SIZES).train(), small_batch()
    model = small(vlmo=vlmo, freeze_backbone=frozen)
    expected, twin = model(**inputs).logits, again(model)
    assert torch.equal(twin(**inputs).logits, expected)
    given = twin.unwrap()
    assert given is twin.backbone is not vlmo
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert all(parameter.requires_grad != frozen for parameter in vlmo.parameters())
    with torch.no_grad():
        twin.text_prompt.zero_()
        given.transformer.cls_token.zero_()
    assert torch.equal(model(**inputs).logits, expected)


def test_an_empty_batch():
    model = small(fusion_form="D")
    output = model(**{key: value[:0] for key, value in small_batch().items() if key != "labels"})
    assert output.logits.shape == (0, CLASSES)
    output.logits.sum().backward()
    assert not model.text_prompt.grad.any()


def test_samples_do_not_see_their_batch():
    model, inputs = small("base", fusion_form="D"), small_batch(6)
    del inputs["labels"]
    alone = [model(**{key: value[i : i + 1] for key, value in inputs.items()}).logits for i in range(6)]
    close(model(**inputs).logits, torch.cat(alone), 1e-12)


def test_padding_to_a_longer_length_changes_no_logit():
    model, inputs = small("base"), small_batch(text=6)
    longer = {**inputs, **{key: torch.nn.functional.pad(inputs[key], (0, 3)) for key in ("input_ids", "attention_mask")}}
    close(model(**longer).logits, model(**inputs).logits, 1e-12)


def test_a_mask_of_any_dtype_or_none_for_all_real():
    model, inputs = small(), small_batch()
    for dtype in (torch.bool, torch.float64):
        assert torch.equal(model(**{**inputs, "attention_mask": inputs["attention_mask"].to(dtype)}).logits, model(**inputs).logits)
    ones = model(**{**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}).logits
    close(model(**{**inputs, "attention_mask": None}).logits, ones, 1e-12)


def test_drop_path_and_dropout_are_on_where_the_vlmo_is_trained_only():
    inputs = small_batch()
    for frozen in (False, True):
        model = small(vlmo=make_vlmo(**SIZES, drop_path_rate=0.5), freeze_backbone=frozen).train()
        runs = [model(**inputs).logits for _ in range(2)]
        assert torch.equal(*runs) == frozen
        assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["base_plus", "base"])
def test_which_parts_of_the_vlmo_get_no_gradient(name):
    """What DDP's find_unused_parameters is needed for."""
    model = small(name)
    model(**small_batch()).loss.backward()
    unused = {name.removeprefix("backbone.") for name, p in model.named_parameters() if p.grad is None}
    experts = {f"transformer.blocks.2.{part}_{of}" for part in ("norm2", "mlp") for of in ("text", "imag")}
    expected = {"pooler", *experts, *(["text_embeddings.position_embeddings"] if name == "base" else [])}
    assert {next((part for part in expected if name.startswith(f"{part}.")), name) for name in unused} == expected
    assert len(unused) == 2 + 2 * (2 + 4) + (name == "base")


def test_wrong_inputs_are_named():
    model, inputs = small(), small_batch()
    del inputs["labels"]
    for change, error, message in (
        ({"pixel_values": None}, ValueError, "MoPEBAF got no pixel_values: its passes are joint"),
        ({"pixel_values": inputs["pixel_values"][:2]}, ValueError, "the same number of samples, got 4 and 2"),
        ({"attention_mask": inputs["attention_mask"][:, :5]}, ValueError, r"attention_mask must be \(B, S\) as input_ids"),
        ({"input_ids": inputs["input_ids"].repeat(1, 2)}, ValueError, "with 1 to 9 tokens"),
        ({"input_ids": None}, TypeError, "input_ids must be an int64 tensor"),
    ):
        with pytest.raises(error, match=message):
            model(**{**inputs, **change})
    with pytest.raises(ValueError, match="labels need a head: give num_classes or head to MoPEBAF"):
        small(num_classes=None)(**small_batch())
