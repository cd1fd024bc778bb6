"""The image configuration that timm's scripts read from a model."""

from typing import Any


class ImageConfig:
    """A mixin with the main encoder's ``pretrained_cfg``, or the complementary encoder's if only that is a timm model.

    timm's ``resolve_data_config(model=...)`` reads the images' size, mean and standard deviation from it.
    """

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Return the ``pretrained_cfg`` of a timm encoder.

        Raises:
            AttributeError: neither side is a timm encoder.
        """
        sides = (getattr(self, name, None) for name in ("main", "complementary"))
        found = next((found for side in sides if (found := getattr(side, "pretrained_cfg", None)) is not None), None)
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no pretrained_cfg: neither of its encoders is a timm model")
        return found

    default_cfg = pretrained_cfg
