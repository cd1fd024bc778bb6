"""Settings: what is refused, what is printed, and where blocks are cut."""

import dataclasses
import itertools
import json

import pytest
from tiny_baf import LENGTHS

from mope_fast import BAFConfig

VERBALIZER = {"head": "verbalizer", "verbalizer": [[4], [5, 6]], "mask_token_id": 3}
SEES = {"text": ["text", "image"], "image": ["image"]}


def make(**settings):
    return BAFConfig(**{**LENGTHS, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_prompt_length": -1}, "BAFConfig.text_prompt_length must be >= 0, got -1"),
        ({"image_prompt_length": -1}, "BAFConfig.image_prompt_length must be >= 0"),
        ({"unified_prompt_length": -2}, "BAFConfig.unified_prompt_length must be >= 0"),
        ({"prompt_init_std": float("nan")}, "BAFConfig.prompt_init_std must be finite in float32, got nan"),
        ({"prompt_init_std": float("inf")}, "BAFConfig.prompt_init_std must be finite in float32, got inf"),
        ({"num_blocks": 0}, "BAFConfig.num_blocks must be >= 1, got 0"),
        ({"fusion_heads": 0}, "BAFConfig.fusion_heads must be >= 1, got 0"),
        ({"partition": "halves"}, r"BAFConfig.partition must be one of \['experts', 'all', 'stages'\], got 'halves'"),
        ({"fusion_form": "H"}, r"BAFConfig.fusion_form must be one of \['A', .*'G'\], got 'H'"),
        ({"pooling": "max"}, r"BAFConfig.pooling must be one of \['unified', 'pooler', 'auto'\], got 'max'"),
        ({"head": "conv"}, r"BAFConfig.head must be one of \['linear', 'mlp', 'verbalizer'\], got 'conv'"),
        ({"partition": "stages", "num_blocks": 3}, "'stages' has at most 2 blocks, got num_blocks=3"),
        ({"boundaries": [2, 1]}, r"BAFConfig.boundaries must be strictly increasing layer indices, got \(2, 1\)"),
        ({"boundaries": [1, 1]}, "strictly increasing"),
        ({"fusion_form": "C"}, "text_prompt_length and image_prompt_length must be equal, got 3 and 2"),
        (
            {"fusion_form": "G", "unified_prompt_length": 0},
            "'G' creates the unified prompt, got unified_prompt_length=0",
        ),
        ({"pooling": "unified", "unified_prompt_length": 0}, "pooling='unified' needs unified_prompt_length >= 1: use 'pooler'"),
        ({"visible": {**SEES, "prompt": []}}, r"BAFConfig.visible has group 'prompt': the groups are \['unified_prompt', .*"),
        ({"fusion_visible": {"text": ["pixels"]}}, "BAFConfig.fusion_visible has group 'pixels'"),
        ({"restricted": False, "prompts_see_themselves": False}, "themselves=False has an effect only with restricted=True"),
        (
            {"restricted": False, "modalities_see_each_other": False},
            "modalities_see_each_other=False has an effect",
        ),
        ({"visible": SEES, "tokens_see_other_prompts": True}, "tokens_see_other_prompts=True has an effect only with visible=None"),
        ({"visible": SEES, "restricted": False}, "restricted=False has an effect only with visible=None"),
        ({"unified_visible": False}, "unified_visible=False has an effect only with unified_from_start=True"),
        ({"widen_next_only": True}, "widen_next_only=True has an effect only with fusion_form='E'"),
        ({"head": "verbalizer"}, r"head='verbalizer', verbalizer=\[\[token ids of a class\], ...\] and mask_token_id must be"),
        ({"verbalizer": [[1]], "mask_token_id": 3}, "head='verbalizer', "),
        ({"mask_token_id": 3}, "head='verbalizer', "),
        ({**VERBALIZER, "mask_token_id": None}, "head='verbalizer', "),
        ({**VERBALIZER, "verbalizer": [[4], []]}, r"at least one token for each class, got \(\(4,\), \(\)\)"),
    ],
)
def test_values_out_of_range_or_against_each_other_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_prompt_length": 1.5}, "BAFConfig.text_prompt_length must be int, got 1.5"),
        ({"text_prompt_length": None}, "BAFConfig.text_prompt_length must be int, got None"),
        ({"num_blocks": True}, "BAFConfig.num_blocks must be int, got True"),
        ({"prompt_init_std": "0.1"}, "BAFConfig.prompt_init_std must be float, got '0.1'"),
        ({"restricted": 1}, "BAFConfig.restricted must be bool, got 1"),
        ({"pooling": None}, "BAFConfig.pooling must be str, got None"),
        ({"fusion_heads": 2.0}, r"BAFConfig.fusion_heads must be int \| None, got 2.0"),
        ({"boundaries": 3}, "BAFConfig.boundaries must be a list of layer indices, got 3"),
        ({"boundaries": "12"}, "BAFConfig.boundaries must be a list of layer indices, got '12'"),
        ({"boundaries": [True]}, r"a list of layer indices, got \[True\]"),
        ({**VERBALIZER, "verbalizer": [4, 5]}, r"must be a list with a list of token ids per class, got \[4, 5\]"),
        ({**VERBALIZER, "verbalizer": ["yes", "no"]}, "a list with a list of token ids per class"),
        ({**VERBALIZER, "verbalizer": 4}, "a list with a list of token ids per class, got 4"),
        ({"visible": [SEES]}, "BAFConfig.visible must be a dict of lists, got list"),
        ({"visible": {"text": "image"}}, r"BAFConfig.visible\['text'\] must be a list of groups, got 'image'"),
        ({"fusion_visible": {"text": None}}, r"BAFConfig.fusion_visible\['text'\] must be a list of groups, got None"),
    ],
)
def test_values_of_other_types_are_named(settings, message):
    with pytest.raises(TypeError, match=message):
        make(**settings)


