"""Stores on S3: against a real server, and against small servers that fail in a certain way."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contracts import StoreContract, keys, put_many

from infra.local_s3.serve import LocalS3
from kdsr.config import StoreConfig
from kdsr.errors import (
    AccessDenied,
    BucketNotFound,
    KeyNotFound,
    RequestError,
    StoreError,
    StoreUnreachable,
)
from kdsr.store import Store, open_object, open_store

QUICK = StoreConfig(max_attempts=2, connect_timeout_seconds=20, read_timeout_seconds=20)


# A server that orders folder by folder is right with these keys, too: none begins like the name of a folder.
@pytest.mark.parametrize("store", ["s3"], indirect=True)
class TestS3Store(StoreContract):
    pass


@pytest.fixture
def bucket(s3_uri: str) -> Store:
    return open_store(s3_uri)


@pytest.fixture
def no_credentials(s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)


def calls(store: Store, source: Path) -> list[Callable[[], object]]:
    """One call of every method that asks the server."""
    return [
        lambda: keys(store),
        lambda: store.stat("key"),
        lambda: store.exists("key"),
        lambda: store.get("key"),
        lambda: store.put("key", b"x"),
        lambda: store.create("key", b"x"),
        lambda: store.put_file("key", source),
        lambda: store.delete("key"),
    ]


# ---------------------------------------------------------------- what is wrong is said


def test_every_call_tells_a_missing_bucket(s3_server: LocalS3, tmp_path: Path):
    (tmp_path / "source").touch()
    for call in calls(open_store("s3://no-such-bucket/prefix"), tmp_path / "source"):
        with pytest.raises(BucketNotFound, match="there is no bucket no-such-bucket; create it"):
            call()


def test_every_call_tells_denied_access_without_the_secret(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = "a-wrong-secret-that-nobody-may-see"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    (tmp_path / "source").touch()
    store = open_store(s3_uri)
    for call in calls(store, tmp_path / "source"):
        with pytest.raises(AccessDenied, match="access denied") as caught:
            call()
        assert secret not in str(caught.value)


def test_missing_credentials_are_told(s3_uri: str, no_credentials: None):
    store = open_store(s3_uri)
    for call in (lambda: keys(store), lambda: store.get("key"), store.arrow):
        with pytest.raises(AccessDenied, match="set AWS_ACCESS_KEY_ID"):
            call()


@pytest.mark.timeout(60)
def test_an_endpoint_where_nothing_listens_is_told(s3_uri: str, tmp_path: Path):
    (tmp_path / "source").touch()
    config = StoreConfig(endpoint_url="http://127.0.0.1:9", max_attempts=2)
    for call in calls(open_store(s3_uri, config), tmp_path / "source"):
        with pytest.raises(
            StoreUnreachable, match=r"no answer from http://127\.0\.0\.1:9 .*AWS_ENDPOINT_URL"
        ):
            call()


@pytest.mark.parametrize(
    "url", ["http://user:the-secret@127.0.0.1:1", "the-secret", "http://the-secret host"]
)
def test_an_endpoint_that_is_no_plain_url_is_refused_and_not_repeated(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, url: str
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(RequestError, match="endpoint is no plain URL") as caught:
        open_store(s3_uri).get("key")
    assert "the-secret" not in str(caught.value)


def test_an_unknown_profile_is_told(s3_uri: str, no_credentials: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="nobody"):
        open_store(s3_uri).get("key")


def test_the_secret_is_nowhere_but_in_the_environment(
    bucket: Store, s3_server: LocalS3, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.DEBUG):
        bucket.put("key", b"x")
        shown = [repr(bucket), str(bucket), bucket.uri, repr(pickle.dumps(bucket)), repr(bucket.arrow())]
    for text in [*shown, caplog.text]:
        assert s3_server.secret_key not in text


# ---------------------------------------------------------------- the same settings for both clients


def test_parquet_goes_through_arrow_and_the_store_alike(bucket: Store):
    table = pa.table({"key": ["a b", "ü"], "size": [1, 2]})
    filesystem, root = bucket.arrow()
    pq.write_table(table, f"{root}/part 1/x.parquet", filesystem=filesystem)
    assert bucket.get("part 1/x.parquet")[:4] == b"PAR1"
    assert pq.read_table(f"{root}/part 1/x.parquet", filesystem=filesystem).equals(table)


def test_the_endpoint_of_the_config_wins_for_both_clients(
    s3_uri: str, s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = open_store(s3_uri, StoreConfig(endpoint_url=s3_server.endpoint_url, region="eu-central-1"))
    store.put("key", b"content")
    filesystem, root = store.arrow()
    with filesystem.open_input_file(f"{root}/key") as file:
        assert file.read() == b"content"


def test_credentials_of_a_profile_reach_both_clients(
    s3_uri: str, s3_server: LocalS3, no_credentials: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    profile = f"""
        [somebody]
        aws_access_key_id = {s3_server.access_key}
        aws_secret_access_key = {s3_server.secret_key}
    """
    (tmp_path / "credentials").write_text("\n".join(line.strip() for line in profile.splitlines()))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "somebody")
    store = open_store(s3_uri)
    store.put("key", b"content")
    filesystem, root = store.arrow()
    with filesystem.open_input_file(f"{root}/key") as file:
        assert file.read() == b"content"


# ---------------------------------------------------------------- large files, folders, early ends


def test_a_large_file_goes_up_in_parts_and_comes_back(bucket: Store, tmp_path: Path):
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(70 * 2**20)
        file.seek(50 * 2**20)
        file.write(b"here")
    info = bucket.put_file("large", large)
    assert info.size == 70 * 2**20
    assert info.etag.endswith("-5")
    assert bucket.get("large", start=50 * 2**20 - 1, length=6) == b"\0here\0"


STUCK_WRITER = """
import sys
from pathlib import Path
from kdsr.store import open_store
open_store(sys.argv[1]).put_file("key", Path(sys.argv[2]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_upload_that_ends_in_the_middle_leaves_nothing(
    bucket: Store, s3_server: LocalS3, tmp_path: Path, end: signal.Signals
):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", STUCK_WRITER, bucket.uri, str(pipe)]
    writer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    with pipe.open("wb", buffering=0) as source:
        for _ in range(80):
            source.write(bytes(2**20))
        writer.send_signal(end)
        if end == signal.SIGKILL:
            writer.wait()
    assert writer.wait() != 0
    assert keys(bucket) == []
    assert not bucket.exists("key")
    if end == signal.SIGINT:
        folder = bucket.uri.rpartition("/")[2]
        assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket="kdsr-tests", Prefix=folder)


def test_a_folder_that_some_tool_made_visible_is_no_object(bucket: Store, s3_server: LocalS3):
    folder = bucket.uri.rpartition("/")[2]
    for marker in (f"{folder}/", f"{folder}/sub/"):
        s3_server.client().put_object(Bucket="kdsr-tests", Key=marker, Body=b"")
    bucket.put("sub/x", b"x")
    assert keys(bucket) == ["sub/x"]


def test_an_object_is_found_by_its_uri(bucket: Store):
    bucket.put("a b/model.pt", b"weights")
    store, key = open_object(f"{bucket.uri}/a b/model.pt")
    assert store.get(key) == b"weights"


def test_every_key_is_listed_once_whatever_order_the_server_prefers(bucket: Store):
    names = ["a", "a b/x", "a-b", "a.b/c", "ab", "a/b", "a/b.c", "a/b/d"]
    names.remove("a")
    names.remove("a/b")
    put_many(bucket, names)
    assert sorted(keys(bucket)) == sorted(names)


# ---------------------------------------------------------------- servers that fail


@contextmanager
def failing_server(
    answer: Callable[[BaseHTTPRequestHandler, int], None], **fields: float
) -> Iterator[tuple[Store, list[str]]]:
    """A store whose server calls `answer(request, how many came before)`, and the requests so far.

    `fields` of its StoreConfig.
    """
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            seen.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answer(self, len(seen) - 1)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        yield open_store("s3://bucket", QUICK.model_copy(update={"endpoint_url": endpoint, **fields})), seen
    finally:
        server.shutdown()
        server.server_close()


def respond(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), "ETag": '"e"', **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body)


def refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    respond(request, status, f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode())


def half_a_body(request: BaseHTTPRequestHandler, count: int) -> None:
    respond(request, 200, b"half", **{"Content-Length": "8"})
    request.close_connection = True


def test_half_a_body_is_never_taken_for_the_whole(s3_server: LocalS3):
    with failing_server(half_a_body) as (store, seen):
        with pytest.raises(StoreError, match="s3://bucket/key: the answer broke off 2 times"):
            store.get("key")
        assert seen == ["GET", "GET"]


def test_a_body_that_breaks_off_once_is_read_again(s3_server: LocalS3):
    def answer(request: BaseHTTPRequestHandler, count: int) -> None:
        half_a_body(request, count) if count == 0 else respond(request, 200, b"all of it")

    with failing_server(answer) as (store, _):
        assert store.get("key") == b"all of it"


@pytest.mark.parametrize(
    ("status", "code", "error", "num_requests"),
    [
        (403, "AccessDenied", AccessDenied, 1),
        (400, "ExpiredToken", AccessDenied, 1),
        (404, "NoSuchKey", KeyNotFound, 1),
        (404, "NoSuchBucket", BucketNotFound, 1),
        (400, "SomethingElse", StoreError, 1),
        (400, "AuthorizationHeaderMalformed", StoreError, 1),
        (500, "InternalError", StoreError, 2),
        (503, "SlowDown", StoreError, 2),
    ],
)
def test_only_what_may_pass_is_tried_again(
    s3_server: LocalS3, status: int, code: str, error: type[StoreError], num_requests: int
):
    with failing_server(lambda request, _: refuse(request, status, code)) as (store, seen):
        with pytest.raises(StoreError) as caught:
            store.get("key")
        assert type(caught.value) is error
        assert len(seen) == num_requests


