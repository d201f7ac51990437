import dataclasses
import hashlib
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr.errors import RequestError, ShardCorrupt
from kdsr.shards import Row, cut, is_heldout, read_index, read_row_group, verify, write_index, write_shard
from kdsr.spec import ShardIndex
from kdsr.store import open_store

SIZES = st.integers(1, 5000)


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/shards")


def row(number, *, key="photos/a b+%#ü.jpg", num_bytes=100, teacher_sr=None):
    image = bytes([number % 256]) * num_bytes
    return Row(
        key=key,
        x=number,
        y=2 * number,
        height=7,
        width=9,
        image=image,
        sha256=hashlib.sha256(image).hexdigest(),
        licence="CC0-1.0",
        domain="photo",
        heldout=number % 3 == 0,
        teacher_sr=teacher_sr,
    )


def index_of(entry):
    return ShardIndex(
        shards=[entry],
        num_images=entry.num_images,
        num_rows=entry.num_rows,
        num_heldout_rows=entry.num_heldout_rows,
        num_pixels=0,
        num_rejected=0,
        options={"domain": "photo", "heldout_fraction": 0.05},
    )


# ---------------------------------------------------------------- cutting


@given(SIZES, SIZES, st.integers(64, 1000))
def test_boxes_cover_the_image_once_and_in_order(height, width, size):
    boxes = cut(height, width, size)

    assert sum(box.height * box.width for box in boxes) == height * width
    assert boxes == sorted(boxes, key=lambda box: (box.top, box.left))
    columns = [(box.left, box.right) for box in boxes if box.top == 0]
    rows = [(box.top, box.bottom) for box in boxes if box.left == 0]
    for edges, side in [(columns, width), (rows, height)]:
        assert [begin for begin, _ in edges] == [0, *(end for _, end in edges)][:-1]
        assert edges[-1][1] == side


@given(st.integers(64, 5000), st.integers(64, 1000))
def test_sides_of_boxes_lie_between_two_thirds_and_three_halves(side, size):
    for box in cut(side, side, size):
        assert box.height <= 3 / 2 * size
        assert box.height >= min(side, int(2 / 3 * size))


@given(st.integers(64, 5000), st.integers(64, 1000))
def test_sides_of_boxes_differ_by_at_most_a_pixel(side, size):
    heights = {box.height for box in cut(side, side, size)}

    assert max(heights) - min(heights) <= 1


# ---------------------------------------------------------------- held out


def test_the_held_out_share_is_about_what_was_asked():
    heldout = [is_heldout(f"photo-{number}.jpg", 0.1) for number in range(5000)]

    assert 0.08 < sum(heldout) / len(heldout) < 0.12


@given(st.text(max_size=30))
def test_a_photo_held_out_stays_so_in_a_larger_share(key):
    assert not is_heldout(key, 0.0)
    assert is_heldout(key, 0.05) <= is_heldout(key, 0.2)


def test_what_is_held_out_never_changes():
    assert [key for key in "abcdefghijklmnopqrst" if is_heldout(key, 0.2)] == list("ghjkl")


# ---------------------------------------------------------------- one shard


def test_rows_come_back_as_they_were_written(store):
    rows = [row(number) for number in range(10)]

    entry = write_shard(store, "shard.parquet", rows, row_group_bytes=350)

    read = [each for group in range(len(entry.row_groups)) for each in read_row_group(store, entry, group)]
    assert read == rows


