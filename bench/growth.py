"""How the cost of a bulk run grows: with images, with listed keys, with workers, with Ray nodes.

    python bench/growth.py --json FILE
    python bench/growth.py --quick --cases listing,memory

`memory`   resident memory of the driver and of the actor, peak and mean of the last quarter, in a run of few
           and in one of many small images.
`listing`  keys per second and memory of listing and planning a prefix of many keys. The store makes its
           listing up, so this is kdsr's own cost; the plan is written to a folder.
`workers`  steady output Mpx/s of one worker with all cores against two with half of them each.
`nodes`    the same with one Ray node and with two on this machine.

The last two divide the same cores, so 1.0 is all that there is to win: they tell what dividing costs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.bulk import (  # noqa: E402
    CASES,
    CORES,
    OnlyThisServer,
    Pictures,
    part_of,
    photo_folders,
    processes,
    run_job,
)
from bench.measured import rounded, say, write  # noqa: E402
from infra.local_s3.serve import LocalS3, local_s3  # noqa: E402
from kdsr import provenance  # noqa: E402
from kdsr.store import ObjectInfo, open_store  # noqa: E402

BUCKET = "kdsr-growth"
SMALL_SIDE = 16
PAGE = 1000


# ---------------------------------------------------------------- memory


def memory(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each number of images."""
    pictures = Pictures(photo_folders([]))
    for images in (200, 2000 if arguments.quick else 10_000):
        with tempfile.TemporaryDirectory(prefix="kdsr-growth-") as folder:
            _write_small(pictures, Path(folder) / "in", images)
            say(f"memory: {images} images")
            yield {"case": "memory", "images": images, **_memory_of_job(Path(folder))}


def _write_small(pictures: Pictures, folder: Path, count: int) -> None:
    import PIL.Image

    folder.mkdir()
    for index in range(count):
        pixels = pictures.cut(index, SMALL_SIDE, SMALL_SIDE)
        PIL.Image.fromarray(pixels).save(folder / f"p{index:06}.png", compress_level=1)


