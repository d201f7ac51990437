"""Jobs as a store remembers them, so that a restart knows them all. What runs them is elsewhere.

Each fact is an object of its own with one writer: `JOB/request.json` by the entrance, `JOB/progress.json` and
`JOB/outcome.json` by whoever runs the job, `JOB/cancelled` by whoever cancels it. `open/OWNER/JOB` marks what
is not finished; it is made before anything else and deleted after the outcome. `ended/DAY/JOB` marks what is,
so that it can be forgotten some day. `runner/` is the lease of whoever runs jobs.
"""

import hashlib
import logging
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from kdsr.config import (
    EncodeConfig,
    OutputFormat,
    Precision,
    ServedJobsConfig,
    StoreConfig,
    UpscaleConfig,
)
from kdsr.errors import KeyExists, KeyNotFound, StoreError
from kdsr.naming import is_junk
from kdsr.provenance import now
from kdsr.serving.contract import Description, Options
from kdsr.serving.problems import Problem, without_places
from kdsr.spec import Frozen
from kdsr.store import ObjectInfo, Store, open_store
from kdsr.uris import absolute_uri

logger = logging.getLogger("kdsr.serving")

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED = ("done", "failed", "cancelled")
MAX_SHOWN_FAILURES = 100


class JobRequest(Frozen):
    """What was asked for."""

    owner: str
    created: str
    fingerprint: str
    """The same for the same request, so that an Idempotency-Key cannot be used for another."""
    input: str
    output: str
    is_upload: bool
    """One image that was sent, whose result is fetched over HTTP."""
    include: tuple[str, ...] = ()
    model: str
    network: str
    """Uri of the network."""
    network_sha256: str
    precision: Precision = "auto"
    """What the server computes with, so that a job has the pixels of an answer; so has `tile_size`."""
    tile_size: int | None = None
    scale: float | None = None
    format: OutputFormat | None = None
    quality: int | None = None

    def upscale_config(self, jobs: ServedJobsConfig, store: StoreConfig) -> UpscaleConfig:
        """The same as a bulk run."""
        encode = EncodeConfig() if self.quality is None else EncodeConfig(quality=self.quality)
        return UpscaleConfig(
            input=self.input,
            output=self.output,
            model=self.network,
            scale=self.scale,
            precision=self.precision,
            tile_size=self.tile_size,
            format=self.format,
            encode=encode,
            include=self.include,
            max_pixels=jobs.max_pixels,
            progress="json",
            store=store,
            cluster=jobs.cluster,
        )


class JobCounts(Frozen):
    """How far a job is; images."""

    listed: int = 0
    done: int = 0
    failed: int = 0
    output_megapixels: float = 0.0


class JobOutcome(Frozen):
    """How a job ended."""

    state: Literal["done", "failed", "cancelled"]
    message: str = ""
    counts: JobCounts = JobCounts()
    failures: dict[str, str] = Field(default={})
    """The first ones, by key."""

    def for_caller(self, request: JobRequest, records: str) -> "JobOutcome":
        """Without places that whoever made the job did not name; `records` is the uri of theirs."""
        keep = () if request.is_upload else (request.input, request.output)
        known = (request.network, records)
        return self.model_copy(
            update={
                "message": without_places(self.message, *known, keep=keep),
                "failures": {
                    key: without_places(cause, *known, keep=keep) for key, cause in self.failures.items()
                },
            }
        )


@dataclass(frozen=True)
class Job:
    """All that is known of one."""

    id: str
    request: JobRequest
    state: State
    counts: JobCounts
    outcome: JobOutcome | None

    def shown(self) -> dict[str, Any]:
        """What its owner sees."""
        request = self.request
        places = {} if request.is_upload else {"input": request.input, "output": request.output}
        result = {"result": f"/v1/jobs/{self.id}/result"} if request.is_upload else {}
        outcome = self.outcome or JobOutcome(state="done")
        return {
            "id": self.id,
            "state": self.state,
            "created": request.created,
            "model": request.model,
            "scale": request.scale,
            **places,
            **self.counts.model_dump(),
            "message": outcome.message,
            "failures": outcome.failures,
            **(result if self.state == "done" else {}),
        }


