"""The order of patches, that a cursor continues it, and that LR, HR and teacher belong together."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr import codecs, pairs, shards
from kdsr.config import BicubicDegradation, DataConfig, RealWorldDegradation
from kdsr.degrade import bicubic_lr, build_degradation
from kdsr.errors import DataError, ShardCorrupt
from kdsr.pairs import Cursor, PairMaker, PatchReader, grey, made_ahead
from kdsr.store import open_store
from tests.small_shards import row, write_set

CPU = torch.device("cpu")
SCALE = 2
# With patches of 8 LR pixels and no context, 16 x 16 HR pixels are needed.
SIZES = {
    0: (20, 24),
    1: (16, 16),
    2: (30, 17),
    3: (15, 60),
    4: (40, 40),
    5: (22, 22),
    6: (17, 17),
    7: (64, 15),
}
TOO_SMALL, HELDOUT = {3, 7}, {4}
TRAINED = SIZES.keys() - TOO_SMALL - HELDOUT


def coded(number, height, width):
    """Every pixel says which row it belongs to and where it is."""
    y, x = np.mgrid[:height, :width]
    return np.stack([np.full_like(y, number), y, x], axis=-1).astype(np.uint8)


def coded_row(number, **fields):
    return row(f"photo-{number}.png", coded(number, *SIZES[number]), **fields)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store and its index: three shards of eight rows."""
    store = open_store(f"file://{tmp_path_factory.mktemp('pairs')}/shards")
    rows = [coded_row(number, heldout=number in HELDOUT) for number in SIZES]
    return store, write_set(store, [rows[:3], rows[3:4], rows[4:]])


