import dataclasses
import json

import pytest

from mope_fast import MoPEConfig
from mope_fast.modules import config as config_module


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"num_experts": 0}, "num_experts", "0"),
        ({"num_experts": 1025}, "num_experts", "1025"),
        ({"prompt_length": 0}, "prompt_length", "0"),
        ({"cross_routing_dim": 0}, "cross_routing_dim", "0"),
        ({"inter_routing_dim": -1}, "inter_routing_dim", "-1"),
        ({"temperature": 0.0}, "temperature", "0.0"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"noise_std": -0.5}, "noise_std", "-0.5"),
        ({"noise_std": float("nan")}, "noise_std", "nan"),
        ({"top_k": 0}, "top_k", "0"),
        ({"num_experts": 4, "top_k": 5}, "top_k", "5"),
        ({"renormalize": True}, "renormalize", "True"),
        ({"dropout": 1.0}, "dropout", "1.0"),
        ({"dropout": -0.1}, "dropout", "-0.1"),
        ({"dynamic_dropout": 1.5}, "dynamic_dropout", "1.5"),
        ({"mapper_norm": "group"}, "mapper_norm", "'group'"),
        ({"expert_spread": 1.5}, "expert_spread", "1.5"),
        ({"head_inputs": "all"}, "head_inputs", "'all'"),
        ({"mixing": "fast"}, "mixing", "'fast'"),
        ({"mixing": "kv", "dynamic_dropout": 0.1}, "mixing", "'kv'"),
        ({"prompt_init": 0.0}, "prompt_init", "0.0"),
        ({"importance_weight": -1.0}, "importance_weight", "-1.0"),
        ({"importance_threshold": -0.1}, "importance_threshold", "-0.1"),
        ({"complementary_prompt_length": -4}, "complementary_prompt_length", "-4"),
        ({"cross_dim": 0}, "cross_dim", "0"),
    ],
)
def test_bad_setting_is_refused_with_its_name_and_value(settings, field, value):
    with pytest.raises(ValueError, match="MoPEConfig") as error:
        MoPEConfig(**settings)
    message = str(error.value)
    assert field in message
    assert value in message


def test_a_config_without_prompts_is_refused():
    with pytest.raises(ValueError, match="no prompt left: set use_static, use_dynamic or use_mapped"):
        MoPEConfig(use_static=False, use_dynamic=False, use_mapped=False)


def test_paper_and_released_code_name_every_setting_that_shapes_a_model():
    named = set(config_module._PAPERS) | {"mixing", "cross_dim"}
    assert named == {field.name for field in dataclasses.fields(MoPEConfig)}, "else it would follow the default"
    paper, released = MoPEConfig.paper(cross_dim=512), MoPEConfig.released(num_experts=8)
    assert (paper.num_experts, paper.temperature, paper.dynamic_dropout, paper.mapper_norm) == (16, 0.1, 0.1, "batch")
    assert paper.cross_dim == 512
    assert (released.num_experts, released.dynamic_dropout, released.mapper_norm) == (8, 0.0, "none")


def test_every_setting_has_a_meaning_and_a_source():
    lines = MoPEConfig.describe().splitlines()
    fields = dataclasses.fields(MoPEConfig)
    assert len(lines) == len(fields)
    for field, line in zip(fields, lines, strict=True):
        assert line.startswith(f"{field.name} = {field.default!r}: ")
        assert len(field.metadata["meaning"]) > 10
        assert field.metadata["source"]


def test_config_survives_json():
    config = MoPEConfig(num_experts=8, top_k=2, cross_dim=512, mixing="kv")
    assert MoPEConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_config_can_not_be_changed_behind_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoPEConfig().temperature = 0.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del MoPEConfig().temperature
    assert hash(MoPEConfig()) == hash(MoPEConfig())


def test_a_trainer_may_leave_notes_on_it_and_log_it():
    config = MoPEConfig(num_experts=3)
    config.use_cache = False
    assert config == MoPEConfig(num_experts=3)
    assert MoPEConfig(**json.loads(config.to_json_string())) == config
    assert dataclasses.replace(config, num_experts=4) == MoPEConfig(num_experts=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_experts", 2.5), ("top_k", True), ("temperature", "a"), ("use_static", "no"), ("cross_dim", 3.0), ("mixing", None)],
)
def test_a_wrong_type_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"MoPEConfig\.{name} must be .*, got {value!r}"):
        MoPEConfig(**{name: value})
