"""Several complementary sides: their features are combined, and each side may be missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .._settings import check_types
from ..modules.prompts import check_input
from .complementary import FeatureSource, is_prompted_model
from .frames import as_samples, pooled
from .prompting import Inputs
from .task import describe_encoder

PRESENT = "present"
"""The key, next to the names of sides, of the masks that say which samples have an optional side."""
_ARGUMENTS = (PRESENT, "main_inputs", "complementary_inputs", "labels", "feature_maps", "tokens")
"""Names of a model's other arguments, which can't be names of sides."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of several complementary sides of a :class:`MoPEFusion`, with settings beyond its encoder.

    Args:
        source: the same as the single complementary side of a fusion: a supported encoder, a :class:`PromptTuned`, a callable, or
            None for features.
        width: width of the feature; needed only if it can't be inferred.
        trainable: for a module that is not a supported encoder: train it with the prompts. Its parameters then belong to the model,
            and are saved and loaded with it. By default the module is kept frozen.
        optional: this side may be missing. A trained row then replaces its feature; see :meth:`MoPEFusion.forward`.
        frames: "mean" or "max": inputs are (B, T, ...), T frames of a video. The encoder runs on all B * T frames, and the feature
            is the mean or the maximum over a video's frames.
        pooling, prompt_length: for a supported encoder, used instead of the config's ``complementary_pooling`` and
            ``complementary_prompt_length``.

    Examples:
        >>> sides = {"audio": Side(wav2vec2, optional=True), "video": Side(vit, frames="max")}
        >>> model = MoPEFusion(bert, sides, num_classes=2)
        >>> video = {"pixel_values": frames, "frame_mask": real}             # (B, T, 3, 224, 224) and (B, T)
        >>> output = model(text, {"audio": audio, "video": video, "present": {"audio": heard}}, labels)
    """

    source: nn.Module | Callable[..., Tensor] | None = None
    _: KW_ONLY
    width: int | None = None
    trainable: bool = False
    optional: bool = False
    frames: str | None = None
    pooling: str | None = None
    prompt_length: int | None = None

    def __post_init__(self):
        check_types(self)
        if self.frames not in (None, "mean", "max"):
            raise ValueError(f"Side.frames must be 'mean', 'max' or None, got {self.frames!r}")
        for name, least in (("width", 1), ("prompt_length", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"Side.{name} must be >= {least} or None, got {value}")


FACTS = tuple(field.name for field in fields(Side) if field.name != "source")
"""The fields of a :class:`Side` that are saved."""


def named_sides(given: Mapping[str, Any]) -> dict[str, Side]:
    """Convert each value to a :class:`Side`.

    Raises:
        TypeError, ValueError: there are no sides, or a name is not allowed.
    """
    if not given:
        raise ValueError("complementary is an empty dict: give at least one side, or None for features that are passed in")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"names of complementary sides must be strings, got {name!r}")
        taken = name in _ARGUMENTS or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name)
        if taken or not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise ValueError(f"a side can't be called {name!r}: use an identifier that is not taken yet, such as 'audio'")
    return {name: value if isinstance(value, Side) else Side(value) for name, value in given.items()}


class Sides(nn.Module):
    """The features of several sides combined into one, psi_y, with a learned row for each side that is missing.

    Args:
        facts: name -> :class:`Side`, each with its width set.
        sources: name -> the source of the side's feature.
        combine, dropout: ``combine`` and ``side_dropout`` of :class:`MoPEConfig`.
    """

    def __init__(self, facts: Mapping[str, Side], sources: Mapping[str, Any], *, combine: str = "concat", dropout: float = 0.0):
        super().__init__()
        self.combine, self.dropout = combine, dropout
        self.facts = {name: _facts(side, sources[name]) for name, side in facts.items()}
        self.sides = nn.ModuleDict({name: source for name, source in sources.items() if isinstance(source, nn.Module)})
        self.functions = {name: source for name, source in sources.items() if name not in self.sides}
        optional = {name: side.width for name, side in facts.items() if side.optional}
        if self.dropout and not optional:
            raise ValueError("MoPEConfig.side_dropout is for sides that may be missing: declare them with Side(..., optional=True)")
        self.stand_ins = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name, width in optional.items()})

    def sources(self) -> dict[str, FeatureSource]:
        """Return feature sources by name, with their paths in a model that has these sides as ``complementary``."""
        found = {}
        for name, facts in self.facts.items():
            if name in self.sides:
                found[name] = FeatureSource(f"complementary.sides.{name}", self.sides[name], facts.trainable)
            else:
                found[name] = FeatureSource(f"complementary[{name!r}]", self.functions[name])
        return found

    def forward(self, inputs: Mapping[str, Any], batch: int | None = None) -> Tensor:
        """Return psi_y (B, sum of widths), or (B, width) if features are summed.

        Args:
            inputs: inputs by name; see :meth:`MoPEFusion.forward`.
            batch: B, if it is known.
        """
        return self.joined(self.features(inputs, batch))

    def joined(self, features: Mapping[str, Tensor]) -> Tensor:
        """Combine the features of all sides into one."""
        whole = [features[name] for name in self.facts]
        return torch.cat(whole, dim=-1) if self.combine == "concat" else sum(whole[1:], whole[0])

    def features(self, inputs: Mapping[str, Any], batch: int | None = None) -> dict[str, Tensor]:
        """Return each side's feature (B, width), with its stand-in where the side is missing."""
        given, present = self._checked(inputs)
        found = {}
        for name, source in self.sources().items():
            if given[name] is not None:
                found[name] = self._feature(name, source, given[name], present.get(name))
                check_input(f"the feature of {name!r}", found[name], self.facts[name].width)
                batch = found[name].shape[0] if batch is None else batch
                check_same_batch(batch, found[name], name)
        if batch is None:
            raise ValueError(f"all of {list(given)} are missing, and the number of samples can't be inferred from the main side")
        return {name: self._whole(name, found.get(name), present.get(name), batch) for name in self.facts}

    def encoder_inputs(self, name: str, inputs: Mapping[str, Any]) -> Inputs | None:
        """Return a side's encoder inputs for the samples, or frames, that are present; None if there are none."""
        given, present = self._checked(inputs)
        if given[name] is None:
            return None
        own, _, _, rows = self._as_rows(name, given[name], present.get(name))
        if rows is None:
            return own
        if not rows.any():
            return None
        if isinstance(own, Tensor):
            return own[rows]
        return {key: value[rows] if isinstance(value, Tensor) else value for key, value in own.items()}

    def _checked(self, inputs: Any) -> tuple[dict[str, Inputs | None], dict[str, Tensor]]:
        """Return the inputs of every side, and the presence masks that are given."""
        names = list(self.facts)
        if not isinstance(inputs, Mapping):
            raise TypeError(f"complementary_inputs must be a dict of {names}, got {type(inputs).__name__}")
        if unknown := [name for name in inputs if name not in (*names, PRESENT)]:
            raise ValueError(f"complementary_inputs has {unknown}: this model's sides are {names}")
        given = {name: inputs.get(name) for name in names}
        for name, value in given.items():
            if value is None and not self.facts[name].optional:
                raise ValueError(
                    f"side {name!r} is missing, but was not declared optional: give complementary_inputs[{name!r}], or "
                    f"create the model with {{{name!r}: Side(..., optional=True)}}"
                )
        present = {} if inputs.get(PRESENT) is None else inputs[PRESENT]
        if not isinstance(present, Mapping):
            raise TypeError(
                f"complementary_inputs[{PRESENT!r}] must be a dict of names and masks (B,), got {type(present).__name__}"
            )
        present = {name: mask for name, mask in present.items() if mask is not None}
        for name, mask in present.items():
            if name not in names or not self.facts[name].optional:
                optional = [each for each in names if self.facts[each].optional]
                raise ValueError(
                    f"{PRESENT!r} has a mask for {name!r}, but the optional sides are {optional}: create the model with "
                    f"{{{name!r}: Side(..., optional=True)}}"
                )
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 1:
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"{PRESENT}[{name!r}] must be a bool tensor (B,), True for samples with this side; got {got}")
            if given[name] is None:
                raise ValueError(f"{PRESENT}[{name!r}] is given, but {name!r} is None: leave the mask out if all are missing")
        return given, present

    def _as_rows(
        self, name: str, inputs: Inputs, present: Tensor | None
    ) -> tuple[Inputs, tuple[int, int] | None, Tensor | None, Tensor | None]:
        """Return the encoder's inputs, a video's (B, T) and frame mask, and a mask of the rows that are present; None for all."""
        if self.facts[name].frames is None:
            return inputs, None, None, present
        inputs, shape, mask = as_samples(name, inputs)
        if present is not None:
            check_same_batch(shape[0], present, f"{PRESENT}[{name!r}]")
            valid = present[:, None].expand(shape)
            return inputs, shape, mask, (valid if mask is None else valid & mask).flatten()
        return inputs, shape, mask, None if mask is None else mask.flatten()

    def _feature(self, name: str, source: FeatureSource, inputs: Inputs, present: Tensor | None) -> Tensor:
        inputs, shape, mask, rows = self._as_rows(name, inputs, present)
        if rows is not None and (source.is_tuned or source.trained):
            # NaN in absent rows would cause NaN gradients, whatever is done with their features
            inputs = _filled(inputs, rows)
        feature = source.feature(inputs, training=self.training)
        if shape is None:
            return feature
        return pooled(name, feature.unflatten(0, shape), mask, self.facts[name].frames, present)

    def _whole(self, name: str, feature: Tensor | None, present: Tensor | None, batch: int) -> Tensor:
        """Return the feature (B, width), with the stand-in for samples without this side."""
        if not self.facts[name].optional:
            return feature
        stand_in = self.stand_ins[name]
        if feature is None:
            return stand_in.expand(batch, -1)
        if present is not None:
            check_same_batch(batch, present, f"{PRESENT}[{name!r}]")
        if self.training and self.dropout:
            kept = torch.rand(batch, device=feature.device) >= self.dropout
            present = kept if present is None else present & kept
        elif self.training and present is None:
            # a stand-in outside of the graph would block DDP, which waits for all gradients
            present = torch.ones(batch, dtype=torch.bool, device=feature.device)
        return feature if present is None else torch.where(present[:, None], feature, stand_in.to(feature.dtype))

    def fold(self) -> Sides:
        """Return a copy for inference, with folded sources and copies of the trained parts."""
        folded = Sides(self.facts, {name: source.folded() for name, source in self.sources().items()}, combine=self.combine)
        for name, row in self.stand_ins.items():
            folded.stand_ins[name] = nn.Parameter(row.detach().clone(), requires_grad=False)
        return folded.eval()

    def description(self) -> list[dict[str, Any]]:
        """Describe each side, in order, as plain values."""
        described = []
        for name, source in self.sources().items():
            encoder = describe_encoder(source.value.main) if source.is_tuned else None
            trained = type(source.value).__name__ if source.trained else None
            facts = {fact: getattr(self.facts[name], fact) for fact in FACTS}
            described.append({"name": name, "encoder": encoder, "trained": trained, **facts})
        return described


