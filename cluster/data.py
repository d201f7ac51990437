"""Patches through Ray Data: tasks all over the cluster read, decode and cut; workers take what comes.

For machines with few cores beside their GPUs. A row group of one epoch is one piece of work, told by its
number alone: nothing is listed, and no footers are read again in each epoch. Patches are drawn as
`PatchReader` draws them, from (seed, epoch, sub-image, variant). Knows no pixels.

All epochs are one execution, so that no worker waits for another at the end of one, and nothing is dropped to
make their parts equal. Who gets which row group, and when, is as it comes: there is no position within an
epoch to go on from, and a run that goes on begins its epoch again.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import ray.data
import ray.train
from ray.data import DataIterator, Dataset
from ray.train import DataConfig

from kdsr.errors import DataError
from kdsr.pairs import BATCHES_READY, Columns, Cursor, PatchBatch, PatchReader
from kdsr.shards import read_index
from kdsr.store import open_store
from kdsr.training import RunConfig, patch_reader, saved_step

NAME = "patches"
MOST_TASKS = 1000
"""Into so many tasks a run is divided at most; each gives its row groups one after the other."""
BLOCK_BYTES = 2**24
"""Of patches that travel together."""
SPARE_GROUPS = 64
"""Row groups behind the last step, at least: workers take as many patches, but not the same row groups."""


def source(config: RunConfig) -> Dataset:
    """All patches from the beginning of the epoch that the run is in, asked for whenever workers begin."""
    kind, text = type(config), config.model_dump_json()
    reader = _reader(kind, text)
    first, last = reader.epoch_at(saved_step(config)), reader.epoch_at(config.num_steps)
    count = (last + 2 - first) * reader.num_groups + SPARE_GROUPS
    numbers = ray.data.range(count, override_num_blocks=min(count, MOST_TASKS))
    patches = numbers.map_batches(_patches, batch_size=None, fn_args=(kind, text, first))
    patches.context.target_max_block_size = BLOCK_BYTES
    patches.context.enable_progress_bars = False
    return patches


def batches(reader: PatchReader, start: Cursor) -> Iterator[PatchBatch]:
    """What this worker of a Ray Train run takes. Its cursor counts steps, and is honest about no more."""
    return in_batches(ray.train.get_dataset_shard(NAME), reader, start)


def in_batches(patches: DataIterator, reader: PatchReader, start: Cursor) -> Iterator[PatchBatch]:
    """`patches` for one step after the other. Raises DataError when there are no more."""
    found = patches.iter_batches(
        batch_size=len(reader.own_lanes), batch_format="numpy", prefetch_batches=BATCHES_READY
    )
    for step, columns in enumerate(found, start.step + 1):
        # A copy: what Ray hands over is read-only, and lies in its object store.
        yield reader.batch_of({name: column.copy() for name, column in columns.items()}, step)
    raise DataError(f"{reader.store.uri}: Ray Data has no more patches; start the same command again")


class WholeSplit(DataConfig):  # type: ignore[misc]
    """Every patch to one worker, and none dropped, as Ray's own split does to make parts equal."""

    def configure(
        self,
        datasets: dict[str, Dataset],
        world_size: int,
        worker_handles: Any,  # noqa: ARG002 - Ray's signature
        worker_node_ids: list[str] | None,
        **_: Any,
    ) -> list[dict[str, DataIterator]]:
        """See `DataConfig`. Asked of runs without datasets too."""
        parts: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            patches = dataset.copy(dataset)
            patches.context.execution_options = self.default_ingest_options()
            splits = patches.streaming_split(world_size, equal=False, locality_hints=worker_node_ids)
            for part, split in zip(parts, splits, strict=True):
                part[name] = split
        return parts


def _patches(
    numbers: dict[str, np.ndarray], kind: type[RunConfig], text: str, first: int
) -> Iterator[Columns]:
    """Of the row groups with these numbers, counted from the first of epoch `first`."""
    reader = _reader(kind, text)
    for number in numbers["id"]:
        epoch, place = divmod(int(number), reader.num_groups)
        yield from reader.patches_of_group(first + epoch, place)


@lru_cache(maxsize=2)
def _reader(kind: type[RunConfig], text: str) -> PatchReader:
    """Once a process: where rows lie is asked of the shards."""
    config = kind.model_validate_json(text)
    return patch_reader(config, read_index(open_store(config.data.shards, config.store)))
