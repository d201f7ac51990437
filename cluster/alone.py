"""A run that one process trains by itself, beside others: what it is told, and what it makes of that."""

from typing import Any

import torch

from cluster import session
from kdsr import provenance
from kdsr.config import ClusterConfig
from kdsr.training import Worker


def arguments(config: ClusterConfig) -> dict[str, Any]:
    """What the driver knows and its processes cannot: the command, and their share of the cluster."""
    return {
        "command": provenance.command(),
        "num_threads": min(session.worker_threads(config), session.cores()),
        "use_gpu": config.use_gpu,
    }


def worker(arguments: dict[str, Any]) -> Worker:
    """This process as the only worker of a run."""
    torch.set_num_threads(min(arguments["num_threads"], session.cores()))
    device = torch.device("cuda" if arguments["use_gpu"] else "cpu")
    return Worker(device=device, command=arguments["command"])
