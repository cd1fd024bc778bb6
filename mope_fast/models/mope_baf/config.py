"""The settings of MoPE-BAF. The paper's equations were not available, so every choice here states its source.

The sources are the paper's abstract and a summary by others. A choice that neither of them states is marked as a reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..._settings import Settings, check_types, setting
from ...modules.block_fusion import FORMS

GROUPS = ("unified_prompt", "text_prompt", "text", "image", "image_prompt")
"""Groups of the sequence in their order; an absent group has no rows."""
_PAPER = "arXiv 2403.11311"
_SUMMARY = f"a summary of {_PAPER} by others"
_OURS = "ours"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _reading(why: str) -> str:
    return f"a reading of {_PAPER}: {why}"


PARTITIONS = {
    "experts": "the layers before the fusion layers, in blocks of nearly equal size",
    "all": "all layers, in blocks of nearly equal size",
    "stages": "two blocks: the layers before the fusion layers, and the fusion layers",
}
POOLINGS = {
    "unified": "mean of the unified prompt's outputs",
    "pooler": "VLMo's pooler on the text's class token",
    "auto": "'unified' if there is a unified prompt, else 'pooler'",
}
HEADS = {
    "linear": "one linear layer",
    "mlp": "as VLMo's for visual question answering: D -> 2 D, LayerNorm, GELU, 2 D -> classes",
    "verbalizer": "VLMo's masked language modelling head on the text's mask token: mean logit of each class's words",
}


@dataclass(kw_only=True, unsafe_hash=True)
class BAFConfig(Settings):
    """Settings of :class:`MoPEBAF`; ``BAFConfig.describe()`` lists them with meaning and source.

    Raises:
        TypeError, ValueError: a value has a wrong type or is out of range, or values are incompatible.
    """

    text_prompt_length: int = setting(MISSING, "n_l, rows of the L-Prompt; 0 for none", _PAPER + "; its lengths are unknown")
    image_prompt_length: int = setting(MISSING, "n_v, rows of the V-Prompt; 0 for none", _PAPER + "; its lengths are unknown")
    unified_prompt_length: int = setting(MISSING, "n_vl, rows of the VL-Prompt; 0 for none", _PAPER + "; its lengths are unknown")
    per_block_prompts: bool = setting(
        False,
        "each block has its own L- and V-Prompts; else those inserted at the start are carried through all blocks",
        _reading("prompts are put before the embeddings, once"),
    )
    prompt_init_std: float = setting(
        0.02,
        "standard deviation of the normal initialisation of prompts; set_prompt initialises them from text",
        _reading("as all embeddings of VLMo"),
    )
    restricted: bool = setting(True, "prompts have restricted receptive fields; False: every group sees every other", _SUMMARY)
    tokens_see_other_prompts: bool = setting(
        False,
        "text sees the V-Prompt and images see the L-Prompt; then only the prompts' own receptive fields are restricted",
        _reading("the V-Prompt is 'dedicated to image input only', taken for both directions, and the same for text"),
    )
    prompts_see_themselves: bool = setting(
        True, "L- and V-Prompt see their own rows", _reading("'image input only' speaks against text, not against itself")
    )
    modalities_see_each_other: bool = setting(
        True,
        "text and image see each other before the fusion layers",
        _SUMMARY + " has images see text; that text sees images is from VLMo",
    )
    unified_from_start: bool = setting(
        False,
        "the VL-Prompt is present from the first layer on, sees everything and goes through the text's expert",
        _reading("it is for the multi-modal stage, as the vision-language experts are"),
    )
    unified_visible: bool = setting(True, "with unified_from_start: other groups see it before the fusion layers", _OURS)
    keep_modality_prompts: bool = setting(
        False,
        "L- and V-Prompt stay in the fusion layers, where every group sees every other; else they end before these",
        _reading("the unified prompt takes over, as the vision-language expert does"),
    )
    visible: Mapping[str, Sequence[str]] | None = setting(
        None, "before the fusion layers: group -> groups that it sees, overriding the settings above", _OURS
    )
    fusion_visible: Mapping[str, Sequence[str]] | None = setting(
        None,
        "in the fusion layers: group -> groups that it sees",
        _OURS + "; by default every group sees every other, as in VLMo",
    )
    num_blocks: int = setting(
        2,
        "N, blocks of layers, with a fusion of prompts between them; 1 for no fusion",
        f"{_PAPER} has blocks; {_SUMMARY} has 2 as the best",
    )
    partition: str = setting(
        "experts",
        "which layers are cut into blocks: " + "; ".join(f"'{name}', {meaning}" for name, meaning in PARTITIONS.items()),
        _reading("the prompts that are fused are those of these layers"),
    )
    boundaries: tuple[int, ...] | None = setting(
        None, "the first layer of each block except the first, overriding num_blocks and partition", _OURS
    )
    fusion_form: str = setting(
        "A",
        "; ".join(f"'{name}', {meaning}" for name, meaning in FORMS.items()),
        _reading("'cross-modal prompt attention', with norm and residual as in VLMo's layers"),
    )
    fusion_heads: int | None = setting(None, "number of heads of the fusion's attention; None: as many as VLMo's", _OURS)
    share_directions: bool = setting(False, "one set of weights for text to image and image to text", _reading("none is mentioned"))
    share_boundaries: bool = setting(False, "one set of weights for all boundaries", _reading("none is mentioned"))
    widen_next_only: bool = setting(False, "form E: prompts see each other in the next layer only, not in all later ones", _OURS)
    pooling: str = setting(
        "auto",
        "; ".join(f"'{name}', {meaning}" for name, meaning in POOLINGS.items()),
        f"{_SUMMARY} classifies the VL-Prompt's output; that it is the mean is a reading",
    )
    head: str = setting(
        "linear", "; ".join(f"'{name}', {meaning}" for name, meaning in HEADS.items()), _reading("the simplest; none is described")
    )
    verbalizer: tuple[tuple[int, ...], ...] | None = setting(None, "for head='verbalizer': token ids of each class", _OURS)
    mask_token_id: int | None = setting(None, "for head='verbalizer': id of the mask token, 103 in bert-base-uncased", _OURS)
    freeze_backbone: bool = setting(
        False,
        "keep VLMo frozen and in eval mode, for which a learning rate of 3e-5 is far too small; else it is trained",
        _reading("its learning rate, 3e-5, is VLMo's own for training everything"),
    )

    def __post_init__(self):
        check_types(self)
        self._check_visible("visible", self.visible)
        self._check_visible("fusion_visible", self.fusion_visible)
        self._check_lists()
        self._freeze_lists()
        for name, least in (
            ("text_prompt_length", 0), ("image_prompt_length", 0), ("unified_prompt_length", 0), ("prompt_init_std", 0),
            ("num_blocks", 1), ("fusion_heads", 1),
        ):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"BAFConfig.{name} must be >= {least}, got {getattr(self, name)}")
        for name, choices in (("partition", PARTITIONS), ("fusion_form", FORMS), ("pooling", POOLINGS), ("head", HEADS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"BAFConfig.{name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        if self.partition == "stages" and self.num_blocks > 2:
            raise ValueError(f"BAFConfig.partition='stages' has at most 2 blocks, got num_blocks={self.num_blocks}")
        if self.boundaries is not None and list(self.boundaries) != sorted(set(self.boundaries)):
            raise ValueError(f"BAFConfig.boundaries must be strictly increasing layer indices, got {self.boundaries}")
        if self.fusion_form == "C" and self.text_prompt_length != self.image_prompt_length:
            raise ValueError(
                "BAFConfig.fusion_form='C' adds the result of one prompt's queries to the other prompt: text_prompt_length and "
                f"image_prompt_length must be equal, got {self.text_prompt_length} and {self.image_prompt_length}"
            )
        if self.fusion_form == "G" and not self.unified_prompt_length:
            raise ValueError("BAFConfig.fusion_form='G' creates the unified prompt, got unified_prompt_length=0: use form 'A'")
        if self.pooling == "unified" and not self.unified_prompt_length:
            raise ValueError("BAFConfig.pooling='unified' needs unified_prompt_length >= 1: use 'pooler'")
        self._check_not_ignored()
        self._check_verbalizer()

    def _check_lists(self) -> None:
        words = [[]] if self.verbalizer is None else self.verbalizer
        if not _is_list(words) or not all(_is_list(of_class) and all(map(_is_int, of_class)) for of_class in words):
            raise TypeError(f"BAFConfig.verbalizer must be a list with a list of token ids per class, got {self.verbalizer!r}")
        starts = () if self.boundaries is None else self.boundaries
        if not _is_list(starts) or not all(map(_is_int, starts)):
            raise TypeError(f"BAFConfig.boundaries must be a list of layer indices, got {self.boundaries!r}")

    def _freeze_lists(self) -> None:
        """Convert lists, as read from JSON, to tuples, and copy dicts."""
        for name in ("visible", "fusion_visible"):
            if (visible := getattr(self, name)) is not None:
                object.__setattr__(self, name, {group: tuple(seen) for group, seen in visible.items()})
        if self.boundaries is not None:
            object.__setattr__(self, "boundaries", tuple(self.boundaries))
        if self.verbalizer is not None:
            object.__setattr__(self, "verbalizer", tuple(tuple(words) for words in self.verbalizer))

    def _check_visible(self, name: str, visible: Mapping[str, Sequence[str]] | None) -> None:
        if visible is None:
            return
        if not isinstance(visible, Mapping):
            raise TypeError(f"BAFConfig.{name} must be a dict of lists, got {type(visible).__name__}")
        for group, seen in visible.items():
            if not _is_list(seen):
                raise TypeError(f"BAFConfig.{name}[{group!r}] must be a list of groups, got {seen!r}")
            if unknown := [other for other in (group, *seen) if other not in GROUPS]:
                raise ValueError(f"BAFConfig.{name} has group {unknown[0]!r}: the groups are {list(GROUPS)}")

    def _check_not_ignored(self) -> None:
        """Raise ValueError for a setting that has no effect because of other settings."""
        table = ("tokens_see_other_prompts", "prompts_see_themselves", "modalities_see_each_other", "unified_visible")
        defaults = {field.name: field.default for field in fields(self)}
        for names, works, where in (
            (table, self.restricted, "restricted=True"),
            (("restricted", *table), self.visible is None, "visible=None"),
            (("unified_visible",), self.unified_from_start, "unified_from_start=True"),
            (("widen_next_only",), self.fusion_form == "E", "fusion_form='E'"),
        ):
            if not works and (ignored := [name for name in names if getattr(self, name) != defaults[name]]):
                raise ValueError(f"BAFConfig.{ignored[0]}={getattr(self, ignored[0])} has an effect only with {where}")

    def _check_verbalizer(self) -> None:
        if (self.head == "verbalizer") != (self.verbalizer is not None) or (self.verbalizer is None) != (
            self.mask_token_id is None
        ):
            raise ValueError(
                "BAFConfig.head='verbalizer', verbalizer=[[token ids of a class], ...] and mask_token_id must be set together"
            )
        if self.verbalizer is not None and not all(self.verbalizer):
            raise ValueError(f"BAFConfig.verbalizer must have at least one token for each class, got {self.verbalizer}")
        given = self.verbalizer or ()
        words = {frozenset(of_class) for of_class in given}
        if len(words) < len(given) or sum(map(len, words)) < sum(map(len, given)):
            raise ValueError(
                f"BAFConfig.verbalizer has a word twice in one class, or the same words in two classes: got {self.verbalizer}"
            )

    def lengths(self, text: int, image: int) -> dict[str, int]:
        """Return group -> number of rows, for all five groups in their order."""
        lengths = self.unified_prompt_length, self.text_prompt_length, text, image, self.image_prompt_length
        return dict(zip(GROUPS, lengths, strict=True))

    def block_starts(self, num_layers: int, first_fusion_layer: int) -> tuple[int, ...]:
        """Return the first layer of each block except the first.

        Raises:
            ValueError: there are more blocks than layers, or there is a boundary without prompts to fuse.
        """
        if self.boundaries is not None:
            starts = self.boundaries
        elif self.partition == "stages":
            starts = (first_fusion_layer,) * (self.num_blocks - 1)
        else:
            layers = num_layers if self.partition == "all" else first_fusion_layer
            if self.num_blocks > max(layers, 1):
                raise ValueError(
                    f"BAFConfig.num_blocks={self.num_blocks} is more than the {layers} layers that are cut into blocks"
                )
            starts = tuple(-(-layers * block // self.num_blocks) for block in range(1, self.num_blocks))
        last = num_layers if self.keep_modality_prompts else first_fusion_layer - (self.fusion_form != "G")
        last = min(last, num_layers - 1)
        if any(not 1 <= start <= last for start in starts):
            raise ValueError(
                f"MoPE-BAF can fuse prompts only before layers 1 to {last} here, got boundaries {starts}: from layer "
                f"{first_fusion_layer} on, text and image have no prompts left unless keep_modality_prompts=True"
            )
        return starts
