"""The books of a bulk run: what was listed, what is to do, what became of each input.

    <output>/_kdsr/runs/<run id>/
        manifest.parquet    one row per listed input, written once per start
        pending.parquet     those rows that this start has to do
        status/*.parquet    one row per finished input, appended while the run goes on
        engine.json         the number type that this run and its reruns compute in
        report.html         the sums, failures and some pictures, for people
        report.json         the sums, written last

A run is its input, its model and the options that change a pixel, so the same command is the same run. Rows
are streamed: memory grows by 16 bytes per finished input and per existing output, and by nothing else.
Knows no Ray, no torch, and no file format.
"""

import hashlib
import io
import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from kdsr.errors import KeyExists, RequestError
from kdsr.naming import RECORDS, Naming, Selection, Targets, is_junk
from kdsr.store import ObjectInfo, Store

ROW_GROUP_ROWS = 32_768

Item = TypeVar("Item")


@dataclass(frozen=True)
class Task:
    """One input to upscale: a row of the manifest."""

    id: str
    """Changes with the key, the content, the model and the options; see `task_id`."""
    key: str
    etag: str
    size: int
    target: str
    """Key of the result under the output."""


@dataclass(frozen=True)
class Status:
    """What became of one task: a row of the ledger."""

    id: str
    key: str
    target: str
    status: Literal["done", "failed"]
    stage: str = ""
    """Where it failed: download, decode, upscale, encode or upload."""
    error_class: str = ""
    """corrupt, unsupported, too_large, store or internal; empty when done."""
    message: str = ""
    seconds: float = 0.0
    megapixels: float = 0.0
    """Of the result."""
    output_bytes: int = 0
    output_etag: str = ""
    attempts: int = 1
    """How often it was begun, worker deaths included."""
    download_seconds: float = 0.0
    decode_seconds: float = 0.0
    net_seconds: float = 0.0
    encode_seconds: float = 0.0
    upload_seconds: float = 0.0
    wait_seconds: float = 0.0
    """Spent waiting for memory that other images held."""


TASK_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("target", pa.string()),
    ]
)

STATUS_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("key", pa.string()),
        ("target", pa.string()),
        ("status", pa.string()),
        ("stage", pa.string()),
        ("error_class", pa.string()),
        ("message", pa.string()),
        ("seconds", pa.float64()),
        ("megapixels", pa.float64()),
        ("output_bytes", pa.int64()),
        ("output_etag", pa.string()),
        ("attempts", pa.int64()),
        *[
            (f"{stage}_seconds", pa.float64())
            for stage in ("download", "decode", "net", "encode", "upload", "wait")
        ],
    ]
)


# ---------------------------------------------------------------- identity


def run_id(input_uri: str, *, model_sha256: str, options: Mapping[str, Any]) -> str:
    """Name of the run: the same for the same input, model and options, on any machine."""
    return _digest(input_uri, model_sha256, json.dumps(options, sort_keys=True))[:16]


def task_id(info: ObjectInfo, run: str, target: str) -> str:
    """Name of one input in a run: another content, or another place of the result, is another task."""
    return _digest(run, info.key, info.etag, target)[:32]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ---------------------------------------------------------------- which inputs, and where they go


def list_tasks(
    source: Store,
    *,
    output_uri: str,
    run: str,
    naming: Naming = Naming(),
    selection: Selection = Selection(),
    limit: int | None = None,
) -> Iterator[Task]:
    """One task for each wanted input under `source`, streamed; the first `limit` of them.

    What is below `output_uri` is left out when the output lies inside the input. Raises RequestError when
    output and input are one place, a result would replace an input, or there is no input.
    """
    inner = _path_below(output_uri, source.uri)
    if inner == "":
        raise RequestError(f"output {output_uri} is the input itself; results would replace their originals")
    outer = _path_below(source.uri, output_uri)

    def wanted() -> Iterator[ObjectInfo]:
        for info in source.list():
            if info.key in selection and not (inner is not None and info.key.startswith(f"{inner}/")):
                yield info

    targets = Targets(naming, lambda: (info.key for info in wanted()))
    found = False
    for info in islice(wanted(), limit):
        target = targets[info.key]
        if outer is not None and target.startswith(f"{outer}/"):
            raise RequestError(
                f"the result of {info.key} would be written to {output_uri}/{target}, which is inside the "
                f"input; choose an output that is not a folder above the input"
            )
        found = True
        yield Task(task_id(info, run, target), info.key, info.etag, info.size, target)
    if not found:
        raise RequestError(
            f"there is nothing to upscale under {source.uri}; check input, include and exclude"
        )


