"""Bulk runs that are hit by faults, and what is left of them.

    python bench/faults.py --trials 20 --json FILE
    python bench/faults.py --quick --kind driver --kind away --seed 7

A trial starts jobs/upscale.py on a few dozen images of several formats, and something happens at a random
moment: the same one for the same `--seed`, as far as the machine is equally fast.

`driver`  the process that was started is killed with signal 9; its Ray cluster must go with it.
`actor`   the upscaling actor is killed with signal 9, once or twice.
`node`    one of two Ray nodes on this machine is killed with signal 9, workers included. In every other trial
          another node joins some seconds later.
`flaky`   5 % of all requests to the S3 server fail: error 500, reset, no answer, half a body; each before or
          after the server saw the request.
`away`    the S3 server refuses connections for a minute (8 s with `--quick`).
`disk`    the disk of the results becomes full. Needs the right to mount a file system; left out without it.

When the job did not finish, the same command is run again. Then every result must be there once and byte for
byte as an undisturbed run writes it, nothing else may lie there (temporary files and parts of uploads
included), listed = done + skipped + failed must hold, every start must have left with the truth, and no
process of it may live on. Prints a line for each trial and leaves with 1 when one of them went wrong.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.bulk import CORES, OnlyThisServer, Pictures, photo_folders, processes  # noqa: E402
from bench.measured import write  # noqa: E402
from infra.local_s3.serve import LocalS3, local_s3  # noqa: E402
from infra.local_s3.unreliable import UnreliableS3  # noqa: E402
from kdsr import codecs, provenance  # noqa: E402
from kdsr.image import Frame, Image  # noqa: E402
from kdsr.store import open_store  # noqa: E402

BUCKET = "kdsr-faults"
LIMIT_SECONDS = 240
"""A start that takes longer hangs."""
ORPHAN_SECONDS = 120
"""Ray's agents of a killed node look for it for about a minute before they leave."""
SHARE = 0.05
QUICK_TIMEOUTS = ("--store.read_timeout_seconds", "2", "--store.connect_timeout_seconds", "2")


# ---------------------------------------------------------------- inputs

BAD = {"cut.png": "corrupt", "notes.txt": "unsupported"}


def inputs(count: int) -> Iterator[tuple[str, bytes]]:
    """`count` images in several formats and two files that are none, the same ones every time."""
    pictures = Pictures(photo_folders([]))
    draw = np.random.default_rng(0)
    for index in range(count - len(BAD)):
        height, width = draw.integers(120, 400, 2)
        name, data = _encoded(index, pictures.cut(index, int(height), int(width)))
        yield f"{'deep er/' if index % 3 else ''}{name}", data
    yield "cut.png", _encoded(1, pictures.cut(0, 200, 200))[1][:2000]
    yield "notes.txt", b"not an image"


def _encoded(index: int, pixels: np.ndarray) -> tuple[str, bytes]:
    """A name and a file; every sixth of a kind."""
    kinds = ("jpeg", "png", "jpeg", "webp", "tiff", "jpeg", "png16", "rgba", "jpeg", "gif")
    kind = kinds[index % len(kinds)]
    buffer = io.BytesIO()
    if kind == "png16":
        deep = pixels.astype(np.uint16) * 257
        return f"p{index:03}.png", codecs.encode(Image(deep), format="png")
    if kind == "gif":
        frames = [Frame(Image(np.roll(pixels[:100, :100], shift, 0)), 0.1) for shift in (0, 9)]
        return f"p{index:03}.gif", codecs.encode_frames(frames, format="gif", loop=0)
    if kind == "rgba":
        alpha = np.broadcast_to(np.arange(pixels.shape[1]) % 256, pixels.shape[:2]).astype(np.uint8)
        PIL.Image.fromarray(np.dstack([pixels, alpha])).save(buffer, "PNG", compress_level=1)
        return f"p{index:03}.png", buffer.getvalue()
    PIL.Image.fromarray(pixels).save(buffer, kind.upper(), quality=90)
    return f"p{index:03}.{ {'jpeg': 'jpg', 'tiff': 'tif'}.get(kind, kind) }", buffer.getvalue()


# ---------------------------------------------------------------- one start of the job


