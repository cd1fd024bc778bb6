"""Starting prompts from text, heads and pooling, losses, optimiser groups, frozen VLMos."""

import pytest
import torch
import torch.nn.functional as F
from tiny_baf import CLASSES, LENGTHS, close, gradients, make_baf, make_inputs, make_vlmo, trained
from torch import nn

from mope_fast import BAFConfig, MoPEBAF, MoPEConfig

WORDS = [[4], [5, 6, 7], [8, 4]]
MASK = 3
VERBALIZER = {"head": "verbalizer", "verbalizer": WORDS, "mask_token_id": MASK}


def modes(module):
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("group", ["text_prompt", "image_prompt", "unified_prompt"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_token_ids_become_their_embeddings_repeated_or_cut(group, count):
    model = make_baf().train()
    before, ids = modes(model), torch.tensor([7, 9, 7, 11, 13])[:count]
    model.set_prompt(group, ids)
    rows = model.eval().backbone.embed_text(ids[None])[0]
    length = LENGTHS[f"{group}_length"]
    assert torch.equal(getattr(model, group)[0], rows.repeat(length, 1)[:length])
    assert modes(model.train()) == before
    assert getattr(model, group).requires_grad


def test_embeddings_are_taken_as_they_are_by_every_block():
    model, rows = make_baf(num_blocks=3, per_block_prompts=True), torch.randn(2, 68, dtype=torch.float64)
    assert model.text_prompt.shape == (3, 3, 68)
    unified = model.unified_prompt.clone()
    assert len(unified) == 1
    model.set_prompt("text_prompt", rows)
    for of_block in model.text_prompt:
        assert torch.equal(of_block, rows[[0, 1, 0]])
    assert torch.equal(model.unified_prompt, unified)


@pytest.mark.parametrize(
    ("group", "source", "error", "message"),
    [
        ("text", torch.tensor([1]), ValueError, r"set_prompt got 'text': expected one of \['unified_prompt', 'text_prompt'\]"),
        ("image_prompt", torch.tensor([1]), ValueError, "set_prompt got 'image_prompt': expected one of"),
        ("text_prompt", torch.randn(2, 67), ValueError, r"token ids \(n,\) or float rows \(n, 68\), got torch.float32 \(2, 67\)"),
        ("text_prompt", torch.randn(0, 68), ValueError, r"got torch.float32 \(0, 68\)"),
        ("text_prompt", torch.randn(1, 2, 68), ValueError, r"got torch.float32 \(1, 2, 68\)"),
        ("text_prompt", torch.ones(2, 68, dtype=torch.long), ValueError, r"got torch.int64 \(2, 68\)"),
        ("text_prompt", torch.ones(10, dtype=torch.long), ValueError, r"with 1 to 9 tokens, got \(1, 10\)"),
        ("text_prompt", torch.ones(0, dtype=torch.long), ValueError, r"with 1 to 9 tokens, got \(1, 0\)"),
        ("text_prompt", [1, 2], TypeError, "source must be a tensor, got list"),
    ],
)
def test_a_wrong_prompt_is_named_and_changes_nothing(group, source, error, message):
    model = make_baf(image_prompt_length=0).train()
    before, mode = model.text_prompt.clone(), modes(model)
    with pytest.raises(error, match=message):
        model.set_prompt(group, source)
    assert torch.equal(model.text_prompt, before)
    assert modes(model) == mode


def test_the_mlp_head():
    model, inputs = make_baf(head="mlp"), make_inputs()
    output = model(**inputs)
    up, norm, _, down = model.head
    assert (up.out_features, down.in_features, down.out_features) == (136, 136, CLASSES)
    close(output.logits, down(F.gelu(norm(up(output.features)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_verbalizer_takes_the_mean_logit_of_each_class_words_at_the_mask(dtype):
    model, inputs = make_baf(make_vlmo(mlm_head=True), **VERBALIZER).to(dtype), make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    positions = [2, 0, 1, 2]
    for sample, position in enumerate(positions):
        inputs["input_ids"][sample, position] = MASK
    inputs["input_ids"][1, 3] = MASK  # the first one counts
    output = model(**inputs)
    text = model.hidden_states(**inputs)["text"][range(4), positions]
    assert torch.equal(output.features, text)
    scores = model.backbone.mlm_score(text)
    expected = torch.stack([scores[:, words].mean(-1) for words in WORDS], -1)
    close(output.logits, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    assert output.logits.dtype == dtype


def test_a_text_without_the_mask_token_gives_nan():
    model, inputs = make_baf(make_vlmo(mlm_head=True), **VERBALIZER), make_inputs()
    inputs["input_ids"][inputs["input_ids"] == MASK] = 9
    inputs["input_ids"][[0, 2], 1] = MASK
    logits = model(**inputs).logits
    assert logits[[1, 3]].isnan().all()
    assert logits[[0, 2]].isfinite().all()
    assert model(**inputs, labels=torch.zeros(4, dtype=torch.long)).loss.isnan()


def test_a_head_of_ones_own_reads_what_pooling_gives():
    head = nn.Sequential(nn.Linear(68, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = make_inputs()
    for settings in ({"pooling": "pooler"}, {"pooling": "pooler", **VERBALIZER}):
        model = make_baf(make_vlmo(mlm_head=True), own_head=head, **settings)
        output = model(**inputs)
        close(output.features, model.backbone.pooler(model.hidden_states(**inputs)["text"][:, 0]))
        close(output.logits, head(output.features))


def test_without_a_head_there_are_features_only():
    output = make_baf(num_classes=None)(**make_inputs())
    assert output.logits is None
    assert output.features.shape == (4, 68)


@pytest.mark.parametrize(
    ("problem_type", "labels", "loss"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1, 1]), F.cross_entropy),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1]] * 4).double(), F.binary_cross_entropy_with_logits),
        ("regression", torch.arange(12).view(4, 3) / 4, lambda x, y: F.mse_loss(x, y.double())),
    ],
)
def test_losses(problem_type, labels, loss):
    model, inputs = make_baf(problem_type=problem_type), make_inputs()
    output = model(**inputs, labels=labels)
    close(output.loss, loss(output.logits, labels))
    assert output.task_loss is output.loss


def test_every_trained_parameter_is_in_one_group_and_vectors_do_not_decay():
    vlmo = make_vlmo("base")
    vlmo.transformer.cls_token.requires_grad_(False)
    model = make_baf(vlmo, share_directions=True, fusion_form="C", image_prompt_length=3)
    groups = model.parameter_groups(1e-3, 0.05, head_lr_multiplier=50)
    placed = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sorted(placed) == sorted(map(id, trained(model).values()))
    assert sum(len(group["params"]) for group in groups) == len(placed)
    rates = {name: placed[id(p)] for name, p in trained(model).items()}
    assert {name: rate for name, (rate, _) in rates.items() if rate != 1e-3} == {"head.weight": 0.05, "head.bias": 0.05}
    without = {name for name, (_, decay) in rates.items() if not decay}
    assert without == {name for name, p in trained(model).items() if p.dim() == 1 or "bias" in name}
    assert "backbone.relative_position_bias_table" in without
    assert {decay for _, decay in rates.values()} == {0.0, 0.05}
    assert rates["text_prompt"] == rates["backbone.text_embeddings.word_embeddings.weight"] == (1e-3, 0.05)
    torch.optim.AdamW(groups).step()


def test_a_rate_for_a_head_that_is_not_there_is_refused():
    model = make_baf(num_classes=None)
    assert model.parameter_groups(1e-3)
    with pytest.raises(ValueError, match="head_lr_multiplier is 5, but this MoPEBAF has no head"):
        model.parameter_groups(1e-3, head_lr_multiplier=5)


def test_of_a_frozen_vlmo_nothing_is_trained():
    model, inputs = make_baf(freeze_backbone=True), make_inputs()
    names = set(trained(model))
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("backbone.")}
    assert sum(len(group["params"]) for group in model.parameter_groups(1e-3)) == len(names)
    model.train()
    assert model.head.training
    assert not any(modes(model.backbone))
    output = model(**inputs, labels=torch.arange(4) % CLASSES)
    output.loss.backward()
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)


