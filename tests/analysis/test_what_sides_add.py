"""What a side adds is measured by taking it away."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from mope_fast import MoPEConfig, MoPEFusion, Side, analysis


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(**sizes, vocab_size=20, max_position_embeddings=8))


def make_model(bert, complementary, **settings):
    torch.manual_seed(1)
    model = MoPEFusion(bert, complementary, 2, MoPEConfig(num_experts=3, prompt_length=2, **settings)).double().eval()
    model.head.weight.data.zero_()
    model.head.bias.data.zero_()
    return model


def make_batches(name):
    """The class is the sign of the side's first number."""
    torch.manual_seed(2)
    x, other = torch.randn(24, 4, dtype=torch.float64), torch.randn(24, 3, dtype=torch.float64)
    text, labels = torch.randint(1, 20, (24, 5)), (x[:, 0] > 0).long()
    inputs = {"tells": x, "noise": other} if name is None else x
    sliced = [slice(i, i + 7) for i in range(0, 24, 7)]
    return [
        {
            "input_ids": text[rows],
            "complementary_inputs": {k: v[rows] for k, v in inputs.items()} if name is None else inputs[rows],
            "labels": labels[rows],
        }
        for rows in sliced
    ]


def test_the_side_that_tells_is_found(bert):
    model = make_model(bert, {"tells": Side(width=4, optional=True), "noise": Side(width=3)})
    model.head.weight.data[:, 16] = torch.tensor([-5.0, 5.0])  # what the head reads of the side's first number
    batches = make_batches(None)
    found = analysis.what_sides_add(model, batches, progress=False)
    whole, tells, noise, nobody = found.rows
    assert [row.without for row in found.rows] == ["nothing", "tells", "noise", "all of them"]
    assert [row.replaced_by for row in found.rows] == ["", "stand-in", "mean", "mean and stand-in"]
    assert whole.metrics["accuracy"] == 1
    assert (whole.changed, whole.routing) == (0, 0)
    assert tells.metrics["accuracy"] < 0.8  # the stand-in is zero: a tie
    assert tells.changed > 0.2
    assert noise.metrics["accuracy"] == 1
    assert noise.changed == 0
    assert 0 < noise.routing < 1
    assert nobody.metrics["accuracy"] == tells.metrics["accuracy"]
    # by hand
    outputs = [model(b["input_ids"], {**b["complementary_inputs"], "tells": None}, b["labels"]) for b in batches]
    expected = torch.cat([output.task_loss.expand(len(output.logits)) for output in outputs]).mean()
    assert tells.metrics["loss"] == pytest.approx(expected.item(), abs=1e-12)
    scores = torch.cat([output.scores for output in outputs], 1) - torch.cat([model(**b).scores for b in batches], 1)
    assert tells.routing == pytest.approx(scores.abs().sum(-1).mean().item() / 2, abs=1e-12)
    table = str(found).splitlines()
    assert len(table) == 5
    assert table[2].split()[:2] == ["tells", "stand-in"]


def test_a_model_of_one_side_has_its_mean(bert):
    model = make_model(bert, nn.Identity(), cross_dim=4)
    model.head.weight.data[:, 16] = torch.tensor([-5.0, 5.0])
    batches = make_batches("tells")
    whole, without = analysis.what_sides_add(model, batches, progress=False).rows
    mean = torch.cat([b["complementary_inputs"] for b in batches]).mean(0, keepdim=True)
    logits = torch.cat([model(b["input_ids"], mean.expand(len(b["labels"]), -1)).logits for b in batches])
    labels = torch.cat([b["labels"] for b in batches])
    assert without.replaced_by == "mean"
    assert without.metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), abs=1e-12)
    assert whole.metrics["loss"] < without.metrics["loss"]
    assert not model.training


def test_what_can_not_be_measured_is_refused(bert):
    model = make_model(bert, {"tells": Side(width=4), "noise": Side(width=3)})
    batches = make_batches(None)
    with pytest.raises(TypeError, match="what_sides_add takes a MoPEFusion"):
        analysis.what_sides_add(bert, batches)
    with pytest.raises(ValueError, match="a batch has no labels"):
        analysis.what_sides_add(model, [{**batches[0], "labels": None}], progress=False)
    with pytest.raises(ValueError, match="all labels are -100, so no sample counts"):
        analysis.what_sides_add(model, [{**b, "labels": torch.full_like(b["labels"], -100)} for b in batches], progress=False)
    with pytest.raises(ValueError, match="batches is empty"):
        analysis.what_sides_add(model, [], progress=False)
    with pytest.raises(ValueError, match="batches is empty"):
        analysis.what_sides_add(model, iter(batches), progress=False)
    model.unwrap()
    with pytest.raises(ValueError, match="needs a model with a head"):
        analysis.what_sides_add(MoPEFusion(bert, None, config=MoPEConfig(cross_dim=3)), batches)
