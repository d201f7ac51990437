import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr.errors import RequestError
from kdsr.tiles import Box, plan

sides = st.integers(1, 90)
plans = st.fixed_dictionaries(
    {
        "height": sides,
        "width": sides,
        "tile_size": st.integers(3, 64),
        "halo": st.integers(0, 40),
        "multiple_of": st.integers(1, 9),
    }
)


@given(plans)
def test_cores_cover_every_pixel_exactly_once(sizes):
    covered = np.zeros((sizes["height"], sizes["width"]), dtype=int)
    for tile in plan(**sizes):
        covered[tile.core.slices] += 1
    assert (covered == 1).all()


@given(plans)
def test_a_core_is_never_empty_and_never_larger_than_the_tile_size(sizes):
    for tile in plan(**sizes):
        assert 1 <= tile.core.height <= sizes["tile_size"]
        assert 1 <= tile.core.width <= sizes["tile_size"]


@given(plans)
def test_a_read_box_holds_the_whole_halo_or_ends_at_the_image(sizes):
    halo = sizes["halo"]
    for tile in plan(**sizes):
        assert 0 <= tile.read.top <= max(tile.core.top - halo, 0)
        assert 0 <= tile.read.left <= max(tile.core.left - halo, 0)
        assert min(tile.core.bottom + halo, sizes["height"]) <= tile.read.bottom <= sizes["height"]
        assert min(tile.core.right + halo, sizes["width"]) <= tile.read.right <= sizes["width"]


@given(plans)
def test_a_read_box_is_aligned_but_where_the_image_ends(sizes):
    multiple = sizes["multiple_of"]
    for tile in plan(**sizes):
        assert tile.read.top % multiple == tile.read.left % multiple == 0
        assert tile.read.bottom % multiple == 0 or tile.read.bottom == sizes["height"]
        assert tile.read.right % multiple == 0 or tile.read.right == sizes["width"]


@given(plans)
def test_without_alignment_nothing_beyond_the_halo_is_read(sizes):
    halo = sizes["halo"]
    for tile in plan(**sizes | {"multiple_of": 1}):
        assert tile.read.top == max(tile.core.top - halo, 0)
        assert tile.read.right == min(tile.core.right + halo, sizes["width"])


def test_an_image_no_larger_than_a_tile_is_one_tile():
    [tile] = plan(100, 128, tile_size=128, halo=8)
    assert tile.read == tile.core == Box(0, 0, 100, 128)


def test_most_tiles_of_an_image_share_few_shapes():
    shapes = [tile.read.shape for tile in plan(1000, 1000, tile_size=128, halo=8)]
    assert len(set(shapes)) <= 9


@pytest.mark.parametrize(
    "wrong",
    [{"height": 0}, {"width": -1}, {"tile_size": 0}, {"halo": -1}, {"multiple_of": 0}],
)
def test_sizes_that_no_image_has_are_refused(wrong):
    with pytest.raises(RequestError, match="cannot cut"):
        plan(**{"height": 4, "width": 4, "tile_size": 2, "halo": 0, "multiple_of": 1} | wrong)


def test_a_box_within_another_counts_from_its_corner():
    assert Box(10, 20, 30, 50).within(Box(8, 16, 40, 60)) == Box(2, 4, 22, 34)
    assert Box(1, 2, 3, 4).scaled(4) == Box(4, 8, 12, 16)
    assert Box(1, 2, 4, 8).shape == (3, 6)
