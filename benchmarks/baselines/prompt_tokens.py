"""Prompts as tokens, prepended in every layer and removed after it: MoPE's routed prompts by its equations, and VPT-deep's."""

import functools
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.encoders import FusedProvider, Inputs, Parts, Plain
from benchmarks.cases.models import TRAINING
from mope_fast import reference


class PromptTokens(FusedProvider):
    """Prompts go through a layer as tokens: they attend, are attended to and pass through its MLP."""

    def __init__(self, encoder: nn.Module, head: nn.Module):
        self.plain = Plain(encoder, head)
        for index, layer in enumerate(self.plain.family.layers(encoder)):
            self.attach(index, layer.module)

    @abstractmethod
    def prompts(self, index: int, x: Tensor) -> Tensor:
        """Return prompts (B, P, D) for layer ``index``, whose input is ``x``."""

    def attach(self, index: int, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(functools.partial(self._put_prompts, index), with_kwargs=True)
        layer.register_forward_hook(self._cut_prompts)

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        return self.plain.logits_and_loss(inputs, training)

    def _put_prompts(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        prompts = self.prompts(index, args[0])
        self.length = prompts.shape[1]
        args = (torch.cat([prompts, args[0]], dim=1), *map(self._extended_mask, args[1:]))
        return args, {name: self._extended_mask(value) for name, value in kwargs.items()}

    def _extended_mask(self, argument: Any) -> Any:
        """Extend a mask (B, 1, S, S), boolean or additive, by rows and columns for the prompts, which are visible to all tokens."""
        if not isinstance(argument, Tensor) or argument.dim() != 4:
            return argument
        return F.pad(argument, (self.length, 0, self.length, 0), value=argument.dtype == torch.bool)

    def _cut_prompts(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output[:, self.length :]


class PromptTokensInWindows(PromptTokens):
    """Prompts as tokens of a Swin Transformer: they are tokens of every window of their image; their outputs are averaged over
    windows.

    This is what the released code does, except for the order of windows: there most windows get prompts of another image.
    """

    def attach(self, index: int, layer: nn.Module) -> None:
        layer.forward = functools.partial(self._block, index, layer)
        layer.attn.forward = functools.partial(self._window_attention, layer.attn)

    def _block(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        """Run timm's block with prompts before the image's tokens."""
        prompts, size = self.prompts(index, x), x.shape[1:3]
        length = prompts.shape[1]
        sequence = torch.cat([prompts, x.flatten(1, 2)], dim=1)
        normed = block.norm1(sequence)
        self.normed = normed[:, :length]
        image = block._attn(normed[:, length:].unflatten(1, size)).flatten(1, 2)
        sequence = sequence + torch.cat([self.attended, image], dim=1)
        sequence = sequence + block.mlp(block.norm2(sequence))
        return sequence[:, length:].unflatten(1, size)

    def _window_attention(self, attention: nn.Module, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, _ = self.normed.shape
        prompts = self.normed[:, None].expand(-1, len(windows) // batch, -1, -1).flatten(0, 1)
        sequence = torch.cat([prompts, windows], dim=1)
        q, k, v = attention.qkv(sequence).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q * attention.scale) @ k.mT + F.pad(attention._get_rel_pos_bias(), (length, 0, length, 0))
        if mask is not None:
            weights = weights.unflatten(0, (-1, len(mask))) + F.pad(mask, (length, 0, length, 0))[:, None]
            weights = weights.flatten(0, 1)
        out = attention.proj((weights.softmax(-1) @ v).transpose(1, 2).flatten(2))
        self.attended = out[:, :length].unflatten(0, (batch, -1)).mean(1)
        return out[:, length:]


class RoutedTokens(PromptTokens):
    """MoPE's prompts by the paper's equations, experts mixed by einsum: the truth for all other ways to compute them."""

    truth = "concatenated"

    def __init__(self, parts: Parts, mode: str):
        self.bank = parts.bank.train(mode == TRAINING)
        self.model = nn.ModuleDict({"bank": parts.bank, "head": parts.head})
        dims = self.bank.dims
        self.positions = [dims[:index].count(width) for index, width in enumerate(dims)]  # index among the layers of the same width
        super().__init__(parts.encoder, parts.head)

    def logits_and_loss(self, inputs: Inputs, training: bool) -> tuple[Tensor, Tensor | None]:
        self.pool = self.plain.family.pool(self.plain.model["encoder"], inputs.main)
        self.scores = []
        self.prepare(inputs.cross)
        logits, loss = super().logits_and_loss(inputs, training)
        return logits, loss + self.bank.config.importance_weight * self.importance() if training else None

    def prepare(self, cross: Tensor) -> None:
        """Compute what all layers need from the complementary feature: router queries and mapped prompts."""
        self.queries = self.bank.cross_proj(cross).unflatten(1, (len(self.bank.dims), -1)).unbind(1)
        mapped = self.bank.mapper(cross)
        self.mapped = {width: F.dropout(row, self.bank.config.dropout, self.bank.training) for width, row in mapped.items()}

    def importance(self) -> Tensor:
        return reference.importance_loss(torch.stack(self.scores), threshold=self.bank.config.importance_threshold)

    def prompts(self, index: int, x: Tensor) -> Tensor:
        """Return prompts in the order [static | dynamic | mapped]."""
        config, training = self.bank.config, self.bank.training
        width, position = self.bank.dims[index], self.positions[index]
        stack = self.bank.stacks[str(width)]
        own = self.pool(x).to(stack.inter_weight.dtype) @ stack.inter_weight[position].T + stack.inter_bias[position]
        logits = torch.cat([own, self.queries[index]], dim=1) @ self.bank.keys[index].T / config.temperature
        if training and config.noise_std:
            logits = logits + torch.randn_like(logits) * config.noise_std
        self.scores.append(torch.softmax(logits, dim=-1))
        static = F.dropout(stack.static_prompt[position], config.dropout, training)
        dynamic = reference.dynamic_prompt(self.scores[-1], stack.experts[position])
        return torch.cat([static.expand(len(x), -1, -1), dynamic, self.mapped[width][:, None]], dim=1).to(x.dtype)


class RoutedTokensInWindows(PromptTokensInWindows, RoutedTokens):
    """The same prompts in a Swin Transformer."""


class DeepTokens(PromptTokens):
    """VPT-deep (arXiv 2203.12119): every layer has as many trained prompts as MoPE, the same for all samples; dropout 0.1."""

    truth = "vpt-deep"
    dropout = 0.1

    def __init__(self, parts: Parts, mode: str):
        rows = {
            width: torch.cat([stack.static_prompt, stack.experts.flatten(1, 2)], dim=1)
            for width, stack in parts.bank.stacks.items()
        }
        length = 2 * parts.bank.config.prompt_length + 1
        start = {width: nn.Parameter(value[:, :length].detach().clone()) for width, value in rows.items()}
        self.model = nn.ModuleDict({"prompts": nn.ParameterDict(start), "head": parts.head})
        dims = parts.bank.dims
        self.places = [(str(width), dims[:index].count(width)) for index, width in enumerate(dims)]
        self.training = mode == TRAINING
        super().__init__(parts.encoder, parts.head)

    def is_random(self, mode: str) -> bool:
        return mode == TRAINING

    @contextmanager
    def without_randomness(self) -> Iterator[None]:
        training, self.training = self.training, False
        try:
            yield
        finally:
            self.training = training

    def prompts(self, index: int, x: Tensor) -> Tensor:
        width, position = self.places[index]
        rows = self.model["prompts"][width][position].expand(len(x), -1, -1)
        return F.dropout(rows, self.dropout, self.training).to(x.dtype)


class DeepTokensInWindows(PromptTokensInWindows, DeepTokens):
    """The same prompts in a Swin Transformer."""
