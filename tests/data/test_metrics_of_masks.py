"""Metrics of predicted masks."""

import pytest
import torch

from mope_fast.data import segmentation_metrics


def test_they_are_those_of_referring_segmentation():
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[0, :2], masks[1, :1, :2], masks[2, 3] = True, True, True
    predictions = torch.zeros_like(masks)
    predictions[0, :2], predictions[1, :1], predictions[2, 0] = True, True, True
    # IoU 1, 1/2, 0; nothing where nothing is
    found = segmentation_metrics(predictions, masks)
    assert found["mean_iou"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found["overall_iou"] == pytest.approx((8 + 2) / (8 + 4 + 8))
    assert [found[f"precision@{least}"] for least in (0.5, 0.6, 0.9)] == [0.75, 0.5, 0.5]
    assert segmentation_metrics(predictions.double() - 0.5, masks.long()) == found
    for wrong, message in (
        ((predictions[:2], masks), "with N >= 1"),
        ((predictions, masks.long() + 1), "must be 0 or 1"),
        ((predictions.double() * torch.nan, masks), "have NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            segmentation_metrics(*wrong)
