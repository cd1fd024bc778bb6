"""Checks that need two processes: they run one after the other in one pair, which is forked off behind the imports."""

import faulthandler
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

RANKS = 2
SECONDS = 200
Check = Callable[[int, Path], None]

UNEVEN = (5, 2)
"""Samples of each rank. More than experts on one only: it mixes in K/V space, the other one in prompt space."""


def part(rank: int, sizes: tuple[int, ...] = UNEVEN) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def cut(inputs, rows: slice):
    """Of a tensor, a dict or a tuple of such."""
    if isinstance(inputs, tuple):
        return tuple(cut(value, rows) for value in inputs)
    return {name: value[rows] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[rows]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole, under the names that a plain model has."""
    return {plain(name): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def plain(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.")


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def run_in_two_processes(checks: Sequence[Check], folder: Path) -> None:
    """Call each check with (rank, folder) in both of two processes that have joined over gloo.

    Raises:
        AssertionError: a check raised, or did not end; with what both processes had to say.
    """
    # a server imports once, whatever it takes, and forks every process: no threads of this one, no second import
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_fusion", "tiny_baf", "timm", "torch.distributed.fsdp"])
    ranks = [context.Process(target=_run, args=(checks, rank, folder)) for rank in range(RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(SECONDS + 20)
        if rank.is_alive():
            rank.kill()
            rank.join()
    reports = "\n".join(
        f"rank {rank}:\n{_report(folder, rank).read_text()}" for rank in range(RANKS) if _report(folder, rank).exists()
    )
    assert [rank.exitcode for rank in ranks] == [0] * RANKS, reports


def _report(folder: Path, rank: int) -> Path:
    return folder / f"report_{rank}"


def _run(checks: Sequence[Check], rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    with open(_report(folder, rank), "w") as report:
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=report)
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS)
            )
            for check in checks:
                print(check.__name__, file=report, flush=True)
                torch.manual_seed(0)
                torch.compiler.reset()
                check(rank, folder)
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=report)
            report.flush()
            os._exit(1)  # at once: the other process finds nobody at the other end, and stops too
        finally:
            faulthandler.cancel_dump_traceback_later()
