"""Fused models that say something of every pixel: heads on maps, the loss of masks, and what a model does with them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_fusion import DETERMINISTIC, SETTINGS, close, make_bert, make_dinov2, make_images, make_text, trained
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetHead

from mope_fast import (
    FusionCollator,
    MoPEBAF,
    MoPEConfig,
    MoPEFusion,
    MultiAdapter,
    Predictor,
    PromptedEncoder,
    PromptTuned,
    fit_head,
)
from mope_fast.models import SETRHead, SimplePyramid, segmentation_loss

B = 4


def make_model(classes=2, head=None, **settings):
    torch.manual_seed(0)
    config = MoPEConfig(**{**SETTINGS, **settings})
    return MoPEFusion(make_dinov2(), make_bert(), classes, config, head=head, problem_type="segmentation").double().eval()


def make_batch():
    torch.manual_seed(1)
    return make_images(B), make_text(B), torch.randint(0, 2, (B, 12, 12))


def test_the_loss_is_cross_entropy_and_dice_of_each_sample():
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(0, 3, (2, 4, 5))
    masks[1, :2] = -100
    expected = []
    for b in range(2):
        known = masks[b] != -100
        scores = logits[b][:, known]
        probabilities, truth = scores.softmax(0), F.one_hot(masks[b][known], 3).T.double()
        dice = [(2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1) for p, t in zip(probabilities[1:], truth[1:], strict=True)]
        expected.append(F.cross_entropy(scores.T, masks[b][known]) + 1 - sum(dice) / 2)
    close(segmentation_loss(logits, masks), sum(expected) / 2)
    close(segmentation_loss(logits, masks, "sum"), sum(expected))
    # of one class what two with a fixed background give, but for the background
    one = logits[:, :1]
    two = torch.cat([torch.zeros_like(one), one], dim=1)
    there = (masks > 0).long()
    close(segmentation_loss(one, there), segmentation_loss(two, there))
    nothing = torch.full_like(masks, -100)
    assert segmentation_loss(logits.requires_grad_(), nothing) == 0
    assert not torch.autograd.grad(segmentation_loss(logits, nothing), logits)[0].any()
    # small logits are interpolated to the masks
    large = F.interpolate(one, size=(8, 10), mode="bilinear", align_corners=False)
    finer = torch.randint(0, 2, (2, 8, 10))
    close(segmentation_loss(one, finer), segmentation_loss(large, finer))


@pytest.mark.parametrize("classes", [1, 2])
def test_a_step_trains_all_and_folded_saved_and_exported_it_is_the_same(classes, tmp_path):
    model = make_model(classes, **DETERMINISTIC)
    images, text, masks = make_batch()
    output = model.train()(images, text, masks)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(model).values())
    assert output.logits.shape == (B, classes, 48, 48)
    assert output.feature_maps is None
    close(output.task_loss, segmentation_loss(output.logits, masks))
    together = copy.deepcopy(model)
    together.use_joint_batch()
    close(together(images, text, masks).loss, output.loss)
    expected = model.eval()(images, text).logits
    close(model.fold()(images, text).logits, expected)
    exported = torch.export.export(model.fold().for_export(), (images, text)).module()
    close(exported(images, text), expected)
    model.save_pretrained(tmp_path)
    again = MoPEFusion.from_pretrained(tmp_path, *model.unwrap()).double()
    close(again(images, text).logits, expected, 1e-5)
    assert again.num_classes == classes
    again.reset_classifier(3)
    assert again.double()(images, text).logits.shape == (B, 3, 48, 48)


def test_heads_of_ones_own_read_maps_and_the_other_feature():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(48 + 32, 1, 1)

        def forward(self, maps, other):
            return self.conv(torch.cat([maps[-1], other[:, :, None, None].expand(-1, -1, *maps[-1].shape[2:])], dim=1))

    images, text, masks = make_batch()
    model = make_model(None, Late(), head_inputs="both")
    output = model(images, text, masks, feature_maps=True)
    close(output.logits, model.head(output.feature_maps, model.complementary_feature(text)))
    config = UperNetConfig(num_labels=2, hidden_size=8, pool_scales=[1, 2])
    model = make_model(None, nn.Sequential(SimplePyramid(48), UperNetHead(config, in_channels=[48] * 4)))
    assert model(images, text, masks).logits.shape == (B, 2, 12, 12)
    tuned = PromptTuned(make_dinov2(), 2, head=SETRHead(48, 2, channels=8, stages=2), problem_type="segmentation").double().eval()
    assert tuned(images, masks).logits.shape == (B, 2, 12, 12)
    close(tuned.forward_head(tuned.forward_features(images)), tuned(images).logits)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda m: m.float(), "must be integers or bool, got torch.float32"),
        (lambda m: m[:, None], r"must be \(4, H, W\), got \(4, 1, 12, 12\); for \(B, 1, H, W\) call"),
        (lambda m: m[:2], r"must be \(4, H, W\), got \(2, 12, 12\)"),
        (lambda m: m + 1, "must be classes 0 to 1, or -100 for ignored pixels, got 2"),
    ],
)
def test_masks_that_can_not_be_meant_are_refused(masks, message):
    images, text, right = make_batch()
    model = make_model()
    with pytest.raises((TypeError, ValueError), match=message):
        model(images, text, masks(right))
    model(images, text, right.bool())


def test_what_pixels_can_not_be_asked_for_is_refused():
    with pytest.raises(ValueError, match="problem_type='segmentation' needs a head"):
        MoPEFusion(make_dinov2(), None, config=MoPEConfig(cross_dim=3), problem_type="segmentation")
    with pytest.raises(ValueError, match="reads feature maps of the main encoder, and bert has none"):
        MoPEFusion(make_bert(), None, 2, MoPEConfig(cross_dim=3), problem_type="segmentation")
    with pytest.raises(ValueError, match="SETRHead: stages must be an integer >= 1, got 0"):
        SETRHead(8, 2, stages=0)
    model = make_model()
    with pytest.raises(ValueError, match="the head reads feature maps"):
        fit_head(model, [])
    with pytest.raises(ValueError, match="this model classifies pixels"):
        Predictor(model, FusionCollator(None, None))
    shared = PromptedEncoder(make_dinov2())
    with pytest.raises(ValueError, match="adapter 'a' predicts pixels"):
        MultiAdapter({"a": PromptTuned(shared, 2, 2, problem_type="segmentation"), "b": PromptTuned(shared, 2, 2)})
    with pytest.raises(ValueError, match="which a VLMo doesn't have"):
        MoPEBAF(None, 2, problem_type="segmentation")
