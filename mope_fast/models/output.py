"""What a fused model returns."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass
class FusionOutput:
    """Read by attribute, by name (``output["logits"]``) or by position; positions skip what is None, as in transformers."""

    loss: Tensor | None = None
    """Task loss + weighted importance loss; None without labels."""
    logits: Tensor | None = None
    """(B, num_classes); None without a head."""
    task_loss: Tensor | None = None
    importance_loss: Tensor | None = None
    """Mean over layers, not weighted."""
    scores: Tensor | None = None
    """(N, B, K) routing scores of each layer; None without dynamic prompts."""
    features: Tensor | None = None
    """(B, D), the main encoder's global feature."""
    feature_maps: tuple[Tensor, ...] | None = None
    """(B, C, H, W) of each stage of the main encoder, prompts seen, before any last norm; None unless asked for."""

    def to_tuple(self) -> tuple[Any, ...]:
        """All that is not None, in order."""
        return tuple(value for value in (getattr(self, f.name) for f in fields(self)) if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.__dataclass_fields__:
                raise KeyError(f"{key!r} is not one of {list(self.__dataclass_fields__)}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


def _flatten(output: FusionOutput) -> tuple[list[Any], None]:
    return [getattr(output, f.name) for f in fields(output)], None


def _unflatten(values: Iterable[Any], context: None) -> FusionOutput:
    return FusionOutput(*values)


# without it DDP with static_graph=True finds no tensor in a forward's result, and never averages gradients
register_pytree_node(FusionOutput, _flatten, _unflatten, serialized_type_name="mope_fast.FusionOutput")
