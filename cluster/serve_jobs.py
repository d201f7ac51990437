"""Runs the jobs that the entrance wrote down, one Ray task each, and writes down what becomes of them.

The records in the store are all that is remembered: whoever starts this anew goes on with what is left. A
lease beside them lets one process at a time do so.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from kdsr.config import ServeConfig
from kdsr.errors import CheckpointCorrupt, KdsrError
from kdsr.lease import Lease, held
from kdsr.serving.jobs import (
    MAX_SHOWN_FAILURES,
    Job,
    JobCounts,
    JobOutcome,
    JobRecords,
    JobRequest,
    open_records,
)
from kdsr.serving.problems import Problem

if TYPE_CHECKING:
    from cluster.bulk import Tally
    from kdsr.manifest import Plan

logger = logging.getLogger("kdsr.serving")

POLL_SECONDS = 2.0
"""How soon a new or cancelled job is noticed, and how often progress is written down."""
TIDY_SECONDS = 3600.0
"""How often old jobs are forgotten, and how old a mark without a request is when it is given up."""
MAX_LOSSES = 3
"""A job whose process died so often is given up."""


@dataclass
class JobRunner:
    """One loop that starts, watches and ends jobs."""

    config: ServeConfig
    _running: dict[str, "ray.ObjectRef[Any]"] = field(default_factory=dict)
    _losses: Counter[str] = field(default_factory=Counter)
    _incomplete: dict[str, float] = field(default_factory=dict)
    """When a mark without a request was first seen."""
    _turns: dict[str, int] = field(default_factory=dict)
    """By owner: the number of the job of theirs that was begun last."""
    _count: Iterator[int] = field(default_factory=count)
    _told: dict[str, str] = field(default_factory=dict)
    """By job, or for all of them: what keeps it from going on, which the log has already."""
    _tidied: float = -math.inf
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Run the loop in a thread for as long as the process lives."""
        self._thread = threading.Thread(target=self._loop, name="jobs", daemon=True)
        self._thread.start()

    def require_alive(self) -> None:
        """Raise KdsrError unless the loop runs."""
        if self._thread is None or not self._thread.is_alive():
            raise KdsrError("nothing looks after the jobs any more; the log says what ended it")

    def _loop(self) -> None:
        while True:
            try:
                store = self._records().store
                with held(store.child("runner"), what=f"records at {store.uri}") as lease:
                    self._rounds(lease)
            except Exception as error:  # noqa: BLE001 whatever it was, there is another try
                self._tell("jobs", error)
            time.sleep(POLL_SECONDS)

    def _rounds(self, lease: Lease) -> None:
        """Look after the jobs until somebody else does, who then begins again what runs here."""
        lost = threading.Event()
        lease.when_lost = lost.set
        while not lost.is_set():
            try:
                self.look()
            except KdsrError as error:
                logger.warning("jobs: %s", error)
            except Exception:
                logger.exception("jobs: not all of them were looked after this time")
            time.sleep(POLL_SECONDS)
        logger.warning("jobs: another process looks after them now")
        for id_ in list(self._running):
            self._kill(id_)

    def _records(self) -> JobRecords:
        assert self.config.jobs is not None
        return open_records(self.config.jobs, self.config.store)

    def look(self) -> None:
        """Begin what may begin, and end what has ended or shall end."""
        assert self.config.jobs is not None
        records = self._records()
        waiting: list[Job] = []
        for owner, id_ in list(records.unfinished()):
            try:
                waiting += self._look_at(records, owner, id_)
                self._told.pop(f"job {id_}", None)
            except Exception as error:  # noqa: BLE001 whatever it is, the other jobs go on
                self._tell(f"job {id_}", error)
        while waiting and len(self._running) < self.config.jobs.max_running:
            job = min(waiting, key=self._turn)
            waiting.remove(job)
            self._turns[job.request.owner] = next(self._count)
            self._begin(job.id, job.request)
        self._tidy(records)

    def _turn(self, job: Job) -> tuple[bool, int, str, str]:
        """What is least for the next one: begun before, then owners in turn, then the oldest."""
        request = job.request
        return job.state != "running", self._turns.get(request.owner, -1), request.created, job.id

    def _look_at(self, records: JobRecords, owner: str, id_: str) -> list[Job]:
        """End the job if it has ended or shall end; the job itself if it waits."""
        try:
            job = records.get(id_, owner=owner)
        except Problem:
            # The entrance has not written the request yet, or died before it did.
            if time.monotonic() - self._incomplete.setdefault(id_, time.monotonic()) > TIDY_SECONDS:
                records.give_up(id_, owner)
                del self._incomplete[id_]
            return []
        self._incomplete.pop(id_, None)
        if job.outcome is not None:
            records.finish(id_, owner, job.outcome)
        elif job.state == "cancelled":
            self._kill(id_)
            records.finish(id_, owner, JobOutcome(state="cancelled", counts=job.counts))
        elif id_ in self._running:
            if (outcome := self._outcome(id_)) is not None:
                if outcome.state == "failed":
                    logger.warning("job %s failed: %s", id_, outcome.model_dump_json())
                records.finish(id_, owner, outcome.for_caller(job.request, records.store.uri))
        else:
            return [job]
        return []

    def _tell(self, what: str, error: Exception) -> None:
        """Say once why what was meant to go on does not."""
        if self._told.get(what) != str(error):
            self._told[what] = str(error)
            expected = isinstance(error, KdsrError)
            logger.warning("%s: %s", what, error, exc_info=None if expected else error)

    def _tidy(self, records: JobRecords) -> None:
        """Forget old jobs, now and then."""
        assert self.config.jobs is not None
        if time.monotonic() - self._tidied > TIDY_SECONDS:
            self._tidied = time.monotonic()
            if forgotten := records.forget(days=self.config.jobs.keep_days):
                logger.info("jobs: %d that ended long ago are forgotten", forgotten)

    def _begin(self, id_: str, request: JobRequest) -> None:
        settings = self.config.model_dump(mode="json", include={"jobs", "store"})
        work = ray.remote(num_cpus=0, max_retries=0)(run_job)
        self._running[id_] = work.remote(id_, request, settings)

    def _kill(self, id_: str) -> None:
        """The task's process, and with it the workers that it owns."""
        if id_ in self._running:
            ray.cancel(self._running.pop(id_), force=True)

    def _outcome(self, id_: str) -> JobOutcome | None:
        """How a task ended; None while it runs, or when it was lost and is to begin again."""
        done, _ = ray.wait([self._running[id_]], timeout=0)
        if not done:
            return None
        task = self._running.pop(id_)
        try:
            return JobOutcome.model_validate(ray.get(task))
        except RayError as error:
            logger.exception("job %s was lost", id_)
            self._losses[id_] += 1
            if isinstance(error, RayTaskError) or self._losses[id_] >= MAX_LOSSES:
                return JobOutcome(state="failed", message="an error on our side; it is in the log")
            return None


