"""Models behind HTTP with Ray Serve: entrances that read requests, replicas that hold networks.

`app` is what `serve build` and `serve deploy` import: cluster.serve:app with the fields of ServeConfig as its
args. Knows no pixels: encoded bytes go to a replica, and encoded bytes come back. Only replicas
load torch, and what does a job: all else is small, and starts soon.
"""

import asyncio
import contextvars
import hashlib
import json
import logging
import math
import time
import uuid
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    ControllerOptions,
    HTTPOptions,
)
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from cluster import session
from kdsr.config import ServeConfig
from kdsr.errors import KdsrError
from kdsr.serving.admission import MAX_CALLS
from kdsr.serving.app import build_app
from kdsr.serving.contract import Call, Description, Refusal, Result
from kdsr.serving.keys import read_keys
from kdsr.serving.problems import Problem

APP_NAME = "kdsr"
MOST_REQUESTS = 1000
"""That a process which reads them has in hand at once, and as many may wait for it; what is more gets 503."""
_THIS_PROCESS = uuid.uuid4().hex
ENTRANCE_CPUS = 0.1
"""It mostly waits; what it hashes and reads from headers is little."""
WITH_THE_MESSAGE = {
    "RAY_max_direct_call_object_size": str(8 * 2**20),
    "RAY_task_rpc_inlined_bytes_limit": str(32 * 2**20),
}
"""Images of up to 8 MB go along from process to process. Ray would put what is above 100 KB into the object
store and fetch it from there, at each hop, which takes longer than to copy it."""
FEW_LOOKS = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5"}
"""How often the controller looks at everything; Ray's ten times a second keep a core busy with nothing."""
FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}
"""Shared by all threads of a process: glibc keeps what is freed in each of them."""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""Bodies and results have pages of their own, which go when they do. glibc would move this limit above them
as they come, and keep the holes that they leave among smaller things."""
KEEPS = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}
"""Where networks run: what is freed stays for the next layer, see `kdsr.engine.keep_freed_memory`."""
RESCUES = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "kdsr.serving.rescue:middlewares"}
"""Around each proxy."""
CONTROLLER = {"env_vars": {**WITH_THE_MESSAGE, **FEW_LOOKS, **GIVES_BACK, **RESCUES}}
"""Proxies inherit it, and so does everything else but for what it has of its own."""
ENTRANCE = {"env_vars": {**WITH_THE_MESSAGE, **FEW_ARENAS, **GIVES_BACK}}
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Where threads take turns with large blocks of like sizes: what one frees the next one takes."""
REPLICA = {"env_vars": {**WITH_THE_MESSAGE, **ONE_ARENA, **KEEPS, "OMP_WAIT_POLICY": "passive"}}
"""Threads that wait for others of a layer sleep: one that spins has a core that other tiles, or Ray, do not
have."""
JOBS = {"env_vars": KEEPS}
"""For the workers of the bulk runs that it starts."""
FRESH_SECONDS, STALE_SECONDS = 1.0, 30.0
"""How long a description is taken for the present one, and how long it is better than none."""
ANSWER_SECONDS = 3.0
"""For a replica to describe itself."""


# ---------------------------------------------------------------- replicas


class Replica:
    """All networks of all models in one process."""

    def __init__(self, settings: dict[str, Any], num_threads: int) -> None:
        """`settings` are a ServeConfig without its models, which come by `reconfigure`."""
        from kdsr.engine import expect_any_size
        from kdsr.serving.host import ModelHost

        expect_any_size()
        _log_to_stderr()
        config = ServeConfig.model_validate(settings)
        device = "cuda" if config.cluster.use_gpu else "cpu"
        num_threads = min(num_threads, session.cores())
        self._host = ModelHost(config, num_threads=num_threads, device=device)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve the models of `user_config`; one that cannot be loaded stays as it was.

        Raises KdsrError when it is the first time and one cannot: a replica has all of them, or starts anew.
        """
        table = ServeConfig.model_validate({"models": user_config["models"]}).models
        is_first = not self._host.describe().models
        failures = await asyncio.to_thread(self._host.load, table)
        if failures and is_first:
            raise KdsrError("; ".join(f"model {name}: {cause}" for name, cause in failures.items()))

    async def upscale(self, call: Call) -> Result | Refusal:
        """See `ModelHost.answer`."""
        return await self._host.answer(call)

    async def describe(self) -> Description:
        """What is served now."""
        return self._host.describe()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `tiles_policy` looks at."""
        return {"waiting_tiles": float(self._host.waiting_tiles)}