@dataclass(frozen=True)
class JobRecords:
    """Jobs in a store. Safe to share between threads."""

    store: Store

    def announce(self, id_: str, owner: str) -> None:
        """Mark a job that is about to be made, so that what is left of it is found if that fails."""
        self.store.put(f"open/{owner}/{id_}", b"")

    def create(self, id_: str, request: JobRequest) -> Job:
        """Write down a new job; the one that is there when the same request came before. Raises Problem."""
        self.announce(id_, request.owner)
        try:
            self.store.create(f"{id_}/request.json", _bytes(request))
        except KeyExists:
            job = self._the_same(id_, request)
            if job.state in FINISHED:
                self._close(id_, request.owner)
            return job
        return self.get(id_, owner=request.owner)

    def made(self, id_: str, request: JobRequest) -> Job | None:
        """The job that the same request made before. Raises Problem for the id of another request."""
        return self._the_same(id_, request) if self.is_there(id_) else None

    def _the_same(self, id_: str, request: JobRequest) -> Job:
        job = self.get(id_, owner=request.owner)
        if job.request.fingerprint != request.fingerprint:
            raise Problem("reused-key", "this Idempotency-Key was used for another job; make a new one")
        return job

    def get(self, id_: str, *, owner: str) -> Job:
        """A job of `owner`'s. Raises Problem 404 for others and for none."""
        request = self._read(f"{id_}/request.json", JobRequest) if _is_id(id_) else None
        if request is None or request.owner != owner:
            raise Problem("not-found", "there is no such job")
        outcome = self._read(f"{id_}/outcome.json", JobOutcome)
        progress = self._read(f"{id_}/progress.json", JobCounts)
        if outcome is not None:
            return Job(id_, request, outcome.state, outcome.counts, outcome)
        state: State = "queued" if progress is None else "running"
        if self.is_cancelled(id_):
            state = "cancelled"
        return Job(id_, request, state, progress or JobCounts(), None)

    def is_there(self, id_: str) -> bool:
        """Whether there is such a job, of anybody's."""
        return self.store.exists(f"{id_}/request.json")

    def num_open(self, owner: str) -> int:
        """Jobs of `owner` that are not finished."""
        return sum(1 for _ in self._marks(f"open/{owner}/"))

    def unfinished(self) -> Iterator[tuple[str, str]]:
        """(owner, id) of all jobs that are not finished."""
        return self._marks("open/")

    def progress(self, id_: str, counts: JobCounts) -> None:
        """Write down how far it is."""
        self.store.put(f"{id_}/progress.json", _bytes(counts))

    def cancel(self, id_: str) -> None:
        """Ask whoever runs it to stop."""
        self.store.put(f"{id_}/cancelled", b"")

    def is_cancelled(self, id_: str) -> bool:
        """Whether it was asked to stop."""
        return self.store.exists(f"{id_}/cancelled")

    def finish(self, id_: str, owner: str, outcome: JobOutcome) -> None:
        """Write down how it ended."""
        self.store.put(f"{id_}/outcome.json", _bytes(outcome))
        self.store.put(f"ended/{datetime.now(UTC).date()}/{id_}", b"")
        self._close(id_, owner)

    def give_up(self, id_: str, owner: str) -> None:
        """An entrance that died before it wrote the request leaves a mark, and perhaps an upload."""
        self._remove(id_)
        self._close(id_, owner)

    def forget(self, *, days: float) -> int:
        """Delete what is known of jobs that ended more than `days` ago, with what was sent and made for them.

        Places that callers named are theirs and stay. Returns how many jobs.
        """
        limit = (datetime.now(UTC) - timedelta(days=days)).date()
        forgotten = 0
        for day, id_ in list(self._marks("ended/")):
            ended = _date(day)
            if ended is None or ended >= limit:
                continue
            if self.store.exists(f"{id_}/outcome.json"):
                self._remove(id_)
                forgotten += 1
            self.store.delete(f"ended/{day}/{id_}")
        return forgotten

    def put_upload(self, id_: str, name: str, path: Path) -> None:
        """Keep the image that was sent at the job's own input.

        `name` follows from the content, so that another one under the same key replaces nothing.
        """
        self.store.put_file(f"{id_}/{_stem(name)}/{name}", path)

    def upload_places(self, id_: str, name: str) -> tuple[str, str]:
        """Uris of the input and output of a job from an upload."""
        return f"{self.store.uri}/{id_}/{_stem(name)}", f"{self.store.uri}/{id_}/output"

    def result(self, id_: str) -> ObjectInfo | None:
        """The file that an uploaded image became."""
        output = f"{id_}/output/"
        found = (info for info in self.store.list(output) if not is_junk(info.key.removeprefix(output)))
        return next(found, None)

    def _remove(self, id_: str) -> None:
        for info in list(self.store.list(f"{id_}/")):
            self.store.delete(info.key)

    def _close(self, id_: str, owner: str) -> None:
        self.store.delete(f"open/{owner}/{id_}")

    def _marks(self, prefix: str) -> Iterator[tuple[str, str]]:
        """(folder, id) of all marks below `prefix`; what else lies there is left alone."""
        for info in self.store.list(prefix):
            parts = info.key.split("/")
            if len(parts) == 3 and _is_id(parts[2]):
                yield parts[1], parts[2]
            else:
                _tell_of_stray(info.key)

    def _read(self, key: str, kind: type[Any]) -> Any:
        """None where nothing is. Raises StoreError for what is damaged, or has fields of another version."""
        try:
            return kind.model_validate_json(self.store.get(key))
        except KeyNotFound:
            return None
        except ValidationError:
            raise StoreError(
                f"{self.store.uri}/{key}: expected the fields of a {kind.__name__}, found others; it is "
                f"damaged, or was written by another version of kdsr, which goes on with it"
            ) from None


