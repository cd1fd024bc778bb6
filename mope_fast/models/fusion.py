"""MoPEFusion: two modalities fused inside one frozen encoder (MoPE, arXiv 2403.10568)."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..encoders import PromptedEncoder, family_of
from ..encoders.frozen import Hold
from ..encoders.sources import Source, encoder_of, source_of
from ..encoders.weights import Samples, sample_weights
from ..modules import MoPEConfig, PromptBank
from . import checkpoint, hub
from .classifier import Classifier
from .complementary import batch_of, head_inputs, is_prompted_model
from .folded import FoldedModel
from .inputs import takes_named_inputs, two_sides
from .making_sides import check_source, make_side, settings_of_sides, width_of
from .output import FusionOutput
from .prompt_tuned import PromptTuned
from .prompting import Inputs, run_prompted, stacked_scores
from .sides import Side, Sides, complementary_feature, named_sides, restored, sources_of
from .task import DENSE, apply_head, check_head, describe_encoder, make_head, prompted


class MoPEFusion(Classifier):
    """A frozen main encoder with prompts in every layer that are routed by a complementary modality.

    Args:
        main: a supported encoder, kept frozen and in eval mode; or a :class:`PromptedEncoder` that several models share.
        complementary: the source of psi_y. It is a supported encoder (its global feature, with vanilla prompts of
            ``config.complementary_prompt_length`` in its layers), your own :class:`PromptTuned`, any callable that returns
            (B, cross_dim) features, or None if the features themselves are passed to ``forward``. A module is kept frozen, in eval
            mode and without gradient, so it may not contain trainable prompts; a function may not train anything either. Several
            sides are a dict by name. Each value is one of the above or a :class:`Side`, which may be missing, consist of video
            frames, or be trained. Their features are combined into psi_y (``config.combine``), and each side has its own mapped
            prompt.
        num_classes: number of outputs of a linear head on the fused feature, and on psi_y unless ``config.head_inputs`` says
            otherwise; None for no head (``logits`` is None, use ``features``).
        config: see :class:`MoPEConfig`; ``config.cross_dim`` is needed unless ``complementary`` is a supported encoder.
        head: a custom head, (B, D) -> (B, num_classes), used instead of the linear one. Its input is the main encoder's feature,
            with psi_y appended if ``config.head_inputs`` is "both".
        problem_type: "single_label_classification": labels are (B,) integer classes, with -100 for ignored samples, or (B, C)
            probabilities in 0..1. "multi_label_classification": labels are (B, C) in 0..1. "regression": labels are (B, C) numbers,
            or (B,) for one output. "segmentation": the head reads feature maps, ``head(maps)``, or ``head(maps, psi_y)`` if
            ``config.head_inputs`` is "both", and returns logits (B, C, h, w); ``num_classes`` creates a :class:`SETRHead`. Labels
            (B, H, W) are classes of pixels, 0 and 1 if C is 1, with -100 for ignored pixels; see :func:`segmentation_loss`. Losses
            are computed in float32 at least.
        label_smoothing: for single-label classification: the part of each label that is spread over all classes, in every
            ``loss``.
        return_logits: make ``forward`` return only the logits tensor, for scripts that call ``criterion(model(x, y), labels)``.
            The importance loss must then be added from :meth:`auxiliary_loss`.

    Examples:
        >>> model = MoPEFusion(main=bert, complementary=dinov2, num_classes=13)
        >>> output = model({"input_ids": ids, "attention_mask": mask}, images, labels)
        >>> output.loss.backward()
    """

    def __init__(
        self,
        main: nn.Module,
        complementary: nn.Module | Callable[..., Tensor] | Mapping[str, Any] | None = None,
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
        several = isinstance(complementary, Mapping)
        sides = named_sides(complementary) if several else {"complementary": Side(complementary)}
        for name, side in sides.items():
            check_source(f"complementary[{name!r}]" if several else name, side)
        config = MoPEConfig() if config is None else config
        if config.head_inputs is None:
            both = num_classes is not None and config.needs_cross and problem_type != DENSE
            config = dataclasses.replace(config, head_inputs="both" if both else "main")
        if config.head_inputs == "both" and num_classes is None and head is None:
            raise ValueError("MoPEConfig.head_inputs='both' needs a head: give num_classes or head, or leave it at 'main'")
        if not isinstance(main, PromptedEncoder):
            family_of(main)
        widths = {name: width_of(name, side, config, several=several) for name, side in sides.items()}
        if not several and (config.side_dropout or config.combine != "concat"):
            raise ValueError(
                f"MoPEConfig.side_dropout={config.side_dropout} and combine={config.combine!r} are for several sides, which are "
                "given as a dict by name: complementary={'image': ...}"
            )
        if several:
            config = settings_of_sides(config, widths)
            sides = {name: dataclasses.replace(side, width=widths[name]) for name, side in sides.items()}
        cross_dim = config.cross_dim if several else widths["complementary"]
        if config.uses_cross and cross_dim is None:
            raise ValueError("the width of the complementary feature can't be inferred: set MoPEConfig(cross_dim=...)")

        self.problem_type, self.label_smoothing, self.return_logits = problem_type, float(label_smoothing), return_logits
        self.main = prompted(main, pooling=config.pooling, router_pooling=config.router_pooling)
        self._wrapped = [] if self.main is main else [self.main]
        self._holds: list[Hold] = []
        self.made_sides: set[str] = set()
        """Names of the sides whose prompts this model created."""
        try:
            values: dict[str, Any] = {}
            frozen = [side.source for side in sides.values() if isinstance(side.source, nn.Module) and not side.trainable]
            for name, side in sides.items():
                made = make_side(name, side, config, [self.main, *frozen], several=several)
                values[name] = made.value
                self._wrapped += made.wrapped
                self._holds += made.holds
                self.made_sides |= {name} if made.has_new_prompts else set()
            if several:
                self.complementary = Sides(sides, values, combine=config.combine, dropout=config.side_dropout)
            else:
                self.complementary = values["complementary"]
            own = self.complementary.main.pooling if is_prompted_model(self.complementary) else None
            self.config = dataclasses.replace(
                config, cross_dim=cross_dim, pooling=self.main.pooling, router_pooling=self.main.router_pooling,
                complementary_pooling=own,
            )  # fmt: skip
            self.bank = PromptBank(self.main.widths, cross_dim, self.config)
            self.head = make_head(self.main, num_classes, head, problem_type, cross_dim if config.head_inputs == "both" else 0)
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
        tokens: bool = False,
        **named: Any,
    ) -> FusionOutput | Tensor:
        """Run one forward pass.

        Args:
            main_inputs: the main encoder's input, or a dict of its keyword arguments.
            complementary_inputs: the complementary encoder's input, or a dict of its keyword arguments; the features
                (B, cross_dim) if ``complementary`` is None; None if no prompt needs them. For several sides, a dict of these by
                name. An ``optional`` side may be None or absent if no sample of the batch has it. If only some samples have it,
                ``"present"`` is a dict of names and bool masks (B,); the rows of the other samples may be any valid input and have
                no effect. A side of ``frames`` takes (B, T, ...), or a dict of such tensors, optionally with ``"frame_mask"``, bool
                (B, T), True for real frames.
            labels: labels as ``problem_type`` defines them; if given, ``loss`` is computed. On a CPU invalid values raise an error.
                On other devices, where checking would need a synchronisation, a class out of range raises a device-side error, and
                other invalid values make ``loss`` NaN. If all samples are ignored, the task loss is 0.
            feature_maps, tokens: also return the main encoder's feature maps or tokens, for dense prediction; see
                :class:`FusionOutput`.
            named: the encoders' keyword arguments, passed directly instead of the inputs or in addition to their tensors. Names in
                the main encoder's forward signature go to the main encoder, all others to the complementary side.
        """
        self._begin(labels, feature_maps or tokens)
        side = self.complementary
        main_inputs, complementary_inputs = two_sides(self.main, side, main_inputs, complementary_inputs, named)
        cross = None
        if self.config.uses_cross:
            cross = complementary_feature(side, complementary_inputs, batch_of(self.main, main_inputs), training=self.training)
        return self._result(self.fused(main_inputs, cross, labels, feature_maps=feature_maps, tokens=tokens))

    def fused(
        self,
        main_inputs: Inputs,
        cross: Tensor | None,
        labels: Tensor | None = None,
        *,
        feature_maps: bool = False,
        tokens: bool = False,
    ) -> FusionOutput:
        """Run ``forward`` with a given complementary feature psi_y (B, cross_dim), ignoring ``return_logits``."""
        config, dense = self.config, self.is_dense
        encoded = run_prompted(self.main, self._bank(), main_inputs, cross, feature_maps=feature_maps or dense, tokens=tokens)
        features, scores = encoded.feature, stacked_scores(encoded)
        logits = apply_head(self.head, *head_inputs(config, encoded.feature_maps if dense else features, cross))
        task_loss, summed = self._losses(logits, labels, scores)
        importance = features.new_zeros(())
        if summed is not None:
            importance = functional.importance_loss(summed, threshold=config.importance_threshold)
        loss = None if task_loss is None else task_loss + config.importance_weight * importance
        return self._output_type(logits, labels)(
            loss, logits, task_loss, importance, scores, features, encoded.feature_maps if feature_maps else None, encoded.tokens
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, see :meth:`PromptTuned.reset_classifier`; without a head ``config.head_inputs`` becomes "main"."""
        super().reset_classifier(num_classes, global_pool)
        if self.head is None:
            self.config = self.bank.config = dataclasses.replace(self.config, head_inputs="main")

    def _has_auxiliary_loss(self) -> bool:
        return self.bank.routes and self.config.importance_weight > 0

    def _loss_is_cross_entropy(self) -> bool:
        return super()._loss_is_cross_entropy() and not self._has_auxiliary_loss()

    def _give_back(self) -> None:
        """Undo this model's changes to encoders and frozen modules; encoders that were passed in wrapped or tuned stay so."""
        for encoder in self._wrapped:
            encoder.detach()
        for held in self._holds:
            held.release()

    def complementary_feature(self, inputs: Inputs | None) -> Tensor:
        """Return psi_y, (B, cross_dim)."""
        return complementary_feature(self.complementary, inputs, None)

    def train(self, mode: bool = True) -> "MoPEFusion":
        """Set the mode of prompts, mapper and head; encoders stay in eval mode."""
        super().train(mode)
        for source in sources_of(self.complementary).values():
            if source.is_held:
                source.value.eval()
        return self

    def fold(self) -> FoldedModel:
        """Return a new model for inference whose experts and prompts have already passed through the frozen projections.

        Its outputs equal those of this model in eval mode, up to rounding. It copies the trained parts and shares the frozen
        encoders.

        Raises:
            ValueError: folding is not exact for this encoder (a norm on keys, or a norm of an unknown class).
            RuntimeError: weights are sharded.
        """
        self._check_whole()
        side = self.complementary
        side = side.fold() if isinstance(side, Sides) else sources_of(side)["complementary"].folded()
        return FoldedModel(self.main, self.bank, self.head, side, return_logits=self.return_logits, dense=self.is_dense)

    def parameter_groups(
        self, main_lr: float, complementary_lr: float | Mapping[str, float] | None = None, weight_decay: float = 1e-3
    ) -> list[dict[str, Any]]:
        """Return the trained parameters as optimiser groups: bank and head at ``main_lr``, then each complementary side's.

        For several sides ``complementary_lr`` may be a dict by name; sides that are not in it use ``main_lr``. A side's stand-in
        uses its side's rate. Defaults of the released code: 4e-4 (vision) and 5e-4 (text), weight decay 1e-3 on everything.

        Raises:
            ValueError: a name is not that of a side.
        """
        sources, stand_ins = sources_of(self.complementary), getattr(self.complementary, "stand_ins", {})
        rates = complementary_lr if isinstance(complementary_lr, Mapping) else dict.fromkeys(sources, complementary_lr)
        if unknown := [name for name in rates if name not in sources]:
            raise ValueError(f"complementary_lr has {unknown}: this model's sides are {list(sources)}")
        parts = [(main_lr, [module.parameters() for module in (self.bank, self.head) if module is not None])]
        for name, source in sources.items():
            of_side = [source.value.parameters()] if source.is_tuned or source.trained else []
            rate = main_lr if rates.get(name) is None else rates[name]
            parts.append((rate, [*of_side, [stand_ins[name]] if name in stand_ins else []]))
        groups, seen = [], set()
        for rate, part in parts:
            # a parameter that two sides share goes to the first one's group
            trained = [p for each in part for p in each if p.requires_grad and p not in seen]
            seen.update(trained)
            if trained or not groups:
                groups.append({"params": trained, "lr": rate, "weight_decay": weight_decay})
        return groups

    def frozen_parts(self) -> list[str]:
        """Return the names of the modules that are kept frozen."""
        return [*super().frozen_parts(), *(source.path for source in sources_of(self.complementary).values() if source.is_held)]

    def unwrap(self) -> tuple[nn.Module, nn.Module | Callable[..., Tensor] | dict[str, Any] | None]:
        """Return the encoders as they were, several complementary ones by name; this model can't be used afterwards.

        A :class:`PromptedEncoder` or :class:`PromptTuned` that was passed in stays as it is: its owner detaches or unwraps it.
        """
        self._give_back()
        given = {
            name: source.value.main.encoder if source.is_tuned and source.value.main in self._wrapped else source.value
            for name, source in sources_of(self.complementary).items()
        }
        return self.main.encoder, given if isinstance(self.complementary, Sides) else given["complementary"]

    def sources(self) -> dict[str, Source | None]:
        """Return where the encoders can be obtained again; there is no complementary entry if features are passed in.

        If a side is a function that returns a supported encoder's feature, its entry includes the ``pooling``. For several sides
        the keys are "complementary.NAME".
        """
        found = {"main": source_of(self.main.encoder)}
        for name, source in sources_of(self.complementary).items():
            key = f"complementary.{name}" if isinstance(self.complementary, Sides) else name
            if source.is_tuned:
                found[key] = source_of(source.value.main.encoder)
            elif source.value is not None:
                encoder, pooling = encoder_of(source.value) or (None, None)
                origin = None if encoder is None else source_of(encoder)
                found[key] = None if origin is None else {**origin, "pooling": pooling}
        return found

    def sampled_encoders(self) -> dict[str, Samples | None]:
        """Return sampled weights of each frozen encoder, including one inside a function; None where they can't be read."""
        found = super().sampled_encoders()
        for name, source in sources_of(self.complementary).items():
            if (known := encoder_of(source.value)) is not None:
                layers = family_of(known[0]).layers(known[0])
                key = f"complementary.{name}.encoder" if isinstance(self.complementary, Sides) else "complementary.encoder"
                found[key] = sample_weights(known[0], [layer.module for layer in layers])
        return found

    def description(self) -> dict[str, Any]:
        side = self.complementary
        if isinstance(side, Sides):
            described = side.description()
        else:
            described = describe_encoder(side.main) if isinstance(side, PromptTuned) else None
        return {
            "model": "MoPEFusion",
            "main": describe_encoder(self.main),
            "complementary": described,
            "config": self.config.to_dict(),
            **self._head_description(),
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        main: nn.Module,
        complementary: nn.Module | Callable[..., Tensor] | Mapping[str, Any] | None = None,
        *,
        head: nn.Module | None = None,
        strict: bool = False,
        revision: str | None = None,
        return_logits: bool = False,
    ) -> "MoPEFusion":
        """Load a saved checkpoint onto the same encoders; pass ``head`` only if it was saved with a custom head.

        For several complementary sides pass a dict of names and encoders; the other settings of each :class:`Side` are in the save.

        ``path`` is a folder written by :meth:`save_pretrained`, or "user/name" of one on the Hugging Face Hub
        (:meth:`push_to_hub`), where ``revision`` is a branch, a tag or a commit. Encoders with other weights cause a warning, or an
        error with ``strict``; see :meth:`load_pretrained`.

        Raises:
            FileNotFoundError, ValueError: there is no such checkpoint, it is damaged, or it doesn't fit; the message says why.
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
        complementary: nn.Module | Callable[..., Tensor] | Mapping[str, Any] | None = None,
        *,
        head: nn.Module | None = None,
    ) -> "MoPEFusion":
        """Build the model that the description specifies, without loading weights."""
        classes, task = None if head is not None else saved["num_classes"], checkpoint.task_settings(saved)
        with checkpoint.settings_of(path):
            config = MoPEConfig(**saved["config"])
            check_head(classes, head, **task)
            complementary = restored(complementary, saved.get("complementary"))
        return cls(main, complementary, classes, config, head=head, **task)
