"""The training job against a plain loop on batches in memory: one run, one machine, one S3 server.

    python bench/train.py --json FILE
    python bench/train.py --quick --variants job --rounds 1

All take the steps of one config (`--config`): its network, loss, optimizer, mean of weights, batch, precision
and threads. They run in turns (bare, fit, job, ... bare, fit, job, ...), so that drift hits all alike; a
number is the median over the rounds, a ratio is taken within each round first, `_spread` is least and most.

`bare`     a plain PyTorch loop on a few batches that are tensors already.
`fit`      `kdsr.fit.fit` on the same batches.
`job`      `python jobs/train_teacher.py` as a process of its own: Ray Train, shards on S3 that are read,
           decoded and cut meanwhile, LR made from HR, logs, checkpoints on S3.
`workers`  the same with a worker of one thread for each core.
`nodes`    the same workers, each on a Ray node of its own.
`spare`    a job whose worker computes with one thread less than there are cores, against a plain loop with as
           many (`bare_spare`): what the way of the data costs where cores are left to it, as beside a GPU.

`steps_s` of jobs is by the clock of the run's own log, from the end of the warm-up to the last step, with all
that happens between steps; start and warm-up are left out. `waiting_share` is what steps waited for their
batch, and `checkpoint_share` what was spent between steps: checkpoints, every `--save-every` steps, and logs.
`cpu_s` is processor seconds of a step, of all processes that take part, which other work on the machine
hardly touches; the bare loop pays for neither reading nor making LR.

The reader alone: patches that one core decodes and cuts a second (`reader`), and those that it makes LR for
as well, as it does where the network is on the CPU (`reader_and_lr`). What a GPU takes is not measured but
asked for (`--gpu-patches`); with a GPU in the machine, plain steps on it are measured in several ways.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench.bulk import CORES, OnlyThisServer, Pictures, photo_folders, processes  # noqa: E402
from bench.growth import ray_nodes  # noqa: E402
from bench.measured import rounded, say, write  # noqa: E402
from infra.local_s3.serve import local_s3  # noqa: E402
from kdsr import provenance, shards  # noqa: E402
from kdsr.config import ShardConfig, TeacherTrainingConfig  # noqa: E402
from kdsr.degrade import build_degradation  # noqa: E402
from kdsr.fit import fit, learning_rate_at, new_state  # noqa: E402
from kdsr.losses import LOSSES  # noqa: E402
from kdsr.models import build_model  # noqa: E402
from kdsr.objectives import build_objective  # noqa: E402
from kdsr.pairs import Cursor, PairBatch, PairMaker, PatchReader  # noqa: E402
from kdsr.photos import build_shard, list_photos, make_index, plan_shards  # noqa: E402
from kdsr.store import open_store  # noqa: E402
from kdsr.training import autocast_type, run_store  # noqa: E402

BUCKET = "kdsr-train"
JOB_SECONDS_LIMIT = 600
SIDE = 480
"""Height and width of the pictures: one sub-image each, as large as `jobs/shard.py` makes them."""
SPARED = max(1, CORES - 1)
"""Threads of a worker that leaves a core to the reader."""
IN_MEMORY = 4
"""Batches that the bare loop and `fit` take again and again."""
LOG_EVERY = 50
"""Steps between rows of a job's log; those before the first row are its warm-up."""
VARIANTS = "job,spare,workers,nodes"
GPU_PATCHES = 4000.0
"""Patches that one GPU is assumed to train on in a second."""

TITLE = "Training against a plain loop"
REMARKS = [
    "Steps a second of one config in turns, medians over the rounds. `bare` is a plain PyTorch loop on "
    "tensors in memory, `job` the whole job over Ray Train from shards on S3 with checkpoints there; `ratio` "
    "is against `bare` in the same round, with the least and the most beside it. `cpu_s` are processor "
    "seconds of a step, those of the job with decoding, LR and the processes of Ray and of the store. What "
    "each column is, exactly: bench/train.py."
]


# ---------------------------------------------------------------- what is trained


