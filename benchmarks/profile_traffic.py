"""Count the compulsory bytes and CPU time of every op that a function runs, backward included, as torch dispatches it.

Compulsory bytes are each input read once and each output written once. CPU time is for machines where other programs make a
profiler's wall time useless.
"""

import math
import time
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
"""Ops that read of their first argument only as much as they return."""


@dataclass
class Traffic:
    """Traffic of all calls of one op. ``product``: it multiplies matrices, so it may not be memory-bound."""

    calls: int = 0
    bytes: int = 0
    product: bool = False


def footprint(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements; a dimension of stride 0 repeats them."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size if stride or not size else 1 for size, stride in sizes)


class _Leaves(TorchDispatchMode):
    """Calls ``leaf`` for every op that doesn't decompose into others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        # in inference mode composite ops are dispatched too
        with self:
            result = func.decompose(*args, **kwargs)
        return self.leaf(func, args, kwargs) if result is NotImplemented else result

    def leaf(self, func: Any, args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError


class _Clock(_Leaves):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, float]] = []

    def leaf(self, func: Any, args: tuple, kwargs: dict) -> Any:
        start = time.process_time()
        result = func(*args, **kwargs)
        self.calls.append((func._schema.name, time.process_time() - start))
        return result


def cpu_times(function: Callable[[], Any]) -> list[tuple[str, float]]:
    """Return name and CPU seconds of every non-composite op of one call of ``function``, including backward on this thread."""
    with _Clock() as clock:
        function()
    return clock.calls


class _Counter(_Leaves):
    def __init__(self):
        super().__init__()
        self.traffic: dict[str, Traffic] = defaultdict(Traffic)

    def leaf(self, func: Any, args: tuple, kwargs: dict) -> Any:
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
        # the template tensor of *_like and new_* ops is not read
        if name in _WRITES_ONLY or name.startswith("new_") or name.endswith("_like"):
            read[:1] = [0]
        elif name in _READS_ROWS:
            read[0] = min(read[0], written)
        entry = self.traffic[func._schema.name]
        entry.calls += 1
        entry.bytes += written + sum(read)
        entry.product |= func.overloadpacket in flop_registry


def count_traffic(function: Callable[[], Any]) -> dict[str, Traffic]:
    """Map each op's name in the profiler to its traffic in one call of ``function``. Views and empty tensors are left out."""
    counter = _Counter()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), counter:
        function()
    return dict(counter.traffic)
