"""Compulsory bytes of every op that a function runs, backward included: each input read once, each output written once."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_WRITES_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_"}
_READS_ROWS = {"embedding", "index", "index_select", "gather"}
"""Of their first argument only what they give."""


@dataclass
class Traffic:
    """Of all calls of one op. ``product``: it multiplies matrices, so bytes may not be what bounds it."""

    calls: int = 0
    bytes: int = 0
    product: bool = False


def footprint(tensor: Tensor) -> int:
    """Bytes of the distinct elements: a dimension of stride 0 repeats what is there."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size if stride or not size else 1 for size, stride in sizes)


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # in inference mode ops come that are made of others
        with self:
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
            self._count(func, (args, kwargs), result)
        return result

    def _count(self, func: Any, arguments: Any, result: Any) -> None:
        name = func._schema.name.rpartition("::")[2]
        inputs, outputs = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (arguments, result))
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
        is_view = not func._schema.is_mutable and any(out.untyped_storage().data_ptr() in storages for out in outputs)
        if is_view or not outputs or "empty" in name:
            return
        written, read = sum(map(footprint, outputs)), [footprint(tensor) for tensor in inputs]
        if name in _WRITES_ONLY or name in _READS_ROWS:
            read[0] = 0 if name in _WRITES_ONLY else min(read[0], written)
        entry = self.traffic[func._schema.name]
        entry.calls += 1
        entry.bytes += written + sum(read)
        entry.product |= func.overloadpacket in flop_registry


def count_traffic(function: Callable[[], Any]) -> dict[str, Traffic]:
    """Name of each op, as the profiler has it, -> what one call of ``function`` moves in it. Views and empty tensors: nothing."""
    counter = _Counter()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), counter:
        function()
    return dict(counter.traffic)
