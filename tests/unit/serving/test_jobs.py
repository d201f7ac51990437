"""Jobs over HTTP and in their store; whoever runs them is played by the test."""

import json

import pytest

from kdsr.errors import StoreError
from kdsr.serving.jobs import JobCounts, JobOutcome, JobRecords, allowed_place
from kdsr.serving.problems import Problem
from kdsr.store import FileStore, open_store
from tests.small_server import encoded, problem

KEYS = {
    name: {"sha256": digest}
    for name, digest in {
        "anna": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
        "bert": "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d",
    }.items()
}
ANNA, BERT = {"X-API-Key": "a"}, {"X-API-Key": "b"}


@pytest.fixture
def places(tmp_path):
    for name in ("in", "out", "secret"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def client(serve, places):
    jobs = {
        "records": str(places / "records"),
        "inputs": [str(places / "in")],
        "outputs": [str(places / "out")],
    }
    return serve(auth="keys", keys=KEYS, jobs=jobs).client


@pytest.fixture
def records(places):
    return JobRecords(open_store(str(places / "records")))


def asked(places, **fields):
    return {"input": f"file://{places}/in/a", "output": f"file://{places}/out", "scale": 2} | fields


def test_a_prefix_becomes_a_job_that_is_followed_to_its_end(client, places, records):
    answer = client.post("/v1/jobs", json=asked(places, include=["*.png"]), headers=ANNA)
    assert answer.status_code == 202
    where = answer.headers["location"]
    assert where == f"/v1/jobs/{answer.json()['id']}"
    assert client.get(where, headers=ANNA).json()["state"] == "queued"
    [(owner, id_)] = records.unfinished()

    records.progress(id_, JobCounts(listed=9, done=4))
    shown = client.get(where, headers=ANNA)
    assert shown.headers["retry-after"]
    assert (shown.json()["state"], shown.json()["listed"], shown.json()["done"]) == ("running", 9, 4)

    failures = {"x.png": "corrupt (decode): broken"}
    records.finish(
        id_,
        owner,
        JobOutcome(state="failed", counts=JobCounts(listed=9, done=8, failed=1), failures=failures),
    )
    shown = client.get(where, headers=ANNA)
    assert (shown.json()["state"], shown.json()["failures"]) == ("failed", failures)
    assert "retry-after" not in shown.headers
    assert list(records.unfinished()) == []


def test_a_job_is_a_bulk_run_with_the_same_options(client, serve, places, records, tiny_models):
    client.post("/v1/jobs?quality=70", json=asked(places, format="webp", include=["*.png"]), headers=ANNA)
    [(owner, id_)] = records.unfinished()
    server = serve(jobs={"records": str(places / "records"), "max_pixels": 777})
    config = records.get(id_, owner=owner).request.upscale_config(server.config.jobs, server.config.store)
    assert (config.input, config.output) == (f"file://{places}/in/a", f"file://{places}/out")
    assert (config.scale, config.format, config.encode.quality, config.max_pixels) == (2, "webp", 70, 777)
    assert (config.model, config.include) == (tiny_models[2], ("*.png",))


def test_a_job_computes_as_the_server_does(serve, places, records):
    jobs = {"records": str(places / "records"), "inputs": [str(places)], "outputs": [str(places)]}
    server = serve(jobs=jobs, tile_size=48, precision="float32")
    server.client.post("/v1/jobs", json=asked(places))
    server.client.post("/v1/jobs", content=encoded(), headers={"Content-Type": "image/png"})
    requests = [records.get(id_, owner=owner).request for owner, id_ in records.unfinished()]
    found = [request.upscale_config(server.config.jobs, server.config.store) for request in requests]
    assert [(each.precision, each.tile_size) for each in found] == [("float32", 48)] * 2


def test_an_image_that_is_sent_becomes_a_job_and_its_result_is_fetched(client, records):
    data = encoded(30, 40)
    answer = client.post("/v1/jobs?scale=4", content=data, headers=ANNA | {"Content-Type": "image/png"})
    where, id_ = answer.headers["location"], answer.json()["id"]
    assert answer.status_code == 202 and "input" not in answer.json()
    request = records.get(id_, owner="anna").request
    [kept] = open_store(request.input).list()
    assert open_store(request.input).get(kept.key) == data

    assert problem(client.get(f"{where}/result", headers=ANNA)) == (409, "conflict")
    open_store(request.output).put("_kdsr/runs/report.json", b"{}")
    open_store(request.output).put(kept.key, encoded(120, 160))
    records.finish(id_, "anna", JobOutcome(state="done"))
    assert client.get(where, headers=ANNA).json()["result"] == f"{where}/result"
    result = client.get(f"{where}/result", headers=ANNA)
    assert (result.content, result.headers["content-type"]) == (encoded(120, 160), "image/png")
    known = client.get(f"{where}/result", headers=ANNA | {"If-None-Match": result.headers["etag"]})
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", result.headers["etag"])
    paths = client.get("/openapi.json").json()["paths"]
    assert "image/png" in paths["/v1/jobs/{id}/result"]["get"]["responses"]["200"]["content"]


def test_a_job_is_nobody_elses(client, places):
    where = client.post("/v1/jobs", json=asked(places), headers=ANNA).headers["location"]
    for call in (client.get, client.delete):
        assert problem(call(where, headers=BERT)) == (404, "not-found")
        assert problem(call(where)) == (401, "unauthorized")
    assert problem(client.get(f"{where}/result", headers=BERT)) == (404, "not-found")


def test_a_cancelled_job_says_so_at_once_and_a_finished_one_stays(client, places, records):
    where = client.post("/v1/jobs", json=asked(places), headers=ANNA).headers["location"]
    assert client.delete(where, headers=ANNA).json()["state"] == "cancelled"
    [(owner, id_)] = records.unfinished()
    assert records.is_cancelled(id_)
    records.finish(id_, owner, JobOutcome(state="cancelled"))
    assert client.delete(where, headers=ANNA).json()["state"] == "cancelled"
    other = client.post("/v1/jobs", json=asked(places), headers=ANNA).json()["id"]
    records.finish(other, "anna", JobOutcome(state="done"))
    assert problem(client.delete(f"/v1/jobs/{other}", headers=ANNA)) == (409, "conflict")


def test_the_same_job_under_its_key_is_made_once_for_each_owner(client, places, records):
    key = {"Idempotency-Key": "k1"}
    first, again = (client.post("/v1/jobs", json=asked(places), headers=ANNA | key).json() for _ in range(2))
    assert first == again
    assert client.post("/v1/jobs", json=asked(places), headers=BERT | key).json()["id"] != first["id"]
    assert len(list(records.unfinished())) == 2
    other = client.post("/v1/jobs", json=asked(places, scale=4), headers=ANNA | key)
    assert problem(other) == (422, "reused-key")


@pytest.fixture
def counted(serve, places):
    """A client whose key A has 5000 output pixels a minute: 24 x 32 to x2 once, and not twice."""
    keys = {"anna": KEYS["anna"] | {"pixels_per_minute": 5000}, "bert": KEYS["bert"]}
    jobs = {"records": str(places / "records"), "inputs": [str(places)], "outputs": [str(places)]}
    return serve(auth="keys", keys=keys, jobs=jobs).client


def sent(client, key, **headers):
    headers = key | {"Content-Type": "image/png"} | headers
    return client.post("/v1/jobs?scale=2", content=encoded(24, 32), headers=headers)


def test_an_image_that_is_sent_spends_the_quota_of_its_key(counted, places):
    assert sent(counted, ANNA).status_code == 202
    assert problem(sent(counted, ANNA)) == (429, "quota")
    upscaled = counted.post(
        "/v1/upscale?scale=2", content=encoded(24, 32), headers=ANNA | {"Content-Type": "image/png"}
    )
    assert problem(upscaled) == (429, "quota")
    assert [sent(counted, BERT).status_code for _ in range(2)] == [202, 202]
    assert counted.post("/v1/jobs", json=asked(places), headers=ANNA).status_code == 202


def test_the_same_upload_under_its_key_costs_once(counted):
    ids = [sent(counted, ANNA, **{"Idempotency-Key": "k"}).json()["id"] for _ in range(3)]
    assert len(set(ids)) == 1


def test_an_upload_that_becomes_no_job_costs_nothing(counted, monkeypatch):
    def broken(*_, **__):
        raise StoreError("the store is full")

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "create", broken)
        assert problem(sent(counted, ANNA)) == (503, "store-unavailable")
    assert sent(counted, ANNA).status_code == 202


