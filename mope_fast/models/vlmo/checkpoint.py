"""Official VLMo checkpoints: reading, recognising, fitting to another image size or text length."""

import os
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import TEXT_RANGE, VLMoConfig
from .positions import image_rows

if TYPE_CHECKING:
    from .model import VLMo

_WRAPPERS = ("state_dict", "module", "model")
_HEADS = (
    "mlm_score.", "itm_score.", "itc_text_proj.", "itc_image_proj.", "itc_vl_text_proj.", "itc_vl_image_proj.", "logit_scale",
    "logit_vl_scale", "vqa_classifier.", "nlvr2_classifier.", "head.", "fc_norm.",
)  # fmt: skip
"""Of pre-training and of tasks, as the first part of their keys."""
_INDICES = (
    "text_embeddings.position_ids", "relative_position_index", "text_relative_position_index", "text_imag_relative_position_index",
)  # fmt: skip
"""Counted out from the configuration; some versions saved them."""
_TABLE, _POSITIONS, _TEXT_POSITIONS = (
    "relative_position_bias_table", "transformer.pos_embed", "text_embeddings.position_embeddings.weight",
)  # fmt: skip
_TYPES = "token_type_embeddings.weight"
State = dict[str, Tensor]


def read_state_dict(path: str | os.PathLike[str]) -> State:
    """Tensors of a file, unwrapped, under VLMo's names."""
    state = _unwrapped(_read(Path(path)), Path(path))
    return _from_beit(state) if "blocks.0.mlp.fc1.weight" in state else state


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a VLMo checkpoint (vlmo_base_plus_patch16_224.pt, for example)")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} has more than tensors in it, or is no file of torch.save ({str(error).splitlines()[0]}). It is not loaded, "
            "because that could run code. If you trust it, load it with weights_only=False and save its state_dict alone"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def _unwrapped(content: Any, path: Path) -> State:
    wrapper = next((name for name in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(name), dict)), None)
    state = content if wrapper is None else content[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds {type(state).__name__}: expected a dict of tensors, or one under {', '.join(_WRAPPERS)}")
    if other := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{path} has {other[0]!r} of type {type(state[other[0]]).__name__}: expected tensors only")
    return {key.removeprefix("module.") if wrapper == "module" else key: value for key, value in state.items()}


def _from_beit(state: State) -> State:
    """BEiT's image encoder as the image side of a VLMo. Its bias tables, one a layer, become the first rows of VLMo's."""
    tables, renamed = [], {}
    for key, value in state.items():
        if key.endswith("attn.relative_position_bias_table"):
            tables.append((int(key.split(".")[1]), value))
        elif not key.endswith("relative_position_index"):
            key = key.replace(".mlp.", ".mlp_imag.").replace(".norm2.", ".norm2_imag.")
            renamed[key if key.startswith(_HEADS) else f"transformer.{key}"] = value
    if tables:
        table = torch.cat([value for _, value in sorted(tables, key=lambda pair: pair[0])], dim=1)
        renamed[_TABLE] = torch.cat([table, table.new_zeros(2 * TEXT_RANGE + 2, table.shape[1])])
    return renamed


def recognised(state: State, path: str | os.PathLike[str], config: VLMoConfig | None, overrides: dict[str, Any]) -> VLMoConfig:
    """The configuration of a state dict, with other values for some fields."""
    if config is not None:
        return VLMoConfig(**{**config.to_dict(), **overrides})
    width = state["transformer.cls_token"].shape[-1] if "transformer.cls_token" in state else None
    layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("transformer.blocks.")), default=-1)
    for name in ("base", "base_plus", "large"):
        known = VLMoConfig.named(name, **overrides)
        if (known.hidden_size, known.num_layers) == (width, layers):
            return known
    raise ValueError(
        f"{path} has {layers} layers of width {width}, which is none of VLMo's sizes: pass config=VLMoConfig(...) if it is a VLMo"
    )


def load_into(model: "VLMo", state: State, path: str | os.PathLike[str], *, strict: bool) -> None:
    """Fit the state dict to the model and load it, or say everything that doesn't fit."""
    config, expected = model.config, model.state_dict()
    kept = {key: value for key, value in state.items() if key in expected or not (key.startswith(_HEADS) or key in _INDICES)}
    problems = _fit(kept, config)
    missing = [f"missing: {key}" for key in expected if key not in kept]
    unexpected = [f"unexpected: {key} {tuple(value.shape)}" for key, value in kept.items() if key not in expected]
    problems += [
        f"{key}: the file has {tuple(kept[key].shape)}, the model {tuple(value.shape)}"
        for key, value in expected.items()
        if key in kept and kept[key].shape != value.shape
    ]
    if problems or (strict and missing + unexpected):
        hint = "" if problems else "\nstrict=False loads the rest and leaves what is missing random"
        raise ValueError(f"{path} doesn't fit this VLMo:\n  " + "\n  ".join(problems + missing + unexpected) + hint)
    if missing + unexpected:
        warnings.warn(f"{path} was loaded in part:\n  " + "\n  ".join(missing + unexpected), stacklevel=3)
    model.load_state_dict(kept, strict=False)


def _fit(state: State, config: VLMoConfig) -> list[str]:
    """Positions to the configuration's sizes, in place; returns what can't be fitted."""
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table

    problems, grid = [], config.grid
    if (positions := state.get(_POSITIONS)) is not None and positions.shape[1] != config.image_tokens:
        state[_POSITIONS] = resample_abs_pos_embed(positions, [grid, grid], antialias=False)
    if (table := state.get(_TABLE)) is not None:
        image, text = table.split([len(table) - 2 * TEXT_RANGE - 2, 2 * TEXT_RANGE + 2])
        if len(image) != image_rows(config):
            resized = resize_rel_pos_bias_table(image, [grid, grid], torch.Size([image_rows(config), image.shape[1]]))
            state[_TABLE] = torch.cat([resized, text])
    if (positions := state.get(_TEXT_POSITIONS)) is not None:
        if len(positions) < config.max_text_length:
            problems.append(f"the file has {len(positions)} text positions: set max_text_length to at most that")
        state[_TEXT_POSITIONS] = positions[: config.max_text_length]
    if (types := state.get(_TYPES)) is not None:
        state[_TYPES] = types[:2]  # a model of two images has a third one, for the second image
    return problems
