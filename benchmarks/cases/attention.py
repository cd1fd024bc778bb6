"""Problem sizes of ``prompt_attention`` and ``receptive_field_attention``, and which keys each query sees."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import CENTRE, MODES, SMOKE
from mope_fast.functional import ReceptiveField


@dataclass(frozen=True)
class AttentionCase:
    """One layer of a model: ``tokens`` queries and keys per sample, and the lengths of key/value prefixes in ``prefixes``."""

    model: str
    batch: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    prefixes: tuple[int, ...] = ()
    """The first has batch 1, like a layer's learned prompt; the second has one per sample, like a mixed prompt."""
    key_heads: int | None = None
    """Number of key and value heads; None for ``heads``."""
    causal: bool = False
    window: tuple[int, int] | None = None
    """Sliding window: how many tokens before and after itself a token sees."""
    ragged: tuple[int, int] | None = None
    """Positions [first, last) that end in padding, with a different number of real tokens in each sample."""
    field: ReceptiveField | None = None
    first_layer: bool = False
    """Gradients for the prefixes only: in a frozen encoder's first layer q, k and v don't depend on trained parameters."""

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]
        heads = f"{self.heads}" if self.key_heads is None else f"{self.heads}/{self.key_heads}"
        size = f"{self.model} B={self.batch} S={self.tokens} H={heads} Dh={self.head_dim}"
        prefixes = f" P={'+'.join(map(str, self.prefixes))}" if self.prefixes else ""
        window = f" W={'+'.join(map(str, self.window))}" if self.window else ""
        notes = {" causal": self.causal, " ragged": self.ragged, " first layer": self.first_layer}
        return f"{size}{prefixes}{window} {dtype}{''.join(note for note, present in notes.items() if present)}"

    @property
    def op(self) -> str:
        return "prompt_attention" if self.field is None else "receptive_field_attention"

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[1:] if self.first_layer else MODES

    @property
    def keys(self) -> int:
        return sum(self.prefixes) + self.tokens

    @property
    def masked(self) -> bool:
        return self.causal or any(kind is not None for kind in (self.window, self.ragged, self.field))

    @property
    def heads_of_keys(self) -> int:
        return self.key_heads or self.heads

    def padding(self, device: torch.device | str) -> Tensor | None:
        """Return a bool mask (B, S), True for real tokens: from a quarter of the ragged positions to all of them, unordered."""
        if self.ragged is None:
            return None
        first, last = self.ragged
        least = (last - first) // 4
        lengths = least + torch.arange(self.batch, device=device) * 7919 % (last - first - least + 1)
        position = torch.arange(self.tokens, device=device)
        return (position < first + lengths[:, None]) | (position >= last)

    def visible(self, device: torch.device | str) -> Tensor:
        """Return a bool mask (B or 1, 1, S, P + S), True where a query sees a key."""
        if self.field is not None:
            mask = self.field.mask(device)
        else:
            mask = torch.ones(self.tokens, self.tokens, dtype=torch.bool, device=device)
        if self.causal:
            mask = mask.tril()
        if self.window is not None:
            mask = mask.tril(self.window[1]).triu(-self.window[0])
        mask = mask[None, None]
        padding = self.padding(device)
        mask = mask if padding is None else mask & padding[:, None, None]
        return F.pad(mask, (self.keys - self.tokens, 0), value=True)

    def bytes(self, mode: str) -> int:
        """Count q, k, v, prefixes, padding and the upstream gradient read once, out and the requested gradients written once."""
        row = self.head_dim * self.dtype.itemsize
        queries, keys = (self.batch * self.tokens * heads * row for heads in (self.heads, self.heads_of_keys))
        shared, own = (*self.prefixes, 0, 0)[:2]
        prefixes = 2 * (shared + self.batch * own) * self.heads_of_keys * row
        forward = 2 * queries + 2 * keys + prefixes + (self.batch * self.tokens if self.ragged else 0)
        if mode == "forward":
            return forward
        return forward + queries + prefixes + (0 if self.first_layer else queries + 2 * keys)

    def flops(self, mode: str) -> int:
        """Count the matrix products over visible pairs: two forward, five backward, because the probabilities are recomputed.

        Gradients for the prefixes alone take four products over the pairs with prefix keys.
        """
        product = 2 * self.heads * self.head_dim
        pairs, prefix_pairs = visible_pairs(self), self.batch * self.tokens * sum(self.prefixes)
        backward = 4 * prefix_pairs if self.first_layer else 5 * pairs
        return product * (2 * pairs + (0 if mode == "forward" else backward))

    def describe(self) -> dict[str, Any]:
        return {
            "case": str(self), "model": self.model, "B": self.batch, "S": self.tokens, "H": self.heads, "Dh": self.head_dim,
            "P": "+".join(map(str, self.prefixes)), "dtype": str(self.dtype).removeprefix("torch."), "causal": self.causal,
            "window": self.window, "key_heads": self.heads_of_keys, "ragged": self.ragged is not None,
            "gradients": "prefixes" if self.first_layer else "all",
        }  # fmt: skip


