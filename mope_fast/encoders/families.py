"""Encoder families and their registry."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._values import can_be_looked_at
from ..modules.norms import is_plain
from .pooling import Pool

Inputs = dict[str, Any]
"""An encoder's keyword arguments."""


@dataclass(frozen=True)
class PromptedLayer:
    """Facts of one frozen layer that takes prompts as keys and values.

    Args:
        module: called with the layer's input hidden states, (B, S, D) or (B, H, W, D), as first argument or as ``hidden_states``.
        attention: the self-attention that ``module`` calls; it reads :func:`prefixes_of`.
        width: D, the width of the hidden states.
        norm: the norm between the layer's input and its keys and values; None for a post-norm layer.
        k_proj, v_proj: affine maps D -> num_heads * Dh. With ``v_proj`` None, ``k_proj`` gives keys and values side by side.
        num_heads: number of heads of keys and values.
        key_norm: a norm applied to keys after the projection, or None.
    """

    module: nn.Module
    attention: nn.Module
    width: int
    norm: nn.Module | None
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor] | None
    num_heads: int
    key_norm: Callable[[Tensor], Tensor] | None = None


def keys_and_values(qkv: nn.Module, rows: Tensor, *, group: int = 1) -> Tensor:
    """Return keys and values side by side, (..., 2 * Hkv * Dh), from a packed projection to queries, keys and values.

    It serves as a ``k_proj`` without ``v_proj``. ``group`` query heads share one head of keys and values.
    """
    if type(qkv) is nn.Linear and type(qkv.weight) is nn.Parameter and is_plain(qkv):
        width = qkv.out_features * group // (group + 2)
        return F.linear(rows, qkv.weight[width:], None if qkv.bias is None else qkv.bias[width:])
    # any other projection (quantised, sharded, with a LoRA) is called as a whole, and its queries are dropped
    packed = qkv(rows)
    return packed[..., packed.shape[-1] * group // (group + 2) :]


def _call(encoder: nn.Module, inputs: Inputs) -> Any:
    return encoder(**inputs)


def no_problem(encoder: nn.Module) -> None:
    """Return None: every encoder of the family takes prompts."""


def nothing() -> None:
    """Do nothing: the library needs no setup."""


def check_text(inputs: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError for an invalid ``input_ids`` or ``attention_mask``."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(ids, Tensor) and (ids.is_floating_point() or ids.dim() != 2):
        raise ValueError(f"input_ids must be integers (B, S), got {ids.dtype} {tuple(ids.shape)}")
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor (B, S), got {type(mask).__name__}: pass return_tensors='pt'")
    if mask.is_complex():
        raise TypeError(f"attention_mask must be bool, an integer dtype, or 0 and 1 in a floating-point dtype, got {mask.dtype}")
    if mask.is_floating_point():
        additive = "attention_mask has numbers below 0, as additive masks do: here 1 means a real token, so pass mask == 0"
        if not can_be_looked_at(mask):
            torch._assert_async((mask >= 0).all(), additive)  # checked on its own device, without a synchronization
        elif (mask.detach().double().numpy() < 0).any():
            raise ValueError(additive)
    tokens = inputs.get("input_values") if ids is None else ids
    if mask.dim() != 2 or (isinstance(tokens, Tensor) and "past_key_values" not in inputs and mask.shape != tokens.shape):
        of = "" if tokens is None else f" as {'input_values' if ids is None else 'input_ids'} {tuple(tokens.shape)}"
        raise ValueError(f"attention_mask must be (B, S){of}, True or 1 = real; got {tuple(mask.shape)}")


@dataclass(frozen=True)
class EncoderFamily:
    """Describes how one family of frozen encoders takes prompts.

    Args:
        name: name of the family, used in messages, saved files and :func:`supported_encoders`.
        models: full class names of its models, ``"package.module.Class"``; the user imports the package, the family doesn't.
        input_name: the keyword that a bare tensor input is passed as.
        layers: encoder -> a :class:`PromptedLayer` for each of its layers, in order.
        pool: (encoder, its keyword arguments) -> the pool with which the router pools a layer's input, which is the residual stream
            before any norm.
        feature: (encoder, its output, its keyword arguments) -> the global feature (B, D), over tokens only.
        feature_width: encoder -> D of the feature.
        attach: makes the encoder's attention call the library's (see :func:`prefixes_of`); returns a function that undoes this when
            it is called with the encoder.
        run: (encoder, its keyword arguments) -> its output.
        problem: encoder -> the reason why this one can't take prompts, or None.
        feature_maps: (encoder, its keyword arguments) -> its output and the map (B, C, H, W) of each stage; None if it has none.
        grid: for image encoders, (encoder, its keyword arguments) -> rows and columns of patches; the patches are its last tokens.
        setup: prepares the encoder's library in this process; called before a model is wrapped and when one is unpickled.
        pools: other poolings that this family supports, by name: "cls" (class token), "mean" (over real tokens; over patches for an
            image) and "last" (last real token); each is (encoder, its keyword arguments) -> pool.
        tokens: (encoder, its output, its keyword arguments) -> its last layer's tokens (B, S, D), normed, from which ``pools`` make
            the feature; None if the output has no tokens: then the feature's pooling can't be chosen.
        tokens_width: encoder -> D of these tokens, if it differs from that of the feature.
        last_norm: if the output has no tokens, encoder -> the norm after its last layer.
    """

    name: str
    models: tuple[str, ...]
    input_name: str
    layers: Callable[[nn.Module], Sequence[PromptedLayer]]
    pool: Callable[[nn.Module, Inputs], Pool]
    feature: Callable[[nn.Module, Any, Inputs], Tensor]
    feature_width: Callable[[nn.Module], int]
    attach: Callable[[nn.Module], Callable[[nn.Module], None]]
    run: Callable[[nn.Module, Inputs], Any] = _call
    problem: Callable[[nn.Module], str | None] = no_problem
    feature_maps: Callable[[nn.Module, Inputs], tuple[Any, Sequence[Tensor]]] | None = None
    setup: Callable[[], None] = nothing
    pools: Mapping[str, Callable[[nn.Module, Inputs], Pool]] = field(default_factory=dict)
    tokens: Callable[[nn.Module, Any, Inputs], Tensor] | None = None
    tokens_width: Callable[[nn.Module], int] | None = None
    grid: Callable[[nn.Module, Inputs], tuple[int, int]] | None = None
    last_norm: Callable[[nn.Module], Callable[[Tensor], Tensor]] | None = None

    @property
    def has_tokens(self) -> bool:
        """Whether the last layer's tokens can be requested."""
        return self.tokens is not None or self.last_norm is not None

    @property
    def has_feature_maps(self) -> bool:
        """Whether feature maps can be requested."""
        return self.feature_maps is not None or (self.grid is not None and self.has_tokens)

    def keyword_arguments(self, inputs: Tensor | Inputs) -> Inputs:
        """Return the inputs as keyword arguments; a bare tensor is put under ``input_name``.

        Raises:
            TypeError, ValueError: neither a tensor nor a dict, an empty batch, or ids or a mask of a wrong dtype or shape.
        """
        if isinstance(inputs, Tensor):
            inputs = {self.input_name: inputs}
        if not isinstance(inputs, Mapping):
            texts = [inputs] if isinstance(inputs, str) else inputs
            is_text = isinstance(texts, (list, tuple)) and any(isinstance(text, str) for text in texts)
            hint = ": tokenise texts first, tokenizer(texts, padding=True, return_tensors='pt')" if is_text else ""
            raise TypeError(
                f"inputs of {self.name} must be a tensor or a dict of keyword arguments, got {type(inputs).__name__}{hint}"
            )
        if self.batch_size(inputs) == 0:
            raise ValueError(f"the batch of {self.name} is empty: it needs at least one sample")
        check_text(inputs)
        return dict(inputs)

    def batch_size(self, inputs: Mapping[str, Any]) -> int | None:
        """Return the batch size of the main input.

        Without a main input it is that of the first tensor that doesn't have a single row for all samples, as positions may.
        """
        main = inputs.get(self.input_name)
        tensors = [main] if isinstance(main, Tensor) else inputs.values()
        sizes = [value.shape[0] for value in tensors if isinstance(value, Tensor) and value.dim()]
        return next((size for size in sizes if size != 1), sizes[0] if sizes else None)

    def check_pooling(self, pooling: str | None, router_pooling: str | None = None) -> None:
        """Raise ValueError for a pooling of the feature, or of the router's input, that this family doesn't have."""
        of_feature = [] if self.tokens is None else list(self.pools)
        side_by_side = f", or several, {'+'.join(of_feature[:2])!r}" if len(of_feature) > 1 else ""
        hint = "; a timm model pools as it was created: global_pool='avg'" if self.name.startswith("timm") else ""
        for name, known, value, several in (
            ("pooling", of_feature, pooling, side_by_side), ("router_pooling", list(self.pools), router_pooling, "")
        ):  # fmt: skip
            parts = [] if value is None else value.split("+") if several else [value]
            if len(set(parts)) < len(parts) or not set(parts) <= set(known):
                choices = f"one of {[None, *known]}, None for its default{several}"
                raise ValueError(f"{name} of {self.name} must be {choices}, got {value!r}{hint}")

    def pooled_width(self, encoder: nn.Module, pooling: str | None = None) -> int:
        """Return the width of the feature that :meth:`encode` returns."""
        if pooling is None:
            return self.feature_width(encoder)
        return (self.tokens_width or self.feature_width)(encoder) * len(pooling.split("+"))

    def router_pool(self, encoder: nn.Module, inputs: Inputs, pooling: str | None = None) -> Pool:
        """Return the pool of a layer's input for the router; ``pooling`` is None for the family's own, or a name in ``pools``."""
        return self.pool(encoder, inputs) if pooling is None else self.pools[pooling](encoder, inputs)

    def encode(self, encoder: nn.Module, inputs: Inputs, pooling: str | None = None) -> Tensor:
        """Return the global feature (B, D); ``pooling`` is None for the family's own, or names in ``pools``: "cls", "cls+mean"."""
        return self._pooled(encoder, self._run(encoder, inputs), inputs, pooling)

    def _run(self, encoder: nn.Module, inputs: Inputs) -> Any:
        output = self.run(encoder, inputs)
        if isinstance(output, tuple):
            raise ValueError(f"{type(encoder).__name__} returned a tuple: leave return_dict at its default")
        return output

    def _pooled(self, encoder: nn.Module, output: Any, inputs: Inputs, pooling: str | None) -> Tensor:
        if pooling is None:
            return self.feature(encoder, output, inputs)
        tokens = self.tokens(encoder, output, inputs)
        features = [self.pools[part](encoder, inputs)(tokens) for part in pooling.split("+")]
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)

    def encode_more(
        self,
        encoder: nn.Module,
        inputs: Inputs,
        pooling: str | None,
        last: Callable[[], Tensor],
        *,
        feature_maps: bool = False,
        tokens: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """Return the global feature (B, D), pooled as in :meth:`encode`; maps (B, C, H, W) and last tokens (B, S, D) on request.

        Args:
            last: returns the output of the last layer, once the encoder has run.

        Raises:
            ValueError: this family doesn't have the requested maps or tokens.
        """
        for asked, has, what in ((feature_maps, "has_feature_maps", "feature maps"), (tokens, "has_tokens", "tokens to return")):
            if asked and not getattr(self, has):
                having = [name for name, family in _FAMILIES.items() if getattr(family, has)]
                raise ValueError(f"{self.name} has no {what}; families that have them: {', '.join(having)}")
        maps = None
        if feature_maps and self.feature_maps is not None:
            output, stages = self.feature_maps(encoder, inputs)
            maps = tuple(stages)
        else:
            output = self._run(encoder, inputs)
        feature = self._pooled(encoder, output, inputs, pooling)
        of_last = None
        if tokens or (feature_maps and maps is None):
            if self.tokens is not None:
                of_last = self.tokens(encoder, output, inputs)
            else:
                of_last = self.last_norm(encoder)(last()).flatten(1, -2)
        if feature_maps and maps is None:
            rows, columns = self.grid(encoder, inputs)
            maps = (of_last[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns)),)
        return feature, maps, of_last if tokens else None

    def __reduce__(self):
        """Pickle by name: the process that loads it must register the family first."""
        return _unpickled, (self.name,)


_FAMILIES: dict[str, EncoderFamily] = {}
_REFUSED: dict[str, str] = {}


def registered_family(name: str) -> EncoderFamily:
    """Return the family with this name.

    Raises:
        RuntimeError: no family has this name.
    """
    if name not in _FAMILIES:
        raise RuntimeError(f"the encoder family {name!r} is not registered: import the module that calls register_encoder for it")
    return _FAMILIES[name]


def _unpickled(name: str) -> EncoderFamily:
    family = registered_family(name)
    family.setup()
    return family


def register_encoder(family: EncoderFamily) -> None:
    """Register a family, or replace the one with the same name.

    A model belongs to the family that names its most specific class. If two families name the same class, the one registered
    later is used.

    Args:
        family: the family.

    Raises:
        TypeError: ``family`` is not an :class:`EncoderFamily`.
    """
    if not isinstance(family, EncoderFamily):
        raise TypeError(f"register_encoder expects an EncoderFamily, got {type(family).__name__}")
    _FAMILIES[family.name] = family


def refuse_encoder(model: str, reason: str) -> None:
    """Register the reason why a model class, ``"package.module.Class"``, is not supported although it looks so."""
    _REFUSED[model] = reason


def supported_encoders() -> dict[str, tuple[str, ...]]:
    """Return family name -> full names of the model classes that it supports."""
    return {name: family.models for name, family in _FAMILIES.items()}


def _class_names(model: object) -> list[str]:
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__]


