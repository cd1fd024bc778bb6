"""Flags, numbers and names that Python would take for others: refused where they come in, with what was got."""

import inspect
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mope_fast import BAFConfig, MoPEConfig, MoPELayer, PromptAttention, PromptBank, PromptTuned, VLMoConfig, analysis, functional
from mope_fast.data import FewShotRecipe, Post, Posts
from mope_fast.modules.block_fusion import BlockAwareFusion, PromptFusion
from mope_fast.modules.mapper import PromptMapper

NAN, INF = float("nan"), float("inf")
LENGTHS = {"text_prompt_length": 2, "image_prompt_length": 2, "unified_prompt_length": 2}


def route(**settings):
    return functional.route_and_mix(torch.zeros(2, 3), torch.zeros(3, 1, 4), **settings)


def attend(**settings):
    q = torch.zeros(1, 1, 2, 8)
    return functional.prompt_attention(q, q, q, **settings)


def attend_in_windows(**settings):
    arguments = {"window_size": 2, "shift_size": 0, **settings}
    return functional.window_prompt_attention(torch.zeros(1, 2, 2, 3, 1, 8), (), torch.zeros(1, 4, 4), **arguments)


def importance(**settings):
    return functional.importance_loss(torch.ones(2, 3), **settings)


GRAM = torch.eye(3)[None]
VERBALIZER = {**LENGTHS, "head": "verbalizer", "mask_token_id": 103}
WRONG: list[tuple[Callable, dict, type[Exception], str]] = [
    (route, {"renormalize": "no", "top_k": 2}, TypeError, "renormalize must be True or False, got 'no'"),
    (route, {"renormalize": 0}, TypeError, "renormalize must be True or False, got 0"),
    (route, {"top_k": True}, ValueError, "top_k must be 1 to the number of experts 3, or None for all; got True"),
    (route, {"top_k": np.int64(2)}, ValueError, r"top_k must be 1 to the number of experts 3, .*; got np.int64\(2\)"),
    (route, {"temperature": True}, TypeError, "temperature must be a Python float, got True"),
    (route, {"temperature": np.float32(1)}, TypeError, "temperature must be a Python float, got np.float32"),
    (route, {"temperature": INF}, ValueError, "temperature must be > 1e-30 and finite in float32, got inf"),
    (route, {"temperature": NAN}, ValueError, "temperature must be > 1e-30 and finite in float32, got nan"),
    (route, {"gram": GRAM, "eps": INF}, ValueError, "eps must be >= 1e-25 and finite in float32, got inf"),
    (route, {"gram": GRAM, "eps": NAN}, ValueError, "eps must be >= 1e-25 and finite in float32, got nan"),
    (route, {"gram": GRAM, "eps": True}, TypeError, "eps must be a Python float, got True"),
    (route, {"gram": GRAM, "eps": "1e-5"}, TypeError, "eps must be a Python float, got '1e-5'"),
    (route, {"gram": GRAM, "eps": 1e-50}, ValueError, "eps must be >= 1e-25 and finite in float32, got 1e-50"),
    (route, {"gram": GRAM, "eps": 10**400}, ValueError, "eps must be >= 1e-25 and finite in float32, got 1000"),
    (importance, {"threshold": INF}, ValueError, "threshold must be >= 0 and finite in float32, got inf"),
    (importance, {"threshold": NAN}, ValueError, "threshold must be >= 0 and finite in float32, got nan"),
    (importance, {"threshold": "0.1"}, TypeError, "threshold must be a Python float, got '0.1'"),
    (importance, {"threshold": torch.tensor(0.1)}, TypeError, "threshold must be a Python float, got a tensor"),
    (attend, {"is_causal": "False"}, TypeError, "is_causal must be True or False, got 'False'"),
    (attend, {"is_causal": np.bool_(False)}, TypeError, "is_causal must be True or False, got np.False_"),
    (attend, {"scale": True}, TypeError, "scale must be a Python float, got True"),
    (attend, {"scale": 1e39}, ValueError, "scale must be finite in float32, got 1e"),
    (attend, {"scale": -(10**400)}, ValueError, "scale must be finite in float32, got -1000"),
    (attend_in_windows, {"scale": 1e39}, ValueError, "scale must be finite in float32, got 1e"),
    (attend_in_windows, {"scale": True}, TypeError, "scale must be a Python float, got True"),
    (attend_in_windows, {"window_size": True}, TypeError, "window_size must be an integer"),
    (MoPEConfig, {"num_experts": True}, TypeError, "MoPEConfig.num_experts must be int, got True"),
    (MoPEConfig, {"num_experts": np.int64(4)}, TypeError, r"num_experts must be int, got np.int64\(4\): call .item\(\) on it"),
    (MoPEConfig, {"temperature": np.float32(1)}, TypeError, "temperature must be float, got np.float32"),
    (MoPEConfig, {"use_static": 1}, TypeError, "MoPEConfig.use_static must be bool, got 1"),
    (MoPEConfig, {"prompt_init": INF}, ValueError, "MoPEConfig.prompt_init must be finite in float32, got inf"),
    (MoPEConfig, {"temperature": INF}, ValueError, "MoPEConfig.temperature must be finite in float32, got inf"),
    (MoPEConfig, {"temperature": 1e-40}, ValueError, "MoPEConfig.temperature must be > 0, got 1e-40"),
    (MoPEConfig, {"noise_std": 1e39}, ValueError, "MoPEConfig.noise_std must be finite in float32, got 1e"),
    (MoPEConfig, {"temperature": 10**400}, ValueError, "MoPEConfig.temperature must be finite in float32, got 1000"),
    (MoPEConfig, {"importance_weight": INF}, ValueError, "MoPEConfig.importance_weight must be finite in float32, got inf"),
    (MoPELayer, {"dim": True, "cross_dim": 4}, TypeError, "MoPELayer: dim must be int, got True"),
    (MoPELayer, {"dim": 4, "cross_dim": 4, "learn_keys": "no"}, TypeError, "learn_keys must be bool, got 'no'"),
    (PromptBank, {"dims": [True], "cross_dim": 4}, ValueError, r"integers >= 1; got \(True,\)"),
    (PromptBank, {"dims": [4], "cross_dim": True}, TypeError, "PromptBank: cross_dim must be int | None, got True"),
    (PromptMapper, {"cross_dim": 4.0, "widths": [4]}, TypeError, "PromptMapper: cross_dim must be int, got 4.0"),
    (PromptAttention, {"dim": 8, "num_heads": True}, TypeError, "PromptAttention: num_heads must be int, got True"),
    (PromptAttention, {"dim": 8, "qkv_bias": "no"}, TypeError, "PromptAttention: qkv_bias must be bool, got 'no'"),
    (PromptAttention, {"dim": 8, "attn_drop": NAN}, ValueError, "PromptAttention: attn_drop must be finite in float32, got nan"),
    (PromptFusion, {"width": 8, "num_heads": 2, "feed_forward": "no"}, TypeError, "feed_forward must be bool, got 'no'"),
    (BlockAwareFusion, {"width": 8, "num_heads": 2, "share_directions": 0}, TypeError, "share_directions must be bool, got 0"),
    (PromptTuned, {"encoder": None, "prompt_length": True}, ValueError, "prompt_length must be an integer >= 0, got True"),
    (PromptTuned, {"encoder": None, "prompt_length": 2, "dropout": NAN}, ValueError, "dropout must be finite in float32, got nan"),
    (BAFConfig, {**LENGTHS, "prompt_init_std": INF}, ValueError, "BAFConfig.prompt_init_std must be finite in float32, got inf"),
    (BAFConfig, {**LENGTHS, "restricted": "no"}, TypeError, "BAFConfig.restricted must be bool, got 'no'"),
    (BAFConfig, {**VERBALIZER, "verbalizer": [[5, 6], [6, 5]]}, ValueError, "the same words in two classes"),
    (BAFConfig, {**VERBALIZER, "verbalizer": [[5, 5], [6]]}, ValueError, "a word twice in one class"),
    (VLMoConfig, {"layer_scale": NAN}, ValueError, "VLMoConfig.layer_scale must be finite in float32, got nan"),
    (VLMoConfig, {"mlm_head": "no"}, TypeError, "VLMoConfig.mlm_head must be bool, got 'no'"),
    (FewShotRecipe, {"eps": INF}, ValueError, "FewShotRecipe.eps must be finite in float32, got inf"),
    (analysis.Thresholds, {"dead": True}, TypeError, "Thresholds.dead must be float, got True"),
    (analysis.Recorder, {"class_names": ["a", "b", "a"]}, ValueError, r"class_names must differ .*, got \['a', 'b', 'a'\]"),
    (Posts, {"posts": (), "class_names": "ab"}, TypeError, "class_names must be a list of names, got 'ab'"),
    (Posts, {"posts": (), "class_names": ("a", "a")}, ValueError, r"class_names must differ .*, got \['a', 'a'\]"),
    (Posts, {"posts": (Post("1", "", None, True),), "class_names": ("a", "b")}, ValueError, "post 1 has label True"),
]


@pytest.mark.parametrize(("call", "settings", "error", "message"), WRONG)
def test_it_is_refused_with_what_was_got(call, settings, error, message):
    with pytest.raises(error, match=message):
        call(**settings)


def test_python_numbers_of_either_kind_and_numpys_own_floats_are_taken():
    route(temperature=1, gram=GRAM, eps=np.float64(1e-5))
    attend(scale=1)
    importance(threshold=0)
    assert MoPEConfig(temperature=1, dropout=np.float64(0.1)).dropout == 0.1
    assert PromptAttention(8, 2, attn_drop=0).num_heads == 2


def test_a_checked_constructor_shows_its_own_signature():
    assert [*inspect.signature(PromptAttention).parameters][:2] == ["dim", "num_heads"]
    with pytest.raises(TypeError, match=r"PromptAttention.__init__\(\) missing 1 required positional argument: 'dim'"):
        PromptAttention()
