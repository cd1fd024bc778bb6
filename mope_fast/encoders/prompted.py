"""A frozen encoder that takes prompts as keys and values of its layers."""

import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .attachment import Attachment, Encoded, PromptProvider, Wanted, wrapping
from .families import Inputs, PromptedLayer, family_of

_WITHOUT_MASK, _MASKS = ("pixel_values", "x", "input_features"), frozenset({"attention_mask"})


class PromptedEncoder(nn.Module):
    """Keeps a supported encoder frozen and in eval mode, and passes prompts to its layers.

    The encoder stays the user's own object: called directly it behaves as before, and :meth:`detach` undoes everything.
    Several models can share one encoder by sharing this object: ``MoPEFusion(main=prompted, ...)``. Several threads can share it
    too: their forwards run one after another.

    Args:
        encoder: a supported encoder, see :func:`mope_fast.supported_encoders`.
        pooling: how its tokens are pooled into the feature: "cls" (class token), "mean" (over real tokens; over patches for an
            image), "last" (last real token), several side by side as "cls+mean" (which DINOv2's own classifiers read), or None for
            its family's default (docs/encoders.md). Sentence encoders such as MiniLM were trained for the mean.
        router_pooling: how a layer's input is pooled for the router: "cls", "mean", "last", or None for the family's default.

    Raises:
        TypeError: the encoder is not supported.
        ValueError: the encoder already takes prompts from another model, or its family doesn't have this pooling.
    """

    def __init__(self, encoder: nn.Module, *, pooling: str | None = None, router_pooling: str | None = None):
        super().__init__()
        self.family = family_of(encoder)
        with wrapping.lock:
            self._attachment = Attachment(encoder, self.family, pooling, router_pooling)
            self._attachment.owners.add(self)
        self.encoder = encoder
        self.input_names = _forward_names(encoder) - (_MASKS if self.family.input_name in _WITHOUT_MASK else frozenset())
        """Parameter names of the encoder's forward.

        For image encoders and Whisper without the attention mask, which belongs to a text beside them.
        """
        facts = self._facts = self.family.layers(encoder)
        self.widths = [layer.width for layer in facts]
        self.feature_width = self.family.pooled_width(encoder, self.pooling)
        self.gradient_checkpointing = False
        """Recompute each layer and its prompts in the backward pass instead of keeping their activations."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attachment.owners.add(self)

    @property
    def layers(self) -> Sequence[PromptedLayer]:
        """The layers' facts in their current state: a projection may have got a LoRA since the encoder was wrapped.

        While compiling, these are the facts of the last call outside of a compiler: torch 2.11 can't build them in a graph.
        """
        if not torch.compiler.is_dynamo_compiling():
            self._facts = self.family.layers(self.encoder)
            if len(self._facts) != len(self.widths):
                raise RuntimeError(
                    f"this {type(self.encoder).__name__} has {len(self._facts)} layers now, and had {len(self.widths)} when it was "
                    "wrapped: change the encoder before building the model"
                )
        return self._facts

    @property
    def map_width(self) -> int:
        """Width of the last feature map (its C) and of the tokens (their D)."""
        return self.widths[-1]

    @property
    def pooling(self) -> str | None:
        return self._attachment.pooling

    @property
    def router_pooling(self) -> str | None:
        return self._attachment.router_pooling

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder's weights."""
        return next(p.dtype for p in self.encoder.parameters() if p.is_floating_point())

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """A timm model's description of the images it was trained with; timm's ``resolve_data_config`` reads it.

        Raises:
            AttributeError: the encoder has no ``pretrained_cfg``.
        """
        return self.encoder.pretrained_cfg

    default_cfg = pretrained_cfg

    def forward(
        self,
        inputs: Tensor | Inputs,
        prompts: PromptProvider | None = None,
        *,
        feature_maps: bool = False,
        tokens: bool = False,
    ) -> Encoded:
        """Return the global feature, the layers' routing scores and, if requested, feature maps and the last layer's tokens.

        Args:
            inputs: the encoder's main input, or a dict of its keyword arguments.
            prompts: called once for each layer with its input; None for the plain encoder.
            feature_maps, tokens: see :class:`Encoded`.

        Raises:
            ValueError: feature maps or tokens were requested, but this encoder has none.
            RuntimeError: the encoder was unwrapped, was called from within its own forward, or no longer reads its prompts.
        """
        inputs = self.family.keyword_arguments(inputs)
        wanted = Wanted(feature_maps, tokens)
        return self._attachment.run(inputs, prompts, wanted, gradient_checkpointing=self.gradient_checkpointing)

    def train(self, mode: bool = True) -> "PromptedEncoder":
        """Stay in eval mode whatever ``mode`` is: a frozen encoder has no dropout, even while the fused model trains."""
        return super().train(False)

    def is_thawed(self) -> bool:
        """Return whether all of the encoder's parameters have ``requires_grad`` set: then other code has undone the freezing."""
        return self._attachment.is_thawed()

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            "torch.jit.script can't compile a model that passes prompts to layers of another library: use torch.compile, or for a "
            "file torch.export or torch.jit.trace of model.eval() with return_logits=True (docs/export.md)"
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel copies modules without the forwards set on their layers, so prompts would not reach the copies: use "
            "DistributedDataParallel (torchrun --nproc-per-node ...), or one device"
        )

    def detach(self) -> nn.Module:
        """Undo the wrapping and return the encoder in its original state; this module can't be used afterwards."""
        self._attachment.detach()
        return self.encoder

    def extra_repr(self) -> str:
        return f"family={self.family.name!r}, layers={len(self.widths)}"


def _forward_names(encoder: nn.Module) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    _, *parameters = inspect.signature(type(encoder).forward).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind in kinds)
