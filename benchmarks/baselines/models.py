"""Shared by providers that are whole models: inputs, the step, where gradients end, compiling."""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.models import INFERENCE


@dataclass(frozen=True)
class Inputs:
    """A batch: keyword arguments of the model, and labels (B,)."""

    main: dict[str, Tensor]
    labels: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        main = {name: value.to(dtype) if value.is_floating_point() else value for name, value in self.main.items()}
        return dataclasses.replace(self, main=main)


class Provider(ABC):
    """A model ready to run."""

    model: nn.Module
    has_unused = False
    """True if the loss may not depend on some parameters; these get no gradient instead of raising an error."""

    @abstractmethod
    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        """Return logits, and the loss in training, else None."""

    @functools.cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Trained parameters by name; collected once, as by an optimizer."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def trained(self) -> dict[str, Tensor]:
        """Return the tensors that gradients are taken for, after a forward."""
        return self.parameters

    def step(self, inputs: Inputs, mode: str) -> dict[str, Tensor]:
        """Return logits, and in training the loss and all gradients, as new tensors: everything up to the optimizer's step."""
        if mode == INFERENCE:
            with torch.inference_mode():
                return {"logits": self.logits_and_loss(inputs, training=False)[0]}
        logits, loss = self.logits_and_loss(inputs, training=True)
        trained = self.trained()
        grads = zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=self.has_unused), strict=True)
        return {"logits": logits.detach(), "loss": loss.detach(), **{name: grad for name, grad in grads if grad is not None}}


class Headed(Provider):
    """An encoder with a linear head on its features. Every parameter that requires grad is trained."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        self.model = nn.ModuleDict({"encoder": encoder, "head": head})

    @abstractmethod
    def features(self, inputs: Inputs) -> Tensor:
        """Return the encoder's features (B, D)."""

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        head = self.model["head"]
        logits = head(self.features(inputs).to(head.weight.dtype))
        return logits, F.cross_entropy(logits, inputs.labels) if training else None


class EmbeddingGradient:
    """Makes gradients flow down to the embedding, the input of the first layer, and no further."""

    def __init__(self, first_layer: nn.Module):
        first_layer.register_forward_pre_hook(self._start, with_kwargs=True)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if torch.is_grad_enabled():
            self.embedding = args[0].detach().requires_grad_()
            args = (self.embedding, *args[1:])
        return args, kwargs


def anchored(first_layer: nn.Module, width: int, like: Tensor) -> nn.Parameter:
    """Do the same as EmbeddingGradient for a compiled model, whose graph can't begin in the middle: add trained zeros to the
    embedding.
    """
    anchor = nn.Parameter(like.new_zeros(width))
    first_layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + anchor, *args[1:]), kwargs), with_kwargs=True)
    return anchor


def compile_model(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def is_compiled(name: str) -> bool:
    return name.endswith("-compiled")
