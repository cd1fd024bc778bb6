"""The methods of the study: what each trains, and which inputs of a sample it reads."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.prompt_fusion import PMF, PromptFuse
from benchmarks.examples import example
from benchmarks.study.data import Batch, Task
from mope_fast import MoPEConfig, MoPEFusion, start_prompts

HIDDEN = 256
"""Hidden width of every method's head."""
LENGTH, EXPERTS = 6, 16


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: AdamW, warm-up over a tenth of the steps, then linear decay to zero."""

    epochs: int
    lr: float  # of prompts, router, mapper, adapters
    head_lr: float
    dropout: float = 0.5  # in the head
    label_smoothing: float = 0.1
    weight_decay: float = 0.01
    batch_size: int = 32
    head_epochs: int = 0
    """Epochs of training the head alone first, on its inputs at the start; they take no steps of an encoder."""


class Model(nn.Module):
    """Returns logits and a term to add to the loss. ``head`` is trained at its own learning rate."""

    head: nn.Module
    routed: MoPEFusion | None = None
    """The part that routes over several experts, if any."""

    def start(self, batches: Iterable[Batch]) -> None:
        """Initialize whatever depends on data, from batches of training samples."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        raise NotImplementedError


def classifier(width: int, classes: int, recipe: Recipe, hidden: int | None = HIDDEN) -> nn.Module:
    """Build a head from batch-normalized features to logits; without a hidden layer it is linear."""
    drop = nn.Dropout(recipe.dropout)
    if hidden is None:
        return nn.Sequential(nn.BatchNorm1d(width), drop, nn.Linear(width, classes))
    return nn.Sequential(nn.BatchNorm1d(width), drop, nn.Linear(width, hidden), nn.GELU(), drop, nn.Linear(hidden, classes))


class OnFeatures(Model):
    """A head on frozen features of one or both sides."""

    def __init__(self, task: Task, recipe: Recipe, sides: tuple[str, ...], hidden: int | None = HIDDEN):
        super().__init__()
        self.sides = sides
        self.head = classifier(sum(width(task, side) for side in sides), len(task.class_names), recipe, hidden)

    def forward(self, batch: Batch) -> tuple[Tensor, float]:
        features = {"text": batch.text_feature, "image": batch.picture_feature}
        return self.head(torch.cat([features[side] for side in self.sides], dim=-1)), 0.0


OTHER = {"text": "image", "image": "text"}
POOLING = {"text": "mean", "image": "cls+mean"}
"""Pooling of the main encoder's tokens, the same as of the features that other methods read of that side."""


def width(task: Task, side: str) -> int:
    """Return the width of a side's feature, the same for all methods."""
    return (task.text_features if side == "text" else task.picture_features).shape[1]


def frozen_encoder(side: str) -> nn.Module:
    pretrained = example("pretrained")
    return pretrained.minilm()[0] if side == "text" else pretrained.dinov2_small()


def sides(batch: Batch, main: str) -> tuple[dict[str, Any] | Tensor, Tensor]:
    """Return the main encoder's inputs, and the other side's feature."""
    return (batch.text, batch.picture_feature) if main == "text" else (batch.pictures, batch.text_feature)


class Fused(Model):
    """MoPE, or parts of it by its settings: prompts in the main encoder, made from the other side's frozen feature.

    The head reads both features, as the library's default head and the heads of the other methods do.
    """

    def __init__(self, task: Task, main: str, recipe: Recipe, settings: Mapping[str, Any]):
        super().__init__()
        other = width(task, OTHER[main])
        defaults = {"num_experts": EXPERTS, "prompt_length": LENGTH, "head_inputs": "both"}
        config = MoPEConfig(**defaults | settings, cross_dim=other, pooling=POOLING[main])
        read = width(task, main) + (other if config.head_inputs == "both" else 0)
        self.main = main
        self.fusion = MoPEFusion(frozen_encoder(main), None, None, config, head=classifier(read, len(task.class_names), recipe))

    @property
    def head(self) -> nn.Module:
        return self.fusion.head

    @property
    def routed(self) -> MoPEFusion | None:
        return self.fusion if self.fusion.bank.routes and self.fusion.config.num_experts > 1 else None

    def start(self, batches: Iterable[Batch]) -> None:
        start_prompts(self.fusion, ({"main_inputs": sides(batch, self.main)[0]} for batch in batches), progress=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        output = self.fusion(*sides(batch, self.main), batch.labels)
        return output.logits, self.fusion.config.importance_weight * output.importance_loss


class Default(Fused):
    """``MoPEFusion`` with default settings, including its linear head."""

    def __init__(self, task: Task, main: str, recipe: Recipe):
        Model.__init__(self)
        self.main = main
        config = MoPEConfig(cross_dim=width(task, OTHER[main]), pooling=POOLING[main])
        self.fusion = MoPEFusion(frozen_encoder(main), None, len(task.class_names), config)


class LoRA(Model):
    """LoRA of rank 8 on the main encoder's queries and values; the head reads its feature and the other side's frozen one."""

    def __init__(self, task: Task, main: str, recipe: Recipe):
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        encoder = frozen_encoder(main).requires_grad_(False)
        targets = ["query", "value"] if main == "text" else ["q_proj", "v_proj", "query", "value"]
        self.encoder = inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), encoder)
        self.main = main
        self.head = classifier(width(task, main) + width(task, OTHER[main]), len(task.class_names), recipe)

    def forward(self, batch: Batch) -> tuple[Tensor, float]:
        from mope_fast.encoders import encode

        inputs, other = sides(batch, self.main)
        feature = encode(self.encoder, inputs, POOLING[self.main])
        return self.head(torch.cat([feature, other], dim=-1)), 0.0

    def train(self, mode: bool = True) -> "LoRA":
        super().train(mode)
        self.encoder.eval()  # as for the encoders of all methods
        return self


