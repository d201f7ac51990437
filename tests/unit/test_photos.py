import io
import json

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr import codecs
from kdsr.config import ShardConfig
from kdsr.errors import ImageCorrupt, ImageTooLarge, ImageTooSmall, KeyNotFound, RequestError
from kdsr.photos import (
    Receipt,
    build_shard,
    is_junk,
    list_photos,
    make_index,
    num_shards,
    photo_rows,
    plan_shards,
    rejected_lines,
)
from kdsr.shards import read_row_group
from kdsr.store import open_store

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (150, 210, 3), dtype=np.uint8)


def config(**options):
    return ShardConfig(input="in", output="out", **{"sub_image_size": 64, "min_size": 32, **options})


def photo(kind="PNG", pixels=NOISE, **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def source(tmp_path):
    return open_store(f"file://{tmp_path}/in")


@pytest.fixture
def target(tmp_path):
    return open_store(f"file://{tmp_path}/out")


def only_plan(source, options):
    [plan] = plan_shards(list_photos(source), options)
    return plan


# ---------------------------------------------------------------- planning


@pytest.mark.parametrize(
    "key", [".hidden.jpg", "a/.git/b.png", "Thumbs.db", "a/desktop.ini", "__MACOSX/a.jpg", "a/._b.jpg", "a/"]
)
def test_what_desktops_leave_behind_is_no_photo(key):
    assert is_junk(key)


@pytest.mark.parametrize("key", ["a.jpg", "a b/c+d%.jpg", "readme.txt", "a..b/c.png"])
def test_every_other_key_is_looked_at(key):
    assert not is_junk(key)


@given(st.sets(st.integers(0, 500), min_size=1), st.integers(1, 4))
def test_every_photo_is_in_exactly_one_shard(numbers, megabytes):
    photos = list_photos(_Listing({f"{number}.jpg": 300_000 for number in numbers}))

    plans = list(plan_shards(photos, config(shard_bytes=megabytes * 2**20)))

    assert sorted(key for plan in plans for key in plan.photos) == sorted(f"{n}.jpg" for n in numbers)
    assert [plan.key for plan in plans] == sorted({plan.key for plan in plans})
    assert all(list(plan.photos) == sorted(plan.photos) for plan in plans)


def test_the_plan_does_not_depend_on_the_order_of_the_listing():
    sizes = {f"{number}.jpg": 300_000 for number in range(50)}

    plans = [
        list(plan_shards(list_photos(_Listing(dict(order))), config(shard_bytes=2**20)))
        for order in (sizes.items(), reversed(sizes.items()))
    ]

    assert plans[0] == plans[1]


def test_shards_are_as_many_as_their_size_needs():
    photos = list_photos(_Listing({f"{number}.jpg": 1_000_000 for number in range(100)}))

    assert num_shards(photos, 2**30) == 1
    assert num_shards(photos, 600_000_000) == 1, "100 MB of JPEG are taken for 600 MB of PNG"
    assert num_shards(photos, 599_999_999) == 2
    assert num_shards(photos, 128 * 2**20) == 8


def test_one_more_photo_touches_one_shard():
    sizes = {f"{number}.jpg": 300_000 for number in range(50)}
    options = config(shard_bytes=10 * 2**20)

    before = {plan.key for plan in plan_shards(list_photos(_Listing(sizes)), options)}
    after = {plan.key for plan in plan_shards(list_photos(_Listing(sizes | {"new.jpg": 300_000})), options)}

    assert len(after - before) == 1
    assert len(before) > 4


@pytest.mark.parametrize(
    "change", [{"sub_image_size": 96}, {"min_size": 50}, {"domain": "anime"}, {"heldout_fraction": 0.5}]
)
def test_an_option_that_changes_rows_changes_every_name(change):
    photos = list_photos(_Listing({f"{number}.jpg": 300_000 for number in range(20)}))

    before = {plan.key for plan in plan_shards(photos, config(shard_bytes=2**20))}
    after = {plan.key for plan in plan_shards(photos, config(shard_bytes=2**20, **change))}

    assert not before & after


def test_a_changed_photo_changes_the_name(source):
    source.put("a.png", photo())
    before = only_plan(source, config())
    source.put("a.png", photo(pixels=NOISE[::-1]))

    assert only_plan(source, config()).key != before.key


def test_an_output_inside_the_input_is_left_out(source):
    source.put("a.png", photo())
    source.put("out/b.png", photo())
    source.put("outer/c.png", photo())

    assert set(list_photos(source, without="out")["key"].to_pylist()) == {"a.png", "outer/c.png"}


def test_an_empty_prefix_is_refused(source):
    with pytest.raises(RequestError, match="no files under file:///"):
        list_photos(source)


class _Listing:
    """A prefix whose listing is all that matters."""

    uri = "file:///photos"

    def __init__(self, sizes):
        self.sizes = sizes

    def list(self):
        from kdsr.store import ObjectInfo

        return (ObjectInfo(key, size, "etag") for key, size in self.sizes.items())


# ---------------------------------------------------------------- rows


def test_sub_images_put_together_are_the_photo():
    whole = np.zeros_like(NOISE)
    rows = list(photo_rows("a.png", photo(), config()))
    for row in rows:
        pixels = codecs.decode_png(row.image)
        assert pixels.shape == (row.height, row.width, 3)
        whole[row.y : row.y + row.height, row.x : row.x + row.width] = pixels

    assert len(rows) == 2 * 3
    assert np.array_equal(whole, NOISE)


def test_rows_carry_the_tags_of_the_run():
    rows = list(
        photo_rows("a.png", photo(), config(domain="anime", licence="CC0-1.0", heldout_fraction=0.999))
    )

    assert {(row.key, row.domain, row.licence, row.heldout) for row in rows} == {
        ("a.png", "anime", "CC0-1.0", True)
    }


def test_the_shorter_side_decides_what_is_too_small():
    data = photo(pixels=NOISE[:40])

    assert list(photo_rows("a.png", data, config(min_size=40)))
    with pytest.raises(ImageTooSmall, match="210 x 40 pixels.*min_size 41"):
        next(photo_rows("a.png", data, config(min_size=41)))


def test_too_many_pixels_are_refused():
    with pytest.raises(ImageTooLarge):
        next(photo_rows("a.png", photo(), config(max_pixels=1000)))


def test_a_cut_file_gives_not_even_its_first_rows():
    with pytest.raises(ImageCorrupt):
        next(photo_rows("a.jpg", photo("JPEG")[:-4000], config()))


# ---------------------------------------------------------------- one shard


def fill(source):
    source.put("good/a b+%#ü.jpg", photo("JPEG"))
    source.put("good/rgba.webp", photo("WEBP", np.dstack([NOISE, NOISE[:, :, 0]]), lossless=True))
    source.put("good/grey.tif", photo("TIFF", NOISE[:, :, 0]))
    source.put("good/wrong name.txt", photo())
    source.put("bad/empty.png", b"")
    source.put("bad/cut.jpg", photo("JPEG")[:3000])
    source.put("bad/text.jpg", b"not an image at all")
    source.put("bad/notes.txt", b"some notes" * 10_000)
    source.put("bad/icon.png", photo(pixels=NOISE[:16, :16]))
    source.put("bad/anim.gif", b"GIF89a" + bytes(100))


def test_good_files_become_rows_and_bad_ones_get_a_reason(source, target):
    fill(source)

    receipt = build_shard(source, target, only_plan(source, config()), config())

    keys = {
        row.key
        for group in range(len(receipt.entry.row_groups))
        for row in read_row_group(target, receipt.entry, group)
    }
    assert keys == {"good/a b+%#ü.jpg", "good/rgba.webp", "good/grey.tif", "good/wrong name.txt"}
    assert receipt.num_pixels == 4 * 150 * 210
    assert {(each.key, each.error) for each in receipt.rejected} == {
        ("bad/empty.png", "ImageCorrupt"),
        ("bad/cut.jpg", "ImageCorrupt"),
        ("bad/text.jpg", "ImageCorrupt"),
        ("bad/notes.txt", "ImageCorrupt"),
        ("bad/icon.png", "ImageTooSmall"),
        ("bad/anim.gif", "ImageCorrupt"),
    }


def test_the_receipt_lies_beside_the_shard(source, target):
    fill(source)
    plan = only_plan(source, config())

    receipt = build_shard(source, target, plan, config())

    assert {info.key for info in target.list()} == {plan.key, plan.receipt_key}
    assert Receipt.model_validate_json(target.get(plan.receipt_key)) == receipt


def test_building_twice_gives_the_same_bytes(source, target, tmp_path):
    fill(source)
    plan = only_plan(source, config())
    other = open_store(f"file://{tmp_path}/other")

    build_shard(source, target, plan, config())
    build_shard(source, other, plan, config())

    for key in (plan.key, plan.receipt_key):
        assert target.get(key) == other.get(key)


def test_a_shard_of_nothing_but_bad_files_is_a_receipt_alone(source, target):
    source.put("a.jpg", b"junk")
    plan = only_plan(source, config())

    receipt = build_shard(source, target, plan, config())

    assert receipt.entry is None
    assert [info.key for info in target.list()] == [plan.receipt_key]


def test_a_store_that_fails_is_not_a_bad_image(source, target):
    source.put("a.png", photo())
    plan = only_plan(source, config())
    source.delete("a.png")

    with pytest.raises(KeyNotFound):
        build_shard(source, target, plan, config())
    assert not list(target.list())


# ---------------------------------------------------------------- the set


def test_the_index_adds_up(source, target):
    fill(source)
    options = config(shard_bytes=2**20, heldout_fraction=0.4)
    receipts = [
        build_shard(source, target, plan, options) for plan in plan_shards(list_photos(source), options)
    ]

    index = make_index(receipts, options)

    assert (index.num_images, index.num_rejected) == (4, 6)
    assert index.num_rows == sum(entry.num_rows for entry in index.shards) == 4 * 6
    assert index.num_heldout_rows % 6 == 0
    assert index.num_pixels == 4 * 150 * 210
    assert index.options["sub_image_size"] == 64
    rejected = [json.loads(line) for line in rejected_lines(receipts).splitlines()]
    assert [each["key"] for each in rejected] == sorted(each["key"] for each in rejected)
    assert len(rejected) == 6
