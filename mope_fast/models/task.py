"""Code shared by trained models: head and loss, optimiser groups, saving, gradient checkpointing, unwrapping encoders."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._distributed import JointBatch, gather, is_first, is_sharded, mesh_of, wait_for_all
from .._values import can_be_looked_at
from ..encoders import PromptedEncoder
from ..encoders.sources import Source
from ..encoders.weights import Samples, plain_name, sample_weights
from ..modules import FoldedBank, PromptBank
from . import checkpoint
from .dense import SETRHead, segmentation_loss
from .hub import PushToHub
from .image_config import ImageConfig
from .output import FusionOutput, UnlabelledOutput

DENSE = "segmentation"
"""The problem type whose head reads feature maps."""
NOT_A_LABEL = -100
"""The class index of samples that a loss ignores; the default of cross entropy."""


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    is_class = not labels.is_floating_point()  # otherwise class probabilities
    labels = labels.long() if is_class else _fractions(labels, logits.dtype)
    loss = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
    if reduction == "mean" and is_class:
        # the mean over zero samples is NaN, which would ruin the training
        loss = torch.where((labels != NOT_A_LABEL).any(), loss, 0.0)
    return loss


def _multi_label_loss(logits: Tensor, labels: Tensor, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, _fractions(labels, logits.dtype), reduction=reduction)


def _regression_loss(logits: Tensor, labels: Tensor, reduction: str = "mean", label_smoothing: float = 0.0) -> Tensor:
    return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits), reduction=reduction)


def _fractions(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return labels with values outside 0..1 replaced by NaN.

    Such labels would reward wrong predictions without bound. NaN makes them visible without a device synchronisation.
    """
    labels = labels.to(dtype)
    return torch.where((labels >= 0) & (labels <= 1), labels, torch.nan)


TASK_LOSSES: dict[str, Callable[..., Tensor]] = {
    "single_label_classification": _cross_entropy,
    "multi_label_classification": _multi_label_loss,
    "regression": _regression_loss,
    DENSE: segmentation_loss,
}


