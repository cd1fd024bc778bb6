import copy
import itertools

import pytest
import torch
from prompt_setups import CROSS, DIM, HEADS, LENGTH, SETTINGS, close, make_bank, make_inputs
from torch import nn

from mope_fast import MoPEConfig, MoPELayer, PromptBank
from mope_fast.encoders import PromptedLayer


def layers_of(bank):
    """One MoPELayer for each of the bank's layers, with copied parameters."""
    d_c = bank.config.cross_routing_dim
    seen = dict.fromkeys(bank.dims, 0)
    settings = {key: value for key, value in bank.config.to_dict().items() if key != "cross_dim"}
    layers = []
    for i, width in enumerate(bank.dims):
        stack, position = bank.stacks[str(width)], seen[width]
        seen[width] += 1
        layer = MoPELayer(width, CROSS, **settings).double().eval()
        state = {
            "static_prompt": stack.static_prompt[position],
            "experts": stack.experts[position],
            "keys": bank.keys[i],
            "inter_proj.weight": stack.inter_weight[position],
            "inter_proj.bias": stack.inter_bias[position],
            "cross_proj.weight": bank.cross_proj.weight[i * d_c : (i + 1) * d_c],
            "cross_proj.bias": bank.cross_proj.bias[i * d_c : (i + 1) * d_c],
        }
        layer.load_state_dict(state)
        layers.append(layer)
    return layers


def stacked_grads(bank, layers):
    """The layers' gradients in the bank's stacking."""
    grads = {
        "cross_proj.weight": torch.cat([layer.cross_proj.weight.grad for layer in layers]),
        "cross_proj.bias": torch.cat([layer.cross_proj.bias.grad for layer in layers]),
    }
    if bank.config.learn_keys:
        grads["keys"] = torch.stack([layer.keys.grad for layer in layers])
    names = {
        "static_prompt": "static_prompt",
        "experts": "experts",
        "inter_weight": "inter_proj.weight",
        "inter_bias": "inter_proj.bias",
    }
    for width in set(bank.dims):
        group = [layer for layer in layers if layer.dim == width]
        for ours, theirs in names.items():
            grads[f"stacks.{width}.{ours}"] = torch.stack([layer.get_parameter(theirs).grad for layer in group])
    return grads


def test_a_loop_of_ones_own_compiles_as_one_graph():
    bank = make_bank(mixing="prompt")
    x, features = torch.randn(2, 5, DIM).double(), torch.randn(2, CROSS).double()

    def loop(x, features):
        context = bank.prepare(features)
        return [bank.layer(index, x, context).prompts for index in range(len(bank.dims))]

    for got, expected in zip(torch.compile(loop, fullgraph=True, backend="eager")(x, features), loop(x, features), strict=True):
        close(got, expected)


@pytest.mark.parametrize("dims", [(DIM, DIM, DIM), (48, DIM, 48, DIM)])
@pytest.mark.parametrize("settings", [{"mixing": "prompt"}, {"mixing": "kv"}, {"mixing": "kv", "top_k": 2, "learn_keys": True}])
def test_bank_equals_separate_layers(dims, settings):
    torch.manual_seed(0)
    bank = make_bank(dims, **settings)
    layers, mapper = layers_of(bank), copy.deepcopy(bank.mapper)
    cross = make_inputs(5)[1]
    cross_again = cross.detach().clone().requires_grad_()
    tokens = [torch.randn(5, 7, width, dtype=torch.float64) for width in dims]
    frozen = [(nn.LayerNorm(w).double(), nn.Linear(w, w).double(), nn.Linear(w, w).double()) for w in dims]

    context, mapped = bank.prepare(cross), mapper(cross_again)
    losses = [0.0, 0.0]
    for i, (x, parts, layer) in enumerate(zip(tokens, frozen, layers, strict=True)):
        outputs = bank.layer(i, x, context), layer(x, cross_again, mapped[dims[i]])
        results = [(o.prompts, o.scores, *sum(o.key_value(*parts, HEADS), ())) for o in outputs]
        for side in (0, 1):
            generator = torch.Generator().manual_seed(i)
            losses[side] += sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in results[side])
        for ours, theirs in zip(*results, strict=True):
            close(ours, theirs)

    for loss in losses:
        loss.backward()
    expected = {**stacked_grads(bank, layers), **{f"mapper.{name}": p.grad for name, p in mapper.named_parameters()}}
    got = {name: p.grad for name, p in bank.named_parameters()}
    assert got.keys() == expected.keys()
    for name in got:
        close(got[name], expected[name])
    close(cross.grad, cross_again.grad)


