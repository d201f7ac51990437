"""An image by its URL: from public addresses only, whatever names say and however often they change."""

import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kdsr.serving.fetch import Fetcher, is_public
from kdsr.serving.problems import Problem
from tests.small_server import problem

PRIVATE = [
    *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1"),
    *(
        "169.254.169.254",
        "169.254.170.2",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
    ),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
    *("192.0.0.192", "168.63.129.16", "::ffff:168.63.129.16", "fec0::1", "3fff::1"),
    *("localhost", "", "1.2.3"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_not_anybody_can_reach_is_refused(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_an_address_that_anybody_can_reach_is_taken(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "http://localhost/x", "http://2130706433/", "http://0x7f.1/", "http://017700000001/",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://169.254.169.254/latest/meta-data/",
        "http://0/", "http://127.1/",
    ],
)  # fmt: skip
def test_this_machine_is_not_reached_under_any_of_its_names(url):
    with pytest.raises(Problem) as refused:
        Fetcher(1000, 5).get(url)
    assert refused.value.kind == "forbidden"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "gopher://x/", "ftp://x/", "x", "", "http://", "http://a b/", "http://user:pw@example.org/",
        "http://example.org:22/", "http://example.org:6379/", "http://[::1", "http://example.org/\r\nX: y",
        "http://ex\u00e4mple.org/", "http://example.org/" + "a" * 3000,
    ],
)  # fmt: skip
def test_what_is_no_plain_url_is_refused_before_a_name_is_asked_for(url):
    def resolve(host, port):
        raise AssertionError(host)

    with pytest.raises(Problem):
        Fetcher(1000, 5, resolve=resolve).get(url)


@pytest.fixture
def site():
    """A web server on this machine, and a fetcher that believes it to be public under `example.org`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append((self.path, self.headers["Host"]))
            if self.path.startswith("/to?"):
                self.send_response(302)
                self.send_header("Location", self.path[4:])
                self.end_headers()
                return
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            self.wfile.write(b"x" * (5000 if self.path == "/long" else 10))

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Names:
    """A resolver whose answers change, and a check that takes only what stands for a public address."""

    def __init__(self, *answers):
        self.answers, self.asked, self.checked = list(answers), [], []

    def resolve(self, host, port):
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def is_allowed(self, address):
        self.checked.append(address)
        return address == "127.0.0.1"


def fetcher(site, names, max_bytes=1000):
    port = site.server_address[1]
    return Fetcher(max_bytes, 5, names.resolve, names.is_allowed, frozenset({80, port}))


def test_a_public_url_is_fetched_from_the_address_that_was_checked(site):
    names, port = Names(["127.0.0.1"], ["10.0.0.1"]), site.server_address[1]
    assert fetcher(site, names).get(f"http://example.org:{port}/a?b=c") == b"x" * 10
    assert site.seen == [("/a?b=c", f"example.org:{port}")]
    assert names.asked == ["example.org"]


def test_one_private_address_among_several_is_enough_to_refuse(site):
    names = Names(["127.0.0.1", "10.0.0.1"])
    with pytest.raises(Problem) as refused:
        fetcher(site, names).get(f"http://example.org:{site.server_address[1]}/")
    assert (refused.value.kind, site.seen) == ("forbidden", [])


@pytest.mark.parametrize("target", ["http://inside.example.org/", "//inside.example.org/", "http://[::1]/"])
def test_a_redirect_to_a_private_address_is_refused(site, target):
    names = Names(["127.0.0.1"], ["10.0.0.1"])
    with pytest.raises(Problem) as refused:
        fetcher(site, names).get(f"http://example.org:{site.server_address[1]}/to?{target}")
    assert refused.value.kind == "forbidden"
    assert names.checked[-1] == "10.0.0.1"


def test_redirects_end(site):
    with pytest.raises(Problem, match="redirects"):
        fetcher(site, Names(["127.0.0.1"])).get(
            f"http://example.org:{site.server_address[1]}/to?" + "/to?" * 4 + "/a"
        )


@pytest.mark.parametrize(("path", "kind"), [("/none", "invalid-option"), ("/long", "body-too-large")])
def test_what_is_not_there_or_too_long_is_refused(site, path, kind):
    with pytest.raises(Problem) as refused:
        fetcher(site, Names(["127.0.0.1"])).get(f"http://example.org:{site.server_address[1]}{path}")
    assert refused.value.kind == kind


def dripping(part, path):
    """A server that never comes to the end of `part` of its answer, and its port."""
    begin = {"head": b"HTTP/1.1 200 OK\r\nX: ", "body": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"}

    def drip(place):
        with place, suppress(OSError):
            connection, _ = place.accept()
            with connection:
                connection.sendall(begin.get(part, b""))
                while True:
                    connection.sendall(b"\x16\x03\x03\x40\x00" if part == "handshake" else b"x")
                    time.sleep(0.01)

    place = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=drip, args=(place,), daemon=True).start()
    return f"{'https' if part == 'handshake' else 'http'}://example.org:{place.getsockname()[1]}/{path}"


@pytest.mark.parametrize("part", ["handshake", "head", "body"])
def test_a_server_that_always_sends_a_little_is_broken_off(part):
    url = dripping(part, "a")
    ports = frozenset({int(url.rpartition(":")[2].partition("/")[0])})
    names = Names(["127.0.0.1"])
    with pytest.raises(Problem, match="in time"):
        Fetcher(10**9, 0.3, names.resolve, names.is_allowed, ports).get(url)


def test_a_name_that_took_all_of_the_time_is_not_connected_to(site):
    def resolve(host, port):
        time.sleep(0.05)
        return ["127.0.0.1"]

    port = site.server_address[1]
    with pytest.raises(Problem, match="in time"):
        Fetcher(1000, 0.01, resolve, lambda _: True, frozenset({port})).get(f"http://example.org:{port}/")
    assert site.seen == []


def test_a_server_that_fetches_refuses_its_own_machine(serve):
    answer = serve(fetch_urls=True).client.post("/v1/upscale", json={"url": "http://127.0.0.1:1/"})
    assert problem(answer) == (403, "forbidden")
    answer = serve(fetch_urls=True).client.post("/v1/upscale", json={"url": "http://localhost/"})
    assert problem(answer) == (403, "forbidden")
