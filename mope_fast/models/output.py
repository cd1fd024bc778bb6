"""What a fused model returns."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass
class FusionOutput:
    """Read by attribute, by name (``output["logits"]``), or by position as transformers' classifiers: (loss, logits).

    Without labels ``output[0]`` is the logits, or refused where the model's loss is more than their cross entropy (RuntimeError).
    ``output[1:]`` is the logits always. Without a head the features take their place.
    """

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
    """(B, C, H, W) of each stage of the main encoder, prompts seen, before any last norm; of an encoder without stages one, of its
    last layer's patches, normed. None unless asked for."""
    tokens: Tensor | None = None
    """(B, S, D) of the main encoder's last layer, prompts seen, normed as its own last hidden state; None unless asked for."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Loss, if there is one, and logits; without a head the features."""
        return tuple(value for value in self._positions() if value is not None)

    def _positions(self) -> tuple[Tensor | None, Tensor | None]:
        return self.loss, self.features if self.logits is None else self.logits

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.__dataclass_fields__:
                raise KeyError(f"{key!r} is not one of {list(self.__dataclass_fields__)}")
            return getattr(self, key)
        # a Trainer looks for logits behind a loss, even where it has made that itself
        return self._positions()[key] if isinstance(key, slice) else self.to_tuple()[key]

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


@dataclass
class UnlabelledOutput(FusionOutput):
    """Refuses ``output[0]``, which a Trainer takes for the loss, or for all that its own label smoothing needs."""

    _counted = False

    def __len__(self) -> int:
        # a Trainer's prediction counts the outputs before it takes the first; its label smoothing does not
        self._counted = True
        return super().__len__()

    def __getitem__(self, key: str | int | slice) -> Any:
        if key == 0 and not isinstance(key, (str, slice)) and not self._counted:
            raise RuntimeError(
                "output[0] of a forward without labels is no loss: read output.logits. If it was a Trainer: with "
                "label_smoothing_factor it keeps the labels and makes a loss of the logits alone, which is not this model's; leave "
                "it at 0 and make the model with label_smoothing=...; else its batches lack 'labels'"
            )
        return super().__getitem__(key)


def _flatten(output: FusionOutput) -> tuple[list[Any], None]:
    return [getattr(output, f.name) for f in fields(output)], None


def _unflatten(values: Iterable[Any], context: None) -> FusionOutput:
    return FusionOutput(*values)


def _unflatten_unlabelled(values: Iterable[Any], context: None) -> UnlabelledOutput:
    return UnlabelledOutput(*values)


# without it DDP with static_graph=True finds no tensor in a forward's result, and never averages gradients
register_pytree_node(FusionOutput, _flatten, _unflatten, serialized_type_name="mope_fast.FusionOutput")
register_pytree_node(
    UnlabelledOutput, _flatten, _unflatten_unlabelled, serialized_type_name="mope_fast.models.output.UnlabelledOutput"
)
