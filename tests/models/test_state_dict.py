"""State dicts without frozen encoders, for programs that call ``state_dict`` and ``load_state_dict`` themselves."""

import copy
import pickle

import pytest
import torch
from tiny_baf import make_baf, make_vlmo
from tiny_fusion import CLASSES, make_bert, make_dinov2, make_fusion
from torch import nn

from mope_fast import PromptTuned


def make_model(seed=0, **settings):
    torch.manual_seed(1)
    encoders = make_bert(), make_dinov2()
    torch.manual_seed(seed)
    return make_fusion(*encoders, **settings)


def opted_in(seed=0):
    model = make_model(seed)
    model.leave_frozen_out_of_state_dict()
    return model


def nested(model):
    """As a LightningModule holds it, with a part of its own."""
    return nn.ModuleDict({"model": model, "metric": nn.Linear(2, 3)})


def equal(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_frozen_parts_are_left_out_on_request_only():
    model = make_model()
    whole = model.state_dict()
    model.leave_frozen_out_of_state_dict()
    state = model.state_dict()
    assert state.keys() == model.trained_state_dict().keys()
    assert state.keys() < whole.keys()
    assert not any(key.startswith(("main.", "complementary.main.")) for key in state)


@pytest.mark.parametrize("wrap", [lambda model: model, nested, lambda model: nested(torch.compile(model))])
def test_a_strict_load_does_without_them(wrap):
    first, second = wrap(opted_in(2)), wrap(opted_in(3))
    frozen = {name: p.clone() for name, p in second.named_parameters() if not p.requires_grad}
    second.load_state_dict(first.state_dict())
    equal(second.state_dict(), first.state_dict())
    equal({name: p for name, p in second.named_parameters() if not p.requires_grad}, frozen)


@pytest.mark.parametrize("wrap", [lambda model: model, nested])
def test_a_whole_state_dict_is_loaded_whole(wrap):
    torch.manual_seed(5)
    plain, model = make_fusion(), opted_in()
    wrap(model).load_state_dict({**wrap(model).state_dict(), **wrap(plain).state_dict()})
    equal(dict(model.named_parameters()), dict(plain.named_parameters()))


@pytest.mark.parametrize("wrap", [lambda model: model, nested])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, key: state.update({key("head.wieght"): torch.zeros(1)}), r"Unexpected key.*head\.wieght"),
        (lambda state, key: state.pop(key("head.bias")), r"Missing key.*head\.bias"),
        (lambda state, key: state.update({key("main.encoder.none"): torch.zeros(1)}), r"Unexpected key.*main\.encoder\.none"),
        (lambda state, key: state.update({key("head.bias"): torch.zeros(9)}), "size mismatch for .*head.bias"),
    ],
)
def test_other_differences_stay_errors(wrap, change, message):
    model = wrap(opted_in())
    state = model.state_dict()
    change(state, lambda name: name if wrap is not nested else f"model.{name}")
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_a_frozen_part_that_is_there_in_part_is_an_error():
    whole, model = make_model().state_dict(), opted_in()
    whole.pop("main.encoder.embeddings.word_embeddings.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*main\.encoder\.embeddings\.word_embeddings\.weight"):
        model.load_state_dict(whole)


def test_a_model_beside_it_that_did_not_ask_keeps_its_keys():
    both = nn.ModuleDict({"first": make_model(), "second": opted_in()})
    state = both.state_dict()
    assert {key.split(".")[1] for key in state if key.startswith("first")} == {"main", "complementary", "bank", "head"}
    for key in [key for key in state if key.startswith("first.main.")]:
        del state[key]
    with pytest.raises(RuntimeError, match=r"Missing key.*first\.main\.encoder"):
        both.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_it_for_themselves(copied):
    model = opted_in(2)
    twin = copied(model)
    with torch.no_grad():
        twin.head.bias.add_(1)
    assert twin.state_dict().keys() == model.trained_state_dict().keys()
    embeddings = twin.main.encoder.embeddings.word_embeddings.weight
    twin.load_state_dict(model.state_dict())
    equal(twin.state_dict(), model.state_dict())
    assert twin.main.encoder.embeddings.word_embeddings.weight is embeddings


def test_asking_twice_is_asking_once():
    model = opted_in()
    hooks = len(model._state_dict_hooks), len(model._load_state_dict_pre_hooks)
    model.leave_frozen_out_of_state_dict()
    assert (len(model._state_dict_hooks), len(model._load_state_dict_pre_hooks)) == hooks


def test_saves_are_the_same_either_way(tmp_path):
    for model, path in ((make_model(2), tmp_path / "plain"), (opted_in(2), tmp_path / "opted")):
        model.save_pretrained(path)
    assert {file.name for file in (tmp_path / "plain").iterdir()} == {file.name for file in (tmp_path / "opted").iterdir()}
    model = opted_in(3)
    model.load_pretrained(tmp_path / "plain")
    equal(model.state_dict(), make_model(2).trained_state_dict())


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        (lambda: PromptTuned(make_bert(), 2, CLASSES), "main."),
        (lambda: make_fusion("bert", nn.Linear(6, 20).double(), cross_dim=20), ("main.", "complementary.")),
        (lambda: make_baf(freeze_backbone=True), "backbone."),
        (lambda: make_baf(make_vlmo()), ()),
    ],
)
def test_what_is_trained_stays_in(model, left_out):
    model = model()
    whole = model.state_dict()
    model.leave_frozen_out_of_state_dict()
    assert list(model.state_dict()) == [key for key in whole if not key.startswith(left_out)]
    model.load_state_dict(model.state_dict())