def find_family(encoder: object) -> EncoderFamily | None:
    """Return the family of a model or of an instance of a subclass, or None."""
    families = list(reversed(_FAMILIES.values()))
    return next((family for name in _class_names(encoder) for family in families if name in family.models), None)


def family_of(encoder: object) -> EncoderFamily:
    """Return the family of an encoder.

    Raises:
        TypeError: the encoder belongs to no family, or can't take prompts; the message says what is supported.
    """
    family = find_family(encoder)
    if family is None:
        for name in _class_names(encoder):
            if name in _REFUSED:
                raise TypeError(f"{_whose(encoder)} is not supported: {_REFUSED[name]}")
        by_package: dict[str, list[str]] = {}
        for model in [model for models in supported_encoders().values() for model in models]:
            by_package.setdefault(model.partition(".")[0], []).append(model.rpartition(".")[2])
        models = "; ".join(f"{package}: {', '.join(names)}" for package, names in by_package.items())
        raise TypeError(f"{_whose(encoder)} is not a supported encoder: {_way_out(encoder)}. Expected one of {models}")
    if (problem := family.problem(encoder)) is not None:
        raise TypeError(f"{_whose(encoder)} can't take prompts: {problem}")
    return family


def _whose(encoder: object) -> str:
    """Name the class with its package: several libraries have a VisionTransformer."""
    package, name = type(encoder).__module__.partition(".")[0], type(encoder).__name__
    if package in ("__main__", "builtins"):
        return name
    return f"{package}' {name}" if package.endswith("s") else f"{package}'s {name}"


