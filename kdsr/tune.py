"""Trials of a search: which are left, how one is trained, and what is kept of each.

The ledger is one row beside each run, written last. Knows no cluster; who is stopped is decided elsewhere.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kdsr.config import Trial, TuneConfig
from kdsr.errors import DataError, RequestError
from kdsr.training import (
    HELD_OUT,
    RunRow,
    Worker,
    discard_checkpoints,
    logged,
    require_same_sources,
    row_beside,
    run_store,
    saved_step,
    train,
)
from kdsr.training import check as check_run

ROW_KEY = "trial.json"


class TrialRow(RunRow):
    """`trial.json` beside a run: what became of a trial."""

    version: Literal[1] = 1
    status: Literal["done", "stopped", "failed"]
    """Stopped: weaker than others after as many steps."""
    cause: str = ""
    """Why it failed."""
    heldout: tuple[tuple[int, float], ...]
    """Steps and the held-out PSNR in dB there."""

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the highest held-out PSNR, and that; None where nothing was measured."""
        return max(self.heldout, key=lambda point: point[1], default=None)


@dataclass(frozen=True)
class Report:
    """Held-out PSNR in dB that a trial has after `step` steps."""

    step: int
    psnr: float


def row_of(trial: Trial) -> TrialRow | None:
    """What became of `trial`. Raises RequestError for one that was trained with other settings."""
    return row_beside(run_store(trial.config), ROW_KEY, TrialRow, trial.config, who=trial.name)


def conclude(
    trial: Trial,
    heldout: Mapping[int, float],
    status: Literal["done", "stopped", "failed"],
    *,
    cause: str = "",
) -> None:
    """Write the row of `trial`. Its checkpoints are deleted; of a failed one they stay, for another try."""
    row = TrialRow(
        status=status,
        cause=cause,
        heldout=tuple(sorted(heldout.items())),
        config=trial.config.model_dump(mode="json"),
    )
    run_store(trial.config).put(ROW_KEY, (row.model_dump_json(indent=2) + "\n").encode())
    if status != "failed":
        discard_checkpoints(trial.config)


def pending(config: TuneConfig) -> list[Trial]:
    """Trials that this start is to run, in order. Raises RequestError where `row_of` does."""
    rows = [(trial, row_of(trial)) for trial in config.trials()]
    return [trial for trial, row in rows if row is None or (row.status == "failed" and config.retry_failed)]


def concluded(config: TuneConfig) -> list[tuple[Trial, TrialRow]]:
    """Trials with a row that did not fail: what those that are left are judged against."""
    rows = [(trial, row_of(trial)) for trial in config.trials()]
    return [(trial, row) for trial, row in rows if row is not None and row.status != "failed"]


def discard_left_over(config: TuneConfig) -> None:
    """Delete checkpoints that were written after their trial was over. For when no trial runs."""
    for trial, _ in concluded(config):
        discard_checkpoints(trial.config)


def check(config: TuneConfig, trials: Sequence[Trial]) -> None:
    """Raise RequestError when no trial can run, before any does. Of some, the cause becomes their row.

    Also when an earlier trial of the search was begun on other shards or teachers.
    """
    require_same_sources(trial.config for trial in config.trials())
    causes = []
    for trial in trials:
        try:
            inputs = check_run(trial.config)
        except RequestError as error:
            causes.append(f"{trial.name}: {error}")
            continue
        if inputs.index.num_heldout_rows == 0:
            raise RequestError(
                f"{trial.config.data.shards} holds nothing out, and trials are judged by held-out PSNR; "
                f"make shards with a larger heldout_fraction"
            )
        return
    if causes:
        raise RequestError(f"none of {len(trials)} trials can run; {causes[0]}")


def run_trial(trial: Trial, worker: Worker) -> Generator[Report, None, None]:
    """Run what is left of `trial`, telling all that it reached so far, and write its row.

    The last word comes after the row, so that whoever stops a trial at its end stops one that is done. An
    error of the trial itself becomes its row. Raises StoreError.
    """
    heldout = _reached(trial)
    last = trial.config.num_steps
    yield from (Report(step, psnr) for step, psnr in heldout.items() if step < last)
    try:
        for progress in train(trial.config, worker):
            if HELD_OUT in progress.metrics:
                heldout[progress.step] = progress.metrics[HELD_OUT]
                if progress.step < last:
                    yield Report(progress.step, heldout[progress.step])
    except (DataError, RequestError) as error:
        conclude(trial, heldout, "failed", cause=f"{type(error).__name__}: {error}")
        return
    conclude(trial, heldout, "done")
    yield Report(last, heldout[last])


def _reached(trial: Trial) -> dict[int, float]:
    """By step what an earlier start measured, as far as this one goes on from it."""
    done = saved_step(trial.config)
    rows = [row for row in logged(trial.config) if row["step"] <= done and HELD_OUT in row]
    return {int(row["step"]): row[HELD_OUT] for row in rows}
