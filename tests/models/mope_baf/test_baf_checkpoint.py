"""MoPE-BAFs on disk: with frozen and trained VLMos, every head, and clear errors that leave the VLMo as it was."""

import hashlib
import json

import pytest
import torch
from literal_baf import ODD, words
from safetensors.torch import load_file, save_file
from tiny_baf import LENGTHS, SMALL, make_baf, make_inputs, make_vlmo
from torch import nn

from mope_fast import BAFConfig, MoPEBAF
from mope_fast.models import checkpoint

SIZES = {**SMALL, "num_layers": 3, "first_fusion_layer": 2, "mlm_head": True}
WIDTH = SIZES["hidden_size"]


def vlmo(seed=1, **sizes):
    return make_vlmo(seed=seed, **{**SIZES, **sizes})


def logits(model):
    inputs = make_inputs(3, image_size=SIZES["image_size"])
    inputs["input_ids"][:, 2] = 3
    with torch.no_grad():
        return model(**inputs).logits


def make_head():
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 2)).double()


def unchanged(given):
    return all(part.training for part in given.modules()) and all(p.requires_grad for p in given.parameters())


def weights_of(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def rewrite(folder, change):
    file = folder / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    change(description)
    file.write_text(json.dumps(description))


SETTINGS = {
    "default": {},
    "mlp": {"head": "mlp", "fusion_form": "C", "image_prompt_length": 3, "share_directions": True},
    "verbalizer": {"head": "verbalizer", "verbalizer": [[4], [5, 6], [7]], "mask_token_id": 3, "share_boundaries": True},
    "tables": {
        "visible": words(ODD), "fusion_visible": words(ODD), "unified_from_start": True, "keep_modality_prompts": True,
        "boundaries": [1, 2], "per_block_prompts": True,
    },
    "G": {"fusion_form": "G", "unified_from_start": True, "text_prompt_length": 0},
    "no prompts": dict.fromkeys(LENGTHS, 0),
}  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_reloaded_model_gives_bitwise_the_same_logits(settings, frozen, tmp_path):
    model = make_baf(vlmo(), freeze_backbone=frozen, **settings)
    model.save_pretrained(tmp_path)
    state = load_file(weights_of(tmp_path))
    assert any(key.startswith("backbone.") for key in state) != frozen
    # a trained one brings its weights along
    loaded = MoPEBAF.from_pretrained(tmp_path, vlmo(seed=1 if frozen else 9).train()).double()
    assert not any(part.training for part in loaded.modules())
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(make_baf(vlmo(), seed=8, **settings)), logits(model))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_problem_type_and_absence_of_a_head_are_saved(problem_type, tmp_path):
    make_baf(vlmo(), None, problem_type=problem_type).save_pretrained(tmp_path)
    loaded = MoPEBAF.from_pretrained(tmp_path, vlmo())
    assert loaded.problem_type == problem_type
    assert loaded.head is None


