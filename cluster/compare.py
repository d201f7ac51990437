"""Train and measure the cells of a comparison side by side, then what their steps cost. Knows no pixels.

A cell is one task in a process of its own. Only numbers of steps travel through Ray; rows go to the ledger.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from cluster import alone, session
from kdsr import lease
from kdsr.compare import Ledger, StepCost, benchmarks_of, check, measure_cost, pending, run_cell, steps_done
from kdsr.config import Cell, ClusterConfig, CompareConfig
from kdsr.errors import KdsrError
from kdsr.progress import progress_bar


def compare(config: CompareConfig) -> dict[str, str]:
    """Train what is missing of the cells that are selected, and measure what their steps cost.

    Returns the causes of cells that could not be finished and have no row, by name: their workers were lost
    or met an error that nobody foresaw. A rerun tries these again. Raises RequestError before anything runs,
    also when another driver works on the comparison.
    """
    if not pending(config) and not (config.measure_cost and _chosen(config)):
        return {}
    with lease.held_throughout(Ledger(config).store, what=f"the comparison in {config.output}"):
        return _do_what_is_missing(config)


def _do_what_is_missing(config: CompareConfig) -> dict[str, str]:
    cells = pending(config)
    check(config, cells)
    session.connect(config.cluster)
    session.await_capacity(config.cluster)
    lost = _train(config, cells) if cells else {}
    if config.measure_cost:
        _measure_costs(config)
    return lost


# ---------------------------------------------------------------- cells


def _train(config: CompareConfig, cells: Sequence[Cell]) -> dict[str, str]:
    done = {cell.name: steps_done(cell) for cell in cells}
    # Only the steps of this start are on the bar: those of an earlier one would make its ETA lie.
    total = sum(cell.config.num_steps - done[cell.name] for cell in cells)
    with progress_bar(total, unit="step") as bar:
        return _Field(config, bar, done).run(cells)


class _Field:
    """Cells that run, those that wait, and how often workers of one were lost."""

    def __init__(self, config: CompareConfig, bar: "tqdm[Any]", done: dict[str, int]) -> None:
        self.config, self.bar, self.done = config, bar, done
        self.running: dict[Any, Cell] = {}
        self.deaths: dict[str, int] = {}
        self.lost: dict[str, str] = {}

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """All of them, `most_workers` side by side; returns the causes of those that were given up."""
        waiting, finished = deque(cells), 0
        while waiting or self.running:
            while waiting and len(self.running) < self.config.cluster.most_workers:
                self._start(waiting.popleft())
            self.bar.set_description(f"{finished} of {len(cells)} cells")
            (stream,), _ = ray.wait(list(self.running), num_returns=1)
            if not self._advance(stream):
                cell = self.running.pop(stream)
                if self._is_to_be_repeated(cell):
                    waiting.appendleft(cell)
                else:
                    finished += 1
        return self.lost

    def _start(self, cell: Cell) -> None:
        arguments = _arguments(self.config) | {"cell": cell, "benchmarks": benchmarks_of(self.config)}
        task = _task(_train_cell, self.config.cluster, num_returns="streaming")
        self.running[task.remote(arguments)] = cell

    def _advance(self, stream: Any) -> bool:
        """Whether the cell goes on after its next word."""
        cell = self.running[stream]
        try:
            step = ray.get(next(stream))
        except StopIteration:
            self._count(cell, cell.config.num_steps)
            return False
        except RayError as error:
            self._lose(cell, error)
            return False
        self._count(cell, step)
        return True

    def _count(self, cell: Cell, step: int) -> None:
        self.bar.update(max(0, step - self.done[cell.name]))
        self.done[cell.name] = max(step, self.done[cell.name])

    def _lose(self, cell: Cell, error: RayError) -> None:
        self.lost[cell.name] = session.last_line(error)
        # An error of the code would only come again; a lost worker goes on from the last checkpoint.
        is_final = isinstance(error, RayTaskError)
        self.deaths[cell.name] = self.config.cluster.max_failures + 1 if is_final else self._deaths(cell) + 1
        tqdm.write(f"{cell.name}: {self.lost[cell.name]}", file=sys.stderr)

    def _deaths(self, cell: Cell) -> int:
        return self.deaths.get(cell.name, 0)

    def _is_to_be_repeated(self, cell: Cell) -> bool:
        again = cell.name in self.lost and self._deaths(cell) <= self.config.cluster.max_failures
        if again:
            del self.lost[cell.name]
        return again


def _train_cell(arguments: dict[str, Any]) -> Iterator[int]:
    """What one worker does for one cell; gives the steps that are done."""
    yield from run_cell(arguments["cell"], arguments["benchmarks"], alone.worker(arguments))


# ---------------------------------------------------------------- cost


def _chosen(config: CompareConfig) -> dict[tuple[str, str], Cell]:
    """Of each student and method that was selected a cell that is done."""
    ledger = Ledger(config)
    found: dict[tuple[str, str], Cell] = {}
    for cell in filter(config.is_selected, config.cells()):
        row = ledger.row(cell)
        if row is not None and not row.cause:
            found.setdefault((cell.student, cell.method), cell)
    return found


def _measure_costs(config: CompareConfig) -> None:
    """One at a time with nothing beside it. One that cannot be measured stays without a cost."""
    ledger, arguments = Ledger(config), _arguments(config)
    chosen = _chosen(config).values()
    left = [cell for cell in chosen if ledger.cost(cell, num_threads=arguments["num_threads"]) is None]
    if not left:
        return
    task = _task(_measure_cell, config.cluster)
    with progress_bar(len(left), unit="method") as bar:
        bar.set_description("cost of a step")
        for cell in left:
            try:
                ledger.put_cost(cell, ray.get(task.remote(arguments | {"cell": cell})))
            except (RayError, KdsrError) as error:
                tqdm.write(f"cost of {cell.name}: {session.last_line(error)}", file=sys.stderr)
            bar.update()


def _measure_cell(arguments: dict[str, Any]) -> StepCost:
    return measure_cost(arguments["cell"], num_steps=arguments["cost_steps"], worker=alone.worker(arguments))


# ---------------------------------------------------------------- both


def _task(work: Callable[[dict[str, Any]], Any], config: ClusterConfig, **options: Any) -> Any:
    """`work` in a process of its own: what one leaves behind would be in memory and threads of the next."""
    resources = {"num_cpus": session.worker_cpus(config), "num_gpus": int(config.use_gpu)}
    return ray.remote(max_retries=0, max_calls=1, **resources, **options)(work)


def _arguments(config: CompareConfig) -> dict[str, Any]:
    return alone.arguments(config.cluster) | {"cost_steps": config.cost_steps}