def test_complementary_half_is_computed_once_for_all_layers():
    torch.manual_seed(1)
    bank = make_bank((DIM, DIM, DIM))
    calls = []
    bank.mapper.register_forward_hook(lambda *args: calls.append("mapper"))
    x, cross, _ = make_inputs(3)
    context = bank.prepare(cross)
    for i in range(3):
        _ = bank.layer(i, x, context).prompts
    assert calls == ["mapper"]
    assert [prompts.router.cross.shape for prompts in context.stages] == [(3, SETTINGS["num_experts"])] * 3


@pytest.mark.parametrize(
    ("use_static", "use_dynamic", "use_mapped"), [flags for flags in itertools.product([True, False], repeat=3) if any(flags)]
)
def test_ablated_bank_gives_exactly_the_remaining_prompts(use_static, use_dynamic, use_mapped):
    flags = {"static": use_static, "dynamic": use_dynamic, "mapped": use_mapped}
    torch.manual_seed(2)
    full, ablated = make_bank(), make_bank(use_static=use_static, use_dynamic=use_dynamic, use_mapped=use_mapped)
    ablated.load_state_dict({key: value for key, value in full.state_dict().items() if key in ablated.state_dict()})
    linear = nn.Linear(DIM, DIM).double()
    x, cross, _ = make_inputs(6)
    everything = full.layer(1, x, full.prepare(cross))
    out = ablated.layer(1, x, ablated.prepare(cross if use_dynamic or use_mapped else None))
    expected = torch.cat([getattr(everything, name) for name, used in flags.items() if used], dim=1)
    close(out.prompts, expected, 0)
    prefixes = out.key_value(None, linear, linear, HEADS)
    # batch 1 of static prompts broadcasts against the others
    keys = torch.cat([k.expand(6, -1, -1, -1) for k, _ in prefixes], dim=2)
    close(keys, linear(expected).unflatten(-1, (HEADS, -1)).transpose(1, 2))
    assert len(prefixes) == use_static + (use_dynamic or use_mapped)


