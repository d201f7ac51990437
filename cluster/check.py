"""Look at every sub-image of a set of shards with Ray Data: one task is one shard. Knows no pixels."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import ray.data

from cluster import session
from kdsr import check_report, provenance
from kdsr.check import SCALES, BrokenShard, CheckReport, check_set, inspect_shard, join
from kdsr.config import BicubicDegradation, CheckConfig
from kdsr.degrade import context
from kdsr.errors import KdsrError, ShardCorrupt
from kdsr.progress import progress_bar
from kdsr.shards import read_index
from kdsr.spec import ShardEntry, ShardIndex
from kdsr.store import open_store


def check(config: CheckConfig) -> CheckReport:
    """Write findings.jsonl, sheet.png and, last, report.json.

    Broken shards are in the report. Raises RequestError when there is no set, StoreError when a store fails.
    """
    store, target = open_store(config.check, config.store), open_store(config.target, config.store)
    index = read_index(store)
    tables, broken = _inspect(index, config)
    checked = check_set(
        index,
        join(tables),
        broken,
        uri=store.uri,
        patch_size=config.patch_size,
        contexts={scale: context(BicubicDegradation(), scale) for scale in SCALES},
        provenance=provenance.stamp(),
    )
    check_report.write(checked, index, store, target)
    return checked.report


def _inspect(index: ShardIndex, config: CheckConfig) -> tuple[dict[str, pa.Table], list[BrokenShard]]:
    """Measures of each whole shard by its key, and the others."""
    entries = {entry.key: entry for entry in index.shards}
    tables, broken = {}, []
    with progress_bar(index.num_rows, unit="sub-image") as bar:
        for row in _outcomes(index, config):
            entry = entries[row["key"]]
            if not row["error"]:
                tables[entry.key] = pa.ipc.open_stream(row["measures"]).read_all()
            elif row["error"] == ShardCorrupt.__name__:
                broken.append(BrokenShard(key=entry.key, sha256=entry.sha256, reason=row["reason"]))
            else:
                raise session.error_of(row)
            bar.update(entry.num_rows)
    return tables, sorted(broken, key=lambda shard: shard.key)


def _outcomes(index: ShardIndex, config: CheckConfig) -> Iterator[dict[str, Any]]:
    session.connect(config.cluster)
    session.await_task()
    session.leave_terminal_to_our_bar()
    # One block for each shard, so that each is a task of its own.
    items = [{"key": entry.key, "entry": entry.model_dump_json()} for entry in index.shards]
    plan = ray.data.from_items(items, override_num_blocks=len(items))
    yield from plan.map(_inspect_one, fn_kwargs={"config": config}, num_cpus=1).iter_rows()


def _inspect_one(row: dict[str, Any], *, config: CheckConfig) -> dict[str, Any]:
    """Runs on a worker. Our own errors come back as values: Ray would retry and wrap them."""
    outcome = {"key": row["key"], "measures": b"", "error": "", "reason": ""}
    store = open_store(config.check, config.store)
    try:
        table = inspect_shard(store, ShardEntry.model_validate_json(row["entry"]))
    except KdsrError as error:
        return outcome | session.as_values(error)
    return outcome | {"measures": _as_bytes(table)}


def _as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data
