"""The bulk job against its own network and against the obvious loop: one run, one machine, one S3 server.

    python bench/bulk.py --json FILE
    python bench/bulk.py --quick --cases jpeg,png

Everything is in output megapixels per second; halos, the context that tiles share, count as cost and never
as output. Generated pictures, cut from jobs/demo/photos, from `--photos` and from $KDSR_DATA, all different.

`net_alone_mpx_s`  images of the case's size, pixels in memory, through `Upscaler` with the job's engine and
                   one compute thread for each core; no files, no store. In the job's tiles and in one tile
                   per image; the faster counts. Median of rounds before, between and after the jobs.
`loop_mpx_s`       the obvious program, one process, torch on all cores: read an object, Pillow, / 255,
                   float32 net, clamp, mul, round, byte, permute, Pillow, write the object; JPEG q95.
`job_mpx_s`        `python jobs/upscale.py` as a process of its own, from store to store: results written
                   between the first whole second after the first result and the last whole second
                   before the last one, by the store's own clock.
`startup_seconds`  from launching that process to its first result in the store; the slower of JPEG and PNG.
`ratio`            job_mpx_s / net_alone_mpx_s.

Ratios are what travels from machine to machine; on a machine that does other work meanwhile they are noise.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.measured import rounded, say, write  # noqa: E402
from infra.local_s3.serve import LocalS3, local_s3  # noqa: E402
from kdsr import provenance  # noqa: E402
from kdsr.store import Store, open_store  # noqa: E402

BUCKET = "kdsr-bench"
CORES = len(os.sched_getaffinity(0))
JOB_SECONDS_LIMIT = 600
STAGES = ("download", "decode", "net", "encode", "upload", "wait")


@dataclass(frozen=True)
class Case:
    """One kind of input and how long its job should take once it runs."""

    name: str
    suffix: str
    height: int
    width: int
    model: str
    scale: int
    seconds: float

    @property
    def output_mpx(self) -> float:
        """Of one image."""
        return self.height * self.width * self.scale**2 / 1e6

    @property
    def small_enough_whole(self) -> bool:
        """Whether one tile per image is worth measuring."""
        return self.height * self.width <= 500_000


CASES = {
    case.name: case
    for case in (
        Case("jpeg", ".jpg", 321, 481, "photo-x4", 4, 27),
        Case("png", ".png", 321, 481, "photo-x4", 4, 27),
        Case("photos", ".jpg", 1365, 2048, "photo-x4", 4, 20),
        Case("icons", ".png", 64, 64, "photo-x4", 4, 10),
        Case("x2", ".jpg", 321, 481, "photo-x2", 2, 12),
    )
}
OBJECT_SECONDS = 0.01
"""What an object costs beside its pixels, about; only for choosing how many there are."""


# ---------------------------------------------------------------- pictures


class Pictures:
    """Any number of different pictures of one size, cut from photographs. The same ones every time."""

    def __init__(self, folders: list[Path]) -> None:
        paths = [path for folder in folders for path in sorted(folder.rglob("*")) if _is_picture(path)]
        if not paths:
            raise SystemExit(f"error: no photographs in {', '.join(map(str, folders))}; name some: --photos")
        self._photos = [np.asarray(PIL.Image.open(path).convert("RGB")) for path in paths[:60]]

    def cut(self, index: int, height: int, width: int) -> np.ndarray:
        """Picture number `index`: a mirrored or turned photograph, wrapped where it is too small."""
        random = np.random.default_rng(index)
        photo = np.rot90(self._photos[index % len(self._photos)], random.integers(4))
        if random.integers(2):
            photo = photo[:, ::-1]
        rows = (random.integers(photo.shape[0]) + np.arange(height)) % (2 * photo.shape[0])
        columns = (random.integers(photo.shape[1]) + np.arange(width)) % (2 * photo.shape[1])
        # Back and forth, so that no border shows where a photograph ends.
        rows = np.minimum(rows, 2 * photo.shape[0] - 1 - rows)
        columns = np.minimum(columns, 2 * photo.shape[1] - 1 - columns)
        return np.ascontiguousarray(photo[np.ix_(rows, columns)])

    def upload(self, store: Store, case: Case, count: int) -> None:
        """Put `count` encoded pictures of a case into `store`."""
        with ThreadPoolExecutor(4) as threads:
            for _ in threads.map(lambda index: store.put(*self._object(case, index)), range(count)):
                pass

    def _object(self, case: Case, index: int) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        picture = PIL.Image.fromarray(self.cut(index, case.height, case.width))
        picture.save(buffer, "JPEG" if case.suffix == ".jpg" else "PNG", quality=90, compress_level=1)
        return f"p{index:06}{case.suffix}", buffer.getvalue()


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in {".jpg", ".jpeg", ".png"}


def photo_folders(named: list[Path]) -> list[Path]:
    """The folders asked for, or those that are at hand."""
    data = os.environ.get("KDSR_DATA")
    more = sorted(Path(data).glob("bench/B100/x4/HR")) if data else []
    return named or [ROOT / "jobs" / "demo" / "photos", *more]


# ---------------------------------------------------------------- in processes of their own


def net_alone(case: Case, precision: str, pictures: list[np.ndarray], seconds: float) -> dict[str, Any]:
    """Mpx/s of each way to feed the engine, and what it runs in. For a process that does nothing else."""
    from kdsr.checkpoint import load_model
    from kdsr.engine import Engine
    from kdsr.upscale import ComputeThreads, Upscaler

    engine = Engine(load_model(case.model).model, precision=precision)
    found: dict[str, Any] = {"precision": engine.precision}
    sizes = {"tiles": None} | ({"whole": max(case.height, case.width)} if case.small_enough_whole else {})
    for way, tile_size in sizes.items():
        with ComputeThreads(CORES) as compute:
            upscaler = Upscaler(engine, tile_size=tile_size, compute=compute)
            images_per_second, cores = _rate(upscaler, pictures, seconds)
            rate = images_per_second * case.output_mpx
            found[way] = {"mpx_s": rate, "cores": cores, "mpx_per_core_second": rate / cores}
    return found


def _rate(upscaler: Any, pictures: list[np.ndarray], seconds: float) -> tuple[float, float]:
    """Images per second and cores kept busy; several images in hand, so no core waits for a last tile."""
    from kdsr.image import Image

    images = [Image(pixels=pixels) for pixels in pictures]
    end = time.perf_counter() + 0.3
    finished = Counter[int]()

    def feed(thread: int) -> None:
        index = thread
        while time.perf_counter() < end:
            upscaler.upscale(images[index % len(images)])
            finished[thread] += 1
            index += CORES + 2

    with ThreadPoolExecutor(CORES + 2) as feeders:
        list(feeders.map(feed, range(CORES + 2)))
        finished.clear()
        began, cpu = time.perf_counter(), time.process_time()
        end = began + seconds
        list(feeders.map(feed, range(CORES + 2)))
        elapsed = time.perf_counter() - began
        return finished.total() / elapsed, (time.process_time() - cpu) / elapsed


def obvious_loop(case: Case, source: str, target: str, seconds: float) -> float:
    """Mpx/s of the program that one writes first. For a process that does nothing else."""
    import torch

    from kdsr.checkpoint import load_model

    torch.set_num_threads(CORES)
    model = load_model(case.model).model.eval()
    inputs, outputs = open_store(source), open_store(target)
    keys = [info.key for info in inputs.list()]

    def do(key: str) -> None:
        image = PIL.Image.open(io.BytesIO(inputs.get(key))).convert("RGB")
        lr = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        sr = model(lr).float().clamp(0, 1).mul(255).round().byte()
        buffer = io.BytesIO()
        result = PIL.Image.fromarray(sr[0].permute(1, 2, 0).numpy())
        if case.suffix == ".jpg":
            result.save(buffer, "JPEG", quality=95, subsampling=0)
        else:
            result.save(buffer, "PNG")
        outputs.put(key, buffer.getvalue())

    with torch.inference_mode():
        do(keys[0])
        began, count = time.perf_counter(), 0
        while time.perf_counter() < began + seconds:
            do(keys[count % len(keys)])
            count += 1
        return count * case.output_mpx / (time.perf_counter() - began)


# ---------------------------------------------------------------- the job


@dataclass(frozen=True)
class JobRun:
    """What one run of the job came to."""

    job_mpx_s: float
    startup_seconds: float
    seconds: float
    images: int
    where_time_goes: dict[str, float]
    """Seconds per image in each stage, of its own thread; beside them the share of the net's threads."""
    cores_used: dict[str, float]
    """Mean cores that each part kept busy in the steady state."""


