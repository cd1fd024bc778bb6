"""Official VLMo checkpoints: reading, recognition, and adaptation to another image size or text length."""

import math
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import not_finite
from .config import VLMoConfig
from .positions import TEXT_ROWS, image_rows

_WRAPPERS = ("state_dict", "module", "model")
_HEADS = (
    "mlm_score.", "itm_score.", "itc_text_proj.", "itc_image_proj.", "itc_vl_text_proj.", "itc_vl_image_proj.", "logit_scale",
    "logit_vl_scale", "vqa_classifier.", "nlvr2_classifier.", "head.", "fc_norm.", "lm_head.", "cls_pt_layers.", "mask_token",
)  # fmt: skip
"""Key prefixes of pre-training and task heads."""
_INDICES = (
    "text_embeddings.position_ids", "relative_position_index", "text_relative_position_index", "text_imag_relative_position_index",
)  # fmt: skip
"""Buffers that are computed from the configuration; some versions saved them."""
_TABLE, _POSITIONS, _TEXT_POSITIONS = (
    "relative_position_bias_table", "transformer.pos_embed", "text_embeddings.position_embeddings.weight",
)  # fmt: skip
_TYPES = "token_type_embeddings.weight"
"""A model with two images has a third row, for the second image."""
_HINTS = {_TEXT_POSITIONS: " (max_text_length can be at most that of the file)"}
State = dict[str, Tensor]


def read_state_dict(path: str | os.PathLike[str]) -> State:
    """Read the tensors of a file, unwrapped, under VLMo's names."""
    state = _unwrapped(_read(Path(path)), Path(path))
    plain = {key.removeprefix("transformer."): value for key, value in state.items()}
    return _from_beit(plain) if "blocks.0.mlp.fc1.weight" in plain else state


def _read(path: Path) -> Any:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: expected a VLMo checkpoint file (vlmo_base_plus_patch16_224.pt, for example)")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} contains more than tensors, or is not a torch.save file ({_first_line(error)}). It is not loaded, "
            "because that could run code. If you trust it, load it with weights_only=False and save only its state_dict"
        ) from None
    except Exception as error:  # torch.load has no specific exception for truncated files or other formats
        large = ", or needs more memory than available" if isinstance(error, MemoryError) or "allocate" in str(error) else ""
        raise ValueError(f"{path} is damaged, or is not a torch.save or safetensors file{large}: {_first_line(error)}") from None


def _check_sums(path: Path) -> None:
    """Raise ValueError if a part of a torch.save file doesn't match its checksum, which torch.load doesn't check."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if (part := file.testzip()) is not None:
                raise ValueError(f"the checksum of {part} in it doesn't match")


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, without torch's colour codes."""
    return next(iter(re.sub(r"\x1b\[[\d;]*m", "", str(error)).splitlines()), type(error).__name__)


def _unwrapped(content: Any, path: Path) -> State:
    wrapped = [content[name] for name in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)]
    state = wrapped[0] if wrapped else content
    expected = f"expected a dict of tensors, or one under {', '.join(_WRAPPERS)}"
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds {'nothing' if state == {} else type(state).__name__}: {expected}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path} has {key!r} of type {type(value).__name__}: {expected}, with their names")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _from_beit(state: State) -> State:
    """Convert BEiT's image encoder to the image side of a VLMo; its bias tables become the first rows of VLMo's.

    VLMo's table has separate columns for each layer. A layer of BEiT adds its own table, the table shared by all layers
    (pre-training files), or both.
    Names: https://github.com/microsoft/unilm, beit/modeling_pretrain.py.
    """
    layers = sorted({int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))})
    tables = [[state[key] for key in (f"blocks.{i}.attn.{_TABLE}", f"rel_pos_bias.{_TABLE}") if key in state] for i in layers]
    renamed = {}
    for key, value in state.items():
        if not key.endswith((_TABLE, "relative_position_index")):
            key = key.replace(".mlp.", ".mlp_imag.").replace(".norm2.", ".norm2_imag.")
            renamed[key if key.startswith(_HEADS) else f"transformer.{key}"] = value
    shapes = {table.shape for added in tables for table in added}
    if all(tables) and len(shapes) == 1 and len(next(iter(shapes))) == 2:
        table = torch.cat([sum(added) for added in tables], dim=1)
        renamed[_TABLE] = torch.cat([table, table.new_zeros(TEXT_ROWS, table.shape[1])])
    return renamed


