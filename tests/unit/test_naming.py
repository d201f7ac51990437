import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.naming import Naming, Selection, Targets, is_junk


def targets(keys, **naming):
    table = Targets(Naming(**naming), lambda: keys)
    return [table[key] for key in keys]


@pytest.mark.parametrize(
    "key",
    [
        ".hidden.jpg",
        "a/.DS_Store",
        ".thumbnails/a.jpg",
        "a/Thumbs.db",
        "a/THUMBS.DB",
        "desktop.ini",
        "__MACOSX/a.jpg",
        "a/__MACOSX/._b.jpg",
        "@eaDir/a.jpg",
        "_kdsr/runs/x/manifest.parquet",
        "earlier/_kdsr/runs/x/report.json",
    ],
)
def test_what_systems_leave_beside_pictures_is_no_input(key):
    assert is_junk(key)


@pytest.mark.parametrize(
    "key", ["a.jpg", "a/b.c/d.png", "thumbs.jpg", "kdsr/a.jpg", "_x.jpg", "notes.txt", "a"]
)
def test_everything_else_is_an_input(key):
    assert not is_junk(key)


def test_without_a_format_names_stay():
    keys = ["a.jpg", "b/c.PNG", "notes.txt", "a", "x.tar.gif"]
    assert targets(keys) == keys


def test_a_format_changes_the_extension_of_names_that_have_another():
    assert targets(["a.jpg", "b/c.PNG", "d.e.tif", "f"], format="png") == [
        "a.png",
        "b/c.PNG",
        "d.e.png",
        "f.png",
    ]


def test_of_inputs_that_want_one_name_the_native_one_gets_it():
    keys = ["a.jpg", "a.png", "a.webp", "b/a.jpg"]
    assert targets(keys, format="png") == ["a.jpg.png", "a.png", "a.webp.png", "b/a.png"]


def test_even_the_longer_name_may_be_wanted():
    found = targets(["a.jpg", "a.png", "a.jpg.png"], format="png")
    assert found[1:] == ["a.png", "a.jpg.png"]
    assert found[0].startswith("a.jpg-") and found[0].endswith(".png")


def test_heic_becomes_jpeg_since_it_is_only_read():
    assert targets(["a.heic", "b.heic", "b.jpg"]) == ["a.jpg", "b.heic.jpg", "b.jpg"]


def test_a_suffix_comes_before_the_extension():
    assert targets(["a.jpg", "b/c.png"], format="jpeg", suffix="_x4") == ["a_x4.jpg", "b/c_x4.jpg"]


def test_no_second_listing_is_read_while_no_name_changes():
    def never():
        raise AssertionError

    assert Targets(Naming(), never)["a.jpg"] == "a.jpg"


NAMES = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(["", "x/"]),
        st.sampled_from(["a", "b", "a.jpg", "a_s"]),
        st.lists(st.sampled_from([".jpg", ".png", ".heic", ".tif", ".tiff", ".JPG", ".txt"]), max_size=3).map(
            "".join
        ),
    ),
)


@settings(max_examples=300)
@given(
    st.lists(NAMES, unique=True, max_size=30),
    st.sampled_from([None, "png", "jpeg", "tiff"]),
    st.sampled_from(["", "_s", ".jpg"]),
)
def test_no_two_inputs_share_a_target_and_the_order_does_not_matter(names, format_, suffix):
    found = dict(zip(names, targets(names, format=format_, suffix=suffix), strict=True))
    assert len(set(found.values())) == len(names)
    backwards = names[::-1]
    assert found == dict(zip(backwards, targets(backwards, format=format_, suffix=suffix), strict=True))


@pytest.mark.parametrize(
    ("key", "wanted"),
    [("a.jpg", True), ("b/a.jpg", True), ("b/a.png", False), ("no/a.jpg", False), (".a.jpg", False)],
)
def test_patterns_choose_keys(key, wanted):
    assert (key in Selection(include=("*.jpg",), exclude=("no/*",))) == wanted