def run_job(id_: str, request: JobRequest, settings: dict[str, Any]) -> dict[str, Any]:
    """Do the whole of a job, or what is left of it; a JobOutcome as plain values."""
    # Only here: what watches the jobs stays small.
    from cluster import bulk
    from kdsr.checkpoint import load_card

    config = ServeConfig.model_validate(settings)
    assert config.jobs is not None
    records = open_records(config.jobs, config.store)
    last = 0.0

    def watch(plan: "Plan", tally: "Tally") -> None:
        nonlocal last
        if time.monotonic() - last > POLL_SECONDS:
            last = time.monotonic()
            records.progress(
                id_, _counts(plan.listed, plan.skipped + tally.done, tally.failed, tally.megapixels)
            )

    try:
        wanted = bulk.with_folder(request.upscale_config(config.jobs, config.store))
        if load_card(wanted.model, wanted.store).sha256 != request.network_sha256:
            raise CheckpointCorrupt("the model was replaced before the job began; send it again")
        report = bulk.upscale(wanted, watch=watch)
    except KdsrError as error:
        return JobOutcome(state="failed", message=str(error)).model_dump()
    counts = _counts(report.listed, report.done + report.skipped, report.failed, report.output_megapixels)
    return JobOutcome(
        state="done" if report.ok and report.listed else "failed",
        message="" if report.listed else "there are no images at the input",
        counts=counts,
        failures=dict(list(report.failed_keys.items())[:MAX_SHOWN_FAILURES]),
    ).model_dump()


def _counts(listed: int, done: int, failed: int, megapixels: float) -> JobCounts:
    return JobCounts(listed=listed, done=done, failed=failed, output_megapixels=round(megapixels, 3))
