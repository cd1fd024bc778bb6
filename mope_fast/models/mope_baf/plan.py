"""The plan of each MoPE-BAF layer: the groups in its sequence, their visibility, and the rows of each expert."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...receptive_field import ReceptiveField
from ..vlmo import VLMoConfig
from .config import BAFConfig


class Segment(NamedTuple):
    """Consecutive layers that run without a step in between: one block, or its part before or after the first fusion layer."""

    layers: range
    lengths: dict[str, int]
    """Group -> number of rows, for the groups that are present, in the order of the sequence."""
    experts: dict[str, int]
    """VLMo's expert -> number of rows that it takes, in the order of the sequence."""
    fields: tuple[ReceptiveField | None, ...]
    """One for each layer; None if every group sees every other."""

    # not a property: torch 2.10 can't compile a property of a named tuple
    def around_tokens(self) -> tuple[int, int]:
        """Return the numbers of prompt rows before the text and after the image."""
        names = list(self.lengths)
        before = sum(self.lengths[name] for name in names[: names.index("text")])
        return before, sum(self.lengths.values()) - before - self.lengths["text"] - self.lengths["image"]


def check_fits(config: BAFConfig, vlmo: VLMoConfig) -> None:
    """Raise ValueError for a prompt that no layer of this VLMo would use."""
    if config.unified_prompt_length and vlmo.first_fusion_layer == vlmo.num_layers and not config.unified_from_start:
        raise ValueError("this VLMo has no fusion layers for the unified prompt: set unified_from_start=True, or its length to 0")
    if config.fusion_form == "G" and vlmo.first_fusion_layer == vlmo.num_layers:
        raise ValueError("this VLMo has no fusion layers before which form G could create the unified prompt: use another form")
    if config.text_prompt_length + config.image_prompt_length and not (vlmo.first_fusion_layer or config.keep_modality_prompts):
        raise ValueError(
            "this VLMo has only fusion layers, where text and image have no prompts: set keep_modality_prompts=True, "
            "or the lengths to 0"
        )


def make_plan(config: BAFConfig, vlmo: VLMoConfig, text: int) -> tuple[Segment, ...]:
    """Build the segments of all layers for ``text`` text tokens."""
    first, last = vlmo.first_fusion_layer, vlmo.num_layers
    starts = config.block_starts(last, first)
    cuts = sorted({0, first, last, *starts})
    return tuple(_segment(config, vlmo, text, range(start, stop), starts) for start, stop in itertools.pairwise(cuts))


def _segment(config: BAFConfig, vlmo: VLMoConfig, text: int, layers: range, starts: Sequence[int]) -> Segment:
    fusion = layers.start >= vlmo.first_fusion_layer
    modality_prompts, unified = not fusion or config.keep_modality_prompts, fusion or config.unified_from_start
    left_out = [*(() if unified else ("unified_prompt",)), *(() if modality_prompts else ("text_prompt", "image_prompt"))]
    lengths = {name: length for name, length in config.lengths(text, vlmo.image_tokens).items() if name not in left_out}
    rows = sum(lengths.values())
    image = lengths["image"] + lengths.get("image_prompt", 0)
    visible = (fusion_visibility if fusion else expert_visibility)(config, list(lengths))
    fields = {wide: _field(lengths, _widened(visible) if wide else visible) for wide in (False, True)}
    return Segment(
        layers,
        lengths,
        {"vl": rows} if fusion else {"text": rows - image, "imag": image},
        tuple(fields[_sees_wide(config, starts, layer)] for layer in layers),
    )


def expert_visibility(config: BAFConfig, groups: Sequence[str]) -> dict[str, list[str]]:
    """Return group -> groups that it sees, for the layers before the fusion layers."""
    if config.visible is not None:
        return _given("visible", config.visible, groups)
    if not config.restricted:
        return {group: list(groups) for group in groups}
    themselves, others, each_other = (
        config.prompts_see_themselves,
        config.tokens_see_other_prompts,
        config.modalities_see_each_other,
    )
    sees = {
        "unified_prompt": dict.fromkeys(groups, True),
        "text_prompt": {"text_prompt": themselves, "text": True},
        "text": {"text_prompt": True, "text": True, "image": each_other, "image_prompt": others},
        "image": {"text_prompt": others, "text": each_other, "image": True, "image_prompt": True},
        "image_prompt": {"image": True, "image_prompt": themselves},
    }
    unified = {"unified_prompt": config.unified_visible}
    return {group: [other for other in groups if (unified | sees[group]).get(other)] for group in groups}


def fusion_visibility(config: BAFConfig, groups: Sequence[str]) -> dict[str, list[str]]:
    """Return group -> groups that it sees, for the fusion layers; by default every group sees every other."""
    if config.fusion_visible is not None:
        return _given("fusion_visible", config.fusion_visible, groups)
    return {group: list(groups) for group in groups}


def _given(name: str, visible: Mapping[str, Sequence[str]], groups: Sequence[str]) -> dict[str, list[str]]:
    """Return a user's table, restricted to the groups that these layers have."""
    if missing := [group for group in groups if group not in visible]:
        raise ValueError(f"BAFConfig.{name} has no entry for {missing[0]!r}: give it a list of the groups that it sees")
    return {group: [other for other in groups if other in visible[group]] for group in groups}


def _sees_wide(config: BAFConfig, starts: Sequence[int], layer: int) -> bool:
    """Return whether L- and V-Prompt see each other in this layer, as in form E."""
    if config.fusion_form != "E":
        return False
    return layer in starts if config.widen_next_only else any(layer >= start for start in starts)


def _widened(visible: dict[str, list[str]]) -> dict[str, list[str]]:
    if not {"text_prompt", "image_prompt"} <= set(visible):
        return visible
    more = {"text_prompt": ["image_prompt"], "image_prompt": ["text_prompt"]}
    return {group: [*seen, *more.get(group, ())] for group, seen in visible.items()}


def _field(lengths: dict[str, int], visible: dict[str, list[str]]) -> ReceptiveField | None:
    present = {group for group, length in lengths.items() if length}
    return None if all(present <= set(visible[group]) for group in present) else ReceptiveField(lengths, visible)