def test_the_entry_tells_what_is_in_the_shard(store):
    rows = [row(number, key=f"{number // 2}.png") for number in range(10)]

    entry = write_shard(store, "shard.parquet", rows, row_group_bytes=350)

    data = store.get("shard.parquet")
    assert entry.row_groups == [4, 4, 2]
    assert (entry.num_rows, entry.num_images, entry.num_heldout_rows) == (10, 5, 4)
    assert (entry.num_bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_row_larger_than_a_row_group_is_one_of_its_own(store):
    entry = write_shard(store, "shard.parquet", [row(number) for number in range(3)], row_group_bytes=10)

    assert entry.row_groups == [1, 1, 1]


def test_the_same_rows_give_the_same_bytes(store):
    entries = [
        write_shard(store, name, (row(number) for number in range(20)), row_group_bytes=700) for name in "ab"
    ]

    assert store.get("a") == store.get("b")
    assert entries[0].sha256 == entries[1].sha256


def test_one_row_group_is_in_memory_at_a_time(store):
    alive, most = weakref.WeakSet(), 0

    def rows():
        nonlocal most
        for number in range(60):
            each = row(number)
            alive.add(each)
            most = max(most, len(alive))
            yield each

    write_shard(store, "a", rows(), row_group_bytes=500)

    assert most <= 5 + 1, "a group, and the row that follows it"


def test_teacher_output_is_a_column_of_its_own(store):
    rows = [row(number, teacher_sr=b"teacher %d" % number) for number in range(4)]
    entry = write_shard(store, "a", rows, row_group_bytes=1000)

    assert read_row_group(store, entry, 0) == rows
    without = read_row_group(store, entry, 0, columns=["image"])
    assert without == [dataclasses.replace(each, teacher_sr=None) for each in rows]


def test_only_the_wanted_images_are_read(store):
    entry = write_shard(store, "a", [row(1)], row_group_bytes=1000)

    assert read_row_group(store, entry, 0, columns=[])[0].image == b""


def test_a_shard_without_rows_is_refused(store):
    with pytest.raises(RequestError, match="at least one row"):
        write_shard(store, "a", [], row_group_bytes=1000)
    assert not store.exists("a")


def test_an_error_among_the_rows_leaves_no_shard(store):
    def rows():
        yield row(0)
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_shard(store, "a", rows(), row_group_bytes=10)
    assert not store.exists("a")


# ---------------------------------------------------------------- corruption


def test_a_whole_shard_is_verified(store):
    verify(store, write_shard(store, "a", [row(1)], row_group_bytes=1000))


def test_a_changed_byte_is_found(store):
    entry = write_shard(store, "a", [row(1)], row_group_bytes=1000)
    data = bytearray(store.get("a"))
    data[20] ^= 1
    store.put("a", bytes(data))

    with pytest.raises(ShardCorrupt, match=r"a: expected sha256 .* found .* run jobs/shard.py again"):
        verify(store, entry)


def test_a_cut_shard_is_corrupt(store):
    entry = write_shard(store, "a", [row(1)], row_group_bytes=1000)
    store.put("a", store.get("a")[:-5])

    with pytest.raises(ShardCorrupt, match="a: not a shard"):
        read_row_group(store, entry, 0)


def test_a_missing_shard_is_corrupt(store):
    entry = write_shard(store, "a", [row(1)], row_group_bytes=1000)
    store.delete("a")

    with pytest.raises(ShardCorrupt, match="not there"):
        read_row_group(store, entry, 0)
    with pytest.raises(ShardCorrupt, match="not there"):
        verify(store, entry)


def test_another_shard_under_the_same_key_is_corrupt(store):
    entry = write_shard(store, "a", [row(1)], row_group_bytes=1000)
    write_shard(store, "a", [row(1), row(2)], row_group_bytes=1000)

    with pytest.raises(ShardCorrupt, match="expected 1 rows in row group 0, found 2"):
        read_row_group(store, entry, 0)


# ---------------------------------------------------------------- the set


def test_the_index_comes_back(store):
    index = index_of(write_shard(store, "a", [row(1)], row_group_bytes=1000))
    write_index(store, index)

    assert read_index(store) == index


def test_an_empty_prefix_says_how_to_make_shards(store):
    with pytest.raises(RequestError, match=r"is empty; make shards with jobs/shard.py"):
        read_index(store)


def test_shards_without_an_index_are_not_complete(store):
    write_shard(store, "a", [row(1)], row_group_bytes=1000)

    with pytest.raises(RequestError, match=r"no index.json: not complete"):
        read_index(store)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"version": 2}'])
def test_an_index_of_another_form_is_corrupt(store, data):
    store.put("index.json", data)

    with pytest.raises(ShardCorrupt, match="not an index of version 1"):
        read_index(store)