def _sum_and_terms(problem_type: str, logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Return a task loss as a sum, and the number of terms in its mean."""
    total = TASK_LOSSES[problem_type](logits, labels, reduction="sum", label_smoothing=label_smoothing)
    if problem_type == DENSE:
        terms = len(logits)
    elif problem_type != "single_label_classification":
        terms = logits.numel()
    elif labels.is_floating_point():
        terms = labels.numel() // labels.shape[1]
    else:
        return total, (labels.long() != NOT_A_LABEL).sum().to(total.dtype)
    # filled on the device, because copying a number there would make the host wait
    return total, total.new_full((), terms)


def check_labels(problem_type: str, logits: Tensor, labels: Tensor) -> None:
    """Raise TypeError or ValueError for labels that don't fit this problem type.

    Shapes and dtypes are always checked. Values are checked only for plain CPU tensors outside of ``torch.compile``, where reading
    them needs no synchronisation.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if problem_type == DENSE:
        _check_masks(logits, labels)
        return
    shape, single = tuple(logits.shape), problem_type == "single_label_classification"
    if len(shape) < 2:
        raise ValueError(
            f"labels of {problem_type} need logits (B, num_classes), the head returned {shape}: make it keep that dimension"
        )
    floats = labels.is_floating_point()
    if labels.is_complex() or (single and labels.dtype == torch.bool):
        raise TypeError(f"labels of {problem_type} can't be {labels.dtype}: " + ("call .long()" if single else "use real numbers"))
    if single:
        expected = shape if floats else shape[:1] + shape[2:]
        what = f"floating-point probabilities {shape}, or integer classes {shape[:1] + shape[2:]}"
        hint = "for one-hot rows call .argmax(1); for one column .squeeze(1)"
    else:
        expected, what = shape, "the shape of logits " + str(shape)
        hint = "one number for each class" if problem_type.startswith("multi") else "one number for each output"
    fits = labels.shape == expected or (problem_type == "regression" and labels.shape == logits.squeeze(-1).shape)
    if not fits:
        raise ValueError(f"{problem_type} labels must have {what}, got {labels.dtype} {tuple(labels.shape)}: {hint}")
    if single and shape[1] == 1:
        raise ValueError(
            "labels of single_label_classification need at least 2 classes: with one class the loss is always 0. For yes/no labels "
            "use num_classes=2, or problem_type='multi_label_classification'"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels are on {labels.device}, the model on {logits.device}: call labels.to({str(logits.device)!r})")
    if can_be_looked_at(labels):
        _check_values(problem_type, labels, shape[1])


def _check_masks(logits: Tensor, masks: Tensor) -> None:
    if logits.dim() != 4:
        raise ValueError(f"{DENSE} needs logits (B, C, h, w), the head returned {tuple(logits.shape)}")
    if masks.is_floating_point() or masks.is_complex():
        raise TypeError(f"labels of {DENSE} must be integers or bool, got {masks.dtype}: for probabilities pass (masks > 0.5)")
    if masks.dim() != 3 or masks.shape[0] != logits.shape[0]:
        hint = "; for (B, 1, H, W) call .squeeze(1)" if masks.dim() == 4 else ""
        raise ValueError(f"labels of {DENSE} must be ({logits.shape[0]}, H, W), got {tuple(masks.shape)}{hint}")
    if masks.device != logits.device:
        raise ValueError(f"labels are on {masks.device}, the model on {logits.device}: call labels.to({str(logits.device)!r})")
    if can_be_looked_at(masks):
        values, classes = masks.detach().long(), max(2, logits.shape[1])
        good = (values.ge(0) & values.lt(classes)) | values.eq(NOT_A_LABEL)
        if not good.all():
            raise ValueError(
                f"labels of {DENSE} must be classes 0 to {classes - 1}, or {NOT_A_LABEL} for ignored pixels, got "
                f"{int(values[~good][0])}"
            )


def _check_values(problem_type: str, labels: Tensor, classes: int) -> None:
    values = (labels.detach().double() if labels.is_floating_point() else labels).numpy()
    if problem_type == "regression":
        good, what = numpy.isfinite(values), "finite"
    elif problem_type == "multi_label_classification" or labels.is_floating_point():
        good, what = (values >= 0) & (values <= 1), "in 0..1"
    else:
        good = ((values >= 0) & (values < classes)) | (values == NOT_A_LABEL)
        what = f"classes 0 to {classes - 1}, or {NOT_A_LABEL} to ignore a sample"
    if not good.all():
        raise ValueError(f"labels of {problem_type} must be {what}, got {values[~good][0]}")


def check_head(
    num_classes: int | None, head: nn.Module | None, problem_type: str, label_smoothing: float, return_logits: bool = False
) -> None:
    """Raise TypeError or ValueError for invalid or incompatible settings of a head."""
    if not isinstance(return_logits, bool):
        raise TypeError(f"return_logits must be True or False, got {return_logits!r}")
    if problem_type not in TASK_LOSSES:
        raise ValueError(f"problem_type must be one of {list(TASK_LOSSES)}, got {problem_type!r}")
    if head is not None and num_classes is not None:
        raise ValueError("give num_classes for a linear head or head for a custom one, not both")
    if num_classes is not None and (not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1):
        raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
    if not isinstance(label_smoothing, (int, float)) or isinstance(label_smoothing, bool):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0..1, got {label_smoothing}")
    if problem_type == DENSE and head is None and num_classes is None:
        raise ValueError(f"problem_type={DENSE!r} needs a head: give num_classes for SETR's, or head for a custom one")
    if label_smoothing and problem_type != "single_label_classification":
        raise ValueError(f"label_smoothing is for single_label_classification, got {label_smoothing} with {problem_type}")


def apply_head(head: nn.Module | None, *read: Tensor | tuple[Tensor, ...]) -> Tensor | None:
    """Return the head's logits in its dtype, or None without a head.

    The head's input is the concatenation of several features, or maps that a feature may follow.
    """
    if head is None:
        return None
    first = read[0] if isinstance(read[0], Tensor) else read[0][0]
    dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), first.dtype)
    if isinstance(read[0], Tensor):
        return head(torch.cat([feature.to(dtype) for feature in read], dim=-1))
    maps, *features = read
    return head([each.to(dtype) for each in maps], *[feature.to(dtype) for feature in features])


def make_head(
    main: PromptedEncoder, num_classes: int | None, head: nn.Module | None, problem_type: str, cross_dim: int = 0
) -> nn.Module | None:
    """Build a linear head on the feature and ``cross_dim`` further numbers, or SETR's on maps; or return the given head, or None.

    Raises:
        ValueError: the given head is a part of the frozen encoder, or the encoder has no feature maps.
    """
    if problem_type == DENSE and not main.family.has_feature_maps:
        raise ValueError(f"problem_type={DENSE!r} reads feature maps of the main encoder, and {main.family.name} has none")
    if num_classes is not None and problem_type == DENSE:
        return SETRHead(main.map_width, num_classes)
    if num_classes is not None:
        return nn.Linear(main.feature_width + cross_dim, num_classes)
    check_is_trained(head, main)
    return head