class Job:
    """`jobs/upscale.py` as a process of its own."""

    def __init__(self, flags: list[str], *, scratch: Path, environment: dict[str, str]) -> None:
        scratch.mkdir(exist_ok=True)
        self._log = scratch / f"log-{time.monotonic_ns()}"
        # Ray keeps its files below TMPDIR too, so that nothing of it stays.
        kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/upscale.py", *flags],
                cwd=ROOT,
                env=kept | {"TMPDIR": str(scratch)} | environment,
                stdout=log,
                stderr=log,
            )
        self.began = time.monotonic()
        self.family: dict[int, str] = {}
        """Its processes when it was killed."""

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    @property
    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def sleep(self, seconds: float) -> bool:
        """Wait; whether the job still runs then."""
        end = time.monotonic() + seconds
        while self.runs and time.monotonic() < end:
            time.sleep(min(0.02, max(0.0, end - time.monotonic())))
        return self.runs

    def wait_for(self, found: Callable[[], Any]) -> Any:
        """What `found` returns when it is something, or None when the job ended before."""
        while self.runs and self.seconds < LIMIT_SECONDS:
            if something := found():
                return something
            time.sleep(0.05)
        return None

    def kill(self) -> None:
        """Signal 9 for the driver alone."""
        self.family = started_times(pid for pid, _, _ in processes(self.process.pid))
        self.process.kill()
        self.process.wait()

    def wait(self) -> int | None:
        """The exit status; None when it had to be ended because it hung."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(max(1.0, LIMIT_SECONDS - self.seconds))
        self.kill()
        end_all(self.family)
        return None

    def said(self) -> str:
        """The last lines of its output."""
        return self._log.read_text(errors="replace")[-1500:].strip()


def started_times(pids: Iterator[int]) -> dict[int, str]:
    """When each process began, which tells it from a later one with the same number."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError, IndexError):
            found[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return found


def living(family: dict[int, str]) -> dict[int, str]:
    """Those of `family` that are still there and no zombies."""
    now = started_times(iter(family))
    return {pid: start for pid, start in now.items() if start == family[pid] and not _is_zombie(pid)}


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def settle(trial: "Trial", families: list[tuple[float, dict[int, str]]]) -> None:
    """Count the processes of killed jobs that live on for long, and end them."""
    for killed, family in families:
        while (left := living(family)) and time.monotonic() < killed + ORPHAN_SECONDS:
            time.sleep(0.1)
        trial.orphans += len(left)
        end_all(left)
    trial.expect(not trial.orphans, f"{trial.orphans} processes lived on")


def end_all(family: dict[int, str]) -> None:
    """Signal 9 for each that is still there."""
    for pid in living(family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def actors(root: int) -> list[int]:
    """Upscaling actors below a process."""
    return [pid for pid, line, _ in processes(root) if "UpscaleActor" in line]


# ---------------------------------------------------------------- one trial


@dataclass
class Trial:
    """What was done and what came of it."""

    number: int
    kind: str
    store: str
    """Where the results go: s3 or file."""
    what: str = ""
    """What happened, in words."""
    faults: dict[str, int] = field(default_factory=dict)
    exits: list[int | None] = field(default_factory=list)
    """Status of each start; None for one that hung, -9 for one that was killed."""
    said: list[str] = field(default_factory=list)
    """Last line of each start that ended without a report."""
    finished_itself: bool = False
    kept: int = 0
    """Results that the second start did not do again."""
    results: int = 0
    """Compared with the undisturbed run."""
    missing: int = 0
    different: int = 0
    extra: int = 0
    """Objects that nobody asked for, temporary files and parts of uploads."""
    orphans: int = 0
    wrong: list[str] = field(default_factory=list)
    """Everything that was not as it has to be."""
    seconds: float = 0.0

    def expect(self, is_so: bool, otherwise: str) -> None:
        """Note what is wrong unless it `is_so`."""
        if not is_so:
            self.wrong.append(otherwise)

    def line(self) -> str:
        """For the person who watches."""
        verdict = "WRONG: " + "; ".join(self.wrong) if self.wrong else "ok"
        again = "" if self.finished_itself else f", second start kept {self.kept}"
        return (
            f"{self.number:2} {self.kind:<6} {self.store:<4} {self.what}{again}; exits {self.exits}; "
            f"{self.results} results, {self.missing} missing, {self.different} different, "
            f"{self.extra} extra: {verdict} ({self.seconds:.0f} s)"
        )


class Lab:
    """The server, the inputs, and what an undisturbed run makes of them."""

    def __init__(self, server: LocalS3, folder: Path, *, images: int, quick: bool) -> None:
        self.server, self.folder, self.quick = server, folder, quick
        self.environment: dict[str, str] = {}
        """Settings of the jobs that are tried, beside those of this process."""
        server.make_bucket(BUCKET)
        files = dict(inputs(images))
        for prefix in ("good", "mixed"):
            store = open_store(f"s3://{BUCKET}/{prefix}")
            for key, data in files.items():
                if prefix == "mixed" or key not in BAD:
                    store.put(key, data)
        output = f"s3://{BUCKET}/undisturbed"
        flags = ["--input", f"s3://{BUCKET}/mixed", "--output", output, "--model", "photo-x4"]
        job = Job(flags, scratch=folder / "undisturbed", environment={})
        job.wait_for(lambda: actors(job.process.pid))
        self.start_seconds = job.seconds
        code, self.seconds = job.wait(), job.seconds
        report = report_of(output)
        if code != 1 or not report or report["failed"] != len(BAD):
            raise SystemExit(f"error: the undisturbed run left with {code}:\n{job.said()}")
        self.precision = report["precision"]
        results = results_of(output)
        assert results.keys() == files.keys() - BAD.keys()
        self.hashes = {key: _digest(data) for key, data in results.items()}
        self.bytes = sum(map(len, results.values()))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_record(key: str) -> bool:
    return key.startswith("_kdsr/")


def results_of(output: str) -> dict[str, bytes]:
    """Every result by its key."""
    store = open_store(output)
    return {info.key: store.get(info.key) for info in store.list() if not _is_record(info.key)}


def report_of(output: str) -> dict[str, Any] | None:
    """The report of the run that ended last, None while there is none."""
    store = open_store(output)
    keys = [info.key for info in store.list("_kdsr/runs/") if info.key.endswith("/report.json")]
    assert len(keys) <= 1, keys
    return json.loads(store.get(keys[0])) if keys else None


class TooLateError(Exception):
    """The job ended before anything happened to it."""


class Scene:
    """One trial while it goes on: what faults may touch."""

    def __init__(self, lab: Lab, trial: Trial, *, seed: int, attempt: int) -> None:
        self.lab, self.trial = lab, trial
        self.draw = random.Random(f"{seed}-{trial.number}")
        self.share = 0.5**attempt
        """Of the time that moments are drawn from; less after one that came too late."""
        name = f"t{trial.number}-{attempt}"
        self.folder = lab.folder / name
        self.folder.mkdir()
        self.has_bad = trial.number % 2 == 1
        self.source = f"s3://{BUCKET}/{'mixed' if self.has_bad else 'good'}"
        self.output = f"s3://{BUCKET}/{name}" if trial.store == "s3" else f"file://{self.folder}/out"
        self.flags = ["--precision", lab.precision]
        self.environment = dict(lab.environment)
        self.killed: list[tuple[float, dict[int, str]]] = []
        """When processes were killed, and which there were beside them."""

    @property
    def scratch(self) -> Path:
        """Where the job and Ray keep temporary files."""
        return self.folder / "tmp"

    def start(self) -> Job:
        """Start the job; the same command every time."""
        command = ["--input", self.source, "--output", self.output, "--model", "photo-x4", *self.flags]
        return Job(command, scratch=self.scratch, environment=self.environment)

    def moment(self, *, first: float, last: float) -> float:
        """A random number of seconds."""
        return self.draw.uniform(first, first + (last - first) * self.share)

    def end(self, job: Job) -> None:
        """Wait for a start to end, and hold its exit status against what it left behind."""
        code, report = job.wait(), report_of(self.output)
        self.trial.exits.append(code)
        if report is None:
            last_line = (job.said().splitlines() or [""])[-1]
            self.trial.said.append(last_line.replace(str(self.folder), "..."))
        is_whole = bool(report and report["failed"] == 0 and _adds_up(report))
        self.trial.expect(code in (0, 1), f"left with {code or 'nothing, it hung'}: {job.said()}")
        self.trial.expect((code == 0) == is_whole, f"left with {code}, the report says {_sums(report)}")

    def is_finished(self) -> bool:
        """Whether everything is done that can be done."""
        report = report_of(self.output)
        return bool(report and _adds_up(report) and report["failed"] == self.num_bad)

    @property
    def num_bad(self) -> int:
        """Inputs that must fail."""
        return len(BAD) if self.has_bad else 0

    def check(self) -> None:
        """Hold what is there against the undisturbed run."""
        trial, expected = self.trial, self.lab.hashes
        report = report_of(self.output)
        listed = len(expected) + self.num_bad
        trial.expect(bool(report and report["listed"] == listed), f"not {listed} listed: {_sums(report)}")
        trial.expect(self.is_finished(), f"not all that can be done is done: {_sums(report)}")
        found = {key: _digest(data) for key, data in results_of(self.output).items()}
        trial.results = len(found)
        trial.missing = len(expected.keys() - found.keys())
        trial.different = sum(found[key] != expected[key] for key in expected.keys() & found.keys())
        extra = sorted(found.keys() - expected.keys()) + list(self._left_over())
        trial.extra = len(extra)
        trial.expect(not trial.missing, f"{trial.missing} results are missing")
        trial.expect(not trial.different, f"{trial.different} results are different")
        trial.expect(not extra, f"should not be there: {', '.join(extra[:5])}")

    def _left_over(self) -> Iterator[str]:
        """Temporary files, and uploads that nobody will end."""
        if self.trial.store == "s3":
            prefix = self.output.removeprefix(f"s3://{BUCKET}/")
            uploads = self.lab.server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=f"{prefix}/")
            yield from (upload["Key"] for upload in uploads.get("Uploads", ()))
            return
        # Not only by the store, which does not show what is unfinished.
        known = {info.key for info in open_store(self.output).list()}
        root = self.folder / "out"
        files = (path for path in root.rglob("*") if path.is_file())
        yield from (str(path) for path in files if str(path.relative_to(root)) not in known)


def _adds_up(report: dict[str, Any]) -> bool:
    return report["listed"] == report["done"] + report["skipped"] + report["failed"]


def _sums(report: dict[str, Any] | None) -> str:
    names = ("listed", "done", "skipped", "failed")
    return ", ".join(f"{name} {report[name]}" for name in names) if report else "nothing"


# ---------------------------------------------------------------- faults
# Each starts the job, lets something happen and waits for its end. Whoever starts again and checks does that
# within the block, for what a fault made up (a cluster, a disk) must be there until then.


@contextmanager
def driver(scene: Scene) -> Iterator[None]:
    job = scene.start()
    moment = scene.moment(first=0.5, last=0.9 * scene.lab.seconds)
    if not job.sleep(moment):
        raise TooLateError
    job.kill()
    scene.trial.exits.append(job.process.returncode)
    scene.trial.what = f"driver killed after {moment:.1f} s"
    scene.trial.faults = {"kill": 1}
    scene.killed.append((time.monotonic(), job.family))
    yield


@contextmanager
def actor(scene: Scene) -> Iterator[None]:
    job = scene.start()
    kills = scene.draw.choice((1, 2))
    times = []
    for _ in range(kills):
        if not job.wait_for(lambda: actors(job.process.pid)):
            break
        job.sleep(scene.moment(first=0, last=(scene.lab.seconds - scene.lab.start_seconds) / kills))
        for pid in actors(job.process.pid):
            os.kill(pid, signal.SIGKILL)
            times.append(job.seconds)
    scene.end(job)
    if not times:
        raise TooLateError
    scene.trial.what = f"actor killed after {' and '.join(f'{time_:.1f}' for time_ in times)} s"
    scene.trial.faults = {"kill": len(times)}
    yield


@contextmanager
def node(scene: Scene) -> Iterator[None]:
    from ray.cluster_utils import Cluster

    half = max(1, CORES // 2)
    scene.scratch.mkdir()
    os.environ["RAY_TMPDIR"] = str(scene.scratch)
    cluster = Cluster()
    try:
        # One CPU is announced beside the cores, for the tasks that read; see cluster/session.py.
        nodes = [
            cluster.add_node(num_cpus=cpus, object_store_memory=100 * 2**20, include_dashboard=False)
            for cpus in (half + 1, half)
        ]
        scene.flags += ["--cluster.address", cluster.address, "--cluster.num_workers", "2"]
        job = scene.start()
        raylet = nodes[1].all_processes["raylet"][0].process.pid
        job.wait_for(lambda: actors(raylet))
        moment = scene.moment(first=0, last=scene.lab.seconds - scene.lab.start_seconds)
        if not job.sleep(moment):
            raise TooLateError
        scene.trial.what = f"node killed after {job.seconds:.1f} s"
        family = started_times(pid for pid, _, _ in processes(raylet))
        os.kill(raylet, signal.SIGKILL)
        end_all(family)
        scene.killed.append((time.monotonic(), family))
        scene.trial.faults = {"kill": 1}
        if scene.trial.number % 4 > 1:
            job.sleep(scene.draw.uniform(0, 5))
            cluster.add_node(num_cpus=half, object_store_memory=100 * 2**20, include_dashboard=False)
            scene.trial.what += f", another joined at {job.seconds:.1f} s"
        scene.end(job)
        yield
    finally:
        cluster.shutdown()
        del os.environ["RAY_TMPDIR"]


@contextmanager
def flaky(scene: Scene) -> Iterator[None]:
    seed = scene.draw.randrange(2**32)
    with UnreliableS3(scene.lab.server.endpoint_url, share=SHARE, seed=seed) as proxy:
        scene.environment = {"AWS_ENDPOINT_URL": proxy.endpoint_url}
        scene.flags += QUICK_TIMEOUTS
        scene.end(scene.start())
    scene.environment = {}
    scene.trial.faults = dict(sorted(proxy.counts.items()))
    scene.trial.what = f"{proxy.counts.total()} of {proxy.requests} requests failed {scene.trial.faults}"
    yield


@contextmanager
def away(scene: Scene) -> Iterator[None]:
    seconds = 8 if scene.lab.quick else 60
    with UnreliableS3(scene.lab.server.endpoint_url, share=0, seed=0) as proxy:
        scene.environment = {"AWS_ENDPOINT_URL": proxy.endpoint_url}
        job = scene.start()
        moment = scene.moment(first=0.5, last=0.8 * scene.lab.seconds)
        if not job.sleep(moment):
            raise TooLateError
        proxy.go_away()
        scene.trial.what = f"store away after {moment:.1f} s for {seconds} s"
        scene.trial.faults = {"away": 1}
        time.sleep(seconds)
        proxy.come_back()
        scene.end(job)
    scene.environment = {}
    yield


@contextmanager
def disk(scene: Scene) -> Iterator[None]:
    room = scene.draw.uniform(0.1, 0.9)
    with mounted(scene.folder / "out", kilobytes=int(room * scene.lab.bytes / 1024)) as grow:
        job = scene.start()
        scene.end(job)
        said = job.said() + str(report_of(scene.output))
        scene.trial.expect("the disk is full" in said, f"does not say that the disk is full: {said}")
        scene.trial.what = f"disk with room for {100 * room:.0f} % of the results"
        scene.trial.faults = {"full": 1}
        grow(10 * scene.lab.bytes // 1024)
        yield


@contextmanager
def mounted(folder: Path, *, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system in memory at `folder`, and what makes it larger. Raises CalledProcessError."""
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    mount(f"size={kilobytes}k")
    try:
        yield lambda size: mount(f"remount,size={size}k")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount() -> bool:
    """Whether this user may mount a file system."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted(Path(folder) / "m", kilobytes=64):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


FAULTS: dict[str, Callable[[Scene], AbstractContextManager[None]]] = {
    "driver": driver,
    "actor": actor,
    "node": node,
    "flaky": flaky,
    "disk": disk,
    "away": away,
}
WEIGHTS = ("driver", "actor", "node", "flaky", "driver", "actor", "disk", "node", "flaky", "away")
"""The kinds of ten trials: what happens more often is tried more often."""


# ---------------------------------------------------------------- all of it


def run_trial(lab: Lab, number: int, kind: str, *, store: str, seed: int) -> tuple[Trial, Scene]:
    """Let the fault happen, start again if need be, and check."""
    for attempt in range(4):
        trial, began = Trial(number, kind, store), time.monotonic()
        scene = Scene(lab, trial, seed=seed, attempt=attempt)
        try:
            with FAULTS[kind](scene):
                trial.finished_itself = scene.is_finished()
                if not trial.finished_itself:
                    scene.end(scene.start())
                    trial.kept = (report_of(scene.output) or {}).get("skipped", 0)
                scene.check()
        except TooLateError:
            continue
        finally:
            shutil.rmtree(scene.folder, ignore_errors=True)
        trial.seconds = round(time.monotonic() - began, 1)
        return trial, scene
    raise SystemExit(f"error: no moment of trial {number} ({kind}) was early enough")


def plan(kinds: list[str], count: int) -> Iterator[tuple[str, str]]:
    """Kind and store of each trial; a kind goes to either store in turn where it can."""
    wanted = [kind for kind in WEIGHTS if kind in kinds]
    seen: Counter[str] = Counter()
    for number in range(count):
        kind = wanted[number % len(wanted)]
        stores = {"flaky": ["s3"], "away": ["s3"], "disk": ["file"]}.get(kind, ["s3", "file"])
        yield kind, stores[seen[kind] % len(stores)]
        seen[kind] += 1


def summary(trials: list[Trial]) -> list[dict[str, Any]]:
    """A row for each kind, and one for all."""
    kinds = [kind for kind in FAULTS if any(trial.kind == kind for trial in trials)]
    rows = [_sum(kind, [trial for trial in trials if trial.kind == kind]) for kind in kinds]
    return [*rows, _sum("all", trials)]


def _sum(name: str, trials: list[Trial]) -> dict[str, Any]:
    sums = ("results", "missing", "different", "extra", "orphans")
    return {
        "fault": name,
        "trials": len(trials),
        "faults": sum(sum(trial.faults.values()) for trial in trials),
        "finished_itself": sum(trial.finished_itself for trial in trials),
        "started_again": sum(not trial.finished_itself for trial in trials),
        "kept": sum(trial.kept for trial in trials),
        **{column: sum(getattr(trial, column) for trial in trials) for column in sums},
        "went_wrong": sum(bool(trial.wrong) for trial in trials),
    }


TITLE = "Bulk upscaling under faults"
REMARKS = [
    "`faults` is how often something failed; `finished_itself` runs did everything all the same; the "
    "others needed the same command once more, which `kept` that many results. `results` were compared byte "
    "for byte with an undisturbed run; `missing`, `different`, `extra` (temporary files and parts of uploads "
    "included) and `orphans` (processes that lived on) have to be 0. What each fault is: bench/faults.py."
]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bulk runs that are hit by faults.")
    parser.add_argument("--trials", type=int, default=20, help="how many (default 20)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--quick", action="store_true", help="fewer images, and a store that is away for 8 s")
    parser.add_argument("--seed", type=int, default=0, help="another one means other moments (default 0)")
    parser.add_argument("--kind", action="append", choices=list(FAULTS), help="only this kind; repeatable")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    kinds = arguments.kind or list(FAULTS)
    remarks = list(REMARKS)
    if "disk" in kinds and not can_mount():
        kinds.remove("disk")
        remarks.append("No trial with a full disk: mounting was not allowed.")
        print(remarks[-1], file=sys.stderr)
    if not kinds:
        return 0
    trials: list[tuple[Trial, list[Any]]] = []
    # Ray's sockets need a short path.
    with (
        tempfile.TemporaryDirectory(prefix="kf-", dir="/tmp") as folder,
        local_s3() as server,
        OnlyThisServer(server),
    ):
        lab = Lab(server, Path(folder), images=40 if arguments.quick else 100, quick=arguments.quick)
        for number, (kind, store) in enumerate(plan(kinds, arguments.trials)):
            trial, scene = run_trial(lab, number, kind, store=store, seed=arguments.seed)
            print(trial.line(), file=sys.stderr, flush=True)
            trials.append((trial, scene.killed))
        # At the end, for a process may take its time to see that it is alone.
        for trial, killed in trials:
            settle(trial, killed)
    done = [trial for trial, _ in trials]
    content = {"title": TITLE, "remarks": remarks, "rows": summary(done), "seed": arguments.seed}
    content |= {"trials": [asdict(trial) for trial in done], **provenance.stamp()}
    write(content, arguments.json)
    return 1 if any(trial.wrong for trial in done) else 0


if __name__ == "__main__":
    sys.exit(main())
