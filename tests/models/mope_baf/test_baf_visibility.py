"""Which group sees which: cell by cell from gradients of single layers, and what that means for one, two and three layers."""

import pytest
import torch
from literal_baf import CASES, CHAIN, NAMES, ORDER
from tiny_baf import make_baf, make_inputs, make_vlmo

ROWS = {"u": 2, "l": 3, "t": 9, "i": 10, "v": 2}


def seen(model, layer, groups):
    """The table of one layer, as its gradients have it: {letter: letters that it sees}."""
    block, kept = model.backbone.transformer.blocks[layer], {}

    def cut(module, args):
        kept["x"] = args[0].detach().requires_grad_()
        return kept["x"], *args[1:]

    hooks = block.register_forward_pre_hook(cut), block.register_forward_hook(lambda *args: kept.update(out=args[2]))
    inputs = make_inputs(1)
    model(**{**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    for hook in hooks:
        hook.remove()
    starts = dict(zip(groups, torch.tensor([0, *(ROWS[letter] for letter in groups)]).cumsum(0).tolist(), strict=False))
    assert kept["x"].shape[1] == sum(ROWS[letter] for letter in groups)
    table = {}
    for query in groups:
        upstream = torch.zeros_like(kept["out"])
        upstream[:, starts[query]] = torch.rand_like(upstream[:, 0]) + 0.5
        (reached,) = torch.autograd.grad(kept["out"], kept["x"], upstream, retain_graph=True)
        reached = (reached[0] != 0).any(-1)
        # a row reaches itself in any case, past attention
        rows = {key: [i for i in range(starts[key], starts[key] + ROWS[key]) if i != starts[query]] for key in groups}
        assert all(reached[rows[key]].all() == reached[rows[key]].any() for key in groups)
        table[query] = "".join(key for key in groups if reached[rows[key]].all())
    return table


@pytest.mark.parametrize("case", CASES)
def test_every_cell_of_every_layer(case):
    settings, tables = CASES[case]
    model = make_baf(**{"num_blocks": 1, **settings})
    for layer, table in enumerate(tables):
        groups = [letter for letter in ORDER if letter in table]
        expected = {letter: "".join(other for other in ORDER if other in table[letter]) for letter in groups}
        assert seen(model, layer, groups) == expected, f"layer {layer}"


def outputs(model):
    return model.hidden_states(**make_inputs())


def changed(model, prompt):
    """Groups with a different output if this prompt is another."""
    before = outputs(model)
    with torch.no_grad():
        getattr(model, prompt).add_(1.0)
    after = outputs(model)
    return {name for name in before if not torch.equal(before[name], after[name])}


def with_layers(count, **settings):
    vlmo = make_vlmo(num_layers=count, first_fusion_layer=count)
    return make_baf(vlmo, None, unified_prompt_length=0, num_blocks=1, **settings)


@pytest.mark.parametrize(
    ("layers", "prompt", "reached"),
    [
        (1, "text_prompt", "lt"),
        (1, "image_prompt", "iv"),
        (2, "text_prompt", "lti"),
        (2, "image_prompt", "tiv"),
        (3, "text_prompt", "ltiv"),
        (3, "image_prompt", "ltiv"),
    ],
)
def test_a_prompt_reaches_one_group_further_with_each_layer(layers, prompt, reached):
    names = {NAMES[letter] for letter in reached}
    assert changed(with_layers(layers), prompt) == names


@pytest.mark.parametrize(("prompt", "other"), [("text_prompt", "image_prompt"), ("image_prompt", "text_prompt")])
def test_fusion_carries_a_prompt_to_the_other_within_two_layers(prompt, other):
    vlmo = make_vlmo(num_layers=2, first_fusion_layer=2)
    assert other not in changed(make_baf(vlmo, None, unified_prompt_length=0, num_blocks=1), prompt)
    assert other in changed(make_baf(vlmo, None, unified_prompt_length=0, num_blocks=2), prompt)


def test_no_gradient_of_one_layer_reaches_what_the_prompt_may_not_touch():
    model = with_layers(1)
    for prompt, letters in (("text_prompt", "lt"), ("image_prompt", "iv")):
        for letter in CHAIN:
            rows = outputs(model)[NAMES[letter]]
            (grad,) = torch.autograd.grad(rows, getattr(model, prompt), torch.randn_like(rows), materialize_grads=True)
            assert bool(grad.any()) == (letter in letters)


def test_padding_is_seen_by_nobody():
    model, inputs = make_baf(), make_inputs()
    padded = inputs["attention_mask"] == 0
    assert padded[0, 3:5].all()
    other = {**inputs, "input_ids": torch.where(padded, (inputs["input_ids"] + 17) % 50, inputs["input_ids"])}
    one, two = model.hidden_states(**inputs), model.hidden_states(**other)
    for name in one:
        rows = ~padded if name == "text" else ...
        assert torch.equal(one[name][rows], two[name][rows])
    assert not torch.equal(one["text"][padded], two["text"][padded])
    unmasked = {**inputs, "attention_mask": None}
    assert not torch.allclose(model(**unmasked).logits, model(**inputs).logits, atol=1e-4)


def test_all_text_padded_leaves_a_finite_result():
    model, inputs = make_baf(modalities_see_each_other=False, prompts_see_themselves=False), make_inputs()
    inputs["attention_mask"][1] = 0
    output = model(**inputs, labels=torch.zeros(4, dtype=torch.long))
    grads = torch.autograd.grad(output.loss, list(model.parameters()), materialize_grads=True)
    assert output.logits.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_the_table_of_a_layer_can_be_looked_at():
    model = make_baf(fusion_form="E", num_blocks=2)
    alone, together = model.receptive_field(0), model.receptive_field(2)
    assert dict(zip(alone.groups, alone.visible, strict=True))["image_prompt"] == ("image", "image_prompt")
    assert dict(zip(together.groups, together.visible, strict=True))["image_prompt"] == ("text_prompt", "image", "image_prompt")
    assert alone.lengths == (ROWS["l"], ROWS["t"], ROWS["i"], ROWS["v"])
    assert model.receptive_field(3) is None
    for layer in (-1, 5):
        with pytest.raises(IndexError, match=f"layer must be 0 to 4, got {layer}"):
            model.receptive_field(layer)