def check_is_trained(module: nn.Module | None, *frozen: nn.Module, name: str = "head") -> None:
    """Raise ValueError for a module that shares parameters with a frozen one."""
    parameters = {id(parameter) for part in frozen for parameter in part.parameters()}
    if module is not None and any(id(parameter) in parameters for parameter in module.parameters()):
        raise ValueError(f"{name} is a part of a frozen module and would not be trained: pass a copy.deepcopy() of it")


def prompted(encoder: nn.Module, **poolings: str | None) -> PromptedEncoder:
    """Return the encoder wrapped, or unchanged if it already is a :class:`PromptedEncoder`, which several models can share.

    Raises:
        ValueError: a wrapped encoder has another pooling than requested; None accepts the encoder's own.
    """
    if not isinstance(encoder, PromptedEncoder):
        return PromptedEncoder(encoder, **poolings)
    for name, asked in poolings.items():
        if asked not in (None, own := getattr(encoder, name)):
            raise ValueError(
                f"{name}={asked!r} was requested, but this PromptedEncoder has {name}={own!r}: create it with "
                f"PromptedEncoder(encoder, {name}={asked!r}), or leave the model's at None"
            )
    return encoder


class TaskModel(PushToHub, ImageConfig, nn.Module, ABC):
    """A prompted encoder with a head.

    ``head``, ``problem_type`` and ``label_smoothing`` are set by the subclass, after :func:`check_head`.
    """

    head: nn.Module | None
    problem_type: str
    label_smoothing: float
    accepts_loss_kwargs = False
    """For transformers' Trainer: ``loss`` is per batch, so the Trainer has to divide it by the number of accumulated batches."""
    _joint_batch: JointBatch | None = None
    _leaves_frozen_out = False
    _kept: FoldedBank | None = None
    """Tables of ``bank`` while :meth:`frozen` lasts."""

    def use_joint_batch(self, process_group: ProcessGroup | None = None) -> None:
        """Compute losses over the joint batch of all ranks in training mode.

        DDP and FSDP average gradients over ranks. This average is the gradient of the mean over all samples only if all ranks have
        the same number of samples. It is never the gradient of the joint importance loss, which is a statistic of the batch. With
        this setting, ``loss``, ``task_loss`` and ``importance_loss`` are those of the joint batch and equal on every rank. A rank's
        gradient is its own part of the joint gradient times the number of ranks, so that the average is the joint batch's gradient.
        One all-reduce in the forward pass exchanges routing scores summed over samples, the task loss (in float32 at least) and its
        number of terms. In eval mode nothing is exchanged.

        Every rank has to run the same forwards in training mode, all with labels or all without. The mapper's batch norm still uses
        only the statistics of a rank's own batch; use ``MoPEConfig(mapper_norm="layer")``, or ``nn.SyncBatchNorm`` on GPUs. A
        custom loss on ``logits`` has to be weighted by the caller.

        Args:
            process_group: the ranks over which gradients are averaged; None for the default group, or for this process alone
                if there is no default group.

        Raises:
            TypeError: ``process_group`` is something else, such as the value that ``new_group`` returns on a rank outside it.
        """
        if process_group is not None and not isinstance(process_group, ProcessGroup):
            got = type(process_group).__name__
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup of this rank, or None; got {got}")
        self._joint_batch = JointBatch(process_group)

    # not a property: torch 2.10 can't compile a property of another class
    def _loss_is_cross_entropy(self) -> bool:
        """Return whether the loss is just the mean cross entropy of a rank's logits, without smoothing."""
        joint = self._joint_batch is not None and self.training
        return self.problem_type == "single_label_classification" and not joint and not self.label_smoothing

    def _output_type(self, logits: Tensor | None, labels: Tensor | None) -> type[FusionOutput]:
        whole = labels is not None or logits is None or self._loss_is_cross_entropy()
        return FusionOutput if whole else UnlabelledOutput

    def task_loss(self, logits: Tensor | None, labels: Tensor | None) -> Tensor | None:
        """Return the task loss, or None without labels."""
        return self._losses(logits, labels)[0]

    def _losses(
        self, logits: Tensor | None, labels: Tensor | None, scores: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the task loss, and scores (N, B or 1, K) whose sum over B is that of the rank's own or of the joint batch."""
        if labels is not None and logits is None:
            raise ValueError(f"labels need a head: give num_classes or head to {type(self).__name__}")
        smoothing = self.label_smoothing
        if labels is not None:
            check_labels(self.problem_type, logits, labels)
            # labels are cast to the dtype of logits, and in bfloat16 1000.5 would become 1000
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._joint_batch is None or not self.training:
            loss = None if labels is None else TASK_LOSSES[self.problem_type](logits, labels, label_smoothing=smoothing)
            return loss, scores
        parts = [] if labels is None else [*_sum_and_terms(self.problem_type, logits, labels, smoothing)]
        if scores is not None:
            parts.append(scores.to(torch.promote_types(scores.dtype, torch.float32)).sum(-2, keepdim=True))
        joint = self._joint_batch.sum(parts)
        return None if labels is None else joint[0] / joint[1].clamp(min=1), None if scores is None else joint[-1]

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Return the facts that must match when the trained parts are loaded, as plain values."""

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Return all state outside frozen encoders, as whole tensors under plain names, also if compiled, in DDP or sharded.

        Sharded tensors (FSDP2) are gathered, so every rank has to call this.
        """
        state = self.state_dict()
        return {name: gather(state[key]) for name, key in self.trained_keys(state).items()}

    def trained_keys(self, state: Iterable[str]) -> dict[str, str]:
        """Return plain name -> key for the keys of this model's state dict that don't belong to a frozen encoder."""
        frozen = tuple(f"{name}." for name in self.frozen_parts())
        return {plain_name(key): key for key in state if not key.startswith(frozen)}

    def leave_frozen_out_of_state_dict(self) -> None:
        """Make ``state_dict()`` leave out frozen encoders, and let a strict ``load_state_dict`` accept that.

        This is for programs that save through these methods, also if this model is a part of a larger module. A state dict that
        contains a complete frozen part loads it; one without any of its keys leaves that part unchanged.
        """
        if not self._leaves_frozen_out:
            self._leaves_frozen_out = True
            self.register_state_dict_post_hook(_leave_frozen_out)
            self.register_load_state_dict_pre_hook(_put_frozen_in)

    def _check_whole(self, what: str = "fold()") -> None:
        """Raise RuntimeError if weights are sharded, or in the cases of :meth:`_check_own`."""
        self._check_own(what)
        if any(is_sharded(parameter) for parameter in self.parameters()):
            raise RuntimeError(
                f"{what} needs whole weights, but this {_class_name(self)} is sharded: save it with save_pretrained(), and use the "
                "model that from_pretrained() loads from there"
            )

    def _check_own(self, what: str) -> None:
        """Raise RuntimeError if prompts or head are inside a peft wrapper."""
        if any(hasattr(getattr(self, name, None), "modules_to_save") for name in ("bank", "head")):
            raise RuntimeError(
                f"{what} needs the model's own prompts and head, which peft has wrapped: call it on the result of the peft model's "
                "merge_and_unload(); peft's own save_pretrained() saves them with the LoRA"
            )

    def sampled_encoders(self) -> dict[str, Samples | None]:
        """Return sampled weights of each frozen part; None where they can't be read."""
        return {plain_name(name): sample_weights(self.get_submodule(name)) for name in self.frozen_parts()}

    def sources(self) -> dict[str, Source | None]:
        """Return where each frozen encoder can be obtained again, see :func:`mope_fast.encoders.sources.source_of`."""
        return {}

    def frozen_parts(self) -> list[str]:
        """Return the names of the modules that are kept frozen."""
        modules = self.named_modules(remove_duplicate=False)
        return [name for name, module in modules if isinstance(module, PromptedEncoder)]

    @contextmanager
    def frozen(self) -> Iterator["TaskModel"]:
        """Project prompts and experts once for all forwards in the block, which runs without gradients.

        This is for evaluation and inference without a second model: forwards compute the same as those of :meth:`fold`. The effect
        ends early if this model's ``train`` or ``load_state_dict`` is called, or if its dtype or device changes. Any other change
        to prompts or the frozen encoder within the block is not noticed.

        Raises:
            RuntimeError: the model is in training mode, or its weights are sharded.
            ValueError: folding is not exact for this encoder, see :meth:`fold`.

        Examples:
            >>> with model.eval().frozen():
            ...     for batch in loader: ...
        """
        if self.training:
            raise RuntimeError(f"frozen() is for inference, but this {_class_name(self)} is in training mode: call eval() first")
        self._check_whole("frozen()")
        parts = [part for part in self.modules() if isinstance(part, TaskModel) and getattr(part, "bank", None) is not None]
        own = {part: FoldedBank(part.bank, part.main.layers, part.main.dtype) for part in parts if part._kept is None}
        try:
            for part, tables in own.items():
                vars(part)["_kept"] = tables  # not registered as a submodule, so that it is never saved
            with torch.no_grad():
                yield self
        finally:
            for part, tables in own.items():
                if part._kept is tables:
                    part._drop_tables()

    def _drop_tables(self) -> None:
        vars(self)["_kept"] = None

    def _bank(self) -> PromptBank | FoldedBank | None:
        """Return the source of a forward's prompts: tables kept by :meth:`frozen` are used only without gradients."""
        return self.bank if self._kept is None or torch.is_grad_enabled() else self._kept

    def train(self, mode: bool = True) -> "TaskModel":
        """Set the mode of the trained parts; encoders stay in eval mode."""
        if mode:
            self._drop_tables()
            self._check_what_is_trained()
        return super().train(mode)

    def _check_what_is_trained(self) -> None:
        """Warn if other libraries have changed which parameters are trained.

        ``get_peft_model`` leaves prompts frozen. transformers' ``from_pretrained`` of a model around this one unfreezes its
        encoder.
        """
        encoder = getattr(self, "main", None)
        if isinstance(encoder, PromptedEncoder) and encoder.is_thawed():
            warnings.warn(
                f"all parameters of the frozen {type(encoder.encoder).__name__} require a gradient: an optimiser that is given "
                "them changes the encoder. Call requires_grad_(False) on it",
                stacklevel=4,
            )
            return
        own = [part for part in (getattr(self, "bank", None), self.head) if part is not None]
        untrained = [part for part in own if not any(parameter.requires_grad for parameter in part.parameters())]
        if untrained and self._trained_in_encoders():
            warnings.warn(
                "this model trains parameters that were added to its encoder, but its prompts or its head are not trained. If peft "
                "added them: LoraConfig(modules_to_save=['bank', 'head'], ...) also trains, saves and loads prompts and head",
                stacklevel=4,
            )

    def _trained_in_encoders(self) -> list[str]:
        """Return names of trainable parameters in frozen parts, which other code has added or unfrozen."""
        frozen = tuple(f"{name}." for name in self.frozen_parts())
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad and name.startswith(frozen)]

    def _apply(self, *args: Any, **kwargs: Any) -> "TaskModel":
        self._drop_tables()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_tables()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without kept tables, because a copy would never drop them."""
        return {**super().__getstate__(), "_kept": None}

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Store each layer's input instead of its activations, and recompute layer and prompts in the backward pass.

        This applies to all models that share the encoder. ``torch.compile`` needs
        ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.

        Args:
            gradient_checkpointing_kwargs, every_n_layers, offload: accepted for transformers' Trainer. Only
                ``{"use_reentrant": False}``, every layer and no offloading are supported.

        Raises:
            ValueError: another value is requested.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True is not supported: with frozen encoders it would lose the prompts' gradients")
        if every_n_layers != 1 or offload:
            got = f"every_n_layers={every_n_layers} and offload={offload}"
            raise ValueError(f"every layer is checkpointed on its device: expected every_n_layers=1 and offload=False, got {got}")
        self._set_gradient_checkpointing(True)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Call :meth:`gradient_checkpointing_enable`; transformers' Trainer uses this name from 5.23 on."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Store activations again."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, PromptedEncoder):
                module.gradient_checkpointing = value

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError, because generation is not possible."""
        raise NotImplementedError(
            f"{type(self).__name__} can't generate: prompts depend on the whole input and are visible to every token, so the "
            "encoder is no longer causal; use it for classification (logits, features)"
        )

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write only the trained parts: ``mope_fast.json`` and a safetensors file beside it.

        If the process is killed at any moment, the folder holds either the complete old save or the complete new one. For a
        compiled model, or one in DDP (``ddp.module``), any number of ranks may call this. If trained parts are sharded (FSDP2),
        every rank has to call it: the first one writes, and all wait for it.

        The entry ``sources`` says where each frozen encoder can be obtained again, or null if that isn't known.

        Raises:
            ValueError: a parameter or buffer holds NaN or infinities. The message names it, and the previous save stays.
        """
        self._save(path)

    def _save(self, path: str | os.PathLike[str], more: dict[str, Any] | None = None) -> None:
        """Save; ``more`` are further entries of the description, which appear atomically with the weights."""
        self._check_own("save_pretrained()")
        if left_out := self._trained_in_encoders():
            warnings.warn(
                f"{len(left_out)} trained parameters are not in this save, because they belong to the encoder: {left_out[0]}, ... "
                "Save them with the library that added them; peft's encoder.save_pretrained() for a LoRA",
                stacklevel=3,
            )
        state = self.state_dict()
        keys = self.trained_keys(state)
        mesh = mesh_of(state[key] for key in keys.values())
        writes = mesh is None or is_first(mesh)
        whole = {}
        for name, key in keys.items():
            value = gather(state[key])
            if writes:  # one at a time to the host, because all of them may not fit beside the shards
                whole[name] = value.cpu()
        try:
            if writes:
                known = {"encoders": self.sampled_encoders(), "sources": self.sources()}
                checkpoint.save(path, whole, {**self.description(), **known, **(more or {})})
        finally:
            if mesh is not None:
                wait_for_all(mesh)

    def load_pretrained(self, path: str | os.PathLike[str], *, strict: bool = False) -> None:
        """Load a folder of :meth:`save_pretrained` into this model in place; its mode and its encoders' modes don't change.

        The model may be compiled, in DDP (``ddp.module``) or sharded (FSDP2), and the saved model may have been any of these. Every
        rank has to call this. Settings that only matter in training may differ from those saved.

        Args:
            path: the folder.
            strict: require that frozen encoders are known to have the weights that the save was trained on, to half precision. By
                default other weights cause a warning, and encoders that can't be compared (older saves, sharded or quantised
                encoders) are not checked.

        Raises:
            FileNotFoundError, ValueError: there is no such save, it is damaged, or it doesn't fit; the message says why. The model
                is unchanged then.
            OSError: a file can't be read.
        """
        own = self.description()
        saved = checkpoint.read_description(path, own["model"], set(own["config"]))
        checkpoint.load(path, self, saved, strict=strict)

    def _load(self, path: str | os.PathLike[str], description: dict[str, Any], strict: bool, refused: Collection[str] = ()) -> None:
        """Load a save; ``refused`` names entries of :meth:`sampled_encoders` for which other weights are always an error."""
        try:
            checkpoint.load(path, self, description, strict=strict, refused=refused)
        except BaseException:
            self.unwrap()
            raise
        self.eval()

    def _head_description(self) -> dict[str, Any]:
        weight = getattr(self.head, "weight", None)
        return {
            "head": None if self.head is None else _class_name(self.head),
            "num_classes": None if weight is None else weight.shape[0],
            "problem_type": self.problem_type,
            "label_smoothing": self.label_smoothing,
        }

    @abstractmethod
    def unwrap(self) -> Any:
        """Return the encoders as they were; this model can't be used afterwards."""


