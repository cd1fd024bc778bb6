"""The settings of MoPE, each with its meaning and where its default comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._settings import Settings, check_types, setting

_PAPERS = {
    "num_experts": 16, "prompt_length": 6, "cross_routing_dim": 8, "inter_routing_dim": 2, "temperature": 0.1, "noise_std": 1 / 256,
    "top_k": None, "renormalize": False, "learn_keys": False, "dropout": 0.1, "dynamic_dropout": 0.0, "use_static": True,
    "use_dynamic": True, "use_mapped": True, "mapper_norm": "batch", "prompt_init": None, "expert_spread": 1.0,
    "importance_weight": 0.01,
    "importance_threshold": 0.1, "complementary_prompt_length": 4, "head_inputs": "main", "pooling": None, "router_pooling": None,
    "complementary_pooling": None, "side_dims": None, "combine": "concat", "side_dropout": 0.0,
}  # fmt: skip
"""What text and released code have in common."""
_PAPER = "MoPE v1 (arXiv 2403.10568), section 4.1"
_CODE = "the authors' released code"
_OURS = "ours"


@dataclass(kw_only=True, unsafe_hash=True)
class MoPEConfig(Settings):
    """Settings of :class:`PromptBank` and :class:`MoPEFusion`; ``MoPEConfig.describe()`` prints them with meaning and source."""

    num_experts: int = setting(16, "K, prompt experts a layer routes over", _PAPER)
    prompt_length: int = setting(6, "L, rows of the static and of the dynamic prompt", _PAPER)
    cross_routing_dim: int = setting(8, "d_c, router dimensions taken from the complementary feature", _PAPER)
    inter_routing_dim: int = setting(2, "d_i, router dimensions taken from the layer's own class token", _PAPER)
    temperature: float = setting(0.1, "tau, the router softmax is over logits / tau", _PAPER)
    noise_std: float = setting(1 / 256, "standard deviation of the noise on logits / tau, in training only", _CODE)
    top_k: int | None = setting(None, "keep the k largest scores, None keeps all (the paper's sparse gate is 1 and worse)", _PAPER)
    renormalize: bool = setting(False, "divide kept scores by their sum; only with top_k", _OURS)
    learn_keys: bool = setting(
        False, "train the routing keys; they are frozen from an orthogonal start (ablation: learned is worse)", _PAPER
    )
    dropout: float = setting(
        0.1,
        "on static prompts (one mask a step) and the mapped prompt",
        _CODE + ", which spares static ones behind the first",
    )
    dynamic_dropout: float = setting(
        0.0, "on dynamic prompts; the paper's text has it, the code does not; rules out K/V-space mixing in training", _CODE
    )
    use_static: bool = setting(True, "static prompts, P_s (ablation of table 2)", _PAPER)
    use_dynamic: bool = setting(True, "routed prompts, P_d (ablation of table 2)", _PAPER)
    use_mapped: bool = setting(True, "the complementary feature as one prompt, P_m (ablation of table 2)", _PAPER)
    mapper_norm: str = setting(
        "batch", "norm in the mapper's bottleneck: 'batch', 'layer' or 'none'", _PAPER + ", appendix A: batch norm"
    )
    prompt_init: float | None = setting(
        None,
        "static prompts and experts start uniform in +-prompt_init; None: sqrt(6 / (3 * 16 * 16 + D)), VPT's rule at 16 px patches",
        _CODE,
    )
    expert_spread: float = setting(
        1.0,
        "how far a layer's experts start from each other: at 1 each is drawn on its own, at 0 all are equal, and routing has no "
        "effect until training has parted them",
        _OURS,
    )
    mixing: str = setting("auto", "'prompt', 'kv', or 'auto': K/V space where it is exact and K < B", _OURS)
    importance_weight: float = setting(0.01, "weight of the importance loss", _PAPER)
    importance_threshold: float = setting(
        0.1, "a layer whose squared coefficient of variation is at most this has no importance loss", _PAPER
    )
    complementary_prompt_length: int = setting(4, "l', rows of vanilla prompts in a supported complementary encoder", _PAPER)
    head_inputs: str | None = setting(
        None,
        "what the head reads: 'main', the fused feature, as in the paper; 'both', the complementary feature beside it; None: "
        "'both' for the linear head of num_classes, 'main' for one of your own and where no prompt depends on the other side",
        _OURS,
    )
    pooling: str | None = setting(
        None,
        "of the main encoder's tokens into its feature: 'cls', 'mean', 'last', 'cls+mean' for both, or None for its family's own",
        _OURS,
    )
    router_pooling: str | None = setting(None, "of a layer's input, for the router; likewise", _OURS)
    complementary_pooling: str | None = setting(None, "of a supported complementary encoder's tokens into psi_y; likewise", _OURS)
    cross_dim: int | None = setting(None, "width of the complementary feature where it can't be inferred", _OURS)
    side_dims: tuple[int, ...] | None = setting(
        None,
        "widths of several complementary features that are given side by side as one: each has a mapped prompt of its own",
        _OURS,
    )
    combine: str = setting(
        "concat",
        "how the features of several sides become one: 'concat', side by side, each with a mapped prompt of its own; 'sum', of one "
        "width and with one mapped prompt, as the released code has audio and video",
        _OURS,
    )
    side_dropout: float = setting(
        0.0, "in training each sample's optional sides are taken for missing at this rate, each by itself", _OURS
    )

    def __post_init__(self):
        check_types(self)
        for name, least in (
            ("num_experts", 1), ("prompt_length", 1), ("cross_routing_dim", 1), ("inter_routing_dim", 1),
            ("noise_std", 0), ("importance_weight", 0), ("importance_threshold", 0), ("complementary_prompt_length", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"MoPEConfig.{name} must be >= {least}, got {getattr(self, name)}")
        if self.cross_dim is not None and self.cross_dim < 1:
            raise ValueError(f"MoPEConfig.cross_dim must be >= 1 or None, got {self.cross_dim}")
        if self.side_dims is not None:
            widths = self.side_dims if isinstance(self.side_dims, (tuple, list)) else (None,)
            if not widths or not all(type(width) is int and width >= 1 for width in widths):
                raise ValueError(f"MoPEConfig.side_dims must be integers >= 1 or None, got {self.side_dims!r}")
            if self.cross_dim not in (None, sum(widths)):
                raise ValueError(f"MoPEConfig.side_dims {tuple(widths)} add up to {sum(widths)}, but cross_dim is {self.cross_dim}")
            vars(self).update(side_dims=tuple(widths), cross_dim=sum(widths))  # a file has a list
        if self.num_experts > 1024:
            raise ValueError(f"MoPEConfig.num_experts must be at most 1024, got {self.num_experts}")
        if not self.temperature > 1e-30:  # 1 / temperature is a float32
            raise ValueError(f"MoPEConfig.temperature must be > 0, got {self.temperature}")
        for name in ("dropout", "dynamic_dropout", "side_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"MoPEConfig.{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.expert_spread <= 1:
            raise ValueError(f"MoPEConfig.expert_spread must be in [0, 1], got {self.expert_spread}")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"MoPEConfig.top_k must be 1 to num_experts ({self.num_experts}) or None, got {self.top_k}")
        if self.renormalize and self.top_k is None:
            raise ValueError("MoPEConfig.renormalize=True needs top_k: without a gate the scores add up to 1 already")
        if not (self.use_static or self.use_dynamic or self.use_mapped):
            raise ValueError("MoPEConfig has no prompt left: set use_static, use_dynamic or use_mapped")
        for name, choices in (
            ("mapper_norm", ("batch", "layer", "none")), ("mixing", ("auto", "prompt", "kv")),
            ("head_inputs", (None, "main", "both")), ("combine", ("concat", "sum")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"MoPEConfig.{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.mixing == "kv" and self.dynamic_dropout > 0:
            raise ValueError("MoPEConfig.mixing='kv' is not exact with dynamic_dropout > 0: use 'auto' or 'prompt'")
        if self.prompt_init is not None and not 0 < self.prompt_init < 1e38:  # the largest float32 is 3.4e38
            raise ValueError(f"MoPEConfig.prompt_init must be > 0 and finite, or None, got {self.prompt_init}")

    @classmethod
    def paper(cls, **changes: Any) -> MoPEConfig:
        """Make the settings of MoPE v1's text (arXiv 2403.10568, section 4.1), whatever the defaults are, with ``changes``."""
        return cls(**{**_PAPERS, "dynamic_dropout": 0.1, **changes})

    @classmethod
    def released(cls, **changes: Any) -> MoPEConfig:
        """Make those of the authors' released code, whatever the defaults are, with ``changes``.

        K is its command line's default, 4. Its batch norm is always in eval mode: an affine map, as is the layer before it.
        """
        return cls(**{**_PAPERS, "num_experts": 4, "mapper_norm": "none", **changes})

    def draw_experts(self, *shape: int) -> Tensor:
        """Draw experts (..., K, L, D) as they start."""
        bound = self.init_bound(shape[-1])
        experts = torch.empty(shape).uniform_(-bound, bound)
        return experts if self.expert_spread == 1 else torch.lerp(experts[..., :1, :, :], experts, self.expert_spread)

    @property
    def needs_cross(self) -> bool:
        """Whether any prompt depends on the complementary feature."""
        return self.use_dynamic or self.use_mapped

    @property
    def uses_cross(self) -> bool:
        """Whether prompts or the head depend on the complementary feature."""
        return self.needs_cross or self.head_inputs == "both"

    def init_bound(self, width: int) -> float:
        """Bound of the uniform start of prompts of this width."""
        return (6 / (3 * 16 * 16 + width)) ** 0.5 if self.prompt_init is None else self.prompt_init
