"""Upscale every image under a prefix with Ray Data. Knows no pixels: it moves tasks to actors and counts.

list -> manifest -> minus what is done -> one stage of actors that read, upscale and write images -> status
rows -> ledger -> report. Only tasks and status rows travel through Ray; pixels never leave their actor.
"""

import glob
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.actor import ActorHandle
from tqdm import tqdm

from cluster import session
from cluster.deaths import DeathCount
from kdsr import manifest, upscale_report
from kdsr.checkpoint import load_model
from kdsr.codecs import SUFFIXES
from kdsr.config import UpscaleConfig
from kdsr.engine import Engine, choose_precision, expect_any_size
from kdsr.errors import CheckpointCorrupt, KdsrError, RequestError
from kdsr.forecast import Forecast, forecast
from kdsr.manifest import Plan, Records, Report, Status, Task
from kdsr.models import SrModel
from kdsr.naming import Naming, Selection
from kdsr.objects import ObjectUpscaler, PixelBudget
from kdsr.progress import JsonProgress, progress_bar
from kdsr.spec import Card
from kdsr.store import open_object, open_store
from kdsr.upscale import ComputeThreads, Upscaler

MAX_TASK_ROWS = 16
"""Images that an actor is given at once: what is redone when it dies, and how often progress is heard of."""
EXTRA_IMAGES = 2
"""Images that an actor downloads, decodes, encodes or writes while others keep its cores busy."""
BUDGET_PIXELS = 256_000_000
"""Output pixels that an actor holds at once; an image beyond it is done alone."""
MAX_DEATHS = 3
"""An image that was begun when its worker died so often is given up."""
MAX_FLUSH_SECONDS = 30.0
"""Longest that a status row waits for the ledger while others arrive; what a killed driver loses."""
MAX_LISTED_FAILURES = 1000
STAGES = ("download", "decode", "wait", "net", "encode", "upload")


Watch = Callable[[Plan, "Tally"], None]
"""Called in the driver before the first image and after each."""


def unwatched(_plan: Plan, _tally: "Tally") -> None:
    """Nobody looks on."""


def upscale(config: UpscaleConfig, *, command: str = "", watch: Watch = unwatched) -> Report:
    """Upscale what is not done yet under `config.input`, and return the sums that `report.json` holds.

    `command` is what the user typed, for the report. Raises RequestError and UnknownModel before Ray starts,
    StoreError when the manifest or the ledger cannot be written, KdsrError when the cluster fails. An image
    that fails is counted, not raised.
    """
    began = time.monotonic()
    loaded = load_model(config.model, config.store)
    card, run = loaded.card, run_of(config, loaded.card)
    records = Records(open_store(config.output, config.store), run)
    tally = Tally()
    tasks = tasks_of(config, run)
    with tally.timed("list and plan"):
        plan = records.plan(records.failed_only(tasks) if config.retry_failed else tasks)
    if plan.pending:
        config = config.model_copy(update={"precision": _agreed_precision(config, records, loaded.model)})
        _run(config, card, records, plan, tally, watch)
    report = tally.report(plan, config, card, run=run, seconds=time.monotonic() - began)
    if report.failed and command:
        again = "" if config.retry_failed else " --retry_failed"
        report = replace(report, replay=f"{command}{again}")
    source, target = (open_store(uri, config.store) for uri in (config.input, config.output))
    page = upscale_report.write(report, records, source=source, target=target, command=command)
    report = replace(report, page=page)
    records.finish(report)
    return report


_CHANGES_NOTHING = {
    *("input", "output", "model", "include", "exclude", "limit", "max_pixels", "max_frames"),
    *("dry_run", "verify", "retry_failed", "progress", "profile", "store", "cluster"),
}
"""Fields that change no byte of a result; all others are part of a run's name."""


def with_folder(config: UpscaleConfig) -> UpscaleConfig:
    """`config` itself; when its input is one image, the folder of that with nothing else included.

    Raises RequestError when the output is named like an image, as other programs take it.
    """
    if PurePosixPath(config.input).suffix.lower() not in SUFFIXES:
        return config
    folder, key = open_object(config.input, config.store)
    if not folder.exists(key):
        return config
    if PurePosixPath(config.output).suffix.lower() in SUFFIXES:
        raise RequestError(f"output {config.output} is named like an image; give the folder of the results")
    return config.model_copy(update={"input": folder.uri, "include": (glob.escape(key),)})


def run_of(config: UpscaleConfig, card: Card) -> str:
    """Name of the run: input, model, and every option that changes a byte of a result."""
    options = config.model_dump(mode="json", exclude=_CHANGES_NOTHING)
    return manifest.run_id(config.input, model_sha256=card.sha256, options=options)