def _way_out(encoder: object) -> str:
    """Say what can be done with an encoder that belongs to no family."""
    parts = dict(encoder.named_modules()) if isinstance(encoder, nn.Module) else {}
    if inner := [f".{name}" for name, part in parts.items() if find_family(part)]:
        return f"its submodule {' or '.join(inner)} is supported, pass that"
    attends = any(word in type(part).__name__.lower() for part in parts.values() for word in ("attention", "attn"))
    if any(isinstance(part, nn.modules.conv._ConvNd) for part in parts.values()) and not attends:
        return (
            "convolutions have no attention to which prompts could be added as keys and values. It can be the complementary side: "
            "MoPEFusion(main, complementary=cnn, config=MoPEConfig(cross_dim=...)), where it returns (B, cross_dim) features"
        )
    return (
        "add its family with register_transformers_encoder or register_encoder (docs/own_transformer.md), or use it as the "
        "complementary side, which may be any module or function that returns (B, cross_dim) features"
    )


def encode(encoder: nn.Module, inputs: Tensor | Inputs | None = None, pooling: str | None = None, **named: Any) -> Tensor:
    """Return the global feature (B, D) of a supported encoder, without prompts.

    Args:
        encoder: a supported encoder, see :func:`mope_fast.supported_encoders`.
        inputs: the encoder's main input, or a dict of its keyword arguments.
        pooling: "cls", "mean" or "last", if its family has it, or several side by side, "cls+mean"; None for the family's default
            (docs/encoders.md).
        named: the encoder's keyword arguments, instead of ``inputs``. A fusion passes a dict to a function in this way.

    Raises:
        TypeError: both or neither of ``inputs`` and ``named`` were given, or the encoder is not supported.
        ValueError: its family doesn't have this pooling.
    """
    if (inputs is None) == (not named):
        raise TypeError(
            "encode takes either inputs (a tensor or a dict) or the encoder's keyword arguments by name, "
            f"got {'neither' if inputs is None else 'both'}"
        )
    inputs = named if inputs is None else inputs
    family = family_of(encoder)
    family.check_pooling(pooling)
    return family.encode(encoder, family.keyword_arguments(inputs), pooling)
