"""Metrics of classification and segmentation, and their mean and standard deviation over runs."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def classification_metrics(predictions: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Compute accuracy and F1 of predicted classes, by scikit-learn with ``zero_division=0``.

    MoPE-BAF reports accuracy and F1, but it is not known which F1, so all are returned: ``f1_macro`` is the mean over all
    ``num_classes`` (a class that neither occurs nor is predicted counts as 0), ``f1_weighted`` is the mean weighted by how often a
    class occurs, and ``f1_binary``, with two classes only, is the F1 of class 1.

    Args:
        predictions: (N, num_classes) floating-point logits, or (N,) integer class indices; a tensor, array or list.
        labels: (N,) integer class indices.
        num_classes: number of classes, at least 2.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: labels or predictions have a wrong dtype.
        ValueError: there is no sample, shapes don't fit, classes are out of range, or logits have NaN.
    """
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 2:
        raise ValueError(f"num_classes must be an integer >= 2, got {num_classes!r}")
    predictions, labels = _tensor("predictions", predictions), _tensor("labels", labels)
    if predictions.is_floating_point():
        if predictions.dim() != 2 or predictions.shape[1] != num_classes:
            raise ValueError(f"logits must be (N, {num_classes}), got {tuple(predictions.shape)}; predicted classes are integers")
        if (bad := predictions.isnan().any(1)).any():
            raise ValueError(f"logits of {int(bad.sum())} of {len(bad)} samples have NaN: they can't be measured")
        predictions = predictions.argmax(1)
    if labels.shape != predictions.shape or labels.dim() != 1 or not len(labels):
        raise ValueError(
            f"predictions and labels must have the same N >= 1 samples, got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    for name, classes in (("predictions", predictions), ("labels", labels)):
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            raise TypeError(f"{name} must be integer classes, got {classes.dtype}")
        if not 0 <= classes.min() <= classes.max() < num_classes:
            got = f"{int(classes.min())} to {int(classes.max())}"
            raise ValueError(f"{name} must be 0 to {num_classes - 1} for {num_classes} classes, got {got}")
    try:
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError as error:
        raise ImportError("classification_metrics needs scikit-learn: pip install 'mope_fast[few-shot]'") from error
    truth, guess = labels.numpy(), predictions.numpy()

    def f1(average: str, classes: Sequence[int]) -> float:
        return float(f1_score(truth, guess, labels=classes, average=average, zero_division=0))

    metrics = {
        "accuracy": float(accuracy_score(truth, guess)),
        "f1_macro": f1("macro", range(num_classes)),
        "f1_weighted": f1("weighted", range(num_classes)),
    }
    if num_classes == 2:
        metrics["f1_binary"] = f1("macro", [1])
    return metrics


def multi_label_metrics(logits: Tensor, labels: Tensor, *, threshold: float = 0.5) -> dict[str, float]:
    """Compute accuracy and F1 of multi-label predictions, by scikit-learn with ``zero_division=0``.

    ``f1_macro`` is the mean over classes (a class that neither occurs nor is predicted counts as 0), ``f1_micro`` counts over all
    classes together, ``accuracy`` is the share of samples with all classes correct.

    Args:
        logits: (N, C), floating-point.
        labels: (N, C), 0 or 1.
        threshold: a class is predicted if the sigmoid of its logit is above this.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: logits are not floating-point.
        ValueError: there is no sample, shapes don't fit, labels are not 0 or 1, or logits have NaN.
    """
    logits, labels = _tensor("logits", logits), _tensor("labels", labels)
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating-point, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape != labels.shape or not logits.numel():
        raise ValueError(f"logits and labels must be (N, C) with N >= 1, got {tuple(logits.shape)} and {tuple(labels.shape)}")
    if (bad := logits.isnan().any(1)).any():
        raise ValueError(f"logits of {int(bad.sum())} of {len(bad)} samples have NaN: they can't be measured")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1 for each class")
    try:
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError as error:
        raise ImportError("multi_label_metrics needs scikit-learn: pip install 'mope_fast[few-shot]'") from error
    truth, guess = labels.long().numpy(), (logits.sigmoid() > threshold).long().numpy()
    # with a single column scikit-learn would count 0 as a class too
    classes = range(truth.shape[1]) if truth.shape[1] > 1 else [1]
    f1 = {f"f1_{name}": float(f1_score(truth, guess, labels=classes, average=name, zero_division=0)) for name in ("macro", "micro")}
    return {"accuracy": float(accuracy_score(truth, guess)), **f1}


def segmentation_metrics(predictions: Tensor, masks: Tensor) -> dict[str, float]:
    """Compute the metrics of referring segmentation for predicted masks.

    ``mean_iou`` is the mean over samples of intersection over union. ``overall_iou`` is the sum of all intersections over the sum
    of all unions, which large objects dominate. ``precision@0.5`` to ``precision@0.9`` are the shares of samples with at least that
    IoU. A sample with an empty mask has an IoU of 1 if nothing is predicted, else 0.

    Args:
        predictions: (N, H, W) bool; or floating-point logits, where a pixel is predicted if its logit is above 0.
        masks: (N, H, W), bool or 0 and 1.

    Raises:
        ValueError: there is no sample, shapes don't fit, masks have other values, or logits have NaN.
    """
    predictions, masks = _tensor("predictions", predictions), _tensor("masks", masks)
    if predictions.dim() != 3 or predictions.shape != masks.shape or not predictions.numel():
        raise ValueError(
            f"predictions and masks must be (N, H, W) with N >= 1, got {tuple(predictions.shape)} and {tuple(masks.shape)}"
        )
    if predictions.is_floating_point():
        if (bad := predictions.isnan().flatten(1).any(1)).any():
            raise ValueError(f"logits of {int(bad.sum())} of {len(bad)} samples have NaN: they can't be measured")
        predictions = predictions > 0
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError("masks must be 0 or 1 for each pixel")
    predictions, masks = predictions.bool().flatten(1), masks.bool().flatten(1)
    return overlap_metrics((predictions & masks).sum(1), (predictions | masks).sum(1))


def overlap_metrics(intersection: Tensor, union: Tensor) -> dict[str, float]:
    """Compute the metrics of :func:`segmentation_metrics` from overlaps, for pictures of any sizes.

    Args:
        intersection: (N,), number of pixels of each sample that are in both the prediction and the mask.
        union: (N,), number of pixels that are in either of them.

    Raises:
        ValueError: there is no sample, shapes don't fit, or an intersection is negative or larger than its union.
    """
    intersection, union = _tensor("intersection", intersection).double(), _tensor("union", union).double()
    if intersection.dim() != 1 or intersection.shape != union.shape or not len(union):
        shapes = f"{tuple(intersection.shape)} and {tuple(union.shape)}"
        raise ValueError(f"intersection and union must be (N,) with N >= 1, got {shapes}")
    if not ((intersection >= 0) & (intersection <= union)).all():
        raise ValueError("each intersection must be between 0 and its union")
    iou = torch.where(union > 0, intersection / union.clamp(min=1), 1.0)
    overall = intersection.sum() / union.sum() if union.sum() else torch.ones(())
    precision = {f"precision@{least}": (iou >= least).double().mean().item() for least in (0.5, 0.6, 0.7, 0.8, 0.9)}
    return {"mean_iou": iou.mean().item(), "overall_iou": overall.item(), **precision}


def _tensor(name: str, values: object) -> Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor, array or list of numbers, got {values!r:.80}") from error


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (ddof=1; NaN for one run) of each metric; ``str()`` gives a table."""

    runs: int
    mean: dict[str, float]
    std: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, self.mean))
        runs = f"{self.runs} run{'s' * (self.runs > 1)}"
        rows = [f"{name:{width}}  {self.mean[name]:.4f} ± {self.std[name]:.4f}" for name in self.mean]
        return "\n".join([f"{'':{width}}  mean ± std of {runs}", *rows])


def summarize(runs: Sequence[Mapping[str, float]]) -> Summary:
    """Summarize the metrics of several runs, such as those of :func:`classification_metrics` for five seeds.

    Raises:
        TypeError: ``runs`` is not a sequence of dicts of numbers.
        ValueError: there is no run or no metric, runs have different metrics, or a value is not finite.
    """
    if isinstance(runs, Mapping) or not all(isinstance(run, Mapping) for run in runs):
        raise TypeError(f"runs must be a list of dicts of metrics, one for each run, got {runs!r:.80}")
    if not runs or not runs[0]:
        raise ValueError("there is nothing to summarize: give one dict of metrics for each run")
    for i, run in enumerate(runs):
        if run.keys() != runs[0].keys():
            raise ValueError(f"all runs must have the same metrics, but run 0 has {list(runs[0])} and run {i} {list(run)}")
        for name, value in run.items():
            if not isinstance(value, (int, float)):
                raise TypeError(f"{name} of run {i} must be a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"{name} of run {i} is {value}: leave out failed runs and report that")
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return Summary(
        runs=len(runs),
        mean={name: statistics.fmean(values) for name, values in columns.items()},
        std={name: statistics.stdev(values) if len(values) > 1 else math.nan for name, values in columns.items()},
    )
