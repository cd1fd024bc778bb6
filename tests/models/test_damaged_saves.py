"""Randomly damaged saves and checkpoints raise what their readers document."""

import json
import random
import warnings

import pytest
import torch
from damage import TIMES, VALUES, another_value, damaged, damaged_head, hold
from safetensors.torch import save_file
from tiny_fusion import make_bert
from tiny_vlmo import make_config
from vlmo_files import random_state, tiny_shapes

from mope_fast import BAFConfig, PromptTuned, VLMo
from mope_fast.models import checkpoint


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_vlmo(tmp_path, kind):
    config = make_config("base")
    state, file = random_state(tiny_shapes(config)), tmp_path / f"vlmo.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hold(file, lambda: VLMo.from_checkpoint(file, config), ValueError, damaged if kind == "zip" else damaged_head)


def test_adapters(tmp_path):
    bert = make_bert()
    PromptTuned(bert, 2, 5).save_pretrained(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    data = weights.read_bytes()

    def another_setting(text, draw):
        description = json.loads(text)
        return json.dumps({**description, "config": json.loads(another_value(description["config"], draw))}).encode()

    def other_weights(text, draw):
        content = damaged_head(data, draw)
        name = f"{checkpoint._content_name(content)}.safetensors"
        (tmp_path / name).write_bytes(content)
        return json.dumps({**json.loads(text), "weights": name}).encode()

    for change in (damaged, lambda text, draw: another_value(json.loads(text), draw).encode(), another_setting, other_weights):
        file = tmp_path / checkpoint.DESCRIPTION
        hold(file, lambda: PromptTuned.from_pretrained(tmp_path, bert).unwrap(), (ValueError, FileNotFoundError), change)


def test_baf_settings():
    draw, refused = random.Random(0), 0
    settings = BAFConfig(text_prompt_length=2, image_prompt_length=2, unified_prompt_length=2).to_dict()
    for _ in range(20 * TIMES):
        try:
            BAFConfig(**{**settings, draw.choice(list(settings)): draw.choice(VALUES)})
        except (TypeError, ValueError):
            refused += 1
    assert refused