def test_a_broken_upload_is_refused_where_its_pixels_are_counted(counted):
    headers = ANNA | {"Content-Type": "image/png"}
    answer = counted.post("/v1/jobs", content=encoded()[:20], headers=headers)
    assert problem(answer) == (422, "invalid-image")


def test_under_a_key_one_image_is_kept_once_and_another_one_not_at_all(client, records):
    headers = ANNA | {"Idempotency-Key": "k1", "Content-Type": "image/png"}
    first = client.post("/v1/jobs", content=encoded(20, 20), headers=headers).json()
    source = open_store(records.get(first["id"], owner="anna").request.input)
    assert [source.get(info.key) for info in source.list()] == [encoded(20, 20)]
    before = {(info.key, info.etag) for info in records.store.list()}
    assert client.post("/v1/jobs", content=encoded(20, 20), headers=headers).json() == first
    assert problem(client.post("/v1/jobs", content=encoded(21, 20), headers=headers)) == (422, "reused-key")
    assert {(info.key, info.etag) for info in records.store.list()} == before


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"input": "file:///etc"}, (403, "forbidden")),
        ({"input": "file:///"}, (403, "forbidden")),
        ({"input": "s3://bucket/a"}, (403, "forbidden")),
        ({"input": "in"}, (422, "invalid-option")),
        ({"input": "ftp://x"}, (422, "invalid-option")),
        ({"input": 5}, (422, "invalid-option")),
        ({"input": "file:///a\n"}, (422, "invalid-option")),
        ({"output": "file:///etc"}, (403, "forbidden")),
        ({"model": "none"}, (422, "invalid-option")),
        ({"include": "*.png"}, (422, "invalid-option")),
        ({"include": ["\ud800"]}, (422, "invalid-option")),
        ({"include": ["*.png", 5]}, (422, "invalid-option")),
        ({"model": "\udfff"}, (422, "invalid-option")),
        ({"input": "file:///\ud800"}, (422, "invalid-option")),
        ({"scael": 2}, (422, "invalid-option")),
    ],
)
def test_what_is_not_allowed_becomes_no_job(client, places, records, fields, expected):
    headers = ANNA | {"Content-Type": "application/json"}
    answer = client.post("/v1/jobs", content=json.dumps(asked(places, **fields)), headers=headers)
    assert problem(answer) == expected
    assert list(records.unfinished()) == []


