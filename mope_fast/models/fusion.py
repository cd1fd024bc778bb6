"""MoPEFusion: two modalities fused inside one frozen encoder (MoPE, arXiv 2403.10568)."""

import dataclasses
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..encoders import PromptedEncoder, find_family
from ..encoders.families import family_of
from ..modules import MoPEConfig, PromptBank
from . import checkpoint
from .output import FusionOutput

Inputs = Tensor | dict[str, Any]


def _regression_loss(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape not in (logits.shape, logits.squeeze(-1).shape):
        raise ValueError(f"regression labels must have the shape of logits {tuple(logits.shape)}, got {tuple(labels.shape)}")
    return F.mse_loss(logits, labels.to(logits.dtype).view_as(logits))


TASK_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "single_label_classification": F.cross_entropy,
    "multi_label_classification": lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype)),
    "regression": _regression_loss,
}


class MoPEFusion(nn.Module):
    """A frozen main encoder whose every layer takes prompts routed by a complementary modality.

    Args:
        main: a supported encoder; held frozen and in eval mode.
        complementary: where psi_y comes from: a supported encoder (its global feature, with vanilla prompts of
            ``config.complementary_prompt_length`` in its layers), any callable that gives (B, cross_dim) features (a module is held
            frozen, in eval mode and without gradient; a plain function may train parameters of its own), or None: then the
            features themselves are passed to ``forward``.
        num_classes: outputs of the linear head; None for no head (``logits`` is None, use ``features``).
        config: see :class:`MoPEConfig`; ``config.cross_dim`` is needed unless ``complementary`` is a supported encoder.
        head: a head of your own, (B, D) -> (B, num_classes), in place of the linear one.
        problem_type: "single_label_classification" (labels (B,) int64), "multi_label_classification" (labels (B, C) in 0..1) or
            "regression".

    Example:
        >>> model = MoPEFusion(main=bert, complementary=dinov2, num_classes=13)
        >>> output = model({"input_ids": ids, "attention_mask": mask}, images, labels)
        >>> output.loss.backward()
    """

    def __init__(
        self,
        main: nn.Module,
        complementary: nn.Module | Callable[..., Tensor] | None = None,
        num_classes: int | None = None,
        config: MoPEConfig | None = None,
        *,
        head: nn.Module | None = None,
        problem_type: str = "single_label_classification",
    ):
        super().__init__()
        if problem_type not in TASK_LOSSES:
            raise ValueError(f"problem_type must be one of {list(TASK_LOSSES)}, got {problem_type!r}")
        if head is not None and num_classes is not None:
            raise ValueError("give num_classes for a linear head or head for one of your own, not both")
        if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
        if complementary is not None and not callable(complementary):
            raise TypeError(f"complementary must be a supported encoder, a callable or None, got {type(complementary).__name__}")
        config = MoPEConfig() if config is None else config
        family_of(main)
        encodes = complementary is not None and find_family(complementary) is not None
        cross_dim = family_of(complementary).feature_width(complementary) if encodes else config.cross_dim
        if encodes and config.cross_dim not in (None, cross_dim):
            raise ValueError(
                f"config.cross_dim is {config.cross_dim}, but {type(complementary).__name__} gives features of width {cross_dim}"
            )
        if config.needs_cross and cross_dim is None:
            raise ValueError("the width of the complementary feature can't be inferred: set MoPEConfig(cross_dim=...)")

        self.config = dataclasses.replace(config, cross_dim=cross_dim)
        self.problem_type = problem_type
        self.main = PromptedEncoder(main)
        self.complementary = complementary
        self.complementary_bank = None
        try:
            if encodes:
                self.complementary = PromptedEncoder(complementary)
                if config.complementary_prompt_length:
                    self.complementary_bank = PromptBank(self.complementary.widths, None, _vanilla(config))
            elif isinstance(complementary, nn.Module):
                complementary.requires_grad_(False).eval()
            self.bank = PromptBank(self.main.widths, cross_dim, self.config)
            self.head = head if num_classes is None else nn.Linear(self.main.feature_width, num_classes)
        except BaseException:
            self.unwrap()
            raise

    def forward(
        self, main_inputs: Inputs, complementary_inputs: Inputs | None = None, labels: Tensor | None = None
    ) -> FusionOutput:
        """One pass.

        Args:
            main_inputs: the main encoder's input, or a dict of its keyword arguments.
            complementary_inputs: likewise; or the features (B, cross_dim) where ``complementary`` is None; None where no prompt
                needs them.
            labels: see ``problem_type``; gives ``loss``.
        """
        config = self.config
        cross = self.complementary_feature(complementary_inputs) if config.needs_cross else None
        context = self.bank.prepare(cross)
        scores: list[Tensor] = []
        features = self.main(main_inputs, _provider(self.bank, context, self.main.layers, scores))
        if self.head is None:
            if labels is not None:
                raise ValueError("labels need a head: give num_classes or head to MoPEFusion")
            logits = None
        else:
            logits = self.head(features.to(next((p.dtype for p in self.head.parameters()), features.dtype)))

        stacked = torch.stack(scores) if scores else None
        importance = features.new_zeros(())
        if stacked is not None:
            importance = functional.importance_loss(stacked, threshold=config.importance_threshold)
        task_loss = loss = None
        if labels is not None:
            task_loss = TASK_LOSSES[self.problem_type](logits, labels)
            loss = task_loss + config.importance_weight * importance
        return FusionOutput(loss, logits, task_loss, importance, stacked, features)

    def complementary_feature(self, inputs: Inputs | None) -> Tensor:
        """psi_y, (B, cross_dim)."""
        if inputs is None:
            raise ValueError("complementary_inputs is None, but the prompts depend on the complementary modality")
        if self.complementary is None:
            return inputs
        if self.complementary_bank is not None:
            context = self.complementary_bank.prepare()
            return self.complementary(inputs, _provider(self.complementary_bank, context, self.complementary.layers))
        frozen = isinstance(self.complementary, nn.Module)
        with torch.no_grad() if frozen else nullcontext():
            if isinstance(inputs, dict) and not isinstance(self.complementary, PromptedEncoder):
                return self.complementary(**inputs)
            return self.complementary(inputs)

    def train(self, mode: bool = True) -> "MoPEFusion":
        """Train or evaluate prompts, mapper and head; encoders stay in eval mode."""
        super().train(mode)
        if isinstance(self.complementary, nn.Module):
            self.complementary.eval()
        return self

    def parameter_groups(
        self, main_lr: float, complementary_lr: float | None = None, weight_decay: float = 1e-3
    ) -> list[dict[str, Any]]:
        """Trained parameters for an optimiser: bank and head at ``main_lr``, the complementary encoder's prompts at theirs.

        Defaults of the released code: 4e-4 (vision) and 5e-4 (text), weight decay 1e-3 on everything.
        """
        groups = [
            {
                "params": [p for m in (self.bank, self.head) if m is not None for p in m.parameters() if p.requires_grad],
                "lr": main_lr,
            }
        ]
        if self.complementary_bank is not None:
            lr = main_lr if complementary_lr is None else complementary_lr
            groups.append({"params": list(self.complementary_bank.parameters()), "lr": lr})
        return [{**group, "weight_decay": weight_decay} for group in groups]

    def trained_state_dict(self) -> dict[str, Tensor]:
        """Prompts, mapper and head: all that isn't a frozen encoder."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith(("main.", "complementary."))}

    def unwrap(self) -> tuple[nn.Module, nn.Module | Callable[..., Tensor] | None]:
        """Give both encoders back as they were; this model can't be used afterwards."""
        complementary = self.complementary
        return self.main.detach(), complementary.detach() if isinstance(complementary, PromptedEncoder) else complementary

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the trained parts only: ``mope_fast.json`` and a safetensors file beside it.

        Killed at any moment, the folder holds the old save or the new one, each whole.
        """
        checkpoint.save(path, self.trained_state_dict(), checkpoint.describe(self))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        main: nn.Module,
        complementary: nn.Module | Callable[..., Tensor] | None = None,
        *,
        head: nn.Module | None = None,
    ) -> "MoPEFusion":
        """Read a folder of :meth:`save_pretrained` onto the same encoders; ``head`` only if it was saved with one of its own.

        Raises:
            FileNotFoundError, ValueError: no such save, or it doesn't fit; the message says what doesn't.
        """
        description = checkpoint.read_description(path)
        num_classes = None if head is not None else description["num_classes"]
        model = cls(
            main,
            complementary,
            num_classes,
            MoPEConfig(**description["config"]),
            head=head,
            problem_type=description["problem_type"],
        )
        try:
            checkpoint.load(path, model, description)
        except BaseException:
            model.unwrap()
            raise
        return model.eval()


def _vanilla(config: MoPEConfig) -> MoPEConfig:
    """Static prompts only, for the complementary encoder."""
    return MoPEConfig(
        prompt_length=config.complementary_prompt_length,
        dropout=config.dropout,
        prompt_init=config.prompt_init,
        use_dynamic=False,
        use_mapped=False,
    )


def _provider(bank, context, layers, scores=None):
    """What :class:`PromptedEncoder` calls at each layer; appends the layer's scores to ``scores``."""

    def provide(index: int, hidden_states: Tensor):
        layer = layers[index]
        output = bank.layer(index, hidden_states, context)
        prefixes = output.key_value(layer.norm, layer.k_proj, layer.v_proj, layer.num_heads)
        if scores is not None and output.scores is not None:
            scores.append(output.scores)
        return prefixes

    return provide