def reader_of(place, *, batch_size=1, rank=0, world_size=1, context=0, scale=SCALE, seed=0, **data):
    store, index = place
    fields = {"patch_size": 8, "patches_per_row": 3, "window_rows": 3, **data}
    return PatchReader(
        store=store,
        index=index,
        data=DataConfig(shards=store.uri, **fields),
        scale=scale,
        context=context,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


def take(reader, count, start=Cursor()):
    stream = reader.batches(start)
    found = list(islice(stream, count))
    stream.close()
    return found


def rows_seen(batches):
    return [int(patch[0, 0, 0]) for batch in batches for patch in batch.hr]


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("window_rows", [1, 3, 100])
def test_every_row_gives_its_patches_once_an_epoch_and_no_other_row_any(place, window_rows):
    per_epoch = 3 * len(TRAINED)
    batches = take(reader_of(place, window_rows=window_rows), 2 * per_epoch)
    for own in (batches[:per_epoch], batches[per_epoch:]):
        assert Counter(rows_seen(own)) == dict.fromkeys(TRAINED, 3)


def test_the_patches_of_a_row_are_different_ones(place):
    batches = take(reader_of(place), 3 * len(TRAINED))
    assert len(free_patches(batches)) == 6


def free_patches(batches):
    """Distinct patches of the two rows that leave a choice of place."""
    return {batch.hr.tobytes() for batch in batches if rows_seen([batch])[0] in {0, 5}}


def test_epochs_differ_and_the_same_seed_gives_the_same(place):
    count = 3 * len(TRAINED)
    first, again = (take(reader_of(place), 2 * count) for _ in range(2))
    assert [b.hr.tobytes() for b in first] == [b.hr.tobytes() for b in again]
    assert rows_seen(first[:count]) != rows_seen(first[count:])
    assert len(free_patches(first)) > 9
    assert rows_seen(first) != rows_seen(take(reader_of(place, seed=1), 2 * count))


def test_the_patches_of_a_window_are_mixed(place):
    seen = rows_seen(take(reader_of(place, window_rows=100), 3 * len(TRAINED)))
    assert any(a != b for a, b in zip(seen[::3], seen[1::3], strict=False))


@given(
    world_size=st.integers(1, 4),
    batch_size=st.integers(4, 9),
    start=st.integers(0, 8),
    window_rows=st.sampled_from([1, 3, 100]),
)
@settings(max_examples=15)
def test_the_ranks_together_read_what_one_reads_from_any_cursor(
    place, world_size, batch_size, start, window_rows
):
    alone = reader_of(place, batch_size=batch_size, window_rows=window_rows)
    whole = take(alone, start + 3)
    cursor = whole[start - 1].cursor if start else Cursor()
    ranks = [take(replace(alone, rank=rank, world_size=world_size), 3, cursor) for rank in range(world_size)]
    for expected, *parts in zip(whole[start:], *ranks, strict=True):
        assert {part.cursor for part in parts} == {expected.cursor}
        assert sum(part.weight for part in parts) == pytest.approx(world_size)
        for rank, part in enumerate(parts):
            assert np.array_equal(part.hr, expected.hr[rank::world_size])
            assert part.seeds == expected.seeds[rank::world_size]
            assert part.weight == pytest.approx(len(part.hr) * world_size / batch_size)


def test_a_run_that_is_killed_and_goes_on_elsewhere_sees_each_row_once(place):
    """On one worker, then three, then two, each killed in the middle of an epoch."""
    alone = reader_of(place, batch_size=5, patches_per_row=2)
    seen, cursor = [], Cursor()
    for world_size, num_steps in ((1, 1), (3, 2), (2, 1)):
        ranks = [
            take(replace(alone, rank=rank, world_size=world_size), num_steps, cursor)
            for rank in range(world_size)
        ]
        seen += [row for batches in ranks for row in rows_seen(batches)]
        cursor = ranks[0][-1].cursor
    assert cursor == Cursor(4)
    assert Counter(seen) == dict.fromkeys(TRAINED, 4)


def test_every_cursor_of_two_epochs_continues_exactly(place):
    reader = reader_of(place)
    whole = take(reader, 2 * 3 * len(TRAINED) + 1)
    assert [batch.cursor.step for batch in whole] == list(range(1, len(whole) + 1))
    for begin in range(1, len(whole), 5):
        follower = take(reader, 1, whole[begin - 1].cursor)[0]
        assert follower.cursor == whole[begin].cursor and follower.seeds == whole[begin].seeds
        assert np.array_equal(follower.hr, whole[begin].hr)


def test_row_groups_as_a_whole_give_the_patches_that_lanes_give_in_that_epoch(place, monkeypatch):
    monkeypatch.setattr(pairs, "CUT_AT_ONCE", 4)
    reader, per_epoch = reader_of(place), 3 * len(TRAINED)
    whole = take(reader, 2 * per_epoch)
    for epoch in (0, 1):
        steps = whole[epoch * per_epoch : (epoch + 1) * per_epoch]
        by_lane = Counter(patch.tobytes() for batch in steps for patch in batch.hr)
        groups = [list(reader.patches_of_group(epoch, place)) for place in range(reader.num_groups)]
        parts = [part["hr"] for group in groups for part in group]
        assert by_lane == Counter(patch.tobytes() for part in parts for patch in part)
        assert max(map(len, parts)) <= 4
        assert reader.epoch_at((epoch + 1) * per_epoch - 1) == epoch
        assert reader.epoch_at((epoch + 1) * per_epoch) == epoch + 1
    batch = reader.batch_of({"hr": whole[0].hr}, 1)
    assert batch.seeds == whole[0].seeds and batch.cursor == whole[0].cursor


def test_each_patch_of_each_step_has_a_degradation_of_its_own(place):
    seeds = [seed for batch in take(reader_of(place, batch_size=4), 3) for seed in batch.seeds]
    assert len(set(seeds)) == 12


def test_a_patch_is_degraded_alike_in_whatever_part_of_a_batch(place):
    degradation = build_degradation(RealWorldDegradation(), SCALE)
    alone = reader_of(place, batch_size=4)
    whole, part = take(alone, 1)[0], take(replace(alone, rank=1, world_size=3), 1)[0]
    lr, own = (PairMaker(degradation, SCALE, 0, 3, CPU)(batch).lr for batch in (whole, part))
    assert torch.equal(own, lr[1::3]) and not torch.equal(lr[0], lr[1])


def test_pairs_that_are_made_ahead_are_the_same_and_leave_torch_its_threads(place):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        reader, make = reader_of(place, batch_size=2), pair_maker(SCALE, 0)
        ahead = list(islice(made_ahead(make, reader.batches()), 4))
        seen_later = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
        assert torch.get_num_threads() == seen_later == before + 1
    finally:
        torch.set_num_threads(before)
    for (pair, cursor), batch in zip(ahead, reader.batches(), strict=False):
        assert cursor == batch.cursor
        assert torch.equal(pair.lr, make(batch).lr) and torch.equal(pair.hr, make(batch).hr)


def test_an_index_without_sizes_is_read_all_the_same(place):
    store, index = place
    older = index.model_copy(
        update={"shards": [each.model_copy(update={"trained_sides": None}) for each in index.shards]}
    )
    assert shards.trained_sides(store, older) == [each.trained_sides for each in index.shards]
    batches = [take(reader_of((store, each), batch_size=4), 5) for each in (index, older)]
    assert rows_seen(batches[0]) == rows_seen(batches[1])


def test_a_worker_reads_only_the_row_groups_that_its_lanes_are_in(tmp_path, monkeypatch):
    store = open_store(f"file://{tmp_path}")
    index = write_set(store, [[coded_row(number)] for number in [0, 1, 2, 5, 6] * 4])
    read = []
    original = shards.read_row_group

    def reading(store, entry, *args, **kwargs):
        read.append(entry.key)
        return original(store, entry, *args, **kwargs)

    monkeypatch.setattr(shards, "read_row_group", reading)
    reader = reader_of((store, index), batch_size=4, rank=1, world_size=4, window_rows=4)
    take(reader, 6)
    assert 2 <= len(set(read)) <= 6 and len(read) == len(set(read))


def test_decoded_sub_images_are_as_few_as_promised(tmp_path, monkeypatch):
    """However long the lanes are, and with more lanes than row groups."""
    alive, most = [], []

    class Watched(pairs._Decoded):
        def __init__(self, *_fields):
            alive.append(1)
            most.append(len(alive))

        def __del__(self):
            alive.pop()

    monkeypatch.setattr(pairs, "_Decoded", Watched)
    store = open_store(f"file://{tmp_path}")
    index = write_set(store, [[coded_row(1)] * 40] * 2, row_group_bytes=2000)
    reader = reader_of((store, index), batch_size=2, window_rows=4, patches_per_row=4)
    take(reader, 150)
    assert len(most) > 60 and 2 <= max(most) <= 2 * (3 * reader.mix_rows + 1)


# ---------------------------------------------------------------- pixels


def pair_maker(scale, context, channels=3):
    return PairMaker(build_degradation(BicubicDegradation(), scale), scale, context, channels, CPU)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_lr_of_a_patch_is_that_part_of_the_lr_of_the_whole_image(tmp_path, scale):
    whole = coded(0, 101, 94)
    whole[..., 0] = np.random.default_rng(0).integers(0, 256, whole.shape[:2])
    store = open_store(f"file://{tmp_path}")
    place = store, write_set(store, [[row("a", whole)]])
    context = build_degradation(BicubicDegradation(), scale).context
    reader = reader_of(place, scale=scale, context=context, batch_size=6, patches_per_row=6, augment=False)
    pair = pair_maker(scale, context)(take(reader, 1)[0])
    cropped = whole[: 101 // scale * scale, : 94 // scale * scale]
    lr = bicubic_lr(torch.from_numpy(cropped.copy()).permute(2, 0, 1)[None] / 255, scale)[0]
    assert pair.lr.shape == (6, 3, 8, 8) and pair.hr.shape == (6, 3, 8 * scale, 8 * scale)
    places = [(round(hr[1].min().item() * 255), round(hr[2].min().item() * 255)) for hr in pair.hr]
    assert len(set(places)) > 1
    for (top, left), own_lr, own_hr in zip(places, pair.lr, pair.hr, strict=True):
        expected = whole[top : top + 8 * scale, left : left + 8 * scale]
        assert np.array_equal((own_hr.permute(1, 2, 0) * 255).round().numpy(), expected)
        y, x = top // scale, left // scale
        assert (top % scale, left % scale) == (0, 0)
        assert torch.equal(own_lr, lr[:, y : y + 8, x : x + 8])


def labelled(tmp_path, *, height=40, width=46):
    """A set whose teacher answers with the negative, cut to a multiple of the scale."""
    hr = coded(9, height, width)
    negative = 255 - hr[: height // SCALE * SCALE, : width // SCALE * SCALE]
    store = open_store(f"file://{tmp_path}/labelled")
    return store, write_set(store, [[row("a", hr, teacher_sr=negative)]])


@pytest.mark.parametrize("size", [(40, 46), (41, 47)])
def test_flips_and_turns_are_the_same_for_hr_and_teacher(tmp_path, size):
    place = labelled(tmp_path, height=size[0], width=size[1])
    reader = reader_of(place, context=2, batch_size=32, patches_per_row=32)
    batch = take(reader, 1)[0]
    assert np.array_equal(batch.teacher_sr, 255 - batch.hr)
    # Directions in which y and x grow tell the orientation.
    steps = (
        np.diff(batch.hr[:, :2, :2, 1:].astype(int), axis=1)[:, 0, 0],
        np.diff(batch.hr[:, :2, :2, 1:].astype(int), axis=2)[:, 0, 0],
    )
    assert len({tuple(down) + tuple(right) for down, right in zip(*steps, strict=True)}) == 8
    pair = pair_maker(SCALE, 2)(batch)
    assert torch.allclose(pair.teacher_sr, 1 - pair.hr, atol=1e-6)


def test_without_augmentation_nothing_is_turned(tmp_path):
    reader = reader_of(labelled(tmp_path), batch_size=16, patches_per_row=16, augment=False)
    hr = take(reader, 1)[0].hr.astype(int)
    assert (np.diff(hr[..., 1], axis=1) == 1).all() and (np.diff(hr[..., 2], axis=2) == 1).all()


def test_stored_outputs_are_left_where_nobody_wants_them(tmp_path):
    reader = reader_of(labelled(tmp_path), batch_size=4)
    without = replace(reader, columns=("image",))
    (with_teacher,), (alone,) = take(reader, 1), take(without, 1)
    assert alone.teacher_sr is None and with_teacher.teacher_sr is not None
    assert np.array_equal(alone.hr, with_teacher.hr)


def test_shards_labelled_at_one_scale_can_train_another(tmp_path):
    """19 rows fit x3, and the teacher's 18 at x2 would not."""
    hr = coded(1, 27, 40)
    store = open_store(f"file://{tmp_path}")
    place = store, write_set(store, [[row("a", hr, teacher_sr=hr[:24])]])
    reader = replace(reader_of(place, scale=3, patch_size=9, batch_size=4), columns=("image",))
    assert take(reader, 1)[0].hr.shape == (4, 27, 27, 3)


def test_grey_is_the_luma_of_full_range():
    rgb = torch.rand(2, 3, 5, 4)
    expected = 0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2]
    assert grey(rgb).shape == (2, 1, 5, 4)
    assert torch.allclose(grey(rgb)[:, 0], expected)
    assert torch.allclose(grey(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))


def test_a_grey_network_gets_grey_pairs(tmp_path):
    batch = take(reader_of(labelled(tmp_path), context=2, batch_size=2), 1)[0]
    colour, single = pair_maker(SCALE, 2)(batch), pair_maker(SCALE, 2, channels=1)(batch)
    assert single.lr.shape == (2, 1, 8, 8)
    assert torch.allclose(single.hr, grey(colour.hr)) and torch.allclose(
        single.teacher_sr, grey(colour.teacher_sr)
    )
    assert (single.lr - grey(colour.lr)).abs().max() <= 1.5 / 255


# ---------------------------------------------------------------- what goes wrong


def test_an_epoch_without_a_fitting_row_names_the_size_that_is_needed(place):
    with pytest.raises(DataError, match=r"at least 216 pixels .* data.patch_size 50 needs at scale 4"):
        take(reader_of(place, patch_size=50, context=2, scale=4), 1)


def test_a_set_that_is_held_out_altogether_has_nothing_to_give(tmp_path):
    store = open_store(f"file://{tmp_path}")
    place = store, write_set(store, [[coded_row(0, heldout=True)]])
    with pytest.raises(DataError, match="no training sub-image has at least 16 pixels"):
        take(reader_of(place), 1)


def test_a_broken_sub_image_is_named_in_the_callers_thread(tmp_path):
    store = open_store(f"file://{tmp_path}")
    whole = coded_row(0)
    place = store, write_set(store, [[replace(whole, image=whole.image[:60])]])
    with pytest.raises(ShardCorrupt, match=r"x 0, y 0 of photo-0\.png: .*run the job that made it again"):
        take(reader_of(place), 1)


def test_a_missing_shard_is_named_after_the_patches_before_it(tmp_path):
    store = open_store(f"file://{tmp_path}")
    index = write_set(store, [[coded_row(0)], [coded_row(5)]])
    reader = reader_of((store, index), window_rows=1)
    lost = index.shards[1 - next(reader.lanes.mixes(0, 0)).rows[0].group].key
    store.delete(lost)
    stream = reader.batches()
    assert len(list(islice(stream, 3))) == 3
    with pytest.raises(ShardCorrupt, match=lost):
        next(stream)


def reading_threads():
    return {thread for thread in threading.enumerate() if thread.name == "read-ahead"}


@pytest.mark.parametrize("window_rows", [1, 100])
def test_reading_ends_with_the_reader(place, window_rows):
    others = reading_threads()
    stream = reader_of(place, window_rows=window_rows).batches()
    next(stream)
    (own,) = reading_threads() - others
    stream.close()
    own.join(timeout=60)
    assert not own.is_alive()


@pytest.mark.parametrize("taken", [1, 3])
def test_nobody_reads_on_when_pairs_are_no_longer_wanted(place, taken):
    others = reading_threads()
    stream = made_ahead(pair_maker(SCALE, 0), reader_of(place).batches())
    for _ in range(taken):
        next(stream)
    own = reading_threads() - others
    assert len(own) == 2
    stream.close()
    for thread in own:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in own)


def test_a_row_is_what_was_put_in(place):
    """The fixtures themselves: a coded image survives its PNG."""
    assert np.array_equal(codecs.decode_png(coded_row(2).image), coded(2, *SIZES[2]))
