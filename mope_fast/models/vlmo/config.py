"""Sizes of VLMo (arXiv 2111.02358), as its official code has them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..._settings import check_types


@dataclass(frozen=True, kw_only=True)
class VLMoConfig:
    """An architecture. Defaults are those of VLMo-Base-plus; :meth:`named` gives all three.

    Raises:
        TypeError: a value of another type.
        ValueError: sizes that don't go together.
    """

    hidden_size: int = 544
    """D."""
    num_layers: int = 24
    num_heads: int = 16
    mlp_ratio: int = 4
    first_fusion_layer: int = 21
    """The first layer with a vision-language expert; all behind it have one too. ``num_layers`` for none."""
    image_size: int = 224
    """Side in pixels, a multiple of ``patch_size``."""
    patch_size: int = 16
    vocab_size: int = 30522
    max_text_length: int = 40
    """Positions of text that there are; also the length to which :class:`VLMoProcessor` pads."""
    absolute_positions: bool = True
    """Learned absolute positions for both modalities; else one relative bias table of all layers."""
    layer_scale: float | None = None
    """What gamma_1 and gamma_2 start from; None for no such parameters."""
    drop_path_rate: float = 0.1
    """Of the last layer, rising linearly from 0; also the dropout of text embeddings. In training mode only."""
    mlm_head: bool = False
    """The head for masked words of the pre-training (``mlm_score``), which a verbalizer needs."""

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
            raise ValueError(f"relative positions reach {TEXT_RANGE} text tokens, got max_text_length={self.max_text_length}")

    @classmethod
    def named(cls, name: str, **overrides: Any) -> VLMoConfig:
        """ "base", "base_plus" or "large", with other values for some fields.

        Raises:
            ValueError: another name.
        """
        if name not in _NAMED:
            raise ValueError(f"VLMo has the configurations {list(_NAMED)}, got {name!r}")
        return cls(**{**_NAMED[name], **overrides})

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def image_tokens(self) -> int:
        """Class token and patches."""
        return self.grid**2 + 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


TEXT_RANGE = 196
"""Of the relative positions in official checkpoints, whatever ``max_text_length`` is (``max_text_len_of_initckpt``)."""
_RELATIVE = {"absolute_positions": False, "layer_scale": 0.1}
_NAMED: dict[str, dict[str, Any]] = {
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "first_fusion_layer": 10, **_RELATIVE},
    "base_plus": {},
    "large": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "first_fusion_layer": 21, **_RELATIVE},
}
