"""What timm's scripts ask a model about its images."""

from typing import Any


class ImageConfig:
    """Has the main encoder's ``pretrained_cfg``; or the complementary one's, where only that is timm's.

    timm's ``resolve_data_config(model=...)`` takes size, mean and deviation of the images from it.
    """

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Of a timm encoder.

        Raises:
            AttributeError: neither side is one.
        """
        sides = (getattr(self, name, None) for name in ("main", "complementary"))
        found = next((found for side in sides if (found := getattr(side, "pretrained_cfg", None)) is not None), None)
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no pretrained_cfg: neither of its encoders is timm's")
        return found

    default_cfg = pretrained_cfg
