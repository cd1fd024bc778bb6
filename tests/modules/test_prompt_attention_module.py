import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from prompt_setups import DIM, HEADS, close, make_inputs, make_layer, make_norm
from torch import nn

from mope_fast import PromptAttention, ReceptiveField, _dispatch, functional, reference

BATCH, TOKENS = 4, 7
FIELD = ReceptiveField({"a": 2, "b": 4, "c": 1}, {"a": ["a", "c"], "b": ["a", "b"], "c": ["c"]})
VARIANTS = {
    "plain": {},
    "qkv-bias": {"qkv_bias": True},
    "no-proj-bias": {"proj_bias": False},
    "qk-norm": {"qk_norm": True, "norm_layer": nn.LayerNorm},
    "scale-norm": {"scale_norm": True, "norm_layer": nn.LayerNorm},
    "gated": {"gated": True, "qkv_bias": True},
    "attn-head-dim": {"attn_head_dim": 10},
    "dim-out": {"dim_out": 24},
    "all": {
        "qkv_bias": True, "qk_norm": True, "scale_norm": True, "gated": True, "attn_head_dim": 10, "dim_out": 24,
        "norm_layer": nn.RMSNorm,
    },
}  # fmt: skip


def timm_attention(**settings):
    """float64; no parameter is left at zero or one."""
    layers = pytest.importorskip("timm.layers")
    attention = layers.Attention(DIM, HEADS, **settings).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


def prompt_attention(**settings):
    module = PromptAttention(DIM, HEADS, **settings).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def randn(*shape, **settings):
    return torch.randn(*shape, dtype=torch.float64, **settings)


def make_padding():
    """Ragged, with a hole in the middle of the first sample."""
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 1, 3, TOKENS - 1])[:, None]
    mask[0, 2] = False
    return mask


def outcome(module, out, inputs):
    """Output, and gradients of inputs and parameters for an upstream gradient that is the same in every call."""
    upstream = randn(*out.shape, generator=torch.Generator().manual_seed(11))
    leaves = {str(i): leaf for i, leaf in enumerate(inputs)} | dict(module.named_parameters())
    return {"output": out, **dict(zip(leaves, torch.autograd.grad((out * upstream).sum(), [*leaves.values()]), strict=True))}


def assert_same_outcome(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        # a vector that is added to all keys changes no softmax
        assert tensor.abs().max() > 1e-6 or name.endswith("k_norm.bias"), name
        close(got[name], tensor)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_output_and_gradients_equal_timms_on_the_same_state_dict(settings):
    theirs = timm_attention(**settings)
    ours = PromptAttention(DIM, HEADS, **settings).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(BATCH, TOKENS, DIM, requires_grad=True)
    assert_same_outcome(outcome(ours, ours(x), [x]), outcome(theirs, theirs(x), [x]))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_state_dict_loads_into_timms_module(settings):
    ours, theirs = prompt_attention(**settings), timm_attention(**settings)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = randn(BATCH, TOKENS, DIM)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_from_attention_shares_parameters_and_gives_the_same_output(settings):
    theirs = timm_attention(**settings).eval()
    ours = PromptAttention.from_attention(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not ours.training
    x = randn(BATCH, TOKENS, DIM, requires_grad=True)
    assert_same_outcome(outcome(ours, ours(x), [x]), outcome(theirs, theirs(x), [x]))


def test_positional_arguments_are_timms():
    arguments = (DIM, HEADS, 10, 24, True, True, True, False, True, 0.0, 0.0, nn.LayerNorm)
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.Attention(*arguments).double()
    ours = PromptAttention(*arguments).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(BATCH, TOKENS, DIM)
    close(ours(x), theirs(x))


def test_dtype_and_device_are_those_of_all_parameters():
    module = PromptAttention(DIM, HEADS, **VARIANTS["all"], device="meta", dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in module.parameters()} == {(torch.bfloat16, "meta")}


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": DIM, "depth": 2, "num_heads": HEADS, "num_classes": 5}


def vision_transformer(**settings):
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(**VIT, **settings).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True, "scale_attn_norm": True}], ids=["plain", "norms"])
def test_a_vision_transformer_with_swapped_attention_gives_the_same_output(settings):
    model = vision_transformer(**settings)
    swapped = copy.deepcopy(model)
    for block in swapped.blocks:
        block.attn = PromptAttention.from_attention(block.attn)
    swapped.load_state_dict(model.state_dict(), strict=True)
    images = randn(2, 3, 16, 16, requires_grad=True)
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[1, ..., 9:] = False
    for arguments in ({}, {"attn_mask": mask}):
        expected = outcome(model, model.forward_head(model.forward_features(images, **arguments)), [images])
        got = outcome(swapped, swapped.forward_head(swapped.forward_features(images, **arguments)), [images])
        assert_same_outcome(got, expected)


