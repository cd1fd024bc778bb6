"""Identify an encoder's weights by a few numbers of each tensor, few enough to be kept in every save."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .prompted import PromptedEncoder

SAMPLED = 8
"""How many numbers are sampled from each tensor."""
_TOLERANCE = {"rtol": 2.0**-7, "atol": 1e-7}
"""Tolerance for a number that was rounded to bfloat16, and perhaps to float16 before that."""
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")

Samples = dict[str, dict[str, str]]
"""Parameter name -> its numbers as hexadecimal bfloat16, in two groups: "needed" for an encoder's layers, "others" for parts that
it may or may not have (a head, a pooler)."""


def plain_name(key: str) -> str:
    """Remove the prefixes that torch.compile and torch's checkpoint wrapper add to names of modules inside a model."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


@torch.no_grad()
def sample_weights(part: nn.Module, layers: Sequence[nn.Module] | None = None) -> Samples | None:
    """Sample numbers of each parameter; they don't depend on whether the encoder is wrapped, on its device or on its precision.

    Args:
        part: a :class:`PromptedEncoder`, or any module.
        layers: the modules whose parameters go under "needed"; default: the layers of a PromptedEncoder, all of any other module.

    Returns:
        The samples, or None if the parameters can't be read cheaply: sharded, quantised, or without storage.
    """
    encoder = part.encoder if isinstance(part, PromptedEncoder) else part
    if layers is None:
        layers = [layer.module for layer in part.layers] if isinstance(part, PromptedEncoder) else [part]
    needed = {id(parameter) for layer in layers for parameter in layer.parameters()}
    parameters = [(plain_name(name), p) for name, p in encoder.named_parameters() if p.numel()]
    if any(type(p) is not nn.Parameter or p.is_meta or not p.is_floating_point() for _, p in parameters):
        return None
    taken = [p.flatten()[:: max(1, p.numel() // SAMPLED)][:SAMPLED].to(torch.bfloat16) for _, p in parameters]
    samples: Samples = {"needed": {}, "others": {}}
    for (name, parameter), numbers in zip(parameters, _on_host(taken), strict=True):
        samples["needed" if id(parameter) in needed else "others"][name] = numbers.view(torch.uint8).numpy().tobytes().hex()
    return samples


def _on_host(tensors: list[Tensor]) -> Iterable[Tensor]:
    """Copy the tensors to the host, all tensors of one device in one copy."""
    groups = [list(group) for _, group in itertools.groupby(tensors, key=lambda tensor: tensor.device)]
    return itertools.chain.from_iterable(torch.cat(group).cpu().split([len(tensor) for tensor in group]) for group in groups)


def differences(saved: Samples, own: Samples) -> list[str]:
    """Describe how two encoders' weights differ, beyond rounding to half precision; an empty list if they are the same."""
    found = [f"{name} is missing" for name in saved["needed"] if name not in own["needed"]]
    found += [f"{name} is new" for name in own["needed"] if name not in saved["needed"]]
    for kind, tensors in own.items():
        for name in tensors.keys() & saved[kind].keys():
            before, now = _numbers(saved[kind][name]), _numbers(tensors[name])
            if len(before) != len(now):
                found.append(f"{name} has another size")
            elif len(other := (~torch.isclose(now, before, **_TOLERANCE)).nonzero()):
                index = other[0].item()
                found.append(f"{name} has {now[index].item():.4g}, had {before[index].item():.4g}")
    return sorted(found)


def _numbers(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16).float()