def tasks_of(config: UpscaleConfig, run: str) -> Iterator[Task]:
    """The wanted inputs, streamed. Raises RequestError; see `manifest.list_tasks`."""
    return manifest.list_tasks(
        open_store(config.input, config.store),
        output_uri=open_store(config.output, config.store).uri,
        run=run,
        naming=Naming(config.format, config.suffix),
        selection=Selection(config.include, config.exclude),
        limit=config.limit,
    )


def dry_run(config: UpscaleConfig) -> Forecast:
    """What `upscale` would come to if nothing was done yet. Writes nothing."""
    loaded = load_model(config.model, config.store)
    return forecast(config, tasks_of(config, run_of(config, loaded.card)), loaded.model)


def verify(config: UpscaleConfig) -> tuple[int, dict[str, str]]:
    """How many results the run's ledger knows, and what is wrong with which of them."""
    run = run_of(config, load_model(config.model, config.store).card)
    records = Records(open_store(config.output, config.store), run)
    return records.num_done(), dict(records.verify())


def _agreed_precision(config: UpscaleConfig, records: Records, model: SrModel) -> str:
    """One number type for all workers and reruns, so that all results are alike."""

    def choose() -> str:
        if config.precision != "auto":
            return config.precision
        if not config.cluster.use_gpu:
            return choose_precision(model)
        session.connect(config.cluster)
        session.await_capacity(config.cluster, reader_cpus=session.READER_CPUS)
        return str(ray.get(ray.remote(num_gpus=1)(_choose_on_gpu).remote(config)))

    return records.precision(choose)


def _choose_on_gpu(config: UpscaleConfig) -> str:
    return choose_precision(load_model(config.model, config.store).model, device="cuda")


@dataclass
class Tally:
    """Sums of the status rows seen so far."""

    done: int = 0
    failed: int = 0
    megapixels: float = 0.0
    failed_keys: dict[str, str] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the block's time under `stage`."""
        began = time.monotonic()
        yield
        self.stage_seconds[stage] += time.monotonic() - began

    def add(self, status: Status) -> None:
        """Count one row."""
        self.megapixels += status.megapixels
        for stage in STAGES:
            self.stage_seconds[stage] += getattr(status, f"{stage}_seconds")
        if status.status == "done":
            self.done += 1
            return
        self.failed += 1
        if len(self.failed_keys) < MAX_LISTED_FAILURES:
            self.failed_keys[status.key] = f"{status.error_class} ({status.stage}): {status.message}"

    def report(self, plan: Plan, config: UpscaleConfig, card: Card, *, run: str, seconds: float) -> Report:
        """The sums beside what was asked."""
        return Report(
            run=run,
            input=config.input,
            output=config.output,
            model=config.model,
            model_sha256=card.sha256,
            listed=plan.listed,
            done=self.done,
            skipped=plan.skipped,
            failed=self.failed,
            failed_keys=self.failed_keys,
            output_megapixels=round(self.megapixels, 6),
            seconds=round(seconds, 3),
            precision=config.precision,
            stage_seconds={stage: round(spent, 3) for stage, spent in self.stage_seconds.items()},
        )


# ---------------------------------------------------------------- driver


def _run(config: UpscaleConfig, card: Card, records: Records, plan: Plan, tally: Tally, watch: Watch) -> None:
    """Do what is pending; every row that arrives reaches the ledger, whatever ends the run."""
    with tally.timed("start Ray"):
        session.connect(config.cluster)
    session.await_capacity(config.cluster, reader_cpus=session.READER_CPUS)
    session.leave_terminal_to_our_bar()
    try:
        with (
            _Ledger(records) as ledger,
            _progress(config, plan) as bar,
        ):
            watch(plan, tally)
            for status in _statuses(config, card, records, plan):
                tally.add(status)
                watch(plan, tally)
                ledger.add(status)
                _advance(bar, tally)
    except ray.exceptions.RayError as error:
        raise KdsrError(
            f"the cluster stopped the run after {tally.done + tally.failed} of {plan.pending} images: "
            f"{session.last_line(error)}; the same command goes on from here"
        ) from error