def test_it_is_an_attn_layer_of_timms_constructor():
    model = vision_transformer(qkv_bias=True)
    ours = vision_transformer(qkv_bias=True, attn_layer=PromptAttention)
    assert all(type(block.attn) is PromptAttention for block in ours.blocks)
    ours.load_state_dict(model.state_dict(), strict=True)
    images = randn(2, 3, 16, 16)
    close(ours(images), model(images))


MASKS = {
    "bool (B, 1, 1, S)": lambda: make_padding()[:, None, None],
    "bool (1, S)": lambda: make_padding()[:1],
    "bool (S, S)": lambda: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
    "bool (H, S, S)": lambda: (torch.rand(HEADS, TOKENS, TOKENS) < 0.5) | torch.eye(TOKENS, dtype=torch.bool),
    "bool (B, 1, S, 1)": lambda: torch.ones(BATCH, 1, TOKENS, 1, dtype=torch.bool),
    "float (S, S)": lambda: randn(TOKENS, TOKENS),
    "float (B, 1, 1, S)": lambda: randn(BATCH, 1, 1, TOKENS),
    "float (B, H, S, S)": lambda: randn(BATCH, HEADS, TOKENS, TOKENS),
    "float with -inf": lambda: randn(TOKENS, TOKENS).masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf")),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attn_mask_means_what_it_means_to_timm(mask):
    theirs, mask = timm_attention(qkv_bias=True), mask()
    ours = PromptAttention.from_attention(theirs)
    x = randn(BATCH, TOKENS, DIM, requires_grad=True)
    leaves = [x, mask.requires_grad_()] if mask.is_floating_point() else [x]
    assert_same_outcome(outcome(ours, ours(x, attn_mask=mask), leaves), outcome(theirs, theirs(x, attn_mask=mask), leaves))


def test_a_bool_attn_mask_of_keys_becomes_padding_and_any_other_a_bias(monkeypatch):
    seen = []
    real = functional.prompt_attention
    monkeypatch.setattr(functional, "prompt_attention", lambda *a, **k: seen.append(k) or real(*a, **k))
    module, x = prompt_attention(), randn(BATCH, TOKENS, DIM)
    for name, mask in MASKS.items():
        module(x, attn_mask=mask())
        padding, bias = seen[-1]["key_padding_mask"], seen[-1]["bias"]
        assert (padding is None) == (name not in ("bool (B, 1, 1, S)", "bool (1, S)")), name
        assert (bias is None) == (padding is not None), name


def test_is_causal_is_timms_and_composes_with_attn_mask():
    theirs = timm_attention()
    ours = PromptAttention.from_attention(theirs)
    x = randn(BATCH, TOKENS, DIM)
    close(ours(x, is_causal=True), theirs(x, is_causal=True))
    triangle = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    mask = make_padding()[:, None, None] | torch.eye(TOKENS, dtype=torch.bool)
    close(ours(x, attn_mask=mask, is_causal=True), theirs(x, attn_mask=mask & triangle))


@pytest.mark.parametrize("prefix_batch", [1, BATCH])
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_prefix_gives_what_timms_attention_gives_for_prompts_in_front(settings, prefix_batch):
    theirs = timm_attention(**settings)
    ours = PromptAttention.from_attention(theirs)
    x, prompts = randn(BATCH, TOKENS, DIM, requires_grad=True), randn(prefix_batch, 3, DIM, requires_grad=True)
    key, value = prefix = ours.prefix(prompts)
    assert key.shape == value.shape == (prefix_batch, HEADS, 3, settings.get("attn_head_dim", DIM // HEADS))
    expected = theirs(torch.cat([prompts.expand(BATCH, -1, -1), x], dim=1))[:, 3:]
    assert_same_outcome(outcome(ours, ours(x, [prefix]), [x, prompts]), outcome(theirs, expected, [x, prompts]))


def test_two_prefixes_equal_their_concatenation():
    ours = prompt_attention(qk_norm=True, norm_layer=nn.LayerNorm)
    x, shared, own = randn(BATCH, TOKENS, DIM), randn(1, 2, DIM), randn(BATCH, 3, DIM)
    together = torch.cat([shared.expand(BATCH, -1, -1), own], dim=1)
    close(ours(x, [ours.prefix(shared), ours.prefix(own)]), ours(x, [ours.prefix(together)]))


class Wrapped(nn.Module):
    """A projection that is more than its weight, as adapters make it."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.down, self.up = linear, nn.Linear(DIM, 2).double(), nn.Linear(2, linear.out_features).double()

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def test_prefixes_go_through_the_projection_module_whatever_it_is():
    theirs = timm_attention(qkv_bias=True)
    theirs.qkv = Wrapped(theirs.qkv)
    ours = PromptAttention.from_attention(theirs)
    x, prompts = randn(BATCH, TOKENS, DIM), randn(BATCH, 3, DIM)
    expected = theirs(torch.cat([prompts, x], dim=1))[:, 3:]
    close(ours(x, [ours.prefix(prompts)]), expected)
    key, value = ours.prefix(prompts)
    close(ours.k_proj(prompts).unflatten(-1, (HEADS, -1)).transpose(1, 2), key)
    close(ours.v_proj(prompts).unflatten(-1, (HEADS, -1)).transpose(1, 2), value)


@pytest.mark.parametrize(
    ("mixing", "variant"), [("prompt", "qkv-bias"), ("kv", "qkv-bias"), ("kv", "plain"), ("prompt", "all"), ("auto", "all")]
)
def test_mope_prompts_as_prefixes_equal_prompts_in_front(mixing, variant):
    theirs, norm, prompts = timm_attention(**VARIANTS[variant]), make_norm(), make_layer(mixing=mixing, learn_keys=True)
    ours = PromptAttention.from_attention(theirs)
    inputs = make_inputs(9, TOKENS)
    x, leaves = inputs[0], [*inputs, *norm.parameters(), *prompts.parameters()]

    out = prompts(*inputs)
    prefixes = out.key_value(norm, ours.k_proj, ours.v_proj, ours.num_heads, key_norm=ours.key_norm)
    got = outcome(ours, ours(norm(x), prefixes), leaves)
    tokens = prompts(*inputs).prompts
    expected = theirs(norm(torch.cat([tokens, x], dim=1)))[:, tokens.shape[1] :]
    assert_same_outcome(got, outcome(theirs, expected, leaves))


def test_key_norm_rules_out_mixing_of_keys_only_where_there_is_a_norm():
    plain, normed = prompt_attention(), prompt_attention(qk_norm=True, norm_layer=nn.LayerNorm)
    assert plain.key_norm is None
    assert normed.key_norm is normed.k_norm
    with pytest.raises(ValueError, match="mixing='kv' is not exact here: the layer norms its keys"):
        make_layer(mixing="kv")(*make_inputs(9)).key_value(
            make_norm(), normed.k_proj, normed.v_proj, HEADS, key_norm=normed.key_norm
        )


def by_reference(module, x, attend):
    """``module``, which has no norm and no gate, with another attention between its projections."""
    q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in F.linear(x, module.qkv.weight).chunk(3, dim=-1))
    return F.linear(attend(q, k, v).transpose(1, 2).flatten(2), module.proj.weight, module.proj.bias)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_field_padding_and_bias_are_the_references(biased, padded):
    module, x = prompt_attention(), randn(BATCH, TOKENS, DIM, requires_grad=True)
    bias = randn(1, HEADS, TOKENS, TOKENS, requires_grad=True) if biased else None
    masks = {"key_padding_mask": make_padding() if padded else None, "bias": bias}
    leaves = [x, bias] if biased else [x]
    for arguments, attend in (
        ({"field": FIELD}, lambda q, k, v: reference.receptive_field_attention(q, k, v, FIELD, **masks)),
        ({"is_causal": True}, lambda q, k, v: reference.prompt_attention(q, k, v, (), is_causal=True, **masks)),
    ):
        expected = outcome(module, by_reference(module, x, attend), leaves)
        assert_same_outcome(outcome(module, module(x, **arguments, **masks), leaves), expected)


def test_a_field_and_an_attn_mask_both_hide_keys():
    module, x = prompt_attention(), randn(BATCH, TOKENS, DIM)
    mask = torch.rand(TOKENS, TOKENS) < 0.7
    close(module(x, field=FIELD, attn_mask=mask), module(x, attn_mask=mask & FIELD.mask()))


def test_from_attention_keeps_what_is_ours():
    module = prompt_attention(num_kv_heads=2, window=[2, None])
    x = randn(BATCH, TOKENS, DIM)
    again = PromptAttention.from_attention(module)
    close(again(x), module(x))
    assert repr(again) == repr(module)


def test_a_pickle_from_before_windows_and_shared_keys_loads():
    module = prompt_attention()
    x = randn(BATCH, TOKENS, DIM)
    expected = module(x)
    del module.num_kv_heads, module.window
    close(pickle.loads(pickle.dumps(module))(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_trace_of_few_tokens_keeps_its_window_for_many():
    module = prompt_attention(window=(2, 1))
    traced = torch.jit.trace(module, randn(1, 2, DIM))
    x = randn(1, 9, DIM)
    close(traced(x), module(x))


def test_implementation_is_passed_on(monkeypatch):
    asked = []
    choose = _dispatch.choose
    monkeypatch.setattr(_dispatch, "choose", lambda function, impl, problem: asked.append(impl) or choose(function, impl, problem))
    x = randn(BATCH, TOKENS, DIM)
    for module in (
        prompt_attention(),
        prompt_attention(impl="reference"),
        PromptAttention.from_attention(timm_attention(), impl="sdpa"),
    ):
        module(x)
        module(x, field=FIELD)
    assert asked == ["auto"] * 2 + ["reference"] * 2 + ["sdpa"] * 2
    with pytest.raises(ValueError, match="prompt_attention got impl='flash', expected one of"):
        prompt_attention(impl="flash")(x)


@pytest.mark.parametrize("case", ["prefix", "causal-padded", "field", "attn-mask"])
def test_compiles_as_one_graph(case):
    # a field that no test before has lowered
    field = ReceptiveField({"x": 3, "y": TOKENS - 3}, {"x": ["x", "y"], "y": ["y"]})
    module = prompt_attention(**VARIANTS["all"])
    x, prompts = randn(BATCH, TOKENS, DIM, requires_grad=True), randn(1, 3, DIM, requires_grad=True)
    mask = make_padding()

    def run(x, prompts):
        if case == "prefix":
            return module(x, [module.prefix(prompts)])
        if case == "causal-padded":
            return module(x, [module.prefix(prompts)], is_causal=True, key_padding_mask=mask)
        if case == "attn-mask":
            return module(x, [module.prefix(prompts)], attn_mask=mask[:, None, None])
        return module(torch.cat([prompts.expand(BATCH, -1, -1), x[:, 3:]], dim=1), field=field)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert_same_outcome(outcome(module, compiled(x, prompts), [x, prompts]), outcome(module, run(x, prompts), [x, prompts]))


class Float32Norm(nn.LayerNorm):
    """Answers in float32 whatever it is asked in, as layer norm does under CUDA's autocast."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)


@pytest.mark.parametrize("norm_layer", [nn.LayerNorm, Float32Norm])
def test_under_autocast_output_and_prefix_have_its_dtype_and_parameters_their_own(norm_layer):
    module = PromptAttention(DIM, HEADS, qk_norm=True, scale_norm=True, gated=True, norm_layer=norm_layer)
    x, prompts = torch.randn(BATCH, TOKENS, DIM, requires_grad=True), torch.randn(1, 3, DIM)
    plain = module(x, [module.prefix(prompts)])
    with torch.autocast("cpu", torch.bfloat16):
        prefix = module.prefix(prompts)
        out = module(x, [prefix])
        field_out = module(x, field=FIELD)
    assert {t.dtype for t in (*prefix, out, field_out)} == {torch.bfloat16}
    # four roundings to bfloat16 of values of size 1 at most lie between input and output
    assert (out - plain).abs().max() < 8 * torch.finfo(torch.bfloat16).eps
    out.backward(torch.randn_like(out))
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32} == {x.grad.dtype}


def test_prefixes_of_a_mope_layer_with_a_key_norm_fit_under_autocast():
    module = PromptAttention(DIM, HEADS, qk_norm=True, norm_layer=Float32Norm)
    layer, norm = make_layer().float(), nn.LayerNorm(DIM)
    x, cross, mapped = (t.detach().float() for t in make_inputs(BATCH, TOKENS))
    with torch.autocast("cpu", torch.bfloat16):
        prefixes = layer(x, cross, mapped).key_value(norm, module.k_proj, module.v_proj, HEADS, key_norm=module.key_norm)
        assert module(norm(x), prefixes).dtype == torch.bfloat16


def test_half_precision_module_keeps_its_dtype():
    module, x = prompt_attention(**VARIANTS["all"]).bfloat16(), randn(BATCH, TOKENS, DIM).bfloat16()
    assert module(x, [module.prefix(x[:1, :3])]).dtype == torch.bfloat16


def test_train_and_eval_mode_give_the_same():
    module, x = prompt_attention(**VARIANTS["all"]), randn(BATCH, TOKENS, DIM)
    close(module.train()(x), module.eval()(x), 0)


def test_a_wholly_padded_sample_gets_the_projection_of_zeros():
    module, x = prompt_attention(), randn(BATCH, TOKENS, DIM, requires_grad=True)
    mask = make_padding()
    mask[1] = False
    out = module(x, key_padding_mask=mask)
    close(out[1], module.proj.bias.expand(TOKENS, -1))
    out.backward(torch.randn_like(out))
    assert torch.count_nonzero(x.grad[1]) == 0
    assert x.grad.isfinite().all()


def test_repr_tells_heads_and_implementation():
    assert repr(prompt_attention(impl="sdpa")).startswith("PromptAttention(\n  num_heads=4, head_dim=8, impl='sdpa'\n  (qkv)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 30, "num_heads": 4}, "dim=30 must be a multiple of num_heads=4, or attn_head_dim be given"),
        ({"dim": 1028, "num_heads": 4}, "head dimension must be 1 to 256, got 257"),
        ({"dim": 8, "attn_head_dim": 264}, "head dimension must be 1 to 256, got 264"),
        ({"dim": 8, "attn_head_dim": 0}, "head dimension must be 1 to 256, got 0"),
        ({"dim": 8, "qk_norm": True}, "qk_norm and scale_norm need a norm_layer"),
        ({"dim": 8, "scale_norm": True}, "qk_norm and scale_norm need a norm_layer"),
        ({"dim": 8, "attn_drop": 0.1}, "no dropout, got attn_drop=0.1 and proj_drop=0.0: leave them at 0"),
        ({"dim": 8, "proj_drop": 0.2}, "no dropout, got attn_drop=0.0 and proj_drop=0.2: leave them at 0"),
    ],
)
def test_constructor_refuses_what_can_not_run(arguments, message):
    with pytest.raises(ValueError, match=message):
        PromptAttention(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x, p: {"x": x[0]}, ValueError, r"x must be \(B, S, D\), got \(7, 32\)"),
        (lambda x, p: {"x": x, "prefixes": [p], "field": FIELD}, ValueError, "field takes no prefixes, is_causal or window"),
        (lambda x, p: {"x": x, "is_causal": True, "field": FIELD}, ValueError, "field takes no prefixes, is_causal or window"),
        (lambda x, p: {"x": x[:, :5], "field": FIELD}, ValueError, r"the field has 2 \+ 4 \+ 1 = 7 positions, but q has 5"),
        (lambda x, p: {"x": x, "prefixes": [p] * 3}, ValueError, r"at most two \(key, value\) pairs, got 3"),
        (lambda x, p: {"x": x, "prefixes": x}, TypeError, r"prefixes must be a sequence of \(key, value\) pairs"),
        (
            lambda x, p: {"x": x, "attn_mask": make_padding()[:, None, None], "key_padding_mask": make_padding()},
            ValueError, "attn_mask stands for key_padding_mask or bias: pass them, or attn_mask alone",
        ),
        (
            lambda x, p: {"x": x, "attn_mask": torch.zeros(7, 7), "bias": torch.zeros(1, 1, 7, 7)},
            ValueError, "attn_mask stands for key_padding_mask or bias: pass them, or attn_mask alone",
        ),
        (
            lambda x, p: {"x": x, "attn_mask": make_padding()},
            ValueError, r"attn_mask must broadcast to \(B, H, S, S\) = \(4, 4, 7, 7\), got \(4, 7\); .* is key_padding_mask",
        ),
        (lambda x, p: {"x": x, "attn_mask": torch.zeros(1, 1, 1, 7, 7)}, ValueError, r"attn_mask .* got \(1, 1, 1, 7, 7\)"),
        (lambda x, p: {"x": x, "attn_mask": torch.zeros(7, 7).long()}, TypeError, "bool or float tensor, got torch.int64"),
        (lambda x, p: {"x": x, "attn_mask": True}, TypeError, "bool or float tensor, got bool"),
        (lambda x, p: {"x": x, "key_padding_mask": make_padding().double()}, ValueError, "key_padding_mask must be bool"),
    ],
)  # fmt: skip
def test_forward_names_wrong_arguments(arguments, error, message):
    module, x = prompt_attention(), randn(BATCH, TOKENS, DIM)
    with pytest.raises(error, match=message):
        module(**arguments(x, module.prefix(x[:1])))


