import copy

import pytest
import torch
from prompt_setups import CROSS, DIM, HEADS, LENGTH, SETTINGS, close, make_inputs
from torch import nn

from mope_fast import MoPEConfig, MoPELayer, PromptBank
from mope_fast.encoders import PromptedLayer
from mope_fast.modules import FoldedBank


def inputs(dtype, batch=6):
    x, cross, mapped = (t.detach() for t in make_inputs(batch))
    return x.to(dtype), cross.float(), mapped.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_scores_are_float32_and_prompts_are_mixed_in_bfloat16(dtype):
    torch.manual_seed(0)
    layer = MoPELayer(DIM, CROSS, **SETTINGS).eval()
    x, cross, mapped = inputs(dtype)
    plain = layer(x, cross, mapped)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, cross, mapped)
        scores, dynamic, prompts = out.scores, out.dynamic, out.prompts
    assert scores.dtype == torch.float32
    close(scores, plain.scores, 0)
    assert prompts.dtype == dynamic.dtype == dtype
    close(dynamic, dynamic.bfloat16().to(dtype), 0)


def test_a_layer_in_bfloat16_routes_in_float32():
    torch.manual_seed(5)
    layer = MoPELayer(DIM, CROSS, **SETTINGS).bfloat16().eval()
    x, cross, _ = (t.bfloat16() for t in inputs(torch.float32))
    exact = copy.deepcopy(layer).double()(x.double(), cross.double())
    torch.testing.assert_close(layer(x, cross).scores.double(), exact.scores, rtol=1e-4, atol=1e-6)


def test_under_autocast_keys_and_values_take_its_dtype():
    torch.manual_seed(1)
    linear = nn.Linear(DIM, DIM)
    for mixing in ("prompt", "kv"):
        bank = PromptBank([DIM], CROSS, MoPEConfig(**SETTINGS, mixing=mixing)).eval()
        x, cross, _ = inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            out = bank.layer(0, x, bank.prepare(cross))
            prefixes = out.key_value(nn.LayerNorm(DIM), linear, linear, HEADS)
        assert {t.dtype for prefix in prefixes for t in prefix} == {torch.bfloat16}, mixing
        assert out.scores.dtype == torch.float32


def test_gradients_under_autocast_have_the_parameters_dtype():
    torch.manual_seed(2)
    bank = PromptBank([DIM], CROSS, MoPEConfig(**SETTINGS, mixing="kv"))
    linear = nn.Linear(DIM, DIM)
    x, cross, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        prefixes = bank.layer(0, x, bank.prepare(cross)).key_value(nn.LayerNorm(DIM), linear, linear, HEADS)
        loss = sum((t * torch.randn_like(t)).sum() for prefix in prefixes for t in prefix)
    loss.backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_kv_space_in_bfloat16_is_about_as_right_as_prompt_space(norm_first):
    errors = {"prompt": [], "kv": []}
    for seed in range(5):
        torch.manual_seed(seed)
        parts = [nn.LayerNorm(DIM) if norm_first else nn.Identity(), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)]
        for parameter in (p for part in parts[:1] for p in part.parameters()):
            nn.init.normal_(parameter)
        parts = [part.bfloat16() for part in parts]
        truth_parts = [copy.deepcopy(part).double() for part in parts]
        layer = MoPELayer(DIM, CROSS, **SETTINGS).bfloat16().eval()
        x, cross, _ = (t.detach().bfloat16() for t in make_inputs(32))

        def dynamic_keys_and_values(layer, x, cross, parts):
            norm = parts[0] if norm_first else None
            return torch.stack(layer(x, cross).key_value(norm, *parts[1:], HEADS)[-1])

        truth = dynamic_keys_and_values(copy.deepcopy(layer).double(), x.double(), cross.double(), truth_parts)
        for mixing, collected in errors.items():
            same = MoPELayer(DIM, CROSS, **SETTINGS, mixing=mixing).bfloat16().eval()
            same.load_state_dict(layer.state_dict())
            error = dynamic_keys_and_values(same, x, cross, parts).double() - truth
            collected.append(error.square().mean().sqrt())
    prompt, kv = (torch.stack(errors[mixing]).mean() for mixing in ("prompt", "kv"))
    assert kv <= 2 * prompt
    assert truth.shape[-2] == LENGTH


@pytest.mark.parametrize("prompt_init", [None, 0.02])
@pytest.mark.parametrize("bias", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kv_space_and_folding_keep_their_digits_under_large_biases(dtype, bias, prompt_init):
    width, heads, batch = 256, 4, 64
    norm, k_proj, v_proj = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
    for proj in (k_proj, v_proj):
        nn.init.normal_(proj.weight, std=0.05)
        nn.init.normal_(proj.bias, std=bias)
    low = nn.ModuleList([norm, k_proj, v_proj]).to(dtype).requires_grad_(False)
    exact = copy.deepcopy(low).double()
    x, cross = torch.randn(batch, width).to(dtype), torch.randn(batch, 32)

    def bank(mixing):
        torch.manual_seed(1)
        return PromptBank([width], 32, MoPEConfig(mixing=mixing, prompt_init=prompt_init)).eval()

    def facts(parts):
        return PromptedLayer(None, None, width, *parts, heads)

    def prefix(bank, parts, x, cross):
        prefixes, _ = bank.prepare(cross, [facts(parts)], x.dtype).prefixes(0, x)
        return torch.stack(prefixes[-1])[..., -7:, :]  # static prompts are in front, or apart

    with torch.no_grad():
        truth = prefix(bank("prompt").double(), exact, x.double(), cross.double())
        prompt, kv = (prefix(bank(mixing), low, x, cross) for mixing in ("prompt", "kv"))
        folded = prefix(FoldedBank(bank("kv"), [facts(low)], dtype), low, x, cross)
    for rows in (slice(0, 6), slice(6, 7)):  # dynamic, mapped
        errors = [(got.double() - truth)[..., rows, :].square().mean().sqrt().item() for got in (prompt, kv, folded)]
        assert errors[1] <= 2 * errors[0], f"K/V space {errors[1]:.1e}, prompt space {errors[0]:.1e}"
        assert errors[2] <= 2 * errors[0], f"folded {errors[2]:.1e}, prompt space {errors[0]:.1e}"
