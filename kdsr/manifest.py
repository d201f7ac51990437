"""The books of a bulk run: what was listed, what is to do, what became of each input.

    <output>/_kdsr/runs/<run id>/
        manifest.parquet    one row per listed input, written once per start
        pending.parquet     those rows that this start has to do
        status/*.parquet    one row per finished input, appended while the run goes on
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from kdsr.errors import RequestError
from kdsr.store import ObjectInfo, Store

RECORDS = "_kdsr"
"""Folder under an output that holds records, never images."""

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
    """corrupt, unsupported, too_large, missing, store, worker_died or internal; empty when done."""
    message: str = ""
    seconds: float = 0.0
    megapixels: float = 0.0
    """Of the result."""
    output_bytes: int = 0
    output_etag: str = ""


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
    ]
)


# ---------------------------------------------------------------- identity


def run_id(input_uri: str, *, model_sha256: str, options: Mapping[str, Any]) -> str:
    """Name of the run: the same for the same input, model and options, on any machine."""
    return _digest(input_uri, model_sha256, json.dumps(options, sort_keys=True))[:16]


def task_id(info: ObjectInfo, run: str) -> str:
    """Name of one input in a run: another content under the same key is another task."""
    return _digest(run, info.key, info.etag)[:32]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ---------------------------------------------------------------- which inputs, and where they go

_JUNK_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
_JUNK_FOLDERS = {"__macosx", "$recycle.bin", "@eadir", "system volume information", RECORDS}


def is_junk(key: str) -> bool:
    """Whether `key` is what systems leave beside pictures: hidden, a cache, or a record of kdsr itself."""
    *folders, name = key.split("/")
    if any(part.startswith(".") for part in [*folders, name]):
        return True
    return name.lower() in _JUNK_NAMES or any(folder.lower() in _JUNK_FOLDERS for folder in folders)


def target_key(key: str) -> str:
    """Where the result of `key` goes: under the same relative key.

    A result has the format of its input, so the name stays true, and no two inputs ever share a target.
    """
    return key


def list_tasks(source: Store, *, output_uri: str, run: str) -> Iterator[Task]:
    """One task for each input under `source`, streamed.

    Junk is left out, and so is everything below `output_uri` when the output lies inside the input. Raises
    RequestError when output and input are one place, a result would replace an input, or there is no input.
    """
    inner = _path_below(output_uri, source.uri)
    if inner == "":
        raise RequestError(f"output {output_uri} is the input itself; results would replace their originals")
    outer = _path_below(source.uri, output_uri)
    found = False
    for info in source.list():
        if is_junk(info.key) or (inner is not None and info.key.startswith(f"{inner}/")):
            continue
        target = target_key(info.key)
        if outer is not None and target.startswith(f"{outer}/"):
            raise RequestError(
                f"the result of {info.key} would be written to {output_uri}/{target}, which is inside the "
                f"input; choose an output that is not a folder above the input"
            )
        found = True
        yield Task(task_id(info, run), info.key, info.etag, info.size, target)
    if not found:
        raise RequestError(f"there is nothing to upscale under {source.uri}; check the input")


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

    @property
    def missing(self) -> int:
        """Inputs of which nothing is known; not 0 when the run was cut short."""
        return self.listed - self.done - self.skipped - self.failed

    @property
    def ok(self) -> bool:
        """Whether there is a good result for every input."""
        return self.failed == 0 and self.missing == 0

    def sentence(self) -> str:
        """For the person who waits."""
        images = "image" if self.done == 1 else "images"
        lost = f", {self.missing} unaccounted for" if self.missing else ""
        return (
            f"upscaled {self.done} {images} ({self.output_megapixels:.1f} Mpx), skipped {self.skipped}, "
            f"failed {self.failed}{lost} (see {self.output}/{_folder(self.run)}/report.json)"
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
        self._output.delete(f"{self.folder}/report.json")
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

    def contains(self, digests: Sequence[str]) -> np.ndarray:
        """For each digest, whether it was added. (N,) bool."""
        if self._added:
            self._sorted = np.sort(np.concatenate([self._sorted, *self._added]))
            self._added = []
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
