"""What is too much, too slow or hostile is refused early, in the same form as everything else."""

import asyncio
import io
import json
import logging
import struct
import threading
import zlib

import PIL.Image
import pytest

from kdsr.encoded import HELD_FRAMES
from kdsr.engine import Engine
from kdsr.serving.access import SAFETY
from kdsr.serving.bodies import inspected
from kdsr.serving.contract import MEDIA_TYPES
from kdsr.serving.problems import Problem
from tests.small_server import encoded, picture_of, problem
from tests.waiting import wait_for


def bomb(height, width):
    """A PNG whose header announces more pixels than it has."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def animation(frames):
    pictures = [PIL.Image.new("RGB", (8, 8), (shade % 256, 9, 9)) for shade in range(frames)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=20)
    return buffer.getvalue()


def endless_gif(frames):
    """Empty frames, 18 bytes each."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00"
    return (
        b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * frames + b"\x3b"
    )


def document(*sides):
    """Pages of different sizes."""
    pages = [PIL.Image.new("RGB", (side, side)) for side in sides]
    buffer = io.BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_deflate")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "query"),
    [
        (bomb(100_000, 100_000), ""),
        (bomb(2**31 - 1, 2**31 - 1), ""),
        (bomb(3000, 3000), ""),
        (animation(21), ""),
        (endless_gif(150_000), ""),
        (encoded(24, 32), "?scale=16"),
        (document(8, 8, 1000), ""),
        (document(8, 90), "?scale=4"),
    ],
    ids=["bomb", "huge bomb", "pixels", "frames", "endless", "scale", "pages", "pages to scale"],
)
def test_too_many_pixels_are_seen_in_the_header(serve, data, query):
    limits = {"max_pixels": 1_000_000, "max_frames": 20, "max_output_pixels": 100_000}
    server = serve(limits=limits)
    assert problem(server.upscale(data, query=query)) == (413, "image-too-large")
    assert server.backend.calls == 0


def test_a_file_of_many_bytes_is_refused_by_what_it_announces_and_by_what_it_sends(serve):
    server = serve(limits={"max_body_bytes": 1000})
    assert problem(server.upscale(b"x" * 1001)) == (413, "body-too-large")
    assert problem(server.upscale(iter([b"x" * 600] * 3))) == (413, "body-too-large")
    text = json.dumps({"image": "A" * 200_000})
    assert problem(server.upscale(text, content_type="application/json")) == (413, "body-too-large")
    form = server.client.post("/v1/upscale", files={"file": ("x", b"x" * 1001)})
    assert problem(form) == (413, "body-too-large")


class Wire:
    """One request spoken message by message, as a server hands it over."""

    def __init__(self, server, headers, *, path="/v1/upscale", query=b"scale=4"):
        self.server, self.sent = server, []
        self.scope = {"type": "http", "http_version": "1.1", "scheme": "http", "root_path": ""}
        self.scope |= {"client": ("192.0.2.7", 5), "server": ("x", 80), "headers": headers}
        self.scope |= {"method": "POST", "path": path, "query_string": query}

    async def send(self, message):
        self.sent.append(message)

    def run(self, receive):
        asyncio.run(self.server.app(self.scope, receive, self.send))
        body = b"".join(message.get("body", b"") for message in self.sent)
        return self.sent[0]["status"], json.loads(body)["type"].rpartition(":")[2]


IMAGE = [(b"content-type", b"image/png")]


def test_a_body_that_pauses_is_cut_off(serve):
    server = serve(limits={"idle_seconds": 0.05})

    async def receive():
        if not hasattr(receive, "begun"):
            receive.begun = True
            return {"type": "http.request", "body": b"x", "more_body": True}
        return await asyncio.sleep(3600)

    assert Wire(server, IMAGE).run(receive) == (408, "slow-body")


def test_a_body_that_trickles_is_cut_off(serve):
    server = serve(limits={"body_seconds": 0.2})

    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert Wire(server, IMAGE).run(receive) == (408, "slow-body")