def test_frozen_and_trained_give_the_same_logits_and_prompt_gradients():
    inputs, results = make_inputs(), []
    for frozen in (False, True):
        model = make_baf(freeze_backbone=frozen)
        prompts = {name: parameter for name, parameter in trained(model).items() if not name.startswith("backbone.")}
        logits = model(**inputs).logits
        results.append((logits, gradients(logits, prompts, torch.ones(4, CLASSES))))
    close(*results)


def test_unwrapping_gives_flags_and_modes_back():
    vlmo = make_vlmo().train()
    vlmo.transformer.norm.eval()
    vlmo.pooler.requires_grad_(False)
    flags, before = [p.requires_grad for p in vlmo.parameters()], modes(vlmo)
    model = make_baf(vlmo, freeze_backbone=True).train()
    assert model.unwrap() is vlmo
    assert [p.requires_grad for p in vlmo.parameters()] == flags
    assert modes(vlmo) == before
    vlmo.eval()
    assert model.unwrap() is vlmo
    assert not any(modes(vlmo))


def test_two_frozen_models_share_a_vlmo():
    vlmo, inputs = make_vlmo().train(), make_inputs()
    first, second = (make_baf(vlmo, freeze_backbone=True, seed=seed) for seed in (5, 6))
    expected = first(**inputs).logits
    assert not torch.allclose(second.train()(**inputs).logits, expected, atol=1e-3)
    assert torch.equal(first.eval()(**inputs).logits, expected)
    second.unwrap()
    assert not any(p.requires_grad for p in vlmo.parameters())
    assert torch.equal(first(**inputs).logits, expected)
    first.unwrap()
    assert all(p.requires_grad for p in vlmo.parameters())
    assert all(modes(vlmo))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda v, c: MoPEBAF(nn.Linear(2, 2), 2, c), TypeError, "MoPEBAF needs a VLMo, got Linear: use VLMo.from_checkpoint"),
        (lambda v, c: MoPEBAF(v, 2), TypeError, r"MoPEBAF needs config=BAFConfig\(text_prompt_length=.*got NoneType"),
        (lambda v, c: MoPEBAF(v, 2, MoPEConfig()), TypeError, "got MoPEConfig"),
        (lambda v, c: MoPEBAF(v, True, c), ValueError, "num_classes must be an integer >= 1, got True"),
        (lambda v, c: MoPEBAF(v, 2, c, head=nn.Linear(68, 2)), ValueError, "give num_classes for a linear head or head"),
        (lambda v, c: MoPEBAF(v, 2, c, problem_type="ranking"), ValueError, "problem_type must be one of"),
        (lambda v, c: MoPEBAF(v, None, c, head=v.pooler.dense), ValueError, "head is a part of a frozen module"),
    ],
)
def test_wrong_arguments_are_named_and_leave_the_vlmo_as_it_was(build, error, message):
    vlmo = make_vlmo().train()
    with pytest.raises(error, match=message):
        build(vlmo, BAFConfig(**LENGTHS, freeze_backbone=True))
    assert all(modes(vlmo))
    assert all(parameter.requires_grad for parameter in vlmo.parameters())


