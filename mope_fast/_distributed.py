"""Communication between ranks that share a batch, and helpers for tensors sharded over several ranks."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def sum_over_ranks(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Sum each tensor over the group's ranks, with one all-reduce for all of them and none in the backward pass.

    Every rank continues with the same sums, so it can compute their gradient itself. The gradient of its own part is multiplied by
    the number of ranks, because DDP and FSDP average over them.
    """
    flat = torch.cat([part.detach().flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    sums = [total.view_as(part) for total, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
    return [total + (part - part.detach()) * group.size() for total, part in zip(sums, parts, strict=True)]


class JointBatch:
    """The process group whose ranks' batches form one batch; kept by name, so that a model with it can be copied and pickled."""

    def __init__(self, process_group: dist.ProcessGroup | None = None):
        self.name = None if process_group is None else process_group.group_name

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor by :func:`sum_over_ranks`; without torch.distributed return the tensors unchanged."""
        if not parts or not dist.is_initialized():
            return list(parts)
        group: Any = dist.group.WORLD if self.name is None else dist.distributed_c10d._resolve_process_group(self.name)
        return sum_over_ranks(parts, group)


def is_sharded(value: Tensor) -> bool:
    """Return whether the tensor is a DTensor, without importing that class, which takes half a second."""
    return hasattr(value, "full_tensor")


def gather(value: Any) -> Tensor:
    """Return a sharded tensor (DTensor) whole, any other unchanged; every rank of the tensor's mesh must call this."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(value: Tensor, target: Any) -> Tensor:
    """Shard a whole tensor, which every rank has, in the layout of ``target``; no communication."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def mesh_of(tensors: Iterable[Any]) -> DeviceMesh | None:
    """Return the mesh of the first sharded tensor; None if none is sharded."""
    return next((tensor.device_mesh for tensor in tensors if is_sharded(tensor)), None)


def is_first(mesh: DeviceMesh) -> bool:
    """Return whether this is the first rank of the mesh, the one that writes files."""
    coordinate = mesh.get_coordinate()
    return coordinate is not None and not any(coordinate)


def wait_for_all(mesh: DeviceMesh) -> None:
    """Wait until every rank of the mesh has reached this call."""
    for dim in range(mesh.ndim):
        dist.barrier(mesh.get_group(dim))