def test_a_body_that_breaks_off_is_no_fault_of_ours(server):
    async def receive():
        return {"type": "http.disconnect"}

    assert Wire(server, IMAGE).run(receive) == (400, "bad-request")


def test_bodies_on_their_way_are_bounded_together(serve):
    server = serve(limits={"max_body_bytes": 2**20, "max_waiting_bytes": 2**20})
    entrance = server.app.state.entrance
    entrance.waiting_bytes = 2**20 - 10
    assert problem(server.upscale(encoded())) == (429, "busy")
    entrance.waiting_bytes = 0
    picture_of(server.upscale(encoded()))
    assert entrance.waiting_bytes == 0


def test_a_body_that_announced_no_length_counts_by_what_it_has_once_it_is_there(serve, monkeypatch):
    server, seen, data = serve(), [], encoded()

    def look(*arguments):
        seen.append(server.app.state.entrance.waiting_bytes)
        return inspected(*arguments)

    monkeypatch.setattr("kdsr.serving.app.inspected", look)
    picture_of(server.upscale(iter([data])))
    assert seen == [len(data)]


def test_a_body_that_may_become_more_than_all_together_goes_alone(serve):
    server = serve(limits={"max_body_bytes": 2**20, "max_waiting_bytes": 2**20})
    picture_of(server.upscale(iter([encoded()])))
    server.app.state.entrance.waiting_bytes = 1
    assert problem(server.upscale(iter([encoded()]))) == (429, "busy")


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ("0" * 18 + "100", (429, "busy")),
        ("0" * 5000 + "100", (429, "busy")),
        ("9" * 5000, (429, "busy")),
        ("-1", (400, "bad-request")),
        ("+5", (400, "bad-request")),
        ("1_0", (400, "bad-request")),
        ("", (400, "bad-request")),
        ("\u00b2", (400, "bad-request")),
    ],
)
def test_a_length_counts_however_it_is_written(serve, length, expected):
    server = serve(limits={"max_body_bytes": 2**20, "max_waiting_bytes": 2**20})
    server.app.state.entrance.waiting_bytes = 2**20 - 10
    headers = [*IMAGE, (b"content-length", length.encode("latin-1"))]

    async def receive():
        return {"type": "http.request", "body": b"x", "more_body": False}

    assert Wire(server, headers).run(receive) == expected


@pytest.mark.parametrize("length", ["0" * 20 + str(2**21), "9" * 19, "9" * 5000])
def test_a_length_beyond_all_limits_is_too_long(serve, length):
    async def receive():
        raise AssertionError("the body is not asked for")

    server = serve(limits={"max_body_bytes": 2**20})
    headers = [*IMAGE, (b"content-length", length.encode())]
    assert Wire(server, headers).run(receive) == (413, "body-too-large")


