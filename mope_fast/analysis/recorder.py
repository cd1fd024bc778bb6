"""Recording of routing while a model runs."""

import copy
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._autocast import without_autocast
from .._files import write_atomically
from ..models import FoldedModel, MoPEFusion, MultiAdapter
from .alarms import Alarm, Thresholds, find_alarms
from .statistics import Sums


class TopSample(NamedTuple):
    """One of the samples with an expert's highest scores."""

    id: int
    score: float


class Curves(NamedTuple):
    """Measures over steps, with one row for each of W windows."""

    edges: Tensor
    """(W + 1,) int64: window w covers the steps from edges[w] up to, but excluding, edges[w + 1]."""
    importance: Tensor
    """(W, N, K)"""
    entropy: Tensor
    """(W, N)"""
    balance: Tensor
    """(W, N)"""


class Recorder:
    """The result of :func:`record`. Measures can be read at any time, inside the block or after it; reading waits for the device.

    Layers and experts are counted from 0. There are N layers, K experts and C classes. A sample's scores are divided by their sum,
    which makes a difference only with ``top_k`` without ``renormalize``. Entropies are divided by log K, so that all measures of a
    layer are in [0, 1] and ``information = balance - entropy``.

    Raises:
        RuntimeError: a measure is read before anything was recorded.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        class_names: Sequence[str] | None = None,
        adapter: str | None = None,
        top: int = 8,
        every: int = 1,
        windows: int = 256,
        thresholds: Thresholds | None = None,
    ):
        for name, value, least in (("top", top, 1), ("every", every, 1), ("windows", windows, 2)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names or ()):
            raise TypeError(f"class_names must be a sequence of strings, one for each class, got {class_names!r}")
        if class_names is not None and len(set(class_names)) < len(class_names):
            raise ValueError(f"class_names must differ from each other, got {list(class_names)}")
        self.model = None if model is None else _routing_model(model)
        self.class_names = None if class_names is None else list(class_names)
        self.thresholds = Thresholds() if thresholds is None else thresholds
        self.steps = 0
        """Number of forwards, including those that ``every`` skips."""
        self.training_steps = 0
        """Number of these forwards in training mode."""
        self._columns = _columns(self.model, adapter)
        self._top, self._every, self._windows = top, every, windows + windows % 2
        self._stride = every  # steps per window
        self._seen = 0  # number of samples, which is the position of the next one
        self._by_position = False
        self._noted: tuple[Tensor | None, Tensor | None] = (None, None)
        self._sums: Sums | None = None
        self._handle: Any = None

    def __enter__(self) -> "Recorder":
        if self.model is None:
            raise RuntimeError("this recorder has no model to observe: call update(), or give record() a model")
        if self._handle is not None:
            raise RuntimeError("this recorder is already recording: leave its block first, or create a second recorder")
        # compiled models run their hooks outside of the graph; this hook should not be compiled itself
        hook = torch.compiler.disable(self._after_forward)
        self._handle = self.model.register_forward_hook(hook, with_kwargs=True, always_call=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._handle.remove()
        self._handle = None
        self._noted = (None, None)

    def note(self, *, ids: Tensor | Sequence[int] | None = None, labels: Tensor | Sequence[int] | None = None) -> None:
        """Set ids and labels of the samples of the next forward; this applies to one forward only.

        Args:
            ids: (B,) integers, for example positions in the data set. Without them samples are numbered in order of arrival.
            labels: (B,) integer classes or (B, C) weights in 0..1, if the model is called without labels or others should be used.
        """
        self._noted = (_integers("ids", ids), None if labels is None else torch.as_tensor(labels))

    def update(
        self, scores: Tensor, labels: Tensor | Sequence[int] | None = None, ids: Tensor | Sequence[int] | None = None
    ) -> None:
        """Count a batch manually if no hook can: scores from a compiled or captured step, or from your own modules.

        Args:
            scores: (N, B, K), or (B, K) for one layer.
            labels, ids: labels and ids of the samples, see :meth:`note`.
        """
        if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() not in (2, 3):
            got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"scores must be floating-point (N, B, K) or (B, K), got {got}")
        scores = scores[None] if scores.dim() == 2 else scores
        labels = None if labels is None else torch.as_tensor(labels)
        self._step(scores, labels, _integers("ids", ids), None if self.class_names is None else len(self.class_names), False)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module is not self.model or self._handle is None:  # the hook was copied along with a deep copy of the model
            return
        ids, labels = self._noted
        self._noted = (None, None)
        if output is None:  # the forward has failed
            return
        if isinstance(output, Tensor):
            raise ValueError("the model returns only logits, without scores to record: set model.return_logits = False meanwhile")
        classes = None if self.class_names is None else len(self.class_names)
        if labels is None and isinstance(module, MoPEFusion):
            labels = _class_labels(module, kwargs.get("labels", args[2] if len(args) > 2 else None), output.logits)
            if labels is not None and classes not in (None, output.logits.shape[1]):
                raise ValueError(f"class_names has {classes} names, but the model has {output.logits.shape[1]} classes")
        if classes is None and output.logits is not None:
            classes = output.logits.shape[-1]
        self._step(output.scores[..., self._columns], labels, ids, classes, module.training)

    def _step(self, scores: Tensor, labels: Tensor | None, ids: Tensor | None, classes: int | None, training: bool) -> None:
        layers, batch, experts = scores.shape
        if self._sums is not None and (layers, experts) != self._sums.scores.shape:
            known = tuple(self._sums.scores.shape)
            raise ValueError(
                f"scores have {(layers, experts)} layers and experts, but earlier ones had {known}: use a new recorder"
            )
        if ids is not None and ids.shape != (batch,):
            raise ValueError(f"ids must be one integer for each of {batch} samples, got {tuple(ids.shape)}")
        classes = _check_labels(labels, batch, classes)
        if self._sums is not None and labels is not None and len(self._sums.classes) not in (1, classes + 1):
            raise ValueError(
                f"labels have {classes} classes, but earlier ones had {len(self._sums.classes) - 1}: use a new recorder"
            )
        if self.steps % self._every == 0 and batch:
            # leave inference mode, because tensors created in it can't be modified outside of it
            with torch.inference_mode(False), torch.no_grad(), without_autocast(scores.device.type):
                self._count(scores.detach(), labels, ids, classes)
        self.steps += 1
        self.training_steps += training
        self._seen += batch
        self.__dict__.pop("_totals", None)

    def _count(self, scores: Tensor, labels: Tensor | None, ids: Tensor | None, classes: int | None) -> None:
        layers, batch, experts = scores.shape
        if self._sums is None:
            self._sums = Sums.empty(layers, experts, self._windows, self._top, scores.device)
        if labels is not None and len(self._sums.classes) == 1:
            self._sums = self._sums.with_classes(classes)
        if ids is None:
            self._by_position = True
            ids = torch.arange(self._seen, self._seen + batch, device=scores.device)
        if self.steps >= self._stride * self._windows:
            self._sums.merge_windows()
            self._stride *= 2
        self._sums.add(scores, labels, ids, self.steps // self._stride)

    @cached_property
    def _totals(self) -> Sums:
        """Sums on the CPU, cached until the next step."""
        if self._sums is None:
            raise RuntimeError(
                "nothing was recorded: call the model in the block of record(); if a larger compiled function calls it, use "
                "update(output.scores)"
            )
        totals = self._sums.cpu()
        if totals.counts[0] == 0:
            raise RuntimeError(
                f"nothing was recorded: of {int(totals.counts.sum())} samples {int(totals.counts[1])} had scores that are NaN, "
                f"infinite or negative, and {int(totals.counts[2])} were not routed"
            )
        return totals

    @property
    def samples(self) -> int:
        """Number of samples counted; a sample that was seen twice counts twice."""
        return int(self._totals.counts[0])

    @property
    def not_finite(self) -> int:
        """Number of samples left out because a score was NaN, infinite or negative."""
        return int(self._totals.counts[1])

    @property
    def not_routed(self) -> int:
        """Number of samples left out because all their scores are 0: those of a MultiAdapter's other members."""
        return int(self._totals.counts[2])

    @property
    def importance(self) -> Tensor:
        """(N, K): an expert's mean score, in rows that sum to 1 (MoPE v1, equation 5 without its sum over the batch; figure 7)."""
        return self._totals.scores / self._totals.counts[0]

    @property
    def entropy(self) -> Tensor:
        """(N,): mean entropy of a sample's scores over log K; 0: one expert per sample, 1: uniform scores (MoPE v1, figure 6).

        The paper shows the figure without its formula; in nats the values would be ``entropy * math.log(K)``.
        """
        return self._totals.entropy / self._totals.counts[0] / _log(self.importance.shape[1])

    @property
    def balance(self) -> Tensor:
        """(N,): entropy of the mean scores over log K; 0: one expert takes all, 1: all experts are used equally."""
        return _entropy(self.importance)

    @property
    def information(self) -> Tensor:
        """(N,): mutual information of sample and expert over log K, ``balance - entropy``; 0: scores are equal for all samples.

        It is the generalised Jensen-Shannon divergence of the samples' scores.
        """
        return (self.balance - self.entropy).clamp(min=0)

    @property
    def class_information(self) -> Tensor | None:
        """(N,): mutual information of class and expert over log K, at most ``information``; over samples that have a class.

        It is overestimated if classes have few samples. None without labels. With several labels per sample, each label counts as a
        sample.
        """
        if (by_class := self.by_class) is None:
            return None
        counts = self.class_counts / self.class_counts.sum()
        by_class = by_class.nan_to_num()
        mean = torch.einsum("c,nck->nk", counts, by_class)
        return (_entropy(mean) - (_entropy(by_class) * counts).sum(-1)).clamp(min=0)

    @property
    def by_class(self) -> Tensor | None:
        """(N, C, K): mean scores of each class's samples, rows sum to 1; NaN for a class without samples, None without labels.

        A sample with several labels counts for each of them, by its weight.
        """
        if (counts := self.class_counts) is None:
            return None
        return self._totals.classes[:-1].transpose(0, 1) / counts[:, None]

    @property
    def class_counts(self) -> Tensor | None:
        """(C,): number of samples of each class, or the sum of their weights; None without labels."""
        counts = self._totals.class_counts[:-1]
        return None if counts.sum() == 0 else counts

    @property
    def without_class(self) -> int:
        """Number of samples whose label is out of range, such as -100, or has weights that are not finite."""
        return int(self._totals.class_counts[-1])

    @property
    def curves(self) -> Curves:
        """Measures over steps; windows double in length whenever there would be more than ``windows`` of them."""
        totals, windows = self._totals, -(-self.steps // self._stride)
        counts = totals.window_counts[:windows]
        sums = totals.windows[:windows] / counts[:, None, None]
        edges = (torch.arange(windows + 1) * self._stride).clamp(max=self.steps)
        importance = sums[..., :-1]
        return Curves(edges, importance, sums[..., -1] / _log(importance.shape[-1]), _entropy(importance))

    @property
    def alarms(self) -> list[Alarm]:
        """Problems of the routing, the worst first; see :class:`Thresholds`."""
        return find_alarms(self.importance, self.information, self.not_finite, self.thresholds)

    def top_samples(self, layer: int, expert: int) -> list[TopSample]:
        """Return the samples with the highest scores, at most ``top``, the highest first; equal scores keep the first seen."""
        layers, experts = self._totals.scores.shape
        for name, value, count in (("layer", layer, layers), ("expert", expert, experts)):
            if not 0 <= value < count:
                raise IndexError(f"{name} must be 0 to {count - 1}, got {value}")
        pairs = zip(self._totals.top_ids[layer, expert].tolist(), self._totals.top_scores[layer, expert].tolist(), strict=True)
        best: dict[int, float] = {}
        for sample, score in pairs:
            if score > -math.inf:
                best.setdefault(sample, score)
        return [TopSample(sample, score) for sample, score in best.items()]

    def gather(self, process_group: Any = None) -> "Recorder":
        """Return a recorder with the recordings of all processes; a collective operation that all processes must call.

        Steps are those of the process with the most steps. Samples that a sampler gave to two processes count twice. Top samples
        are kept only from processes where all were noted with ids, because positions differ between processes.

        Raises:
            ValueError: the processes recorded different layers, experts or classes, or used different settings.
        """
        sums = None if self._sums is None else self._sums.cpu()
        if sums is not None and self._by_position:
            sums.top_scores.fill_(-math.inf)
        states = [None] * torch.distributed.get_world_size(process_group)
        settings = {"top": self._top, "every": self._every, "windows": self._windows}
        torch.distributed.all_gather_object(states, (sums, self._stride, self.steps, self.training_steps, settings), process_group)
        _check_alike([state[0] for state in states if state[0] is not None], [state[-1] for state in states])
        total = copy.copy(self)
        total.__dict__.pop("_totals", None)
        total._handle = None
        total._stride = max(stride for _, stride, *_ in states)
        total.steps, total.training_steps = (max(state[i] for state in states) for i in (2, 3))
        total._sums = _sum_of([(sums, stride) for sums, stride, *_ in states if sums is not None], total._stride)
        return total

    def tensors(self) -> dict[str, Tensor]:
        """Return all measures by name, on the CPU."""
        curves = self.curves
        named = {name: getattr(self, name) for name in ("importance", "entropy", "balance", "information")}
        named |= {name: getattr(self, name) for name in ("class_information", "by_class", "class_counts")}
        named |= {f"curves.{name}": value for name, value in curves._asdict().items()}
        named |= {"top_samples.ids": self._totals.top_ids, "top_samples.scores": self._totals.top_scores}
        return {name: value for name, value in named.items() if value is not None}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`tensors` as safetensors."""
        from safetensors.torch import save as serialize

        names = "\n".join(self.class_names or ()).encode(errors="replace").decode()
        metadata = {"samples": str(self.samples), "steps": str(self.steps), "class_names": names}
        data = serialize({name: value.contiguous() for name, value in self.tensors().items()}, metadata)
        write_atomically(_file(path), data)

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        samples: Any = None,
        training: "Recorder | None" = None,
        title: str | None = None,
    ) -> Path:
        """Write one self-contained HTML page: alarms, entropy and importance, curves, classes, and top samples.

        Args:
            path: the file to write.
            samples: the samples to show: a sequence, data set or function from an id to a text, a picture, a pair or dict of both,
                or a :class:`mope_fast.data.Post`.
                A picture is a PIL image or a path, loaded by :func:`mope_fast.data.load_image`, or a tensor (3, H, W): uint8,
                bool, or floating-point in 0..1 (other values, normalised for a model, are rescaled to this range).
                Without it top samples are shown by their ids.
            training: a recorder of the same model's training, whose curves are shown; None to show this recorder's curves.
            title: title of the page; the default is "Routing of" and the model's class name.

        Raises:
            ImportError: pictures need Pillow.
            RuntimeError: nothing was recorded.
            ValueError: ``samples`` returns something else, or ``training`` has other layers or experts.
        """
        from .report import render

        # errors="replace", so that a lone surrogate in a text doesn't prevent the page from being written
        write_atomically(file := _file(path), render(self, samples, training, title).encode(errors="replace"))
        return file


def _check_alike(sums: Sequence[Sums], settings: Sequence[dict[str, int]]) -> None:
    """Raise ValueError if the processes' recordings can't be added up; a process that saw no labels has no classes."""
    found = {"layers": [len(part.scores) for part in sums], "experts": [part.scores.shape[1] for part in sums]}
    found["classes"] = [len(part.classes) - 1 for part in sums if len(part.classes) > 1]
    found |= {name: [own[name] for own in settings] for name in ("top", "every", "windows")}
    if unlike := [f"{name} {values}" for name, values in found.items() if len(set(values)) > 1]:
        raise ValueError(f"processes recorded with different {', '.join(unlike)}: create their recorders with the same settings")


def record(
    model: nn.Module,
    *,
    class_names: Sequence[str] | None = None,
    adapter: str | None = None,
    top: int = 8,
    every: int = 1,
    windows: int = 256,
    thresholds: Thresholds | None = None,
) -> Recorder:
    """Record the routing of all forwards within a block, in training or evaluation.

    Sums are kept on the model's device and read on request: a step launches a few additional small operations and needs no
    synchronisation. Memory is bounded, see :class:`Sums`. The model's results and gradients don't change.

    Args:
        model: a :class:`MoPEFusion`, a :class:`FoldedModel` or :class:`MultiAdapter` that routes, or a module that contains one,
            such as DistributedDataParallel; compiled or not. With several processes each records its own samples; see
            :meth:`Recorder.gather`.
        class_names: names of the label classes; without them the number of classes is that of the model's logits.
        adapter: the member of a :class:`MultiAdapter` to record; it may be left out if only one member routes.
        top: number of samples kept for each layer and expert.
        every: record only one of this many forwards.
        windows: maximum number of points of a curve over steps.
        thresholds: thresholds of alarms; None for the defaults of :class:`Thresholds`.

    Raises:
        TypeError, ValueError: the model has no router or contains several models, or a setting is invalid.

    Examples:
        >>> with analysis.record(model, class_names=["cat", "dog"]) as r:
        ...     for text, images, labels in loader:
        ...         model(text, images, labels)
        >>> print(*r.alarms, sep="\\n")
        >>> r.report("report.html", samples=dataset)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a MoPEFusion, FoldedModel or MultiAdapter, or a module that contains one, got {type(model).__name__}"
        )
    settings = {"class_names": class_names, "adapter": adapter, "top": top, "every": every, "windows": windows}
    return Recorder(model, **settings, thresholds=thresholds)


