"""Encoder inputs passed by their own names, as tokenizers, image processors and transformers' Trainer do."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..encoders import PromptedEncoder
from .prompting import Inputs
from .sides import PRESENT, Sides

NAMES = (
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "pixel_values", "bool_masked_pos",
    "interpolate_pos_encoding", "input_values", "input_features", "x", "img",
)  # fmt: skip
"""Names that supported encoders use for their inputs; timm's models take an x, vit-pytorch's an img."""


def takes_named_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Add NAMES to the signature of a forward with ``**named``, because the Trainer drops data set columns that are not in it."""
    signature = inspect.signature(forward)
    *own, rest = signature.parameters.values()
    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in NAMES]
    forward.__signature__ = signature.replace(parameters=[*own, *names, rest])
    return forward


def one_side(encoder: PromptedEncoder, inputs: Inputs | None, named: Mapping[str, Any]) -> Inputs:
    """Return the inputs of a model with one encoder.

    They are a tensor or a dict, or are given by their own names, in which case the main input may still be passed as the tensor.

    Raises:
        TypeError: there are no inputs, both a dict and names are given, or the encoder doesn't have a name.
    """
    if not (named := _given(named)):
        if inputs is None:
            raise TypeError("the encoder's inputs are missing: pass a tensor, a dict, or each by its own name")
        return inputs
    if inputs is not None and not isinstance(inputs, Tensor):
        raise TypeError(f"pass the encoder's inputs as a dict or each by its own name, not both; got a dict and {_listed(named)}")
    if unknown := [name for name in named if name not in encoder.input_names]:
        raise TypeError(f"the encoder takes no {_listed(unknown)} by name: it takes {_listed(sorted(encoder.input_names))}")
    return _with_main(encoder, inputs, named)


def _with_main(encoder: PromptedEncoder, inputs: Tensor | None, named: dict[str, Any]) -> Inputs:
    if inputs is None:
        return named
    if (name := encoder.family.input_name) in named:
        raise TypeError(f"{name} is given twice, as a tensor and by its name")
    return {name: inputs, **named}


def two_sides(
    main: PromptedEncoder,
    complementary: object,
    main_inputs: Inputs | None,
    complementary_inputs: Inputs | None,
    named: Mapping[str, Any],
) -> tuple[Inputs, Inputs | None]:
    """Return main and complementary inputs, either or both of which may be given by their own names.

    Names in the main encoder's forward signature go to the main encoder, all others to the complementary side.

    Raises:
        TypeError: a name fits both sides or neither, or there are no main inputs.
    """
    if named := _given(named):
        # a tensor is a side's main input, and named inputs may come in addition to it
        of_main = main.input_names if main_inputs is None or isinstance(main_inputs, Tensor) else frozenset()
        of_other = _names_of(complementary, complementary_inputs)
        in_both = [name for name in named if name in of_main and of_other is not None and name in of_other]
        unknown = [name for name in named if name not in of_main and of_other is not None and name not in of_other]
        if in_both or unknown:
            if in_both:
                problem = f"{_listed(in_both)} could belong to either encoder"
            else:
                taken = f"the main side takes {_listed(sorted(of_main))}, the other {_listed(sorted(of_other))}"
                problem = f"neither side takes {_listed(unknown)} by name in addition to the given inputs ({taken})"
            raise TypeError(f"{problem}: pass main_inputs={{...}} and complementary_inputs={{...}}")
        own = {name: value for name, value in named.items() if name in of_main}
        others = {name: value for name, value in named.items() if name not in of_main}
        main_inputs = _with_main(main, main_inputs, own) if own else main_inputs
        if others:
            side = getattr(complementary, "main", None)
            complementary_inputs = _with_main(side, complementary_inputs, others)
    if main_inputs is None:
        names = _listed(sorted(main.input_names))
        raise TypeError(
            f"the main encoder's inputs are missing: pass main_inputs (a tensor, or a dict), or each by its name: {names}"
        )
    return main_inputs, complementary_inputs


def _given(named: Mapping[str, Any]) -> dict[str, Any]:
    """Drop arguments that are None, and ``return_dict``, which peft passes to every model."""
    return {name: value for name, value in named.items() if value is not None and name != "return_dict"}


def _names_of(complementary: object, inputs: Inputs | None) -> frozenset[str] | None:
    """Return the names that the complementary side takes in addition to these inputs; None if that can't be known."""
    if isinstance(complementary, Sides) and inputs is None:
        return frozenset((*complementary.facts, PRESENT))
    side = getattr(complementary, "main", None)
    if isinstance(side, PromptedEncoder) and (inputs is None or isinstance(inputs, Tensor)):
        return side.input_names
    return None if inputs is None and complementary is not None else frozenset()


def _listed(names: Any) -> str:
    *first, last = [*names] or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last
