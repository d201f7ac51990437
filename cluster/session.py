"""Join the Ray cluster that a job was submitted to, or start a private one on this machine."""

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from itertools import chain, repeat
from typing import Any

import ray
import ray._private.state
import ray._private.worker
from ray._private.log import PlainRayHandler
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import AuthenticationError
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import placement_group, remove_placement_group

from cluster import capacity
from cluster.capacity import Need, Node
from kdsr import errors
from kdsr.config import ClusterConfig
from kdsr.errors import KdsrError, RequestError
from kdsr.store import Store

# Ray's own default is 30 % of the memory; encoded bytes and status rows need far less.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20

READER_CPUS = 1.0
"""What Ray Data's tasks that list, read and divide rows need; without it nothing ever begins."""

ANSWER_SECONDS = 20.0
QUIET_SECONDS, TELL_SECONDS = 5, 30
"""Waiting for room is told of after the first, and each time after the second."""


def connect(config: ClusterConfig, *, dashboard: bool = False) -> None:
    """Connect once for this process; a second call is free.

    Joins `config.address` or RAY_ADDRESS, which `ray job submit` sets for the job. With neither, starts a
    local cluster that no other process can join, with a `dashboard` only for those who need one: it starts
    slowly and is never quite idle. Raises RequestError when the named cluster does not answer, asks for
    another token, or runs another Ray or Python, and KdsrError when a local one does not come up.
    """
    if ray.is_initialized():
        return
    _set_defaults()
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        _join(address)
        return
    # Nobody reads the metrics of a private cluster; collecting them takes 2 % of two cores.
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    if config.cpus_per_worker is not None:
        capacity.require([_this_machine()], Need(config.least_workers, config.cpus_per_worker))
    try:
        ray.init(
            address="local",
            num_cpus=logical_cpus(),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            dashboard_host="127.0.0.1",
            logging_level="warning",
        )
    except Exception as error:  # Ray has no class of its own for it
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        raise KdsrError(
            "Ray did not come up on this machine in the half minute that it gives itself, most often because "
            "other work keeps the cores busy. Nothing was begun; start the same command again, or join a "
            "cluster by cluster.address"
        ) from None


def _join(address: str) -> None:
    require_answer(address)
    try:
        ray.init(address=address, logging_level="warning")
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError) as error:
        raise RequestError(why_not_joined(address, str(error))) from None


def require_answer(address: str) -> None:
    """Raise RequestError when nobody listens there; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise RequestError(
            f"no Ray cluster answers at {address}: {error.strerror or error}; start it, or leave out "
            f"cluster.address and RAY_ADDRESS to run on this machine"
        ) from None


def why_not_joined(address: str, reason: str) -> str:
    """What to do about a cluster that took no one in, from the words that Ray has for it."""
    said = " ".join(reason.split())
    if said.startswith("Version mismatch"):
        return (
            f"the Ray cluster at {address} runs other versions than this process: {said}; use the same "
            f"image or virtual environment for both"
        )
    return (
        f"the Ray cluster at {address} did not take this process: {said}. A cluster with a token wants "
        f"RAY_AUTH_MODE=token, and its token in RAY_AUTH_TOKEN or in the file that RAY_AUTH_TOKEN_PATH "
        f"names; one without wants RAY_AUTH_MODE=disabled"
    )


def logical_cpus() -> int:
    """CPUs that a local cluster announces: one more than there are, kept for reading.

    A pool of actors that took every announced CPU would leave none for the tasks that feed it, and the job
    would wait for ever.
    """
    return cores() + 1


def _this_machine() -> Node:
    """What a local cluster announces, but for GPUs, which Ray finds."""
    return Node(logical_cpus(), memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def worker_cpus(config: ClusterConfig, *, reader_cpus: float = 0.0) -> float:
    """CPU share of one worker: as asked, or an equal part of the nodes less `reader_cpus` on one of them.

    Raises RequestError for a cluster that grows and has no node to take a part of.
    """
    if config.cpus_per_worker is not None:
        return config.cpus_per_worker
    nodes = _nodes()
    if _grows() and capacity.room(nodes, Need(1, 1.0, float(config.use_gpu))) == 0:
        raise RequestError(
            f"cluster.cpus_per_worker is needed here: this cluster starts nodes when they are asked for, and "
            f"so far has {capacity.describe(nodes)}, which tells nothing of their size; give the CPUs that "
            f"one worker is to have"
        )
    return capacity.share(
        nodes, num_workers=config.most_workers, gpus=float(config.use_gpu), reader_cpus=reader_cpus
    )


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
    What an autoscaler may bring is not known, so a cluster that has one is not refused.
    """
    if not _grows():
        workers = num_workers or config.most_workers
        capacity.require(_nodes(), _need(config, workers, reader_cpus=reader_cpus))


