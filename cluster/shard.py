"""Make shards of photographs with Ray Data: one task is one shard. Knows no pixels."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray.data

from cluster import session
from kdsr.config import ShardConfig
from kdsr.errors import DataError, KdsrError, RequestError
from kdsr.photos import Receipt, ShardPlan, build_shard, list_photos, make_index, plan_shards, rejected_lines
from kdsr.progress import progress_bar
from kdsr.shards import REJECTED_KEY, write_index
from kdsr.spec import ShardIndex
from kdsr.store import Store, open_store


@dataclass(frozen=True)
class Summary:
    """What a run of the job came to."""

    index: ShardIndex
    num_built: int
    """Shards that were not there before."""
    uri: str

    def sentence(self) -> str:
        """For the person who waits."""
        index = self.index
        rejected = (
            f"{index.num_rejected} rejected, see {REJECTED_KEY}" if index.num_rejected else "none rejected"
        )
        return (
            f"sharded {_count(index.num_images, 'image')} into {_count(index.num_rows, 'sub-image')} in "
            f"{_count(len(index.shards), 'shard')}, {self.num_built} of them new "
            f"({index.num_heldout_rows} sub-images held out, {rejected}): {self.uri}"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def shard(config: ShardConfig) -> Summary:
    """Build the shards that are missing, then write the list of rejected files and, last, the index.

    Raises RequestError for an empty input or one that is the output, DataError when no file is usable,
    StoreError when a store fails.
    """
    source, target = open_store(config.input, config.store), open_store(config.output, config.store)
    plans = list(plan_shards(list_photos(source, without=_inner_folder(source, target)), config))
    there = {info.key: info.size for info in target.list("shard-")}
    receipts = dict(_finished(plans, there, target))
    missing = [plan for plan in plans if plan.key not in receipts]
    receipts.update(_build(missing, sum(len(plan.photos) for plan in plans), config))
    index = _publish([receipts[plan.key] for plan in plans], target, config)
    session.tell_leftovers(target, keep={key for plan in plans for key in (plan.key, plan.receipt_key)})
    return Summary(index, len(missing), target.uri)


def _inner_folder(source: Store, target: Store) -> str | None:
    """The output's folder relative to the input when it lies inside it. Raises RequestError when it is it."""
    if source.uri == target.uri:
        raise RequestError(f"--input and --output are both {source.uri}; choose another output")
    inside = target.uri.startswith(f"{source.uri}/")
    return target.uri.removeprefix(f"{source.uri}/") if inside else None


def _finished(plans: list[ShardPlan], there: dict[str, int], target: Store) -> Iterator[tuple[str, Receipt]]:
    """Shards of earlier runs that are whole: a receipt, and beside it the object that it tells of."""
    for plan in plans:
        if plan.receipt_key in there:
            receipt = Receipt.model_validate_json(target.get(plan.receipt_key))
            if receipt.entry is None or there.get(plan.key) == receipt.entry.num_bytes:
                yield plan.key, receipt


def _build(missing: list[ShardPlan], num_photos: int, config: ShardConfig) -> Iterator[tuple[str, Receipt]]:
    """Build shards on the cluster; each comes out as soon as it is there."""
    num_missing = sum(len(plan.photos) for plan in missing)
    if not missing:
        return
    with progress_bar(num_photos, unit="image", done=num_photos - num_missing) as bar:
        for row in _outcomes(missing, config):
            if row["error"]:
                raise session.error_of(row)
            receipt = Receipt.model_validate_json(row["receipt"])
            bar.update(row["num_photos"])
            yield row["key"], receipt


def _outcomes(missing: list[ShardPlan], config: ShardConfig) -> Iterator[dict[str, Any]]:
    if not missing:
        return
    session.connect(config.cluster)
    session.await_task()
    session.leave_terminal_to_our_bar()
    # One block for each shard, so that each is a task of its own.
    items = [{"key": plan.key, "photos": list(plan.photos)} for plan in missing]
    plan = ray.data.from_items(items, override_num_blocks=len(items))
    yield from plan.map(_build_one, fn_kwargs={"config": config}, num_cpus=1).iter_rows()


def _build_one(row: dict[str, Any], *, config: ShardConfig) -> dict[str, Any]:
    """Runs on a worker. Our own errors come back as values: Ray would retry and wrap them."""
    plan = ShardPlan(row["key"], tuple(row["photos"]))
    outcome = {"key": plan.key, "num_photos": len(plan.photos), "receipt": "", "error": "", "reason": ""}
    source, target = open_store(config.input, config.store), open_store(config.output, config.store)
    try:
        return outcome | {"receipt": build_shard(source, target, plan, config).model_dump_json()}
    except KdsrError as error:
        return outcome | session.as_values(error)


def _publish(receipts: list[Receipt], target: Store, config: ShardConfig) -> ShardIndex:
    """Make the set exist. Raises DataError when it would be empty."""
    index = make_index(receipts, config)
    target.put(REJECTED_KEY, rejected_lines(receipts))
    if not index.shards:
        first = receipts[0].rejected[0]
        raise DataError(
            f"none of the {index.num_rejected} files under {config.input} is a usable photograph, no "
            f"{target.uri}/index.json was written; the first, {first.key}: {first.reason}; "
            f"all of them: {target.uri}/{REJECTED_KEY}"
        )
    write_index(target, index)
    return index