def recognised(state: State, path: str | os.PathLike[str], config: VLMoConfig | None, overrides: dict[str, Any]) -> VLMoConfig:
    """Return the configuration of a state dict, with some fields overridden."""
    if config is not None:
        if not isinstance(config, VLMoConfig):
            raise TypeError(f"config must be a VLMoConfig (VLMoConfig.named returns the known ones) or None, got {config!r}")
        return replace(config, **overrides)
    token = state.get("transformer.cls_token")
    width = token.shape[-1] if token is not None and token.dim() else None
    layers = {int(match[1]) for key in state if (match := re.match(r"transformer\.blocks\.(\d+)\.", key))}
    for name in ("base", "base_plus", "large"):
        known = VLMoConfig.named(name)
        if (known.hidden_size, set(range(known.num_layers))) == (width, layers):
            return replace(known, **overrides)
    raise ValueError(
        f"{path} has {len(layers)} layers of width {width}, which is no known VLMo size: if it is a VLMo, pass "
        "config=VLMoConfig(...)"
    )


def load_into(model: nn.Module, config: VLMoConfig, state: State, path: str | os.PathLike[str], *, strict: bool) -> None:
    """Adapt the state dict to the model and load it, or raise an error that lists everything that doesn't fit."""
    expected = model.state_dict()
    kept = {key: value for key, value in state.items() if key in expected or not (key.startswith(_HEADS) or key in _INDICES)}
    unread = [
        f"{key}: the file has {_kind(value)}, the model floating-point numbers"
        for key, value in kept.items()
        if key in expected and _kind(value) is not None
    ]
    if unread:
        raise ValueError(f"{path} doesn't fit this VLMo:\n  " + "\n  ".join(unread))
    _fit(kept, config)
    missing = [f"missing: {key}" for key in expected if key not in kept]
    unexpected = [f"unexpected: {key} {tuple(value.shape)}" for key, value in kept.items() if key not in expected]
    unfit = [
        f"{key}: the file has {tuple(kept[key].shape)}, the model {tuple(value.shape)}{_HINTS.get(key, '')}"
        for key, value in expected.items()
        if key in kept and kept[key].shape != value.shape
    ]
    if unfit or (strict and missing + unexpected):
        hint = "" if unfit else "\nstrict=False loads the rest and leaves missing parameters random"
        raise ValueError(f"{path} doesn't fit this VLMo:\n  " + "\n  ".join(unfit + missing + unexpected) + hint)
    if missing + unexpected:
        warnings.warn(f"{path} was loaded in part:\n  " + "\n  ".join(missing + unexpected), stacklevel=3)
    if problems := not_finite(kept):
        warnings.warn(f"{path} holds numbers that are not finite, in {', '.join(problems)}: outputs will be NaN", stacklevel=3)
    model.load_state_dict(kept, strict=False)


def _kind(value: Tensor) -> str | None:
    """Describe a tensor that is not a plain floating-point tensor; None for one that is."""
    if value.is_meta or value.is_nested or value.layout != torch.strided:
        return "a tensor without values" if value.is_meta else "a nested tensor" if value.is_nested else str(value.layout)
    return None if value.is_floating_point() else str(value.dtype)


def _fit(state: State, config: VLMoConfig) -> None:
    """Adapt positions to the configuration's sizes, in place, if they have a valid shape; other shapes are reported later."""
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    grid = [config.grid, config.grid]
    positions = state.get(_POSITIONS)
    if positions is not None and positions.dim() == 3 and _side(positions.shape[1] - 1) not in (None, config.grid):
        state[_POSITIONS] = resample_abs_pos_embed(positions, grid, antialias=False)
    table = state.get(_TABLE)
    if table is not None and table.dim() == 2 and _side(len(table) - TEXT_ROWS - 3) not in (None, 1, 2 * config.grid - 1):
        image, text = table[:-TEXT_ROWS], table[-TEXT_ROWS:]
        shape = torch.Size([image_rows(config), table.shape[1]])
        state[_TABLE] = torch.cat([resize_rel_pos_bias_table(image, grid, shape), text])
    for key, rows in ((_TEXT_POSITIONS, config.max_text_length), (_TYPES, 2)):
        if key in state and state[key].dim():
            state[key] = state[key][:rows]


def _side(count: int) -> int | None:
    """Return the side of a square of ``count`` positions; None if they don't form a square."""
    side = math.isqrt(max(0, count))
    return side if side and side**2 == count else None