def await_capacity(
    config: ClusterConfig, *, num_workers: int | None = None, reader_cpus: float = 0.0
) -> None:
    """The same, and return when work can begin: for all of `num_workers`, or one of as many as there may be.

    While other jobs use the cluster, or nodes have to be started first, tells on stderr what is waited for.
    """
    require_capacity(config, num_workers=num_workers, reader_cpus=reader_cpus)
    wait_for_room(config, num_workers=num_workers or 1, reader_cpus=reader_cpus)


def await_task() -> None:
    """The same for tasks of one CPU each, any number of which may run at once."""
    await_capacity(ClusterConfig(cpus_per_worker=1))


def wait_for_room(
    config: ClusterConfig,
    *,
    num_workers: int,
    reader_cpus: float = 0.0,
    unless: Callable[[], bool] = lambda: False,
) -> None:
    """Return when that many workers have room at once, or `unless` it is so, refusing nothing.

    Lost nodes may come back. Asks for a placement group, so that an autoscaler hears of it, and gives it back
    for the workers to take.
    """
    began = time.monotonic()
    for seconds in chain([QUIET_SECONDS], repeat(TELL_SECONDS)):
        # What is left of a cluster may ask for another share.
        need = _need(config, num_workers, reader_cpus=reader_cpus)
        if _has_room(need, seconds, unless) or unless():
            return
        waited = time.monotonic() - began
        print(f"waiting for {need.sentence()}, {waited:.0f} s so far: {why_waiting(need)}", file=sys.stderr)


def _has_room(need: Need, seconds: int, unless: Callable[[], bool]) -> bool:
    group = placement_group(need.bundles())
    try:
        return any(not unless() and group.wait(1) for _ in range(seconds))
    finally:
        remove_placement_group(group)


def _need(config: ClusterConfig, num_workers: int, *, reader_cpus: float) -> Need:
    cpus = worker_cpus(config, reader_cpus=reader_cpus)
    return Need(num_workers, cpus, float(config.use_gpu), reader_cpus)


def why_waiting(need: Need) -> str:
    """Whether others use the nodes, or new ones are on the way."""
    has = f"the cluster has {capacity.describe(_nodes())}"
    if capacity.room(_nodes(), need) >= need.num_workers:
        return f"{has}, others use it, and free are {capacity.describe(_free_nodes())}"
    if not _grows():
        return f"{has}, and nothing that starts more by itself"
    return f"{has}, and its autoscaler has {_num_coming()} more on the way"


def _num_coming() -> int:
    state = _autoscaling()
    return len(state.pending_instances) + sum(request.count for request in state.pending_instance_requests)


def _nodes() -> list[Node]:
    """The machines of the cluster that are alive."""
    return [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _free_nodes() -> list[Node]:
    """What nobody uses of them."""
    return [_node(left) for left in ray._private.state.available_resources_per_node().values()]


def _node(resources: Mapping[str, float]) -> Node:
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), resources.get("memory", 0.0))


def _grows() -> bool:
    """Whether an autoscaler may add nodes to this cluster."""
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = (status.get("autoscaler_report") or {}).get("active_nodes") or {}
    return capacity.scales(types, state_version=_autoscaling().autoscaler_state_version)


def _autoscaling() -> Any:
    """What the autoscaler told last of itself; of an older kind, or without one, an empty message."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._private.worker.global_worker.gcs_client.get_cluster_status(timeout_s=10))
    return reply.autoscaling_state


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


def tell_leftovers(target: Store, *, keep: Collection[str]) -> None:
    """Name what earlier runs left among the shards. It is not deleted: a training may still read it."""
    leftovers = {info.key for info in target.list("shard-")} - set(keep)
    if leftovers:
        print(
            f"{len(leftovers)} files of earlier runs under {target.uri} are in no index any more and can be "
            f"deleted",
            file=sys.stderr,
        )


def leave_terminal_to_our_bar() -> None:
    """Ray Data's own progress and plans go to its log file only."""
    import ray.data  # and with it pandas, which not every job needs

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