@pytest.mark.parametrize(
    ("sizes", "classes", "settings", "message"),
    [
        ({}, 3, VERBALIZER, "head='verbalizer' uses VLMo's masked language modelling head: create the VLMo with mlm_head=True"),
        ({"mlm_head": True}, 2, VERBALIZER, "has words for 3 classes, but num_classes is 2"),
        ({"mlm_head": True}, 3, {**VERBALIZER, "verbalizer": [[4], [50], [5]]}, "token id 50, but the vocabulary has ids 0 to 49"),
        ({"mlm_head": True}, 3, {**VERBALIZER, "mask_token_id": 50}, "mask_token_id=50 is outside of the vocabulary, 0 to 49"),
        ({}, 3, {"fusion_heads": 3}, "the width 68 must be a multiple of num_heads=3"),
        ({}, 3, {"fusion_form": "G", "text_prompt_length": 0, "fusion_heads": 3}, "must be a multiple of num_heads=3"),
        ({}, 3, {"num_blocks": 4}, "num_blocks=4 is more than the 3 layers that are cut into blocks"),
        ({}, 3, {"boundaries": [3]}, r"only before layers 1 to 2 here, got boundaries \(3,\): from layer 3 on, text and image"),
        ({}, 3, {"boundaries": [0]}, r"only before layers 1 to 2 here, got boundaries \(0,\)"),
        ({}, 3, {"boundaries": [5], "keep_modality_prompts": True}, "only before layers 1 to 4 here"),
        ({}, 3, {"partition": "stages"}, r"only before layers 1 to 2 here, got boundaries \(3,\)"),
        ({}, 3, {"partition": "all", "num_blocks": 3}, r"only before layers 1 to 2 here, got boundaries \(2, 4\)"),
        ({}, 3, {"visible": {"text": ["text"]}}, "BAFConfig.visible has no entry for 'text_prompt': give it a list"),
        ({}, 3, {"fusion_visible": {"text": []}}, "BAFConfig.fusion_visible has no entry for 'unified_prompt'"),
        ({"first_fusion_layer": 5}, 3, {}, "this VLMo has no fusion layers for the unified prompt: set unified_from_start=True"),
        ({"first_fusion_layer": 5}, 3, {"fusion_form": "G", "unified_from_start": True}, "form G could create the unified prompt"),
        ({"first_fusion_layer": 0}, 3, {"num_blocks": 1}, "this VLMo has only fusion layers, where text and image have no prompts"),
    ],
)
def test_settings_that_do_not_fit_the_vlmo_are_named(sizes, classes, settings, message):
    vlmo = make_vlmo(**sizes).train()
    with pytest.raises(ValueError, match=message):
        make_baf(vlmo, classes, freeze_backbone=True, **settings)
    assert all(modes(vlmo))
