"""A model of one prompted main encoder and a head with the interface of training scripts: a logits tensor and timm's names."""

import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders import PromptedEncoder
from .output import FusionOutput
from .task import DENSE, TaskModel, make_head


class Classifier(TaskModel):
    """Base class of :class:`PromptTuned` and :class:`MoPEFusion`."""

    main: PromptedEncoder
    return_logits: bool
    """Whether ``forward`` returns only the logits tensor (without a head the features); see :meth:`auxiliary_loss`."""
    _auxiliary: Tensor | None = None
    """Importance loss of the last forward, if it has not been taken yet."""

    @property
    def num_classes(self) -> int | None:
        """Return the number of outputs of the head; None if the head has no weight of its own, 0 without a head."""
        if self.head is None:
            return 0
        weight = getattr(self.head, "weight", None)
        return None if weight is None else weight.shape[0]

    @property
    def is_dense(self) -> bool:
        """Return whether the head reads feature maps, as with ``problem_type="segmentation"``."""
        return self.problem_type == DENSE

    @property
    @abstractmethod
    def num_features(self) -> int:
        """Width of the head's input."""

    @property
    def head_hidden_size(self) -> int:
        """Width of the head's input."""
        return self.num_features

    @property
    def in_chans(self) -> int:
        """Number of image channels of a timm encoder.

        Raises:
            AttributeError: the encoder has no such attribute.
        """
        return self.main.encoder.in_chans

    def get_classifier(self) -> nn.Module | None:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by the one that ``num_classes`` creates, on the same device and in the same dtype; remove it if 0.

        Raises:
            ValueError: ``num_classes`` is not an integer >= 0, or ``global_pool`` is given: pooling is a setting of the model.
        """
        if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 0:
            raise ValueError(f"num_classes must be an integer >= 0, got {num_classes!r}")
        if global_pool is not None:
            raise ValueError(
                f"global_pool={global_pool!r} is not supported: choose pooling when you create the model, such as pooling='mean'"
            )
        like = next(p for module in (self.head, self.bank, self.main) if module is not None for p in module.parameters())
        self.head = None
        if num_classes:
            head = make_head(self.main, num_classes, None, self.problem_type, self.num_features - self.main.feature_width)
            self.head = head.to(device=like.device, dtype=like.dtype)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off; see :meth:`gradient_checkpointing_enable`."""
        self._set_gradient_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return no names, because the paper applies weight decay to all trained parameters."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Raise ValueError, because layer decay is not possible.

        Layer decay needs a learning rate for each layer, but the prompts of all layers are one parameter.
        """
        raise ValueError(
            "layer decay gives each layer its own learning rate, but the layers are frozen and the prompts of all of them are "
            "one parameter: leave it out, and give the head its own rate by parameter groups"
        )

    def auxiliary_loss(self) -> Tensor | float:
        """Return and clear the last forward's weighted importance loss: ``criterion(model(x), y) + model.auxiliary_loss()``.

        This is for models with ``return_logits``, whose output doesn't contain it. It is 0.0 if the model has no importance loss
        (it doesn't route over experts, or ``importance_weight`` is 0). In DDP call it on ``ddp.module``. If the loss of a training
        step is not taken, the next step warns; a compiled model warns only when its mode changes.

        Raises:
            RuntimeError: it was taken already, or the model returns all of its outputs; it is then a part of ``output.loss``.
        """
        if not self.return_logits:
            raise RuntimeError("the model returns its loss with all outputs: read output.loss, or output.importance_loss")
        if not self._has_auxiliary_loss():
            return 0.0
        if self._auxiliary is None:
            raise RuntimeError("there is no importance loss to take: call the model first, then auxiliary_loss() once")
        loss, self._auxiliary = self._auxiliary, None
        return loss

    def _has_auxiliary_loss(self) -> bool:
        return False

    def _result(self, output: FusionOutput) -> FusionOutput | Tensor:
        """Return the result of a forward."""
        if not self.return_logits:
            return output
        if self._has_auxiliary_loss() and not torch.compiler.is_exporting() and not torch.jit.is_tracing():
            self._auxiliary = self.config.importance_weight * output.importance_loss
        return output.features if output.logits is None else output.logits

    def _begin(self, labels: Tensor | None, more: bool) -> None:
        """Begin a forward; refuse arguments whose results a logits tensor can't contain."""
        if self.return_logits and labels is not None:
            raise ValueError("return_logits=True returns logits and no loss: pass labels to your criterion, or set it to False")
        if self.return_logits and more:
            raise ValueError("return_logits=True returns logits, no feature maps and no tokens: set it to False to get them")
        self._drop_auxiliary(stacklevel=6)

    def _drop_auxiliary(self, stacklevel: int) -> None:
        if self._auxiliary is None or torch.compiler.is_compiling():
            return
        if self.training and self._auxiliary.requires_grad:
            warnings.warn(
                "the importance loss of a training step was not taken: with return_logits=True the loss is criterion(model(x), y) "
                "+ model.auxiliary_loss(); to train without it set MoPEConfig(importance_weight=0)",
                stacklevel=stacklevel,
            )
        self._auxiliary = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load a state dict, also one of the plain main encoder from before this model replaced it."""
        own = [f"{prefix}{name}." for name in ("main", "bank", "complementary")]
        if not any(key.startswith(tuple(own)) for key in state_dict):
            names = [name for name in self.main.encoder.state_dict() if prefix + name in state_dict]
            # keys of a head alone may belong to this model
            if any(not name.startswith("head.") for name in names):
                for name in names:
                    state_dict[f"{own[0]}encoder.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def train(self, mode: bool = True) -> "Classifier":
        """Set the mode of the trained parts; encoders stay in eval mode."""
        self._drop_auxiliary(stacklevel=3)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_auxiliary": None}
