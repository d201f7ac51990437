"""Cells of a comparison: which are left, how one is trained and measured, and what its steps cost.

The ledger is one row beside each run, written last. Knows no cluster; nothing is summed up here.
"""

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from kdsr import provenance, training
from kdsr.benchmark import benchmark_names, open_benchmark
from kdsr.checkpoint import load_model
from kdsr.config import Cell, CompareConfig, DistillConfig
from kdsr.engine import give_back_memory
from kdsr.errors import DataError, KeyNotFound, RequestError
from kdsr.evaluate import Score, evaluate_pairs, plan_rounds, upscaling
from kdsr.models import build_model, fold, num_parameters
from kdsr.spec import Frozen
from kdsr.store import Store, open_store
from kdsr.training import (
    RunRow,
    Worker,
    changed_settings,
    discard_checkpoints,
    exported_card,
    logged,
    rehearse,
    require_same_sources,
    row_beside,
    saved_step,
    train,
)
from kdsr.training import check as check_run

ROW_KEY = "row.json"
WARMUP_STEPS = 2
"""Steps before those that are measured."""


# ---------------------------------------------------------------- the ledger


class ImageScore(Frozen):
    """How close one output is to HR."""

    psnr_y: float | None
    """In dB; None for an exact copy."""
    ssim_y: float

    @property
    def decibels(self) -> float:
        """`psnr_y` as a number."""
        return math.inf if self.psnr_y is None else self.psnr_y


class BenchmarkScores(Frozen):
    """What one cell reached on one benchmark, image by image."""

    uri: str
    images: dict[str, ImageScore]


class Row(RunRow):
    """`row.json` beside a run: what became of a cell."""

    version: Literal[1] = 1
    student: str
    method: str
    seed: int
    scale: int
    num_parameters: int
    cause: str = ""
    """Why the cell failed; empty when it is done."""
    benchmarks: dict[str, BenchmarkScores] = Field(default={})
    num_threads: int
    device: str
    machine: str

    def covers(self, benchmarks: dict[str, str]) -> bool:
        """Whether it was measured on all of `benchmarks`, name to uri."""
        return benchmarks.items() <= {name: each.uri for name, each in self.benchmarks.items()}.items()


class StepCost(Frozen):
    """What a step of a method costs, measured over all that weights do in a run."""

    version: Literal[1] = 1
    seconds_per_step: float
    """Mean, waiting for data left out."""
    median_seconds_per_step: float
    cpu_seconds_per_step: float | None
    """Of all threads of the process; None on a GPU."""
    peak_bytes: int
    """Above what the process had before networks were built; on a GPU what torch had in use."""
    num_steps: int
    num_threads: int
    device: str
    machine: str
    config: dict[str, Any]


@dataclass(frozen=True)
class Ledger:
    """What is known of the cells of a comparison."""

    config: CompareConfig

    @property
    def store(self) -> Store:
        """Where the comparison lies."""
        return open_store(self.config.output, self.config.store)

    def row(self, cell: Cell) -> Row | None:
        """What became of `cell`. Raises RequestError for one that was trained with other settings."""
        who = f"cell {cell.name} in {self.config.output}"
        return row_beside(run_store(cell), ROW_KEY, Row, cell.config, who=who)

    def cost(self, cell: Cell, *, num_threads: int | None = None) -> StepCost | None:
        """What a step of the method costs, if it was measured with these settings and `num_threads`."""
        try:
            cost = StepCost.model_validate_json(self.store.get(_cost_key(cell)))
        except (KeyNotFound, ValidationError):
            return None
        same = not changed_settings(_rehearsal(cell.config, cost.num_steps), cost.config)
        return cost if same and num_threads in (None, cost.num_threads) else None

    def put_cost(self, cell: Cell, cost: StepCost) -> None:
        """Keep it for later starts."""
        self.store.put(_cost_key(cell), (cost.model_dump_json(indent=2) + "\n").encode())

    def curve(self, cell: Cell) -> list[dict[str, float]]:
        """What the run logged, a dict for each step that it logged."""
        return logged(cell.config)


def run_store(cell: Cell) -> Store:
    """Where the run of a cell lies."""
    return training.run_store(cell.config)


def benchmarks_of(config: CompareConfig) -> dict[str, str]:
    """Short name to uri."""
    return dict(zip(benchmark_names(config.benchmark), config.benchmark, strict=True))


def pending(config: CompareConfig) -> list[Cell]:
    """Cells that this start is to train or measure, in order. Raises RequestError where `Ledger.row` does."""
    ledger, benchmarks = Ledger(config), benchmarks_of(config)
    left = []
    for cell in filter(config.is_selected, config.cells()):
        row = ledger.row(cell)
        is_done = row is not None and not row.cause and row.covers(benchmarks)
        is_given_up = row is not None and row.cause and not config.retry_failed
        if not is_done and not is_given_up:
            left.append(cell)
    return left