def test_a_head_of_ones_own_is_wanted_back(tmp_path):
    model = make_baf(vlmo(), own_head=make_head())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head: saved with Sequential, got None"):
        MoPEBAF.from_pretrained(tmp_path, vlmo())
    with pytest.raises(ValueError, match="head: saved with Sequential, got Linear"):
        MoPEBAF.from_pretrained(tmp_path, vlmo(), head=nn.Linear(WIDTH, 2))
    assert torch.equal(logits(MoPEBAF.from_pretrained(tmp_path, vlmo(), head=make_head()).double()), logits(model))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 24}, r"main: saved with .*'hidden_size': 20.*got .*'hidden_size': 24"),
        ({"num_layers": 4}, r"'num_layers': 3.*got .*'num_layers': 4"),
        ({"max_text_length": 8}, r"'max_text_length': 9.*got .*'max_text_length': 8"),
        ({"mlm_head": False}, r"'mlm_head': True.*got .*'mlm_head': False"),
        ({"first_fusion_layer": 1}, "num_blocks=2 is more than the 1 layers"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_vlmo_of_other_sizes_is_refused_and_left_as_it_was(sizes, message, frozen, tmp_path):
    make_baf(vlmo(), freeze_backbone=frozen).save_pretrained(tmp_path)
    given = vlmo(**sizes).train()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        MoPEBAF.from_pretrained(tmp_path, given)
    assert unchanged(given)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_drop_path_may_be_another(tmp_path):
    model = make_baf(vlmo())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MoPEBAF.from_pretrained(tmp_path, vlmo(drop_path_rate=0.4)).double()), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["config"].update(text_prompt_length=4), r"text_prompt: saved \(1, 3, 20\), expected \(1, 4, 20\)"),
        (lambda d: d["config"].update(num_blocks=1), r"unexpected: fusions\.0\.to_text\.norm_query\.weight"),
        (lambda d: d["config"].update(num_blocks="2"), r"mope_fast.json is damaged: BAFConfig.num_blocks must be int, got '2'"),
        (lambda d: d["config"].pop("text_prompt_length"), r"mope_fast.json is damaged: .*'text_prompt_length'"),
        (lambda d: d["config"].update(boundaries=[[1]]), "mope_fast.json is damaged: BAFConfig.boundaries must be a list of"),
        (lambda d: d["config"].update(num_blocks=0), "BAFConfig.num_blocks must be >= 1, got 0"),
        (lambda d: d["config"].update(future=1), r"has settings that this version doesn't know: \['future'\]"),
        (lambda d: d.update(model="MoPEFusion"), "was saved by MoPEFusion, not by MoPEBAF"),
        (lambda d: d.update(num_classes=7), r"head.weight: saved \(3, 20\), expected \(7, 20\)"),
        (lambda d: d.update(problem_type="ranking"), "problem_type must be one of"),
        (lambda d: d.pop("main"), r"lacks \['main'\]"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_description_that_does_not_fit_is_refused(change, message, frozen, tmp_path):
    make_baf(vlmo(), freeze_backbone=frozen).save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    given = vlmo().train()
    with pytest.raises(ValueError, match=message):
        MoPEBAF.from_pretrained(tmp_path, given)
    assert unchanged(given)


@pytest.mark.parametrize("frozen", [False, True])
def test_missing_and_foreign_files_are_named(frozen, tmp_path):
    given = vlmo().train()
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a folder written by MoPEBAF\.save_pretrained"):
        MoPEBAF.from_pretrained(tmp_path, given)
    make_baf(vlmo(), freeze_backbone=frozen).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="MoPEBAF needs a VLMo, got Linear"):
        MoPEBAF.from_pretrained(tmp_path, nn.Linear(2, 2))
    state = load_file(weights_of(tmp_path))
    weights_of(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match=r"does not exist, but mope_fast\.json names it"):
        MoPEBAF.from_pretrained(tmp_path, given)
    del state["text_prompt"]
    save_file(state, tmp_path / "other")
    name = f"mope_fast-{hashlib.sha256((tmp_path / 'other').read_bytes()).hexdigest()[:16]}.safetensors"
    (tmp_path / "other").rename(tmp_path / name)
    rewrite(tmp_path, lambda description: description.update(weights=name))
    with pytest.raises(ValueError, match="missing: text_prompt"):
        MoPEBAF.from_pretrained(tmp_path, given)
    assert unchanged(given)


def test_a_verbalizer_wants_the_head_for_masked_words_back(tmp_path):
    make_baf(vlmo(), **SETTINGS["verbalizer"], freeze_backbone=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="create the VLMo with mlm_head=True"):
        MoPEBAF.from_pretrained(tmp_path, vlmo(mlm_head=False))


def test_what_is_saved_says_what_it_is(tmp_path):
    make_baf(vlmo()).save_pretrained(tmp_path)
    description = json.loads((tmp_path / checkpoint.DESCRIPTION).read_text())
    assert (description["model"], description["head"], description["num_classes"]) == ("MoPEBAF", "Linear", 3)
    assert description["main"]["family"] == "VLMo"
    assert BAFConfig(**description["config"]) == BAFConfig(**LENGTHS)