def test_what_a_replica_holds_is_bounded_and_others_are_told_when_to_come(serve):
    server = serve(limits={"queue_bytes": 2**20})
    server.host._admission.enter(2**20 - 10)
    answer = server.upscale(encoded())
    assert problem(answer) == (429, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    server.host._admission.leave(2**20 - 10, was_done=True)
    picture_of(server.upscale(encoded()))
    wait_for(lambda: server.host.describe().held_bytes == 0)


def costs(server, monkeypatch, *requests):
    """What is asked of a replica's memory for each; nothing is let in."""
    seen = []

    def enter(cost):
        seen.append(cost)
        raise Problem("busy", "full", retry_after=1)

    monkeypatch.setattr(server.host._admission, "enter", enter)
    for data, query in requests:
        assert problem(server.upscale(data, query=query)) == (429, "busy")
    return seen


def test_pages_are_let_in_by_the_largest_and_frames_of_avif_all_together(server, monkeypatch):
    first, last, gif, avif = costs(
        server,
        monkeypatch,
        (document(64, 8), ""),
        (document(8, 64), ""),
        (animation(40), "?format=gif"),
        (animation(40), "?format=avif"),
    )
    assert first == last
    assert avif == gif * 40 / HELD_FRAMES


def test_a_caller_that_leaves_costs_no_more_tiles_and_gives_its_room_back(serve, monkeypatch):
    server = serve(tile_size=16)
    gate, seen, run = threading.Event(), [], Engine.run

    def slow_run(engine, tiles, **_):
        seen.append(1)
        gate.wait(60)
        return run(engine, tiles)

    monkeypatch.setattr(Engine, "run", slow_run)

    async def leave():
        data = encoded(64, 64)
        parts = iter([{"type": "http.request", "body": data, "more_body": False}])

        async def receive():
            return next(parts, {"type": "http.disconnect"})

        async def send(message):
            raise AssertionError(message)

        wire = Wire(server, IMAGE)
        task = asyncio.create_task(server.app(wire.scope, receive, send))
        while not (seen or task.done()):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert server.host.describe().held_bytes > 0
    gate.set()
    wait_for(lambda: server.host.describe().held_bytes == 0)
    assert len(seen) == 1


def test_a_request_past_its_time_is_told_so(serve):
    server = serve(limits={"timeout_seconds": 1e-6})
    answer = server.upscale(encoded())
    assert problem(answer) == (504, "deadline")
    assert "retry-after" in answer.headers


def test_an_error_of_ours_is_in_the_log_and_not_in_the_answer(server, caplog, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a secret of ours")

    monkeypatch.setattr("kdsr.serving.app.inspected", broken)
    with caplog.at_level(logging.ERROR, logger="kdsr.serving"):
        answer = server.upscale(encoded(), X_Request_Id="me-1")
    assert problem(answer) == (500, "internal")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "me-1"
    assert "me-1" in caplog.text and "ZeroDivisionError" in caplog.text


def test_an_error_in_a_replica_fails_its_own_request_alone(server, caplog, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("kdsr.serving.host.goal_of", lambda *_, **__: 1 / 0)
        assert problem(server.upscale(encoded())) == (500, "internal")
    assert "ZeroDivisionError" in caplog.text
    picture_of(server.upscale(encoded()))


@pytest.mark.parametrize("path", ["/v1", "/v1/upscale/", "/v1/../etc/passwd", "/v1/upscale%00"])
def test_unknown_paths_are_problems_too(server, path):
    assert problem(server.client.get(path))[0] in (404, 405)


@pytest.mark.parametrize(
    ("path", "expected"), [("/none", (404, "not-found")), ("/v1/upscale", (422, "invalid-option"))]
)
def test_a_query_of_bytes_that_are_no_text_is_no_fault_of_ours(server, path, expected):
    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    assert Wire(server, IMAGE, path=path, query=b"scale=\xff").run(receive) == expected


def test_another_method_is_told_which_are_known(server):
    answer = server.client.put("/v1/upscale")
    assert problem(answer) == (405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models", "/openapi.json", "/", "/none"])
def test_head_is_answered_as_get_is_without_the_body(server, path, caplog):
    expected = server.client.get(path)
    with caplog.at_level(logging.INFO, logger="kdsr.access"):
        found = server.client.head(path)
    assert (found.status_code, found.content) == (expected.status_code, b"")
    names = ("content-type", "content-length", "content-security-policy")
    assert [found.headers.get(name) for name in names] == [expected.headers.get(name) for name in names]
    assert json.loads(caplog.records[-1].message)["method"] == "HEAD"


def test_head_of_what_takes_images_names_what_it_takes(server):
    answer = server.client.head("/v1/upscale")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("given", ["a b", "x" * 65, "a\tb", "<script>", "é".encode()])
def test_an_id_that_is_not_harmless_is_replaced(server, given):
    answer = server.client.get("/healthz", headers={"X-Request-Id": given})
    assert len(answer.headers["x-request-id"]) == 32


def test_every_answer_has_headers_for_safety(server):
    for answer in (server.client.get("/docs"), server.client.get("/none"), server.upscale(encoded())):
        assert {name: answer.headers[name] for name in SAFETY} == SAFETY


def test_the_log_has_one_line_of_json_for_each_request(server, caplog):
    with caplog.at_level(logging.INFO, logger="kdsr.access"):
        server.upscale(encoded(), query="?scale=2", X_Request_Id="me-2", Authorization="Bearer secret")
    [line] = [json.loads(record.message) for record in caplog.records if record.name == "kdsr.access"]
    assert line["request_id"] == "me-2"
    assert (line["method"], line["path"], line["status"], line["caller"]) == (
        "POST",
        "/v1/upscale",
        200,
        "anybody",
    )
    assert line["bytes"] > 0 and line["seconds"] > 0
    assert "secret" not in caplog.text


def test_no_page_of_another_origin_may_call_unless_it_is_named(serve):
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed = serve().client.options("/v1/upscale", headers=asking)
    assert "access-control-allow-origin" not in closed.headers
    client = serve(cors_origins=["https://a.example"]).client
    assert (
        client.options("/v1/upscale", headers=asking).headers["access-control-allow-origin"]
        == "https://a.example"
    )
    other = client.options("/v1/upscale", headers=asking | {"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_the_contract_promises_what_comes_back_and_nothing_else(serve, tmp_path):
    document = serve(jobs={"records": str(tmp_path)}).client.get("/openapi.json").json()
    promised = {
        (method, path): {status: set(answer["content"]) for status, answer in operation["responses"].items()
                         if status.startswith("2")}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }  # fmt: skip
    images, a_json, a_text = set(MEDIA_TYPES.values()), {"application/json"}, {"text/plain"}
    assert promised == {
        ("post", "/v1/upscale"): {"200": images},
        ("get", "/v1/models"): {"200": a_json},
        **{("get", path): {"200": a_text} for path in ("/healthz", "/readyz", "/metrics")},
        ("post", "/v1/jobs"): {"202": a_json},
        **{(method, "/v1/jobs/{id}"): {"200": a_json} for method in ("get", "delete")},
        ("get", "/v1/jobs/{id}/result"): {"200": images},
    }


def test_pages_of_other_origins_may_read_every_header_and_the_contract_names_it(serve):
    server = serve(cors_origins=["https://a.example"])
    sent = {"Idempotency_Key": "k", "Origin": "https://a.example"}
    told = [server.upscale(encoded(), **sent) for _ in range(2)][1].headers
    usual = {"content-length", "content-type", "cache-control", "vary"} | {name.lower() for name in SAFETY}
    own = {name for name in told if name not in usual and not name.startswith("access-control-")}
    exposed = told["access-control-expose-headers"].lower().split(", ")
    document = server.client.get("/openapi.json").json()
    named = document["paths"]["/v1/upscale"]["post"]["responses"]["200"]["headers"]
    assert {"etag", "idempotency-replayed", "kdsr-scale"} < own == {name.lower() for name in named}
    assert own < set(exposed)


def test_metrics_count_requests_and_pixels(server):
    server.upscale(encoded(24, 32), query="?scale=2")
    server.client.get("/none")
    text = server.client.get("/metrics").text
    assert 'kdsr_requests_total{route="/v1/upscale",status="200"} 1' in text
    assert 'kdsr_requests_total{route="none",status="404"} 1' in text
    assert 'kdsr_output_pixels_total{model="tiny"} 3072' in text
    assert 'kdsr_queue_seconds_count{model="tiny"} 1' in text


def test_models_are_told_with_cards_and_limits(server):
    content = server.client.get("/v1/models").json()
    assert [(model["name"], model["scales"]) for model in content["models"]] == [("tiny", [2, 4])]
    assert content["models"][0]["networks"][0]["card"]["name"] == "tiny-x2"
    assert content["limits"]["max_pixels"] == 4_194_304
    assert content["failures"] == {}


def test_the_page_of_the_contract_comes_from_the_document_and_from_no_other_host(server):
    page, document = server.client.get("/docs").text, server.client.get("/openapi.json").json()
    assert all(path in page for path in document["paths"])
    assert "http://" not in page and "https://" not in page and "<script" not in page
    answers = document["paths"]["/v1/upscale"]["post"]["responses"]
    assert {"200", "400", "401", "413", "415", "422", "429", "503", "504"} <= answers.keys()
