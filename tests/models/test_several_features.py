"""Several complementary features side by side: each has a mapped prompt of its own, the router sees them all."""

import dataclasses

import pytest
import torch
from tiny_fusion import SETTINGS, close, make_bert, make_text

from mope_fast import MoPEConfig, MoPEFusion, MultiAdapter, PromptBank, PromptedEncoder

SIDES = (7, 5)
CROSS = sum(SIDES)


def make_model(encoder=None, **settings):
    config = MoPEConfig(**{**SETTINGS, "side_dims": SIDES, **settings})
    return MoPEFusion(make_bert() if encoder is None else encoder, None, 3, config).double().eval()


def test_each_side_has_the_mapped_prompt_of_its_own_mapper():
    torch.manual_seed(0)
    config = MoPEConfig(num_experts=3, prompt_length=2, side_dims=SIDES)
    bank = PromptBank([16, 16, 8], CROSS, config).double().eval()
    cross = torch.randn(4, CROSS, dtype=torch.float64)
    context = bank.prepare(cross)
    for index, width in enumerate(bank.dims):
        out = bank.layer(index, torch.randn(4, width, dtype=torch.float64), context)
        expected = [mapper(part)[width] for mapper, part in zip(bank.mapper, cross.split(SIDES, dim=1), strict=True)]
        close(out.mapped, torch.stack(expected, dim=1), 1e-12)
        assert out.prompts.shape == (4, 2 + 2 + 2, width)


def test_one_side_is_what_it_was_without_the_setting():
    torch.manual_seed(0)
    one, plain = (PromptBank([16], 7, MoPEConfig(num_experts=3, side_dims=sides)).eval() for sides in ((7,), None))
    plain.load_state_dict({name.replace("mapper.0.", "mapper."): value for name, value in one.state_dict().items()})
    cross, x = torch.randn(4, 7), torch.randn(4, 16)
    close(one.layer(0, x, one.prepare(cross)).prompts, plain.layer(0, x, plain.prepare(cross)).prompts, 1e-6)


def test_a_model_trains_folds_and_saves(tmp_path):
    model, text, cross = make_model(), make_text(4), torch.randn(4, CROSS, dtype=torch.float64)
    model.train()(text, cross, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(mapper.down.weight.grad.abs().max() > 0 for mapper in model.bank.mapper)
    model.eval()
    close(model.fold()(text, cross).features, model(text, cross).features, 1e-9)
    model.save_pretrained(tmp_path)
    expected = model(text, cross).logits
    again = MoPEFusion.from_pretrained(tmp_path, model.unwrap()[0], None).double()
    assert again.config == model.config
    close(again(text, cross).logits, expected, 1e-5)


def test_adapters_with_other_numbers_of_sides_stand_beside_each_other():
    shared = PromptedEncoder(make_bert())
    two = make_model(shared)
    one = MoPEFusion(shared, None, 3, MoPEConfig(**{**SETTINGS, "cross_dim": 6})).double().eval()
    both, text = MultiAdapter({"two": two, "one": one}), make_text(4)
    crosses = {"two": torch.randn(4, CROSS, dtype=torch.float64), "one": torch.randn(4, 6, dtype=torch.float64)}
    got = both(text, ["two", "one", "one", "two"], crosses)
    expected = {name: model(text, crosses[name]).features for name, model in (("two", two), ("one", one))}
    for sample, name in enumerate(["two", "one", "one", "two"]):
        close(got.features[sample], expected[name][sample], 1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"side_dims": (0, 3)}, r"side_dims must be integers >= 1 or None, got \(0, 3\)"),
        ({"side_dims": 3}, "side_dims must be integers >= 1 or None, got 3"),
        ({"side_dims": (4, 3), "cross_dim": 8}, r"side_dims \(4, 3\) add up to 7, but cross_dim is 8"),
    ],
)
def test_widths_that_can_not_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoPEConfig(**settings)


def test_a_bank_of_another_width_is_refused():
    with pytest.raises(ValueError, match="add up to 12, but cross_dim is 9"):
        PromptBank([16], 9, dataclasses.replace(MoPEConfig(), side_dims=SIDES))