class _Ledger:
    """Status rows on their way to the store: soon at first, later a hundredth of the work at a time."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._unsaved: list[Status] = []
        self._began = time.monotonic()
        self._saved = -math.inf

    def add(self, status: Status) -> None:
        """Keep a row, and write what has been kept when it is time."""
        self._unsaved.append(status)
        now = time.monotonic()
        if now - self._saved > min(max(0.01 * (now - self._began), 1.0), MAX_FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        self._records.append(self._unsaved)
        self._unsaved, self._saved = [], time.monotonic()

    def __enter__(self) -> "_Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()


def _progress(config: UpscaleConfig, plan: Plan) -> "tqdm[Any] | JsonProgress":
    if config.progress == "json":
        return JsonProgress(plan.listed, done=plan.skipped)
    return progress_bar(plan.listed, unit="image", done=plan.skipped, leave=False)


def _advance(bar: "tqdm[Any] | JsonProgress", tally: Tally) -> None:
    if isinstance(bar, JsonProgress):
        bar.update(megapixels=tally.megapixels, failed=tally.failed)
        return
    seconds = bar.format_dict["elapsed"]
    rate = tally.megapixels / seconds if seconds else 0.0
    bar.set_postfix_str(f"{tally.megapixels:.0f} Mpx, {rate:.1f} Mpx/s, {tally.failed} failed", refresh=False)
    bar.update()


def _statuses(config: UpscaleConfig, card: Card, records: Records, plan: Plan) -> Iterator[Status]:
    """Status rows in the order in which tasks finish."""
    cluster = config.cluster
    filesystem, root = open_store(config.output, config.store).arrow()
    # The newer reader starts actors to look at footers: seconds for our one small file.
    ray.data.DataContext.get_current().use_datasource_v2 = False
    tasks = ray.data.read_parquet(f"{root}/{records.pending_key}", filesystem=filesystem)
    # An actor answers a whole block at a time, and the blocks are spread over the actors.
    rows = min(MAX_TASK_ROWS, math.ceil(plan.pending / (4 * cluster.most_workers)))
    deaths = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(DeathCount).remote()
    statuses = tasks.repartition(target_num_rows_per_block=rows).map_batches(
        UpscaleActor,
        fn_constructor_kwargs={
            "config": config,
            "model_sha256": card.sha256,
            "num_threads": session.worker_threads(cluster),
            "deaths": deaths,
        },
        batch_size=rows,
        batch_format="pyarrow",
        # Two calls at a time, so that the end of one task overlaps with the beginning of the next.
        compute=ray.data.ActorPoolStrategy(
            size=cluster.most_workers, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=session.worker_cpus(cluster, reader_cpus=session.READER_CPUS),
        num_gpus=1 if cluster.use_gpu else 0,
    )
    try:
        for batch in statuses.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from manifest.table_to_statuses(batch)
    finally:
        # A run that broke may live on in the traceback of its error, and with it all that it refers to.
        if ray.is_initialized():
            ray.kill(deaths)


class UpscaleActor:
    """One network that waits for tasks. A table of tasks in, a table of status rows out."""

    def __init__(
        self, config: UpscaleConfig, model_sha256: str, num_threads: int, deaths: "ActorHandle[Any]"
    ) -> None:
        expect_any_size()
        loaded = load_model(config.model, config.store)
        if loaded.card.sha256 != model_sha256:
            raise CheckpointCorrupt(f"{config.model} is another model here than where the run was started")
        use_gpu = config.cluster.use_gpu
        num_threads = min(num_threads, session.cores())
        engine = Engine(loaded.model, device="cuda" if use_gpu else "cpu", precision=config.precision)
        compute = ComputeThreads(1 if use_gpu else num_threads)
        upscaler = Upscaler(engine, tile_size=config.tile_size, compute=compute)
        self._objects = ObjectUpscaler(
            source=open_store(config.input, config.store),
            target=open_store(config.output, config.store),
            upscaler=upscaler,
            config=config,
            budget=PixelBudget(BUDGET_PIXELS),
        )
        self._images = ThreadPoolExecutor(num_threads + EXTRA_IMAGES, thread_name_prefix="images")
        self._deaths = deaths
        self._one_suspect = threading.Lock()

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Do a batch of tasks, at once or, when a worker died over it, one after the other."""
        tasks = manifest.table_to_tasks(batch)
        ids = [task.id for task in tasks]
        earlier = ray.get(self._deaths.begin_all.remote(ids))
        if any(earlier):
            statuses = [self._do_alone(task, count) for task, count in zip(tasks, earlier, strict=True)]
        else:
            statuses = list(self._images.map(self._objects.upscale, tasks))
        ray.get(self._deaths.end.remote(ids))
        return manifest.statuses_to_table(statuses)

    def _do_alone(self, task: Task, num_deaths: int) -> Status:
        """Do one task of a batch over which a worker died, so that the next death names the culprit."""
        if num_deaths >= MAX_DEATHS:
            return Status(
                task.id,
                task.key,
                task.target,
                "failed",
                stage="upscale",
                error_class="internal",
                attempts=num_deaths,
                message=f"its worker died {num_deaths} times, out of memory or by a crash; given up",
            )
        with self._one_suspect:
            ray.get(self._deaths.begin.remote(task.id))
            status = replace(self._objects.upscale(task), attempts=num_deaths + 1)
            ray.get(self._deaths.end.remote([task.id]))
        return status