def _routing_model(model: nn.Module) -> nn.Module:
    """Return the model itself, or the one inside its wrapper."""
    kinds = (MoPEFusion, FoldedModel, MultiAdapter)
    found, queue = [], [model]
    while queue:
        module = queue.pop()
        if isinstance(module, kinds):
            if not any(module is known for known in found):
                found.append(module)
        else:  # modules inside such a model are not searched, because they don't run on their own
            queue.extend(module.children())
    if not found:
        raise TypeError(
            f"{type(model).__name__} contains no MoPEFusion, FoldedModel or MultiAdapter: there is no routing to record"
        )
    if len(found) > 1:
        raise ValueError(f"{type(model).__name__} contains {len(found)} models that may route: give record() one of them")
    target = found[0]
    if not isinstance(target, MultiAdapter) and not (target.bank is not None and target.bank.routes):
        raise ValueError(f"this {type(target).__name__} has no router: its prompts are not dynamic (MoPEConfig.use_dynamic)")
    return target


def _columns(model: nn.Module | None, adapter: str | None) -> slice:
    """Return the columns of the recorded experts: those of one member of a MultiAdapter, or all for another model."""
    if not isinstance(model, MultiAdapter):
        if adapter is not None:
            raise ValueError(f"adapter={adapter!r} names a member of a MultiAdapter, but the model is a {type(model).__name__}")
        return slice(None)
    routing = {
        name: member.bank.config.num_experts
        for name, member in zip(model.names, model.models, strict=True)
        if member.bank is not None and member.bank.routes
    }
    adapter = next(iter(routing)) if adapter is None and len(routing) == 1 else adapter
    if adapter not in routing:
        raise ValueError(f"adapter must name a member that routes, one of {list(routing)}, got {adapter!r}")
    names = list(routing)
    start = sum(routing[name] for name in names[: names.index(adapter)])
    return slice(start, start + routing[adapter])