def sources_of(complementary: object) -> dict[str, FeatureSource]:
    """Return feature sources by name, for all sides or for the single one, "complementary"."""
    if isinstance(complementary, Sides):
        return complementary.sources()
    return {"complementary": FeatureSource("complementary", complementary)}


def complementary_feature(complementary: object, inputs: Any, batch: int | None, *, training: bool = False) -> Tensor:
    """Return psi_y (B, cross_dim).

    Raises:
        ValueError: there are no inputs, or sides differ in their number of samples.
    """
    if inputs is None:
        raise ValueError(
            "complementary_inputs is None, but prompts or head depend on the complementary modality; if transformers' Trainer has "
            "dropped its columns, set remove_unused_columns=False"
        )
    if isinstance(complementary, Sides):
        return complementary(inputs, batch)
    feature = FeatureSource("complementary", complementary).feature(inputs, training=training)
    check_same_batch(batch, feature)
    return feature


def check_same_batch(batch: int | None, feature: Tensor, name: str = "complementary") -> None:
    """Raise ValueError if the number of samples differs from that of the main side."""
    if isinstance(feature, Tensor) and feature.dim() and batch is not None and feature.shape[0] != batch:
        raise ValueError(f"the two sides differ in batch size: main has {batch} samples, {name} has {feature.shape[0]}")


