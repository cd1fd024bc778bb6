"""A trained model folded for inference."""

import copy
from collections.abc import Callable

from torch import Tensor, nn

from ..encoders import PromptedEncoder
from ..modules import FoldedBank, PromptBank
from .output import FusionOutput
from .prompting import Inputs, run_prompted
from .sides import check_same_batch, complementary_feature
from .task import apply_head


class FoldedModel(nn.Module):
    """What :meth:`MoPEFusion.fold` and :meth:`PromptTuned.fold` give: the same outputs, to rounding, with less work.

    It runs the same frozen encoder object as the model it comes from, and keeps working when that one is trained on (and doesn't
    learn from it); :meth:`unwrap` of that one ends both. It is for inference: it has no trained parameters and no loss.

    Args:
        main: the encoder.
        bank: the trained prompts; None for none.
        head: features -> logits, or None; copied.
        complementary: where psi_y comes from, if prompts depend on it: a folded model, a callable, or None for features.
    """

    def __init__(
        self,
        main: PromptedEncoder,
        bank: PromptBank | None,
        head: nn.Module | None,
        complementary: "FoldedModel | Callable[..., Tensor] | None" = None,
    ):
        super().__init__()
        self.main = main
        self.bank = None if bank is None else FoldedBank(bank, main.layers, main.dtype)
        self.head = None if head is None else copy.deepcopy(head).requires_grad_(False)
        self.complementary = complementary
        self.eval()

    @property
    def feature_width(self) -> int:
        """D of ``features``."""
        return self.main.feature_width

    def forward(
        self, main_inputs: Inputs, complementary_inputs: Inputs | None = None, *, feature_maps: bool = False
    ) -> FusionOutput:
        """As :class:`MoPEFusion`'s or :class:`PromptTuned`'s, without labels: logits, scores, features and feature maps."""
        cross = None
        if self.bank is not None and self.bank.config.needs_cross:
            cross = complementary_feature(self.complementary, complementary_inputs)
            check_same_batch(self.main, main_inputs, cross)
        features, scores, maps = run_prompted(self.main, self.bank, main_inputs, cross, feature_maps=feature_maps)
        return FusionOutput(logits=apply_head(self.head, features), scores=scores, features=features, feature_maps=maps)

    def train(self, mode: bool = True) -> "FoldedModel":
        """Stays in eval mode."""
        return super().train(False)