def test_prefix_names_a_wrong_shape():
    with pytest.raises(ValueError, match=r"prompts must be \(B, P, D\), got \(3, 32\)"):
        prompt_attention().prefix(randn(3, DIM))


class WithTable(nn.Module):
    """Attributes of timm's Attention and more."""

    def __init__(self, **extra):
        super().__init__()
        theirs = timm_attention()
        self.num_heads, self.head_dim, self.qkv, self.proj = theirs.num_heads, theirs.head_dim, theirs.qkv, theirs.proj
        self.q_norm, self.k_norm = theirs.q_norm, theirs.k_norm
        for name, value in extra.items():
            setattr(self, name, value)

    def forward(self, x):
        raise AssertionError("not called")


class Rotary(WithTable):
    def forward(self, x, rope=None, attn_mask=None):
        raise AssertionError("not called")


def subclassed():
    class Doubled(pytest.importorskip("timm.layers").Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x, attn_mask, is_causal)

    return Doubled(DIM, HEADS)


def hooked():
    attention = timm_attention()
    attention.register_forward_hook(lambda module, args, out: 2 * out)
    return attention


def test_from_attention_takes_a_module_that_has_no_more_than_timms_attributes():
    theirs = WithTable()
    ours = PromptAttention.from_attention(theirs)
    x = randn(BATCH, TOKENS, DIM)
    attended = by_reference(theirs, x, lambda q, k, v: reference.prompt_attention(q, k, v))
    close(ours(x), attended)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.MultiheadAttention(DIM, HEADS), TypeError, "MultiheadAttention has no qkv, q_norm, k_norm, proj"),
        (lambda: timm_attention(attn_drop=0.1), ValueError, r"no dropout, Attention.attn_drop.p is 0.1: set it to 0"),
        (lambda: timm_attention(proj_drop=0.2), ValueError, r"no dropout, Attention.proj_drop.p is 0.2: set it to 0"),
        (lambda: WithTable(table=nn.Parameter(torch.zeros(3))), TypeError, "WithTable has table, which PromptAttention does not"),
        (lambda: WithTable(index=nn.Buffer(torch.zeros(3))), TypeError, "WithTable has index, which PromptAttention does not"),
        (lambda: WithTable(rotary=nn.Identity()), TypeError, "WithTable has rotary, which PromptAttention does not"),
        (lambda: Rotary(), TypeError, "Rotary.forward takes rope, which PromptAttention does not reproduce"),
        (lambda: WithTable(scale=1.0), ValueError, r"WithTable.scale is 1.0, PromptAttention scales by head_dim \*\* -0.5"),
        (lambda: WithTable(head_dim=264), ValueError, "head dimension must be 1 to 256, got 264"),
        (lambda: subclassed(), TypeError, "Doubled overrides the forward of timm's Attention"),
        (lambda: hooked(), TypeError, "Attention has hooks, which PromptAttention would not run"),
        (lambda: WithTable(qkv=None), TypeError, "WithTable has no qkv: expected timm's Attention"),
    ],
)  # fmt: skip
def test_from_attention_refuses_what_it_can_not_reproduce(make, error, message):
    with pytest.raises(error, match=message):
        PromptAttention.from_attention(make())


@pytest.mark.parametrize("name", ["AttentionRope", "DiffAttention"])
def test_from_attention_refuses_timms_other_attentions(name):
    other = getattr(pytest.importorskip("timm.layers"), name, None)
    if other is None:
        pytest.skip(f"this timm has no {name}")
    with pytest.raises(TypeError, match="PromptAttention does not reproduce"):
        PromptAttention.from_attention(other(DIM, HEADS, qk_norm=True, norm_layer=nn.LayerNorm))