def run_job(case: Case, server: LocalS3, source: str, target: str, *, flags: list[str]) -> JobRun:
    """Run jobs/upscale.py and watch its results appear. Raises SystemExit with its last words."""
    command = [sys.executable, "jobs/upscale.py", "--input", source, "--output", target]
    command += ["--model", case.model, *flags]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    bucket, _, prefix = target.removeprefix("s3://").partition("/")
    client = server.client()
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        usage = CpuUsage(process.pid)
        first = 0.0
        while process.poll() is None and time.perf_counter() - began < JOB_SECONDS_LIMIT:
            if not first:
                answer = client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/p", MaxKeys=1)
                first = time.perf_counter() - began if answer.get("KeyCount") else 0.0
                time.sleep(0.1)
            else:
                usage.sample()
                time.sleep(0.5)
        if process.poll() is None:
            process.terminate()
        code, seconds = process.wait(), time.perf_counter() - began
        log.seek(0)
        if code:
            raise SystemExit(f"error: the job left with {code}:\n{log.read().decode()[-3000:]}")
    times = list(_finished_times(client, bucket, f"{prefix}/p"))
    return JobRun(
        job_mpx_s=steady_rate(times) * case.output_mpx,
        startup_seconds=first,
        seconds=seconds,
        images=len(times),
        where_time_goes=where_time_goes(open_store(target)),
        cores_used=usage.cores(),
    )


