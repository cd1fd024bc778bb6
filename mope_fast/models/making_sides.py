"""A fusion's complementary sides made of what the user gives: checked, wrapped, held."""

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
    """What gives a side's feature, and what has been done to encoders and modules for it."""

    value: nn.Module | Callable[..., Tensor] | None
    wrapped: tuple[PromptedEncoder, ...] = ()
    holds: tuple[Hold, ...] = ()
    has_new_prompts: bool = False


def make_side(name: str, side: Side, config: MoPEConfig, frozen: Sequence[nn.Module], *, several: bool) -> MadeSide:
    """One side, ready; ``frozen`` is all that is held in this model.

    Raises:
        ValueError: settings that don't fit the source, or a module that can't be trained, or held frozen.
    """
    source = side.source
    asked = config.complementary_pooling if side.pooling is None else side.pooling
    if _is_encoder(source):
        encoder = prompted(source, pooling=asked)
        length = config.complementary_prompt_length if side.prompt_length is None else side.prompt_length
        tuned = PromptTuned(encoder, length, dropout=config.dropout, prompt_init=config.prompt_init)
        return MadeSide(tuned, () if encoder is source else (encoder,), has_new_prompts=True)
    # what came wrapped has poolings of its own; of several sides the config's is for those that are encoders
    own, asked = source.main.pooling if is_prompted_model(source) else None, side.pooling if several else asked
    if asked not in (None, own):
        what = "Side.pooling" if several else "complementary_pooling"
        raise ValueError(
            f"{what}={asked!r} was asked for, but {name}, {type(source).__name__}, has pooling={own!r}: set it where it is made, "
            "or leave the model's at None"
        )
    if side.prompt_length is not None and (own := getattr(source, "settings", {}).get("prompt_length")) != side.prompt_length:
        raise ValueError(f"prompt_length={side.prompt_length} was asked for, but {name}, {type(source).__name__}, has {own}")
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
    """Raises TypeError or ValueError for what can give no feature."""
    source = side.source
    if isinstance(source, Side):
        raise TypeError(f"{name} is a Side by itself: give it a name, complementary={{'image': Side(...)}}")
    if source is not None and not callable(source):
        raise TypeError(f"{name} must be a supported encoder, a callable or None, got {type(source).__name__}")
    if is_prompted_model(source) and not isinstance(source, (PromptTuned, FoldedModel)):
        kind = type(source).__name__
        raise TypeError(f"{name} can't be a {kind}: pass PromptTuned, a folded model, or a function of its features")
    if isinstance(source, FoldedModel) and source.uses_cross:
        raise TypeError(f"{name} can't be a folded fusion, which needs another side itself: pass a function of its features")
    if getattr(source, "return_logits", False):
        raise ValueError(f"{name} has return_logits=True, but its features are needed: make it without")
    if side.trainable and (_is_encoder(source) or is_prompted_model(source)):
        raise ValueError(
            f"{name}: trainable=True trains a module whole, and a {type(source).__name__} is held frozen with trained prompts in "
            "it: leave it out; or wrap the encoder in a module of yours that gives (B, width)"
        )


def width_of(name: str, side: Side, config: MoPEConfig, *, several: bool) -> int | None:
    """Of a side's feature; None where it can't be known.

    Raises:
        ValueError: it is another than was asked for.
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
    """The settings with the widths of several features."""
    if unknown := [name for name, width in widths.items() if width is None]:
        raise ValueError(f"the width of the feature of {unknown} can't be inferred: Side(..., width=...)")
    if config.combine == "sum":
        if len(set(widths.values())) > 1:
            raise ValueError(f"MoPEConfig.combine='sum' needs features of one width, got {widths}")
        width = next(iter(widths.values()))
        if config.side_dims is not None or config.cross_dim not in (None, width):
            raise ValueError(
                f"features are summed to one of width {width}: leave MoPEConfig.side_dims and cross_dim at None, "
                f"got {config.side_dims} and {config.cross_dim}"
            )
        return dataclasses.replace(config, cross_dim=width)
    if config.side_dims not in (None, sizes := tuple(widths.values())):
        raise ValueError(f"MoPEConfig.side_dims is {config.side_dims}, but the features of {list(widths)} have {sizes}")
    return dataclasses.replace(config, side_dims=sizes)