def restored(given: Any, saved: Any) -> Any:
    """Return the sides passed for loading a save, with the settings that the save holds for them.

    Raises:
        ValueError: the model was saved with other sides, or its description is damaged.
    """
    if not isinstance(saved, list):
        return given
    names = {"name", "encoder", "trained", *FACTS}
    if not all(isinstance(side, Mapping) and set(side) == names for side in saved):
        raise ValueError(f"it has {saved!r:.200} as its sides")
    expected = [side["name"] for side in saved]
    if not isinstance(given, Mapping) or set(given) != set(expected):
        got = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"it was saved with the sides {expected}, got {got}: pass complementary={{{expected[0]!r}: ..., ...}}")
    default, sides = Side(), {}
    for side in saved:
        facts, own = {fact: side[fact] for fact in FACTS}, given[side["name"]]
        if isinstance(own, Side):
            facts |= {fact: value for fact in FACTS if (value := getattr(own, fact)) != getattr(default, fact)}
            own = own.source
        sides[side["name"]] = Side(own, **facts)
    return sides


def _filled(inputs: Inputs, valid: Tensor) -> Inputs:
    """Replace absent rows of floating-point inputs by the first row that is present."""
    if isinstance(inputs, Mapping):
        return {name: _filled(value, valid) for name, value in inputs.items()}
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.shape[:1] != valid.shape:
        return inputs
    positions = torch.arange(valid.shape[0], device=valid.device)
    taken = inputs[torch.where(valid, positions, valid.int().argmax())]
    # if all rows are absent, the first row may hold anything
    return torch.where(valid.view(-1, *[1] * (inputs.dim() - 1)), inputs, taken.nan_to_num(0, 0, 0))


def _facts(side: Side, source: Any) -> Side:
    """Return the settings of a side as a save has to record them, without the source."""
    if not is_prompted_model(source):
        return replace(side, source=None)
    length = source.settings["prompt_length"] if FeatureSource("", source).is_tuned else None
    return replace(side, source=None, pooling=source.main.pooling, prompt_length=length)
