"""VLMo's architectures (arXiv 2111.02358), as in its official code."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..._settings import check_types


@dataclass(frozen=True, kw_only=True)
class VLMoConfig:
    """A VLMo architecture. Defaults are those of VLMo-Base-plus; :meth:`named` returns any of the three official ones.

    Raises:
        TypeError: a value has a wrong type.
        ValueError: sizes are incompatible.
    """

    hidden_size: int = 544
    """D, the width of hidden states."""
    num_layers: int = 24
    num_heads: int = 16
    mlp_ratio: int = 4
    first_fusion_layer: int = 21
    """Index of the first layer with a vision-language expert; all later layers have one too. ``num_layers`` for none."""
    image_size: int = 224
    """Side length of images in pixels, a multiple of ``patch_size``."""
    patch_size: int = 16
    vocab_size: int = 30522
    max_text_length: int = 40
    """Number of text positions; also the length to which :class:`VLMoProcessor` pads."""
    absolute_positions: bool = True
    """Use learned absolute positions for both modalities; otherwise one relative position bias table for all layers."""
    layer_scale: float | None = None
    """Initial value of gamma_1 and gamma_2; None for no such parameters."""
    drop_path_rate: float = 0.1
    """Drop path rate of the last layer, rising linearly from 0; also the dropout of text embeddings. In training mode only."""
    mlm_head: bool = False
    """Include the masked language modelling head of pre-training (``mlm_score``), which a verbalizer needs."""

    def __post_init__(self):
        check_types(self)
        for name in (
            "hidden_size", "num_layers", "num_heads", "mlp_ratio", "image_size", "patch_size", "vocab_size", "max_text_length",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"VLMoConfig.{name} must be >= 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if not 0 <= self.first_fusion_layer <= self.num_layers:
            raise ValueError(f"first_fusion_layer must be 0 to num_layers={self.num_layers}, got {self.first_fusion_layer}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {self.drop_path_rate}")
        if not self.absolute_positions and self.max_text_length > TEXT_RANGE:
            raise ValueError(
                f"relative positions cover at most {TEXT_RANGE} text tokens, got max_text_length={self.max_text_length}"
            )

    @classmethod
    def named(cls, name: str, **overrides: Any) -> VLMoConfig:
        """Return the configuration "base", "base_plus" or "large", with some fields overridden.

        Raises:
            ValueError: the name is unknown.
        """
        if name not in _NAMED:
            raise ValueError(f"VLMo has the configurations {list(_NAMED)}, got {name!r}")
        return cls(**{**_NAMED[name], **overrides})

    @property
    def grid(self) -> int:
        """Number of patches along a side."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Number of image tokens: the class token and all patches."""
        return self.grid**2 + 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return asdict(self)


TEXT_RANGE = 196
"""Text length covered by relative positions in official checkpoints, for any ``max_text_length`` (``max_text_len_of_initckpt``)."""
_RELATIVE = {"absolute_positions": False, "layer_scale": 0.1}
_NAMED: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "first_fusion_layer": 10, **_RELATIVE},
    "base_plus": {},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "first_fusion_layer": 21, **_RELATIVE},
}
