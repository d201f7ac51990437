"""What servers on this machine have in common: free ports, and a program that serves until it is stopped."""

import contextlib
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

HOST = "127.0.0.1"
UNASKED_PORTS = range(20_000, 32_768)
"""Below those that systems hand out by themselves, and above those of Ray's workers, so that a port that is
free when it is chosen still is when its server comes up."""


class Server(Protocol):
    """Something that runs, and what others need to find it."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables to export."""
        ...


ServerT = TypeVar("ServerT", bound=Server)


def free_ports(names: Iterable[str], wanted: Mapping[str, int | None] | None = None) -> dict[str, int]:
    """A port for each name: the `wanted` one, or a free one. Raises RuntimeError for one that is taken."""
    with contextlib.ExitStack() as sockets:
        ports = {}
        for name in names:
            free = sockets.enter_context(socket.socket())
            # A port on which the last server's connections fade away can be used again.
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(free, (wanted or {}).get(name))
            ports[name] = free.getsockname()[1]
    return ports


def free_port() -> int:
    """One that nobody listens on now."""
    return free_ports(("any",))["any"]


def _bind(free: socket.socket, port: int | None) -> None:
    for each in [port] if port else random.sample(UNASKED_PORTS, 100):
        try:
            return free.bind((HOST, each))
        except OSError as error:
            cause = error.strerror
    raise RuntimeError(f"port {port or 'of any number'}: {cause}; choose another with --port") from None


def serve(server: AbstractContextManager[ServerT], ready: Callable[[ServerT], str]) -> None:
    """Print what to export and what `ready` says, then serve until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with server as running:
            sentence = ready(running)
            for name, value in running.environment.items():
                print(f"export {name}={value}")
            print(f"# {sentence}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    except (OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
