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
    """Holds a supported encoder frozen and in eval mode, and hands prompts to its layers.

    The encoder stays the user's own object: called on its own it does what it always did; :meth:`detach` undoes everything.
    Several models can share one encoder by sharing this object: ``MoPEFusion(main=prompted, ...)``. Several threads can too: they
    take turns.

    Args:
        encoder: see :func:`mope_fast.supported_encoders`.
        pooling: how its tokens become the feature: "cls" (class token), "mean" (over real tokens, of an image over its patches),
            "last" (real token), several side by side as "cls+mean" (DINOv2's own classifiers read these), or None for its family's
            own way (docs/encoders.md). Sentence encoders such as MiniLM were trained for the mean.
        router_pooling: how a layer's input is pooled for the router; likewise.

    Raises:
        TypeError: the encoder is not supported.
        ValueError: it takes prompts from another model already, or its family doesn't have that pooling.
    """

    def __init__(self, encoder: nn.Module, *, pooling: str | None = None, router_pooling: str | None = None):
        super().__init__()
        self.family = family_of(encoder)
        with wrapping.lock:
            self._attachment = Attachment(encoder, self.family, pooling, router_pooling)
            self._attachment.owners.add(self)
        self.encoder = encoder
        self.input_names = _forward_names(encoder) - (_MASKS if self.family.input_name in _WITHOUT_MASK else frozenset())
        """What the encoder's forward names; of images and Whisper no mask, which a text beside them has."""
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
        """Facts of the layers as they are now: a projection may have got a LoRA since the encoder was wrapped.

        While it compiles, as they were in the last call that wasn't: torch 2.11 can't make them in a graph.
        """
        if not torch.compiler.is_dynamo_compiling():
            self._facts = self.family.layers(self.encoder)
            if len(self._facts) != len(self.widths):
                raise RuntimeError(
                    f"this {type(self.encoder).__name__} has {len(self._facts)} layers now, and had {len(self.widths)} when it was "
                    "wrapped: change it first, then make the model"
                )
        return self._facts

    @property
    def map_width(self) -> int:
        """C of the last feature map, D of the tokens."""
        return self.widths[-1]

    @property
    def pooling(self) -> str | None:
        return self._attachment.pooling

    @property
    def router_pooling(self) -> str | None:
        return self._attachment.router_pooling

    @property
    def dtype(self) -> torch.dtype:
        """Of the encoder's weights."""
        return next(p.dtype for p in self.encoder.parameters() if p.is_floating_point())

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What a timm model says of the images it was trained with; timm's ``resolve_data_config`` asks for it.

        Raises:
            AttributeError: the encoder has none.
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
        """The encoder's global feature, its layers' routing scores and, if asked for, its maps and its last layer's tokens.

        Args:
            inputs: the encoder's main input, or a dict of its keyword arguments.
            prompts: called once for each layer with its input; None for the plain encoder.
            feature_maps, tokens: see :class:`Encoded`.

        Raises:
            ValueError: feature maps or tokens of an encoder that has none.
            RuntimeError: the encoder was given back, was called from within its own forward, or does not ask for its prompts any
                more.
        """
        inputs = self.family.keyword_arguments(inputs)
        wanted = Wanted(feature_maps, tokens)
        return self._attachment.run(inputs, prompts, wanted, gradient_checkpointing=self.gradient_checkpointing)

    def train(self, mode: bool = True) -> "PromptedEncoder":
        """Stays in eval mode: a frozen encoder has no dropout, whatever the fused model does."""
        return super().train(False)

    def is_thawed(self) -> bool:
        """Whether all of the encoder's parameters ask for a gradient: something has undone what wrapping did."""
        return self._attachment.is_thawed()

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            "torch.jit.script can't read a model that hands prompts to layers of another library: take torch.compile, or for a "
            "file torch.export or torch.jit.trace of model.eval() with return_logits=True (docs/export.md)"
        )

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "nn.DataParallel copies modules without their layers' forwards, and prompts would not reach the copies: use "
            "DistributedDataParallel (torchrun --nproc-per-node ...), or one device"
        )

    def detach(self) -> nn.Module:
        """Undo the wrapping and return the encoder as it was; this module can't be used afterwards."""
        self._attachment.detach()
        return self.encoder

    def extra_repr(self) -> str:
        return f"family={self.family.name!r}, layers={len(self.widths)}"


def _forward_names(encoder: nn.Module) -> frozenset[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    _, *parameters = inspect.signature(type(encoder).forward).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind in kinds)
