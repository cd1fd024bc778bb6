"""Prompts that start at the mean token of their layer."""

import copy

import pytest
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
def test_rows_keep_their_differences_around_the_mean_patch_of_all_batches():
    encoder = CASES["dinov2"].make()
    samples = [{"main_inputs": CASES["dinov2"].inputs(size)} for size in (3, 2)]
    seen = zip(*(layer_inputs(encoder, batch["main_inputs"]) for batch in samples), strict=True)
    means = torch.stack([torch.cat([x[:, 1:].mean(1) for x in layer]).mean(0) for layer in seen])
    model = MoPEFusion(encoder, None, 3, MoPEConfig(**SETTINGS)).double().train()
    stack = model.bank.stacks["32"]
    before = [rows.clone() for rows in stack.prompts()]
    start_prompts(model, samples, progress=False)
    for rows, drawn in zip(stack.prompts(), before, strict=True):
        flat = rows.flatten(1, -2)
        close(flat.mean(1), means)
        close(flat - flat.mean(1, keepdim=True), drawn.flatten(1, -2) - drawn.flatten(1, -2).mean(1, keepdim=True))
    mapped = model.bank.eval().mapper(make_cross(4))[32]
    close(mapped, means.mean(0).expand_as(mapped))
    again = copy.deepcopy(model.bank.state_dict())
    start_prompts(model, iter(samples), progress=False)
    for name, value in model.bank.state_dict().items():
        close(value, again[name])


def test_all_of_it_learns_from_there():
    model = fused("dinov2")
    batch = {"main_inputs": CASES["dinov2"].inputs(16), "complementary_inputs": make_cross(16)}
    start_prompts(model, [batch], progress=False)
    model(**batch, labels=torch.arange(16) % 3).loss.backward()
    # with weights of zero above them these have their turn one step later
    later = ("mapper.down", "mapper.norm")
    assert all(parameter.grad.norm() > 0 for name, parameter in model.bank.named_parameters() if not name.startswith(later))


def test_post_norm_layers_stay_and_a_prompted_complementary_side_moves():
    dinov2, bert = CASES["dinov2"].make(), CASES["bert"]
    model = fused("bert", dinov2)
    main, side = copy.deepcopy(model.bank.state_dict()), copy.deepcopy(model.complementary.bank.state_dict())
    start_prompts(model, [{"main_inputs": bert.inputs(3), "complementary_inputs": CASES["dinov2"].inputs(3)}], progress=False)
    assert all(torch.equal(value, main[name]) for name, value in model.bank.state_dict().items())
    assert all(not torch.equal(value, side[name]) for name, value in model.complementary.bank.state_dict().items())


@pytest.mark.parametrize("family", [name for name in CASES if name != "bert"])
def test_every_family_finds_its_mean(family):
    case = CASES[family]
    model = PromptTuned(case.make(), 2, 3).double()
    start_prompts(model, [{"inputs": case.inputs(3)}], progress=False)
    assert all(parameter.isfinite().all() for parameter in model.bank.parameters())


def test_what_is_wrong_is_said_and_changes_nothing():
    model, inputs = fused("dinov2"), CASES["dinov2"].inputs(2)
    before = copy.deepcopy(model.bank.state_dict())
    with pytest.raises(TypeError, match="takes a MoPEFusion or PromptTuned"):
        start_prompts(torch.nn.Linear(2, 3), [])
    with pytest.raises(ValueError, match="gave none"):
        start_prompts(model, [], progress=False)
    with pytest.raises(TypeError, match="must give dicts"):
        start_prompts(model, [inputs["pixel_values"]], progress=False)
    with pytest.raises(ValueError, match=r"no main_inputs, only \['labels'\]"):
        start_prompts(model, [{"labels": torch.zeros(2)}], progress=False)
    with pytest.raises(FloatingPointError, match="mean token of a layer isn't finite"):
        start_prompts(model, [{"main_inputs": torch.full_like(inputs["pixel_values"], torch.nan)}], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.bank.state_dict().items())