def tiles_policy(ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as it takes for each to have the wanted number of waiting tiles.

    `ctx.config.target_ongoing_requests` is that number. Bounds and delays are Serve's.
    """
    waiting = sum((ctx.aggregated_metrics or {}).get("waiting_tiles", {}).values())
    wanted = math.ceil(waiting / ctx.config.get_target_ongoing_requests())
    least, most = ctx.capacity_adjusted_min_replicas, ctx.capacity_adjusted_max_replicas
    return min(max(wanted, least), most), {}


# ---------------------------------------------------------------- entrances


class ClusterBackend:
    """Replicas, as the HTTP application sees them."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._description: Description | None = None
        self._since = -math.inf
        self._asking: asyncio.Task[None] | None = None

    async def describe(self) -> Description:
        """What one replica said a moment ago. Raises Problem 503 while there is none."""
        age = time.monotonic() - self._since
        if self._description is not None and age < FRESH_SECONDS:
            return self._description
        if self._asking is None:
            # A context of its own: in the first caller's, Serve would break it off when that one leaves.
            self._asking = asyncio.create_task(self._ask(), context=contextvars.Context())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            # Whoever leaves takes nothing from the others who wait for the same answer.
            await asyncio.shield(self._asking)
        except (TimeoutError, RayError, RayServeException):
            if self._description is None or age > STALE_SECONDS:
                raise Problem("loading", "no replica answers yet; try again soon", retry_after=2) from None
        assert self._description is not None
        return self._description

    async def _ask(self) -> None:
        # Who has none yet has to find its replicas first, and nothing better to do than to wait.
        patience = ANSWER_SECONDS * (10 if self._description is None else 1)
        try:
            async with asyncio.timeout(patience):
                self._description = await self._replicas.describe.remote()
                self._since = time.monotonic()
        finally:
            self._asking = None

    async def upscale(self, call: Call) -> Result | Refusal:
        """See `kdsr.serving.app.Backend`."""
        try:
            return await self._replicas.upscale.remote(call)
        except BackPressureError:
            return Refusal("busy", "too much is waiting already; try again later", 2)
        except (RayError, RayServeException) as error:
            logging.getLogger("kdsr.serving").warning(
                "request %s: %s", call.request_id, session.last_line(error)
            )
            return Refusal("worker-lost", "the worker that had this request is gone; send it again", 1)


class Entrance:
    """Reads requests, refuses what can be refused, and hands the rest to replicas."""

    def __init__(
        self, settings: dict[str, Any], replicas: DeploymentHandle, *_jobs: DeploymentHandle
    ) -> None:
        """`_jobs` are deployed because they are here; the store is what they have in common."""
        _log_to_stderr()
        self._config = ServeConfig.model_validate(settings)
        self._backend = ClusterBackend(replicas)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._config, self._backend, read_keys(self._config), tells_id=False)


class Jobs:
    """Runs what POST /v1/jobs asked for. There is one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from cluster.serve_jobs import JobRunner

        _log_to_stderr()
        self._runner = JobRunner(ServeConfig.model_validate(settings))
        self._runner.start()

    async def check_health(self) -> None:
        """Serve starts another one when this raises."""
        self._runner.require_alive()

    async def describe(self) -> str:
        """It lives."""
        return "running"


class ReadingReplica(Replica):
    """A replica that reads requests too: in front of one alone nothing needs to stand."""

    def __init__(self, settings: dict[str, Any], num_threads: int, *_jobs: DeploymentHandle) -> None:
        """`_jobs` as for `Entrance`."""
        super().__init__(settings, num_threads)
        self._config = ServeConfig.model_validate(settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from kdsr.serving.host import HostBackend

        return build_app(self._config, HostBackend(self._host), read_keys(self._config), tells_id=False)


# ---------------------------------------------------------------- the application


def app(args: ServeConfig) -> serve.Application:
    """Entrances in front of replicas. Raises RequestError for a configuration that lets nobody in."""
    read_keys(args)
    # Models come by user_config: another table of them is no reason to start a replica anew.
    settings = args.model_dump(mode="json", exclude={"models"})
    models = args.model_dump(mode="json", include={"models"})
    jobs = _unchanged(serve.deployment(Jobs), settings).options(
        ray_actor_options={"num_cpus": 0, "runtime_env": JOBS}
    )
    beside = [jobs.bind(settings)] if args.jobs else []
    threads = session.worker_threads(args.cluster)
    if args.num_entrances == 0:
        replica = serve.deployment(serve.ingress()(ReadingReplica))
        return (
            _unchanged(replica, settings)
            .options(**_replica_options(args) | _reading(args), user_config=models)
            .bind(settings, threads, *beside)
        )
    replicas = _unchanged(serve.deployment(Replica), settings).options(
        **_replica_options(args), user_config=models
    )
    entrance = _unchanged(serve.deployment(serve.ingress()(Entrance)), settings).options(
        name="Entrance",
        num_replicas=args.num_entrances,
        ray_actor_options={"num_cpus": ENTRANCE_CPUS, "runtime_env": ENTRANCE},
        **_reading(args),
    )
    return entrance.bind(settings, replicas.bind(settings, threads), *beside)


def _unchanged(deployment: serve.Deployment, settings: dict[str, Any]) -> serve.Deployment:
    """With a version of its own, so that this process can deploy it again and only its user_config changes.

    Without one Serve takes every `serve.run` for new code, and starts all replicas anew.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return deployment.options(version=f"{_THIS_PROCESS}-{digest[:16]}", _internal=True)


