"""Stores on a real S3 server that can hardly be reached."""

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.local_s3.serve import LocalS3
from infra.local_s3.unreliable import UnreliableS3
from kdsr import store as store_module
from kdsr.config import StoreConfig
from kdsr.errors import StoreError, StoreUnreachable
from kdsr.store import Store, open_store

BUCKET = "kdsr-tests"


def behind(proxy: UnreliableS3, *, max_attempts: int = 5, folder: str = "", seconds: float = 20) -> Store:
    config = StoreConfig(
        endpoint_url=proxy.endpoint_url,
        max_attempts=max_attempts,
        connect_timeout_seconds=seconds,
        read_timeout_seconds=seconds,
    )
    return open_store(f"s3://{BUCKET}/{folder or uuid.uuid4().hex}", config)


@pytest.fixture
def quiet(s3_server: LocalS3) -> Iterator[UnreliableS3]:
    with UnreliableS3(s3_server.endpoint_url, share=0, seed=0) as proxy:
        yield proxy


@pytest.mark.parametrize("fault", ["500", "reset", "stall", "half"])
def test_every_call_gets_through_where_many_requests_fail(s3_server: LocalS3, tmp_path: Path, fault: str):
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 400)
    with UnreliableS3(s3_server.endpoint_url, share=0.3, seed=0, faults=[fault], stall_seconds=1) as proxy:
        store = behind(proxy, seconds=0.5)
        written = [store.put(f"p{n}", bytes([n]) * 50_000) for n in range(6)]
        written += [store.create("created", b"once"), store.put_file("file", source)]
        assert sorted(store.list(), key=lambda info: info.key) == sorted(written, key=lambda info: info.key)
        assert [store.get(f"p{n}") for n in range(6)] == [bytes([n]) * 50_000 for n in range(6)]
        assert store.get("file", start=1000, length=256) == source.read_bytes()[1000:1256]
        for info in written:
            store.delete(info.key)
        assert list(store.list()) == []
        assert proxy.counts[fault] > 0


def test_half_of_an_upload_never_becomes_an_object(s3_server: LocalS3, quiet: UnreliableS3):
    folder = uuid.uuid4().hex
    sound = behind(quiet, folder=folder)
    with UnreliableS3(s3_server.endpoint_url, share=1, seed=0, faults=["half"]) as proxy:
        with pytest.raises(StoreError):
            behind(proxy, max_attempts=2, folder=folder).put("key", bytes(300_000))
        assert proxy.counts["half"] > 0
    assert list(sound.list()) == []


def test_a_store_that_answered_before_is_waited_for_while_it_is_away(quiet: UnreliableS3):
    store = behind(quiet, max_attempts=1)
    store.put("before", b"x")
    quiet.go_away()
    threading.Timer(2, quiet.come_back).start()
    assert store.put("during", b"y").size == 1
    assert [info.key for info in store.list()] == ["before", "during"]


def test_a_store_that_stays_away_is_told(quiet: UnreliableS3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "_AWAY_SECONDS", 1.0)
    store = behind(quiet, max_attempts=1)
    store.put("key", b"x")
    quiet.go_away()
    with pytest.raises(StoreUnreachable, match="no answer from"):
        store.get("key")


def test_one_object_that_cannot_be_read_is_not_waited_for_while_others_can(quiet: UnreliableS3):
    store, stop = behind(quiet, max_attempts=1), threading.Event()
    store.put("sound", b"x")
    quiet.damaged = "damaged"

    def read_on() -> None:
        while not stop.wait(0.02):
            store.get("sound")

    reader = threading.Thread(target=read_on)
    reader.start()
    try:
        with pytest.raises(StoreError, match="InternalError"):
            store.get("damaged")
    finally:
        stop.set()
        reader.join()
    assert quiet.counts["500"] < 5
