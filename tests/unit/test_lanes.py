"""Every row once an epoch, in whatever number of lanes and workers, and from whatever step."""

from collections import Counter
from itertools import chain, islice, pairwise, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.lanes import Lanes, own_lanes

SETS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any).map(tuple)


def lanes_of(group_rows=(5, 0, 7, 1), *, batch_size=3, patches_per_row=2, mix_rows=3, seed=0):
    return Lanes(group_rows, batch_size, patches_per_row, mix_rows, seed)


def patches(lanes, lane, step=0):
    """(epoch, row, variant) of every step from `step` on."""
    for mix in lanes.mixes(lane, step):
        yield from ((mix.epoch, mix.rows[place], variant) for place, variant in mix.patches)


def of_epoch(lanes, lane, epoch):
    """What a lane gives in one epoch, found by its first step."""
    before = (epoch * lanes.num_rows + lane) // lanes.batch_size * lanes.patches_per_row
    return list(takewhile(lambda patch: patch[0] == epoch, patches(lanes, lane, before)))


def all_patches(lanes):
    rows = ((group, row) for group, rows in enumerate(lanes.group_rows) for row in range(rows))
    return {(*row, variant) for row in rows for variant in range(lanes.patches_per_row)}


@given(
    SETS, st.integers(1, 20), st.integers(1, 3), st.integers(1, 5), st.integers(0, 40), st.integers(0, 10**6)
)
@settings(max_examples=60)
def test_every_patch_of_every_row_is_given_once_an_epoch(rows, batch, per_row, mix, epoch, seed):
    lanes = lanes_of(rows, batch_size=batch, patches_per_row=per_row, mix_rows=mix, seed=seed)
    given_ = [(*row, v) for lane in range(batch) for _, row, v in of_epoch(lanes, lane, epoch)]
    assert len(given_) == len(set(given_)) and set(given_) == all_patches(lanes)


@given(SETS, st.integers(1, 9), st.integers(1, 3), st.integers(1, 5), st.integers(0, 200))
@settings(max_examples=60)
def test_a_lane_that_begins_at_any_step_goes_on_as_from_the_first(rows, batch, per_row, mix, step):
    lanes = lanes_of(rows, batch_size=batch, patches_per_row=per_row, mix_rows=mix)
    for lane in range(batch):
        whole = list(islice(patches(lanes, lane), step + 30))
        assert list(islice(patches(lanes, lane, step), 30)) == whole[step:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64, 999, 1000])
def test_workers_share_the_lanes_evenly_and_none_twice(world_size):
    own = [own_lanes(1000, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(chain(*own)) == list(range(1000))
    assert max(map(len, own)) - min(map(len, own)) <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 17, 250, 1000])
def test_a_thousand_workers_see_each_row_once_an_epoch(batch_size):
    """With more lanes than rows too, and far into a run."""
    lanes = lanes_of((40, 3, 1, 0, 77, 12), batch_size=batch_size, patches_per_row=1, mix_rows=4)
    for epoch in (0, 1, 1000):
        ranks = (own_lanes(batch_size, rank=rank, world_size=batch_size) for rank in range(batch_size))
        seen = Counter(row for own in ranks for lane in own for _, row, _ in of_epoch(lanes, lane, epoch))
        assert len(seen) == lanes.num_rows and set(seen.values()) == {1}


@given(SETS, st.integers(1, 30), st.integers(0, 5000))
@settings(max_examples=60)
def test_lanes_stay_within_one_row_of_each_other_for_ever(rows, batch, step):
    lanes = lanes_of(rows, batch_size=batch)
    places = [lanes.position(lane, step) for lane in range(batch)]
    assert max(epoch for epoch, _ in places) - min(epoch for epoch, _ in places) <= -(-batch // sum(rows))
    for epoch in {epoch for epoch, _ in places}:
        lengths = [end - begin for begin, end in (lanes.span(lane, epoch) for lane in range(batch))]
        assert max(lengths) - min(lengths) <= 1


@given(SETS, st.lists(st.tuples(st.integers(1, 5), st.integers(1, 25)), min_size=1, max_size=4))
@settings(max_examples=30)
def test_runs_that_go_on_with_other_numbers_of_workers_see_exactly_what_was_left(rows, starts):
    lanes, batch = lanes_of(rows, batch_size=5), 5
    seen, step = [], 0
    for world_size, num_steps in starts:
        for rank in range(world_size):
            own = own_lanes(batch, rank=rank, world_size=world_size)
            seen += [p for lane in own for p in islice(patches(lanes, lane, step), num_steps)]
        step += num_steps
    alone = [p for lane in range(batch) for p in islice(patches(lanes, lane), step)]
    assert Counter(seen) == Counter(alone)


def test_epochs_are_in_another_order_and_so_are_the_rows_of_a_group():
    lanes = lanes_of((20, 20, 20), batch_size=1, patches_per_row=1, mix_rows=1)
    first, second = ([row for _, row, _ in of_epoch(lanes, 0, epoch)] for epoch in (0, 1))
    assert first != second and first != sorted(first)
    groups = [row.group for row in first]
    assert len(set(groups)) == 1 + sum(one != other for one, other in pairwise(groups))
    assert first != [row for _, row, _ in of_epoch(lanes_of((20, 20, 20), batch_size=1, seed=1), 0, 0)]


def test_patches_are_mixed_over_so_many_rows_and_no_more():
    lanes = lanes_of((64,), batch_size=1, patches_per_row=4, mix_rows=8)
    seen = [row for _, row, _ in of_epoch(lanes, 0, 0)]
    mixes = [seen[begin : begin + 32] for begin in range(0, 256, 32)]
    assert all(len(set(mix)) == 8 for mix in mixes)
    assert all(any(a != b for a, b in zip(mix[::4], mix[1::4], strict=True)) for mix in mixes)


def test_a_row_group_is_in_few_lanes():
    lanes = lanes_of((50,) * 40, batch_size=16, patches_per_row=1, mix_rows=4)
    groups = [{row.group for _, row, _ in of_epoch(lanes, lane, 3)} for lane in range(16)]
    assert sum(map(len, groups)) <= 40 + 15


def test_the_first_step_of_a_late_epoch_is_found_without_counting_there():
    lanes = lanes_of((50,) * 20_000, batch_size=256, patches_per_row=8, mix_rows=16)
    epoch, done = lanes.position(255, 10**12 + 5)
    begin, end = lanes.span(255, epoch)
    assert 0 <= done < (end - begin) * 8 and epoch == pytest.approx(10**12 / (10**6 / 256 * 8), rel=1e-6)
    assert next(lanes.mixes(255, 10**12 + 5)).epoch == epoch
