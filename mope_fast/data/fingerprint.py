"""Content hashes that identify samples and encoders."""

import hashlib
import json
from collections.abc import Collection
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

KEY_BYTES = 16
SWITCHES = ("training", "fused_attn", "grad_checkpointing", "gradient_checkpointing")
"""Module attributes that select how something is computed, not what; left out of the fingerprint."""
# settings of a transformers config that name a version, a path or an implementation, and don't change the function computed
VOLATILE = ("transformers_version", "architectures", "dtype", "torch_dtype", "attn_implementation")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor of any dtype; they share its memory if it is contiguous."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _on_host(tensor: Tensor) -> Tensor:
    # a lazily conjugated or negated tensor shares the bytes of another one
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def sample_keys(inputs: dict[str, Tensor], padded: Collection[str] = ()) -> list[bytes]:
    """Return one key for each sample: a hash of names, dtypes, shapes and bytes.

    Args:
        inputs: tensors (B, ...) with the same B >= 1.
        padded: names of tensors of token sequences. If ``inputs`` has an ``attention_mask`` (B, S), positions after a sample's last
            real token (mask nonzero) are left out of those of these tensors that are (B, S, ...).
    """
    tensors = {name: _on_host(inputs[name]) for name in sorted(inputs)}
    mask = tensors.get("attention_mask")
    lengths = _real_lengths(mask) if padded and mask is not None and mask.dim() == 2 and mask.numel() else []
    batch = len(next(iter(tensors.values())))
    digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(batch)]
    for name, tensor in tensors.items():
        data, shape = raw_bytes(tensor), tuple(tensor.shape[1:])
        size = tensor.nbytes // batch
        cut = bool(lengths) and name in padded and shape[:1] == mask.shape[1:]
        for i, digest in enumerate(digests):
            kept, end = ((lengths[i], *shape[1:]), lengths[i] * (size // shape[0])) if cut else (shape, size)
            # ``cut`` is hashed so that a truncated input never gets the key of a whole one
            digest.update(repr((name, str(tensor.dtype), kept, cut)).encode())
            digest.update(data[i * size : i * size + end])
    return [digest.digest() for digest in digests]


def _real_lengths(mask: Tensor) -> list[int]:
    """Return the position at which the padding of each row of the mask (B, S) begins."""
    tokens = mask.shape[1]
    lengths = (mask.ne(0) * torch.arange(1, tokens + 1)).amax(1)
    # a sample without any real token is kept whole
    return torch.where(lengths > 0, lengths, tokens).tolist()


def encoder_fingerprint(encoder: nn.Module) -> str:
    """Return a hash of an encoder's class, structure, settings, configuration, parameters and buffers.

    Device and training mode are left out. So are attributes that are not numbers, strings, functions, or lists and dicts of them.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    configs: list[Any] = []
    for name, module in encoder.named_modules():
        digest.update(repr((name, type(module).__name__, module.extra_repr(), _settings(module))).encode())
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict") and not any(config is known for known in configs):
            configs.append(config)
            digest.update(json.dumps(_lasting(config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted([*encoder.named_parameters(), *encoder.named_buffers()], key=lambda item: item[0]):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(raw_bytes(_on_host(tensor)))
    return digest.hexdigest()


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Return plain public attributes: settings that don't show in parameters, such as timm's pooling."""
    names = sorted(name for name in vars(module) if not name.startswith("_") and name not in SWITCHES)
    return [(name, value) for name in names if (value := _plain(vars(module)[name])) is not None]


def _plain(value: Any) -> Any:
    """Return a representation that is the same in every process, or None if there is none."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return [(str(key), _plain(item)) for key, item in value.items()]
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, (FunctionType, BuiltinFunctionType, type)) else None


def _lasting(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {str(k): _lasting(v) for k, v in config.items() if not str(k).startswith("_") and k not in VOLATILE}
