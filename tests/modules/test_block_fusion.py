"""Fusion of two prompts at a boundary, each form written out anew."""

import pytest
import torch
from literal_baf import cross_attention, fuse, norm
from tiny_baf import all_close, close, gradients, randomize

from mope_fast.modules import BlockAwareFusion
from mope_fast.modules.block_fusion import PromptFusion

WIDTH = 12


def prompts(text=3, image=3, batch=2):
    return [torch.randn(batch, rows, WIDTH, dtype=torch.float64, requires_grad=True) for rows in (text, image)]


def make(form="A", heads=3, **settings):
    return randomize(BlockAwareFusion(WIDTH, heads, form, **settings), 0.3).double()


@pytest.mark.parametrize("form", "ABCDFG")
@pytest.mark.parametrize("share", [False, True])
def test_every_form_equals_its_equation(form, share):
    module, (text, image), own = make(form, share_directions=share), prompts(), prompts()
    for given, new in (((), (text, image)), (own, own)):
        got, expected = torch.cat(module(text, image, *given), 1), torch.cat(fuse(module, form, text, image, *new), 1)
        close(got, expected)
        leaves = {"text": text, "image": image, "own_text": own[0], "own_image": own[1], **dict(module.named_parameters())}
        upstream = torch.randn_like(got)
        all_close(gradients(got, leaves, upstream), gradients(expected, leaves, upstream))


@pytest.mark.parametrize("form", "ABDFG")
def test_prompts_of_different_lengths_keep_them(form):
    module, (text, image) = make(form), prompts(2, 5)
    out = module(text, image)
    assert [rows.shape[1] for rows in out] == [2, 5]
    close(torch.cat(out, 1), torch.cat(fuse(module, form, text, image, text, image), 1))


def test_each_direction_reads_the_states_in_front_of_the_boundary():
    module, (text, image) = make(), prompts()
    to_text, to_image = module.to_text, module.to_image
    new_text, new_image = module(text, image)
    read = norm(to_image.norm_query, image), norm(to_image.norm_context, text)
    close(new_image, image + cross_attention(to_image.attention, *read))
    late = norm(to_image.norm_query, image), norm(to_image.norm_context, new_text)
    assert not torch.allclose(new_image, image + cross_attention(to_image.attention, *late), atol=1e-3)
    assert to_text is not to_image


def test_shared_directions_are_one_set_of_weights():
    shared, separate = (BlockAwareFusion(WIDTH, 3, share_directions=share) for share in (True, False))
    assert shared.to_text is shared.to_image
    assert 2 * sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in separate.parameters())


def test_the_plain_form_has_no_parameters():
    assert not list(BlockAwareFusion(WIDTH, 3, "F").parameters())


def test_a_float32_module_takes_bfloat16_prompts():
    module = make().float()
    text, image = (rows.detach().bfloat16() for rows in prompts())
    out = module(text, image)
    assert [rows.dtype for rows in out] == [torch.bfloat16] * 2
    expected = torch.cat(module(text.float(), image.float()), 1)
    assert torch.equal(torch.cat(out, 1), expected.bfloat16())


@pytest.mark.parametrize("form", "ABCDFG")
def test_an_empty_batch(form):
    assert [rows.shape for rows in make(form)(*prompts(batch=0))] == [(0, 3, WIDTH)] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WIDTH, 3, "E"), r"form must be one of \['A', 'B', 'C', 'D', 'F', 'G'\], got 'E'"),
        ((WIDTH, 3, "H"), "got 'H'"),
        ((WIDTH, 5), "the width 12 must be a multiple of num_heads=5"),
        ((WIDTH, 0), "the width 12 must be a multiple of num_heads=0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockAwareFusion(*arguments)


def test_a_single_direction_checks_its_heads_too():
    with pytest.raises(ValueError, match="the width 12 must be a multiple of num_heads=5"):
        PromptFusion(WIDTH, 5)


def test_form_c_refuses_prompts_of_two_lengths_instead_of_repeating_one():
    with pytest.raises(ValueError, match="form 'C' takes prompts of one length, got 1 and 3 rows"):
        make("C")(*prompts(1, 3))


def test_it_prints_its_form():
    assert "form='D': each prompt queries both prompts together" in repr(make("D"))