def test_static_prompts_are_projected_for_batch_one():
    torch.manual_seed(3)
    bank, linear = make_bank(), nn.Linear(DIM, DIM).double()
    x, cross, _ = make_inputs(6)
    (static_keys, _), (keys, _) = bank.layer(0, x, bank.prepare(cross)).key_value(None, linear, linear, HEADS)
    assert static_keys.shape == (1, HEADS, LENGTH, DIM // HEADS)
    assert keys.shape == (6, HEADS, LENGTH + 1, DIM // HEADS)


def test_bank_state_dict_is_stacked_by_width():
    shapes = {key: tuple(v.shape) for key, v in make_bank((48, DIM, 48), mapper_norm="none").state_dict().items()}
    expected = {"cross_proj.weight": (9, CROSS), "cross_proj.bias": (9,), "keys": (3, 4, 5)}
    expected |= {"mapper.down.weight": (10, CROSS), "mapper.down.bias": (10,)}
    for width, layers in ((DIM, 1), (48, 2)):
        expected |= {
            f"stacks.{width}.static_prompt": (layers, LENGTH, width),
            f"stacks.{width}.experts": (layers, 4, LENGTH, width),
            f"stacks.{width}.inter_weight": (layers, 2, width),
            f"stacks.{width}.inter_bias": (layers, 2),
            f"mapper.up.{width}.weight": (width, 10),
            f"mapper.up.{width}.bias": (width,),
        }
    assert shapes == expected


def test_bank_starts_like_separate_layers():
    torch.manual_seed(4)
    bank, layer = make_bank((DIM,)), MoPELayer(DIM, CROSS, **SETTINGS)
    stack = bank.stacks[str(DIM)]
    pairs = [
        (stack.static_prompt, layer.static_prompt),
        (stack.experts, layer.experts),
        (stack.inter_weight, layer.inter_proj.weight),
    ]
    for ours, theirs in pairs:
        # both are uniform: their largest entries lie close to one bound
        close(ours.abs().max().float(), theirs.abs().max(), 0.15)


def test_each_layer_has_keys_and_noise_of_its_own():
    bank, cross = make_bank((DIM, DIM, DIM), noise_std=0.5), make_inputs(5)[1]
    logits, noisy = (
        torch.stack([prompts.router.cross for prompts in each.prepare(cross).stages]) for each in (bank.eval(), bank.train())
    )
    for values in (bank.keys, noisy - logits):
        assert not any(torch.allclose(one, other) for one, other in itertools.combinations(values, 2))


def test_layer_refuses_another_batch_than_the_contexts():
    bank = make_bank()
    context = bank.prepare(make_inputs(3)[1])
    with pytest.raises(ValueError, match="x has batch 2, expected 3"):
        bank.layer(0, make_inputs(2)[0], context)


def test_a_context_for_frozen_layers_gives_prefixes_and_prompts():
    bank, (x, cross, _) = make_bank(), make_inputs(5)
    layer = PromptedLayer(None, None, DIM, None, nn.Linear(DIM, DIM).double(), nn.Linear(DIM, DIM).double(), HEADS)
    context = bank.prepare(cross, [layer] * 2, x.dtype)
    expected, out = (bank.layer(0, x, each) for each in (bank.prepare(cross), context))
    close(out.prompts, expected.prompts)
    prefixes, scores = context.prefixes(0, x[:, 0])
    close(scores, expected.scores)
    pairs = expected.key_value(None, layer.k_proj, layer.v_proj, HEADS)
    for index in range(2):
        close(*(torch.cat([each[index].expand(5, -1, -1, -1) for each in own], dim=2) for own in (prefixes, pairs)))
    with pytest.raises(ValueError, match="layer 1 has batch 2, complementary features have 5"):
        context.prefixes(1, x[:2, 0])


@pytest.mark.parametrize("batch", [3, 9])
def test_functorch_differentiates_by_all_parameters(batch):
    torch.manual_seed(5)
    model = nn.ModuleDict({"bank": make_bank(), "k": nn.Linear(DIM, DIM).double(), "v": nn.Linear(DIM, DIM).double()})
    x, cross, _ = (t.detach() for t in make_inputs(batch))

    def keys(parameters):
        return torch.func.functional_call(Keys(model), {f"model.{name}": p for name, p in parameters.items()}, (x, cross))

    parameters = dict(model.named_parameters())
    grads = torch.func.grad(keys)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(keys(parameters), list(parameters.values()), allow_unused=True)
    for name, truth in zip(parameters, expected, strict=True):
        close(grads[name], torch.zeros_like(grads[name]) if truth is None else truth)


class Keys(nn.Module):
    """The keys of a bank's first layer, projected ahead where that is allowed."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, cross):
        layer = PromptedLayer(None, None, DIM, None, self.model["k"], self.model["v"], HEADS)
        prefixes, _ = self.model["bank"].prepare(cross, [layer] * 2, x.dtype).prefixes(0, x[:, 0])
        return sum(keys.square().sum() for keys, _ in prefixes)


def test_prepare_names_a_wrong_complementary_feature():
    with pytest.raises(ValueError, match=r"cross must be \(B, 20\), got \(2, 21\)"):
        make_bank().prepare(torch.zeros(2, 21, dtype=torch.float64))
    with pytest.raises(TypeError, match="got NoneType"):
        make_bank().prepare()


@pytest.mark.parametrize(
    "make", [lambda c: PromptBank([8, 8], 6, c).stacks["8"].experts, lambda c: MoPELayer(8, **c.to_dict()).experts]
)
def test_experts_start_as_far_from_each_other_as_is_set(make):
    def spread(value):
        torch.manual_seed(0)
        return make(MoPEConfig(num_experts=5, expert_spread=value, prompt_init=0.5, cross_dim=6)).detach()

    apart, equal, between = spread(1.0), spread(0.0), spread(0.25)
    first = apart[..., :1, :, :]
    assert (apart - first).abs().amax() > 0.5
    assert torch.equal(equal, first.expand_as(apart))
    torch.testing.assert_close(between, first + 0.25 * (apart - first))
    if apart.dim() == 4:
        assert not torch.equal(equal[0], equal[1]), "layers don't share theirs"
