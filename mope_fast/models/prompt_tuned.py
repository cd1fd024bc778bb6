"""PromptTuned: one frozen encoder with trained prompts, without a router."""

import os
from typing import Any

from torch import Tensor, nn

from ..encoders.sources import Source, source_of
from ..modules import MoPEConfig, PromptBank
from . import checkpoint, hub
from .classifier import Classifier
from .folded import FoldedModel
from .inputs import one_side, takes_named_inputs
from .output import FusionOutput
from .prompting import Inputs, run_prompted
from .task import apply_head, check_head, describe_encoder, make_head, prompted


class PromptTuned(Classifier):
    """A frozen encoder with prompts of its own in every layer.

    Prompts act as keys and values only and precede the layer's own. This is prefix tuning (arXiv 2101.00190) with prefixes that
    pass through the frozen key/value projections. It equals VPT-deep (arXiv 2203.12119) except for the layers' outputs at prompt
    positions, which are discarded.

    Args:
        encoder: a supported encoder, kept frozen and in eval mode; or a :class:`PromptedEncoder` that several models share.
        prompt_length: number of prompt rows per layer; 0 for the plain encoder, run without gradient.
        num_classes: number of outputs of the linear head; None for no head (``logits`` is None, use ``features``).
        head: a custom head, (B, D) -> (B, num_classes), used instead of the linear one.
        problem_type, label_smoothing: as for :class:`MoPEFusion`.
        dropout: dropout probability on prompts, with one mask per step.
        prompt_init: prompts are initialised uniformly in +-prompt_init; None for :class:`MoPEConfig`'s rule.
        pooling: how the encoder's tokens are pooled into the feature, see :class:`PromptedEncoder`.
        return_logits: make ``forward`` return only the logits tensor, for scripts that call ``criterion(model(x), y)``.

    Examples:
        >>> model = PromptTuned(vit, prompt_length=8, num_classes=10)
        >>> model(images, labels).loss.backward()
    """

    def __init__(
        self,
        encoder: nn.Module,
        prompt_length: int,
        num_classes: int | None = None,
        *,
        head: nn.Module | None = None,
        problem_type: str = "single_label_classification",
        label_smoothing: float = 0.0,
        dropout: float = 0.1,
        prompt_init: float | None = None,
        pooling: str | None = None,
        return_logits: bool = False,
    ):
        super().__init__()
        check_head(num_classes, head, problem_type, label_smoothing, return_logits)
        # settings are checked before the encoder is touched
        config = _config(prompt_length, dropout, prompt_init, pooling)
        self.problem_type, self.label_smoothing, self.return_logits = problem_type, float(label_smoothing), return_logits
        self.main = prompted(encoder, pooling=pooling)
        self.settings = {
            "prompt_length": prompt_length, "dropout": dropout, "prompt_init": prompt_init, "pooling": self.main.pooling
        }  # fmt: skip
        self._shared = self.main is encoder
        self.bank = PromptBank(self.main.widths, None, config) if prompt_length else None
        self.head = make_head(self.main, num_classes, head, problem_type)

    @property
    def feature_width(self) -> int:
        """D of ``features``."""
        return self.main.feature_width

    @property
    def num_features(self) -> int:
        return self.feature_width

    @property
    def config(self) -> Any:
        """The encoder's own configuration. Scripts for transformers read it and write class names into it.

        Raises:
            AttributeError: the encoder has no configuration.
        """
        return self.main.encoder.config

    @takes_named_inputs
    def forward(
        self,
        inputs: Inputs | None = None,
        labels: Tensor | None = None,
        *,
        feature_maps: bool = False,
        tokens: bool = False,
        **named: Any,
    ) -> FusionOutput | Tensor:
        """Run one forward pass.

        Args:
            inputs: the encoder's main input, or a dict of its keyword arguments.
            labels: labels as ``problem_type`` defines them; if given, ``loss`` is computed.
            feature_maps, tokens: also return the encoder's feature maps or tokens; see :class:`FusionOutput`.
            named: the encoder's keyword arguments, passed directly instead of ``inputs`` or in addition to the main input.
        """
        self._begin(labels, feature_maps or tokens)
        inputs = one_side(self.main, inputs, named)
        dense = self.is_dense
        encoded = run_prompted(self.main, self._bank(), inputs, feature_maps=feature_maps or dense, tokens=tokens)
        logits = apply_head(self.head, encoded.feature_maps if dense else encoded.feature)
        loss = self.task_loss(logits, labels)
        output = self._output_type(logits, labels)
        maps = encoded.feature_maps if feature_maps else None
        return self._result(output(loss, logits, loss, None, None, encoded.feature, maps, encoded.tokens))

    def forward_features(self, inputs: Inputs) -> Tensor:
        """Return the head's input, (B, D) or maps. As in timm's models, this and :meth:`forward_head` make up ``forward``."""
        encoded = run_prompted(self.main, self._bank(), inputs, feature_maps=self.is_dense)
        return encoded.feature_maps if self.is_dense else encoded.feature

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of :meth:`forward_features`; with ``pre_logits``, or without a head, the features."""
        return features if pre_logits or self.head is None else apply_head(self.head, features)

    def fold(self) -> FoldedModel:
        """Return a new model for inference with precomputed keys and values of the prompts; see :meth:`MoPEFusion.fold`."""
        self._check_whole()
        return FoldedModel(self.main, self.bank, self.head, return_logits=self.return_logits, dense=self.is_dense)

    def parameter_groups(self, lr: float, weight_decay: float = 1e-3) -> list[dict[str, Any]]:
        """Return the trained parameters as groups for an optimiser."""
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr, "weight_decay": weight_decay}]

    def sources(self) -> dict[str, Source | None]:
        """Return where the encoder can be obtained again."""
        return {"main": source_of(self.main.encoder)}

    def description(self) -> dict[str, Any]:
        return {
            "model": "PromptTuned", "main": describe_encoder(self.main), "config": dict(self.settings), **self._head_description()
        }  # fmt: skip

    def unwrap(self) -> nn.Module:
        """Return the encoder as it was; this model can't be used afterwards. A shared encoder stays wrapped."""
        return self.main.encoder if self._shared else self.main.detach()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        encoder: nn.Module,
        *,
        head: nn.Module | None = None,
        strict: bool = False,
        revision: str | None = None,
        return_logits: bool = False,
    ) -> "PromptTuned":
        """Load a saved checkpoint onto the same encoder; pass ``head`` only if it was saved with a custom head.

        ``path`` is a folder written by :meth:`save_pretrained`, or "user/name" of one on the Hugging Face Hub
        (:meth:`push_to_hub`), where ``revision`` is a branch, a tag or a commit. An encoder with other weights causes a warning, or
        an error with ``strict``; see :meth:`load_pretrained`.

        Raises:
            FileNotFoundError, ValueError: there is no such checkpoint, it is damaged, or it doesn't fit; the message says why.
            OSError: a file can't be read.
        """
        path = hub.local_folder(path, revision)
        saved = cls._read(path)
        model = cls._make(path, saved, encoder, head=head)
        model._load(path, saved, strict)
        model.return_logits = return_logits
        return model

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        return checkpoint.read_description(path, "PromptTuned", {"prompt_length", "dropout", "prompt_init", "pooling"})

    @classmethod
    def _make(
        cls, path: str | os.PathLike[str], saved: dict[str, Any], encoder: nn.Module, *, head: nn.Module | None = None
    ) -> "PromptTuned":
        """Build the model that the description specifies, without loading weights."""
        classes, task = None if head is not None else saved["num_classes"], checkpoint.task_settings(saved)
        with checkpoint.settings_of(path):
            _config(**saved["config"])
            check_head(classes, head, **task)
        return cls(encoder, num_classes=classes, head=head, **task, **saved["config"])


def _config(prompt_length: int, dropout: float, prompt_init: float | None, pooling: str | None) -> MoPEConfig:
    if not isinstance(prompt_length, int) or isinstance(prompt_length, bool) or prompt_length < 0:
        raise ValueError(f"prompt_length must be an integer >= 0, got {prompt_length!r}")
    return MoPEConfig(
        prompt_length=max(1, prompt_length),
        dropout=dropout,
        prompt_init=prompt_init,
        pooling=pooling,
        use_dynamic=False,
        use_mapped=False,
    )