def test_no_way_leads_out_of_an_allowed_place(places):
    allowed = (f"file://{places}/in", "s3://bucket/photos")
    (places / "in" / "link").symlink_to(places / "secret")
    (places / "in" / "real").mkdir()
    assert allowed_place(f"file://{places}/in/real", allowed, what="input")
    assert allowed_place(f"file://{places}/in", allowed, what="input")
    assert allowed_place("s3://bucket/photos/2024", allowed, what="input")
    for place in (
        *(
            f"file://{places}/in/../secret",
            f"file://{places}/in/link",
            f"file://{places}/in2",
            f"file://{places}",
        ),
        *("s3://bucket/photos2", "s3://bucket", "s3://other/photos", "s3://bucket/photos/../private"),
        *("s3://bucket/photos\\..\\private", f"file://{places}/in/./../secret"),
    ):
        with pytest.raises(Problem):
            allowed_place(place, allowed, what="input")


@pytest.mark.parametrize("id_", ["x", "..", "0" * 31, "G" * 32, "%2e%2e", "open"])
def test_what_is_no_id_is_no_job(client, id_):
    assert problem(client.get(f"/v1/jobs/{id_}", headers=ANNA))[0] == 404


def test_a_key_has_so_many_unfinished_jobs(serve, places):
    jobs = {"records": str(places / "r"), "inputs": [str(places)], "outputs": [str(places)], "max_waiting": 2}
    client = serve(jobs=jobs).client
    codes = [client.post("/v1/jobs", json=asked(places)).status_code for _ in range(3)]
    assert codes == [202, 202, 429]


