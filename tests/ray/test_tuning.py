"""A whole search over Ray Tune: weak trials stopped early, an interruption, and a second start."""

import gc
from pathlib import Path

import pytest

import cluster.tune
from cluster.tune import tune
from kdsr.config import TuneConfig
from kdsr.store import open_store
from kdsr.tune import pending, row_of
from tests.pictures import photograph
from tests.small_shards import row, write_set
from tests.unit.test_tune import RATE, config_of

GOOD, BAD = 1e-2, 1e-9


@pytest.fixture
def config(ray_local: None, tmp_path: Path) -> TuneConfig:
    rows = [row(f"{seed}", photograph(seed, height=40, width=40), heldout=seed == 0) for seed in range(3)]
    write_set(open_store(f"file://{tmp_path}/shards"), [rows])
    config = config_of(
        tmp_path,
        space={RATE: {"choice": [GOOD, BAD]}},
        num_trials=4,
        grace_steps=2,
        reduction=2,
        seed=10,
        cluster={"num_workers": 1, "cpus_per_worker": 1},
    )
    assert [trial.values[RATE] for trial in config.trials()] == [GOOD, BAD, GOOD, BAD]
    return config


@pytest.mark.timeout(600)  # It starts four processes, one for each trial.
def test_a_search_that_is_interrupted_goes_on_with_what_is_left_and_judges_by_what_was_done(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = cluster.tune._Judge.ended

    def interrupted(judge: cluster.tune._Judge, name: str, cause: str = "") -> None:
        ended(judge, name, cause)
        if name == "trial-001":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cluster.tune._Judge, "ended", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tune(config)
    gc.collect()  # The trials of an interrupted search live as long as what Tune knew of them.
    assert [trial.name for trial in pending(config)] == ["trial-002", "trial-003"]
    # Files only: a trial that was stopped may still be deleting its checkpoints, which touches their folder.
    # So may the history be of the one that was stopped when the interruption came.
    trials = tmp_path / "out/trials"
    there = {path for path in trials.glob("trial-00[01]/*") if path.is_file()}
    before = {path: path.stat().st_mtime_ns for path in there - {trials / "trial-001/metrics.jsonl"}}
    assert len(before) >= 4

    # Of the second start the last trial is as weak as the second was, and only earlier ones show it.
    tune(config)
    rows = [row_of(trial) for trial in config.trials()]
    assert [each.status for each in rows if each] == ["done", "stopped", "done", "stopped"]
    assert [each.heldout[-1][0] for each in rows if each] == [4, 2, 4, 2]
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert not list((tmp_path / "out/trials").glob("*/checkpoints/*"))
    assert pending(config) == []
