import pytest

from kdsr.errors import RequestError, ShardCorrupt
from kdsr.shards import Row, read_index, read_row_group, verify, write_shard
from kdsr.store import open_store


def row(number):
    return Row(
        key="a b+%#ü.jpg",
        x=number,
        y=0,
        height=8,
        width=8,
        image=bytes([number]) * 1000,
        sha256="",
        licence="CC0-1.0",
        domain="photo",
        heldout=False,
    )


@pytest.fixture
def store(s3_uri):
    return open_store(s3_uri)


def test_shards_round_trip_through_s3(store):
    rows = [row(number) for number in range(9)]

    entry = write_shard(store, "a.parquet", rows, row_group_bytes=4000)

    assert [each for group in range(3) for each in read_row_group(store, entry, group)] == rows
    verify(store, entry)


def test_a_shard_missing_on_s3_is_corrupt(store):
    entry = write_shard(store, "a.parquet", [row(0)], row_group_bytes=4000)
    store.delete("a.parquet")

    with pytest.raises(ShardCorrupt, match="not there"):
        read_row_group(store, entry, 0)
    with pytest.raises(ShardCorrupt, match="not there"):
        verify(store, entry)


def test_an_empty_s3_prefix_holds_no_set(store):
    with pytest.raises(RequestError, match="is empty"):
        read_index(store)
