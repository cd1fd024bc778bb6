"""LoRA by peft, put in before prompts or after them."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_fusion import DETERMINISTIC, close, make_bert, make_fusion, make_text, trained

from mope_fast import MoPEFusion

LORA = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False}
LABELS = torch.tensor([0, 4, 2])


def make_model(bert=None):
    torch.manual_seed(0)
    return make_fusion(make_bert() if bert is None else bert, None, cross_dim=6, mapper_norm="layer", **DETERMINISTIC)


def make_inputs():
    torch.manual_seed(1)
    return make_text(3), torch.randn(3, 6, dtype=torch.float64)


def step(model, inputs):
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    model.train()(*inputs, LABELS).loss.backward()
    optimizer.step()
    return model.eval()


def test_lora_around_a_fused_model_is_trained_with_its_prompts_and_merged_saved_loaded_disabled(tmp_path):
    inputs = make_inputs()
    plain = make_model()(*inputs).logits
    model = get_peft_model(make_model(), LoraConfig(modules_to_save=["bank", "head"], **LORA))
    names = " ".join(trained(model))
    assert all(part in names for part in ("lora_A", "bank.modules_to_save", "head.modules_to_save"))
    before = copy.deepcopy(model)
    expected = step(model, inputs)(*inputs).logits
    assert all((parameter - dict(before.named_parameters())[name]).any() for name, parameter in trained(model).items())
    with model.disable_adapter():
        close(model(*inputs).logits, plain)
    for use in (lambda fused: fused.fold(), lambda fused: fused.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match=r"which peft has wrapped: .*merge_and_unload\(\)"):
            use(model.get_base_model())
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(make_model(), tmp_path).eval()(*inputs).logits, expected)
    merged = model.merge_and_unload()
    assert isinstance(merged, MoPEFusion)
    for whole in (merged, merged.fold()):
        close(whole(*inputs).logits, expected)


def test_lora_that_leaves_prompts_untrained_is_said():
    model = get_peft_model(make_model(), LoraConfig(**LORA))
    with pytest.warns(
        UserWarning, match=r"its prompts or its head are not trained.*LoraConfig\(modules_to_save=\['bank', 'head'\]"
    ):
        model.train()
    fused = make_model()
    fused.bank.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused.train()  # a head alone is one's own wish


def test_lora_in_the_encoder_before_prompts_is_frozen_until_it_is_asked_for(tmp_path):
    inputs, bert = make_inputs(), make_bert()
    plain = copy.deepcopy(bert)
    lora = get_peft_model(bert, LoraConfig(**LORA))
    with pytest.raises(TypeError, match=r"PeftModel is not a supported encoder: its submodule \.base_model\.model is supported"):
        make_model(lora)
    model = make_model(lora.get_base_model())
    model.leave_frozen_out_of_state_dict()
    assert not any("lora" in name for name in trained(model))
    model.save_pretrained(tmp_path / "prompts")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = step(model, inputs)(*inputs).logits
    state = model.state_dict()
    assert sum("lora_" in name for name in state) == 8
    assert not any("base_layer" in name for name in state)
    state = copy.deepcopy(state)
    step(model, inputs)
    model.load_state_dict(state)
    close(model(*inputs).logits, expected)
    with pytest.warns(UserWarning, match=r"8 trained parameters are not in this save.*lora.*encoder\.save_pretrained\(\)"):
        model.save_pretrained(tmp_path / "prompts")
    lora.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(plain, tmp_path / "lora").get_base_model()
    loaded = MoPEFusion.from_pretrained(tmp_path / "prompts", again).double()
    close(loaded(*inputs).logits, expected, 1e-6)  # peft reads a LoRA as float32
