"""FewShotSplit: the same number of samples of each class for training and for model selection, the rest for testing."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class FewShotSplit:
    """A balanced k-shot split: ``train`` and ``dev`` have ``shots`` samples of each class, ``rest`` has everything else.

    It depends on labels, shots and seed only, not on the state of any generator. Splits with the same seed are nested: ``train``
    with fewer shots is a subset of ``train`` with more, and so is ``dev``. No ``train`` overlaps the ``dev`` of other shots.

    Args:
        labels: (N,) integers of any dtype, or strings; a tensor, an array or a list.
        shots: samples of each class in ``train``, and as many in ``dev``. Default: MoPE-BAF's 32 (arXiv 2403.11311, from a summary
            of it); the size of its dev set is not known.
        seed: selects the split, 0 to 2**63 - 1.

    Attributes:
        train, dev: (classes * shots,) int64 indices, shuffled, disjoint.
        rest: int64 indices of all other samples, ascending.
        classes: the distinct labels, ascending.

    Raises:
        TypeError: ``labels`` are not 1-D integers or strings, or ``shots`` or ``seed`` is not an integer.
        ValueError: there is only one class, a class has fewer than ``2 * shots`` samples, or ``shots`` or ``seed`` is out of range.
    """

    def __init__(self, labels: Tensor | Iterable[int] | Iterable[str], shots: int = 32, seed: int = 0):
        for name, value in (("shots", shots), ("seed", seed)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if shots < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be 0 to 2**63 - 1, got {seed}")
        values = _plain(labels)
        members: dict[Any, list[int]] = {label: [] for label in sorted(set(values))}
        if len(members) < 2:
            raise ValueError(f"labels must have at least two classes, got {list(members)} in {len(values)} samples")
        for i, label in enumerate(values):
            members[label].append(i)
        small = [f"class {label!r} has {len(of)}" for label, of in members.items() if len(of) < 2 * shots]
        if small:
            raise ValueError(
                f"{shots} shots need 2 * {shots} = {2 * shots} samples of each class, for train and dev; but {', '.join(small)}: "
                "take fewer shots or leave the class out"
            )
        self.shots, self.seed = shots, seed
        self.classes: list[int] | list[str] = list(members)
        generator = torch.Generator().manual_seed(seed)
        # nested: all classes are permuted before shots matters, train grows from one end and dev from the other
        shuffled = [torch.tensor(of)[torch.randperm(len(of), generator=generator)] for of in members.values()]
        train = torch.cat([of[:shots] for of in shuffled])
        dev = torch.cat([of[-shots:] for of in shuffled])
        self.train = train[torch.randperm(len(train), generator=generator)]
        self.dev = dev[torch.randperm(len(dev), generator=generator)]
        self.rest = torch.cat([of[shots:-shots] for of in shuffled]).sort().values

    def __repr__(self) -> str:
        sizes = f"train: {len(self.train)}, dev: {len(self.dev)}, rest: {len(self.rest)}"
        return f"FewShotSplit(shots={self.shots}, seed={self.seed}; {len(self.classes)} classes, {sizes})"


def _plain(labels: object) -> list[Any]:
    """Return labels as a list of Python integers or strings."""
    values = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"labels must be 1-D, one label for each sample, got {type(labels).__name__} {values!r:.80}")
    # numbers inside a list may be NumPy scalars or 0-d tensors
    values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    kinds = {type(value) for value in values}
    if values and kinds not in ({int}, {str}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        hint = ": flatten them" if list in kinds else ""
        raise TypeError(f"labels must be 1-D and all integers or all strings, got elements of type {names}{hint}")
    return values
