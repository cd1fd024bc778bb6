"""MoPE-BAF's restricted receptive fields (arXiv 2403.11311): which groups of a sequence see which, lowered to a few integers."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_GROUPS = 32


class _Group(NamedTuple):
    """One group, as the kernels need it. Ranges are [first, last); an empty range is (size, 0), neutral for min and max."""

    length: int
    keys: tuple[int, int]
    queries: tuple[int, int]
    number: int
    sees: int
    """Bit j is set if the group sees group j."""


class Slice(NamedTuple):
    """Consecutive query rows that all see the same consecutive keys; keys is None if they see nothing."""

    rows: slice
    keys: slice | None


class ReceptiveField:
    """A partition of a sequence into named groups, and for each group the groups that it sees.

    Fields in which every group sees consecutive positions (``is_interval``) need no mask: a query sees keys [first, last). Other
    fields are stored as one row of bits for each group. The field detects which case applies. It is immutable and hashable.

    Args:
        lengths: group name -> number of positions, in the order of the sequence; 0 is allowed. At most 32 groups.
        visible: group name -> names of the groups that its queries see; one entry for every group. The output of a group that sees
            nothing is zeros.

    Raises:
        TypeError, ValueError: a length isn't an integer >= 0, or ``visible`` misses a group or names an unknown one.

    Examples:
        MoPE-BAF's single-modal layers, which need no mask because of the order of the groups:

        >>> ReceptiveField(
        ...     lengths={"lp": 10, "text": 40, "image": 197, "vp": 10},
        ...     visible={"lp": ["lp", "text"], "text": ["lp", "text", "image"],
        ...              "image": ["text", "image", "vp"], "vp": ["image", "vp"]},
        ... )
        ReceptiveField of 257 positions, intervals
        sees  |  length | lp text image vp | keys
        lp    |      10 |  x    x     .  . | 0-49
        text  |      40 |  x    x     x  . | 0-246
        image |     197 |  .    x     x  x | 10-256
        vp    |      10 |  .    .     x  x | 50-256
    """

    def __init__(self, lengths: Mapping[str, int], visible: Mapping[str, Sequence[str]]):
        _check(lengths, visible)
        self.groups = tuple(lengths)
        self.lengths = tuple(lengths.values())
        self.visible = tuple(tuple(name for name in lengths if name in visible[group]) for group in lengths)
        self.size = sum(self.lengths)
        self._starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        self._sees = [[name in seen for name in self.groups] for seen in self.visible]
        seen_by = [list(column) for column in zip(*self._sees, strict=True)]
        self._rows = tuple(
            _Group(
                length, self._hull(self._sees[i]), self._hull(seen_by[i]), i, sum(1 << j for j, s in enumerate(self._sees[i]) if s)
            )
            for i, (length, sees) in enumerate(zip(self.lengths, self._sees, strict=True))
        )
        self.is_interval = all(self._is_interval(sees) for i, sees in enumerate(self._sees) if self.lengths[i])
        self._kept: dict[tuple[str, torch.device], Tensor] = {}

    def _hull(self, members: Sequence[bool]) -> tuple[int, int]:
        """Return [first, last) of the positions from the first to the last marked group; empty groups don't count."""
        present = [i for i, member in enumerate(members) if member and self.lengths[i]]
        if not present:
            return self.size, 0
        return self._starts[present[0]], self._starts[present[-1]] + self.lengths[present[-1]]

    def _is_interval(self, sees: Sequence[bool]) -> bool:
        first, last = self._hull(sees)
        return max(last - first, 0) == sum(length for length, seen in zip(self.lengths, sees, strict=True) if seen)

    def lowered(self, device: torch.device) -> Tensor:
        """Return the field as int32 (4, S) on the device.

        Each position has a column: its keys [first, last) and, as a key, its queries [first, last).
        If the field isn't made of intervals, these ranges are hulls and two rows follow, (6, S): the position's group and the bits
        of the groups that it sees. The tensor is created on the device, without a copy from the host, and cached there.
        """
        return self._keep("lowered", self._lower, device)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Return bool (S, S), True where the query (row) sees the key (column)."""
        return self._make_mask(torch.device(device))

    def kept_mask(self, device: torch.device) -> Tensor:
        """Return :meth:`mask`, cached for each device; it must not be modified."""
        return self._keep("mask", self._make_mask, device)

    def _keep(self, name: str, make: Callable[[torch.device], Tensor], device: torch.device) -> Tensor:
        # a traced or fake tensor belongs to its graph or mode and can't be cached
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
            return make(device)
        if (kept := self._kept.get((name, device))) is not None:
            return kept
        with torch.inference_mode(False):
            tensor = make(device)
        # memory allocated during a CUDA graph capture belongs to the graph
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            self._kept[name, device] = tensor
        return tensor

    def _lower(self, device: torch.device) -> Tensor:
        columns = []
        for group in self._rows:
            values = [*group.keys, *group.queries]
            if not self.is_interval:
                values += [group.number, group.sees - (1 << 32 if group.sees >> 31 else 0)]
            constants = [torch.full((1, group.length), value, dtype=torch.int32, device=device) for value in values]
            columns.append(torch.cat(constants))
        return torch.cat(columns, dim=1)

    def _make_mask(self, device: torch.device) -> Tensor:
        rows = [
            torch.cat(
                [torch.full((1, length), seen, device=device) for length, seen in zip(self.lengths, sees, strict=True)], dim=1
            )
            for sees in self._sees
        ]
        return torch.cat([row.expand(length, -1) for length, row in zip(self.lengths, rows, strict=True)])

    def slices(self) -> list[Slice]:
        """Return the field as dense blocks; neighbours that see the same keys are merged. Only for fields of intervals."""
        if not self.is_interval:
            raise ValueError("this field is not made of intervals, so it has no slices; use mask()")
        blocks: list[Slice] = []
        for start, group in zip(self._starts, self._rows, strict=True):
            if not group.length:
                continue
            keys = slice(*group.keys) if group.keys[0] < group.keys[1] else None
            rows = slice(start, start + group.length)
            if blocks and blocks[-1].keys == keys:
                rows = slice(blocks.pop().rows.start, rows.stop)
            blocks.append(Slice(rows, keys))
        return blocks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ReceptiveField) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        return self.groups, self.lengths, self.visible

    def __reduce__(self) -> tuple:
        return ReceptiveField, (
            dict(zip(self.groups, self.lengths, strict=True)),
            dict(zip(self.groups, self.visible, strict=True)),
        )

    def __repr__(self) -> str:
        width = max(map(len, (*self.groups, "sees")))
        lines = [
            f"ReceptiveField of {self.size} positions, {'intervals' if self.is_interval else 'bit rows'}",
            f"{'sees':<{width}} |  length | {' '.join(self.groups)} | keys",
        ]
        for name, row, sees in zip(self.groups, self._rows, self._sees, strict=True):
            marks = " ".join(f"{'x' if seen else '.':>{len(other)}}" for other, seen in zip(self.groups, sees, strict=True))
            first, last = row.keys
            keys = f"{first}-{last - 1}" if first < last else "none"
            note = "" if self._is_interval(sees) else " with gaps"
            lines.append(f"{name:<{width}} | {row.length:>7} | {marks} | {keys}{note}")
        return "\n".join(lines)


def _check(lengths: Mapping[str, int], visible: Mapping[str, Sequence[str]]) -> None:
    for name, value in (("lengths", lengths), ("visible", visible)):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict with a group's name as key, got {type(value).__name__}")
    if not 1 <= len(lengths) <= MAX_GROUPS:
        raise ValueError(f"a receptive field has 1 to {MAX_GROUPS} groups, got {len(lengths)}")
    for group, length in lengths.items():
        if not isinstance(group, str):
            raise TypeError(f"a group's name must be a string, got {group!r}")
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"the length of group {group!r} must be an int, got {length!r}")
        if length < 0:
            raise ValueError(f"the length of group {group!r} must be >= 0, got {length}")
    missing, unknown = [g for g in lengths if g not in visible], [g for g in visible if g not in lengths]
    if missing:
        raise ValueError(f"visible says nothing about group {missing[0]!r}: give it the list of groups it sees, [] for none")
    if unknown:
        raise ValueError(f"visible has group {unknown[0]!r}, which lengths does not have; the groups are {list(lengths)}")
    for group, seen in visible.items():
        if isinstance(seen, str) or not isinstance(seen, Sequence):
            raise TypeError(f"visible[{group!r}] must be a list of groups, got {seen!r}")
        for other in seen:
            if other not in lengths:
                raise ValueError(
                    f"visible[{group!r}] has group {other!r}, which lengths does not have; the groups are {list(lengths)}"
                )