def _finished_times(client: Any, bucket: str, prefix: str) -> Iterator[int]:
    """The whole second in which each result was written, as the store says."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", ()):
            yield int(found["LastModified"].timestamp())


def steady_rate(times: list[int]) -> float:
    """Results per second between the second after the first and the second of the last.

    Whole seconds are exact borders: what is dated earlier was written before them. Raises SystemExit when
    there are too few seconds to speak of a steady state.
    """
    begin, end = min(times) + 1, max(times)
    if end - begin < 3:
        raise SystemExit(f"error: all {len(times)} results came within {end - begin + 1} seconds; use more")
    return sum(begin <= time_ < end for time_ in times) / (end - begin)


def where_time_goes(output: Store) -> dict[str, float]:
    """Mean seconds of an image in each stage, from the ledger's status rows."""
    keys = [info.key for info in output.list("_kdsr/runs/") if "/status/" in info.key]
    columns = [f"{stage}_seconds" for stage in STAGES]
    rows = [
        row
        for key in keys
        for row in pq.read_table(io.BytesIO(output.get(key)), columns=[*columns, "seconds"]).to_pylist()
    ]
    means = {name: statistics.fmean(row[name] for row in rows) for name in [*columns, "seconds"]}
    return {name.removesuffix("_seconds"): round(value, 5) for name, value in means.items()}


# ---------------------------------------------------------------- who keeps the cores busy


class CpuUsage:
    """CPU seconds of a job's processes and of the store's server, by what they are."""

    def __init__(self, job: int) -> None:
        self._job = job
        self._first: tuple[float, dict[int, tuple[str, float]]] | None = None
        self._last: tuple[float, dict[int, tuple[str, float]]] | None = None

    def sample(self) -> None:
        """Look once; while the actor lives, what is seen last counts."""
        seen = {
            pid: (part_of(line, is_job=pid == self._job), seconds)
            for pid, line, seconds in processes(os.getpid())
        }
        now = time.perf_counter(), seen
        self._first = self._first or now
        if any(part == "actor" for part, _ in seen.values()):
            self._last = now

    def cores(self) -> dict[str, float]:
        """Cores that each part kept busy on average between the first look and the last."""
        if not self._first or not self._last or self._last[0] <= self._first[0]:
            return {}
        used: Counter[str] = Counter()
        for pid, (part, seconds) in self._last[1].items():
            used[part] += seconds - self._first[1].get(pid, (part, 0.0))[1]
        elapsed = self._last[0] - self._first[0]
        return {part: round(seconds / elapsed, 3) for part, seconds in sorted(used.items())}