def _bytes(record: Frozen) -> bytes:
    return record.model_dump_json(indent=2).encode()


@cache
def _tell_of_stray(key: str) -> None:
    """Once for each."""
    logger.warning("jobs: %s among the records is no mark of a job; it is left alone", key)


def _date(day: str) -> date | None:
    with suppress(ValueError):
        return date.fromisoformat(day)
    return None


def _stem(name: str) -> str:
    return name.partition(".")[0]


def _is_id(text: str) -> bool:
    return len(text) == 32 and set(text) <= set("0123456789abcdef")


def job_id(owner: str, idempotency_key: str | None) -> str:
    """A new id, or the one that belongs to the key."""
    if idempotency_key is None:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{owner}\0{idempotency_key}".encode()).hexdigest()[:32]


def fingerprint(*parts: str) -> str:
    """One text for a request."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def request_of(
    options: Options,
    description: Description,
    *,
    owner: str,
    places: tuple[str, str],
    include: tuple[str, ...] = (),
    upload_sha256: str | None = None,
    tile_size: int | None = None,
) -> JobRequest:
    """A job from what a caller gave; `places` are input and output. Raises Problem for an unknown model."""
    model = description.model(options.model)
    network = model.network_for(options.scale)
    asked = options.model_dump_json()
    parts = (asked, upload_sha256) if upload_sha256 is not None else (asked, *places, *include)
    return JobRequest(
        owner=owner,
        created=now(),
        fingerprint=fingerprint(*parts),
        input=places[0],
        output=places[1],
        is_upload=upload_sha256 is not None,
        include=include,
        model=model.name,
        network=network.uri,
        network_sha256=network.card.sha256,
        precision=network.precision,
        tile_size=tile_size,
        scale=options.scale,
        format=options.format,
        quality=options.quality,
    )


def allowed_place(uri: str, allowed: tuple[str, ...], *, what: str) -> str:
    """`uri` made absolute, when it is one of `allowed` or below one. Raises Problem 403 and 422."""
    try:
        place = absolute_uri(uri) if "://" in uri else ""
    except ValueError:
        place = ""
    if not place or len(uri) > 1000 or not uri.isprintable() or "\\" in uri or ".." in place.split("/"):
        raise Problem("invalid-option", f"{what}: expected s3://BUCKET/PREFIX or file:///FOLDER")
    if not any(_is_below(place, root) for root in allowed):
        raise Problem("forbidden", f"{what}: jobs may not use this place")
    return place


def _is_below(place: str, root: str) -> bool:
    if place.startswith("file://") and root.startswith("file://"):
        # A link within an allowed folder must not lead out of it.
        below, above = (Path(uri.removeprefix("file://")).resolve() for uri in (place, root))
        return below.is_relative_to(above)
    return f"{place.rstrip('/')}/".startswith(f"{root.rstrip('/')}/")


def open_records(jobs: ServedJobsConfig, store: StoreConfig) -> JobRecords:
    """The records of a configuration."""
    return JobRecords(open_store(jobs.records, store))
