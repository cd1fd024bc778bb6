"""VLMos and MoPE-BAFs of some thousand parameters with weights large enough to matter, and inputs for them."""

import torch
from torch import nn

from mope_fast import BAFConfig, MoPEBAF, VLMo

LENGTHS = {"text_prompt_length": 3, "image_prompt_length": 2, "unified_prompt_length": 2}
NONE = dict.fromkeys(LENGTHS, 0)
SIZES = {"hidden_size": 68, "num_heads": 2, "num_layers": 5, "first_fusion_layer": 3, "image_size": 48, "vocab_size": 50}
SIZES |= {"max_text_length": 9, "mlp_ratio": 2}
SMALL = {"hidden_size": 20, "num_layers": 2, "first_fusion_layer": 1, "image_size": 32, "mlp_ratio": 1}
"""For what is slow: compilers and the interpreter."""
CLASSES = 3


def randomize(module: nn.Module, scale: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return module


def make_vlmo(name: str = "base_plus", *, impl: str = "auto", seed: int = 1, **sizes) -> VLMo:
    """float64, eval mode."""
    torch.manual_seed(seed)
    return randomize(VLMo.from_config(name, impl=impl, **{**SIZES, **sizes}), 0.15).double().eval()


def make_baf(vlmo: VLMo | None = None, num_classes: int | None = CLASSES, *, own_head=None, seed: int = 2, **settings) -> MoPEBAF:
    """float64, eval mode; prompts, fusions and head random too. ``problem_type`` may be among the settings."""
    torch.manual_seed(seed)
    vlmo = make_vlmo() if vlmo is None else vlmo
    task = {name: settings.pop(name) for name in ("problem_type",) if name in settings}
    model = MoPEBAF(vlmo, num_classes if own_head is None else None, BAFConfig(**{**LENGTHS, **settings}), head=own_head, **task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.double().eval()


def make_inputs(batch: int = 4, text: int = 9, image_size: int = 48, seed: int = 3) -> dict[str, torch.Tensor]:
    """Ragged texts, padded at the end and in one sample in the middle."""
    torch.manual_seed(seed)
    mask = torch.arange(text) < torch.randint(text // 2, text + 1, (batch, 1))
    mask[:1] = True
    mask[:1, 3:5] = False
    return {
        "input_ids": torch.randint(1, 50, (batch, text)),
        "attention_mask": mask.long(),
        "pixel_values": torch.randn(batch, 3, image_size, image_size, dtype=torch.float64),
    }


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gradients(output: torch.Tensor, parameters: dict[str, nn.Parameter], upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every parameter, zeros where the output doesn't depend on it."""
    grads = torch.autograd.grad((output * upstream).sum(), list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, grads, strict=True))


def close(got, expected, tolerance=1e-10):
    """float64 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def all_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance=1e-10) -> None:
    """Relative to the largest value of each."""
    assert got.keys() == expected.keys()
    for name, truth in expected.items():
        bound = tolerance * max(1.0, truth.abs().max().item()) if truth.numel() else 0.0
        torch.testing.assert_close(got[name], truth, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")