def part_of(line: str, *, is_job: bool) -> str:
    """What a process with the command line `line` is."""
    if is_job:
        return "driver"
    if "weed" in line.split("\0", maxsplit=1)[0]:
        return "store server"
    if "UpscaleActor" in line:
        return "actor"
    return "ray" if "ray" in line else "bench"


def processes(root: int) -> Iterator[tuple[int, str, float]]:
    """Pid, command line and CPU seconds of all processes below `root`, and of itself."""
    tick = os.sysconf("SC_CLK_TCK")
    parents, seen = {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            line = (folder / "cmdline").read_text()
        except (OSError, UnicodeDecodeError):
            continue
        pid = int(folder.name)
        parents[pid] = int(fields[1])
        seen[pid] = line, (int(fields[11]) + int(fields[12])) / tick
    for pid, (line, seconds) in seen.items():
        if _is_below(pid, root, parents):
            yield pid, line, seconds


def _is_below(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root


# ---------------------------------------------------------------- all of it


class Bench:
    """The measurements, with the rounds of the net and of the loop between the jobs."""

    def __init__(self, server: LocalS3, pictures: Pictures, arguments: argparse.Namespace) -> None:
        self._server, self._pictures, self._arguments = server, pictures, arguments
        context = multiprocessing.get_context("spawn")
        self._net = ProcessPoolExecutor(1, mp_context=context)
        self._loop = ProcessPoolExecutor(1, mp_context=context)
        self._nets: dict[str, list[dict[str, Any]]] = {}
        self._runs: dict[str, JobRun] = {}
        self._loops: list[float] = []
        self._loop_png: list[float] = []

    def run(self, cases: list[Case]) -> dict[str, Any]:
        """Measure `cases` one after the other, and return the JSON."""
        for number, case in enumerate(cases):
            if case.name in {"jpeg", "png"}:
                self._measure_loop(case)
            self._measure_job(case, number)
        for loop in (self._net, self._loop):
            loop.shutdown()
        return self._content(cases)

    def _measure_job(self, case: Case, number: int) -> None:
        self._measure_net(case)
        rate = max(self._net_rates(case).values())
        count = max(12, round(self._seconds(case) / (case.output_mpx / rate + OBJECT_SECONDS)))
        source, target = (f"s3://{BUCKET}/{number}-{case.name}/{side}" for side in ("in", "out"))
        self._pictures.upload(open_store(source), case, count)
        say(f"{case.name}: {count} images, net alone {rate:.1f} Mpx/s")
        flags = ["--precision", self._arguments.precision, *self._arguments.flag]
        run = run_job(case, self._server, source, target, flags=flags)
        self._runs[case.name] = run
        self._measure_net(case)
        say(
            f"{case.name}: job {run.job_mpx_s:.1f} Mpx/s, start {run.startup_seconds:.1f} s, "
            f"{run.seconds:.1f} s in all; cores {run.cores_used}; seconds per image {run.where_time_goes}"
        )

    def _measure_net(self, case: Case) -> None:
        pictures = [self._pictures.cut(index, case.height, case.width) for index in range(8)]
        precision = self._arguments.precision
        seconds = 1.5 if self._arguments.quick else 3.0
        found = self._net.submit(net_alone, case, precision, pictures, seconds).result()
        self._nets.setdefault(_net_key(case), []).append(found)

    def _measure_loop(self, case: Case) -> None:
        source, target = f"s3://{BUCKET}/loop-{case.name}/in", f"s3://{BUCKET}/loop-{case.name}/out"
        self._pictures.upload(open_store(source), case, 20)
        seconds = 4.0 if self._arguments.quick else 8.0
        found = self._loop.submit(obvious_loop, case, source, target, seconds).result()
        (self._loops if case.suffix == ".jpg" else self._loop_png).append(found)
        say(f"obvious loop, {case.name}: {found:.1f} Mpx/s")

    def _net_rates(self, case: Case) -> dict[str, float]:
        """Median over the rounds of each way."""
        rounds = self._nets[_net_key(case)]
        return {way: statistics.median(found[way]["mpx_s"] for found in rounds) for way in _ways(rounds[0])}

    def _content(self, cases: list[Case]) -> dict[str, Any]:
        main = [case for case in cases if case.name in {"jpeg", "png"}]
        content: dict[str, Any] = {
            "net_alone_mpx_s": max(self._net_rates(main[0]).values()) if main else None,
            "loop_mpx_s": statistics.median(self._loops) if self._loops else None,
        }
        content |= {case.name: self._row(case) for case in main}
        starts = [self._runs[case.name].startup_seconds for case in main or cases]
        content["startup_seconds"] = max(starts)
        content["job_over_loop"] = (
            content["jpeg"]["job_mpx_s"] / content["loop_mpx_s"] if self._loops else None
        )
        content["loop_png_mpx_s"] = statistics.median(self._loop_png) if self._loop_png else None
        content["cases"] = {case.name: self._details(case) for case in cases}
        return rounded(content) | {"title": TITLE, "remarks": REMARKS} | provenance.stamp()

    def _row(self, case: Case) -> dict[str, float]:
        job = self._runs[case.name].job_mpx_s
        return {"job_mpx_s": job, "ratio": job / max(self._net_rates(case).values())}

    def _details(self, case: Case) -> dict[str, Any]:
        run, rates = self._runs[case.name], self._net_rates(case)
        return {
            "input": f"{case.width} x {case.height} {case.suffix.removeprefix('.')}",
            "model": case.model,
            "precision": self._nets[_net_key(case)][0]["precision"],
            "images": run.images,
            "net_alone_mpx_s": max(rates.values()),
            "net_alone_ways": rates,
            "net_alone_rounds": self._nets[_net_key(case)],
            **self._row(case),
            "mpx_per_core_second": run.job_mpx_s / sum(run.cores_used.values()),
            "images_per_second": run.job_mpx_s / case.output_mpx,
            "startup_seconds": run.startup_seconds,
            "seconds": run.seconds,
            "where_time_goes": run.where_time_goes,
            "cores_used": run.cores_used,
        }

    def _seconds(self, case: Case) -> float:
        return min(case.seconds, 10.0) if self._arguments.quick else case.seconds


TITLE = "Bulk upscaling"
REMARKS = [
    "Output Mpx/s from one S3 server to itself, all on one machine. `net_alone` is the network with pixels "
    "in memory, `job` the steady state of jobs/upscale.py, `ratio` one over the other; `startup_seconds` "
    "run from launch to the first result. What each column is, exactly: bench/bulk.py."
]


def _ways(found: dict[str, Any]) -> list[str]:
    return [name for name in found if name != "precision"]


def _net_key(case: Case) -> str:
    return f"{case.model} {case.height} x {case.width}"


@dataclass
class OnlyThisServer:
    """Settings under which only the local server is found, put back at the end."""

    server: LocalS3

    def __enter__(self) -> None:
        self._before = dict(os.environ)
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(self.server.environment)
        nowhere = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
        os.environ.update(nowhere | {"AWS_EC2_METADATA_DISABLED": "true"})

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


def main() -> None:
    """Measure, print the JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description="The bulk job against its network and the obvious loop.")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--quick", action="store_true", help="shorter runs, noisier numbers")
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--photos", type=Path, action="append", default=[], help="folder of photographs")
    parser.add_argument("--precision", default="auto", help="number type of the network, net and job alike")
    parser.add_argument("--flag", action="append", default=[], help="passed to jobs/upscale.py")
    arguments = parser.parse_args()
    unknown = set(arguments.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"--cases: no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    cases = [CASES[name] for name in arguments.cases.split(",")]
    with local_s3() as server, OnlyThisServer(server):
        server.make_bucket(BUCKET)
        content = Bench(server, Pictures(photo_folders(arguments.photos)), arguments).run(cases)
    write(content, arguments.json)


if __name__ == "__main__":
    main()