def _draining(longest_seconds: float) -> dict[str, Any]:
    """A replica that is to end first answers what it has. Our own access log is the only one."""
    return {
        "graceful_shutdown_timeout_s": longest_seconds + 10,
        "health_check_timeout_s": 30,
        "logging_config": LoggingConfig(enable_access_log=False),
    }


def _reading(config: ServeConfig) -> dict[str, Any]:
    """Of whatever reads requests."""
    return {
        "max_ongoing_requests": MOST_REQUESTS,
        "max_queued_requests": MOST_REQUESTS,
        **_draining(config.longest_seconds),
    }


def _replica_options(config: ServeConfig) -> dict[str, Any]:
    cluster = config.cluster
    # Jobs beside the replicas need a CPU of the cluster's account, or they would wait for ever.
    share = session.worker_cpus(cluster, reader_cpus=session.READER_CPUS)
    cpus = max(0.5, share - (1.0 if config.jobs else 0.0))
    return {
        "name": "Replica",
        "ray_actor_options": {
            "num_cpus": cpus,
            "num_gpus": 1 if cluster.use_gpu else 0,
            "runtime_env": REPLICA,
        },
        # Admission refuses what is too much, at once; here nothing is to wait without being counted.
        "max_ongoing_requests": 16 * MAX_CALLS,
        "max_queued_requests": 16 * MAX_CALLS,
        **_scaling(config),
        **_draining(config.limits.timeout_seconds),
    }


def _scaling(config: ServeConfig) -> dict[str, Any]:
    least, most = config.cluster.least_workers, config.cluster.most_workers
    if least == most:
        return {"num_replicas": least}
    scaling = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        target_ongoing_requests=config.target_waiting_tiles,
        upscale_delay_s=5,
        downscale_delay_s=60,
        look_back_period_s=12,  # more than the interval at which replicas report
        policy=AutoscalingPolicy(policy_function="cluster.serve:tiles_policy"),
    )
    return {"autoscaling_config": scaling}


def http_options(config: ServeConfig) -> HTTPOptions:
    """Where Serve's proxies listen, and how."""

    def text(path: Any) -> str | None:
        return None if path is None else str(path)

    return HTTPOptions(
        host=config.host,
        port=config.port,
        # It counts from the first byte to the last one of the answer, uploads and results of jobs included.
        request_timeout_s=config.longest_seconds + 15,
        keep_alive_timeout_s=30,
        ssl_certfile=text(config.tls_certificate),
        ssl_keyfile=text(config.tls_key),
    )


def start(config: ServeConfig) -> str:
    """Deploy, wait until requests are answered, and return the address.

    The same again with other `models` replaces those without a restart. Raises KdsrError before anything
    starts for what cannot be served.
    """
    from kdsr.serving.host import check_table

    read_keys(config)
    check_table(config)
    session.connect(config.cluster)
    session.require_capacity(config.cluster, num_workers=config.cluster.least_workers)
    serve.start(
        proxy_location="EveryNode",
        http_options=http_options(config),
        controller_options=ControllerOptions(runtime_env=CONTROLLER),
    )
    serve.run(app(config), name=APP_NAME, route_prefix="/")
    scheme = "http" if config.tls_certificate is None else "https"
    return f"{scheme}://{config.host}:{config.port}"


def stop() -> None:
    """Take the application down; what is under way is answered first."""
    if ray.is_initialized():
        serve.delete(APP_NAME)
        serve.shutdown()


def _log_to_stderr() -> None:
    """Lines of JSON for each request, and sentences for what goes wrong."""
    logger = logging.getLogger("kdsr")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