def _path_below(uri: str, base: str) -> str | None:
    """The relative path from `base` to `uri`: "" when they are one place, None when it is not below."""
    place, root = _real(uri), _real(base)
    if place == root:
        return ""
    return place.removeprefix(f"{root}/") if place.startswith(f"{root}/") else None


def _real(uri: str) -> str:
    """`uri` with links and ".." of local folders resolved, since two names may mean one place."""
    scheme, _, path = uri.partition("://")
    return str(Path(path).resolve()).rstrip("/") if scheme == "file" else uri.rstrip("/")


# ---------------------------------------------------------------- the records of one run


@dataclass(frozen=True)
class Plan:
    """How many inputs there are, and how many of them this start has to do."""

    listed: int
    skipped: int

    @property
    def pending(self) -> int:
        """Inputs to do."""
        return self.listed - self.skipped


@dataclass(frozen=True)
class Report:
    """The sums of a run's start, and what failed. `report.json`."""

    run: str
    input: str
    output: str
    model: str
    model_sha256: str
    listed: int
    done: int
    skipped: int
    failed: int
    failed_keys: dict[str, str]
    """The first of them, each with its cause; all of them are in the status rows."""
    output_megapixels: float
    seconds: float
    precision: str = ""
    """Number type of the network."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Where the time of all images went, added up over threads."""
    replay: str = ""
    """The command that does just the failed ones again; empty when none failed."""
    page: str = ""
    """Uri of `report.html`; empty when it could not be written."""

    @property
    def missing(self) -> int:
        """Inputs of which nothing is known; not 0 when the run was cut short."""
        return self.listed - self.done - self.skipped - self.failed

    @property
    def ok(self) -> bool:
        """Whether there is a good result for every input."""
        return self.failed == 0 and self.missing == 0

    def profile(self) -> str:
        """Where the time went, as a table. Stages of images overlap, so they may add up to more."""
        lines = [f"{stage:<14}{spent:>10.2f} s" for stage, spent in self.stage_seconds.items()]
        return "\n".join([*lines, f"{'wall clock':<14}{self.seconds:>10.2f} s"])

    def sentence(self) -> str:
        """For the person who waits."""
        images = "image" if self.done == 1 else "images"
        lost = f", {self.missing} unaccounted for" if self.missing else ""
        return (
            f"upscaled {self.done} {images} ({self.output_megapixels:.1f} Mpx), skipped {self.skipped}, "
            f"failed {self.failed}{lost} "
            f"(see {self.page or f'{self.output}/{_folder(self.run)}/report.json'})"
        )


def _folder(run: str) -> str:
    return f"{RECORDS}/runs/{run}"


