"""Whoever looks after the jobs: no record stops the others, and its end is noticed. Ray begins nothing."""

import asyncio
import json
import logging
import threading

import pytest

from cluster import bulk, serve_jobs
from cluster.serve import Jobs
from cluster.serve_jobs import JobRunner
from kdsr.checkpoint import load_card
from kdsr.config import ServeConfig
from kdsr.errors import KdsrError
from kdsr.manifest import Report
from kdsr.serving.jobs import JobCounts, JobOutcome, JobRecords, JobRequest, job_id
from kdsr.store import open_store
from tests.small_server import encoded
from tests.waiting import wait_for


@pytest.fixture
def config(tmp_path):
    return ServeConfig.model_validate({"auth": "none", "jobs": {"records": str(tmp_path / "records")}})


@pytest.fixture
def records(config):
    return JobRecords(open_store(config.jobs.records))


class Runner(JobRunner):
    """Notes what it would begin."""

    def _begin(self, id_, request):
        self.begun = [*getattr(self, "begun", []), id_]
        self._running[id_] = None

    def _outcome(self, id_):
        return self._running[id_]

    def end(self, records, id_):
        del self._running[id_]
        records.finish(id_, records.store.get(f"{id_}/owner").decode(), JobOutcome(state="done"))


def asked(records, name, *, owner="anna", created="2026-01-01T00:00:00Z", is_upload=False):
    """The id of a job that waits."""
    id_ = job_id(owner, name)
    request = JobRequest(
        owner=owner, created=created, fingerprint=name, input="file:///in", output="file:///out",
        is_upload=is_upload, model="tiny", network="file:///network", network_sha256="0" * 64,
    )  # fmt: skip
    records.create(id_, request)
    records.store.put(f"{id_}/owner", owner.encode())
    return id_


def spoil(records, id_, fault):
    key = f"{id_}/request.json"
    content = json.loads(records.store.get(key))
    broken = {"newer": json.dumps(content | {"rotate": 90}).encode(), "damaged": b"{", "no text": b"\xff"}
    records.store.put(key, broken[fault])


@pytest.mark.parametrize("fault", ["newer", "damaged", "no text"])
def test_a_record_that_cannot_be_read_stops_no_other_job_and_is_told_of_once(config, records, caplog, fault):
    bad = asked(records, "bad")
    spoil(records, bad, fault)
    good = asked(records, "good")
    runner = Runner(config)
    for _ in range(3):
        runner.look()
    assert runner.begun == [good]
    assert [bad in record.message for record in caplog.records] == [True]
    assert {id_ for _, id_ in records.unfinished()} == {bad, good}


@pytest.mark.parametrize(
    "key", ["open/.DS_Store", "open/anna/.DS_Store", "open/a/b/c", "ended/x", "ended/x/y/z"]
)
def test_a_file_that_somebody_left_among_the_marks_is_left_alone(config, records, key):
    records.store.put(key, b"mine")
    asked(records, "good")
    runner = Runner(config)
    runner.look()
    assert len(runner.begun) == records.num_open("anna") == 1
    assert records.store.get(key) == b"mine"


def test_what_is_under_a_day_that_is_none_is_not_forgotten(records):
    id_ = asked(records, "job")
    records.store.put(f"ended/someday/{id_}", b"")
    records.store.put(f"{id_}/outcome.json", JobOutcome(state="done").model_dump_json().encode())
    assert records.forget(days=7) == 0


def test_old_jobs_of_another_version_are_forgotten_too(records):
    id_ = asked(records, "job")
    records.store.put(f"{id_}/outcome.json", b'{"state": "paused"}')
    records.store.put(f"ended/2020-02-29/{id_}", b"")
    assert records.forget(days=7) == 1
    assert not records.store.exists(f"{id_}/outcome.json")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_goes_wrong_in_a_round_there_is_another_one(config, monkeypatch, caplog):
    rounds = []

    def look(_):
        rounds.append(1)
        if len(rounds) == 3:
            raise SystemExit
        raise ZeroDivisionError

    monkeypatch.setattr(JobRunner, "look", look)
    monkeypatch.setattr(serve_jobs, "POLL_SECONDS", 0.001)
    with caplog.at_level(logging.ERROR, logger="kdsr.serving"):
        runner = JobRunner(config)
        runner.start()
        runner._thread.join(60)
    assert len(rounds) == 3
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_serve_is_told_when_nobody_looks_after_the_jobs_any_more(config, monkeypatch):
    go = threading.Event()

    def look(_):
        go.wait(60)
        raise SystemExit

    monkeypatch.setattr(JobRunner, "look", look)
    monkeypatch.setattr("cluster.serve._log_to_stderr", lambda: None)
    jobs = Jobs(config.model_dump(mode="json"))
    asyncio.run(jobs.check_health())
    go.set()
    jobs._runner._thread.join(60)
    with pytest.raises(KdsrError, match="nothing looks after the jobs"):
        asyncio.run(jobs.check_health())


