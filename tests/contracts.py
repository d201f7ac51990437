"""What every kind of a thing must do, written once and run for each kind."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdsr.errors import KeyExists, KeyNotFound, RequestError
from kdsr.store import ObjectInfo, Store

KEYS = [
    "plain.png",
    "with space.png",
    "with+plus.png",
    "with%20escape.png",
    "with%percent",
    "with#hash?query=1&more=2;x",
    "deep/er/and deeper/x.png",
    ".hidden/.file",
    "quotes'\"<>`$",
    "star*[a]{b}",
    "tab\tand\nnewline",
    "ünïcödé/日本 語.png",
    "composed \u00e9",
    "decomposed e\u0301",
    "emoji 😀.png",
    "a:b=c,d@e!f(g)~",
    "...",
    "..dots",
    "end.",
    " lead and trail ",
    "n" * 240,
]

UNUSABLE_KEYS = [
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "../x",
    "a/../x",
    "a/..",
    "a//b",
    "a/",
    "./a",
    "a/./b",
    "..\\x",
    "a\\..\\..\\x",
    "nul\0",
    "half \ud800",
    ".kdsr-" + 32 * "0" + ".tmp",
]

shared_store = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)


def keys(store: Store, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def put_many(store: Store, names: list[str]) -> None:
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))


class StoreContract:
    """Subclass it and parametrise the fixture `store` with one kind."""

    def test_an_empty_root_lists_nothing(self, store: Store):
        assert keys(store) == []

    @pytest.mark.parametrize("key", KEYS)
    def test_any_name_is_listed_read_and_deleted_as_it_was_written(self, store: Store, key: str):
        written = store.put(key, b"content")
        assert list(store.list()) == [written] == [store.stat(key)]
        assert written.key == key
        assert written.size == len(b"content")
        assert store.get(key) == b"content"
        store.delete(key)
        assert keys(store) == []

    def test_names_that_look_alike_stay_apart(self, store: Store):
        for key in KEYS:
            store.put(key, key.encode())
        assert {key: store.get(key) for key in keys(store)} == {key: key.encode() for key in KEYS}

    @shared_store
    @given(data=st.binary(max_size=10_000))
    def test_bytes_come_back_unchanged(self, store: Store, data: bytes):
        info = store.put("data", data)
        assert store.get("data") == data
        assert info.size == len(data)

    @shared_store
    @given(start=st.integers(0, 30), length=st.none() | st.integers(0, 30))
    def test_a_range_is_the_slice_of_the_whole(self, store: Store, start: int, length: int | None):
        data = bytes(range(20))
        store.put("data", data)
        expected = data[start:] if length is None else data[start : start + length]
        assert store.get("data", start=start, length=length) == expected

    @pytest.mark.parametrize("wanted", [{"start": -1}, {"length": -1}])
    def test_a_negative_range_is_refused(self, store: Store, wanted: dict[str, int]):
        store.put("data", b"x")
        with pytest.raises(RequestError, match="negative"):
            store.get("data", **wanted)

    def test_more_keys_than_a_page_holds_are_listed_once_each_and_in_order(self, store: Store):
        names = [f"folder {i % 3}/{i:05d}.png" for i in range(1_050)]
        put_many(store, names)
        assert keys(store) == sorted(names, key=str.encode)

    def test_a_listing_can_be_left_early_and_does_not_change(self, store: Store):
        put_many(store, ["b", "a/x", "a.txt", "a b", "c/d/e", "a/y"])
        listed = keys(store)
        assert list(islice(store.list(), 2)) == [store.stat(key) for key in listed[:2]]
        assert keys(store) == listed

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("a", ["a+b", "a.txt", "ab/x"]),
            ("a.", ["a.txt"]),
            ("ab", ["ab/x"]),
            ("ab/", ["ab/x"]),
            ("ab/x", ["ab/x"]),
            ("ab/x/", []),
            ("a+", ["a+b"]),
            ("B/c", ["B/c d/e", "B/cc"]),
            ("é", ["é"]),
            ("nothing/here", []),
        ],
    )
    def test_a_prefix_is_the_beginning_of_the_text_of_a_key(
        self, store: Store, prefix: str, expected: list[str]
    ):
        put_many(store, ["a+b", "a.txt", "ab/x", "B/c d/e", "B/cc", "B/d", "é"])
        assert keys(store, prefix) == expected

    @pytest.mark.parametrize("prefix", ["../", "/", "a/../b", "a//b", "\0/"])
    def test_a_prefix_outside_the_root_is_refused(self, store: Store, prefix: str):
        with pytest.raises(RequestError):
            keys(store, prefix)

    def test_a_missing_key_is_told_with_its_place(self, store: Store):
        for read in (store.get, store.stat):
            with pytest.raises(KeyNotFound, match=f"{store.uri}/no/such key"):
                read("no/such key")
        with pytest.raises(KeyNotFound):
            store.get("no/such key", length=0)
        assert not store.exists("no/such key")
        store.delete("no/such key")

    def test_a_folder_is_no_object(self, store: Store):
        store.put("folder/x", b"x")
        assert not store.exists("folder")
        with pytest.raises(KeyNotFound):
            store.get("folder")
        store.delete("folder")
        assert keys(store) == ["folder/x"]

    def test_put_replaces_and_the_etag_tells(self, store: Store):
        before, after = store.put("key", b"old"), store.put("key", b"newer")
        assert store.get("key") == b"newer"
        assert store.stat("key") == after
        assert before.etag != after.etag

    def test_create_never_replaces(self, store: Store):
        assert store.create("a/lock", b"first") == store.stat("a/lock")
        with pytest.raises(KeyExists, match="a/lock exists already"):
            store.create("a/lock", b"second")
        assert store.get("a/lock") == b"first"

    def test_of_several_creators_exactly_one_wins(self, store: Store):
        together = threading.Barrier(8)

        def create(name: int) -> int | None:
            together.wait()
            try:
                store.create("lock", bytes([name]))
            except KeyExists:
                return None
            return name

        with ThreadPoolExecutor(8) as pool:
            winners = [name for name in pool.map(create, range(8)) if name is not None]
        assert [bytes(winners)] == [store.get("lock")]

    def test_a_reader_never_sees_a_mixture_of_two_writes(self, store: Store):
        contents = [letter * 300_000 for letter in (b"a", b"b")]
        store.put("key", contents[0])
        with ThreadPoolExecutor(4) as pool:
            writes = [pool.submit(store.put, "key", contents[i % 2]) for i in range(30)]
            reads = [pool.submit(store.get, "key") for _ in range(30)]
        assert all(write.result() for write in writes)
        assert all(read.result() in contents for read in reads)

    def test_put_file_takes_a_file_and_leaves_it(self, store: Store, tmp_path: Path):
        source = tmp_path / "source"
        source.write_bytes(bytes(3_000_000))
        assert store.put_file("a/copy", source) == store.stat("a/copy")
        assert store.get("a/copy") == source.read_bytes()

    @pytest.mark.parametrize("key", UNUSABLE_KEYS)
    def test_a_key_that_could_leave_the_root_is_refused(self, store: Store, key: str, tmp_path: Path):
        source = tmp_path / "source"
        source.write_bytes(b"x")
        for call in (
            lambda: store.get(key),
            lambda: store.stat(key),
            lambda: store.exists(key),
            lambda: store.put(key, b"x"),
            lambda: store.create(key, b"x"),
            lambda: store.put_file(key, source),
            lambda: store.delete(key),
            lambda: store.child(key) if not key.endswith("a/") else store.put(key, b"x"),
        ):
            with pytest.raises(RequestError, match="is no key"):
                call()
        assert keys(store) == []

    def test_a_child_sees_only_what_is_below_it(self, store: Store):
        put_many(store, ["a/x", "a/b/y", "ab/z", "a+"])
        child = store.child("a")
        assert child.uri == f"{store.uri}/a"
        assert sorted(keys(child)) == ["b/y", "x"]
        assert keys(store.child("a/b/")) == keys(child.child("b")) == ["y"]
        child.put("new key", b"new")
        assert store.get("a/new key") == b"new"

    def test_a_store_goes_to_another_process_and_works_there(self, store: Store):
        store.put("key", b"content")
        again: Store = pickle.loads(pickle.dumps(store))
        assert again == store
        assert again.get("key") == b"content"

    def test_threads_can_share_a_store(self, store: Store):
        def round_trip(i: int) -> bool:
            store.put(f"{i}", bytes([i]))
            return store.get(f"{i}") == bytes([i])

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(round_trip, range(64)))

    @pytest.mark.parametrize("key", ["a b/c+d%20#é.parquet", "plain"])
    def test_arrow_reads_and_writes_the_same_objects(self, store: Store, key: str):
        store.put(key, b"from the store")
        filesystem, root = store.arrow()
        with filesystem.open_input_file(f"{root}/{key}") as file:
            assert file.read() == b"from the store"
        with filesystem.open_output_stream(f"{root}/{key}") as file:
            file.write(b"from arrow")
        assert store.get(key) == b"from arrow"

    def test_what_is_listed_can_be_compared_and_shown(self, store: Store):
        info = store.put("key", b"x")
        assert info == ObjectInfo("key", 1, info.etag)
        assert '"' not in info.etag