def _class_labels(model: MoPEFusion, labels: Tensor | None, logits: Tensor | None) -> Tensor | None:
    """Return the model's labels if they are sample classes; None for regression targets or pixel classes."""
    if labels is None or model.problem_type == "regression" or logits.dim() != 2:
        return None
    return labels


def _check_labels(labels: Tensor | None, batch: int, classes: int | None) -> int | None:
    """Return C; raise ValueError for labels of another shape or dtype, or if the number of classes is unknown."""
    if labels is None:
        return None
    if labels.dim() == 2 and labels.shape[0] == batch and (classes is None or labels.shape[1] == classes):
        return labels.shape[1]
    integers = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if labels.shape != (batch,) or not integers:
        raise ValueError(
            f"labels must be ({batch},) integers or ({batch}, {'C' if classes is None else classes}) weights, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if classes is None:
        raise ValueError("the number of classes is not known: give record() class_names")
    return classes


def _integers(name: str, values: Tensor | Sequence[int] | None) -> Tensor | None:
    if values is None:
        return None
    values = torch.as_tensor(values)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    return values.long()


def _sum_of(parts: Sequence[tuple[Sums, int]], stride: int) -> Sums | None:
    """Add up processes' sums, each given with the length of its windows, none of which is longer than ``stride``."""
    total = None
    classes = max((len(sums.classes) for sums, _ in parts), default=1)
    for sums, own in parts:
        sums = sums.with_classes(classes - 1) if len(sums.classes) == 1 < classes else sums
        while own < stride:
            sums.merge_windows()
            own *= 2
        total = sums if total is None else total.plus(sums)
    return total


def _log(experts: int) -> float:
    """Return log K, or 1 for a single expert, all of whose entropies are 0."""
    return math.log(experts) if experts > 1 else 1.0


def _entropy(shares: Tensor) -> Tensor:
    """Return the entropy of (..., K) over log K."""
    return torch.special.entr(shares).sum(-1) / _log(shares.shape[-1])


def _file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
