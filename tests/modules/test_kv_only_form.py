import functools

import pytest
import torch
import torch.nn.functional as F
from prompt_setups import CROSS, DIM, EXPERTS, HEADS, LENGTH, SETTINGS, close, make_inputs, make_layer, make_norm
from timm.layers import RmsNorm
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from mope_fast import MoPELayer, functional


def frozen_layer(norm_first, *, affine=True, bias=True):
    # torch's inference fast path takes relu and gelu only, and not a norm without weights
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 48, dropout=0.0, activation=F.silu, batch_first=True, norm_first=norm_first, bias=bias, dtype=torch.float64
    )
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    if not affine:
        layer.norm1 = nn.LayerNorm(DIM, elementwise_affine=False)
    return layer.requires_grad_(False).eval()


def projections(layer):
    """Query, key and value maps of a torch layer with packed weights."""
    attention = layer.self_attn
    weights = attention.in_proj_weight.chunk(3)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    return [lambda rows, w=w, b=b: F.linear(rows, w, b) for w, b in zip(weights, biases, strict=True)]


def concatenated(layer, x, out):
    prompts = out.prompts
    return layer(torch.cat([prompts, x], dim=1))[:, prompts.shape[1] :]


def keys_and_values_only(layer, x, out):
    q_proj, k_proj, v_proj = projections(layer)
    norm = layer.norm1 if layer.norm_first else None

    def attend(h):
        q, k, v = (proj(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for proj in (q_proj, k_proj, v_proj))
        prefixes = out.key_value(norm, k_proj, v_proj, HEADS)
        return layer.self_attn.out_proj(functional.prompt_attention(q, k, v, prefixes).transpose(1, 2).flatten(2))

    def feed_forward(h):
        return layer.linear2(layer.activation(layer.linear1(h)))

    if layer.norm_first:
        x = x + attend(layer.norm1(x))
        return x + feed_forward(layer.norm2(x))
    x = layer.norm1(x + attend(x))
    return layer.norm2(x + feed_forward(x))


@pytest.mark.parametrize("mixing", ["prompt", "kv"])
@pytest.mark.parametrize("gate", [{}, {"top_k": 2}, {"top_k": 2, "renormalize": True}], ids=["dense", "top2", "top2-renormalized"])
@pytest.mark.parametrize(
    ("norm_first", "facts"),
    [(True, {}), (False, {}), (True, {"affine": False}), (True, {"bias": False}), (False, {"bias": False})],
    ids=["pre-norm", "post-norm", "pre-norm-no-affine", "pre-norm-no-bias", "post-norm-no-bias"],
)
def test_keys_and_values_only_equal_concatenation(norm_first, facts, gate, mixing):
    torch.manual_seed(0)
    layer = frozen_layer(norm_first, **facts)
    prompts = make_layer(mixing=mixing, learn_keys=True, **gate)
    inputs = make_inputs(6)
    upstream = torch.randn(6, 7, DIM, dtype=torch.float64)
    trained = [*prompts.parameters(), *inputs]

    results = []
    for form in (concatenated, keys_and_values_only):
        y = form(layer, inputs[0], prompts(*inputs))
        results.append((y, *torch.autograd.grad((y * upstream).sum(), trained)))
    names = ["tokens", *(name for name, _ in prompts.named_parameters()), "grad of tokens", "grad of cross", "grad of mapped"]
    for name, expected, got in zip(names, *results, strict=True):
        assert expected.abs().max() > 1e-6, name
        close(got, expected)


class Counted(nn.Linear):
    rows = 0

    def forward(self, x):
        self.rows = x.shape[:-1].numel()
        return super().forward(x)


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(DIM).double()], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch", [1, EXPERTS - 1, EXPERTS, EXPERTS + 1, 3 * EXPERTS])
def test_auto_projects_the_experts_only_where_there_are_fewer_of_them(batch, norm):
    torch.manual_seed(1)
    k_proj, v_proj = Counted(DIM, DIM).double(), Counted(DIM, DIM).double()
    make_layer()(*make_inputs(batch)).key_value(norm, k_proj, v_proj, HEADS)
    constants = 0 if norm is None else 2  # the value at zero, and at the norm's bias
    mixed_rows = EXPERTS * LENGTH + constants if batch > EXPERTS else batch * LENGTH
    assert k_proj.rows == v_proj.rows == LENGTH + batch + mixed_rows


