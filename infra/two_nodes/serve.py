"""A Ray cluster of two nodes on this machine: a head and a worker, each with its own raylet, behind a token.

    python infra/two_nodes/serve.py

prints what to export and serves until Ctrl-C. Tests use `two_nodes`. Knows nothing of kdsr.
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from infra.local import HOST, free_ports, serve

START_SECONDS, ATTEMPTS = 200, 3
STOP_SECONDS = 40
JOB_STOP_SECONDS = 60
"""What a driver has to write its last checkpoint when its job is stopped; Ray alone would give it three."""
OBJECT_STORE_BYTES = 256 * 2**20
SHORT_FOLDER = "/tmp"  # noqa: S108 - Ray's sockets lie below, and the kernel takes no path of over 107 bytes


@dataclass(frozen=True)
class TwoNodes:
    """A running cluster, and what opens it."""

    dashboard_url: str
    gcs_address: str
    token_path: Path

    @property
    def environment(self) -> dict[str, str]:
        """What `ray job submit`, and a driver that joins from this machine, need to find the cluster."""
        return {
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            "RAY_ADDRESS": self.gcs_address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
        }

    def num_nodes(self) -> int:
        """How many nodes are alive; 0 while nothing answers."""
        request = urllib.request.Request(  # noqa: S310 - our own address
            f"{self.dashboard_url}/nodes?view=summary",
            headers={"Authorization": f"Bearer {self.token_path.read_text()}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
                nodes = json.load(answer)["data"]["summary"]
        except (urllib.error.URLError, OSError, ValueError, KeyError):
            return 0
        return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


@contextlib.contextmanager
def two_nodes(
    *,
    num_cpus: tuple[int, int] = (2, 2),
    dashboard_port: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[TwoNodes]:
    """Run the cluster until the block ends; then nothing of it is left, neither processes nor files.

    `num_cpus` is what head and worker announce, whatever the machine has. Jobs see `environment`, by default
    this process's. Ports are free ones but for `dashboard_port` where given. Raises RuntimeError when it
    cannot start, with its last words.
    """
    with tempfile.TemporaryDirectory(
        prefix="kdsr-ray-", dir=SHORT_FOLDER, ignore_cleanup_errors=True
    ) as name:
        folder = Path(name)
        head, worker = (
            _ports(("port", "dashboard-port", "ray-client-server-port"), dashboard_port),
            _ports(()),
        )
        cluster = TwoNodes(
            f"http://{HOST}:{head['dashboard-port']}", f"{HOST}:{head['port']}", folder / "token"
        )
        cluster.token_path.touch(mode=0o600)
        cluster.token_path.write_text(secrets.token_hex(32))
        given = _environment(os.environ if environment is None else environment, cluster)
        nodes: list[subprocess.Popen[bytes]] = []
        try:
            for number, flags in enumerate((_head(folder, head), _worker(cluster, worker))):
                command = [*_ray_start(), *flags, f"--num-cpus={num_cpus[number]}"]
                nodes.append(_started(command, given, cluster, num_nodes=number + 1))
            yield cluster
        finally:
            _stop(*nodes)


def _ports(names: Sequence[str], dashboard_port: int | None = None) -> dict[str, int]:
    """A free port for each part of a node by the name of its flag; `names` are those of a head."""
    agents = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")
    return free_ports((*names, *agents, "metrics-export-port"), {"dashboard-port": dashboard_port})


def _environment(given: Mapping[str, str], cluster: TwoNodes) -> dict[str, str]:
    """`given` as the nodes and their jobs get it: this Python, this token, no other cluster."""
    ours = {
        name: value for name, value in given.items() if name not in {"RAY_AUTH_TOKEN", *cluster.environment}
    }
    return ours | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{given.get('PATH', os.defpath)}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token_path),
        "RAY_JOB_STOP_WAIT_TIME_S": given.get("RAY_JOB_STOP_WAIT_TIME_S", str(JOB_STOP_SECONDS)),
    }


def _ray_start() -> Iterator[str]:
    yield from (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
    yield from (f"--node-ip-address={HOST}", f"--object-store-memory={OBJECT_STORE_BYTES}")
    # Any free ports: the default range is the same for every node, and two nodes of one machine share it.
    yield from ("--min-worker-port=0", "--max-worker-port=0")


def _head(folder: Path, ports: Mapping[str, int]) -> Iterator[str]:
    yield from ("--head", f"--temp-dir={folder}", f"--dashboard-host={HOST}")
    yield from (f"--{name}={port}" for name, port in ports.items())


def _worker(cluster: TwoNodes, ports: Mapping[str, int]) -> Iterator[str]:
    yield f"--address={cluster.gcs_address}"
    yield from (f"--{name}={port}" for name, port in ports.items())


def _started(
    command: Sequence[str], environment: Mapping[str, str], cluster: TwoNodes, *, num_nodes: int
) -> "subprocess.Popen[bytes]":
    """One node, when as many are alive; begun again when Ray gives up, as it does on a busy machine."""
    log = cluster.token_path.with_name("log")
    for _ in range(ATTEMPTS):
        with log.open("wb") as output:
            # In a group of its own, so that Ctrl-C reaches this program first.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=log.parent,
                process_group=0,
            )
        try:
            if _is_there(num_nodes, cluster, process):
                return process
        except BaseException:
            _stop(process)
            raise
        _stop(process)
    last_words = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"node {num_nodes} did not start:\n{last_words}")


def _is_there(num_nodes: int, cluster: TwoNodes, process: "subprocess.Popen[bytes]") -> bool:
    """Wait until that many nodes are alive; False when the newest ends, or does not come."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if cluster.num_nodes() >= num_nodes:
            return True
        time.sleep(0.2)
    return False


def _stop(*nodes: "subprocess.Popen[bytes]") -> None:
    """End nodes; `ray start` ends the processes that it began, and whoever is left goes with its group."""
    for node in nodes:
        node.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for node in nodes:
        try:
            node.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            print("a node did not stop by itself and is killed", file=sys.stderr)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(
        description="Run a Ray cluster of two nodes on this machine until Ctrl-C."
    )
    parser.add_argument(
        "--port", type=int, default=8266, help="port of dashboard and job server (default 8266)"
    )
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each node announces (default 2)")
    arguments = parser.parse_args()
    cluster = two_nodes(num_cpus=(arguments.cpus,) * 2, dashboard_port=arguments.port)
    serve(cluster, lambda _: "two nodes are there; Ctrl-C stops them")


if __name__ == "__main__":
    main()
