"""A BERT whose feature is the mean over its tokens, which MiniLM and its like were trained for, in place of the class token."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import BertModel

from mope_fast import register_encoder
from mope_fast.encoders import find_family, masked_mean


class MeanPooledBert(BertModel):
    """A class of its own, since a family is found by the class."""


def _feature(encoder: BertModel, output: Any, inputs: dict[str, Any]) -> Tensor:
    return masked_mean(inputs.get("attention_mask"))(output.last_hidden_state)


# only the class of what is looked up counts, so this one holds no weights
_BERT = find_family(MeanPooledBert.__new__(MeanPooledBert))
register_encoder(replace(_BERT, name="mean_pooled_bert", models=(f"{__name__}.MeanPooledBert",), feature=_feature))
