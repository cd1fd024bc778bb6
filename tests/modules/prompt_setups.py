"""Small prompts, inputs and frozen layers that the module tests share."""

import torch
from torch import nn

from mope_fast import MoPEConfig, MoPELayer, PromptBank

DIM, CROSS, HEADS, EXPERTS, LENGTH = 32, 20, 4, 4, 3
SETTINGS = {"num_experts": EXPERTS, "prompt_length": LENGTH, "cross_routing_dim": 3, "inter_routing_dim": 2}


def make_layer(**settings) -> MoPELayer:
    """float64, eval mode."""
    return MoPELayer(DIM, CROSS, **{**SETTINGS, **settings}).double().eval()


def make_bank(dims=(DIM, DIM), **settings) -> PromptBank:
    """float64, eval mode; its batch norm has statistics and an affine part that are not the identity."""
    bank = PromptBank(dims, CROSS, MoPEConfig(**{**SETTINGS, **settings})).double().eval()
    for module in bank.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return bank


def make_norm(**settings) -> nn.LayerNorm:
    norm = nn.LayerNorm(DIM, **settings).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


def make_inputs(batch: int, tokens: int = 7, dim: int = DIM):
    """Tokens, complementary feature, mapped prompt."""
    shapes = ((batch, tokens, dim), (batch, CROSS), (batch, dim))
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def close(got, expected, tolerance=1e-10):
    """float64 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