def check(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """Refuse what cannot work, before anything runs: RequestError that names the cells.

    Cells that differ by their seed alone are asked once.
    """
    refused: defaultdict[str, list[str]] = defaultdict(list)
    for cell in {(cell.student, cell.method): cell for cell in reversed(cells)}.values():
        try:
            _require_measurable(config, cell)
            check_run(cell.config)
        except RequestError as error:
            refused[str(error)].append(cell.name)
    if refused:
        raise RequestError(
            "; ".join(f"{', '.join(reversed(names))}: {error}" for error, names in refused.items())
        )
    if cells:
        # What is trained now stands in one table with what was trained before.
        require_same_sources(cell.config for cell in config.cells())


def _require_measurable(config: CompareConfig, cell: Cell) -> None:
    benchmarks = [open_benchmark(uri, name, config.store) for name, uri in benchmarks_of(config).items()]
    plan_rounds(benchmarks, {cell.student: cell.config.student.scale})


# ---------------------------------------------------------------- one cell


def run_cell(cell: Cell, benchmarks: dict[str, str], worker: Worker) -> Iterator[int]:
    """Train what is left of `cell`, measure it and write its row; yields the steps that are done.

    An error of the cell itself becomes its row. Where the cell is done its checkpoints are deleted; the
    exported model stays. Raises StoreError.
    """
    try:
        if not _is_trained(cell):
            for progress in train(cell.config, worker):
                yield progress.step
        row = _row(cell, worker, benchmarks=_measure(cell, benchmarks, str(worker.device)))
    except (DataError, RequestError) as error:
        row = _row(cell, worker, cause=f"{type(error).__name__}: {error}")
    store = run_store(cell)
    store.put(ROW_KEY, (row.model_dump_json(indent=2) + "\n").encode())
    if not row.cause:
        discard_checkpoints(cell.config)


def steps_done(cell: Cell) -> int:
    """The step from which a start goes on."""
    return cell.config.num_steps if _is_trained(cell) else saved_step(cell.config)


def _is_trained(cell: Cell) -> bool:
    """By its checkpoints or, where they are deleted, by its row."""
    if exported_card(cell.config) is not None:
        return True
    store = run_store(cell)
    try:
        row = Row.model_validate_json(store.get(ROW_KEY))
    except KeyNotFound:
        return False
    return not row.cause and store.exists("model/card.json")


def _measure(cell: Cell, benchmarks: dict[str, str], device: str) -> dict[str, BenchmarkScores]:
    upscale, scale = model_of(cell, device=device), cell.config.student.scale
    found = {}
    for name, uri in benchmarks.items():
        pairs = open_benchmark(uri, name, cell.config.store).pairs(scale)
        images = {score.name: _image_score(score) for score in evaluate_pairs(upscale, pairs, scale)}
        found[name] = BenchmarkScores(uri=uri, images=images)
    return found


def model_of(cell: Cell, *, device: str = "cpu") -> Callable[[Any], Any]:
    """How the exported model of `cell` upscales an image."""
    model = load_model(f"{run_store(cell).uri}/model", cell.config.store).model
    return upscaling(model, device=device)


def _image_score(score: Score) -> ImageScore:
    return ImageScore(psnr_y=score.psnr_y if math.isfinite(score.psnr_y) else None, ssim_y=score.ssim_y)


def _row(
    cell: Cell, worker: Worker, *, cause: str = "", benchmarks: dict[str, BenchmarkScores] | None = None
) -> Row:
    return Row(
        student=cell.student,
        method=cell.method,
        seed=cell.seed,
        scale=cell.config.student.scale,
        num_parameters=num_parameters(fold(build_model(cell.config.student))),
        cause=cause,
        benchmarks=benchmarks or {},
        num_threads=torch.get_num_threads(),
        device=worker.device.type,
        machine=provenance.machine(),
        config=cell.config.model_dump(mode="json"),
    )


# ---------------------------------------------------------------- cost


def measure_cost(cell: Cell, *, num_steps: int, worker: Worker) -> StepCost:
    """What the steps of a cell's method cost, over a whole run made as short as `num_steps`.

    The process should do nothing else. Raises what `kdsr.training.check` raises, and NonFiniteLoss.
    """
    config = _rehearsal(cell.config, num_steps)
    before = _memory(worker.device)
    state, reports = rehearse(config, worker)
    for _ in range(WARMUP_STEPS):
        next(reports)
    state.step = 0
    # What reading, loading a teacher and slicing left behind is no part of a step.
    gc.collect()
    give_back_memory()
    _forget_peak(worker.device)
    began = time.process_time()
    seconds = [report.seconds - report.waiting_seconds for report in reports]
    cpu_seconds = (time.process_time() - began) / len(seconds)
    return StepCost(
        seconds_per_step=statistics.fmean(seconds),
        median_seconds_per_step=statistics.median(seconds),
        cpu_seconds_per_step=cpu_seconds if worker.device.type == "cpu" else None,
        peak_bytes=max(0, _peak_memory(worker.device) - before),
        num_steps=num_steps,
        num_threads=torch.get_num_threads(),
        device=worker.device.type,
        machine=provenance.machine(),
        config=config.model_dump(mode="json"),
    )


def _rehearsal(config: DistillConfig, num_steps: int) -> DistillConfig:
    """The same for every seed, and never a run that lies somewhere."""
    place = {"output": f"{config.output}/rehearsal", "name": "rehearsal", "seed": 0}
    return config.model_copy(update={"num_steps": num_steps, **place})


def _cost_key(cell: Cell) -> str:
    return f"costs/{cell.student}-{cell.method}.json"


def _memory(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else _from_status("VmRSS")


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _from_status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    # Where the kernel refuses, the peak is that of the whole process, which is no less.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _from_status(name: str) -> int:
    """A number of bytes that the kernel tells of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0