@dataclass(frozen=True)
class Setting:
    """The config that all take steps of, its shards made."""

    config: TeacherTrainingConfig
    device: torch.device = torch.device("cpu")

    @property
    def autocast(self) -> torch.dtype | None:
        """Type of the forward pass."""
        return autocast_type(self.config.precision, self.device)

    def reader(self) -> PatchReader:
        """Of one worker."""
        config = self.config
        store = open_store(config.data.shards, config.store)
        return PatchReader(
            store=store,
            index=shards.read_index(store),
            data=config.data,
            scale=config.model.scale,
            context=self.degradation.context,
            batch_size=config.batch_size,
            seed=config.seed,
            columns=("image",),
        )

    @property
    def degradation(self) -> Any:
        """That of the config."""
        return build_degradation(self.config.data.degradation, self.config.model.scale)

    def maker(self) -> PairMaker:
        """Makes pairs on the device."""
        model, degradation = self.config.model, self.degradation
        return PairMaker(degradation, model.scale, degradation.context, model.channels, self.device)

    def pairs(self) -> list[PairBatch]:
        """Those that are kept in memory."""
        make, batches = self.maker(), self.reader().batches()
        return [make(batch) for batch in itertools.islice(batches, IN_MEMORY)]

    def network(self) -> Any:
        """As the job has it before its first step."""
        torch.manual_seed(self.config.seed)
        model: Any = build_model(self.config.model)
        return model.to(self.device, memory_format=torch.channels_last).train()


def make_shards(folder: Path, target: str, count: int) -> None:
    """A set of `count` sub-images, cut from photographs, in small row groups, so that many are read."""
    pictures = Pictures(photo_folders([]))
    folder.mkdir()
    for index in range(count):
        image = PIL.Image.fromarray(pictures.cut(index, SIDE, SIDE))
        image.save(folder / f"p{index:04}.png", compress_level=1)
    config = ShardConfig(
        input=str(folder), output=target, heldout_fraction=0, row_group_bytes=2**21, shard_bytes=2**25
    )
    source, store = open_store(config.input), open_store(target)
    made = [build_shard(source, store, plan, config) for plan in plan_shards(list_photos(source), config)]
    shards.write_index(store, make_index(made, config))


def read_config(path: Path, target: str, arguments: argparse.Namespace) -> TeacherTrainingConfig:
    """That of the file, with the shards of this bench, and nothing held out."""
    fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    fields["data"] |= {"shards": target}
    fields |= {"output": f"s3://{BUCKET}/runs", "num_validation_images": 0, "num_steps": 10**6}
    fields |= {"log_every_steps": 10 if arguments.quick else LOG_EVERY}
    fields |= {"save_every_steps": arguments.save_every}
    return TeacherTrainingConfig.model_validate(fields)


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Measured:
    """One turn of one variant."""

    steps_s: float
    cpu_s: float
    """Of a step, over all processes that take part."""
    waiting_share: float | None = None
    checkpoint_share: float | None = None
    cpu_by_part: dict[str, float] | None = None


class Bare:
    """A plain loop, as one would write it for speed."""

    def __init__(self, setting: Setting, pairs: Sequence[PairBatch]) -> None:
        self._setting, self._batches = setting, itertools.cycle(pairs)
        config = setting.config
        self._model = setting.network()
        self._ema = copy.deepcopy(self._model).eval()
        self._distance = LOSSES[config.terms[0].loss]
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=1e-3, betas=config.optimizer.betas, foreach=True
        )
        self._step = 0

    def step(self) -> None:
        """One, its loss looked at as everybody does."""
        setting, pair, config = self._setting, next(self._batches), self._setting.config
        rate = learning_rate_at(config.optimizer, step=self._step, num_steps=config.num_steps)
        self._optimizer.param_groups[0]["lr"] = rate
        with torch.autocast(setting.device.type, dtype=setting.autocast, enabled=bool(setting.autocast)):
            loss = self._distance(self._model(pair.lr), pair.hr)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        decay = config.optimizer.ema_decay
        with torch.no_grad():
            means, weights = list(self._ema.parameters()), list(self._model.parameters())
            torch._foreach_lerp_(means, weights, 1 - decay)
        self._step += 1
        loss.item()


