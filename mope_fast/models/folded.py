"""A trained model folded for inference."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..encoders import PromptedEncoder
from ..modules import FoldedBank, PromptBank
from .complementary import batch_of, head_inputs
from .image_config import ImageConfig
from .inputs import takes_named_inputs, two_sides
from .output import FusionOutput
from .prompting import Inputs, run_prompted, stacked_scores
from .sides import Sides, complementary_feature
from .task import apply_head


class FoldedModel(ImageConfig, nn.Module):
    """The result of :meth:`MoPEFusion.fold` and :meth:`PromptTuned.fold`: the same outputs, up to rounding, with less work.

    It runs the same frozen encoder object as the original model. It keeps working while the original is trained further, and is not
    affected by that training. :meth:`unwrap` of the original makes both unusable. It is for inference: it has no trained parameters
    and no loss. :meth:`for_export` prepares it for ``torch.export``, Inductor packages and ONNX (docs/export.md).

    Args:
        main: the encoder.
        bank: the trained prompts; None for no prompts.
        head: a module features -> logits, or None; it is copied.
        complementary: the source of psi_y, if prompts depend on it: a folded model, several sides, a callable, or None for
            features.
        return_logits: make ``forward`` return only the logits tensor.
        dense: whether the head reads feature maps.
    """

    def __init__(
        self,
        main: PromptedEncoder,
        bank: PromptBank | None,
        head: nn.Module | None,
        complementary: "FoldedModel | Sides | Callable[..., Tensor] | None" = None,
        *,
        return_logits: bool = False,
        dense: bool = False,
    ):
        super().__init__()
        self.main, self.return_logits, self.is_dense = main, return_logits, dense
        self.bank = None if bank is None else FoldedBank(bank, main.layers, main.dtype)
        self.head = None if head is None else copy.deepcopy(head).requires_grad_(False)
        self.complementary = complementary
        self.eval()

    @property
    def feature_width(self) -> int:
        """D of ``features``."""
        return self.main.feature_width

    @takes_named_inputs
    def forward(
        self,
        main_inputs: Inputs | None = None,
        complementary_inputs: Inputs | None = None,
        *,
        feature_maps: bool = False,
        tokens: bool = False,
        **named: Any,
    ) -> FusionOutput | Tensor:
        """Run one forward pass as :class:`MoPEFusion` or :class:`PromptTuned` does, without labels."""
        main_inputs, complementary_inputs = two_sides(self.main, self.complementary, main_inputs, complementary_inputs, named)
        output = self.outputs(main_inputs, complementary_inputs, feature_maps=feature_maps, tokens=tokens)
        if not self.return_logits:
            return output
        return output.features if output.logits is None else output.logits

    def outputs(
        self,
        main_inputs: Inputs,
        complementary_inputs: Inputs | None = None,
        *,
        feature_maps: bool = False,
        tokens: bool = False,
    ) -> FusionOutput:
        """Return all outputs, ignoring ``return_logits``."""
        cross = None
        if self.uses_cross:
            cross = complementary_feature(self.complementary, complementary_inputs, batch_of(self.main, main_inputs))
        encoded = run_prompted(
            self.main, self.bank, main_inputs, cross, feature_maps=feature_maps or self.is_dense, tokens=tokens
        )  # fmt: skip
        read = self.head_inputs(encoded.feature_maps if self.is_dense else encoded.feature, cross)
        return FusionOutput(
            logits=apply_head(self.head, *read), scores=stacked_scores(encoded), features=encoded.feature,
            feature_maps=encoded.feature_maps if feature_maps else None, tokens=encoded.tokens,
        )  # fmt: skip

    @property
    def uses_cross(self) -> bool:
        """Return whether prompts or the head depend on the complementary feature."""
        return self.bank is not None and self.bank.config.uses_cross

    def head_inputs(self, own: Tensor | tuple[Tensor, ...], cross: Tensor | None) -> list[Tensor | tuple[Tensor, ...]]:
        """Return the head's inputs."""
        return [own] if self.bank is None else head_inputs(self.bank.config, own, cross)

    def for_export(self, *outputs: str) -> nn.Module:
        """Return this model with plain outputs for ``torch.export``; the exported program can be loaded without mope_fast.

        Args:
            outputs: names out of "logits", "scores", "features", "feature_maps" and "tokens"; if none are given, the logits, or the
                features without a head.

        Returns:
            A module on the same weights, called with the same inputs. It returns a single output directly, several as a dict by
            name.

        Raises:
            ValueError: this model has no such output.
        """
        available = {
            "logits": self.head is not None,
            "scores": self.bank is not None and self.bank.routes,
            "features": True,
            "feature_maps": self.main.family.has_feature_maps,
            "tokens": self.main.family.has_tokens,
        }
        known = [name for name, exists in available.items() if exists]
        outputs = outputs or ("logits" if available["logits"] else "features",)
        if missing := [name for name in outputs if name not in known]:
            raise ValueError(f"for_export got {missing}, which this folded model does not return: it has {known}")
        return _PlainOutputs(self, outputs)

    def train(self, mode: bool = True) -> "FoldedModel":
        """Keep eval mode, whatever ``mode`` is."""
        return super().train(False)


class _PlainOutputs(nn.Module):
    """A folded model whose outputs use no class of this library."""

    def __init__(self, model: FoldedModel, outputs: tuple[str, ...]):
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(
        self, main_inputs: Inputs, complementary_inputs: Inputs | None = None
    ) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor | tuple[Tensor, ...]]:
        wanted = {name: name in self.outputs for name in ("feature_maps", "tokens")}
        output = self.model.outputs(main_inputs, complementary_inputs, **wanted)
        return output[self.outputs[0]] if len(self.outputs) == 1 else {name: output[name] for name in self.outputs}

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}"
