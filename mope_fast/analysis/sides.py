"""The contribution of each complementary side to a model's predictions, measured by removing that side."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._modes import evaluating
from .._progress import tracked
from ..data.metrics import classification_metrics, multi_label_metrics
from ..models import MoPEFusion
from ..models.complementary import batch_of
from ..models.inputs import two_sides
from ..models.sides import Sides, complementary_feature

WHOLE, ALL = "nothing", "all of them"


class SideEffect(NamedTuple):
    """Results of the model without one side."""

    without: str
    """The removed side; "nothing" for the full model, "all of them" for all sides if there are several."""
    replaced_by: str
    """The replacement for every sample: "stand-in", the trained row of an optional side; "mean", the side's mean feature over the
    batches; "" for the full model."""
    metrics: dict[str, float]
    """``loss``, the mean task loss, and the metrics of :func:`classification_metrics` or :func:`multi_label_metrics`."""
    changed: float
    """Share of samples whose predicted class, or any of whose predicted classes, differs from the full model's; NaN for
    regression."""
    routing: float
    """Mean total variation distance of routing scores from the full model's, 0 to 1; NaN without routing."""


@dataclass(frozen=True)
class SideEffects:
    """One row for the full model, and one without each side; ``str()`` returns a table."""

    rows: list[SideEffect]

    def __str__(self) -> str:
        names = list(self.rows[0].metrics)
        table = [["without", "replaced by", *names, "changed", "routing changed"]]
        for row in self.rows:
            numbers = [*row.metrics.values(), row.changed, row.routing]
            table.append([row.without, row.replaced_by, *(f"{number:.4f}" for number in numbers)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)


def what_sides_add(model: MoPEFusion, batches: Iterable[Mapping[str, Any]], *, progress: bool = True) -> SideEffects:
    """Measure a model with each complementary side replaced by the same row for all samples: its stand-in, or its mean feature.

    The difference is the information that this side has about a *sample*: the main side, the other sides, and all trained
    parameters stay the same. An optional side is replaced by its stand-in, any other side by the mean of its feature over the
    batches; in that case the batches are iterated twice.

    Args:
        model: a model with a head, neither compiled nor in DDP or FSDP.
        batches: keyword arguments of the model with ``labels``; a list or DataLoader.
        progress: show a progress bar.

    Raises:
        TypeError: the model is of another class, or ``batches`` doesn't yield dicts.
        ValueError: the model has no head or doesn't depend on a complementary side, there are no batches, a batch has no labels, or
            all labels are ignored.

    Examples:
        >>> print(what_sides_add(model, test_loader))
    """
    if not isinstance(model, MoPEFusion):
        raise TypeError(f"what_sides_add takes a MoPEFusion, neither compiled nor in DDP, got {type(model).__name__}")
    if model.head is None or not model.config.uses_cross:
        raise ValueError("what_sides_add needs a model with a head whose prompts or head depend on a complementary side")
    with torch.no_grad(), evaluating(model):
        rows = dict(getattr(model.complementary, "stand_ins", {}).items())
        replaced_by = {name: "stand-in" if name in rows else "mean" for name in _names(model)}
        if len(rows) < len(replaced_by):
            rows = {**_means(model, batches, progress), **rows}
        cases = {WHOLE: [], **{name: [name] for name in replaced_by}}
        if len(replaced_by) > 1:
            cases[ALL] = list(replaced_by)
        seen: dict[str, list[tuple[Tensor, Tensor | None]]] = {case: [] for case in cases}
        labels = []
        for batch in tracked(batches, "without each side", "batch", shown=progress):
            main_inputs, others, given = _arguments(model, batch)
            labels.append(given)
            features = _features(model, main_inputs, others)
            for case, taken in cases.items():
                changed = {name: rows[name].to(f.dtype).expand_as(f) if name in taken else f for name, f in features.items()}
                output = model.fused(main_inputs, _joined(model, changed))
                seen[case].append((output.logits.cpu(), None if output.scores is None else output.scores.cpu()))
        if not labels:
            raise ValueError("batches is empty: it needs at least one batch (an iterator can be used only once)")
        truth = torch.cat(labels).cpu()
        if model.problem_type == "single_label_classification" and not truth.is_floating_point() and not (truth >= 0).any():
            raise ValueError("all labels are -100, so no sample counts: the model is measured against labels")
        logits = {case: torch.cat([each for each, _ in found]) for case, found in seen.items()}
        scores = {case: None if found[0][1] is None else torch.cat([each for _, each in found], 1) for case, found in seen.items()}
        ways = {WHOLE: "", ALL: " and ".join(sorted(set(replaced_by.values()))), **replaced_by}
        return SideEffects(
            [
                SideEffect(
                    case, ways[case], _metrics(model, logits[case], truth), _changed(model, logits[case], logits[WHOLE]),
                    float("nan") if scores[case] is None else _distance(scores[case], scores[WHOLE]),
                )
                for case in cases
            ]
        )  # fmt: skip


def _names(model: MoPEFusion) -> list[str]:
    return list(model.complementary.facts) if isinstance(model.complementary, Sides) else ["complementary"]


def _arguments(model: MoPEFusion, batch: Any) -> tuple[Any, Any, Tensor]:
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches must yield dicts of the model's keyword arguments, got {type(batch).__name__}")
    named = dict(batch)
    if (labels := named.pop("labels", None)) is None:
        raise ValueError(f"a batch has no labels, only {list(named)}: the model is measured against them")
    given = [named.pop(name, None) for name in ("main_inputs", "complementary_inputs")]
    return (*two_sides(model.main, model.complementary, *given, named), labels)


def _features(model: MoPEFusion, main_inputs: Any, others: Any) -> dict[str, Tensor]:
    """Return each side's feature, with stand-ins for missing ones."""
    batch = batch_of(model.main, main_inputs)
    if isinstance(model.complementary, Sides):
        return model.complementary.features(others, batch)
    return {"complementary": complementary_feature(model.complementary, others, batch)}


def _joined(model: MoPEFusion, features: dict[str, Tensor]) -> Tensor:
    if isinstance(model.complementary, Sides):
        return model.complementary.joined(features)
    return features["complementary"]


def _means(model: MoPEFusion, batches: Iterable[Mapping[str, Any]], progress: bool) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in tracked(batches, "mean features", "batch", shown=progress):
        main_inputs, others, labels = _arguments(model, batch)
        count += len(labels)
        for name, feature in _features(model, main_inputs, others).items():
            sums[name] = sums.get(name, 0) + feature.sum(0, dtype=torch.float64)
    return {name: total / count for name, total in sums.items()}


def _metrics(model: MoPEFusion, logits: Tensor, labels: Tensor) -> dict[str, float]:
    metrics = {"loss": model.task_loss(logits, labels).item()}
    if model.problem_type == "single_label_classification" and not labels.is_floating_point():
        known = labels >= 0
        metrics |= classification_metrics(logits[known], labels[known], logits.shape[1])
    elif model.problem_type == "multi_label_classification":
        metrics |= multi_label_metrics(logits, labels)
    return metrics


def _changed(model: MoPEFusion, logits: Tensor, whole: Tensor) -> float:
    if model.problem_type == "single_label_classification":
        return (logits.argmax(1) != whole.argmax(1)).double().mean().item()
    if model.problem_type == "multi_label_classification":
        return ((logits > 0) != (whole > 0)).any(1).double().mean().item()
    return float("nan")


def _distance(scores: Tensor, whole: Tensor) -> float:
    """Return the mean total variation distance of distributions (N, B, K)."""
    return (scores - whole).abs().sum(-1, dtype=torch.float64).mean().item() / 2
