"""Verification of an encoder family's facts against the encoder's own layers on the concatenated sequence."""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..encoders import EncoderFamily, family_of, unwrap_encoder
from ..encoders.pooling import Pool
from ..modules import MoPEConfig
from .fusion import MoPEFusion

Inputs = dict[str, Any]
PromptsOf = Callable[[int, Tensor], Tensor]
_SETTINGS = {"num_experts": 2, "prompt_length": 3, "cross_dim": 5, "learn_keys": True, "temperature": 1.0}


def check_encoder(encoder: nn.Module, example: Tensor | Inputs, *, tolerance: float = 1e-9, compiled: bool = True) -> None:
    """Compare prompts as keys and values with the encoder's own layers on [prompts | tokens], without outputs at prompt positions.

    The concatenated sequence defines what a prompt means. Features, routing scores, and the gradients of all trained parameters are
    compared in float64, on a copy of the encoder whose weights are perturbed by noise, so that a bias of zeros can't hide an error.
    In the reference, the layers run on the longer sequence: prompts are visible to all tokens, have no position bias, and their
    rotary embedding is the identity.

    These cases are checked: the example; its first sample alone; for ``input_ids``, padding before, within and after a sample,
    where the ids at padding within a sample must not change the result; prompts mixed as prompts and, if exact, as keys and values,
    also folded; and one compiled graph. The encoder alone, both while it is wrapped and afterwards, and the width of its features
    are checked too. A line is printed for each case.

    The check can't tell whether features are pooled as the encoder's authors intend. It also can't find errors that the example
    doesn't trigger: use an example that is longer than the layers' windows, with a mask if images or audio have one.

    Args:
        encoder: a small encoder of a registered family; it is left unchanged.
        example: a bare tensor, or the encoder's keyword arguments: two or more samples, whose length differs from all widths.
        tolerance: the largest error allowed, relative to the largest absolute value if that is above 1.
        compiled: whether to check a compiled model too, if everything else passes.

    Raises:
        AssertionError: a check fails; the message says which one, and from which layer on.
        TypeError: the encoder belongs to no family, or can't take prompts.
        ValueError: its layers don't work on sequences (B, S, D), such as those of a Swin Transformer.
    """
    family = family_of(encoder)
    problems: list[str] = []
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        moved = _moved(encoder)
        variants = _variants(family, moved, tree_map(_as_float64, family.keyword_arguments(example)))
        for what, inputs in variants.items():
            for mixing in ("prompt", "kv"):
                with _Float64():
                    problems += _checked(f"{what}, mixing={mixing!r}", family, moved, inputs, mixing, tolerance)
        with _Float64():
            problems += _left_alone(family, moved, variants["the example"], tolerance)
        if compiled and not problems:
            problems += _compiled(family, moved, variants, tolerance)
    if problems:
        raise AssertionError(f"{type(encoder).__name__}, family {family.name!r}, doesn't fit:\n" + "\n".join(problems))


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Float64(TorchFunctionMode):
    """A mode that ignores casts from float64 to float32, so that norms and softmaxes that cast are as exact as the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and {part.dtype for part in args} == {torch.float32, torch.float64}:
            return func(*(part.double() for part in args), **kwargs)
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type, F.softmax, torch.softmax, Tensor.softmax):
                args, kwargs = tree_map(lambda value: torch.float64 if value is torch.float32 else value, (args, kwargs))
        return func(*args, **kwargs)


def _moved(encoder: nn.Module) -> nn.Module:
    moved = unwrap_encoder(copy.deepcopy(encoder)).cpu().double().eval().requires_grad_(False)
    for parameter in moved.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return moved


def _as_float64(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().double() if value.is_floating_point() else value.detach().cpu()


def _variants(family: EncoderFamily, encoder: nn.Module, inputs: Inputs) -> dict[str, Inputs]:
    batch = family.batch_size(inputs)
    variants = {"the example": inputs}
    if batch > 1:
        variants["one sample"] = {
            name: value[:1] if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value
            for name, value in inputs.items()
        }
    ids = inputs.get("input_ids")
    if ids is not None and ids.shape[1] >= 4 and "attention_mask" in inspect.signature(encoder.forward).parameters:
        position, third = torch.arange(ids.shape[1]).expand_as(ids), ids.shape[1] // 3
        for what, real in (
            ("padding behind", position < 2 * third), ("padding within", (position < third) | (position >= 2 * third)),
            ("padding before", position >= third),
        ):  # fmt: skip
            real = real.clone()
            real[1:] = True
            variants[what] = {**inputs, "attention_mask": real.long()}
    return variants


def _fused(encoder: nn.Module, mixing: str) -> MoPEFusion:
    torch.manual_seed(1)
    return MoPEFusion(copy.deepcopy(encoder), config=MoPEConfig(mixing=mixing, **_SETTINGS)).double().eval()


def _cross(family: EncoderFamily, inputs: Inputs) -> Tensor:
    return torch.randn(family.batch_size(inputs), _SETTINGS["cross_dim"], dtype=torch.float64)


def _checked(
    what: str, family: EncoderFamily, encoder: nn.Module, inputs: Inputs, mixing: str, tolerance: float
) -> list[str]:  # fmt: skip
    """Return the problems found in one variant."""
    model, cross = _fused(encoder, mixing), _cross(family, inputs)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with _outputs_of([layer.module for layer in family.layers(model.main.encoder)]) as seen:
            output = model(inputs, cross)
    except Exception as error:
        if mixing == "kv" and "is not exact here" in str(error):
            print(f"{what}: not exact, {str(error).partition('here: ')[2].partition(';')[0]}")
            return []
        print(f"{what}: fails")
        return [f"{what}: {type(error).__name__}: {error}"]

    try:
        feature, scores, expected_seen = _own_words(family, encoder, inputs, model, cross)
    except _NoSequenceError:
        raise
    except Exception as error:
        print(f"{what}: fails")
        return [f"{what}: the encoder's own layers on the longer sequence raise {type(error).__name__}: {error}"]
    errors = {"features": _error(output.features, feature), "scores": _error(output.scores, torch.stack(scores))}
    if feature.shape[-1] != family.feature_width(encoder):
        return [f"{what}: features are {feature.shape[-1]} wide, feature_width says {family.feature_width(encoder)}"]
    if "padding within" in what:  # the other paddings are at positions where some encoders pool
        errors["other padding"] = _error(model(_other_padding(inputs), cross).features, output.features)
    if mixing == "kv":
        try:
            errors["folded features"] = _error(model.fold()(inputs, cross).features, feature)
        except ValueError as error:
            print(f"{what}: {error}")
    upstream = torch.randn_like(feature)
    got, expected = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (output.features, feature))
    of_leaves = {name: _error(a, b) for name, a, b in zip(names, got, expected, strict=True)}
    worst = max(of_leaves, key=lambda name: of_leaves[name])
    errors[f"gradients ({worst})"] = of_leaves[worst]
    print(f"{what}: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    wrong = [f"{name} differ by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    if not wrong:
        return []
    by_layer = [_error(a, b) for a, b in zip(seen, expected_seen, strict=True)]
    first = next((index for index, error in enumerate(by_layer) if not error <= tolerance), None)
    where = "after the last layer" if first is None else f"from layer {first} on"
    return [f"{what}: {', '.join(wrong)} (allowed: {tolerance:.0e}), {where}"]


def _own_words(
    family: EncoderFamily, encoder: nn.Module, inputs: Inputs, model: MoPEFusion, cross: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the feature from the encoder's own layers on the concatenation, routing scores, and the tokens after each layer."""
    plain = copy.deepcopy(encoder)
    if hasattr(plain, "set_attn_implementation"):
        plain.set_attn_implementation("eager")
    context, scores, seen = model.bank.prepare(cross), [], []
    pool: Pool = family.router_pool(plain, inputs)

    def prompts_of(index: int, hidden_states: Tensor) -> Tensor:
        out = model.bank.layer(index, pool(hidden_states), context)
        scores.append(out.scores)
        return out.prompts

    with _on_concatenation([layer.module for layer in family.layers(plain)], prompts_of, seen):
        return family.encode(plain, inputs), scores, seen