@pytest.mark.parametrize(("training", "kv_space"), [(True, False), (False, True)])
def test_auto_leaves_kv_space_while_dynamic_prompts_are_dropped(training, kv_space):
    torch.manual_seed(2)
    k_proj = Counted(DIM, DIM).double()
    prompts = make_layer(dynamic_dropout=0.5).train(training)
    prompts(*make_inputs(9)).key_value(None, k_proj, nn.Linear(DIM, DIM).double(), HEADS)
    assert k_proj.rows == LENGTH + 9 + (EXPERTS * LENGTH if kv_space else 9 * LENGTH)


@pytest.mark.parametrize(
    ("norm", "key_norm"),
    [(None, nn.RMSNorm(8).double()), (nn.LayerNorm(DIM).double(), nn.LayerNorm(8).double()), (nn.RMSNorm(DIM).double(), None)],
    ids=["qk-norm", "pre-norm-qk-norm", "rms-norm"],
)
def test_auto_is_right_where_kv_space_would_not_be_exact(norm, key_norm):
    torch.manual_seed(3)
    k_proj, v_proj = nn.Linear(DIM, HEADS * 8).double(), nn.Linear(DIM, HEADS * 8).double()
    out = make_layer()(*make_inputs(9))
    prefixes = out.key_value(norm, k_proj, v_proj, HEADS, key_norm=key_norm)
    rows = out.prompts if norm is None else norm(out.prompts)
    keys, values = (proj(rows).unflatten(-1, (HEADS, -1)).transpose(1, 2) for proj in (k_proj, v_proj))
    for index, expected in enumerate((keys if key_norm is None else key_norm(keys), values)):
        close(torch.cat([prefix[index].expand(9, -1, -1, -1) for prefix in prefixes], dim=2), expected)


def test_rms_norms_without_an_eps_take_that_of_what_they_compute_in():
    torch.manual_seed(8)
    norm, linear = nn.RMSNorm(DIM).bfloat16(), nn.Linear(DIM, DIM, bias=False).bfloat16()
    x, cross, _ = (t.detach().bfloat16() for t in make_inputs(9))
    keys = {}
    for mixing in ("prompt", "kv"):
        torch.manual_seed(9)
        layer = MoPELayer(DIM, CROSS, **SETTINGS, mixing=mixing, prompt_init=1e-2).bfloat16().eval()
        keys[mixing] = layer(x, cross).key_value(norm, linear, linear, HEADS)[-1][0].float()
    torch.testing.assert_close(keys["kv"], keys["prompt"], rtol=0.1, atol=0.05)


def test_a_forward_of_any_name_is_a_norm_of_an_unknown_class():
    class Norm(nn.Module):
        forward = forward_of_a_module

    linear = nn.Linear(DIM, DIM).double()
    assert len(make_layer()(*make_inputs(9)).key_value(Norm(), linear, linear, HEADS)) == 2


def forward_of_a_module(self, x):
    return x


forward_of_a_module.__module__ = "script"


def test_routed_prompts_alone_go_through_projections_of_16_bits():
    linear = nn.Linear(DIM, DIM).bfloat16()
    layer = MoPELayer(DIM, CROSS, **SETTINGS, use_static=False, mixing="prompt").eval()
    x, cross, _ = make_inputs(2)
    ((keys, _),) = layer(x.bfloat16(), cross.float()).key_value(None, linear, linear, HEADS)
    assert keys.dtype == torch.bfloat16


class OtherNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize(
    "make",
    [nn.RMSNorm, functools.partial(nn.RMSNorm, elementwise_affine=False), RmsNorm, T5LayerNorm, Qwen3RMSNorm, GemmaRMSNorm],
    ids=["torch", "torch, no weight", "timm", "T5", "Qwen 3", "Gemma"],
)
def test_rms_norms_are_mixed_behind(make):
    torch.manual_seed(7)
    norm, linear, inputs = make(DIM, eps=1e-3), nn.Linear(DIM, DIM), [t.float() for t in make_inputs(9)]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    layer = MoPELayer(DIM, CROSS, **SETTINGS, mixing="kv").eval()
    with torch.no_grad():
        layer.experts.mul_(0.1)  # eps counts
    got = layer(*inputs).key_value(norm, linear, linear, HEADS)
    expected = linear(norm(layer(*inputs).prompts)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    # float32: transformers' norms take their statistics in it
    torch.testing.assert_close(torch.cat([keys.expand(9, -1, -1, -1) for keys, _ in got], dim=2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "key_norm", "message"),
    [
        (None, nn.RMSNorm(8), "norms its keys behind the projection"),
        (OtherNorm(DIM), None, "norm is OtherNorm, which is no layer norm or RMS norm of a known class, or has hooks"),
    ],
)
def test_forced_kv_space_says_why_it_is_not_exact(norm, key_norm, message):
    linear = nn.Linear(DIM, DIM).double()
    with pytest.raises(ValueError, match=f"mixing='kv' is not exact here: .*{message}.*use mixing='auto' or 'prompt'"):
        make_layer(mixing="kv")(*make_inputs(9)).key_value(norm, linear, linear, HEADS, key_norm=key_norm)


def test_forced_kv_space_without_dynamic_prompts_asks_for_nothing():
    linear = nn.Linear(DIM, DIM).double()
    out = make_layer(mixing="kv", use_dynamic=False)(*make_inputs(2))
    assert len(out.key_value(nn.RMSNorm(DIM).double(), linear, linear, HEADS)) == 2


def test_projections_may_be_any_affine_modules():
    torch.manual_seed(4)
    # the linear part is read off by calling, so a chain of affine maps is as good as one nn.Linear
    k_proj = nn.Sequential(nn.Linear(DIM, 24), nn.Linear(24, DIM)).double()
    v_proj, norm = nn.Linear(DIM, DIM).double(), make_norm()
    inputs = make_inputs(9)
    layer = make_layer(mixing="kv")
    (static_keys, _), (keys, _) = layer(*inputs).key_value(norm, k_proj, v_proj, HEADS)
    expected = k_proj(norm(layer(*inputs).prompts)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    close(torch.cat([static_keys.expand(9, -1, -1, -1), keys], dim=2), expected)


def test_scores_are_the_same_in_both_spaces():
    torch.manual_seed(5)
    linear = nn.Linear(DIM, DIM).double()
    layer, inputs = make_layer(mixing="kv", noise_std=0.5).train(), make_inputs(9)
    out = layer(*inputs)
    out.key_value(None, linear, linear, HEADS)
    after_mixing = out.scores
    close(after_mixing @ layer.experts.flatten(1), out.dynamic.flatten(1))
    close(out.scores, after_mixing)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_kv_space_is_exact_however_large_the_experts_are(scale):
    torch.manual_seed(6)
    layer, norm = make_layer(mixing="kv"), make_norm(eps=1e-6)
    with torch.no_grad():
        layer.experts.mul_(scale)
        layer.experts[0, 0] = 0.7  # a row without variance
    linear, inputs = nn.Linear(DIM, DIM).double(), make_inputs(9)
    _, (keys, _) = layer(*inputs).key_value(norm, linear, linear, HEADS)
    expected = linear(norm(layer(*inputs).prompts)).unflatten(-1, (HEADS, -1)).transpose(1, 2)[:, :, LENGTH:]
    # eps = 1e-6 next to a variance of 3e-10 amplifies rounding
    close(keys, expected, 1e-9)
