"""Sets of shards small enough for tests, made of arrays."""

import hashlib
from collections.abc import Sequence

import numpy as np

from kdsr import codecs
from kdsr.shards import Row, write_index, write_shard
from kdsr.spec import ShardIndex, TeacherRef
from kdsr.store import Store


def row(key: str, pixels: np.ndarray, *, heldout: bool = False, teacher_sr: np.ndarray | None = None) -> Row:
    """One sub-image that is a whole photograph."""
    image = codecs.encode_png(pixels)
    return Row(
        key=key,
        x=0,
        y=0,
        height=pixels.shape[0],
        width=pixels.shape[1],
        image=image,
        sha256=hashlib.sha256(image).hexdigest(),
        licence="CC0-1.0",
        domain="photo",
        heldout=heldout,
        teacher_sr=None if teacher_sr is None else codecs.encode_png(teacher_sr),
    )


def write_set(
    store: Store,
    shards: Sequence[Sequence[Row]],
    *,
    teacher: TeacherRef | None = None,
    row_group_bytes: int = 1,
) -> ShardIndex:
    """A complete set at `store`, one shard for each list of rows; every row is a row group unless told."""
    entries = [
        write_shard(store, f"shard-{number}.parquet", rows, row_group_bytes)
        for number, rows in enumerate(shards)
    ]
    index = ShardIndex(
        shards=entries,
        num_images=sum(entry.num_images for entry in entries),
        num_rows=sum(entry.num_rows for entry in entries),
        num_heldout_rows=sum(entry.num_heldout_rows for entry in entries),
        num_pixels=sum(row.height * row.width for rows in shards for row in rows),
        num_rejected=0,
        options={"licence": "CC0-1.0"},
        teacher=teacher,
        teacher_scale=None if teacher is None else 2,
    )
    write_index(store, index)
    return index
