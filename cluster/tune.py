"""Run the trials of a search with Ray Tune, which stops weak ones early (ASHA). Knows no pixels.

What is done is remembered by the ledger of `kdsr.tune` and not by Tune: a start tells a fresh scheduler what
earlier ones reached, so it needs no pickled state, which another version of Ray could not read.

ASHA: Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020.
"""

import logging
import os
import sys
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from ray import tune as ray_tune
from ray.tune.result import RESULT_DUPLICATE
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from tqdm import tqdm

from cluster import alone, session
from kdsr import lease
from kdsr.config import Trial, TuneConfig
from kdsr.progress import progress_bar
from kdsr.store import open_store
from kdsr.tune import check, conclude, concluded, discard_left_over, pending, run_trial

METRIC, TIME = "psnr", "step"
SETTINGS = {
    # The row of a trial and its run say all; Tune's own files and tables would only repeat it.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    # A stop by the user is one for us as well.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}


def tune(config: TuneConfig) -> None:
    """Run the trials that are left.

    Raises RequestError before anything runs, also when another driver works on the search.
    """
    if not pending(config):
        return
    store = open_store(config.output, config.store)
    with lease.held_throughout(store, what=f"the search in {config.output}"):
        # Whoever had the lease before may have done all of it.
        if trials := pending(config):
            _run(config, trials)


def _run(config: TuneConfig, trials: Sequence[Trial]) -> None:
    check(config, trials)
    session.connect(config.cluster)
    session.await_capacity(config.cluster)
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    # At the end Tune looks for the files that it was told not to write.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    with progress_bar(len(trials), unit="trial") as bar:
        _tuner(config, trials, _Judge(config, trials, bar)).fit()
    # What a process wrote that did not end in time and was killed.
    discard_left_over(config)


def _tuner(config: TuneConfig, trials: Sequence[Trial], judge: "_Judge") -> ray_tune.Tuner:
    cluster = config.cluster
    resources = {"cpu": session.worker_cpus(cluster), "gpu": int(cluster.use_gpu)}
    work = ray_tune.with_parameters(
        _Work, trials={trial.name: trial for trial in trials}, arguments=alone.arguments(cluster)
    )
    filesystem, root = open_store(config.output, config.store).arrow()
    return ray_tune.Tuner(
        ray_tune.with_resources(work, resources),
        param_space={"trial": ray_tune.grid_search([trial.name for trial in trials])},
        tune_config=ray_tune.TuneConfig(
            metric=METRIC, mode="max", scheduler=judge, max_concurrent_trials=cluster.most_workers
        ),
        run_config=ray_tune.RunConfig(
            name=uuid.uuid4().hex[:12],
            # Nothing of use is written there; Ray only wants a place that all nodes see.
            storage_path=f"{root}/ray",
            storage_filesystem=filesystem,
            failure_config=ray_tune.FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[judge.listener()],
            verbose=0,
        ),
    )


class _Work(ray_tune.Trainable):  # type: ignore[misc]
    """What one process does for one trial, held-out measurement by held-out measurement.

    Not a function, whose thread Tune lets run on when the trial is told to stop: what it was writing would
    come after the driver believes it gone.
    """

    def setup(
        self, setup: Mapping[str, str], *, trials: Mapping[str, Trial], arguments: dict[str, Any]
    ) -> None:
        """Called by Tune in the process of the trial."""
        self._reports = run_trial(trials[setup["trial"]], alone.worker(arguments))

    def step(self) -> dict[str, Any]:
        """Train to the next measurement. After the last one Tune takes that again, and ends the trial."""
        report = next(self._reports, None)
        if report is None:
            return {RESULT_DUPLICATE: True}
        return {TIME: report.step, METRIC: report.psnr}

    def cleanup(self) -> None:
        """End where the trial is. What it is writing is written first."""
        self._reports.close()


class _Judge(ASHAScheduler):  # type: ignore[misc]
    """ASHA that knows what earlier starts reached, and writes down whom it stops."""

    def __init__(self, config: TuneConfig, trials: Sequence[Trial], bar: "tqdm[Any]") -> None:
        super().__init__(
            time_attr=TIME,
            max_t=trials[0].config.num_steps,
            grace_period=config.grace_steps,
            reduction_factor=config.reduction,
        )
        self._trials, self._bar = {trial.name: trial for trial in trials}, bar
        self._heldout: dict[str, dict[int, float]] = defaultdict(dict)
        self._earlier = concluded(config)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Tune says what is judged; from then on results can be told."""
        known = super().set_search_properties(metric, mode, **spec)
        for trial, row in self._earlier:
            self._tell(trial.name, row.heldout)
        self._earlier = []
        return bool(known)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether `trial` goes on; one that does not is stopped for good."""
        own = self._trials[trial.config["trial"]]
        self._heldout[own.name][result[TIME]] = result[METRIC]
        self._bar.set_description(self._describe())
        verdict = super().on_trial_result(tune_controller, trial, result)
        # A trial that came to an end, and is only told of again, has written its row itself.
        is_over = result.get("done") or result[TIME] >= own.config.num_steps
        if verdict == TrialScheduler.STOP and not is_over:
            conclude(own, self._heldout[own.name], "stopped")
        return str(verdict)

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles it at once, though nobody reads that; a terminal's bar cannot be."""
        return self.__dict__ | {"_bar": None}

    def listener(self) -> ray_tune.Callback:
        """What is done where a trial ends."""
        return _Listener(self)

    def ended(self, name: str, cause: str = "") -> None:
        """One trial is over; where its process failed or was lost too often, `cause` says why."""
        self._bar.update()
        if cause:
            conclude(self._trials[name], self._heldout[name], "failed", cause=cause)
            tqdm.write(f"{name}: {cause}", file=sys.stderr)

    def _tell(self, name: str, heldout: Sequence[tuple[int, float]]) -> None:
        """Let the scheduler see a trial that is not run again."""
        stub = SimpleNamespace(trial_id=name)
        super().on_trial_add(None, stub)
        for step, psnr in heldout:
            super().on_trial_result(None, stub, {TIME: step, METRIC: psnr})

    def _describe(self) -> str:
        reached = ((max(values.values()), name) for name, values in self._heldout.items())
        psnr, name = max(reached)
        return f"best {psnr:.2f} dB, {name}"


class _Listener(ray_tune.Callback):  # type: ignore[misc]
    """Tune's word that a trial is over, for the judge."""

    def __init__(self, judge: _Judge) -> None:
        self._judge = judge

    def on_trial_complete(self, **info: Any) -> None:
        """It came to its end, or was stopped."""
        self._judge.ended(info["trial"].config["trial"])

    def on_trial_error(self, **info: Any) -> None:
        """Its process failed or was lost more often than is allowed."""
        error = info["trial"].get_pickled_error() or info["trial"].get_error() or "its worker was lost"
        self._judge.ended(info["trial"].config["trial"], cause=session.last_line(error))
