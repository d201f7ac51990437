"""The server for a long time, with too much, and with broken files: what it answers, and what it holds.

    python bench/soak.py --json FILE
    python bench/soak.py --parts mixed --minutes 2

`overload`    requests at ten times what 16 callers got answered, for `--overload-seconds`; then 16 callers
              again, second by second. Refusals are 429; nothing else may be refused or fail, not with 503
              either, since nothing is killed and no model replaced here, and
              `recovered_seconds` is how long it took to be back at 0.9 of the speed before.
`mutations`   `--files` broken images of bench/mutations.py over HTTP: only 2xx and 4xx may come back.
`schema`      schemathesis (`--schemathesis PROGRAM`) against /openapi.json: no 5xx, no answer that the
              document does not allow.
`mixed`       for `--minutes`: images of 64 pixels a side to 4 megapixels and broken ones at the same time.
              `slope_mb_per_hour` is that of a line through the resident memory of the server's processes,
              minute by minute, its first fifth left out, and `slope_error` its standard error, which
              is large where what is under way differs much from minute to minute; what many processes
              share is counted in each. More than 500 of all processes together, over at least 10 minutes
              and clearly (by two errors), is a leak and a finding; what is less or shorter is told only,
              since caches fill and arenas grow in the first minutes.

All parts talk to one server with photo-tiny-x4, the fastest that comes along, so that most of what happens is
the server's own. Exits 1 if anything happened that may not.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import mutations  # noqa: E402
from bench.bulk import Pictures, photo_folders  # noqa: E402
from bench.measured import rounded, say, write  # noqa: E402
from bench.serve import Files  # noqa: E402
from bench.serving.load import Running, find_k6, kdsr_server, send  # noqa: E402
from kdsr import plots, provenance  # noqa: E402

MODEL, SIDE, CROWD = "photo-tiny-x4", 256, 16
ALL_SIDES = (64, 128, 256, 512, 1024, 2048)
PARTS = ("overload", "mutations", "schema", "mixed")
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    *("response_schema_conformance", "response_headers_conformance"),
)
"""Of schemathesis: what an answer may be. Whether a request should have been accepted is not asked."""
RECOVERED = 0.9
"""Share of the speed before."""
TIMES_TOO_MUCH = 10
LEAK_MB_PER_HOUR, LEAK_SECONDS = 500.0, 600.0
"""What is a leak: a steeper slope than the first over at least the second."""
LOOK_SECONDS, LEAST_MINUTES = 2.0, 3
"""Between two looks; and how many minutes it takes to tell a slope."""

TITLE = "Serving: too much, broken files, a long time"
REMARKS = [
    "One server. `answered` with an image, `refused` with 429, or 4xx for a broken file; of `failed` "
    "there must be none. `recovered_seconds` after ten times the load that it can take; `slope_mb_per_hour` "
    "of resident memory under mixed traffic, with its standard error. What each row is: bench/soak.py."
]


@dataclass(frozen=True)
class Slope:
    """Of a line through the minutes."""

    mb_per_hour: float
    error: float
    """Of it, one standard deviation."""

    def row(self) -> dict[str, float]:
        """For a table."""
        return {"slope_mb_per_hour": self.mb_per_hour, "slope_error": self.error}


def _slope(minutes: Sequence[Mapping[str, float]], part: str) -> Slope:
    hours = np.array([row["minute"] for row in minutes]) / 60
    values = np.array([row[part] for row in minutes])
    line = np.polyfit(hours, values, 1)
    left = values - np.polyval(line, hours)
    spread = float(np.sum((hours - hours.mean()) ** 2))
    return Slope(float(line[0]), float(np.sqrt(np.sum(left**2) / (len(hours) - 2) / spread)))


@dataclass
class Memory:
    """Resident megabytes over time, looked at in a thread."""

    server: Running
    seen: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.seen.append((time.monotonic(), self.server.resident_mb()))

    def slopes(self) -> dict[str, Slope]:
        """Of each kind of process, and of all."""
        minutes = self.minutes()
        # The first fifth is not steady yet.
        steady = minutes[-(-len(minutes) // 5) :]
        if len(steady) < LEAST_MINUTES:
            return {}
        return {part: _slope(steady, part) for part in steady[-1] if part != "minute"}

    def minutes(self) -> list[dict[str, float]]:
        """Megabytes of each kind of process and of all, on the average of each whole minute."""
        found = []
        for number in range(int((self.seen[-1][0] - self.seen[0][0] + 2 * LOOK_SECONDS) // 60)):
            began = self.seen[0][0] + 60 * number
            rows = [row for at, row in self.seen if began <= at < began + 60]
            means = {part: float(np.mean([row.get(part, 0.0) for row in rows])) for part in self.seen[-1][1]}
            found.append({"minute": number + 0.5, **means, "all": sum(means.values())})
        return found

    def leak(self) -> str | None:
        """A sentence if it is clear that there is one."""
        slopes = self.slopes()
        if not slopes or self.seen[-1][0] - self.seen[0][0] < LEAK_SECONDS:
            return None
        slope = slopes["all"]
        if slope.mb_per_hour <= max(LEAK_MB_PER_HOUR, 2 * slope.error):
            return None
        each = ", ".join(f"{part} {of.mb_per_hour:.0f}" for part, of in slopes.items())
        return f"memory grows by {slope.mb_per_hour:.0f} MB/h, more than {LEAK_MB_PER_HOUR:.0f}: {each}"

    def row(self) -> dict[str, Any]:
        """For a table."""
        totals = [sum(row.values()) for _, row in self.seen]
        slope = self.slopes().get("all")
        return {
            "first_mb": totals[0],
            "last_mb": totals[-1],
            "peak_mb": max(totals),
            **({} if slope is None else slope.row()),
        }

    def figure(self) -> bytes:
        """A PNG of megabytes over minutes, of each kind of process."""
        minutes = np.array([at - self.seen[0][0] for at, _ in self.seen]) / 60
        lines = [
            plots.Line(part, minutes, np.array([[row.get(part, 0.0) for _, row in self.seen]]))
            for part in sorted(self.seen[-1][1])
        ]
        return plots.levels(lines, time="minutes of mixed traffic", quantity="resident megabytes")


class Soak:
    """The parts, each with its rows; what may not happen is a finding."""

    def __init__(self, server: Running, files: Files, arguments: argparse.Namespace) -> None:
        self._server, self._files, self._arguments = server, files, arguments
        self._k6 = None if set(arguments.parts) <= {"mutations", "schema"} else find_k6(arguments.k6)
        self.rows: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}
        self.findings: list[str] = []

    def run(self) -> None:
        """Those that were asked for."""
        for part in self._arguments.parts:
            getattr(self, f"_{part}")()
            if self._server.process.poll() is not None or self._server.get("/readyz") != 200:
                self.findings.append(f"the server is not ready after {part}")

    def _row(self, part: str, **fields: Any) -> None:
        self.rows.append({"part": part, **fields})
        say(json.dumps(rounded(self.rows[-1])))

    def _send(self, *streams: Any) -> Any:
        assert self._k6 is not None
        return send(self._k6, self._server.url, streams)

    def _overload(self) -> None:
        crowd = self._files.stream("crowd", [SIDE], seconds=8, users=CROWD, warm=3)
        before = self._send(crowd)["crowd"]
        much = self._files.stream(
            "much",
            [SIDE],
            seconds=self._arguments.overload_seconds,
            users=1000,
            rate=TIMES_TOO_MUCH * before.requests_s,
            patient=False,
        )
        with Memory(self._server) as memory:
            during = self._send(much)["much"]
        recovered = self._recovered(RECOVERED * before.requests_s)
        self.found |= {"overload": during.row(), "recovered_seconds": recovered}
        if during.failed:
            self.findings.append(f"overload: {during.statuses}")
        if recovered is None:
            self.findings.append("overload: the speed of before did not come back")
        self._row("before", **before.row())
        self._row("overload", **during.row(), recovered_seconds=recovered, **memory.row())

    def _recovered(self, wanted: float) -> float | None:
        """Seconds until `wanted` requests a second were seen to be answered; None after a minute without."""
        began = time.perf_counter()
        while time.perf_counter() - began < 60:
            stream = self._files.stream("again", [SIDE], seconds=3, users=CROWD, warm=0.5)
            if self._send(stream)["again"].requests_s >= wanted:
                return time.perf_counter() - began
        return None

    def _mutations(self) -> None:
        cases = list(mutations.cases(self._arguments.files, seed=0))
        with Memory(self._server) as memory, ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(lambda case: (case, self._status(case.data)), cases))
        statuses = Counter(str(status) for _, status in outcomes)
        bad = [f"mutations: {case.name}: {status}" for case, status in outcomes if not 200 <= status < 500]
        self.findings += bad
        self.found["mutations"] = {"files": len(cases), "statuses": dict(sorted(statuses.items()))}
        answered = sum(number for status, number in statuses.items() if status.startswith("2"))
        refused = sum(number for status, number in statuses.items() if status.startswith("4"))
        self._row(
            "mutations",
            requests=len(cases),
            answered=answered,
            refused=refused,
            failed=len(bad),
            **memory.row(),
        )

    def _status(self, data: bytes) -> int:
        """Of POST /v1/upscale; 0 when there was no answer."""
        place = urlsplit(self._server.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
        try:
            connection.request("POST", "/v1/upscale", data, {"Content-Type": "image/unknown"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def _schema(self) -> None:
        if self._arguments.schemathesis is None:
            say("schema: left out; name the program: --schemathesis PROGRAM")
            return
        command = [str(self._arguments.schemathesis), "run", f"{self._server.url}/openapi.json"]
        command += ["--checks", ",".join(CHECKS), "--continue-on-failure"]
        command += ["--max-examples", str(self._arguments.examples), "--request-timeout", "60"]
        command += ["--suppress-health-check", "all", "--generation-deterministic"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        words = done.stdout.splitlines()
        if done.returncode:
            self.findings.append("schema: " + "\n".join(words[-80:]) + done.stderr[-500:])
        self.found["schema"] = [line for line in words if "Test cases" in line or "generated" in line]
        self._row("schema", failed=int(done.returncode != 0))

    def _mixed(self) -> None:
        seconds = 60 * self._arguments.minutes
        streams = [
            self._files.stream("mixed", ALL_SIDES, count=12, seconds=seconds, users=6),
            self._files.stream("small", [64, 96, 128], seconds=seconds, users=50, rate=3.0),
        ]
        ended = threading.Event()
        with Memory(self._server) as memory, ThreadPoolExecutor(1) as pool:
            broken = pool.submit(self._broken, ended)
            answers = self._send(*streams)
            ended.set()
            statuses = broken.result()
        for name, each in answers.items():
            self._row(name, minutes=self._arguments.minutes, **each.row())
            self.findings += [f"mixed: {name}: {each.statuses}"] if each.failed else []
        bad = {status: number for status, number in statuses.items() if not 200 <= status < 500}
        self.findings += [f"mixed: broken files: {bad}"] if bad else []
        self.findings += [f"mixed: {leak}"] if (leak := memory.leak()) else []
        self.found |= {"soak_minutes": self._arguments.minutes}
        self.found["memory_mb"] = [rounded(row) for row in memory.minutes()]
        self._row("broken", requests=statuses.total(), failed=sum(bad.values()))
        self._row("memory", minutes=self._arguments.minutes, **memory.row())
        for part, slope in memory.slopes().items():
            if part in ("replica", "entrance", "proxy"):
                self._row(f"memory of the {part}", **slope.row())
        if self._arguments.figure:
            self._arguments.figure.write_bytes(memory.figure())

    def _broken(self, ended: threading.Event) -> Counter[int]:
        """How often each status came back to one broken file after the other."""
        statuses: Counter[int] = Counter()
        for case in _endless_cases():
            if ended.wait(0.5):
                break
            statuses[self._status(case.data)] += 1
        return statuses


def _endless_cases() -> Iterator[mutations.Case]:
    for seed in count(1):
        yield from mutations.cases(600, seed=seed)


def main() -> int:
    """Do it, print the JSON, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--parts", default=",".join(PARTS), type=_parts, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=20.0, help="of mixed traffic (default 20)")
    parser.add_argument("--files", type=int, default=2400, help="broken ones (default 2400)")
    parser.add_argument("--overload-seconds", type=float, default=10.0, help="of ten times too much")
    parser.add_argument("--examples", type=int, default=50, help="of schemathesis for each operation")
    parser.add_argument("--schemathesis", type=Path, help="the program; left out when not given")
    parser.add_argument("--figure", type=Path, help="draw the memory under mixed traffic into this PNG")
    parser.add_argument("--k6", type=Path, help="the program; looked for when not given")
    arguments = parser.parse_args()
    config = {"models": {"tiny": [MODEL]}}
    with tempfile.TemporaryDirectory() as folder, kdsr_server(config) as server:
        say(f"ready after {server.startup_seconds:.1f} s")
        soak = Soak(server, Files(Path(folder), Pictures(photo_folders([]))), arguments)
        soak.run()
    content = {"title": TITLE, "remarks": REMARKS, "model": MODEL, "findings": soak.findings}
    content |= rounded(soak.found) | {"rows": [rounded(row) for row in soak.rows]} | provenance.stamp()
    write(content, arguments.json)
    return 1 if soak.findings else 0


def _parts(text: str) -> Sequence[str]:
    parts = text.split(",")
    if unknown := set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"no part {', '.join(sorted(unknown))}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
