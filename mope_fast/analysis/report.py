"""The report: one self-contained HTML file with data, styles and script, without references to external resources."""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable
from datetime import datetime
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models import MultiAdapter
from .alarms import Alarm
from .pictures import Shown, show

if TYPE_CHECKING:
    from .recorder import Curves, Recorder

MAX_CLASSES = 60
"""Maximum number of rows of the class table."""
MAX_CURVE = 400_000
"""Maximum number of values in the importance curves."""
MAX_SAMPLES = 480
"""Maximum number of distinct samples with text or picture; MAX_IDS is the limit for samples shown by id only."""
MAX_IDS = 20_000
UNIT = 1e-5
"""Shares are written as integer multiples of this unit."""

KINDS = {
    "not finite": ("Scores that are not numbers", ""),
    "dominance": ("One expert takes nearly all", "Try a larger importance_weight, or a higher temperature."),
    "same for all": ("Routing does not depend on the sample", "Do the complementary features differ? Try a lower temperature."),
    "dead": ("Experts that are nearly never used", "Fewer experts may suffice; otherwise try a larger importance_weight."),
}
"""Title and advice for each kind of alarm."""


def render(recorder: "Recorder", samples: Any, training: "Recorder | None", title: str | None) -> str:
    """Render the page as HTML; see :meth:`Recorder.report`."""
    layers, experts = recorder.importance.shape
    if training is not None and training.importance.shape != (layers, experts):
        raise ValueError(
            f"training was recorded with {tuple(training.importance.shape)} layers and experts, this with {(layers, experts)}"
        )
    left_out: list[str] = []
    data = {
        "layers": layers, "experts": experts, "unit": UNIT,
        "entropy": _numbers(recorder.entropy), "balance": _numbers(recorder.balance),
        "information": _numbers(recorder.information), "classInformation": _numbers(recorder.class_information),
        "importance": _shares(recorder.importance),
        "curves": _curves((recorder if training is None else training).curves, left_out),
        "classes": _classes(recorder, left_out),
        **_top_samples(recorder, samples, left_out),
    }  # fmt: skip
    script = _resource("report.js")
    values = {
        "title": html.escape(title or f"Routing of {_model_name(recorder)}"),
        "style": _resource("report.css"),
        "script": script,
        # with this hash no other script runs and nothing is loaded, whatever a sample's text contains
        "script-hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "facts": "".join(f"<li>{html.escape(fact)}</li>" for fact in _facts(recorder, training)),
        "alarms": _alarms(recorder),
        "summary": "".join(f"<p>{html.escape(sentence)}</p>" for sentence in _summary(recorder)),
        "layer-table": _layer_table(recorder),
        "left-out": "".join(f"<li>{html.escape(sentence)}</li>" for sentence in left_out),
        "data": _inside_script(data),
    }
    # in one pass, so that inserted text is not scanned for placeholders
    return re.sub(r"\{\{([\w-]+)\}\}", lambda match: values[match[1]], _resource("report.html"))


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def _inside_script(data: Any) -> str:
    """Serialise to JSON that can't close its script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _numbers(values: Tensor | None) -> list | None:
    """Convert to nested lists, rounded to the displayed precision; None for NaN."""
    if values is None:
        return None
    if values.dim() > 1:
        return [_numbers(row) for row in values]
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]


def _shares(values: Tensor) -> list:
    """Convert to nested lists of integer multiples of UNIT; None for NaN."""
    if values.dim() > 1:
        return [_shares(row) for row in values]
    return [None if math.isnan(value) else round(value / UNIT) for value in values.tolist()]


def _curves(curves: "Curves", left_out: list[str]) -> dict[str, Any] | None:
    windows, layers, experts = curves.importance.shape
    if windows < 2:
        return None
    most = max(8, MAX_CURVE // (layers * experts))
    edges, parts = curves.edges, (curves.importance, curves.entropy, curves.balance)
    if windows > most:
        width = -(-windows // most)
        starts = list(range(0, windows, width))
        edges = torch.cat([edges[:-1][::width], edges[-1:]])
        parts = tuple(torch.stack([part[i : i + width].nanmean(0) for i in starts]) for part in parts)
        left_out.append(f"Curves have {len(starts)} points instead of the {windows} recorded; each is a mean.")
    importance, entropy, balance = (part.transpose(0, 1) for part in parts)
    return {
        "edges": edges.tolist(), "importance": _shares(importance), "entropy": _numbers(entropy), "balance": _numbers(balance)
    }  # fmt: skip


def _classes(recorder: "Recorder", left_out: list[str]) -> dict[str, Any] | None:
    by_class, counts = recorder.by_class, recorder.class_counts
    if by_class is None:
        return None
    names = recorder.class_names or [str(c) for c in range(len(counts))]
    present = counts.nonzero().squeeze(1)
    if len(present) > MAX_CLASSES:
        # the classes whose scores are furthest from the layer's mean, in total variation
        distance = (by_class - recorder.importance[:, None]).abs().sum(-1).mean(0)[present]
        chosen = present[distance.argsort(descending=True, stable=True)[:MAX_CLASSES]].sort().values
        left_out.append(
            f"The table of classes has {MAX_CLASSES} of {len(present)}: those whose scores differ most from their layer's mean. "
            "by_class has all."
        )
        present = chosen
    if missing := len(counts) - int((counts > 0).sum()):
        left_out.append(f"{missing} of {len(counts)} classes have no sample.")
    if recorder.without_class:
        left_out.append(f"{recorder.without_class:,} samples have a label out of range and are in no class.")
    return {
        "names": [names[c] for c in present.tolist()], "counts": _numbers(counts[present]), "scores": _shares(by_class[:, present])
    }  # fmt: skip


def _top_samples(recorder: "Recorder", samples: Any, left_out: list[str]) -> dict[str, Any]:
    """Return each expert's top samples as references into a list, filled from the most used experts up to the page's limit."""
    layers, experts = recorder.importance.shape
    order = recorder.importance.flatten().argsort(descending=True, stable=True).tolist()
    best = [recorder.top_samples(place // experts, place % experts) for place in range(layers * experts)]
    most = MAX_IDS if samples is None else MAX_SAMPLES
    indices: dict[int, int] = {}
    shown: list[list] = []
    top: list[list[list]] = [[] for _ in best]
    missing = 0
    for rank in range(max(map(len, best))):
        for place in order:
            if rank >= len(best[place]):
                continue
            sample, score = best[place][rank]
            if sample not in indices:
                if len(indices) == most:
                    missing += 1
                    continue
                indices[sample] = len(indices)
                shown.append([sample, *(Shown(None, None) if samples is None else _shown(samples, sample))])
            top[place].append([indices[sample], round(score, 6)])
    if missing:
        left_out.append(f"{most} samples are shown; {missing:,} entries of the lists of top samples are left out.")
    return {"samples": shown, "top": [top[layer * experts : (layer + 1) * experts] for layer in range(layers)]}


def _shown(samples: Any, sample: int) -> Shown:
    try:
        value = samples(sample) if callable(samples) and not hasattr(type(samples), "__getitem__") else samples[sample]
    except (IndexError, KeyError) as error:
        raise ValueError(
            f"samples has no id {sample}: its ids must be those given to note(), or positions in the order of one pass"
        ) from error
    return show(value, f"sample {sample}")


def _model_name(recorder: "Recorder") -> str:
    return "manually recorded scores" if recorder.model is None else type(recorder.model).__name__


def _facts(recorder: "Recorder", training: "Recorder | None") -> Iterable[str]:
    layers, experts = recorder.importance.shape
    yield f"{_count(layers, 'layer')} of {_count(experts, 'expert')}"
    yield _recorded(recorder)
    if training is not None:
        yield f"curves: {_recorded(training)}"
    model = recorder.model
    if model is not None:
        yield f"main encoder: {model.main.family.name}"
        if not isinstance(model, MultiAdapter):
            config = model.bank.config
            gate = "" if config.top_k is None else f", top_k {config.top_k}"
            yield f"temperature {config.temperature:g}, importance weight {config.importance_weight:g}{gate}"
    if recorder.not_routed:
        yield f"{_count(recorder.not_routed, 'sample')} of other adapters left out"
    yield datetime.now().strftime("%Y-%m-%d %H:%M")


def _recorded(recorder: "Recorder") -> str:
    mode = "training and evaluation" if recorder.training_steps else "evaluation"
    mode = "training" if recorder.training_steps == recorder.steps else mode
    mode = "" if recorder.model is None else f" in {mode}"
    return f"{_count(recorder.samples, 'sample')} in {_count(recorder.steps, 'forward')}{mode}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _alarms(recorder: "Recorder") -> str:
    alarms, limits = recorder.alarms, recorder.thresholds
    if not alarms:
        text = (
            f"No expert has {limits.dominance:.0%} of its layer, none has less than {limits.dead:.0%} of its fair share, and every "
            f"layer's routing depends on the sample (information of {limits.information:.0%} or more)."
        )
        if recorder.importance.shape[1] == 1:
            text = "There is only one expert, so routing has no choice."
        return f'<section class="alarms none"><h2>No alarms</h2><p>{html.escape(text)}</p></section>'
    kinds: dict[str, list[Alarm]] = {}
    for alarm in alarms:
        kinds.setdefault(alarm.kind, []).append(alarm)
    groups = "".join(
        f"<h3>{KINDS[kind][0]}</h3>{_list(map(str, members))}<p>{KINDS[kind][1]}</p>" for kind, members in kinds.items()
    )
    return f'<section class="alarms some"><h2>{_count(len(alarms), "alarm")}</h2>{groups}</section>'


def _list(lines: Iterable[str], most: int = 5) -> str:
    """Render a list of the first lines; the others are in an expandable section."""
    items = [f"<li>{html.escape(line)}</li>" for line in lines]
    rest = "".join(items[most:])
    more = f"<details><summary>{len(items) - most} more</summary><ul>{rest}</ul></details>" if rest else ""
    return f"<ul>{''.join(items[:most])}</ul>{more}"


def _summary(recorder: "Recorder") -> Iterable[str]:
    information, importance = recorder.information, recorder.importance
    layers, experts = importance.shape
    if experts == 1:
        return
    most, least = int(information.argmax()), int(information.argmin())
    sentence = f"The choice of experts carries {float(information.mean()):.0%} of the maximum information about the sample"
    if layers > 1:
        sentence += (
            f", on average over layers: most in layer {most} ({float(information[most]):.0%}), least in layer {least} "
            f"({float(information[least]):.0%})"
        )
    yield sentence + "."
    known = recorder.class_information
    if known is not None and information.mean() > 0:
        yield f"The class accounts for {min(1.0, float(known.mean() / information.mean())):.0%} of this information."
    place = int(importance.argmax())
    yield (
        f"The most used expert is expert {place % experts} of layer {place // experts}: {float(importance.max()):.1%}; the fair "
        f"share is {1 / experts:.1%}."
    )


def _layer_table(recorder: "Recorder") -> str:
    importance, known = recorder.importance, recorder.class_information
    columns = {"entropy": recorder.entropy, "balance": recorder.balance, "information": recorder.information}
    columns |= {} if known is None else {"class information": known}
    head = "".join(f'<th scope="col">{name}</th>' for name in ("layer", *columns, "most used", "its share"))
    rows = []
    for layer, shares in enumerate(importance):
        cells = [f"{float(values[layer]):.4f}" for values in columns.values()]
        cells += [f"expert {int(shares.argmax())}", f"{float(shares.max()):.4f}"]
        rows.append(f'<tr><th scope="row">{layer}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
