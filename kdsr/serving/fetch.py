"""An image by its URL, for servers that allow it: from public addresses only, whatever names say.

The name is resolved once, every address is checked, and the connection goes to the address that was checked:
a name that answers otherwise the second time gains nothing. Each redirect is a new URL with the same checks.
All of it has one deadline, but for asking for a name, which nothing can break off.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from kdsr.serving.problems import Problem

MAX_REDIRECTS = 3
MAX_URL = 2000
PORTS = {"http": 80, "https": 443}
CHUNK_BYTES = 64 * 2**10
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32", "fec0::/10", "3fff::/20")))
"""What Python takes for global, in some versions or in all: where clouds answer their own machines, Azure's
under an address that looks like any other; site-local addresses, and those for documentation."""

Resolve = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a name. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether anybody could reach it: not private, not of this machine or its cloud, not hidden in IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        within = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if found in _NAT64:
            within = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if within is not None:
            return is_public(str(within))
    is_special = found.is_multicast or found.is_reserved or any(found in network for network in _NOT_PUBLIC)
    return found.is_global and not is_special


@dataclass(frozen=True)
class Fetcher:
    """Gets images by URL within limits of bytes and seconds."""

    max_bytes: int
    seconds: float
    resolve: Resolve = resolve
    is_allowed: Callable[[str], bool] = is_public
    ports: frozenset[int] = frozenset(PORTS.values())

    def get(self, url: str) -> bytes:
        """What is at `url`. Raises Problem. Blocks."""
        end = time.monotonic() + self.seconds
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._get_one(_checked(url, self.ports), end)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise refused(f"more than {MAX_REDIRECTS} redirects")

    def _get_one(self, url: SplitResult, end: float) -> bytes | str:
        """The content, or where it redirects to."""
        try:
            with closing(self._connection(url, end)) as connection, broken_off_at(end, connection):
                target = f"{url.path or '/'}{'?' if url.query else ''}{url.query}"
                headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "kdsr"}
                connection.request("GET", target, headers=headers)
                response = connection.getresponse()
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location:
                    return location
                if response.status != 200:
                    raise refused(f"it answered {response.status}")
                return self._read(response, end)
        except (OSError, http.client.HTTPException, ValueError):
            raise refused("nothing that can be read answered there in time") from None

    def _connection(self, url: SplitResult, end: float) -> "_Pinned":
        host, port = str(url.hostname), url.port or PORTS[url.scheme]
        try:
            addresses = self.resolve(host, port)
        except (OSError, UnicodeError):
            raise refused("its name is not known") from None
        if not addresses or not all(map(self.is_allowed, addresses)):
            raise Problem("forbidden", "url: only public addresses are fetched from")
        kind = _Pinned if url.scheme == "http" else _PinnedTls
        return kind(host, port, address=addresses[0], end=end)

    def _read(self, response: http.client.HTTPResponse, end: float) -> bytes:
        received = bytearray()
        while chunk := response.read1(CHUNK_BYTES):
            received += chunk
            if len(received) > self.max_bytes:
                raise Problem("body-too-large", f"url: more than the {self.max_bytes} bytes that are taken")
        if time.monotonic() > end:
            raise refused("it did not arrive in time")
        return bytes(received)


class _Pinned(http.client.HTTPConnection):
    """To one address, whatever its name resolves to by now. `end` is a time of `time.monotonic`."""

    wire: socket.socket | None = None
    """Stays when http.client has handed `sock` over to a response."""

    def __init__(self, host: str, port: int, *, address: str, end: float) -> None:
        super().__init__(host, port)
        self._address, self._end = address, end

    def connect(self) -> None:
        self.sock = self.wire = socket.create_connection((self._address, self.port), self._left())
        self.sock.settimeout(self._left())

    def _left(self) -> float:
        """Seconds. Raises TimeoutError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _PinnedTls(_Pinned):
    """The certificate is held against the name, not against the address."""

    def connect(self) -> None:
        super().connect()
        context = ssl.create_default_context()
        # The handshake comes when there is something that can be broken off.
        self.sock = self.wire = context.wrap_socket(
            self.sock, server_hostname=self.host, do_handshake_on_connect=False
        )
        self.sock.settimeout(self._left())
        self.sock.do_handshake()


@contextmanager
def broken_off_at(end: float, connection: _Pinned) -> Iterator[None]:
    """The connection within the block does not outlive `end`, however often a byte comes."""

    def break_off() -> None:
        if connection.wire is not None:
            with suppress(OSError):
                # Not the method of TLS, after which what comes would be read as plain text.
                socket.socket.shutdown(connection.wire, socket.SHUT_RDWR)

    timer = threading.Timer(end - time.monotonic(), break_off)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _checked(url: str, ports: frozenset[int]) -> SplitResult:
    """Parts of a URL that may be asked. Raises Problem."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise refused("it is no URL") from None
    if len(url) > MAX_URL or not url.isascii() or not url.isprintable() or " " in url:
        raise refused(f"expected at most {MAX_URL} visible ASCII characters")
    if parts.scheme not in PORTS or not parts.hostname:
        raise refused("expected http:// or https:// and a host")
    if "@" in parts.netloc:
        raise refused("credentials in it are not used")
    if port not in (None, *ports):
        raise Problem(
            "forbidden", f"url: only the ports {', '.join(map(str, sorted(ports)))} are fetched from"
        )
    return parts


def refused(why: str) -> Problem:
    """What a caller is told of a URL."""
    return Problem("invalid-option", f"url: {why}")
