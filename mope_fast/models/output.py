"""The output of a fused model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node


@dataclass
class FusionOutput:
    """The output of a fused model, read by attribute, by name (``output["logits"]``), or by position: (loss, logits).

    Positions are those of transformers' classifiers. Without labels ``output[0]`` is the logits; it raises RuntimeError if the
    model's loss is more than their cross entropy. ``output[1:]`` always contains the logits. Without a head the features take the
    place of the logits.
    """

    loss: Tensor | None = None
    """Task loss + weighted importance loss; None without labels."""
    logits: Tensor | None = None
    """(B, num_classes); None without a head."""
    task_loss: Tensor | None = None
    importance_loss: Tensor | None = None
    """Mean over layers, before ``importance_weight`` is applied."""
    scores: Tensor | None = None
    """(N, B, K) routing scores of each layer; None without dynamic prompts."""
    features: Tensor | None = None
    """(B, D), the main encoder's global feature."""
    feature_maps: tuple[Tensor, ...] | None = None
    """(B, C, H, W) for each stage of the main encoder, computed with prompts, before any final norm. An encoder without stages has
    one map, of its last layer's patches, after the final norm. None unless requested."""
    tokens: Tensor | None = None
    """(B, S, D) hidden states of the main encoder's last layer, computed with prompts, normed as its own last hidden state; None
    unless requested."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the loss, if present, and the logits, or the features without a head."""
        return tuple(value for value in self._positions() if value is not None)

    def _positions(self) -> tuple[Tensor | None, Tensor | None]:
        return self.loss, self.features if self.logits is None else self.logits

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.__dataclass_fields__:
                raise KeyError(f"{key!r} is not one of {list(self.__dataclass_fields__)}")
            return getattr(self, key)
        # a Trainer takes output[1:] as the logits even if it computed the loss itself
        return self._positions()[key] if isinstance(key, slice) else self.to_tuple()[key]

    def __len__(self) -> int:
        return len(self.to_tuple())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


@dataclass
class UnlabelledOutput(FusionOutput):
    """An output without labels that refuses ``output[0]``.

    A Trainer takes ``output[0]`` for the loss, or, with its own label smoothing, computes the whole loss from it.
    """

    _counted = False

    def __len__(self) -> int:
        # a Trainer calls len() before it reads output[0] in prediction, but not for its label smoothing
        self._counted = True
        return super().__len__()

    def __getitem__(self, key: str | int | slice) -> Any:
        if key == 0 and not isinstance(key, (str, slice)) and not self._counted:
            raise RuntimeError(
                "output[0] of a forward without labels is no loss: read output.logits. If a Trainer read it: with "
                "label_smoothing_factor it withholds the labels and computes a loss from the logits alone, which is not this "
                "model's loss; leave it at 0 and create the model with label_smoothing=...; otherwise its batches lack 'labels'"
            )
        return super().__getitem__(key)


def _flatten(output: FusionOutput) -> tuple[list[Any], None]:
    return [getattr(output, f.name) for f in fields(output)], None


def _unflatten(values: Iterable[Any], context: None) -> FusionOutput:
    return FusionOutput(*values)


def _unflatten_unlabelled(values: Iterable[Any], context: None) -> UnlabelledOutput:
    return UnlabelledOutput(*values)


# otherwise DDP with static_graph=True finds no tensors in the output and never averages gradients
register_pytree_node(FusionOutput, _flatten, _unflatten, serialized_type_name="mope_fast.FusionOutput")
register_pytree_node(
    UnlabelledOutput, _flatten, _unflatten_unlabelled, serialized_type_name="mope_fast.models.output.UnlabelledOutput"
)
