"""Adding a kind of prompt touches one list: two toy kinds reach every layer, folded and saved too, as the concatenation has it."""

import copy

import pytest
import torch
from tiny_fusion import INPUTS, MAKE, close, concatenated_feature, make_fusion, trained
from torch import nn

from mope_fast import MultiAdapter
from mope_fast.modules.kinds import KINDS, PromptKind

CROSS = 20


class LayerMark(PromptKind):
    """One trained row of each layer, the same for all samples, in front of the routed prompts."""

    name, before = "mark", True

    def wanted(self, config):
        return True

    def add_parameters(self, bank):
        for width, stack in bank.stacks.items():
            stack.mark = nn.Parameter(torch.randn(stack.layers, 1, int(width)))

    def rows(self, bank, cross):
        return {width: stack.mark[:, None] for width, stack in bank.stacks.items()}


class CrossPair(PromptKind):
    """The complementary feature as two more rows, the same for all layers, behind them."""

    name, before = "pair", False

    def wanted(self, config):
        return True

    def add_parameters(self, bank):
        bank.pair = nn.ModuleDict({width: nn.Linear(bank.cross_dim, 2 * int(width)) for width in bank.stacks})

    def rows(self, bank, cross):
        return {width: linear(cross.to(linear.weight.dtype)).unflatten(-1, (2, -1))[None] for width, linear in bank.pair.items()}


@pytest.fixture
def toys():
    KINDS.extend([LayerMark(), CrossPair()])
    yield
    del KINDS[-2:]


@pytest.mark.parametrize("mixing", ["prompt", "kv"])
@pytest.mark.parametrize("main", list(MAKE))
def test_new_kinds_equal_the_concatenation_folded_and_saved(main, mixing, toys, tmp_path):
    torch.manual_seed(0)
    encoder = MAKE[main]()
    plain = copy.deepcopy(encoder).requires_grad_(False).eval()
    plain.set_attn_implementation("eager")
    model = make_fusion(encoder, None, cross_dim=CROSS, mixing=mixing)
    inputs, cross = INPUTS[main](6), torch.randn(6, CROSS, dtype=torch.float64)
    context = model.bank.prepare(cross)
    lengths = []

    def prompts_of_layer(index, x):
        prompts = model.bank.layer(index, x, context).prompts
        lengths.append(prompts.shape[1])
        return prompts

    expected = concatenated_feature(plain, inputs, prompts_of_layer)
    length = model.config.prompt_length
    assert set(lengths) == {2 * length + 1 + 3}
    got = model(inputs, cross).features
    close(got, expected)
    parameters = trained(model.bank)
    assert any(name.endswith("mark") for name in parameters)
    assert any("pair" in name for name in parameters)
    grads = [torch.autograd.grad(feature.square().sum(), list(parameters.values())) for feature in (got, expected)]
    for mine, truth in zip(*grads, strict=True):
        close(mine, truth, 1e-9)

    close(model.fold()(inputs, cross).features, expected)
    with pytest.raises(ValueError, match="adapter 'a' has mark, pair prompts, which MultiAdapter doesn't support yet"):
        MultiAdapter({"a": model})
    model.save_pretrained(tmp_path)
    twin = make_fusion(model.unwrap()[0], None, cross_dim=CROSS, mixing=mixing)
    twin.load_pretrained(tmp_path)
    close(twin(inputs, cross).features, expected)
