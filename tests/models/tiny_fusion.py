"""Encoders of a few thousand parameters with weights large enough to matter, and inputs for them."""

import torch
from torch import nn
from transformers import BertConfig, BertModel, Dinov2Config, Dinov2Model

from mope_fast import MoPEConfig, MoPEFusion

WIDTHS = {"bert": 32, "dinov2": 48}
CLASSES = 5
SETTINGS = {"num_experts": 4, "prompt_length": 3, "complementary_prompt_length": 2, "cross_routing_dim": 3}
DETERMINISTIC = {"dropout": 0.0, "noise_std": 0.0}


def _randomize(encoder):
    for parameter in encoder.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder.double()


def make_bert(**settings) -> BertModel:
    defaults = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    defaults |= {"intermediate_size": 40, "max_position_embeddings": 24}
    return _randomize(BertModel(BertConfig(**{**defaults, **settings})))


def make_dinov2(**settings) -> Dinov2Model:
    defaults = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "mlp_ratio": 1,
        "image_size": 12,
        "patch_size": 4,
    }
    return _randomize(Dinov2Model(Dinov2Config(**{**defaults, **settings})))


MAKE = {"bert": make_bert, "dinov2": make_dinov2}


def make_text(batch: int, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Ragged, padded at the end and in one sample in the middle."""
    mask = torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (batch, 1))
    mask[0] = True
    mask[0, 3:5] = False
    return {"input_ids": torch.randint(1, 50, (batch, tokens)), "attention_mask": mask.long()}


def make_images(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 12, dtype=torch.float64)


INPUTS = {"bert": make_text, "dinov2": make_images}


def make_fusion(
    main="bert", complementary="dinov2", *, num_classes=CLASSES, head=None, problem_type=None, **settings
) -> MoPEFusion:
    """float64, eval mode; pass encoders or their family's name."""
    main, complementary = (MAKE[e]() if isinstance(e, str) else e for e in (main, complementary))
    more = {} if problem_type is None else {"problem_type": problem_type}
    config = MoPEConfig(**{**SETTINGS, **settings})
    return MoPEFusion(main, complementary, num_classes, config, head=head, **more).double().eval()


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def close(got, expected, tolerance=1e-10):
    """float64 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def extended_mask(mask, prompts):
    """Additive (B, 1, 1, P + S): prompts are visible to everyone."""
    visible = torch.cat([mask.new_ones(len(mask), prompts), mask], dim=1).bool()
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))[:, None, None, :]


def concatenated_feature(encoder, inputs, prompts_of_layer):
    """The library's own layers, one by one, on [prompts | tokens]; prompts' outputs are cut."""
    if isinstance(inputs, dict):
        x, mask = encoder.embeddings(inputs["input_ids"]), inputs["attention_mask"]
    else:
        x, mask = encoder.embeddings(inputs), None
    for i, layer in enumerate(encoder.encoder.layer):
        prompts = prompts_of_layer(i, x)
        length = prompts.shape[1]
        masks = () if mask is None else (extended_mask(mask, length),)
        sequence = layer(torch.cat([prompts, x], dim=1), *masks)
        x = sequence[:, length:]
    return (x if mask is not None else encoder.layernorm(x))[:, 0]