@functools.cache
def visible_pairs(case: AttentionCase) -> int:
    """Count the pairs of a query and a key that it sees, over the batch and for one head."""
    mask = case.visible("cpu")
    return int(mask.sum()) * (case.batch // mask.shape[0])


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


LENGTHS = {"lp": 10, "text": 40, "image": 197, "vp": 10}
MOPE_BAF = ReceptiveField(
    LENGTHS,
    {"lp": ["lp", "text"], "text": ["lp", "text", "image"], "image": ["text", "image", "vp"], "vp": ["image", "vp"]},
)
GAPS = ReceptiveField(
    LENGTHS, {"lp": ["lp", "image"], "text": ["text", "vp"], "image": ["lp", "image"], "vp": ["lp", "image", "vp"]}
)
"""A field without intervals: every group sees positions on both sides of positions that it doesn't see."""


def prompt_attention(device: torch.device, extent: str) -> list[AttentionCase]:
    """Return cases in order of interest: of N shards the first has the first case."""
    dtype = _dtype(device)
    if extent == SMOKE:
        return [
            AttentionCase("tiny", 2, 20, 2, 16, dtype, (6, 7), ragged=(0, 20)),
            AttentionCase("tiny", 2, 20, 2, 16, dtype, (6,), causal=True),
            AttentionCase("tiny", 2, 20, 2, 16, dtype, (6, 7), first_layer=True),
            AttentionCase("tiny", 2, 20, 4, 16, dtype, (6, 7), key_heads=2, window=(3, 3), ragged=(0, 20)),
        ]

    def case(model: str, batch: int, tokens: int, heads: int, head_dim: int = 64, prefixes=(6, 7), **rest) -> AttentionCase:
        return AttentionCase(model, batch, tokens, heads, head_dim, dtype, prefixes, **rest)

    if extent == CENTRE:
        return [case("ViT-B", 64 if device.type == "cuda" else 8, 197, 12)]
    if device.type == "cuda":
        return [
            case("ViT-B", 64, 197, 12),
            case("BERT-B", 64, 128, 12, ragged=(0, 128)),
            case("ViT-S/14", 64, 257, 6),
            case("GPT-2", 64, 128, 12, causal=True),
            case("ModernBERT-B", 64, 512, 12, window=(64, 64), ragged=(0, 512)),
            case("Qwen3-0.6B", 16, 512, 16, 128, key_heads=8, causal=True),
            case("long", 4, 2305, 12, prefixes=(32,)),
            case("ViT-B", 64, 197, 12, first_layer=True),
            case("ViT-B", 1, 197, 12),
            case("ViT-B", 256, 197, 12),
            case("ViT-B", 8, 197, 12),
            case("ViT", 64, 197, 12, 80),
            case("ViT", 64, 197, 12, 32),
            case("ViT", 64, 197, 12, 128),
        ]
    return [
        case("ViT-B", 8, 197, 12),
        case("BERT-B", 8, 128, 12, ragged=(0, 128)),
        case("GPT-2", 8, 128, 12, causal=True),
        case("ModernBERT-B", 2, 512, 12, window=(64, 64), ragged=(0, 512)),
        case("Qwen3-0.6B", 2, 256, 16, 128, key_heads=8, causal=True),
        case("ViT-B", 8, 197, 12, first_layer=True),
        case("ViT-B", 1, 197, 12),
        case("ViT-S/14", 8, 257, 6),
    ]


def receptive_field_attention(device: torch.device, extent: str) -> list[AttentionCase]:
    """Return cases in order of interest: of N shards the first has the first case."""
    dtype = _dtype(device)
    if extent == SMOKE:
        lengths = {"a": 3, "b": 9, "c": 5}
        intervals = ReceptiveField(lengths, {"a": ["a", "b"], "b": ["a", "b", "c"], "c": ["c"]})
        gaps = ReceptiveField(lengths, {"a": ["a", "c"], "b": ["b"], "c": ["a", "c"]})
        return [
            AttentionCase("tiny", 2, 17, 2, 16, dtype, field=intervals),
            AttentionCase("tiny", 2, 17, 2, 16, dtype, field=intervals, ragged=(3, 12)),
            AttentionCase("tiny gaps", 2, 17, 2, 16, dtype, field=gaps),
        ]

    def case(batch: int, heads: int = 16, head_dim: int = 34, model: str = "VLMo-B+", field=MOPE_BAF, **rest) -> AttentionCase:
        return AttentionCase(model, batch, field.size, heads, head_dim, dtype, field=field, **rest)

    text = (LENGTHS["lp"], LENGTHS["lp"] + LENGTHS["text"])
    if extent == CENTRE:
        return [case(64 if device.type == "cuda" else 8)]
    if device.type == "cuda":
        return [
            case(64),
            case(64, 12, 64),
            case(64, ragged=text),
            case(64, 12, 64, "VLMo gaps", GAPS),
            case(256),
            case(8),
            case(1),
        ]
    return [case(8), case(8, 12, 64), case(8, ragged=text), case(8, 12, 64, "VLMo gaps", GAPS), case(1)]
