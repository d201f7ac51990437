"""Which folders are benchmarks, how their images pair up, and what is refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr import codecs
from kdsr.benchmark import benchmark_names, open_benchmark, reduce
from kdsr.config import StoreConfig
from kdsr.errors import DataError, ImageCorrupt, ImageTooSmall, RequestError
from kdsr.image import Image
from kdsr.store import open_store


def photo(height, width, *, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    return open_store(f"file://{tmp_path}/Tiny/x2")


def put(root, key, pixels):
    root.put(key, codecs.encode(Image(pixels), format="png"))


def read(root, scale=2):
    return list(open_benchmark(root.uri, "Tiny", StoreConfig()).pairs(scale))


def test_lr_is_read_where_it_exists_and_tells_the_scale(root):
    put(root, "HR/a.png", photo(60, 66))
    put(root, "LR/a.png", photo(20, 22, seed=1))
    benchmark = open_benchmark(root.uri, "Tiny", StoreConfig())
    assert benchmark.scale == 3
    (pair,) = benchmark.pairs(3)
    np.testing.assert_array_equal(pair.lr.pixels, photo(20, 22, seed=1))
    np.testing.assert_array_equal(pair.hr.pixels, photo(60, 66))


def test_lr_is_made_from_cropped_hr_where_there_is_none(root):
    put(root, "HR/a.png", photo(41, 51))
    assert open_benchmark(root.uri, "Tiny", StoreConfig()).scale is None
    (pair,) = read(root)
    assert pair.hr.pixels.shape == (40, 50, 3)
    np.testing.assert_array_equal(pair.lr.pixels, reduce(Image(photo(41, 51)[:40, :50]), 2).pixels)


def test_hr_that_was_not_cropped_is_cropped_to_its_lr(root):
    put(root, "HR/a.png", photo(41, 51))
    put(root, "LR/a.png", photo(20, 25))
    (pair,) = read(root)
    np.testing.assert_array_equal(pair.hr.pixels, photo(41, 51)[:40, :50])


def test_suffixes_of_a_pair_may_differ_and_order_is_by_name(root):
    for name in ("b", "a"):
        put(root, f"HR/{name}.png", photo(40, 40))
        root.put(f"LR/{name}.JPG", codecs.encode(Image(photo(20, 20)), format="jpeg"))
    assert [pair.name for pair in read(root)] == ["a", "b"]


def test_folders_below_hr_are_part_of_the_name(root):
    for key in ("HR/x/a.png", "HR/y/a.png"):
        put(root, key, photo(40, 40))
    assert [pair.name for pair in read(root)] == ["x/a", "y/a"]


def test_grey_becomes_three_equal_channels(root):
    put(root, "HR/a.png", photo(40, 40, channels=1))
    (pair,) = read(root)
    np.testing.assert_array_equal(pair.hr.pixels, photo(40, 40, channels=1).repeat(3, axis=2))
    assert pair.lr.pixels.shape == (20, 20, 3)


def test_files_that_are_no_images_are_passed_over(root):
    put(root, "HR/a.png", photo(40, 40))
    root.put("HR/README.txt", b"")
    root.put("HR/.hidden.png", b"")
    assert [pair.name for pair in read(root)] == ["a"]


def test_a_missing_or_empty_hr_folder_is_refused(root):
    with pytest.raises(RequestError, match=r"no images in .*Tiny/x2/HR; .* holds HR/"):
        read(root)


def test_a_folder_of_unknown_files_is_refused_rather_than_made_anew(root):
    put(root, "HR/a.png", photo(40, 40))
    root.put("LR/a.raw", b"BM")
    with pytest.raises(DataError, match=r"LR/: expected images \(.*\.png.*found only files like LR/a\.raw"):
        read(root)


def test_a_missing_lr_is_named(root):
    for name in ("a", "b"):
        put(root, f"HR/{name}.png", photo(40, 40))
    put(root, "LR/a.png", photo(20, 20))
    with pytest.raises(DataError, match=r"HR/b\.png: no image LR/b to go with it \(1 of 2 are missing\)"):
        read(root)


def test_an_hr_of_another_size_is_named_with_both_sizes(root):
    for name in ("a", "b"):
        put(root, f"HR/{name}.png", photo(40, 40 if name == "a" else 44))
        put(root, f"LR/{name}.png", photo(20, 20))
    with pytest.raises(DataError, match=r"HR/b\.png: expected 40x40 \(x2\) for its LR of 20x20, found 40x44"):
        read(root)


def test_a_ratio_that_is_no_scale_lists_those_that_are(root):
    put(root, "HR/a.png", photo(40, 40))
    put(root, "LR/a.png", photo(40, 40))
    with pytest.raises(DataError, match=r"80x80 \(x2\) or 120x120 \(x3\) or 160x160 \(x4\).*found 40x40"):
        read(root)


def test_two_images_of_one_name_are_refused(root):
    put(root, "HR/a.png", photo(40, 40))
    put(root, "HR/a.webp", photo(40, 40))
    with pytest.raises(DataError, match=r"HR/a\.png and HR/a\.webp have one name"):
        read(root)


def test_a_broken_image_is_named(root):
    put(root, "HR/a.png", photo(40, 40))
    root.put("HR/b.png", root.get("HR/a.png")[:500])
    with pytest.raises(ImageCorrupt, match=r"HR/b\.png: "):
        read(root)


def test_an_image_too_small_to_measure_is_named(root):
    put(root, "HR/a.png", photo(14, 40))
    with pytest.raises(ImageTooSmall, match=r"HR/a\.png: expected at least 15 pixels .* found 14x40"):
        read(root)


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["file:///data/Set5"], ["Set5"]),
        (["file:///data/Set5/x4"], ["Set5"]),
        (["s3://bucket/sets/Set5/X4/"], ["Set5"]),
        (["file:///data/Set5/x2", "file:///data/Set5/x4"], ["Set5", "Set5"]),
        (["file:///mine/Set5/x4", "file:///yours/Set5/x4"], ["mine/Set5", "yours/Set5"]),
        (["s3://mine"], ["mine"]),
        (["file:///x4"], ["x4"]),
    ],
)
def test_a_benchmark_is_named_after_its_last_part_that_is_no_scale(uris, names):
    assert benchmark_names(uris) == names


def test_one_place_given_twice_is_refused():
    with pytest.raises(RequestError, match="s3://b/Set5/ is given twice"):
        benchmark_names(["s3://b/Set5/", "s3://b/Set5"])


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([2, 3, 4]), st.integers(3, 9), st.integers(3, 9), st.integers(0, 255))
def test_an_even_picture_stays_even_when_it_is_reduced(scale, height, width, level):
    hr = Image(np.full((height * scale, width * scale, 3), level, np.uint8))
    np.testing.assert_array_equal(reduce(hr, scale).pixels, np.full((height, width, 3), level, np.uint8))
