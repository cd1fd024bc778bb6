"""timm encoders of a few thousand parameters, and what they give with prompts, out of timm's own parts."""

import pytest
import torch
from timm_windows import shifted_windows
from torch import nn

from mope_fast import MoPEConfig, MoPEFusion, PromptAttention

timm = pytest.importorskip("timm")
layers = timm.layers
vision_transformer = timm.models.vision_transformer
swin_transformer = timm.models.swin_transformer

CROSS, CLASSES = 10, 5
SETTINGS = {"num_experts": 4, "prompt_length": 3, "cross_routing_dim": 3}


class GatedAttention(layers.Attention):
    def __init__(self, *args, **settings):
        super().__init__(*args, gated=True, **settings)


class OurAttention(PromptAttention):
    def __init__(self, *args, **settings):
        super().__init__(*args, num_kv_heads=1, **settings)


DROPS = {"drop_rate": 0.4, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.5}
VITS = {
    "vit": {},
    "deit distilled": {"distilled": True},
    "dinov2": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True, "mlp_layer": layers.SwiGLUPacked},
    "clip": {"pre_norm": True, "norm_layer": nn.LayerNorm, "act_layer": "quick_gelu"},
    "siglip": {"class_token": False, "global_pool": "map"},
    "registers, no class token": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "average of maximum and mean": {"global_pool": "avgmax"},
    "norm behind the class token": {"fc_norm": True, "qkv_bias": False},
    "patches refined before pooling": {"global_pool": "prr"},
    "norms of queries and keys": {"qk_norm": True},
    "root mean square norms": {"qk_norm": True, "norm_layer": "rmsnorm"},
    "scale norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "gated": {"attn_layer": GatedAttention},
    "ours with shared keys": {"attn_layer": OurAttention},
    "dropout everywhere": {**DROPS, "pos_drop_rate": 0.3, "patch_drop_rate": 0.5},
    "image of another size": {"dynamic_img_size": True, "image": (12, 20)},
    "no positions": {"pos_embed": "none"},
}
SWINS = {
    "windows that fit": {},
    "one window a stage": {"image": (14, 14)},
    "padding": {"image": (30, 30)},
    "small windows": {"image": (28, 28), "patch_size": 4, "window_size": 4},
    "oblong": {"image": (20, 26), "window_size": (3, 5)},
    "shifted even where one window would do": {"always_partition": True},
    "image of another size": {"img_size": 28, "strict_img_size": False, "image": (18, 22), "window_size": 4},
    "head dim": {"head_dim": 6, "qkv_bias": False},
    "timm's layer norm": {"norm_layer": layers.LayerNorm},
    "dropout everywhere": DROPS,
    "maximum and mean side by side": {"global_pool": "catavgmax"},
}
VARIANTS = {f"{kind}: {name}": (kind, s) for kind, all_of in (("vit", VITS), ("swin", SWINS)) for name, s in all_of.items()}


def make_encoder(kind: str, **settings) -> nn.Module:
    """float64, in training mode, no parameter at zero or one."""
    image = settings.pop("image", None)
    if kind == "vit":
        cls = (
            timm.models.deit.VisionTransformerDistilled
            if settings.pop("distilled", False)
            else vision_transformer.VisionTransformer
        )
        defaults = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    else:
        cls = swin_transformer.SwinTransformer
        defaults = {
            "img_size": image or 28,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "mlp_ratio": 2,
        }
    encoder = cls(num_classes=CLASSES, **{**defaults, **settings}).double()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (1.0 if "relative_position" in name else 0.2))
    return encoder


def make_images(batch: int, kind: str, settings: dict) -> torch.Tensor:
    size = settings.get("image", (16, 16) if kind == "vit" else (28, 28))
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def make_cross(batch: int) -> torch.Tensor:
    return torch.randn(batch, CROSS, dtype=torch.float64)


def make_fusion(encoder: nn.Module, *, num_classes: int | None = None, **settings) -> MoPEFusion:
    """float64, eval mode; features of the other modality are passed in."""
    config = MoPEConfig(**{**SETTINGS, "cross_dim": CROSS, **settings})
    return MoPEFusion(encoder, None, num_classes, config).double().eval()


def vit_feature(encoder, images, prompts_of_layer):
    """timm's own blocks, one by one, on [prompts | tokens]: inside them nothing knows of positions."""
    x = encoder.norm_pre(encoder.patch_drop(encoder._pos_embed(encoder.patch_embed(images))))
    for i, block in enumerate(encoder.blocks):
        block.attn.fused_attn = False
        prompts = prompts_of_layer(i, x[:, 0] if encoder.has_class_token else x.sum(1) / x.shape[1])
        x = block(torch.cat([prompts, x], dim=1))[:, prompts.shape[1] :]
    return encoder.forward_head(encoder.norm(x), pre_logits=True)


def swin_maps(encoder, images, prompts_of_layer):
    """(B, H, W, C) behind each stage of timm's own blocks, windows concatenated with the prompts of their image."""
    x, index, maps = encoder.patch_embed(images), 0, []
    for stage in encoder.layers:
        x = stage.downsample(x)
        for block in stage.blocks:
            prompts = prompts_of_layer(index, x.sum((1, 2)) / (x.shape[1] * x.shape[2]))
            x = x + block.drop_path1(shifted_windows(block, block.norm1(x), block.norm1(prompts)))
            x = x + block.drop_path2(block.mlp(block.norm2(x)))
            index += 1
        maps.append(x)
    return maps


def swin_feature(encoder, images, prompts_of_layer):
    return encoder.forward_head(encoder.norm(swin_maps(encoder, images, prompts_of_layer)[-1]), pre_logits=True)


FEATURE = {"vit": vit_feature, "swin": swin_feature}


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def close(got, expected, tolerance=1e-9):
    """float64 on both sides: only the order of sums differs."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def gradients(model, *outputs):
    """Of all trained parameters, for upstream gradients that are the same in every call."""
    generator = torch.Generator().manual_seed(11)
    total = sum((out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() for out in outputs)
    parameters = trained(model)
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