def test_lengths_have_no_default_and_values_can_not_be_changed():
    with pytest.raises(TypeError, match="missing 3 required keyword-only arguments: 'text_prompt_length'"):
        BAFConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().num_blocks = 3


@pytest.mark.parametrize(
    "settings",
    [{}, {"boundaries": [1, 2], "visible": SEES, "fusion_visible": {"text": ()}}, {**VERBALIZER, "fusion_heads": 4}],
    ids=["default", "tables", "verbalizer"],
)
def test_settings_pass_through_json(settings):
    config = make(**settings)
    again = BAFConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again != make(num_blocks=1)


def test_a_change_of_the_arguments_afterwards_changes_nothing():
    seen, words, starts = {"text": ["text"]}, [[4], [5]], [1]
    config = make(visible=seen, boundaries=starts, **{**VERBALIZER, "verbalizer": words})
    seen["text"].append("image")
    seen["image"] = []
    words[0].append(6)
    starts.append(2)
    assert (config.visible, config.verbalizer, config.boundaries) == ({"text": ("text",)}, ((4,), (5,)), (1,))


def test_every_setting_is_described_with_its_source():
    lines = BAFConfig.describe().splitlines()
    settings = dataclasses.fields(BAFConfig)
    assert len(lines) == len(settings)
    for line, setting in zip(lines, settings, strict=True):
        assert line.startswith(setting.name)
        assert line.endswith(f"[{setting.metadata['source']}]")
        sources = "arXiv 2403.11311", "a summary of arXiv 2403.11311 by others", "a reading of arXiv 2403.11311: ", "ours"
        assert setting.metadata["source"].startswith(sources)
    assert "num_blocks = 2: N, blocks of layers" in "\n".join(lines)
    assert lines[0].startswith("text_prompt_length: n_l, rows of the L-Prompt")


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({}, (11,)),
        ({"num_blocks": 1}, ()),
        ({"num_blocks": 3}, (7, 14)),
        ({"num_blocks": 4}, (6, 11, 16)),
        ({"num_blocks": 7}, (3, 6, 9, 12, 15, 18)),
        ({"num_blocks": 21}, tuple(range(1, 21))),
        ({"partition": "all"}, (12,)),
        ({"partition": "all", "num_blocks": 4}, (6, 12, 18)),
        ({"partition": "all", "num_blocks": 24, "keep_modality_prompts": True}, tuple(range(1, 24))),
        ({"partition": "stages", "num_blocks": 1}, ()),
        ({"partition": "stages", "keep_modality_prompts": True}, (21,)),
        ({"partition": "stages", "fusion_form": "G"}, (21,)),
        ({"boundaries": [5, 20]}, (5, 20)),
        ({"boundaries": [21], "fusion_form": "G"}, (21,)),
        ({"boundaries": []}, ()),
    ],
)
def test_where_base_plus_is_cut(settings, starts):
    assert make(**settings).block_starts(24, 21) == starts


def test_blocks_are_as_equal_as_can_be():
    for layers in (5, 10, 21, 24):
        for blocks in range(1, layers + 1):
            cuts = [0, *make(num_blocks=blocks).block_starts(layers + 3, layers), layers]
            sizes = [b - a for a, b in itertools.pairwise(cuts)]
            assert len(sizes) == blocks
            assert max(sizes) - min(sizes) <= 1
    assert make(num_blocks=2).block_starts(24, 21) == (11,)
