import copy
import subprocess
import sys

import pytest
import torch
from tiny_fusion import INPUTS, MAKE, close, make_bert, make_dinov2, make_fusion, make_images, make_text

FAMILIES = list(MAKE)


def run_alone(encoder, family):
    torch.manual_seed(99)
    inputs = INPUTS[family](4)
    return encoder(**inputs if isinstance(inputs, dict) else {"pixel_values": inputs}).last_hidden_state


def public_state(encoder):
    """Everything that wrapping could leave behind."""
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in encoder.modules())
    attributes = {name: set(vars(module)) for name, module in encoder.named_modules()}
    implementations = {name: m.config._attn_implementation for name, m in encoder.named_modules() if hasattr(m, "config")}
    return hooks, attributes, implementations


def fuse(encoder, family):
    other = next(name for name in FAMILIES if name != family)
    return make_fusion(encoder, other), lambda: (INPUTS[family](4), INPUTS[other](4))


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapped_encoder_called_alone_gives_what_it_gave_before(family):
    torch.manual_seed(0)
    encoder = MAKE[family]().eval()
    before = run_alone(encoder, family)
    model, inputs = fuse(encoder, family)
    close(run_alone(encoder, family), before)
    model(*inputs())
    close(run_alone(encoder, family), before)


def test_a_forward_that_fails_leaves_no_prompts_behind():
    torch.manual_seed(1)
    encoder = make_bert().eval()
    before = run_alone(encoder, "bert")
    model = make_fusion(encoder, "dinov2")
    model.main.layers[1].attention.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(make_text(4), make_images(4))
    model.main.layers[1].attention._forward_hooks.clear()
    close(run_alone(encoder, "bert"), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unwrap_restores_the_encoder(family, implementation):
    torch.manual_seed(2)
    encoder = MAKE[family]().eval()
    encoder.set_attn_implementation(implementation)
    before, state = run_alone(encoder, family), public_state(encoder)
    model, _ = fuse(encoder, family)
    assert public_state(encoder) != state
    assert model.unwrap()[0] is encoder
    assert public_state(encoder) == state
    assert torch.equal(run_alone(encoder, family), before)


def test_unwrap_gives_the_complementary_side_back_too():
    encoder, black = make_dinov2(), torch.nn.Linear(6, 20)
    state = public_state(encoder)
    assert make_fusion("bert", encoder).unwrap()[1] is encoder
    assert public_state(encoder) == state
    assert make_fusion("bert", black, cross_dim=20).unwrap()[1] is black


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unwrapped_encoder_can_be_wrapped_again(family):
    torch.manual_seed(3)
    encoder = MAKE[family]()
    first, inputs = fuse(encoder, family)
    inputs = inputs()
    before, state = first(*inputs).logits, first.trained_state_dict()
    _, other = first.unwrap()
    second = make_fusion(encoder, other)
    second.load_state_dict(state, strict=False)
    assert torch.equal(second(*inputs).logits, before)


@pytest.mark.parametrize("place", ["main", "complementary"])
def test_wrapping_an_encoder_twice_is_refused(place):
    encoder = make_bert()
    model = make_fusion(encoder, "dinov2")
    with pytest.raises(ValueError, match=r"this BertModel already takes prompts from another model"):
        make_fusion(**{"main": "dinov2", "complementary": "dinov2", place: encoder})
    model(make_text(3), make_images(3))


def test_one_encoder_can_not_be_both_sides():
    encoder = make_bert()
    with pytest.raises(ValueError, match="already takes prompts"):
        make_fusion(encoder, encoder)


@pytest.mark.parametrize("busy", ["complementary", "same"])
def test_a_refused_fusion_leaves_the_main_encoder_as_it_was(busy):
    main = make_bert()
    state = public_state(main)
    other = make_dinov2()
    holds = make_fusion("bert", other) if busy == "complementary" else None
    with pytest.raises(ValueError, match="already takes prompts"):
        make_fusion(main, main if busy == "same" else other)
    assert public_state(main) == state
    del holds


def test_a_deep_copy_fuses_like_the_original():
    torch.manual_seed(4)
    model, inputs = make_fusion(), (make_text(6), make_images(6))
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="already takes prompts"):  # from the copy
        make_fusion(twin.main.encoder, None, cross_dim=20)
    before = model(*inputs).logits
    assert torch.equal(twin(*inputs).logits, before)
    with torch.no_grad():
        twin.bank.stacks["32"].static_prompt.add_(1)
    assert not torch.allclose(twin(*inputs).logits, before)
    assert torch.equal(model(*inputs).logits, before)
    twin.unwrap()
    assert torch.equal(model(*inputs).logits, before)


def test_encoders_of_two_models_do_not_meet():
    torch.manual_seed(5)
    first, second = make_fusion(), make_fusion()
    inputs = make_text(6), make_images(6)
    before = first(*inputs).logits
    second(*inputs)
    assert torch.equal(first(*inputs).logits, before)
    second.unwrap()
    assert torch.equal(first(*inputs).logits, before)


def test_the_users_encoder_object_is_used_not_copied():
    encoder = make_bert()
    assert make_fusion(encoder, "dinov2").main.encoder is encoder


def test_unwrap_gives_training_mode_and_gradients_back():
    bert = make_bert().train()
    bert.pooler.requires_grad_(False)
    bert.encoder.layer[0].eval()
    flags, modes = [p.requires_grad for p in bert.parameters()], [module.training for module in bert.modules()]
    make_fusion(bert).unwrap()
    assert [module.training for module in bert.modules()] == modes
    assert [p.requires_grad for p in bert.parameters()] == flags


def test_an_attention_that_ignores_prompts_is_noticed():
    model = make_fusion()
    model.main.encoder.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="prompts did not reach layer 0 of BertModel"):
        model(make_text(3), make_images(3))


@pytest.mark.parametrize(("main", "complementary"), [("bert", "dinov2"), pytest.param("dinov2", "bert", marks=pytest.mark.slow)])
def test_a_pickled_model_works_in_another_process(main, complementary, tmp_path):
    model = make_fusion(main, complementary)
    inputs = INPUTS[main](3), INPUTS[complementary](3)
    torch.save({"model": model, "inputs": inputs, "logits": model(*inputs).logits}, tmp_path / "model.pt")
    script = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
assert torch.equal(saved["model"](*saved["inputs"]).logits, saved["logits"])
"""
    process = subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
