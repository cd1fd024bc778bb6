"""Construction of a fusion's complementary sides from user arguments: checks, wrapping, freezing."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..encoders import PromptedEncoder, family_of, find_family
from ..encoders.frozen import Hold
from ..modules import MoPEConfig
from .complementary import check_can_be_trained, check_holds_no_prompts, is_prompted_model
from .folded import FoldedModel
from .prompt_tuned import PromptTuned
from .sides import Side
from .task import check_is_trained, prompted


class MadeSide(NamedTuple):
    """A side's feature source, and the encoders wrapped and modules frozen for it."""

    value: nn.Module | Callable[..., Tensor] | None
    wrapped: tuple[PromptedEncoder, ...] = ()
    holds: tuple[Hold, ...] = ()
    has_new_prompts: bool = False


def make_side(name: str, side: Side, config: MoPEConfig, frozen: Sequence[nn.Module], *, several: bool) -> MadeSide:
    """Build one side; ``frozen`` lists all frozen modules of this model.

    Raises:
        ValueError: settings don't fit the source, or a module can't be trained or can't be kept frozen.
    """
    source = side.source
    asked = config.complementary_pooling if side.pooling is None else side.pooling
    if _is_encoder(source):
        encoder = prompted(source, pooling=asked)
        length = config.complementary_prompt_length if side.prompt_length is None else side.prompt_length
        tuned = PromptTuned(encoder, length, dropout=config.dropout, prompt_init=config.prompt_init)
        return MadeSide(tuned, () if encoder is source else (encoder,), has_new_prompts=True)
    # a prompted model has its own pooling; with several sides, the config's pooling applies only to sides that are encoders
    own, asked = source.main.pooling if is_prompted_model(source) else None, side.pooling if several else asked
    if asked not in (None, own):
        what = "Side.pooling" if several else "complementary_pooling"
        raise ValueError(
            f"{what}={asked!r} was requested, but {name}, {type(source).__name__}, has pooling={own!r}: set it where that is "
            "created, or leave the model's at None"
        )
    if side.prompt_length is not None and (own := getattr(source, "settings", {}).get("prompt_length")) != side.prompt_length:
        raise ValueError(f"prompt_length={side.prompt_length} was requested, but {name}, {type(source).__name__}, has {own}")
    if side.trainable:
        check_can_be_trained(name, source)
        check_is_trained(source, *frozen, name=name)
    elif isinstance(source, nn.Module) and not is_prompted_model(source):
        check_holds_no_prompts(name, source)
        return MadeSide(source, holds=(Hold(source),))
    return MadeSide(source)


def _is_encoder(complementary: object) -> bool:
    return isinstance(complementary, PromptedEncoder) or (complementary is not None and find_family(complementary) is not None)


def check_source(name: str, side: Side) -> None:
    """Raise TypeError or ValueError for a source that can't provide a feature."""
    source = side.source
    if isinstance(source, Side):
        raise TypeError(f"{name} is a Side without a name: give it one, complementary={{'image': Side(...)}}")
    if source is not None and not callable(source):
        raise TypeError(f"{name} must be a supported encoder, a callable or None, got {type(source).__name__}")
    if is_prompted_model(source) and not isinstance(source, (PromptTuned, FoldedModel)):
        kind = type(source).__name__
        raise TypeError(f"{name} can't be a {kind}: pass PromptTuned, a folded model, or a function that returns its features")
    if isinstance(source, FoldedModel) and source.uses_cross:
        raise TypeError(
            f"{name} can't be a folded fusion, which itself needs another side: pass a function that returns its features"
        )
    if getattr(source, "return_logits", False):
        raise ValueError(f"{name} has return_logits=True, but its features are needed: create it with return_logits=False")
    if side.trainable and (_is_encoder(source) or is_prompted_model(source)):
        raise ValueError(
            f"{name}: trainable=True trains a whole module, but a {type(source).__name__} is kept frozen and only its prompts are "
            "trained: leave trainable out; or wrap the encoder in your own module that returns (B, width)"
        )


def width_of(name: str, side: Side, config: MoPEConfig, *, several: bool) -> int | None:
    """Return the width of a side's feature; None if it can't be inferred.

    Raises:
        ValueError: the width differs from the one requested.
    """
    source, asked = side.source, side.width if several else config.cross_dim
    pooling = config.complementary_pooling if side.pooling is None else side.pooling
    if _is_encoder(source) and not isinstance(source, PromptedEncoder):
        width = family_of(source).pooled_width(source, pooling)
    else:
        width = getattr(source, "feature_width", None)
    if width is not None and asked not in (None, width):
        what = f"Side.width of {name!r}" if several else "config.cross_dim"
        raise ValueError(f"{what} is {asked}, but {type(source).__name__} gives features of width {width}")
    return asked if width is None else width


def settings_of_sides(config: MoPEConfig, widths: dict[str, int | None]) -> MoPEConfig:
    """Return the settings with the widths of several features filled in."""
    if unknown := [name for name, width in widths.items() if width is None]:
        raise ValueError(f"the width of the feature of {unknown} can't be inferred: set Side(..., width=...)")
    if config.combine == "sum":
        if len(set(widths.values())) > 1:
            raise ValueError(f"MoPEConfig.combine='sum' needs features of equal width, got {widths}")
        width = next(iter(widths.values()))
        if config.side_dims is not None or config.cross_dim not in (None, width):
            raise ValueError(
                f"features are summed to one feature of width {width}: leave MoPEConfig.side_dims and cross_dim at None, "
                f"got {config.side_dims} and {config.cross_dim}"
            )
        return dataclasses.replace(config, cross_dim=width)
    if config.side_dims not in (None, sizes := tuple(widths.values())):
        raise ValueError(f"MoPEConfig.side_dims is {config.side_dims}, but the features of {list(widths)} have {sizes}")
    return dataclasses.replace(config, side_dims=sizes)
