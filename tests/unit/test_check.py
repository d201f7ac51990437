"""What is said of a set of shards is what was put into it."""

import hashlib
import json

import numpy as np
import pytest

from kdsr import codecs
from kdsr.check import FINDINGS, BrokenShard, check_set, inspect_shard, join, read_rows
from kdsr.check_report import FINDINGS_KEY, REPORT_KEY, SHEET_KEY, choose, text, write
from kdsr.errors import ShardCorrupt
from kdsr.shards import Row, write_shard
from kdsr.spec import ShardIndex
from kdsr.store import open_store

SIDE = 160
CONTEXTS = {2: 2, 3: 2, 4: 2}


def scene(seed, side=SIDE):
    """Coarse shapes and fine noise, like nothing with another seed."""
    random = np.random.default_rng(seed)
    shapes = random.integers(30, 220, (8, 8, 3)).repeat(side // 8, axis=0).repeat(side // 8, axis=1)
    return np.clip(shapes + random.normal(0, 12, shapes.shape), 0, 255).astype(np.uint8)


def blurred(pixels):
    soft = pixels.astype(float)
    for _ in range(12):
        for axis in (0, 1):
            soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return soft.astype(np.uint8)


def row(key, pixels, *, heldout=False):
    png = codecs.encode_png(pixels)
    height, width = pixels.shape[:2]
    sha256 = hashlib.sha256(png).hexdigest()
    return Row(key, 0, 0, height, width, png, sha256, "CC0-1.0", "photo", heldout)


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/shards")


def made(store, rows):
    """The index of two shards of `rows`, in row groups of a few."""
    halves = {"shard-a": rows[::2], "shard-b": rows[1::2]}
    entries = [write_shard(store, key, half, 200_000) for key, half in halves.items() if half]
    return ShardIndex(
        shards=entries,
        num_images=len(rows),
        num_rows=len(rows),
        num_heldout_rows=sum(each.heldout for each in rows),
        num_pixels=0,
        num_rejected=0,
        options={},
    )


def checked(store, rows, *, patch_size=16, broken=()):
    index = made(store, rows)
    table = join({entry.key: inspect_shard(store, entry) for entry in index.shards})
    options = {"uri": store.uri, "patch_size": patch_size, "contexts": CONTEXTS, "provenance": {}}
    return check_set(index, table, broken, **options), index


def good(count=8, **options):
    return [row(f"{number}.png", scene(number), **options) for number in range(count)]


def found(result):
    lines = [json.loads(line) for line in result.lines().splitlines()]
    return {(line["key"], line["finding"]): line.get("other") for line in lines}


# ---------------------------------------------------------------- findings


def test_each_finding_is_told_of_the_sub_image_that_has_it(store):
    rows = [
        *good(20),
        row("held.png", scene(100), heldout=True),
        row("flat.png", np.full((SIDE, SIDE, 3), 90, np.uint8)),
        row("flat too.png", np.full((SIDE, SIDE, 3), 90, np.uint8)),
        row("blurred.png", blurred(scene(101))),
        row("small.png", scene(102, side=48)),
        row("copy.png", scene(3)),
        row("mirror.png", scene(100)[:, ::-1]),
    ]
    result, _ = checked(store, rows)
    assert found(result) == {
        ("flat.png", "flat"): None,
        ("flat too.png", "flat"): None,
        ("blurred.png", "blurred"): None,
        ("small.png", "small"): None,
        ("copy.png", "duplicate"): "3.png x 0 y 0",
        ("held.png", "leak"): "mirror.png x 0 y 0",
    }


def test_a_clean_set_has_no_findings_and_can_be_trained_on(store):
    result, _ = checked(store, [*good(), row("held.png", scene(100), heldout=True)])
    assert result.found == []
    assert result.report.usable
    assert result.report.advice == f"usable: train with --data.shards {store.uri.removeprefix('file://')}"


def test_what_is_counted_is_what_was_written(store):
    rows = [*good(), row("held.png", scene(100), heldout=True)]
    report = checked(store, rows)[0].report
    assert (report.num_shards, report.num_images, report.num_rows, report.num_heldout_rows) == (2, 9, 9, 1)
    assert report.num_pixels == 9 * SIDE * SIDE
    assert (report.domains, report.licences) == ({"photo": 9}, {"CC0-1.0": 9})
    assert set(report.findings) == set(report.images_with) == set(FINDINGS)


# ---------------------------------------------------------------- what to do


def test_a_leak_comes_before_everything_that_is_merely_unwise(store):
    rows = [
        *good(4),
        row("held.png", scene(0), heldout=True),
        *(row(f"{n}b", blurred(scene(n))) for n in (8, 9)),
    ]
    report = checked(store, rows)[0].report
    assert report.usable
    assert report.advice.startswith("usable, but 1 of 1 held-out sub-images are trained on too")


def test_nothing_held_out_is_told(store):
    assert "nothing is held out" in checked(store, good())[0].report.advice


def test_everything_held_out_is_not_usable(store):
    report = checked(store, good(heldout=True))[0].report
    assert not report.usable
    assert "every sub-image is held out" in report.advice


def test_a_patch_size_that_fits_nowhere_is_not_usable_and_told_with_those_that_fit(store):
    report = checked(store, good(), patch_size=200)[0].report
    assert not report.usable
    assert "patch_size 200, the largest that fit are 76 at x2, 49 at x3, 36 at x4" in report.advice


def test_the_largest_patch_that_is_named_fits(store):
    for fit in checked(store, good())[0].report.patches:
        for patch_size, lost in [(fit.largest, 0.0), (fit.largest + 1, 1.0)]:
            report = checked(store, good(), patch_size=patch_size)[0].report
            [same] = [each for each in report.patches if each.scale == fit.scale]
            assert same.lost_share == lost


def test_a_broken_shard_is_not_usable_and_named(store):
    broken = [BrokenShard(key="shard-c", sha256="ab" * 32, reason="torn")]
    result, _ = checked(store, good(), broken=broken)
    assert not result.report.usable
    assert result.report.advice.startswith("not usable: a shard is broken: delete shard-c")
    assert "ab" * 32 in text(result.report, "out")


def test_a_set_of_which_every_shard_is_broken_has_a_report_all_the_same(store):
    index = made(store, good())
    broken = [BrokenShard(key=entry.key, sha256=entry.sha256, reason="torn") for entry in index.shards]
    options = {"uri": store.uri, "patch_size": 16, "contexts": CONTEXTS, "provenance": {}}
    result = check_set(index, join({}), broken, **options)
    write(result, index, store, store.child("check"))
    assert not result.report.usable


def test_a_shard_that_is_not_what_the_index_lists_is_refused(store):
    [entry, _] = made(store, good()).shards
    store.put(entry.key, store.get(entry.key)[:-1])
    with pytest.raises(ShardCorrupt, match="sha256"):
        inspect_shard(store, entry)


# ---------------------------------------------------------------- pictures and text


def test_the_pictures_on_the_sheet_are_those_of_their_rows(store):
    result, index = checked(store, good())
    names = result.table["key"].to_pylist()
    assert {
        names[number]: each.key for number, each in read_rows(store, index, result.table, range(8)).items()
    } == {name: name for name in names}


def test_the_sheet_has_a_sample_and_the_worst_of_each_finding(store):
    rows = [*good(), *(row(f"flat {n}", np.full((SIDE, SIDE, 3), n, np.uint8)) for n in range(12))]
    strips = choose(checked(store, rows)[0])
    assert [strip.kind for strip in strips] == ["sample", "flat"]
    assert [len(strip.shown) for strip in strips] == [8, 8]


def test_a_pair_is_shown_side_by_side(store):
    [_, strip] = choose(checked(store, [*good(), row("held.png", scene(3), heldout=True)])[0])
    assert [shown.name for shown in strip.shown] == ["held.png 0,0", "3.png 0,0"]
    assert [shown.note for shown in strip.shown] == ["held out, same pixels", "training, same pixels"]


def test_everything_is_written(store):
    result, index = checked(store, [*good(), row("ü.png", scene(3))])
    target = store.child("check")
    write(result, index, store, target)
    assert {info.key for info in target.list()} == {REPORT_KEY, FINDINGS_KEY, SHEET_KEY}
    assert type(result.report).model_validate_json(target.get(REPORT_KEY)) == result.report
    assert codecs.decode_png(target.get(SHEET_KEY)).shape[1] > 8 * 192


def test_the_last_line_says_what_to_do(store):
    report = checked(store, good())[0].report
    assert text(report, "out/check").splitlines()[-1] == report.advice
