"""What ranks that share a batch have to tell each other, and what of a model lies on several of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def sum_over_ranks(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Each tensor summed over the group's ranks, all of them in one all-reduce; the backward pass has none.

    Every rank goes on with the same sums, so it knows their gradient; that of its own part is multiplied by the number of ranks,
    because DDP and FSDP will average over them.
    """
    flat = torch.cat([part.detach().flatten() for part in parts])
    dist.all_reduce(flat, group=group)
    sums = [total.view_as(part) for total, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True)]
    return [total + (part - part.detach()) * group.size() for total, part in zip(sums, parts, strict=True)]


class JointBatch:
    """The ranks whose batches make one; kept by name, so that a model that holds it can be copied and pickled."""

    def __init__(self, process_group: dist.ProcessGroup | None = None):
        self.name = None if process_group is None else process_group.group_name

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """See :func:`sum_over_ranks`; what is given where torch.distributed isn't in use."""
        if not parts or not dist.is_initialized():
            return list(parts)
        group: Any = dist.group.WORLD if self.name is None else dist.distributed_c10d._resolve_process_group(self.name)
        return sum_over_ranks(parts, group)


def is_sharded(value: Tensor) -> bool:
    """Whether it is a DTensor; importing that class takes half a second."""
    return hasattr(value, "full_tensor")


def gather(value: Any) -> Tensor:
    """A sharded tensor (DTensor), whole on every rank of its mesh, each of which has to call this; any other as it is."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(value: Tensor, target: Any) -> Tensor:
    """A whole tensor that every rank has, laid out as the target is; nothing is sent."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)


def mesh_of(tensors: Iterable[Any]) -> DeviceMesh | None:
    """What the first sharded one lies on."""
    return next((tensor.device_mesh for tensor in tensors if is_sharded(tensor)), None)


def is_first(mesh: DeviceMesh) -> bool:
    """Whether this is the rank that writes what the whole mesh has."""
    coordinate = mesh.get_coordinate()
    return coordinate is not None and not any(coordinate)


def wait_for_all(mesh: DeviceMesh) -> None:
    """Until every rank of the mesh is here."""
    for dim in range(mesh.ndim):
        dist.barrier(mesh.get_group(dim))
