"""What the tests of all kernels share: other forms of their inputs, recorded launches, memory between sentinels, other orders."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    "not __import__('os').environ.get('TRITON_INTERPRET')", reason="float64 and another program order: in the interpreter only"
)
mixed_dtypes = pytest.mark.parametrize(
    ("own", "other"), [(torch.float64, torch.bfloat16), (torch.bfloat16, torch.float64)], ids=str
)
"""What Triton's interpreter can't cast to each other."""


def changed(inputs: dict, function: Callable[[str, Tensor], Tensor]) -> dict:
    """Every tensor through ``function``, as leaves again."""
    return {
        name: function(name, t.detach()).detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for name, t in inputs.items()
    }


def in_double(inputs: dict) -> dict:
    return changed(inputs, lambda name, t: t.double() if t.is_floating_point() else t)


def guarded(tensor: Tensor) -> Tensor:
    """The same values as a strided view inside storage full of NaN (of True, for a mask)."""
    shape = [2 * size + 3 for size in tensor.shape]
    storage = torch.full(shape, float("nan"), device=tensor.device).to(tensor.dtype)
    view = storage[tuple(slice(1, 2 * size, 2) for size in tensor.shape)]
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    """Axes in memory the other way round."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def expanded(tensor: Tensor, dim: int) -> Tensor:
    """The first along a dimension, if there is such a one, in place of all: a stride of 0."""
    return tensor if dim >= tensor.dim() else tensor.narrow(dim, 0, 1).expand_as(tensor)


def spread(tensors: list[Tensor], axis: int) -> list[Tensor]:
    """The same leaves with a stride of 2^30 elements along one axis of 3: the storage is virtual memory that is hardly touched."""
    storage = torch.empty(2 * 2**30 + 8192, dtype=tensors[0].dtype, device=tensors[0].device)
    views = []
    for i, tensor in enumerate(tensors):
        assert tensor.shape[axis] == 3
        strides = [2**30 if j == axis else 4 * 3**j for j in range(tensor.dim())]
        view = storage.as_strided(tensor.shape, strides, 512 * i)
        views.append(view.copy_(tensor.detach()).requires_grad_(tensor.requires_grad))
    return views


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def assert_all_close(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerances: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


class _Recording:
    """Stands in for a kernel and runs it."""

    def __init__(self, kernel, name: str, launches: list[tuple[str, dict]]):
        self.kernel, self.name, self.launches = kernel, name, launches
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((self.name, {**dict(zip(self.arg_names, args, strict=True)), **kwargs, "grid": grid}))
            return self.kernel[grid](*args, **kwargs)

        return launch


def assert_mixed_dtypes_are_right(inputs: dict, run: Callable[[dict, str], dict[str, Tensor]]) -> None:
    """``run(inputs, impl)`` gives what the reference does in float64, to a few roundings of the dtypes that are behind a result."""
    truth, got = run(in_double(inputs), "reference"), run(inputs, "triton")
    of_output = next(iter(got.values())).dtype
    for name, value in got.items():
        assert name not in inputs or value.dtype == inputs[name].dtype, name
        eps = max(torch.finfo(value.dtype).eps, torch.finfo(of_output).eps)
        torch.testing.assert_close(value.double(), truth[name], rtol=0, atol=8 * eps * truth[name].abs().max().item())


def record_launches(monkeypatch: pytest.MonkeyPatch, kernels: ModuleType, names: list[str]) -> list[tuple[str, dict]]:
    """Launches to come, each with its arguments."""
    launches: list[tuple[str, dict]] = []
    for name in names:
        monkeypatch.setattr(kernels, name, _Recording(getattr(kernels, name), name, launches))
    return launches


@contextlib.contextmanager
def sentinels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, int]]]:
    """Memory that is allocated inside lies between sentinels; in the end all of it is written, and nothing around it."""
    sentinel, margin = -12345.0, 64
    storages = []

    def surrounded(like, size, dtype):
        storage = torch.full((size + 2 * margin,), sentinel, dtype=dtype or like.dtype, device=like.device)
        if size:
            storages.append((storage, size))
        return storage

    def new_empty(self, *size, dtype=None, **kwargs):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        return surrounded(self, shape.numel(), dtype)[margin : margin + shape.numel()].view(shape)

    def new_empty_strided(self, size, stride, dtype=None, **kwargs):
        return surrounded(self, torch.Size(size).numel(), dtype).as_strided(size, stride, margin)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        patch.setattr(Tensor, "new_empty_strided", new_empty_strided)
        yield storages
    for storage, size in storages:
        written, before, behind = storage[margin : margin + size], storage[:margin], storage[margin + size :]
        assert (before == sentinel).all(), "something was written before the memory"
        assert (behind == sentinel).all(), "something was written behind the memory"
        assert not (written == sentinel).any(), "something was not written"


def shuffle_programs(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """From now on the interpreter runs each program twice, in any order; gives the orders to come."""
    import triton.runtime.interpreter as interpreter

    orders = []

    def shuffled(*args):
        order = list(range(*args))
        if sys._getframe(1).f_code.co_name == "__call__":  # the grid loops
            order = [order[i] for i in torch.randperm(len(order))] * 2
            orders.append(order)
        return order

    monkeypatch.setattr(interpreter, "range", shuffled, raising=False)
    assert shuffled(3) == [0, 1, 2], "loops inside a kernel keep their order"
    return orders


def through_a_cuda_graph(function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the function gives when its launches are captured and replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    graph.replay()
    torch.cuda.synchronize()
    return captured
