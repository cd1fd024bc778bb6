"""What transformers' masks and attention ask for beyond prompts: windows are taken, the rest is refused by name."""

import functools

import pytest
import torch
from tiny_mechanisms import MECHANISMS
from torch import nn
from transformers.masking_utils import chunked_causal_mask_function

from mope_fast import PromptTuned
from mope_fast.encoders import transformers_attention as adapters
from mope_fast.functional import prompt_attention


def test_sequences_packed_into_one_are_refused():
    make, example = MECHANISMS["gemma3: norms with an offset"]
    model, ids = PromptTuned(make(), 3), example()
    # a family that fills in a mask of ones doesn't come here
    jumping = {"input_ids": ids, "position_ids": torch.tensor([[*range(6), *range(ids.shape[1] - 6)]]), "use_cache": False}
    with pytest.raises(ValueError, match="several sequences packed into one"):
        model(jumping)


def test_masks_of_other_kinds_are_refused():
    chunks = chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="a layer of this encoder has a mask by chunked_overlay, which attention with prompts"):
        adapters._mask(mask_function=chunks, q_length=5, kv_length=5)
    with pytest.raises(ValueError, match="has a mask by partial"):
        adapters._mask(mask_function=functools.partial(chunks, 0), q_length=5, kv_length=5)


def test_a_mask_with_a_window_says_all_whatever_the_module_says():
    module = nn.Identity()
    module.is_causal = True
    q = torch.randn(2, 4, 5, 8)
    got, _ = adapters._attention(module, q, q, q, adapters._Mask(None, (1, 1)), sliding_window=2)
    torch.testing.assert_close(got, prompt_attention(q, q, q, window=(1, 1)).transpose(1, 2))


def test_without_a_mask_the_module_says_whether_it_is_causal():
    module = nn.Identity()
    module.is_causal = True
    q = torch.randn(2, 4, 5, 8)
    got, _ = adapters._attention(module, q, q, q, None)
    torch.testing.assert_close(got, prompt_attention(q, q, q, is_causal=True).transpose(1, 2))


def test_an_attention_that_asks_for_a_window_which_its_mask_lacks_is_refused():
    q = torch.randn(2, 4, 5, 8)
    with pytest.raises(ValueError, match="Identity attends within a window of 3 tokens, but the mask it was given has none"):
        adapters._attention(nn.Identity(), q, q, q, None, sliding_window=3)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "rel_pos", "bias"])
def test_what_else_changes_attention_is_refused(name):
    q = torch.randn(2, 4, 5, 8)
    assert adapters._attention(nn.Identity(), q, q, q, None, **{name: None})[0].shape == (2, 5, 4, 8)
    with pytest.raises(ValueError, match=f"Identity passes {name}, "):
        adapters._attention(nn.Identity(), q, q, q, None, **{name: 3.0})
