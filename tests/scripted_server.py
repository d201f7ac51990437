"""A server that says what it is told to, and clients' patience with it."""

import socketserver
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

from kdsr.client import Retries

IMPATIENT = Retries(patience_seconds=20, first_seconds=0.01, longest_seconds=0.02)


@dataclass
class Scripted:
    """A server that gives these answers, raw bytes each, one to a connection; then it is silent."""

    answers: list[bytes]
    address: str = ""
    requests: list[str] = field(default_factory=list)
    """Head of each request that came, in lower case."""
    bodies: list[bytes] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self):
        script = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    head += self.rfile.readline()
                text = head.decode().lower()
                length = next(
                    (line[15:] for line in text.splitlines() if line.startswith("content-length:")), "0"
                )
                script.bodies.append(self.rfile.read(int(length)))
                script.requests.append(text)
                if script.answers:
                    self.wfile.write(script.answers.pop(0))
                else:
                    script.over.wait(60)

        with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            self.address = f"http://127.0.0.1:{server.server_address[1]}"
            try:
                yield self
            finally:
                self.over.set()
                server.shutdown()
                thread.join()


def answer(status, body=b"", **headers):
    """An answer in full."""
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
