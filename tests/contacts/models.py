"""Models that contacts share, so that what one of them breaks the next one meets."""

import functools
from typing import Any

import tiny_fusion
import tiny_timm
import torch
from judge import kept_folder
from tiny_fusion import make_bert, make_dinov2, make_images, make_text

from mope_fast import FeatureCache, MoPEFusion, MultiAdapter, PromptedEncoder, PromptTuned

CROSS = 20
DETERMINISTIC = {"dropout": 0.0, "noise_std": 0.0, "cross_dim": CROSS}


def make_cross(batch: int) -> torch.Tensor:
    return torch.randn(batch, CROSS, dtype=torch.float64)


@functools.cache
def text_fusion() -> MoPEFusion:
    """BERT, with features of the other side."""
    with torch.random.fork_rng():
        torch.manual_seed(10)
        return tiny_fusion.make_fusion(make_bert(), None, **DETERMINISTIC)


@functools.cache
def shared_encoder() -> PromptedEncoder:
    return PromptedEncoder(make_bert())


@functools.cache
def a_model(name: str) -> Any:
    """By name; called with the inputs that :func:`a_request` gives."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        if name == "text":
            return text_fusion()
        if name == "pair":
            return tiny_fusion.make_fusion(dropout=0.0, noise_std=0.0)
        if name in ("vit", "swin"):
            return tiny_timm.make_fusion(tiny_timm.make_encoder(name), num_classes=5, dropout=0.0, noise_std=0.0)
        if name == "cached":
            cache = FeatureCache(kept_folder(), make_dinov2().eval())
            return tiny_fusion.make_fusion(make_bert(), cache, dropout=0.0, noise_std=0.0)
        if name in ("tuned", "longer"):
            return PromptTuned(shared_encoder(), 2 if name == "tuned" else 5, 3, dropout=0.0).double().eval()
        if name == "routed":
            return tiny_fusion.make_fusion(shared_encoder(), None, **DETERMINISTIC)
        if name == "folded":
            return a_model("routed").fold()
        return MultiAdapter({each: a_model(each) for each in ("tuned", "longer", "routed")})


NAMES = ("text", "pair", "vit", "swin", "cached", "tuned", "longer", "routed", "folded", "multi")
ON_ONE_ENCODER = ("tuned", "longer", "routed", "folded", "multi")


def a_request(name: str, batch: int) -> tuple[Any, ...]:
    """Random inputs of a model."""
    if name in ("vit", "swin"):
        return tiny_timm.make_images(batch, name, {}), tiny_timm.make_cross(batch)
    if name in ("pair", "cached"):
        return make_text(batch), make_images(batch)
    if name in ("tuned", "longer"):
        return (make_text(batch),)
    if name == "multi":
        ids = torch.arange(batch) % 3
        return make_text(batch), ids, {"routed": make_cross(batch)}
    return make_text(batch), make_cross(batch)


@functools.cache
def served(name: str) -> tuple[Any, list[tuple[Any, ...]], list[torch.Tensor]]:
    """A model, four requests, and what each gives alone."""
    model = a_model(name)
    with torch.random.fork_rng():
        torch.manual_seed(12)
        requests = [a_request(name, 2 + i % 2) for i in range(4)]
    expected = [model(*request).logits.detach() for request in requests]
    if name == "cached":
        model.complementary.flush()
    return model, requests, expected


def gradients(model: torch.nn.Module, request: tuple[Any, ...]) -> list[torch.Tensor]:
    """Of all trained parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(*request).logits.square().sum(), parameters, materialize_grads=True))
