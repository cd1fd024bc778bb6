"""Dense prediction: heads on feature maps, and the segmentation loss."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOT_A_PIXEL = -100
"""The class index of pixels that a loss ignores; the default of cross entropy."""


class SETRHead(nn.Module):
    """SETR-PUP (arXiv 2012.15840, section 3.2): alternating convolutions and upsampling by 2, from a map to pixel logits.

    Args:
        width: number of channels of the map.
        num_classes: number of channels of the logits; 1 for a binary mask.
        channels: number of channels between convolutions.
        stages: how often the size of the map is doubled; 4, as in the paper, leads from patches of 16 pixels to pixels.

    Shape:
        The last of an encoder's maps, (B, width, H, W) -> (B, num_classes, 2**stages * H, 2**stages * W).
    """

    def __init__(self, width: int, num_classes: int, channels: int = 256, stages: int = 4):
        super().__init__()
        for name, value in (("width", width), ("num_classes", num_classes), ("channels", channels), ("stages", stages)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SETRHead: {name} must be an integer >= 1, got {value!r}")
        widths = [width, *[channels] * stages]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise(widths)
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    @property
    def weight(self) -> Tensor:
        """Return the weight of the last convolution, whose rows are classes."""
        return self.classifier.weight

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for stage in self.stages:
            x = F.interpolate(stage(x), scale_factor=2, mode="bilinear", align_corners=False)
        return self.classifier(x)


class SimplePyramid(nn.Module):
    """ViTDet's pyramid (arXiv 2203.16527, section 3): four maps of 4, 2, 1 and 1/2 times the size of an encoder's last map.

    With it, heads made for multi-stage encoders, such as transformers' ``UperNetHead``, work on an encoder that has a single map.

    Args:
        width: number of channels of the input map and of the four output maps.

    Examples:
        >>> head = nn.Sequential(SimplePyramid(384), UperNetHead(UperNetConfig(num_labels=1), in_channels=[384] * 4))
    """

    def __init__(self, width: int):
        super().__init__()

        def doubled() -> nn.Module:
            return nn.ConvTranspose2d(width, width, 2, stride=2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(doubled(), nn.GroupNorm(1, width), nn.GELU(), doubled()), doubled(), nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )  # fmt: skip

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [scale(maps[-1]) for scale in self.scales]


def segmentation_loss(logits: Tensor, masks: Tensor, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    """Return the mean over samples of pixel cross entropy plus one minus the Dice coefficient of classes (arXiv 1606.04797).

    Logits are interpolated to the masks' size. With one class both terms use the sigmoid, otherwise the softmax, and the Dice
    coefficient is the mean over all classes except the first, the background. Pixels labelled -100 are ignored in both terms; a
    sample with no other pixels has a loss of 0.

    Args:
        logits: (B, C, h, w) float.
        masks: (B, H, W) class indices, or 0 and 1 if C is 1.
        reduction: "mean" or "sum" over samples.
        label_smoothing: label smoothing of the cross entropy; not applied if C is 1.
    """
    if logits.shape[-2:] != masks.shape[-2:]:
        logits = F.interpolate(logits, size=masks.shape[-2:], mode="bilinear", align_corners=False)
    masks = masks.long()
    known = masks != NOT_A_PIXEL
    counted = known.flatten(1).to(logits.dtype)
    if logits.shape[1] == 1:
        truth = torch.where(known, masks, 0)[:, None].to(logits.dtype)
        pixels = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")[:, 0]
        probabilities = logits.sigmoid()
    else:
        pixels = F.cross_entropy(logits, masks, reduction="none", label_smoothing=label_smoothing)
        probabilities = logits.softmax(1)[:, 1:]
        truth = F.one_hot(torch.where(known, masks, 0), logits.shape[1]).movedim(-1, 1)[:, 1:].to(logits.dtype)
    entropy = (pixels.flatten(1) * counted).sum(1) / counted.sum(1).clamp(min=1)
    probabilities, truth = (value.flatten(2) * counted[:, None] for value in (probabilities, truth))
    # add 1 to numerator and denominator, so that a class neither present nor predicted counts as correct
    dice = (2 * (probabilities * truth).sum(2) + 1) / (probabilities.sum(2) + truth.sum(2) + 1)
    each = torch.where(known.flatten(1).any(1), entropy + 1 - dice.mean(1), 0.0)
    return each.sum() if reduction == "sum" else each.mean()
