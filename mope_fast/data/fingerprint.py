"""Hashes of content: which sample is this, which encoder is this."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

KEY_BYTES = 16
# settings of a transformers config that name a version, a path or an implementation, not a function
SWITCHES = ("training", "fused_attn", "grad_checkpointing", "gradient_checkpointing")
"""Of modules: how, not what they compute."""
VOLATILE = ("transformers_version", "architectures", "dtype", "torch_dtype", "attn_implementation")


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor of any dtype; its own memory if it is contiguous."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _on_host(tensor: Tensor) -> Tensor:
    # a lazy conjugate or negative has the bytes of another tensor
    return tensor.detach().cpu().resolve_conj().resolve_neg()


def sample_keys(inputs: dict[str, Tensor]) -> list[bytes]:
    """One key for each sample, of names, dtypes, shapes and bytes.

    What is behind a sample's last real token, by an ``attention_mask`` (B, S), is left out of every tensor (B, S, ...) if it looks
    like padding: zeros, or one repeated integer. A table or an image whose second dimension happens to be S is no padding.

    Args:
        inputs: tensors (B, ...) with one B >= 1.
    """
    tensors = {name: _on_host(inputs[name]) for name in sorted(inputs)}
    lengths, padded = _real_lengths(tensors.get("attention_mask"))
    batch = len(next(iter(tensors.values())))
    digests = [hashlib.blake2b(digest_size=KEY_BYTES) for _ in range(batch)]
    for name, tensor in tensors.items():
        data, shape = raw_bytes(tensor), tuple(tensor.shape[1:])
        size = tensor.nbytes // batch
        for i, digest in enumerate(digests):
            sample, kept = data[i * size : (i + 1) * size], shape
            if lengths and shape and shape[0] == padded:
                end = lengths[i] * (size // padded)
                if _is_padding(sample[end:], tensor):
                    sample, kept = sample[:end], (lengths[i], *shape[1:])
            digest.update(repr((name, str(tensor.dtype), kept)).encode())
            digest.update(sample)
    return [digest.digest() for digest in digests]


def _real_lengths(mask: Tensor | None) -> tuple[Sequence[int], int]:
    """Where each sample's padding begins, and S; no lengths without a mask (B, S)."""
    if mask is None or mask.dim() != 2 or not mask.numel():
        return (), 0
    padded = mask.shape[1]
    lengths = (mask.ne(0) * torch.arange(1, padded + 1)).amax(1)
    # a sample without any real token is all that it has
    return torch.where(lengths > 0, lengths, padded).tolist(), padded


def _is_padding(data: memoryview, tensor: Tensor) -> bool:
    size = tensor.element_size()
    value = bytes(size) if tensor.is_floating_point() else bytes(data[:size])
    return data == value * (len(data) // size)


def encoder_fingerprint(encoder: nn.Module) -> str:
    """A hash of an encoder's class, structure, settings, configuration, parameters and buffers.

    Not of its device or training mode, or of attributes that are neither numbers nor texts.
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
    """Plain public attributes: what shows in no parameter, as timm's way to pool."""
    names = sorted(name for name in vars(module) if not name.startswith("_") and name not in SWITCHES)
    return [(name, value) for name in names if _is_plain(value := vars(module)[name])]


def _is_plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _lasting(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {str(k): _lasting(v) for k, v in config.items() if not str(k).startswith("_") and k not in VOLATILE}