def fit_steps(setting: Setting, pairs: Sequence[PairBatch]) -> Callable[[], object]:
    """The same by `kdsr.fit.fit`; what is returned takes one step."""
    config = setting.config
    state = new_state(setting.network(), config.optimizer, num_steps=config.num_steps)
    objective = build_objective(
        state.model, config.terms, scale=config.model.scale, channels=config.model.channels
    )
    state.train_too(objective)
    batches = ((pair, Cursor(step)) for step, pair in enumerate(itertools.cycle(pairs), 1))
    reports = fit(
        state,
        objective,
        batches,
        until_step=config.num_steps,
        autocast=setting.autocast,
        after_step=objective.after_step,
        apart=objective.apart,
    )
    return lambda: next(reports)


def turn(step: Callable[[], object], seconds: float) -> Measured:
    """Steps of this process for so long, after a few that do not count."""
    for _ in range(5):
        step()
    began, cpu, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() < began + seconds:
        step()
        steps += 1
    elapsed = time.perf_counter() - began
    return Measured(steps / elapsed, (time.process_time() - cpu) / steps)


# ---------------------------------------------------------------- the job


def run_job(config: TeacherTrainingConfig, folder: Path) -> Measured:
    """Run jobs/train_teacher.py to its end. Raises SystemExit with its last words."""
    path = folder / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    command = [sys.executable, "jobs/train_teacher.py", "--config", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryFile() as log:
        began = time.perf_counter()
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        usage = Usage()
        while job.poll() is None and time.perf_counter() - began < JOB_SECONDS_LIMIT:
            usage.sample()
            time.sleep(0.5)
        if job.poll() is None:
            job.terminate()
        if code := job.wait():
            log.seek(0)
            raise SystemExit(f"error: the job left with {code}:\n{log.read().decode()[-3000:]}")
    return _steady(config, usage)


def _steady(config: TeacherTrainingConfig, usage: "Usage") -> Measured:
    """From the run's own log, its warm-up left out."""
    store = run_store(config)
    rows = [json.loads(line) for line in store.get("metrics.jsonl").decode().splitlines()]
    warm = config.log_every_steps
    (events,) = [info.key for info in store.list("tensorboard/")]
    times = dict(_event_times(store.get(events)))
    begin, end = times[warm], times[config.num_steps]
    steps = config.num_steps - warm
    inside = [warm * config.batch_size / row["patches_per_second"] for row in rows[1:]]
    waited = sum(seconds * row["waiting_share"] for seconds, row in zip(inside, rows[1:], strict=True))
    parts = {name: seconds / steps for name, seconds in usage.between(begin, end).items()}
    return Measured(
        steps_s=steps / (end - begin),
        cpu_s=sum(parts.values()),
        waiting_share=waited / sum(inside),
        checkpoint_share=1 - sum(inside) / (end - begin),
        cpu_by_part=parts,
    )


def _event_times(data: bytes) -> Iterator[tuple[int, float]]:
    """Step and seconds since 1970 of each event in a file of TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        yield event.step, event.wall_time
        at += 16 + length


class Usage:
    """Processor seconds of all processes below this one over time, by what they are."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, Counter[str]]] = []

    def sample(self) -> None:
        """Look once."""
        used: Counter[str] = Counter()
        for pid, line, seconds in processes(os.getpid()):
            if pid != os.getpid():
                used[_part_of(line)] += seconds
        self._seen.append((time.time(), used))

    def between(self, begin: float, end: float) -> dict[str, float]:
        """Of each part, scaled from the looks inside to the whole time."""
        inside = [seen for seen in self._seen if begin <= seen[0] <= end]
        if len(inside) < 2:
            return {}
        (first, before), (last, after) = inside[0], inside[-1]
        share = (end - begin) / (last - first)
        return {part: share * (after[part] - before[part]) for part in after}


def _part_of(line: str) -> str:
    if "weed" in line.split("\0", maxsplit=1)[0]:
        return "store"
    if line.startswith("ray::") and "TrainWorker" in line:
        return "worker"
    return "driver" if "jobs/train_teacher.py" in line else "ray"


# ---------------------------------------------------------------- rounds


class Rounds:
    """All variants, in turns."""

    def __init__(self, setting: Setting, folder: Path, arguments: argparse.Namespace) -> None:
        self._config, self._folder, self._arguments = setting.config, folder, arguments
        pairs = setting.pairs()
        self._bare, self._fit = Bare(setting, pairs).step, fit_steps(setting, pairs)
        self._num_steps = 0
        self.found: dict[str, list[Measured]] = {}

    def run(self) -> None:
        """Every round, every variant once; what the first bare turn reaches tells how long jobs are."""
        seconds = 2.0 if self._arguments.quick else 8.0
        takes: dict[str, Callable[[], Measured]] = {
            "bare": lambda: turn(self._bare, seconds),
            "fit": lambda: turn(self._fit, seconds),
            "job": lambda: self._job(1),
            "workers": lambda: self._job(CORES),
            "nodes": self._on_nodes,
            "bare_spare": lambda: self._bare_with(SPARED, seconds),
            "spare": lambda: self._job(1, of="bare_spare", cpus_per_worker=SPARED),
        }
        asked = self._arguments.variants.replace("spare", "bare_spare,spare").split(",")
        names = ["bare", "fit", *(name for name in takes if name in asked)]
        for number in range(self._arguments.rounds):
            for name in dict.fromkeys(names):
                measured = takes[name]()
                self.found.setdefault(name, []).append(measured)
                say(f"round {number + 1}: {name} {_shown(measured)}")

    def _bare_with(self, threads: int, seconds: float) -> Measured:
        torch.set_num_threads(threads)
        try:
            return turn(self._bare, seconds)
        finally:
            torch.set_num_threads(CORES)

    def _job(self, workers: int, *, of: str = "bare", **cluster: Any) -> Measured:
        every = self._config.log_every_steps
        seconds = 3.0 if self._arguments.quick else self._arguments.job_seconds
        logs = max(2, round(self.found[of][0].steps_s * seconds / every))
        number = sum(map(len, self.found.values()))
        asked = self._config.cluster.model_copy(update={"num_workers": workers, **cluster})
        fields = {"name": f"run-{number}", "num_steps": every * (1 + logs), "cluster": asked}
        return run_job(self._config.model_copy(update=fields), self._folder)

    def _on_nodes(self) -> Measured:
        # As many CPUs as workers, so that each node has room for one.
        with ray_nodes([1] * CORES) as address:
            return self._job(CORES, address=address, cpus_per_worker=1.0)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each variant."""
        for name, all_measured in self.found.items():
            row: dict[str, Any] = {"variant": name, "rounds": len(all_measured)}
            row |= _middle(all_measured, "steps_s", spread=True)
            ratios = self.ratios(name, "bare_spare" if name == "spare" else "bare")
            row |= {"ratio": statistics.median(ratios), "ratio_spread": _spread(ratios)}
            for field in ("cpu_s", "waiting_share", "checkpoint_share"):
                row |= _middle(all_measured, field)
            if (parts := all_measured[-1].cpu_by_part) is not None:
                row |= {f"cpu_s_{part}": seconds for part, seconds in sorted(parts.items())}
            yield row

    def ratios(self, name: str, of: str = "bare") -> list[float]:
        """Speed against another variant, round by round."""
        if name not in self.found or of not in self.found:
            return []
        return [
            mine.steps_s / other.steps_s for mine, other in zip(self.found[name], self.found[of], strict=True)
        ]


def _middle(all_measured: Sequence[Measured], field: str, *, spread: bool = False) -> dict[str, Any]:
    values = [value for each in all_measured if (value := getattr(each, field)) is not None]
    if not values:
        return {}
    found: dict[str, Any] = {field: statistics.median(values)}
    return found | ({f"{field}_spread": _spread(values)} if spread else {})


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"


def _shown(measured: Measured) -> str:
    values = {name: value for name, value in vars(measured).items() if value is not None}
    return json.dumps(rounded(values))


# ---------------------------------------------------------------- the reader alone


def reader(setting: Setting, seconds: float) -> Iterator[dict[str, Any]]:
    """Patches for each second of one core, without and with LR, read from the store."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    make = setting.maker()
    for name, use in (("reader", lambda batch: batch), ("reader_and_lr", make)):
        batches = setting.reader().batches()
        measured = turn(lambda batches=batches, use=use: use(next(batches)), seconds)
        patches = setting.config.batch_size / measured.cpu_s
        row: dict[str, Any] = {"variant": name, "patches_per_second_per_core": patches}
        yield row
        batches.close()  # type: ignore[attr-defined]
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- a GPU, where there is one


def on_gpu(setting: Setting, seconds: float) -> Iterator[dict[str, Any]]:
    """Plain steps in several ways. Nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return
    pairs = Setting(setting.config, torch.device("cuda")).pairs()
    for name, (dtype, layout, mode, is_set) in GPU_WAYS.items():
        step = _gpu_step(setting, pairs, dtype, layout, mode, is_set=is_set)
        for _ in range(20):  # compilation and capture among them
            step()
        yield {"variant": f"gpu {name}", "steps_s": _gpu_rate(step, seconds)}


GPU_WAYS: dict[str, tuple[torch.dtype | None, torch.memory_format, str | None, bool]] = {
    "float32": (None, torch.contiguous_format, None, False),
    "bfloat16": (torch.bfloat16, torch.contiguous_format, None, False),
    "bfloat16, channels_last": (torch.bfloat16, torch.channels_last, None, False),
    "bfloat16, channels_last, compiled": (torch.bfloat16, torch.channels_last, "default", False),
    "bfloat16, channels_last, CUDA graphs": (torch.bfloat16, torch.channels_last, "reduce-overhead", False),
    "bfloat16, channels_last, set of uint8 on the device": (torch.bfloat16, torch.channels_last, None, True),
}
"""Type, memory layout, mode of torch.compile, and whether patches are cut from images on the device."""


def _gpu_step(
    setting: Setting,
    pairs: Sequence[PairBatch],
    dtype: torch.dtype | None,
    layout: torch.memory_format,
    mode: str | None,
    *,
    is_set: bool,
) -> Callable[[], object]:
    config, device = setting.config, torch.device("cuda")
    model: Any = Setting(config, device).network().to(memory_format=layout)
    run = model if mode is None else torch.compile(model, mode=mode)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    distance, degrade, scale = LOSSES[config.terms[0].loss], setting.degradation, config.model.scale
    images = torch.randint(0, 256, (256, config.model.channels, SIDE, SIDE), dtype=torch.uint8, device=device)
    batches = itertools.cycle(pairs)

    def cut() -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of the set with context, and their LR, all of it on the device."""
        context = degrade.context
        side = (config.data.patch_size + 2 * context) * scale
        places = (
            np.random.default_rng().integers(0, (SIDE - side) // scale + 1, (config.batch_size, 2)) * scale
        )
        numbers = np.random.default_rng().integers(0, len(images), config.batch_size)
        hr = torch.stack(
            [images[n, :, y : y + side, x : x + side] for n, (y, x) in zip(numbers, places, strict=True)]
        )
        hr = hr.float() / 255
        lr, edge = degrade(hr, [torch.Generator(device)] * len(hr)), context * scale
        return lr[..., context:-context, context:-context], hr[..., edge:-edge, edge:-edge]

    def step() -> None:
        if is_set:
            lr, hr = cut()
        else:
            pair = next(batches)
            lr, hr = pair.lr, pair.hr
        lr = lr.contiguous(memory_format=layout)
        with torch.autocast("cuda", dtype=dtype) if dtype else nullcontext():
            loss = distance(run(lr), hr)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _gpu_rate(step: Callable[[], object], seconds: float) -> float:
    """Steps a second; the device is waited for at both ends, and now and then so that no queue grows."""
    torch.cuda.synchronize()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        steps += 10
    return steps / (time.perf_counter() - began)


# ---------------------------------------------------------------- all of it


def summary(rounds: Rounds, rows: list[dict[str, Any]], gpu_patches: float) -> dict[str, Any]:
    """What is claimed."""
    by_name = {row["variant"]: row for row in rows}
    job = by_name.get("job", {})
    per_core = by_name["reader"]["patches_per_second_per_core"]
    found = {
        "bare_steps_s": by_name["bare"]["steps_s"],
        "fit_steps_s": by_name["fit"]["steps_s"],
        "job_steps_s": job.get("steps_s"),
        "ratio": job.get("ratio"),
        "fit_ratio": by_name["fit"]["ratio"],
        "cpu_ratio": by_name["bare"]["cpu_s"] / job["cpu_s"] if job else None,
        "waiting_share": job.get("waiting_share"),
        "checkpoint_share": job.get("checkpoint_share"),
        "patches_per_second_per_core": per_core,
        "patches_with_lr_per_second_per_core": by_name["reader_and_lr"]["patches_per_second_per_core"],
        "assumed_patches_per_second_of_a_gpu": gpu_patches,
        "cores_for_a_gpu": gpu_patches / per_core,
    }
    for name, key in (("workers", "workers_ratio"), ("nodes", "nodes_ratio")):
        if ratios := rounds.ratios(name, "job" if name == "workers" else "workers"):
            found[key] = statistics.median(ratios)
    if spare := by_name.get("spare"):
        found["spare_ratio"], found["spare_waiting_share"] = spare["ratio"], spare["waiting_share"]
    return {name: value for name, value in found.items() if value is not None}


def remarks(found: Mapping[str, Any]) -> list[str]:
    """For the page of results: what columns are, and what the cores of a machine can feed."""
    feeds = (
        f"One core reads and decodes {found['patches_per_second_per_core']:.0f} patches a second. A GPU that "
        f"takes {found['assumed_patches_per_second_of_a_gpu']:.0f}, which is assumed and not measured, needs "
        f"{found['cores_for_a_gpu']:.1f} cores: {1 / found['cores_for_a_gpu']:.2f} GPU workers for each core."
    )
    return [*REMARKS, feeds]


def main() -> None:
    """Measure, print the JSON, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--quick", action="store_true", help="fewer steps, noisier numbers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", default=VARIANTS, help=f"some of {VARIANTS}")
    parser.add_argument("--config", type=Path, default=ROOT / "jobs/configs/teacher_x4_alone.yaml")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints of the jobs")
    parser.add_argument("--job-seconds", type=float, default=20.0, help="of a job that are measured, about")
    parser.add_argument(
        "--gpu-patches", type=float, default=GPU_PATCHES, help="that one GPU is assumed to take a second"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(CORES)
    seconds = 2.0 if arguments.quick else 8.0
    with local_s3() as server, OnlyThisServer(server), tempfile.TemporaryDirectory() as temporary:
        server.make_bucket(BUCKET)
        target, folder = f"s3://{BUCKET}/shards", Path(temporary)
        make_shards(folder / "photos", target, 32 if arguments.quick else 160)
        setting = Setting(read_config(arguments.config, target, arguments))
        rows = [*reader(setting, seconds), *on_gpu(setting, seconds)]
        say("\n".join(json.dumps(rounded(row)) for row in rows))
        rounds = Rounds(setting, folder, arguments)
        rounds.run()
        rows = [*rounds.rows(), *rows]
    content = rounded(summary(rounds, rows, arguments.gpu_patches))
    content |= {"title": TITLE, "remarks": remarks(content), "config": str(arguments.config.name)}
    content |= {"rows": [rounded(row) for row in rows], **provenance.stamp()}
    write(content, arguments.json)


if __name__ == "__main__":
    main()