def test_owners_take_turns_and_each_has_the_oldest_job_first(config, records):
    def at(day):
        return f"2026-01-{day:02}T00:00:00Z"

    many = [asked(records, str(day), created=at(day)) for day in (3, 1, 2)]
    late, later = (asked(records, str(day), owner="bert", created=at(day)) for day in (8, 9))
    runner = Runner(config)
    for _ in range(5):
        runner.look()
        runner.look()
        runner.end(records, runner.begun[-1])
    assert runner.begun == [many[1], late, many[2], later, many[0]]


def test_what_was_begun_before_a_restart_goes_on_first(config, records):
    asked(records, "old", created="2026-01-01T00:00:00Z")
    begun = asked(records, "young", created="2026-01-02T00:00:00Z")
    records.progress(begun, JobCounts(listed=9, done=4))
    runner = Runner(config)
    runner.look()
    assert runner.begun == [begun]


ONE_IMAGE = {
    "in": ("in", ("*.png",)),
    "in/a[1].png": ("in", ("a[[]1].png",)),
    "in/none.png": ("in/none.png", ("*.png",)),
}


@pytest.mark.parametrize(("place", "expected"), ONE_IMAGE.items())
def test_an_input_that_is_one_image_is_done_as_a_bulk_run_does_it(
    config, records, tmp_path, tiny_models, monkeypatch, place, expected
):
    open_store(str(tmp_path / "in")).put("a[1].png", encoded())
    seen = []
    texts = dict.fromkeys(("run", "input", "output", "model", "model_sha256"), "")
    report = Report(
        **texts, listed=1, done=1, skipped=0, failed=0, failed_keys={}, output_megapixels=0.0, seconds=0.0
    )
    monkeypatch.setattr(bulk, "upscale", lambda wanted, watch: seen.append(wanted) or report)
    request = JobRequest(
        owner="anna", created="", fingerprint="", input=f"file://{tmp_path}/{place}", output="file:///out",
        is_upload=False, include=("*.png",), model="tiny", network=tiny_models[2],
        network_sha256=load_card(tiny_models[2]).sha256,
    )  # fmt: skip
    outcome = serve_jobs.run_job("0" * 32, request, config.model_dump(mode="json", include={"jobs", "store"}))
    assert outcome["state"] == "done"
    [wanted] = seen
    assert (wanted.input, wanted.include) == (f"file://{tmp_path}/{expected[0]}", expected[1])


@pytest.mark.parametrize("is_upload", [False, True])
def test_an_owner_hears_of_no_place_but_their_own_and_the_log_has_them_all(
    config, records, caplog, is_upload
):
    id_ = asked(records, "job", is_upload=is_upload)
    runner = Runner(config)
    runner.look()
    message = "file:///in/b.png: denied; file:///network/card.json: see /var/lib/kdsr/x, s3://ours/a b: full"
    failures = {"b.png": f"store (upload): {records.store.uri}/{id_}/output/b.png: no space (28/7)"}
    runner._running[id_] = JobOutcome(state="failed", message=message, failures=failures)
    runner.look()
    told = records.get(id_, owner="anna").outcome
    own = "..." if is_upload else "file:///in/b.png"
    assert told.message == f"{own}: denied; .../card.json: see ..., ... b: full"
    assert list(told.failures.values()) == [f"store (upload): .../{id_}/output/b.png: no space (28/7)"]
    assert message in caplog.text and records.store.uri in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_two_clusters_on_the_same_records_do_not_both_run_jobs(config, records, monkeypatch, caplog):
    monkeypatch.setattr(serve_jobs, "POLL_SECONDS", 0.005)
    monkeypatch.setattr("kdsr.lease.RENEW_SECONDS", 0.005)
    looked, killed = {}, []

    class One(JobRunner):
        def look(self):
            looked[id(self)] = looked.get(id(self), 0) + 1
            self._running["0" * 32] = None

        def _kill(self, id_):
            killed.append(self._running.pop(id_))

    first, second = One(config), One(config)
    first.start()
    wait_for(lambda: looked.get(id(first), 0) > 2)
    second.start()
    wait_for(lambda: "worked on by" in caplog.text)
    assert id(second) not in looked
    # Somebody on another machine found the first one dead, and was wrong.
    [lease] = [info.key for info in records.store.list("runner/")]
    records.store.put("runner/lease-000000999.json", records.store.get(lease))
    wait_for(lambda: killed)
    One.look = end_thread
    records.store.delete("runner/lease-000000999.json")
    for runner in (first, second):
        runner._thread.join(60)
        assert not runner._thread.is_alive()


def end_thread(_):
    raise SystemExit
