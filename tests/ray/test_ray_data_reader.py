"""Patches through Ray Data: each row once an epoch over all workers, and a run that goes on with them."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.data import NAME, WholeSplit, in_batches, source
from cluster.train import run
from kdsr.checkpoint import load_model
from kdsr.config import ClusterConfig, DataConfig, TeacherTrainingConfig
from kdsr.errors import DataError, RequestError, ShardCorrupt
from kdsr.pairs import Cursor, PatchBatch, PatchReader
from kdsr.shards import read_index
from kdsr.spec import EspcnSpec
from kdsr.store import open_store
from kdsr.training import Worker, patch_reader, train
from tests.small_shards import row, write_set

NUM_ROWS, PATCHES_PER_ROW = 8, 2


@pytest.fixture(scope="module")
def shards(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards of four row groups, each of one row with a grey of its own."""
    store = open_store(f"file://{tmp_path_factory.mktemp('data')}/shards")
    rows = [row(f"{grey}.png", np.full((40, 40, 3), grey, np.uint8)) for grey in range(NUM_ROWS)]
    write_set(store, [rows[:4], rows[4:]])
    return store.uri


def config_for(shards: str, output: Path, **fields: Any) -> TeacherTrainingConfig:
    data = DataConfig(shards=shards, patch_size=8, patches_per_row=PATCHES_PER_ROW, reader="ray_data")
    return TeacherTrainingConfig(
        name="run",
        output=str(output),
        data=data,
        model=EspcnSpec(scale=2, num_features=4),
        num_validation_images=0,
        **{"batch_size": 3, "num_steps": 8, "log_every_steps": 2, "save_every_steps": 2, **fields},
    )


def lanes(reader: PatchReader, start: Cursor) -> Iterator[PatchBatch]:
    """For the first steps of a run, which need no Ray."""
    yield from reader.batches(start)


def all_of(batches: Iterator[PatchBatch]) -> list[PatchBatch]:
    """Until there are no more."""
    found: list[PatchBatch] = []
    with pytest.raises(DataError, match="no more patches"):
        found.extend(batches)
    return found


def test_each_row_is_seen_as_often_as_any_other_over_all_workers(shards: str, tmp_path: Path) -> None:
    """Two workers with unequal numbers of lanes, to the end of all epochs there are."""
    config = config_for(shards, tmp_path)
    parts = WholeSplit().configure({NAME: source(config)}, 2, None, None)
    index = read_index(open_store(shards))
    readers = [patch_reader(config, index, rank=rank, world_size=2) for rank in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        ranks = list(
            threads.map(
                lambda part, reader: all_of(in_batches(part[NAME], reader, Cursor(5))), parts, readers
            )
        )
    assert all(len(batches[0].hr) == size for batches, size in zip(ranks, (2, 1), strict=True))
    assert [batch.cursor.step for batch in ranks[0][:3]] == [6, 7, 8]
    seen = Counter(int(patch[0, 0, 0]) for batches in ranks for batch in batches for patch in batch.hr)
    assert seen.keys() == set(range(NUM_ROWS))
    (times,) = set(seen.values())
    # Two epochs for the steps of the run, and as many more as are kept for workers that run ahead.
    assert times >= 2 * PATCHES_PER_ROW and times % PATCHES_PER_ROW == 0


def test_a_run_begins_its_epoch_again_on_more_workers(shards: str, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path, cluster=ClusterConfig(num_workers=2, max_failures=0))
    with pytest.raises(RequestError, match="set it to lanes"):
        list(train(config))
    begun = train(config, Worker(batches=lanes))
    assert [progress.step for progress in islice(begun, 3)] == [2, 4, 6]
    begun.close()
    card = run(config)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert card.num_steps == 8
    assert load_model(f"file://{tmp_path}/run/model").model.spec.scale == 2


@pytest.mark.long
def test_a_broken_sub_image_ends_the_run_by_its_name(ray_local: None, tmp_path: Path) -> None:
    whole = row("whole.png", np.zeros((40, 40, 3), np.uint8))
    broken = replace(whole, key="broken.png", image=whole.image[:60])
    store = open_store(f"file://{tmp_path}/shards")
    write_set(store, [[whole, broken]])
    with pytest.raises(ShardCorrupt, match=r"x 0, y 0 of broken\.png: .*run the job that made it again"):
        run(config_for(store.uri, tmp_path / "runs"))