class Published(Model):
    """Another method's network; ``reads`` returns its arguments from a batch."""

    def __init__(self, network: nn.Module, reads: Callable[[Batch], tuple[Any, ...]]):
        super().__init__()
        self.network, self.reads = network, reads

    @property
    def head(self) -> nn.Module:
        return self.network.head

    def forward(self, batch: Batch) -> tuple[Tensor, float]:
        return self.network(*self.reads(batch)), 0.0


def _pmf(task: Task, main: str, recipe: Recipe) -> Model:
    encoders = frozen_encoder("text"), frozen_encoder("image")
    width = sum(encoder.config.hidden_size for encoder in encoders)
    head = classifier(width, len(task.class_names), recipe)
    return Published(PMF(*encoders, head), lambda batch: (batch.text, batch.pictures))


def _promptfuse(task: Task, main: str, recipe: Recipe) -> Model:
    encoder = frozen_encoder("text")
    head = classifier(encoder.config.hidden_size, len(task.class_names), recipe)
    return Published(PromptFuse(encoder, head), lambda batch: (batch.text, batch.picture_feature))


class Majority(Model):
    """Always predicts the most common class of the training samples."""

    def __init__(self, task: Task, main: str, recipe: Recipe):
        super().__init__()
        self.head = nn.Identity()
        self.classes = len(task.class_names)
        self.counts = torch.zeros(self.classes)

    def forward(self, batch: Batch) -> tuple[Tensor, float]:
        return self.counts.expand(len(batch.labels), -1), 0.0


@dataclass(frozen=True)
class Method:
    """One row of the study."""

    title: str
    make: Callable[[Task, str, Recipe], Model]
    encodes: bool = True
    """True if its steps run an encoder; if not, it reads precomputed features, and neither side is the main one."""
    mains: tuple[str, ...] = ("text", "image")


def _on_features(title: str, *read: str, hidden: int | None = HIDDEN) -> Method:
    return Method(title, lambda task, main, recipe: OnFeatures(task, recipe, read, hidden), encodes=False)


def _fused(title: str, **settings: Any) -> Method:
    return Method(title, lambda task, main, recipe: Fused(task, main, recipe, settings))


def _longer() -> int:
    """Return the length at which one expert and a static prompt have as many parameters as 16 experts and one of length 6."""
    return (EXPERTS + 1) * LENGTH // 2


METHODS = {
    "majority": Method("commonest class", Majority, encodes=False),
    "text": _on_features("text: MLP on its frozen feature", "text"),
    "image": _on_features("image: MLP on its frozen feature", "image"),
    "mlp": _on_features("MLP on both frozen features", "text", "image"),
    "late-concat-frozen": _on_features("linear head on both frozen features", "text", "image", hidden=None),
    "late-concat-prompted": _fused("static prompts", use_dynamic=False, use_mapped=False),
    "sequential": _fused("static and mapped prompts", use_dynamic=False),
    "pmf": Method("PMF", _pmf, mains=("text",)),
    "promptfuse": Method("PromptFuse", _promptfuse, mains=("text",)),
    "lora": Method("LoRA r=8 on the main encoder", LoRA),
    "mope-1": _fused("MoPE, K=1", num_experts=1),
    "mope-4": _fused("MoPE, K=4", num_experts=4),
    "mope-16": _fused("MoPE, K=16"),
    "longer": _fused("one long prompt of K=16's parameters", num_experts=1, prompt_length=_longer()),
    "dynamic-only": _fused("MoPE, routed prompts only", use_static=False, use_mapped=False),
    "no-importance": _fused("MoPE without importance loss", importance_weight=0.0),
    "learned-keys": _fused("MoPE, keys learned", learn_keys=True),
    "top-1": _fused("MoPE, one expert a sample", top_k=1),
    "default": Method("MoPE, K=16, linear head", Default),
    "mope-16-main": _fused("MoPE, K=16, head on the fused feature alone", head_inputs="main"),
}  # fmt: skip
