"""VLMos of a few thousand parameters with weights large enough to matter, and inputs for them."""

import torch

from mope_fast import VLMo, VLMoConfig

SIZES = {"num_layers": 3, "first_fusion_layer": 2, "mlp_ratio": 2, "patch_size": 4, "image_size": 12}
SIZES |= {"vocab_size": 30, "max_text_length": 7}
RELATIVE = {"absolute_positions": False, "layer_scale": 0.1}
CONFIGS = {
    "base_plus": {"hidden_size": 68, "num_heads": 2},
    "odd": {"hidden_size": 15, "num_heads": 3, "first_fusion_layer": 1},
    "base": {"hidden_size": 24, "num_heads": 3, **RELATIVE},
}
"""Dh = 34 as in Base-plus, Dh = 5, and Dh = 8 with relative positions and layer scale as in Base and Large."""
BATCH = 4


def make_config(name: str = "base", **overrides) -> VLMoConfig:
    return VLMoConfig(**{**SIZES, **CONFIGS[name], **overrides})


def make_vlmo(name: str = "base", *, impl: str = "auto", **overrides) -> VLMo:
    """float64, eval mode, no parameter at zero or one."""
    model = VLMo(make_config(name, **overrides), impl=impl).double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1.0 if "relative_position" in key else 0.2))
    return model


def make_text(batch: int = BATCH, tokens: int = 7) -> dict[str, torch.Tensor]:
    """Padded at the end, none in the first sample, and all but the class token in the last."""
    lengths = torch.linspace(tokens, 1, batch).long()
    return {
        "input_ids": torch.randint(1, SIZES["vocab_size"], (batch, tokens)),
        "attention_mask": (torch.arange(tokens) < lengths[:, None]).long(),
    }


def make_images(batch: int = BATCH, side: int = 12) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, side, side, dtype=torch.float64)}


def make_inputs(modality: str = "joint", batch: int = BATCH, *, tokens: int = 7, side: int = 12) -> dict[str, torch.Tensor]:
    """Keyword arguments of a "joint", "text" or "image" pass."""
    text = {} if modality == "image" else make_text(batch, tokens)
    return text if modality == "text" else text | make_images(batch, side)


def given(output) -> list[torch.Tensor]:
    return [value for value in output if value is not None]


def weighted(outputs) -> torch.Tensor:
    """A scalar with other weights for each number, the same in every call."""
    generator = torch.Generator().manual_seed(11)
    return sum((out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() for out in outputs)


def close(got, expected, tolerance=1e-10):
    """float64 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