def test_a_job_that_is_made_already_is_told_whatever_else_waits(serve, places):
    jobs = {"records": str(places / "r"), "inputs": [str(places)], "outputs": [str(places)], "max_waiting": 1}
    client = serve(jobs=jobs).client
    first, again, other = (
        client.post("/v1/jobs", json=asked(places), headers={"Idempotency-Key": key}) for key in "aab"
    )
    assert (first.status_code, again.status_code, again.json()) == (202, 202, first.json())
    assert problem(other) == (429, "busy")


@pytest.mark.parametrize(
    ("data", "kind", "expected"),
    [
        (b"hello", "image/png", (415, "unsupported-media-type")),
        (b"", "image/png", (400, "bad-request")),
        (b"x" * 3000, "image/png", (413, "body-too-large")),
        (b"{}", "application/json", (400, "bad-request")),
        (b"x", "text/plain", (415, "unsupported-media-type")),
    ],
)
def test_an_upload_that_is_no_image_becomes_no_job(serve, places, data, kind, expected):
    client = serve(jobs={"records": str(places / "r"), "max_upload_bytes": 2000}).client
    assert problem(client.post("/v1/jobs", content=data, headers={"Content-Type": kind})) == expected


def test_a_store_that_fails_is_a_problem_to_try_again(client, places, monkeypatch):
    def broken(*_, **__):
        raise StoreError("s3://secret-bucket: the store is full")

    monkeypatch.setattr(FileStore, "create", broken)
    answer = client.post("/v1/jobs", json=asked(places), headers=ANNA)
    assert problem(answer) == (503, "store-unavailable")
    assert "secret-bucket" not in answer.text and answer.headers["retry-after"]


def test_without_a_place_for_records_there_are_no_jobs(server):
    assert problem(server.client.post("/v1/jobs", json={})) == (404, "not-found")


def test_jobs_that_ended_long_ago_are_forgotten_with_what_was_sent_and_made(client, places, records):
    image = {"content": encoded(), "headers": ANNA | {"Content-Type": "image/png"}}
    (places / "in" / "a").mkdir()
    (places / "in" / "a" / "mine.png").write_bytes(encoded())
    old, young, running = (client.post("/v1/jobs", **image).json()["id"] for _ in range(3))
    named = client.post("/v1/jobs", json=asked(places), headers=ANNA).json()["id"]
    for id_ in (old, young, named):
        records.finish(id_, "anna", JobOutcome(state="done"))
    for id_ in (old, named):
        [mark] = [info.key for info in records.store.list("ended/") if info.key.endswith(id_)]
        records.store.delete(mark)
        records.store.put(f"ended/2020-02-29/{id_}", b"")
    assert records.forget(days=7) == 2
    assert {info.key.split("/")[0] for info in records.store.list()} == {young, running, "open", "ended"}
    assert [client.get(f"/v1/jobs/{id_}", headers=ANNA).status_code for id_ in (old, young)] == [404, 200]
    assert (places / "in" / "a" / "mine.png").exists()
    assert records.forget(days=7) == 0


def test_what_an_entrance_left_that_died_counts_no_longer(client, records):
    records.announce("0" * 32, "anna")
    records.store.put(f"{'0' * 32}/upload/x.png", b"half")
    assert records.num_open("anna") == 1
    records.give_up("0" * 32, "anna")
    assert list(records.store.list()) == []
