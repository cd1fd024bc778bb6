"""A save knows the frozen weights it was trained on: others are a warning or refused, the same in another form are the same."""

import copy
import json
import warnings

import pytest
import timm
import torch
from tiny_baf import make_baf, make_vlmo
from tiny_fusion import CLASSES, SETTINGS, make_bert, make_dinov2
from torch import nn

from mope_fast import MoPEBAF, MoPEConfig, MoPEFusion, PromptTuned
from mope_fast.encoders.weights import sample_weights
from mope_fast.models import checkpoint


def bert(seed=1):
    torch.manual_seed(seed)
    return make_bert().float()


def dinov2(seed=2):
    torch.manual_seed(seed)
    return make_dinov2().float()


def make_vit():
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3)


@pytest.fixture
def saved(tmp_path):
    MoPEFusion(bert(), dinov2(), CLASSES, MoPEConfig(**SETTINGS)).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize(
    ("encoders", "side"), [(lambda: (bert(5), dinov2()), "main"), (lambda: (bert(), dinov2(5)), "complementary.main")]
)
def test_other_weights_of_the_same_shapes_are_a_warning_and_refused_by_strict(saved, encoders, side):
    message = f"was trained on other weights of '{side}' than it is loaded onto: .* has .*, had .* and .* more"
    with pytest.warns(UserWarning, match=message) as seen:
        MoPEFusion.from_pretrained(saved, *encoders()).unwrap()
    assert seen[0].filename == __file__
    main, side = encoders()
    with pytest.raises(ValueError, match=message):
        MoPEFusion.from_pretrained(saved, main, side, strict=True)
    model = MoPEFusion(main, side, CLASSES, MoPEConfig(**SETTINGS))  # they were given back
    before = {name: value.clone() for name, value in model.trained_state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_pretrained(saved, strict=True)
    assert all(torch.equal(value, before[name]) for name, value in model.trained_state_dict().items())


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_precision_are_the_same(saved, dtype, tmp_path):
    model = MoPEFusion.from_pretrained(saved, bert().to(dtype), dinov2().to(dtype), strict=True)
    model.save_pretrained(tmp_path / "again")
    MoPEFusion.from_pretrained(tmp_path / "again", bert().bfloat16(), dinov2(), strict=True)


@pytest.mark.usefixtures("silent")
def test_wrapped_compiled_or_without_its_head_an_encoder_is_the_same(tmp_path):
    vit = make_vit()
    plain = sample_weights(vit)
    model = PromptTuned(vit, 2)
    wrapped = sample_weights(model.main)
    assert {**wrapped["needed"], **wrapped["others"]} == plain["needed"]
    assert all(name.startswith("blocks.0.") for name in wrapped["needed"])
    assert len(wrapped["others"]) > 3
    model.save_pretrained(tmp_path)
    vit = make_vit()
    vit.reset_classifier(0)
    vit.blocks[0].mlp.compile()
    PromptTuned.from_pretrained(tmp_path, vit, strict=True)


class LoRA(nn.Module):
    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.base_layer(x) + self.lora_A


def test_a_changed_layer_and_a_black_box_count_too(tmp_path):
    torch.manual_seed(4)
    black = nn.Linear(6, 20)
    MoPEFusion(bert(), black, 3, MoPEConfig(**SETTINGS, cross_dim=20)).save_pretrained(tmp_path)
    changed = bert()
    changed.encoder.layer[0].output.dense = LoRA(changed.encoder.layer[0].output.dense)
    names = r"encoder.layer.0.output.dense.base_layer.bias is new; .*; encoder.layer.0.output.dense.bias is missing and 2 more"
    with pytest.warns(UserWarning, match=names):
        MoPEFusion.from_pretrained(tmp_path, changed, copy.deepcopy(black))
    with torch.no_grad():
        black.bias += 0.1
    with pytest.warns(UserWarning, match=r"other weights of 'complementary' than it is loaded onto: bias has"):
        MoPEFusion.from_pretrained(tmp_path, bert(), black)


def test_a_frozen_vlmo_counts_and_a_trained_one_is_saved_whole(tmp_path):
    for frozen in (True, False):
        make_baf(make_vlmo(), freeze_backbone=frozen).save_pretrained(tmp_path)
        if frozen:
            with pytest.raises(ValueError, match="other weights of 'backbone'"):
                MoPEBAF.from_pretrained(tmp_path, make_vlmo(seed=7), strict=True)
        else:
            MoPEBAF.from_pretrained(tmp_path, make_vlmo(seed=7), strict=True)


def test_what_can_not_be_compared_is_taken_but_not_by_strict(saved):
    file = saved / checkpoint.DESCRIPTION
    description = json.loads(file.read_text())
    samples = description.pop("encoders")
    file.write_text(json.dumps(description))  # as older versions have it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoPEFusion.from_pretrained(saved, bert(5), dinov2())
    with pytest.raises(ValueError, match=r"can't check that 'main' has the weights .* because the save holds no samples of it"):
        MoPEFusion.from_pretrained(saved, bert(), dinov2(), strict=True)
    file.write_text(json.dumps({**description, "encoders": {**samples, "main": {"needed": 3}}}))
    with pytest.raises(ValueError, match="is damaged: it has no valid samples of 'main'"):
        MoPEFusion.from_pretrained(saved, bert(), dinov2())


@pytest.mark.parametrize("change", [lambda m: m.to("meta"), lambda m: m.register_parameter("q", quantised())])
def test_weights_that_can_not_be_read_have_no_sample(change):
    module = nn.Linear(2, 2)
    change(module)
    assert sample_weights(module) is None


def quantised():
    return nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