def _other_padding(inputs: Inputs) -> Inputs:
    """Replace the ids where the mask is zero by the id of a real token."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    return {**inputs, "input_ids": torch.where(real, ids, ids[0][real[0]][-1])}


def _left_alone(family: EncoderFamily, encoder: nn.Module, inputs: Inputs, tolerance: float) -> list[str]:
    """Return the changes in the features of an encoder that is called on its own, while a model wraps it and afterwards."""
    problems, expected = [], family.encode(copy.deepcopy(encoder), inputs)
    model = _fused(encoder, "auto")
    for when in ("while wrapped", "after unwrap"):
        error = _error(family.encode(model.main.encoder if when == "while wrapped" else model.unwrap()[0], inputs), expected)
        print(f"alone {when}: features {error:.1e}")
        if not error <= tolerance:
            problems.append(f"the encoder alone {when}: features differ by {error:.1e} from what they were")
    return problems


def _compiled(family: EncoderFamily, encoder: nn.Module, variants: dict[str, Inputs], tolerance: float) -> list[str]:
    model, problems = _fused(encoder, "auto"), []
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for what in ("the example", "padding within"):
        if (inputs := variants.get(what)) is None:
            continue
        cross = _cross(family, inputs)
        # the recompile limit counts all models of one class together
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1000):
            try:
                error = _error(compiled(inputs, cross).features, model(inputs, cross).features)
            except Exception as failure:
                reason = str(failure).strip().partition("\n")[0]
                problems.append(f"{what}, compiled: torch.compile(fullgraph=True) fails with {type(failure).__name__}: {reason}")
                print(f"{what}, compiled: fails")
                continue
        print(f"{what}, compiled: features {error:.1e}")
        # parts that compute in float32 internally may be compiled in another order
        if not error <= max(tolerance, 1e-5):
            problems.append(f"{what}, compiled: features differ by {error:.1e} from those without torch.compile")
    return problems


def _error(got: Tensor | None, expected: Tensor | None) -> float:
    """Return the largest absolute difference, relative to the largest expected absolute value if that is above 1."""
    if got is None or expected is None:
        return 0.0 if got is expected else float("inf")
    if got.shape != expected.shape:
        return float("inf")
    error = ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    return float("inf") if math.isnan(error) else error


@contextmanager
def _outputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the hidden states that layers return, in order."""
    seen: list[Tensor] = []
    handles = [module.register_forward_hook(lambda module, args, out: seen.append(_first(out).detach())) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    return next(value for value in tree_leaves(output) if isinstance(value, Tensor))


@contextmanager
def _on_concatenation(modules: list[nn.Module], prompts_of: PromptsOf, seen: list[Tensor]) -> Iterator[None]:
    """Run each layer on [prompts | tokens] within the block; it returns only its tokens, whose hidden states go to ``seen``."""
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            forward = functools.partial(_concatenated, index, module, module.forward, prompts_of, seen)
            stack.enter_context(_attribute(module, "forward", forward))
        yield


class _NoSequenceError(ValueError):
    pass


@contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute on the module for the block, replacing its own or its class's."""
    missing = object()
    before = vars(module).get(name, missing)
    setattr(module, name, value)
    try:
        yield
    finally:
        delattr(module, name) if before is missing else setattr(module, name, before)


def _concatenated(
    index: int,
    module: nn.Module,
    forward: Callable[..., Any],
    prompts_of: PromptsOf,
    seen: list[Tensor],
    /,
    *args: Any,
    **named: Any,
) -> Any:
    hidden_states = args[0] if args else named["hidden_states"]
    if hidden_states.dim() != 3:
        raise _NoSequenceError(
            f"check_encoder needs layers on sequences (B, S, D), but {type(module).__name__} was given {tuple(hidden_states.shape)}"
        )
    prompts = prompts_of(index, hidden_states)
    length, tokens = prompts.shape[1], hidden_states.shape[1]
    names = [*inspect.signature(forward).parameters, *[""] * len(args)]
    args = tuple(_longer(name, value, length, tokens) for name, value in zip(names, args, strict=False))
    named = {name: _longer(name, value, length, tokens) for name, value in named.items()}
    longer = torch.cat([prompts.expand(len(hidden_states), -1, -1), hidden_states], dim=1)
    if args:
        args = (longer, *args[1:])
    else:
        named["hidden_states"] = longer
    with _aware_of_prompts(module, length, tokens):
        output = _without_prompts(forward(*args, **named), length, tokens)
    seen.append(_first(output).detach())
    return output


def _longer(name: str, value: Any, length: int, tokens: int) -> Any:
    """Extend a layer's argument by ``length`` prompts: masks make them visible, biases are zero, rotations the identity."""
    if isinstance(value, dict):
        return {key: _longer(key, part, length, tokens) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        if "position_embeddings" in name and len(value) == 2 and value[0].shape[-2] == tokens:
            return tuple(F.pad(part, (0, 0, length, 0), value=fill) for part, fill in zip(value, (1.0, 0.0), strict=True))
        return type(value)(_longer(name, part, length, tokens) for part in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] != tokens or "position_ids" in name:
        return value
    square = value.shape[-2] == tokens and (value.dim() > 2 or value.is_floating_point())
    if value.is_floating_point():
        # a mask with 1 for real tokens, or one that is added to the attention logits
        shown = 1.0 if value.dim() == 2 and not square and value.max() == 1 else 0.0
    else:
        shown = int("padding_mask" not in name)  # torch's key_padding_mask is True for masked tokens
    return F.pad(value, (length, 0, length, 0) if square else (length, 0), value=shown)


def _without_prompts(output: Any, length: int, tokens: int) -> Any:
    """Cut a layer's output to its tokens: the hidden states, which come first, and position biases for the next layer."""
    hidden_states = _first(output)

    def cut(value: Any) -> Any:
        if value is hidden_states:
            return value[:, length:]
        square = isinstance(value, Tensor) and value.dim() > 2 and value.shape[-2:] == (length + tokens, length + tokens)
        return value[..., length:, length:] if square else value

    return tree_map(cut, output)


@contextmanager
def _aware_of_prompts(module: nn.Module, length: int, tokens: int) -> Iterator[None]:
    """Within the block, position biases made by a layer's parts are zero at prompts, and prompts count as unrotated tokens."""

    def padded(part: nn.Module, args: Any, output: Any) -> Any:
        of_tokens = isinstance(output, Tensor) and output.shape[-2:] == (tokens, tokens)
        return F.pad(output, (length, 0, length, 0)) if of_tokens else None

    def compute_bias(original: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        """Compute the bias from distances, as T5 and WavLM do, with zeros at prompts."""
        bias = original(*args, **named)
        of_token = torch.arange(length + tokens) >= length
        return bias * of_token * of_token[:, None]

    with ExitStack() as stack:
        for part in module.modules():
            if part is not module:
                stack.callback(part.register_forward_hook(padded).remove)
            if hasattr(part, "compute_bias"):
                stack.enter_context(_attribute(part, "compute_bias", functools.partial(compute_bias, part.compute_bias)))
            if hasattr(part, "_get_rel_pos_bias"):  # timm's BEiT
                bias = part._get_rel_pos_bias
                stack.enter_context(_attribute(part, "_get_rel_pos_bias", lambda bias=bias: F.pad(bias(), (length, 0, length, 0))))
            if isinstance(fixed := getattr(part, "num_prefix_tokens", None), int):
                stack.enter_context(_attribute(part, "num_prefix_tokens", fixed + length))
        yield
