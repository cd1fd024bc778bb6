"""Encoders' inputs by their own names, as tokenizers, image processors and transformers' Trainer pass them."""

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
"""What supported encoders call their inputs; timm's models take an x, vit-pytorch's an img."""


def takes_named_inputs(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have the signature of a forward with ``**named`` list NAMES: the Trainer drops columns of a data set that it doesn't."""
    signature = inspect.signature(forward)
    *own, rest = signature.parameters.values()
    names = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in NAMES]
    forward.__signature__ = signature.replace(parameters=[*own, *names, rest])
    return forward


def one_side(encoder: PromptedEncoder, inputs: Inputs | None, named: Mapping[str, Any]) -> Inputs:
    """The inputs of a model of one encoder: a tensor or a dict, or by their own names, the main one perhaps as the tensor.

    Raises:
        TypeError: there are none, a dict beside names, or a name that the encoder doesn't have.
    """
    if not (named := _given(named)):
        if inputs is None:
            raise TypeError("the encoder's inputs are missing: pass a tensor, a dict, or each by its own name")
        return inputs
    if inputs is not None and not isinstance(inputs, Tensor):
        raise TypeError(f"the encoder's inputs go in as a dict or each by its own name, got a dict and {_listed(named)}")
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
    """Main and complementary inputs, of which one or both may be given by their own names.

    What the main encoder's forward names is the main one's, the rest the other's.

    Raises:
        TypeError: a name may be of either side, or is of neither; or there are no main inputs.
    """
    if named := _given(named):
        # what comes as a tensor is a side's main input, which may have others beside it
        of_main = main.input_names if main_inputs is None or isinstance(main_inputs, Tensor) else frozenset()
        of_other = _names_of(complementary, complementary_inputs)
        in_both = [name for name in named if name in of_main and of_other is not None and name in of_other]
        unknown = [name for name in named if name not in of_main and of_other is not None and name not in of_other]
        if in_both or unknown:
            if in_both:
                problem = f"{_listed(in_both)} may be of either encoder"
            else:
                taken = f"the main one {_listed(sorted(of_main))}, the other {_listed(sorted(of_other))}"
                problem = f"neither side takes {_listed(unknown)} by name beside what is given ({taken})"
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
    """Without what is None, and without the question of how to return, which peft asks every model."""
    return {name: value for name, value in named.items() if value is not None and name != "return_dict"}


def _names_of(complementary: object, inputs: Inputs | None) -> frozenset[str] | None:
    """What the complementary side takes by name beside these inputs; None where that can't be known."""
    if isinstance(complementary, Sides) and inputs is None:
        return frozenset((*complementary.facts, PRESENT))
    side = getattr(complementary, "main", None)
    if isinstance(side, PromptedEncoder) and (inputs is None or isinstance(inputs, Tensor)):
        return side.input_names
    return None if inputs is None and complementary is not None else frozenset()


def _listed(names: Any) -> str:
    *first, last = [*names] or ["nothing"]
    return f"{', '.join(first)} and {last}" if first else last
