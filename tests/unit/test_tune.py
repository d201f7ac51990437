"""Trials of a search: how they are resolved, refused, run, kept and written down."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from kdsr.cli import parse
from kdsr.config import DistillConfig, TeacherTrainingConfig, TuneConfig
from kdsr.errors import RequestError
from kdsr.store import open_store
from kdsr.training import Worker
from kdsr.tune import check, conclude, pending, row_of, run_trial
from kdsr.tune_report import Search, write_search
from tests.pictures import photograph
from tests.small_shards import row, write_set

RATE = "optimizer.learning_rate"


def config_of(folder: Path, **fields: Any) -> TuneConfig:
    base: dict[str, Any] = {
        "data": {"shards": f"{folder}/shards", "patch_size": 8, "patches_per_row": 4, "window_rows": 4},
        "model": {"kind": "espcn", "scale": 2, "num_features": 4},
        "optimizer": {"warmup_steps": 0, "ema_decay": 0.0},
        "num_steps": 4,
        "batch_size": 2,
        "precision": "float32",
        "log_every_steps": 1,
        "save_every_steps": 2,
        "validate_every_steps": 1,
        "num_validation_images": 1,
    }
    given: dict[str, Any] = {
        "base": base | fields.pop("base", {}),
        "space": {RATE: {"log_uniform": [1e-4, 1e-2]}},
        "output": f"{folder}/out",
        "num_trials": 3,
        "grace_steps": 1,
    }
    return TuneConfig.model_validate(given | fields)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    rows = [row(f"{seed}", photograph(seed, height=40, width=40), heldout=seed == 0) for seed in range(3)]
    write_set(open_store(f"file://{tmp_path}/shards"), [rows])
    return tmp_path


def test_trials_are_runs_that_differ_by_what_was_drawn_alone(tmp_path: Path) -> None:
    trials = config_of(tmp_path).trials()
    assert [trial.name for trial in trials] == ["trial-000", "trial-001", "trial-002"]
    assert all(trial.config.optimizer.learning_rate == trial.values[RATE] for trial in trials)
    same = [trial.config.model_dump(exclude={"name", "optimizer"}) for trial in trials]
    assert same[0] == same[1] == same[2]


def test_more_trials_leave_the_first_ones_what_they_were(tmp_path: Path) -> None:
    assert config_of(tmp_path, num_trials=5).trials()[:3] == config_of(tmp_path).trials()


def test_a_search_over_a_file_and_changes_is_that_over_its_fields(tmp_path: Path) -> None:
    content = {
        "student": {"kind": "espcn", "scale": 2},
        "teacher": {"uri": "edsr-small-x4"},
        "data": {"shards": "s"},
    }
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(content))
    flags = ["--base", str(path), "--output", str(tmp_path / "o"), "--changes", "{terms.0.weight: 0.5}"]
    found = parse(TuneConfig, [*flags, "--space", "{terms: {choice: [[{kind: pixel, loss: mse}]]}}"])
    assert found.run_class is DistillConfig and found.base_run().terms[0].weight == 0.5
    assert {trial.config.terms[0].loss for trial in found.trials()} == {"mse"}
    assert config_of(tmp_path).run_class is TeacherTrainingConfig


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (
            {"optimizer.learning_rat": {"choice": [1]}},
            "space.optimizer.learning_rat.*did you mean learning_rate",
        ),
        ({RATE: {"choice": [-1, -2]}}, f"space.{RATE}: none of its values is valid"),
        ({"model.num_features": {"integer": [-3, 0]}}, "space.model.num_features: none of its values"),
        ({"num_steps": {"choice": [1, 2]}}, "space.num_steps: trials are compared for one budget"),
        ({"data.degradation.kind": {"choice": ["bicubic"]}}, "on the same images"),
        ({"data": {"choice": [{}]}, "data.patch_size": {"choice": [8]}}, "data.patch_size is a part of"),
    ],
)
def test_a_space_that_cannot_be_is_refused_by_name(tmp_path: Path, space: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config_of(tmp_path, space=space)


def test_a_draw_that_is_no_run_is_drawn_again(tmp_path: Path) -> None:
    found = config_of(tmp_path, space={RATE: {"uniform": [-1.0, 1.0]}}, num_trials=20)
    assert all(trial.config.optimizer.learning_rate > 0 for trial in found.trials())


def test_a_budget_without_a_judge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="num_validation_images is 0"):
        config_of(tmp_path, base={"num_validation_images": 0})
    with pytest.raises(ValidationError, match="grace_steps 9 are more than num_steps 4"):
        config_of(tmp_path, grace_steps=9)


def test_a_trial_tells_all_it_reached_and_is_done_before_its_last_word(shards: Path) -> None:
    trial = config_of(shards).trials()[0]
    reports = run_trial(trial, Worker())
    told = [next(reports) for _ in range(4)]
    assert [report.step for report in told] == [1, 2, 3, 4]
    row = row_of(trial)
    assert row is not None and row.status == "done"
    assert row.heldout == tuple((report.step, report.psnr) for report in told)


def test_a_trial_that_was_stopped_in_the_middle_tells_again_what_it_had_reached(shards: Path) -> None:
    trial = config_of(shards).trials()[0]
    first = run_trial(trial, Worker())
    told = [next(first) for _ in range(3)]
    first.close()
    # Every step that is the best is saved, and a trial goes on from its last checkpoint.
    again = list(run_trial(trial, Worker()))
    assert again[:2] == told[:2] and [report.step for report in again] == [1, 2, 3, 4]


def test_a_trial_that_breaks_is_a_row_with_its_cause_and_is_left_alone(shards: Path) -> None:
    broken = config_of(shards, space={"init_from": {"choice": ["edsr-small-x4"]}}, num_trials=1)
    assert list(run_trial(broken.trials()[0], Worker())) == []
    found = Search(broken)
    assert "RequestError: init_from edsr-small-x4" in found.failed["trial-000"]
    assert pending(broken) == []
    assert len(pending(broken.model_copy(update={"retry_failed": True}))) == 1
    assert write_search(broken).sentence == "no trial is measured yet; 1 failed of 1 trials"
    with pytest.raises(RequestError, match="none of 1 trials can run; trial-000: init_from"):
        check(broken, broken.trials())


def test_a_search_with_another_space_does_not_take_over_what_lies_there(shards: Path) -> None:
    conclude(config_of(shards).trials()[0], {1: 20.0}, "done")
    with pytest.raises(RequestError, match=r"trial-000 was trained with other settings \(seed: was 0, now 7"):
        pending(config_of(shards, space={"seed": {"choice": [7]}, RATE: {"log_uniform": [1e-4, 1e-2]}}))


def test_a_search_that_was_begun_on_other_shards_is_refused_by_name(shards: Path) -> None:
    config = config_of(shards)
    list(run_trial(config.trials()[0], Worker()))
    check(config, pending(config))
    rows = [row(f"{seed}", photograph(seed + 9, height=40, width=40), heldout=seed == 0) for seed in range(3)]
    write_set(open_store(f"file://{shards}/shards"), [rows])
    with pytest.raises(RequestError, match=r"^run trial-000 in .* was begun on other shards at .*/shards"):
        check(config, pending(config))


def test_choices_of_any_kind_have_short_names_and_are_drawn(shards: Path) -> None:
    space = {
        "terms": {"choice": [[{"kind": "pixel"}], [{"kind": "pixel", "loss": "mse"}]]},
        "optimizer.clip_norm": {"choice": [None, 0.5]},
        "data.augment": {"choice": [True, False]},
        "optimizer.kind": {"choice": ["adam", "adamw"]},
    }
    config = config_of(shards, space=space, num_trials=12)
    for trial in config.trials():
        conclude(trial, {1: 20.0 + trial.number}, "done")
    table = write_search(config).table
    for name in ("choice 0", "choice 1", "null", "0.5", "true", "false", "adamw"):
        assert f" {name} |" in table
    assert (shards / "out/fields.png").exists()


def test_what_is_written_names_the_best_and_its_config_is_a_run(shards: Path) -> None:
    config = config_of(shards, num_trials=4)
    trials = config.trials()
    conclude(trials[0], {1: 20.0, 2: 21.0}, "stopped")
    conclude(trials[1], {1: 20.0, 2: 24.0, 3: 22.0, 4: 23.0}, "done")
    conclude(trials[2], {}, "failed", cause="NonFiniteLoss: step 1")
    report = write_search(config)
    assert report.sentence == (
        f"best: trial-001, 24.000 dB held out at step 2; 1 missing and 1 failed of 4 trials: "
        f"{shards}/out/best.yaml"
    )
    lines = report.table.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"trial-00{n}" for n in (1, 0, 2, 3)]
    best = parse(TeacherTrainingConfig, ["--config", f"{shards}/out/best.yaml"])
    assert best.optimizer.learning_rate == trials[1].values[RATE] and best.name == "best-001"
    results = json.loads((shards / "out/trials.json").read_text())
    assert [each["status"] for each in results["trials"]] == ["stopped", "done", "failed", "missing"]
    for name in ("curves.png", "fields.png"):
        assert (shards / "out" / name).read_bytes().startswith(b"\x89PNG")