def _class_name(module: nn.Module) -> str:
    """Return the class name of the module itself, not of torch.compile's wrapper or of the class that ``fully_shard`` assigns."""
    classes = type(getattr(module, "_orig_mod", module)).__mro__
    return (classes[2] if classes[1].__name__ == "FSDPModule" else classes[0]).__name__


def _leave_frozen_out(model: TaskModel, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Remove frozen parts from a state dict, except parameters that other code trains in them, such as a LoRA."""
    frozen = tuple(f"{prefix}{name}." for name in model.frozen_parts())
    trained = {f"{prefix}{name}" for name in model._trained_in_encoders()}
    for key in [key for key in state if key.startswith(frozen) and key not in trained]:
        del state[key]


def _put_frozen_in(model: TaskModel, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Add the current tensors of each omitted frozen part so that loading finds every key; torch copies no tensor to itself."""
    trained = {f"{prefix}{name}" for name in model._trained_in_encoders()}
    for name in model.frozen_parts():
        part = f"{prefix}{name}."
        if not any(key.startswith(part) and key not in trained for key in state):
            now = model.get_submodule(name).state_dict(prefix=part, keep_vars=True)
            state.update({key: value for key, value in now.items() if key not in state})


def describe_encoder(encoder: PromptedEncoder) -> dict[str, Any]:
    """Return an encoder's family and widths."""
    return {"family": encoder.family.name, "widths": encoder.widths}
