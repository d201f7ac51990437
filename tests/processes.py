"""Workers of one training as processes of this machine, without a cluster."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdsr.training import RunConfig, Worker, train

PATIENCE = timedelta(minutes=5)


def train_over_processes(config: RunConfig, *, num_workers: int, folder: Path) -> None:
    """The whole run on `num_workers` processes that share gradients over gloo."""
    over_processes(_train, config, num_workers=num_workers, folder=folder)


def over_processes(work: Callable[..., None], *arguments: object, num_workers: int, folder: Path) -> None:
    """`work(worker, *arguments)` on `num_workers` processes at once; it is a function of a module."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(
        _work, (num_workers, str(folder / "meeting"), work, arguments), nprocs=num_workers
    )


def _work(
    rank: int, world_size: int, meeting: str, work: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=PATIENCE
    )
    try:
        work(Worker(rank, world_size, wrap=_data_parallel, total=_total), *arguments)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _train(worker: Worker, config: RunConfig) -> None:
    list(train(config, worker))


def _data_parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, broadcast_buffers=False)


def _total(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(tensor)
    sums: list[float] = tensor.tolist()
    return sums
