"""What an encoder family is, and the register of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class PromptedLayer:
    """Facts of one frozen layer that takes prompts as keys and values.

    Args:
        module: called with the layer's input hidden states (B, S, D) first, or as ``hidden_states``.
        attention: the self-attention that ``module`` calls.
        width: D.
        norm: the norm between the layer's input and its keys and values; None for a post-norm layer.
        k_proj, v_proj: affine maps D -> num_heads * Dh.
        num_heads: H.
    """

    module: nn.Module
    attention: nn.Module
    width: int
    norm: nn.Module | None
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    num_heads: int


def _no_problem(encoder: nn.Module) -> None:
    return None


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class EncoderFamily:
    """How one family of frozen encoders takes prompts.

    Args:
        name: for messages, saved files and :func:`supported_encoders`.
        models: full class names of its models, ``"package.module.Class"``; the package is imported by nobody but the user.
        input_name: the keyword that a bare tensor input is passed as.
        layers: encoder -> its layers' facts, in order.
        feature: (encoder's output, its keyword arguments) -> the global feature (B, D), over tokens only.
        feature_width: encoder -> D of the feature.
        attach: make the encoder's attention call ours (see :func:`prefixes_of`); returns what undoes it, called with the encoder.
        problem: encoder -> why this one can't take prompts, or None.
        setup: makes the encoder's library ready, in this process; called before a model is wrapped and when one is unpickled.
    """

    name: str
    models: tuple[str, ...]
    input_name: str
    layers: Callable[[nn.Module], Sequence[PromptedLayer]]
    feature: Callable[[Any, dict[str, Any]], Tensor]
    feature_width: Callable[[nn.Module], int]
    attach: Callable[[nn.Module], Callable[[nn.Module], None]]
    problem: Callable[[nn.Module], str | None] = _no_problem
    setup: Callable[[], None] = _nothing

    def __reduce__(self):
        """Pickled by name: the process that loads it registers the family first."""
        return _registered, (self.name,)


_FAMILIES: dict[str, EncoderFamily] = {}


def _registered(name: str) -> EncoderFamily:
    _FAMILIES[name].setup()
    return _FAMILIES[name]


def register_encoder(family: EncoderFamily) -> None:
    """Add a family, or replace the one of that name."""
    _FAMILIES[family.name] = family


def supported_encoders() -> dict[str, tuple[str, ...]]:
    """Family name -> the model classes it takes."""
    return {name: family.models for name, family in _FAMILIES.items()}


def _class_names(model: object) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__]


def find_family(encoder: object) -> EncoderFamily | None:
    """The family of a model or of a subclass of one, or None."""
    names = _class_names(encoder)
    return next((family for family in _FAMILIES.values() if any(name in family.models for name in names)), None)


def family_of(encoder: object) -> EncoderFamily:
    """The family of an encoder that must have one.

    Raises:
        TypeError: it has none, or this model can't take prompts; the message says what can.
    """
    family = find_family(encoder)
    if family is None:
        models = [model.rpartition(".")[2] for models in supported_encoders().values() for model in models]
        inner = [name for name, child in encoder.named_children() if find_family(child)] if isinstance(encoder, nn.Module) else []
        hint = f"; its part .{inner[0]} is supported, pass that" if inner else ""
        raise TypeError(
            f"{type(encoder).__name__} is not a supported encoder: expected one of {', '.join(models)}{hint}. "
            "register_encoder adds a family; as the complementary side any callable giving (B, cross_dim) features will do"
        )
    if (problem := family.problem(encoder)) is not None:
        raise TypeError(f"this {type(encoder).__name__} can't take prompts: {problem}")
    return family
