"""One process works on a run at a time, and a dead one stands in nobody's way."""

import os
import subprocess
import sys
import threading
import time
from itertools import count

import pytest

from kdsr import lease
from kdsr.errors import KdsrError, RequestError
from kdsr.lease import Holder, held, held_throughout
from kdsr.store import open_store

FAR = Holder(host="elsewhere", pid=7, process="")


@pytest.fixture
def store(tmp_path):
    return open_store(f"file://{tmp_path}/run")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(lease, "DEAD_SECONDS", 1.0)


def keys(store):
    return [info.key for info in store.list("lease-")]


def leave_behind(store, holder):
    store.put("lease-000000004.json", holder.model_dump_json().encode())


def test_a_second_one_is_refused_by_name_and_comes_in_when_the_first_is_done(store):
    with held(store, what="run a"):
        with (
            pytest.raises(RequestError, match=rf"run a is worked on by process {os.getpid()} on .*; stop"),
            held(store, what="run a"),
        ):
            pass
        assert len(keys(store)) == 1
    assert keys(store) == []
    with held(store, what="run a"):
        pass


def test_a_process_of_this_machine_that_is_dead_is_not_waited_for(store):
    code = (
        "import os, signal, sys; from kdsr.lease import held; from kdsr.store import open_store\n"
        "with held(open_store(sys.argv[1]), what='run a'): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, store.uri], check=False).returncode == -9
    assert keys(store) == ["lease-000000001.json"]
    with held(store, what="run a"):
        assert keys(store) == ["lease-000000002.json"]


def test_what_is_given_back_is_not_renewed_once_more(store, quick, monkeypatch):
    begun, over = threading.Event(), threading.Event()

    def slow_put(self, key, data):
        begun.set()
        over.wait(60)
        return put(self, key, data)

    put = type(store).put
    with held(store, what="run a"):
        monkeypatch.setattr(type(store), "put", slow_put)
        assert begun.wait(60)
        threading.Timer(0.2, over.set).start()
    assert keys(store) == []


def test_one_that_a_listing_missed_is_found_before_the_work_begins(store, monkeypatch):
    with held(store, what="run a"):
        store.create("lease-000000003.json", store.get("lease-000000001.json"))
        store.delete("lease-000000001.json")
        missing, real = [True], type(store).list
        monkeypatch.setattr(
            type(store), "list", lambda self, prefix: () if missing and missing.pop() else real(self, prefix)
        )
        with pytest.raises(RequestError, match="run a is worked on by"), held(store, what="run a"):
            pass
        assert keys(store) == ["lease-000000003.json"]


def test_one_of_another_machine_is_given_up_when_it_shows_no_life(store, quick, caplog):
    leave_behind(store, FAR)
    with held(store, what="run a"):
        assert keys(store) == ["lease-000000005.json"]
    assert "run a was worked on by process 7 on elsewhere" in caplog.text


def test_one_of_another_machine_that_lives_is_left_alone(store, quick, monkeypatch):
    monkeypatch.setattr(lease, "DEAD_SECONDS", 60.0)
    leave_behind(store, FAR)
    over = threading.Event()

    def live() -> None:
        for renewed in count(1):
            if over.wait(0.1):
                return
            leave_behind(store, FAR.model_copy(update={"renewed": renewed}))

    other = threading.Thread(target=live)
    other.start()
    try:
        with pytest.raises(RequestError, match="worked on by process 7 on else"), held(store, what="run a"):
            pass
    finally:
        over.set()
        other.join()
    assert keys(store) == ["lease-000000004.json"]


def test_a_holder_shows_life_and_learns_that_it_lost_its_lease(store, quick):
    lost = threading.Event()
    with held(store, what="run a") as own:
        own.when_lost = lost.set
        before = store.stat(own.key).etag
        while store.stat(own.key).etag == before:
            assert not lost.is_set()
        store.put("lease-000000002.json", FAR.model_dump_json().encode())
        assert lost.wait(60)
    assert keys(store) == ["lease-000000002.json"]


def test_who_waits_for_others_is_interrupted_where_the_lease_is_lost(store, quick):
    def wait():
        store.put("lease-000000009.json", FAR.model_dump_json().encode())
        for _ in range(600):
            time.sleep(0.1)
        pytest.fail("nobody was interrupted")

    words = "another process has taken over the search while this one was away"
    with pytest.raises(KdsrError, match=words), held_throughout(store, what="the search"):
        wait()
    with pytest.raises(KeyboardInterrupt), held_throughout(open_store(f"{store.uri}-b"), what="the search"):
        raise KeyboardInterrupt


def test_of_many_that_want_it_at_once_one_gets_it(store, quick):
    leave_behind(store, FAR)
    got, refused, start = [], [], threading.Barrier(6)
    over = threading.Event()

    def want():
        start.wait()
        try:
            with held(store, what="run a") as own:
                got.append(own.key)
                over.wait(60)
        except RequestError:
            refused.append(1)
        if len(refused) == 5:
            over.set()

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["lease-000000005.json"] and len(refused) == 5
