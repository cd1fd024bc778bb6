"""The kinds of prompts that aren't routed: their rows depend on no layer's input. A new kind is a class here, in ``KINDS``.

Models train, fold and save it then; ``MultiAdapter`` refuses adapters with kinds that it doesn't know.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoPEConfig
from .mapper import PromptMapper

if TYPE_CHECKING:
    from .prompts import PromptBank


class PromptKind(ABC):
    """Rows of a layer's prompt, the same for all samples or one set a sample; parameters are the bank's."""

    name: ClassVar[str]
    before: ClassVar[bool]
    """In front of the routed prompts, or behind them."""

    @abstractmethod
    def wanted(self, config: MoPEConfig) -> bool: ...

    @abstractmethod
    def add_parameters(self, bank: "PromptBank") -> None:
        """To the bank, or to the stacks of its widths."""

    @abstractmethod
    def rows(self, bank: "PromptBank", cross: Tensor | None) -> dict[str, Tensor]:
        """By width W, after dropout: (n, 1, P, W), each layer's for all samples; or (1, B, P, W), each sample's for all layers.

        Those of samples are asked of a :class:`FoldedBank` too, which has the bank's modules and parameters but for its stacks.

        Args:
            cross: the complementary feature (B, cross_dim); None where no prompt depends on it.
        """


class StaticPrompt(PromptKind):
    """P_s: L trained rows of each layer."""

    name, before = "static", True

    def wanted(self, config: MoPEConfig) -> bool:
        return config.use_static

    def add_parameters(self, bank: "PromptBank") -> None:
        for width, stack in bank.stacks.items():
            bound = bank.config.init_bound(int(width))
            shape = (stack.layers, bank.config.prompt_length, int(width))
            stack.static_prompt = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def rows(self, bank: "PromptBank", cross: Tensor | None) -> dict[str, Tensor]:
        dropout, training = bank.config.dropout, bank.training
        return {width: F.dropout(stack.static_prompt, dropout, training)[:, None] for width, stack in bank.stacks.items()}


class MappedPrompt(PromptKind):
    """P_m: the complementary feature as one row, or each of several (``side_dims``) as one."""

    name, before = "mapped", False

    def wanted(self, config: MoPEConfig) -> bool:
        return config.use_mapped

    def add_parameters(self, bank: "PromptBank") -> None:
        sides, norm = bank.config.side_dims, bank.config.mapper_norm
        if sides is None:
            bank.mapper = PromptMapper(bank.cross_dim, bank.dims, norm)
        else:
            bank.mapper = nn.ModuleList(PromptMapper(width, bank.dims, norm) for width in sides)

    def rows(self, bank: "PromptBank", cross: Tensor | None) -> dict[str, Tensor]:
        dropout, training = bank.config.dropout, bank.training
        return {str(width): F.dropout(rows, dropout, training)[None] for width, rows in mapped_rows(bank, cross).items()}


def mappers_of(bank: "PromptBank") -> list[PromptMapper]:
    """One a side."""
    return [bank.mapper] if bank.config.side_dims is None else list(bank.mapper)


def mapped_rows(bank: "PromptBank", cross: Tensor) -> dict[int, Tensor]:
    """For each layer width W the mapped prompts (B, sides, W)."""
    features = cross.split(bank.config.side_dims or [cross.shape[-1]], dim=-1)
    each = [mapper(feature) for mapper, feature in zip(mappers_of(bank), features, strict=True)]
    return {width: torch.stack([rows[width] for rows in each], dim=1) for width in each[0]}


KINDS: list[PromptKind] = [StaticPrompt(), MappedPrompt()]


def in_place(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rows (n, B, P, W) of each kind -> those "before" and "after" the routed prompts."""
    places: dict[str, list[Tensor]] = {}
    for kind in KINDS:
        if kind.name in rows:
            places.setdefault("before" if kind.before else "after", []).append(rows[kind.name])
    return {place: parts[0] if len(parts) == 1 else _joined(parts) for place, parts in places.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    layers, batch = (max(part.shape[dim] for part in parts) for dim in (0, 1))
    return torch.cat([part.expand(layers, batch, -1, -1) for part in parts], dim=2)