def no_s3_server(status: int) -> Callable[[BaseHTTPRequestHandler, int], None]:
    """What the server of some web page says to everything."""

    def answer(request: BaseHTTPRequestHandler, count: int) -> None:
        page = b"" if request.command == "HEAD" else b"<html>welcome</html>"
        request.send_response(status)
        request.send_header("Content-Length", str(len(page)))
        request.end_headers()
        request.wfile.write(page)

    return answer


def test_nothing_is_missing_where_there_is_no_s3_server(s3_server: LocalS3, tmp_path: Path):
    (tmp_path / "source").touch()
    with failing_server(no_s3_server(404)) as (store, _):
        for call in calls(store, tmp_path / "source"):
            with pytest.raises(StoreError, match="check that the endpoint is an S3 server") as caught:
                call()
            assert type(caught.value) is StoreError


def test_nothing_is_written_where_there_is_no_s3_server(s3_server: LocalS3, tmp_path: Path):
    (tmp_path / "source").touch()
    with failing_server(no_s3_server(200)) as (store, _):
        for write in (
            lambda: store.put("key", b"x"),
            lambda: store.create("key", b"x"),
            lambda: store.put_file("key", tmp_path / "source"),
        ):
            with pytest.raises(StoreError, match="no ETag; check that the endpoint is an S3 server"):
                write()


def test_a_server_that_listens_and_says_nothing_is_told(s3_server: LocalS3):
    release = threading.Event()

    def answer(request: BaseHTTPRequestHandler, count: int) -> None:
        release.wait(60)
        request.close_connection = True

    with failing_server(answer, read_timeout_seconds=2) as (store, seen):
        with pytest.raises(StoreUnreachable, match="ReadTimeoutError"):
            store.stat("key")
        assert len(seen) == 2
        release.set()


def test_create_knows_its_own_object_when_only_the_answer_was_lost(s3_server: LocalS3):
    marks: list[str] = []

    def answer(request: BaseHTTPRequestHandler, count: int) -> None:
        if request.command == "PUT" and not marks:
            marks.append(request.headers["x-amz-meta-kdsr-writer"])
            request.close_connection = True
        elif request.command == "PUT":
            refuse(request, 412, "PreconditionFailed")
        else:
            respond(request, 200, **{"x-amz-meta-kdsr-writer": marks[0]})

    with failing_server(answer) as (store, seen):
        assert store.create("key", b"x").key == "key"
        assert seen == ["PUT", "PUT", "HEAD"]


def test_a_failed_part_ends_the_upload_and_takes_its_parts_back(s3_server: LocalS3, tmp_path: Path):
    def answer(request: BaseHTTPRequestHandler, count: int) -> None:
        if request.command == "POST":
            respond(request, 200, b"<Result><UploadId>upload</UploadId></Result>")
        elif request.command == "PUT":
            refuse(request, 403, "AccessDenied")
        else:
            respond(request, 204)

    with (tmp_path / "large").open("wb") as file:
        file.truncate(70 * 2**20)
    with failing_server(answer) as (store, seen):
        with pytest.raises(AccessDenied):
            store.put_file("key", tmp_path / "large")
        assert seen[-1] == "DELETE"
        assert seen.count("POST") == 1


def test_the_server_of_the_tests_ends_with_them():
    code = """
import sys
from infra.local_s3.serve import local_s3
with local_s3() as server:
    server.make_bucket("some-bucket")
    print(server.endpoint_url)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    store = open_store(
        "s3://some-bucket", QUICK.model_copy(update={"endpoint_url": done.stdout.strip(), "max_attempts": 1})
    )
    with pytest.raises(StoreError):
        store.get("key")


def test_a_browser_is_told_what_an_object_is(bucket: Store, s3_server: LocalS3, tmp_path: Path):
    (tmp_path / "x").write_bytes(b"pixels")
    bucket.put("page.html", b"<p>")
    bucket.put("without", b"?")
    bucket.put_file("large.webp", tmp_path / "x")
    folder = bucket.uri.rpartition("/")[2]

    def told(key: str) -> str:
        found: str = s3_server.client().head_object(Bucket="kdsr-tests", Key=f"{folder}/{key}")["ContentType"]
        return found

    assert (told("page.html"), told("large.webp")) == ("text/html", "image/webp")
    assert told("without") not in ("text/html", "image/webp")