class Records:
    """Everything that one run keeps under its output."""

    def __init__(self, output: Store, run: str) -> None:
        self.folder = _folder(run)
        self._output = output
        # A name of its own for each start, so that two that overlap replace nothing of each other.
        self._start = uuid.uuid4().hex[:12]
        self._num_parts = 0

    @property
    def pending_key(self) -> str:
        """Parquet with the tasks that this start has to do."""
        return f"{self.folder}/pending.parquet"

    def plan(self, tasks: Iterable[Task]) -> Plan:
        """Write the manifest of all `tasks`, and of those that are not done yet; both streamed.

        An earlier report goes away first: there is one when the run ended, and none while it is on.
        """
        for name in ("report.json", "report.html"):
            self._output.delete(f"{self.folder}/{name}")
        done = self._done_ids()
        listed = skipped = 0
        with (
            TaskWriter(self._output, f"{self.folder}/manifest.parquet") as manifest,
            TaskWriter(self._output, self.pending_key) as pending,
        ):
            for group in _grouped(tasks, ROW_GROUP_ROWS):
                is_done = done.contains([task.id for task in group])
                manifest.write(group)
                pending.write([task for task, skip in zip(group, is_done, strict=True) if not skip])
                listed, skipped = listed + len(group), skipped + int(is_done.sum())
        return Plan(listed, skipped)

    def failed_only(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Those of `tasks` whose last row says failed. Raises RequestError when there is none."""
        failed, done = DigestSet(), DigestSet()
        for table in self._status_tables():
            is_done = pyarrow.compute.equal(table["status"], "done")
            done.add(table.filter(is_done)["id"].to_pylist())
            failed.add(table.filter(pyarrow.compute.invert(is_done))["id"].to_pylist())
        found = False
        for group in _grouped(tasks, ROW_GROUP_ROWS):
            ids = [task.id for task in group]
            for task, replay in zip(group, failed.contains(ids) & ~done.contains(ids), strict=True):
                found = found or bool(replay)
                if replay:
                    yield task
        if not found:
            raise RequestError("nothing failed in earlier starts of this run; leave retry_failed out")

    def precision(self, choose: Callable[[], str]) -> str:
        """The number type of this run: what an earlier start chose, else what `choose` says now."""
        key = f"{self.folder}/engine.json"
        if not self._output.exists(key):
            with suppress(KeyExists):
                self._output.create(key, json.dumps({"precision": choose()}).encode())
        return str(json.loads(self._output.get(key))["precision"])

    def verify(self) -> Iterator[tuple[str, str]]:
        """Key and trouble of each result that should be there and is not as any row says it was written."""
        existing, intact = self._existing_outputs(), DigestSet()
        for rows in self._done_rows():
            matches = existing.contains([_version(row["target"], row["output_etag"]) for row in rows])
            intact.add(_digest(row["target"])[:32] for row, fits in zip(rows, matches, strict=True) if fits)
        told: set[str] = set()
        for rows in self._done_rows():
            fits = intact.contains([_digest(row["target"])[:32] for row in rows])
            for target in {row["target"] for row, fit in zip(rows, fits, strict=True) if not fit} - told:
                told.add(target)
                yield target, "changed since" if self._output.exists(target) else "missing"

    def num_done(self) -> int:
        """How many results the ledger knows."""
        ids = DigestSet()
        for rows in self._done_rows():
            ids.add(_digest(row["target"])[:32] for row in rows)
        return len(ids)

    def _done_rows(self) -> Iterator[list[dict[str, Any]]]:
        for table in self._status_tables():
            yield table.filter(pyarrow.compute.equal(table["status"], "done")).to_pylist()

    def append(self, statuses: Sequence[Status]) -> None:
        """Add finished rows to the ledger. What is in it survives the driver."""
        if not statuses:
            return
        buffer = io.BytesIO()
        pq.write_table(statuses_to_table(statuses), buffer, compression="zstd")
        self._output.put(
            f"{self.folder}/status/{self._start}-{self._num_parts:06}.parquet", buffer.getvalue()
        )
        self._num_parts += 1

    def parts(self) -> Iterator[tuple[bool, pa.Table]]:
        """The ledger, a part at a time, each with whether this start wrote it."""
        own = f"{self.folder}/status/{self._start}-"
        for info in self._output.list(f"{self.folder}/status/"):
            table = pq.read_table(io.BytesIO(self._output.get(info.key)), schema=STATUS_SCHEMA)
            yield info.key.startswith(own), table

    def write_page(self, text: str) -> str:
        """Write `report.html`, and say where it is."""
        key = f"{self.folder}/report.html"
        self._output.put(key, text.encode())
        return f"{self._output.uri}/{key}"

    def finish(self, report: Report) -> None:
        """Write `report.json`."""
        text = json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n"
        self._output.put(f"{self.folder}/report.json", text.encode())

    def _done_ids(self) -> "DigestSet":
        """Ids of tasks whose result was written and is still as it was written."""
        done = DigestSet()
        existing: DigestSet | None = None
        for table in self._status_tables():
            rows = table.filter(pyarrow.compute.equal(table["status"], "done")).to_pylist()
            if rows and existing is None:
                existing = self._existing_outputs()
            if existing is None:
                continue
            present = existing.contains([_version(row["target"], row["output_etag"]) for row in rows])
            done.add(row["id"] for row, is_there in zip(rows, present, strict=True) if is_there)
        return done

    def _status_tables(self) -> Iterator[pa.Table]:
        columns = ["id", "target", "status", "output_etag"]
        for info in self._output.list(f"{self.folder}/status/"):
            yield pq.read_table(io.BytesIO(self._output.get(info.key)), columns=columns)

    def _existing_outputs(self) -> "DigestSet":
        """Every result that lies under the output, by key and etag: one replaced since is not the same."""
        existing = DigestSet()
        existing.add(_version(info.key, info.etag) for info in self._output.list() if not is_junk(info.key))
        return existing


def _version(key: str, etag: str) -> str:
    return _digest(key, etag)[:32]


class TaskWriter:
    """Tasks to one Parquet object, a row group at a time; the object appears whole when the block ends."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._folder = tempfile.TemporaryDirectory(prefix="kdsr-")
        self._path = Path(self._folder.name) / PurePosixPath(key).name
        self._writer = pq.ParquetWriter(self._path, TASK_SCHEMA, compression="zstd")

    def write(self, tasks: Sequence[Task]) -> None:
        """Add rows."""
        if tasks:
            self._writer.write_table(tasks_to_table(tasks))

    def __enter__(self) -> "TaskWriter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._writer.close()
        try:
            if error_type is None:
                self._store.put_file(self._key, self._path)
        finally:
            self._folder.cleanup()


class DigestSet:
    """Hex digests of 32 digits, 16 bytes each, in sorted arrays."""

    def __init__(self) -> None:
        self._added: list[np.ndarray] = []
        self._sorted = np.empty(0, dtype="S16")

    def add(self, digests: Iterable[str]) -> None:
        """Add any number of digests; they are streamed."""
        self._added.extend(map(_packed, _grouped(digests, ROW_GROUP_ROWS)))

    def __len__(self) -> int:
        """How many different digests there are."""
        self._settle()
        return len(np.unique(self._sorted))

    def _settle(self) -> None:
        if self._added:
            self._sorted = np.sort(np.concatenate([self._sorted, *self._added]))
            self._added = []

    def contains(self, digests: Sequence[str]) -> np.ndarray:
        """For each digest, whether it was added. (N,) bool."""
        self._settle()
        if not len(self._sorted) or not digests:
            return np.zeros(len(digests), dtype=bool)
        wanted = _packed(digests)
        places = np.searchsorted(self._sorted, wanted)
        found: np.ndarray = self._sorted[np.minimum(places, len(self._sorted) - 1)] == wanted
        return found


def _packed(digests: Sequence[str]) -> np.ndarray:
    return np.frombuffer(b"".join(map(bytes.fromhex, digests)), dtype="S16")


def tasks_to_table(tasks: Sequence[Task]) -> pa.Table:
    """Manifest rows as a table."""
    return _to_table(tasks, TASK_SCHEMA)


def table_to_tasks(table: pa.Table) -> list[Task]:
    """Manifest rows of a table."""
    return [Task(**row) for row in table.to_pylist()]


def statuses_to_table(statuses: Sequence[Status]) -> pa.Table:
    """Ledger rows as a table."""
    return _to_table(statuses, STATUS_SCHEMA)


def table_to_statuses(table: pa.Table) -> list[Status]:
    """Ledger rows of a table."""
    return [Status(**row) for row in table.to_pylist()]


def _to_table(rows: Sequence[Any], schema: pa.Schema) -> pa.Table:
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(rows[0])}
    return pa.table(columns, schema=schema)


def _grouped(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
