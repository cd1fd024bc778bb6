"""Prompts that start at the mean token of their layer."""

import copy

import pytest
import timm
import torch
from tiny_transformers import CASES, CROSS, SETTINGS, close, make_cross

from mope_fast import MoPEConfig, MoPEFusion, PromptTuned, start_prompts


def fused(family, complementary=None, **settings):
    settings = SETTINGS | {"cross_dim": None if complementary else CROSS} | settings
    return MoPEFusion(CASES[family].make(), complementary, 3, MoPEConfig(**settings)).double().eval()


def layer_inputs(encoder, inputs):
    """Of DINOv2's layers, by the encoder's own hooks."""
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0])) for layer in encoder.encoder.layer]
    encoder(**inputs)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def test_rows_are_drawn_around_the_mean_patch_of_all_batches():
    encoder = CASES["dinov2"].make()
    samples = [{"main_inputs": CASES["dinov2"].inputs(size)} for size in (3, 2)]
    layers = zip(*(layer_inputs(encoder, batch["main_inputs"]) for batch in samples), strict=True)
    tokens = [torch.cat([x[:, 1:].flatten(0, 1) for x in layer]) for layer in layers]
    means, stds = torch.stack([x.mean(0) for x in tokens]), torch.stack([x.std(0, correction=0) for x in tokens])
    model = MoPEFusion(encoder, None, 3, MoPEConfig(**SETTINGS | {"num_experts": 400, "prompt_length": 50})).double().train()
    start_prompts(model, iter(samples), progress=False)
    stack = model.bank.stacks["32"]
    for rows, tolerance in ((stack.static_prompt, 0.25), (stack.experts, 0.01)):
        drawn = (rows.flatten(1, -2) - means[:, None]) / stds[:, None]
        close(drawn.mean(1), torch.zeros_like(means), tolerance)
        close(drawn.std(1), torch.full_like(means, 0.3), tolerance)
    mapped = model.bank.eval().mapper(make_cross(4))[32]
    close(mapped, means.mean(0).expand_as(mapped))


@torch.no_grad()
def test_layers_of_several_widths_have_their_own():
    settings = {"img_size": 16, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
    swin = timm.models.swin_transformer.SwinTransformer(num_classes=0, **settings).eval()
    seen, images = [], torch.randn(3, 3, 16, 16)
    blocks = [block for layer in swin.layers for block in layer.blocks]
    hooks = [block.register_forward_pre_hook(lambda block, args: seen.append(args[0])) for block in blocks]
    swin(images)
    for hook in hooks:
        hook.remove()
    model = MoPEFusion(swin, None, 3, MoPEConfig(**SETTINGS))
    start_prompts(model, [{"main_inputs": images}], progress=False)
    means = [x.flatten(0, -2).mean(0) for x in seen]
    for width, first in (("8", 0), ("16", 2)):
        centre = torch.stack(means[first : first + 2]).mean(0)
        torch.testing.assert_close(model.bank.mapper.up[width].bias, centre, rtol=1e-4, atol=1e-5)


def test_all_of_it_learns_from_there():
    model = fused("dinov2")
    batch = {"main_inputs": CASES["dinov2"].inputs(16), "complementary_inputs": make_cross(16)}
    start_prompts(model, [batch], progress=False)
    model(**batch, labels=torch.arange(16) % 3).loss.backward()
    # with weights of zero above them these have their turn one step later
    later = ("mapper.down", "mapper.norm")
    assert all(parameter.grad.norm() > 0 for name, parameter in model.bank.named_parameters() if not name.startswith(later))


def moved(bank, before):
    return {name for name, value in bank.state_dict().items() if not torch.equal(value, before[name])}


def test_post_norm_layers_stay_and_a_prompted_complementary_side_moves():
    dinov2, bert = CASES["dinov2"].make(), CASES["bert"]
    model = fused("bert", dinov2)
    main, side = copy.deepcopy(model.bank.state_dict()), copy.deepcopy(model.complementary.bank.state_dict())
    batch = {"main_inputs": bert.inputs(3), "complementary_inputs": CASES["dinov2"].inputs(3)}
    start_prompts(model, [batch], progress=False)
    assert not moved(model.bank, main)
    assert moved(model.complementary.bank, side) == set(side)


def test_prompts_that_came_with_the_complementary_side_stay():
    tuned = PromptTuned(CASES["dinov2"].make(), 2).double()
    before = copy.deepcopy(tuned.bank.state_dict())
    model = fused("bert", tuned)
    start_prompts(model, [], progress=False)
    assert not moved(tuned.bank, before)
    start_prompts(tuned, [{"inputs": CASES["dinov2"].inputs(3)}], progress=False)
    assert moved(tuned.bank, before)


@pytest.mark.parametrize("family", CASES)
def test_every_pre_norm_family_has_tokens_to_start_at(family):
    case = CASES[family]
    model = PromptTuned(case.make(), 200, 3).double()
    before = copy.deepcopy(model.bank.state_dict())
    start_prompts(model, [{"inputs": case.inputs(3)}], progress=False)
    assert moved(model.bank, before) == (set() if model.main.layers[0].norm is None else set(before))
    assert all(value.isfinite().all() for value in model.bank.state_dict().values())


def test_what_is_wrong_is_said_and_changes_nothing():
    model, inputs = fused("dinov2"), CASES["dinov2"].inputs(2)
    before = copy.deepcopy(model.bank.state_dict())
    with pytest.raises(TypeError, match="takes a MoPEFusion or PromptTuned"):
        start_prompts(torch.nn.Linear(2, 3), [])
    with pytest.raises(ValueError, match="batches is empty"):
        start_prompts(model, [], progress=False)
    with pytest.raises(TypeError, match="must yield dicts"):
        start_prompts(model, [inputs["pixel_values"]], progress=False)
    with pytest.raises(TypeError, match="the main encoder's inputs are missing"):
        start_prompts(model, [{"labels": torch.zeros(2)}], progress=False)
    with pytest.raises(FloatingPointError, match="mean token of a layer isn't finite"):
        start_prompts(model, [{"main_inputs": torch.full_like(inputs["pixel_values"], torch.nan)}], progress=False)
    assert not moved(model.bank, before)


def test_batches_may_name_encoders_inputs():
    first = fused("dinov2")
    models = [first, copy.deepcopy(first)]
    inputs = CASES["dinov2"].inputs(2)
    for model, batch in zip(models, ({"main_inputs": inputs}, {**inputs, "labels": torch.zeros(2)}), strict=True):
        torch.manual_seed(0)
        start_prompts(model, [batch], progress=False)
    for one, other in zip(*(model.bank.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)
