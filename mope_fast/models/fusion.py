"""MoPEFusion: two modalities fused inside one frozen encoder (MoPE, arXiv 2403.10568)."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..encoders import PromptedEncoder, family_of, find_family
from ..encoders.frozen import Hold
from ..encoders.sources import Source, encoder_of, source_of
from ..encoders.weights import Samples, sample_weights
from ..modules import MoPEConfig, PromptBank
from . import checkpoint, hub
from .classifier import Classifier
from .folded import FoldedModel
from .inputs import takes_named_inputs, two_sides
from .output import FusionOutput
from .prompt_tuned import PromptTuned
from .prompting import Inputs, run_prompted
from .sides import (
    check_holds_no_prompts,
    check_same_batch,
    check_trains_nothing,
    complementary_feature,
    head_inputs,
    is_prompted_model,
)
from .task import apply_head, check_head, describe_encoder, make_head, prompted


class MoPEFusion(Classifier):
    """A frozen main encoder whose every layer takes prompts routed by a complementary modality.

    Args:
        main: a supported encoder, held frozen and in eval mode; or a :class:`PromptedEncoder` that several models share.
        complementary: where psi_y comes from: a supported encoder (its global feature, with vanilla prompts of
            ``config.complementary_prompt_length`` in its layers), a :class:`PromptTuned` of your own, any callable that gives
            (B, cross_dim) features (a module is held frozen, in eval mode and without gradient, so it may not hold prompts to be
            trained; nor may a function train anything), or None: then the features themselves are passed to ``forward``.
        num_classes: outputs of a linear head on the fused feature, and on psi_y unless ``config.head_inputs`` says otherwise; None
            for no head (``logits`` is None, use ``features``).
        config: see :class:`MoPEConfig`; ``config.cross_dim`` is needed unless ``complementary`` is a supported encoder.
        head: a head of your own, (B, D) -> (B, num_classes), in place of the linear one; D is of the main encoder's feature, with
            psi_y behind it where ``config.head_inputs`` is "both".
        problem_type: "single_label_classification": labels (B,) are integer classes, -100 for samples that don't count, or
            probabilities (B, C) in 0..1. "multi_label_classification": labels (B, C) in 0..1. "regression": numbers (B, C), or (B,)
            of one output. Losses are in float32 at least.
        label_smoothing: of single-label classification: this part of each label is spread over all classes, in every ``loss``.
        return_logits: have ``forward`` give the logits alone, a tensor, for scripts that call ``criterion(model(x, y), labels)``;
            the importance loss is :meth:`auxiliary_loss` then, to be added.

    Example:
        >>> model = MoPEFusion(main=bert, complementary=dinov2, num_classes=13)
        >>> output = model({"input_ids": ids, "attention_mask": mask}, images, labels)
        >>> output.loss.backward()
    """

    def __init__(
        self,
        main: nn.Module,
        complementary: nn.Module | Callable[..., Tensor] | None = None,
        num_classes: int | None = None,
        config: MoPEConfig | None = None,
        *,
        head: nn.Module | None = None,
        problem_type: str = "single_label_classification",
        label_smoothing: float = 0.0,
        return_logits: bool = False,
    ):
        super().__init__()
        check_head(num_classes, head, problem_type, label_smoothing, return_logits)
        if complementary is not None and not callable(complementary):
            raise TypeError(f"complementary must be a supported encoder, a callable or None, got {type(complementary).__name__}")
        if is_prompted_model(complementary) and not isinstance(complementary, (PromptTuned, FoldedModel)):
            name = type(complementary).__name__
            raise TypeError(f"complementary can't be a {name}: pass PromptTuned, a folded model, or a function of its features")
        if getattr(complementary, "return_logits", False):
            raise ValueError("complementary has return_logits=True, but its features are needed: make it without")
        config = MoPEConfig() if config is None else config
        if config.head_inputs is None:
            both = num_classes is not None and config.needs_cross
            config = dataclasses.replace(config, head_inputs="both" if both else "main")
        if config.head_inputs == "both" and num_classes is None and head is None:
            raise ValueError("MoPEConfig.head_inputs='both' needs a head: give num_classes or head, or leave it at 'main'")
        if not isinstance(main, PromptedEncoder):
            family_of(main)
        cross_dim = _feature_width(complementary, config.complementary_pooling)
        if cross_dim is not None and config.cross_dim not in (None, cross_dim):
            raise ValueError(
                f"config.cross_dim is {config.cross_dim}, but {type(complementary).__name__} gives features of width {cross_dim}"
            )
        cross_dim = config.cross_dim if cross_dim is None else cross_dim
        if config.uses_cross and cross_dim is None:
            raise ValueError("the width of the complementary feature can't be inferred: set MoPEConfig(cross_dim=...)")

        self.problem_type, self.label_smoothing, self.return_logits = problem_type, float(label_smoothing), return_logits
        self.main = prompted(main, pooling=config.pooling, router_pooling=config.router_pooling)
        self._wrapped = [] if self.main is main else [self.main]
        self._black_box: Hold | None = None
        try:
            self.complementary = self._make_side(complementary, config)
            self.made_its_side = isinstance(self.complementary, PromptTuned) and self.complementary is not complementary
            # what came wrapped has poolings of its own
            own = side.main.pooling if is_prompted_model(side := self.complementary) else None
            if config.complementary_pooling not in (None, own):
                raise ValueError(
                    f"complementary_pooling={config.complementary_pooling!r} was asked for, but complementary, "
                    f"{type(side).__name__}, has pooling={own!r}: set it where it is made, or leave the model's at None"
                )
            self.config = dataclasses.replace(
                config, cross_dim=cross_dim, pooling=self.main.pooling, router_pooling=self.main.router_pooling,
                complementary_pooling=own,
            )  # fmt: skip
            self.bank = PromptBank(self.main.widths, cross_dim, self.config)
            self.head = make_head(self.main, num_classes, head, cross_dim if config.head_inputs == "both" else 0)
        except BaseException:
            self._give_back()
            raise

    @property
    def num_features(self) -> int:
        return self.main.feature_width + (self.config.cross_dim if self.config.head_inputs == "both" else 0)

    @takes_named_inputs
    def forward(
        self,
        main_inputs: Inputs | None = None,
        complementary_inputs: Inputs | None = None,
        labels: Tensor | None = None,
        *,
        feature_maps: bool = False,
        **named: Any,
    ) -> FusionOutput | Tensor:
        """One pass.

        Args:
            main_inputs: the main encoder's input, or a dict of its keyword arguments.
            complementary_inputs: likewise; or the features (B, cross_dim) where ``complementary`` is None; None where no prompt
                needs them.
            labels: see ``problem_type``; gives ``loss``. On a CPU wrong values are errors. On other devices, where looking would
                wait, a class out of range stops the device, and other wrong values make ``loss`` NaN. Where no sample counts,
                the task loss is 0.
            feature_maps: give those of the main encoder's stages too, for dense prediction (Swin).
            named: encoders' keyword arguments themselves, in place of these or beside their tensors: what the main encoder's
                forward names is the main one's, the rest the other's.
        """
        self._begin(labels, feature_maps)
        side = self.complementary
        main_inputs, complementary_inputs = two_sides(self.main, side, main_inputs, complementary_inputs, named)
        config, cross = self.config, None
        if config.uses_cross:
            cross = self.complementary_feature(complementary_inputs)
            if self.training:
                check_trains_nothing(side, complementary_inputs, cross)
            check_same_batch(self.main, main_inputs, cross)
        features, scores, maps = run_prompted(self.main, self._bank(), main_inputs, cross, feature_maps=feature_maps)
        logits = apply_head(self.head, *head_inputs(config, features, cross))
        task_loss, summed = self._losses(logits, labels, scores)
        importance = features.new_zeros(())
        if summed is not None:
            importance = functional.importance_loss(summed, threshold=config.importance_threshold)
        loss = None if task_loss is None else task_loss + config.importance_weight * importance
        output = self._output_type(logits, labels)(loss, logits, task_loss, importance, scores, features, maps)
        return self._result(output)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, see :meth:`PromptTuned.reset_classifier`; without one the feature is the main encoder's alone."""
        super().reset_classifier(num_classes, global_pool)
        if self.head is None:
            self.config = self.bank.config = dataclasses.replace(self.config, head_inputs="main")

    def _has_auxiliary_loss(self) -> bool:
        return self.bank.routes and self.config.importance_weight > 0

    def _loss_is_cross_entropy(self) -> bool:
        return super()._loss_is_cross_entropy() and not self._has_auxiliary_loss()

    def _make_side(self, complementary: Any, config: MoPEConfig) -> Any:
        if _is_encoder(complementary):
            side = prompted(complementary, pooling=config.complementary_pooling)
            if side is not complementary:
                self._wrapped.append(side)
            settings = {"dropout": config.dropout, "prompt_init": config.prompt_init}
            return PromptTuned(side, config.complementary_prompt_length, **settings)
        if isinstance(complementary, nn.Module) and not is_prompted_model(complementary):
            check_holds_no_prompts(complementary)
            self._black_box = Hold(complementary)
        return complementary

    def _give_back(self) -> None:
        """Undo what this model has done to encoders and to a black box; what came wrapped or tuned stays so."""
        for encoder in self._wrapped:
            encoder.detach()
        if self._black_box is not None:
            self._black_box.release()

    def complementary_feature(self, inputs: Inputs | None) -> Tensor:
        """psi_y, (B, cross_dim)."""
        return complementary_feature(self.complementary, inputs)

    def train(self, mode: bool = True) -> "MoPEFusion":
        """Train or evaluate prompts, mapper and head; encoders stay in eval mode."""
        super().train(mode)
        if self._black_box is not None:
            self.complementary.eval()
        return self

    def fold(self) -> FoldedModel:
        """For inference: a new model whose experts and prompts have been through the frozen projections already.

        Equal to this one in eval mode, to rounding. It has copies of what is trained and shares the frozen encoders.

        Raises:
            ValueError: folding is not exact for this encoder (a norm of keys, or one of an unknown class).
            RuntimeError: weights are sharded.
        """
        self._check_whole()
        side = self.complementary
        side = side.fold() if isinstance(side, PromptTuned) else side
        return FoldedModel(self.main, self.bank, self.head, side, return_logits=self.return_logits)

    def parameter_groups(
        self, main_lr: float, complementary_lr: float | None = None, weight_decay: float = 1e-3
    ) -> list[dict[str, Any]]:
        """Trained parameters for an optimiser: bank and head at ``main_lr``, the complementary encoder's prompts at theirs.

        Defaults of the released code: 4e-4 (vision) and 5e-4 (text), weight decay 1e-3 on everything.
        """
        side = self.complementary
        side = [p for p in side.parameters() if p.requires_grad] if isinstance(side, PromptTuned) else []
        own = [p for module in (self.bank, self.head) if module is not None for p in module.parameters() if p.requires_grad]
        groups = [{"params": own, "lr": main_lr}]
        if side:
            groups.append({"params": side, "lr": main_lr if complementary_lr is None else complementary_lr})
        return [{**group, "weight_decay": weight_decay} for group in groups]

    def frozen_parts(self) -> list[str]:
        """Names of the modules that are held and not trained."""
        held = isinstance(self.complementary, nn.Module) and not isinstance(self.complementary, PromptTuned)
        return [*super().frozen_parts(), *(["complementary"] if held else [])]

    def unwrap(self) -> tuple[nn.Module, nn.Module | Callable[..., Tensor] | None]:
        """Give both encoders back as they were; this model can't be used afterwards.

        A :class:`PromptedEncoder` or :class:`PromptTuned` that was passed in stays as it is: its owner detaches or unwraps it.
        """
        self._give_back()
        side = self.complementary
        wrapped = isinstance(side, PromptTuned) and side.main in self._wrapped
        return self.main.encoder, side.main.encoder if wrapped else side

    def sources(self) -> dict[str, Source | None]:
        """Where both encoders can be got again; the complementary one isn't named where features are passed in.

        That of a function that is a supported encoder's feature has its ``pooling``.
        """
        found, side = {"main": source_of(self.main.encoder)}, self.complementary
        if isinstance(side, PromptTuned):
            found["complementary"] = source_of(side.main.encoder)
        elif side is not None:
            encoder, pooling = encoder_of(side) or (None, None)
            source = None if encoder is None else source_of(encoder)
            found["complementary"] = None if source is None else {**source, "pooling": pooling}
        return found

    def sampled_encoders(self) -> dict[str, Samples | None]:
        """Of each frozen encoder some of its numbers, of one within a function too; None where they can't be read."""
        found = super().sampled_encoders()
        if (known := encoder_of(self.complementary)) is not None:
            layers = family_of(known[0]).layers(known[0])
            found["complementary.encoder"] = sample_weights(known[0], [layer.module for layer in layers])
        return found

    def description(self) -> dict[str, Any]:
        side = self.complementary
        return {
            "model": "MoPEFusion",
            "main": describe_encoder(self.main),
            "complementary": describe_encoder(side.main) if isinstance(side, PromptTuned) else None,
            "config": self.config.to_dict(),
            **self._head_description(),
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        main: nn.Module,
        complementary: nn.Module | Callable[..., Tensor] | None = None,
        *,
        head: nn.Module | None = None,
        strict: bool = False,
        revision: str | None = None,
        return_logits: bool = False,
    ) -> "MoPEFusion":
        """Read a save onto the same encoders; ``head`` only if it was saved with one of its own.

        ``path`` is a folder of :meth:`save_pretrained`, or "user/name" of one on the Hugging Face Hub (:meth:`push_to_hub`), of
        which ``revision`` is a branch, a tag or a commit. Encoders with other weights are a warning; with ``strict`` an error, see
        :meth:`load_pretrained`.

        Raises:
            FileNotFoundError, ValueError: no such save, it is damaged or doesn't fit; the message says what doesn't.
            OSError: a file can't be read.
        """
        path = hub.local_folder(path, revision)
        saved = cls._read(path)
        model = cls._make(path, saved, main, complementary, head=head)
        model._load(path, saved, strict)
        model.return_logits = return_logits
        return model

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        return checkpoint.read_description(path, "MoPEFusion", {field.name for field in dataclasses.fields(MoPEConfig)})

    @classmethod
    def _make(
        cls,
        path: str | os.PathLike[str],
        saved: dict[str, Any],
        main: nn.Module,
        complementary: nn.Module | Callable[..., Tensor] | None = None,
        *,
        head: nn.Module | None = None,
    ) -> "MoPEFusion":
        """As the description says, not loaded yet."""
        classes, task = None if head is not None else saved["num_classes"], checkpoint.task_settings(saved)
        with checkpoint.settings_of(path):
            config = MoPEConfig(**saved["config"])
            check_head(classes, head, **task)
        return cls(main, complementary, classes, config, head=head, **task)


def _is_encoder(complementary: object) -> bool:
    return isinstance(complementary, PromptedEncoder) or (complementary is not None and find_family(complementary) is not None)


def _feature_width(complementary: object, pooling: str | None) -> int | None:
    """Of the features that a supported encoder or a prompted model gives; None if that can't be known."""
    if _is_encoder(complementary) and not isinstance(complementary, PromptedEncoder):
        return family_of(complementary).pooled_width(complementary, pooling)
    return getattr(complementary, "feature_width", None)