def _memory_of_job(folder: Path) -> dict[str, Any]:
    """MB of the driver and of the actor, looked at five times a second while there is an actor."""
    command = [sys.executable, "jobs/upscale.py", "--input", str(folder / "in")]
    command += ["--output", str(folder / "out"), "--model", "photo-x4"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    seen: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while job.poll() is None:
            parts = _resident(job.pid)
            if "actor" in parts:
                for part in ("driver", "actor"):
                    seen[part].append(parts[part])
            time.sleep(0.2)
        log.seek(0)
        if job.returncode:
            raise SystemExit(f"error: the job left with {job.returncode}:\n{log.read().decode()[-3000:]}")
    row: dict[str, Any] = {"seconds": time.perf_counter() - began}
    for part, values in seen.items():
        row[f"{part}_peak_mb"] = max(values)
        row[f"{part}_end_mb"] = statistics.fmean(values[-max(1, len(values) // 4) :])
    return row


def _resident(job: int) -> dict[str, float]:
    """MB of the job's driver and actors."""
    found: dict[str, float] = {}
    for pid, line, _ in processes(job):
        part = part_of(line, is_job=pid == job)
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
        found[part] = found.get(part, 0.0) + pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return found


# ---------------------------------------------------------------- listing


class MadeUpListing:
    """As much of a Store as listing needs: `count` keys that are never all in memory."""

    uri = "s3://made-up/photos"

    def __init__(self, count: int) -> None:
        self._count = count

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Keys in their order, by page as a server gives them."""
        for first in range(0, self._count, PAGE):
            yield from [
                ObjectInfo(f"{prefix}{index // 10_000:04}/p{index:09}.jpg", 100_000 + index, f"{index:032x}")
                for index in range(first, min(first + PAGE, self._count))
            ]


def listing(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each number of keys, each in a process of its own."""
    for keys in (20_000, 200_000) if arguments.quick else (100_000, 1_000_000):
        say(f"listing: {keys} keys")
        done = subprocess.run(
            [sys.executable, __file__, "--listing", str(keys)], capture_output=True, text=True, check=True
        )
        yield json.loads(done.stdout)


def _plan_made_up(keys: int) -> dict[str, Any]:
    """List and plan `keys` keys in this process."""
    from kdsr import manifest

    def plan(count: int) -> None:
        with tempfile.TemporaryDirectory(prefix="kdsr-growth-") as folder:
            output = open_store(folder)
            tasks = manifest.list_tasks(MadeUpListing(count), output_uri=output.uri, run="0" * 16)
            manifest.Records(output, "0" * 16).plan(tasks)

    plan(PAGE)
    before, began = _high_water_mb(), time.perf_counter()
    plan(keys)
    seconds = time.perf_counter() - began
    row = {"case": "listing", "keys": keys, "keys_per_second": keys / seconds, "seconds": seconds}
    return row | {"planner_peak_mb": _high_water_mb(), "grown_mb": _high_water_mb() - before}


def _high_water_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e6


# ---------------------------------------------------------------- workers and nodes


def workers(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One and two workers, one again: the first and the last tell how quiet the machine was."""
    with _images_on_s3(arguments) as server:
        for number, count in enumerate((1, 2, 1)):
            flags = ["--cluster.num_workers", str(count)]
            yield _rate(server, "workers", count, out=f"out-{number}", flags=flags)


def nodes(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One Ray node with all cores, then two with a part of them each, a worker on each node."""
    half = max(1, CORES // 2)
    # One CPU is announced beside the cores, for the tasks that read; see cluster/session.py.
    with _images_on_s3(arguments) as server:
        for count, cpus in ((1, [CORES + 1]), (2, [half + 1, half])):
            # After the server: Ray's workers find it by the settings that their node began with.
            with ray_nodes(cpus) as address:
                flags = ["--cluster.address", address, "--cluster.num_workers", str(count)]
                yield _rate(server, "nodes", count, out=f"out-{count}", flags=flags)


@contextmanager
def _images_on_s3(arguments: argparse.Namespace) -> Iterator[LocalS3]:
    """A server with the pictures that the runs compare on."""
    with local_s3() as server, OnlyThisServer(server):
        server.make_bucket(BUCKET)
        count = 60 if arguments.quick else 200
        Pictures(photo_folders([])).upload(open_store(f"s3://{BUCKET}/in"), CASES["jpeg"], count)
        yield server


def _rate(server: LocalS3, name: str, count: int, *, out: str, flags: list[str]) -> dict[str, Any]:
    say(f"{name}: {count}")
    run = run_job(CASES["jpeg"], server, f"s3://{BUCKET}/in", f"s3://{BUCKET}/{out}", flags=flags)
    return {
        "case": name,
        name: count,
        "job_mpx_s": run.job_mpx_s,
        "startup_seconds": run.startup_seconds,
        "seconds": run.seconds,
    }


@contextmanager
def ray_nodes(cpus: list[int]) -> Iterator[str]:
    """The address of a Ray cluster with a node for each of `cpus`, gone when the block ends."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for number in cpus:
            cluster.add_node(num_cpus=number, object_store_memory=200 * 2**20, include_dashboard=False)
        yield cluster.address
    finally:
        cluster.shutdown()


# ---------------------------------------------------------------- all of it

MEASURES: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "listing": listing,
    "memory": memory,
    "workers": workers,
    "nodes": nodes,
}
REMARKS = [
    "`_mb` are resident megabytes, the peak of a run and the mean of its last quarter; two workers or nodes "
    "share the cores that one had. What each column is, exactly: bench/growth.py."
]


def _summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The ratios that are claimed: many against few, two against one."""

    def of(case: str, column: str) -> list[float]:
        return [row[column] for row in rows if row["case"] == case]

    found: dict[str, float] = {}
    if few_many := of("memory", "images"):
        assert len(few_many) == 2
        for part in ("driver", "actor"):
            few, many = of("memory", f"{part}_peak_mb")
            found[f"{part}_memory_ratio"] = many / few
    if rates := of("listing", "keys_per_second"):
        found["keys_per_second"] = rates[-1]
        found["listing_grown_mb"] = of("listing", "grown_mb")[-1]
    if rates := of("workers", "job_mpx_s"):
        found["two_workers_ratio"] = 2 * rates[1] / (rates[0] + rates[2])
    if rates := of("nodes", "job_mpx_s"):
        found["two_nodes_ratio"] = rates[1] / rates[0]
    return found


def _sentence(summary: dict[str, float]) -> str:
    """The ratios for the page that shows the rows."""
    return "In short: " + ", ".join(f"`{name}` {value:,.4g}" for name, value in summary.items()) + "."


def main() -> None:
    """Measure, print the JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description="How the cost of a bulk run grows.")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--quick", action="store_true", help="fewer images and keys")
    parser.add_argument("--cases", default=",".join(MEASURES), help=f"some of {','.join(MEASURES)}")
    parser.add_argument("--listing", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.listing:
        print(json.dumps(_plan_made_up(arguments.listing)))
        return
    unknown = set(arguments.cases.split(",")) - set(MEASURES)
    if unknown:
        parser.error(f"--cases: no case {', '.join(sorted(unknown))}; there are {', '.join(MEASURES)}")
    rows = []
    for name in arguments.cases.split(","):
        for row in MEASURES[name](arguments):
            say(json.dumps(rounded(row)))
            rows.append(row)
    summary = rounded(_summary(rows))
    content = summary | {"title": "How a bulk run's cost grows", "remarks": [*REMARKS, _sentence(summary)]}
    content |= {"rows": [rounded(row) for row in rows], **provenance.stamp()}
    write(content, arguments.json)


if __name__ == "__main__":
    main()
