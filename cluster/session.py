"""Join the Ray cluster that a job was submitted to, or start a private one on this machine."""

import logging
import math
import os
from collections.abc import Mapping

import ray
import ray._private.state
import ray.data
from ray._private.log import PlainRayHandler

from kdsr import errors
from kdsr.config import ClusterConfig
from kdsr.errors import KdsrError, RequestError

# Ray's own default is 30 % of the memory; encoded bytes and status rows need far less.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20

READER_CPUS = 1.0
"""What Ray Data's tasks that list, read and divide rows need; without it nothing ever begins."""


def connect(config: ClusterConfig, *, dashboard: bool = False) -> None:
    """Connect once for this process; a second call is free.

    Joins `config.address` or RAY_ADDRESS. With neither, starts a local cluster that no other process can
    join, with a `dashboard` only for those who need one: it starts slowly and is never quite idle. Raises
    RequestError when the named cluster does not answer.
    """
    if ray.is_initialized():
        return
    _set_defaults()
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        # Nobody reads the metrics of a private cluster; collecting them takes 2 % of two cores.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        least = config.least_workers
        _require("CPU", (config.cpus_per_worker or 0.0) * least, logical_cpus(), least)
        ray.init(
            address="local",
            num_cpus=logical_cpus(),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level="warning",
        )
        return
    try:
        ray.init(address=address, logging_level="warning")
    except ConnectionError as error:
        raise RequestError(
            f"no Ray cluster answers at {address}: {error}; start it, or leave out cluster.address and "
            f"RAY_ADDRESS to run on this machine"
        ) from None


def logical_cpus() -> int:
    """CPUs that a local cluster announces: one more than there are, kept for reading.

    A pool of actors that took every announced CPU would leave none for the tasks that feed it, and the job
    would wait for ever.
    """
    return cores() + 1


def worker_cpus(config: ClusterConfig) -> float:
    """CPU share of one worker: as asked, or an equal part of the cluster less one CPU for reading."""
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    total = ray.cluster_resources().get("CPU", 2.0)
    share = max(1.0, total - READER_CPUS) / config.most_workers
    return float(int(share)) if share >= 1 else math.floor(100 * share) / 100


def worker_threads(config: ClusterConfig) -> int:
    """Threads that one worker computes with: what was asked, or an equal part of the cluster's CPUs.

    For the driver to ask; a worker takes no more than its machine has. Reading needs its reserved CPU for
    moments only, so it is not left out here.
    """
    if config.cpus_per_worker is not None:
        return math.ceil(config.cpus_per_worker)
    return max(1, int(ray.cluster_resources().get("CPU", 1.0) / config.most_workers))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def require_capacity(
    config: ClusterConfig, *, num_workers: int | None = None, reader_cpus: float = 0.0
) -> None:
    """Raise RequestError when the cluster can never run `num_workers`, or as many as were asked for at most.

    `reader_cpus` are what tasks that feed the workers need beside them; without it they would wait for ever.
    """
    limits = _limits()
    limits["CPU"] = limits.get("CPU", 0.0) - reader_cpus
    workers = num_workers or config.most_workers
    _require("CPU", worker_cpus(config) * workers, limits["CPU"], workers)
    _require("GPU", float(config.use_gpu) * workers, limits.get("GPU", 0.0), workers)


def _require(resource: str, needed: float, limit: float, num_workers: int) -> None:
    if needed > limit + 1e-6:
        raise RequestError(
            f"cluster.num_workers {num_workers} need {needed:g} {resource}, and this cluster has "
            f"{limit:g} for them; ask for fewer workers, set cluster.cpus_per_worker lower, or join a "
            f"larger cluster with cluster.address"
        )


def _limits() -> dict[str, float]:
    """What the cluster has, or may grow to when it scales by itself."""
    found: dict[str, float] = ray.cluster_resources()
    configured = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(found.get(name, 0.0), configured.get(name, 0.0)) for name in found | configured}


def as_values(error: KdsrError) -> dict[str, str]:
    """Our own error as columns of a row. Ray would retry it, wrap it, and lose what it was."""
    return {"error": type(error).__name__, "reason": str(error)}


def error_of(row: Mapping[str, str]) -> KdsrError:
    """The error that `as_values` put into `row`."""
    error: KdsrError = getattr(errors, row["error"])(row["reason"])
    return error


def last_line(error: Exception | str) -> str:
    """What went wrong on a worker, without the traceback that Ray puts before it."""
    return str(error).strip().splitlines()[-1]


def leave_terminal_to_our_bar() -> None:
    """Ray Data's own progress and plans go to its log file only."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, PlainRayHandler):
            handler.setLevel(logging.ERROR)


def _set_defaults() -> None:
    """Ray's settings that kdsr depends on; whoever set them before is respected."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    # Workers would change into Ray's own folder, and relative paths of the job would no longer hold.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
