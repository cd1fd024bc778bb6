"""Alarms: problems of a routing, described in plain words."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import Tensor

from .._settings import check_types


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Thresholds for alarms. Shares and information are compared layer by layer; the values are ours, not the paper's."""

    dominance: float = 0.9
    """An expert whose mean score is at least this dominates its layer."""
    dead: float = 0.01
    """An expert whose mean score is below this part of the fair share 1/K is dead."""
    information: float = 0.01
    """A layer whose choice of experts has less information about the sample than this part of log K counts as "same for all"."""

    def __post_init__(self):
        check_types(self)
        for item in fields(self):
            if not 0 <= (value := getattr(self, item.name)) <= 1:
                raise ValueError(f"Thresholds.{item.name} must be in [0, 1], got {value!r}")


@dataclass(frozen=True)
class Alarm:
    """One finding. ``str(alarm)`` is its message."""

    kind: str
    """"not finite", "dominance", "same for all" or "dead"."""
    layer: int | None
    """The layer; None if the finding is about samples."""
    experts: tuple[int, ...]
    """The experts concerned; empty for the whole layer."""
    message: str

    def __str__(self) -> str:
        return self.message


def find_alarms(importance: Tensor, information: Tensor, not_finite: int, thresholds: Thresholds) -> list[Alarm]:
    """Return alarms, the worst first.

    Args:
        importance: (N, K) mean scores, rows sum to 1.
        information: (N,) mutual information of sample and expert, divided by log K.
        not_finite: number of samples whose scores were NaN, infinite or negative.
        thresholds: see :class:`Thresholds`.
    """
    alarms = []
    if not_finite:
        samples = "1 sample has" if not_finite == 1 else f"{not_finite:,} samples have"
        message = f"{samples} scores that are NaN, infinite or negative and are excluded: check the loss and the learning rate"
        alarms.append(Alarm("not finite", None, (), message))
    num_experts = importance.shape[1]
    if num_experts == 1:  # nothing to choose
        return alarms
    found: dict[str, list[Alarm]] = {"dominance": [], "same for all": [], "dead": []}
    for layer, (shares, known) in enumerate(zip(importance.tolist(), information.tolist(), strict=True)):
        first = max(range(num_experts), key=shares.__getitem__)
        dead = tuple(k for k, share in enumerate(shares) if share < thresholds.dead / num_experts)
        if shares[first] >= thresholds.dominance:
            message = f"layer {layer}: expert {first} takes {shares[first]:.1%} of all scores"
            found["dominance"].append(Alarm("dominance", layer, (first,), message))
            continue  # unused other experts and a constant choice follow from this finding
        if known < thresholds.information:
            message = f"layer {layer}: routing is nearly the same for all samples (information {known:.2%} of log K)"
            found["same for all"].append(Alarm("same for all", layer, (), message))
        if dead:
            message = f"layer {layer}: {_experts(dead)} of {num_experts} nearly never used (less than {thresholds.dead:.0%} of 1/K)"
            found["dead"].append(Alarm("dead", layer, dead, message))
    return alarms + [alarm for alarms_of_kind in found.values() for alarm in alarms_of_kind]


def _experts(experts: Sequence[int]) -> str:
    shown = ", ".join(map(str, experts[:8]))
    return ("expert " if len(experts) == 1 else "experts ") + shown + (f" and {len(experts) - 8} more" if len(experts) > 8 else "")
