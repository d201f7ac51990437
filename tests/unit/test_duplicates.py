"""Twins are found, mirrored ones too, and what is merely smooth is no twin of anything."""

import numpy as np
import pytest

from kdsr.duplicates import difference_hashes, equal_twins, near_twins

RANDOM = np.random.default_rng(0)
TRAINED = np.zeros(10_000, bool)


def pictures(count):
    return RANDOM.integers(0, 256, (count, 16, 18), dtype=np.uint8)


def shaken(thumbnails):
    noise = RANDOM.integers(-3, 4, thumbnails.shape)
    return np.clip(thumbnails.astype(int) + noise, 0, 255).astype(np.uint8)


def pairs(thumbnails, *, groups=None, heldout=TRAINED):
    groups = np.arange(len(thumbnails)) if groups is None else np.array(groups)
    twins = near_twins(thumbnails, groups=groups, heldout=heldout[: len(thumbnails)])
    return {(twin.row, twin.other) for twin in twins}


def test_rows_with_equal_content_name_the_first_of_their_kind():
    twins = list(equal_twins(np.array([7, 5, 7, 9, 7, 5], np.uint64), heldout=TRAINED[:6]))
    assert {(twin.row, twin.other) for twin in twins} == {(2, 0), (4, 0), (5, 1)}


def test_of_equal_rows_one_that_is_trained_on_is_the_first():
    heldout = np.array([True, False, True])
    twins = list(equal_twins(np.array([7, 7, 7], np.uint64), heldout=heldout))
    assert {(twin.row, twin.other) for twin in twins} == {(0, 1), (2, 1)}


@pytest.mark.parametrize("count", [0, 1])
def test_few_rows_have_no_twins(count):
    assert list(equal_twins(np.zeros(count, np.uint64), heldout=TRAINED[:count])) == []
    assert pairs(pictures(count)) == set()


def test_strangers_are_no_twins():
    assert pairs(pictures(2000)) == set()


def test_shaken_copies_are_twins_of_what_they_are_copies_of():
    many = pictures(2000)
    found = pairs(np.concatenate([many, shaken(many[:100])]))
    assert found == {(2000 + number, number) for number in range(100)}


def test_a_mirror_image_is_a_twin():
    many = pictures(50)
    assert pairs(np.concatenate([many, many[3:4, :, ::-1]])) == {(50, 3)}


def test_a_picture_that_is_its_own_mirror_image_is_no_twin_of_itself():
    half = pictures(1)[:, :, :9]
    assert pairs(np.concatenate([half, half[:, :, ::-1]], axis=2)) == set()


def test_within_one_group_nothing_is_a_twin():
    one = pictures(1)
    assert pairs(np.concatenate([one, one]), groups=[4, 4]) == set()


def test_slopes_are_not_twins_although_their_hashes_are_the_same():
    slope = np.add.outer(np.arange(16), np.arange(18))
    slopes = np.stack([4 * slope, 5 * slope, 6 * slope]).astype(np.uint8)
    assert len(set(difference_hashes(slopes))) == 1
    assert pairs(slopes) == set()


def test_a_held_out_row_is_named_beside_the_nearest_one_that_is_trained_on():
    one = pictures(1)
    heldout = np.array([True, False, True])
    found = pairs(np.concatenate([one, shaken(one), one]), heldout=heldout)
    assert found == {(0, 1), (2, 1), (2, 0)}


def test_a_hash_says_where_it_becomes_lighter():
    rising = np.broadcast_to(np.arange(18, dtype=np.uint8), (1, 16, 18))
    assert difference_hashes(rising) == 2**64 - 1
    assert difference_hashes(rising[:, :, ::-1]) == 0
