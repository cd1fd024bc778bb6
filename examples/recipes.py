"""Recipes for published sets: a run's arguments according to the paper's text, to the released code, and ours."""

from dataclasses import dataclass
from typing import Any

SWIN, BERT = "timm/swin_base_patch4_window7_224.ms_in22k", "bert-base-uncased"
_SIDES = {"main": "image", "image_model": SWIN, "text_model": BERT, "max_length": 512}
_STEPS = {"schedule": "steps", "weight_decay": 1e-3, "clip": 1.0}
_RELEASED_CODE = {
    "experts": 4, "epochs": 10, "mapper_norm": "none", "prompt_init": 0.18464, "complementary_prompt_init": 0.3,
    "head_inputs": "main", "image_statistics": "mmbt", "choose": "last", "precision": "fp16", "seed": 42,
}  # fmt: skip
_PAPERS_TEXT = {
    "experts": 16, "epochs": 15, "head_inputs": "main", "dynamic_dropout": 0.1, "image_transform": "crop", "rand_augment": None,
}  # fmt: skip


PAPER = "the paper's first version"
NOTES = {
    "paper": f"{PAPER} gives no batch size, weight decay, clipping or choice of the epoch: the first three are the release's",
    "released": "some differences have no setting, such as whose prompts a window of Swin sees: see docs/coming_from_mope.md",
    "ours": "these settings were not tuned on this set",
}
"""Preset -> its difference from what its name says."""


@dataclass(frozen=True)
class Recipe:
    """Arguments for one set, by their names in ``task_arguments.argument_parser``.

    Attributes:
        ours: arguments that differ from the programs' defaults.
        paper, released: arguments that differ from ours; or a string that says why there are none.
        table: metrics in the paper's tables; if the paper doesn't have the set, those of the set's authors.
        notes: differences from the released code.
    """

    ours: dict[str, Any]
    paper: dict[str, Any] | str
    released: dict[str, Any] | str
    table: tuple[str, ...]
    notes: tuple[str, ...] = ()


def _image_text(batch_size: int, transform: str, augment: list[int] | None, *table: str) -> Recipe:
    """Build the recipe of one of the paper's image-text sets; augmentation and batch size are the release's."""
    ours = {
        **_SIDES, **_STEPS, "epochs": 10, "batch_size": batch_size, "image_transform": transform, "rand_augment": augment,
    }  # fmt: skip
    return Recipe(ours, _PAPERS_TEXT, _RELEASED_CODE, table)


_MEMES = {**_SIDES, **_STEPS, "epochs": 10, "batch_size": 32, "image_transform": "squash"}
_MUSTARD = {
    **_STEPS, "main": "text", "other": ["audio", "video"], "text_model": BERT, "max_length": 512, "epochs": 10, "batch_size": 16,
    "complementary": "frozen", "combine": "concat",
}  # fmt: skip
RECIPES = {
    "food101": _image_text(38, "crop", None, "accuracy"),
    "mm-imdb": _image_text(16, "squash", [2, 7], "f1_macro", "f1_micro"),
    "snli-ve": _image_text(64, "squash", [2, 5], "accuracy"),
    "mustard": Recipe(
        _MUSTARD,
        f"{PAPER}, the one whose text is known, doesn't have MUStARD",
        {
            "combine": "sum", "experts": 16, "noise_std": 1 / 256, "mapper_norm": "none", "head_inputs": "main", "choose": "last",
            "val": 0, "precision": "fp16", "complementary_prompt_init": None, "seed": 42,
        },
        ("accuracy", "f1_macro"),
        (
            "the release's models of sound and video are commented out and its loader fails: these settings are read off that code",
            "the release selects no epoch and validates on test; with val=0 val is test here, too",
        ),
    ),
    "hateful-memes": Recipe(
        _MEMES,
        f"{PAPER}, the one whose text is known, doesn't have Hateful Memes",
        "the released code doesn't read Hateful Memes",
        ("auroc", "accuracy"),
    ),
}  # fmt: skip
"""Name of a published set -> its recipe."""
REFERENCES = Recipe(
    {
        **_STEPS, "image_model": "timm/swin_base_patch4_window12_384.ms_in22k", "text_model": BERT, "max_length": 64, "epochs": 10,
        "batch_size": 16, "head_lr": None,
    },
    {"experts": 16, "epochs": 15, "dynamic_dropout": 0.1, "start_prompts": False},
    "the released code has no program that trains on references",
    ("mean_iou",),
)  # fmt: skip
"""Recipe for RefCOCO and RefCOCO+ (mean IoU of val, testA and testB), and for RefCOCOg, which the paper doesn't have."""
