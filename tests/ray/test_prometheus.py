"""What a run tells of itself arrives at the port that Prometheus asks."""

import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.metrics import RunMetrics
from kdsr.config import TeacherTrainingConfig
from kdsr.store import open_store
from kdsr.training import Progress, Worker, train
from tests.pictures import photograph
from tests.small_shards import row, write_set
from tests.unit.test_tune import config_of

WAIT_SECONDS = 60


def numbers(run: str) -> dict[str, float]:
    """Values of `run` by name and, where there is one, term or images; none while nobody answers."""
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        if line.startswith("ray_kdsr_train_") and f'run="{run}"' in line and 'rank="0"' in line:
            name, part = line.partition("{")[0], re.search(r'(?:term|images)="(\w+)"', line)
            found[f"{name}/{part[1]}" if part else name] = float(line.rpartition(" ")[2])
    return found


def told(config: TeacherTrainingConfig) -> list[Progress]:
    """What a run tells, taken over by metrics in this process."""
    metrics, reports = RunMetrics(config, Worker(), done=0), []
    for progress in train(config):
        metrics.observe(progress)
        reports.append(progress)
    return reports


def test_numbers_of_a_run_arrive_at_a_scrape(ray_local: None, tmp_path: Path) -> None:
    rows = [row(f"{seed}", photograph(seed, height=40, width=40), heldout=seed == 0) for seed in range(3)]
    write_set(open_store(f"file://{tmp_path}/shards"), [rows])
    config: Any = config_of(tmp_path, base={"log_every_steps": 2}).base_run()
    config = config.model_copy(update={"name": "scraped"})
    reports = told(config)
    deadline = time.monotonic() + WAIT_SECONDS
    before: dict[str, float] = {}
    # Ray hands metrics over every few seconds, one after the other: a scrape may come in between.
    while (found := numbers("scraped")).get("ray_kdsr_train_step") != 4 or found != before:
        assert time.monotonic() < deadline, found
        before = found
        time.sleep(0.5)
    assert found["ray_kdsr_train_steps_total"] == 4 and found["ray_kdsr_train_patches_total"] == 8
    last = reports[-1].metrics
    assert found["ray_kdsr_train_psnr_y_db/heldout"] == pytest.approx(last["heldout_psnr_y"])
    assert found["ray_kdsr_train_loss/loss"] == pytest.approx(last["loss"])
    assert found["ray_kdsr_train_loss/pixel_l1"] == pytest.approx(last["pixel_l1"])
    saves = [save for report in reports for save in report.saves]
    assert found["ray_kdsr_train_checkpoints_total"] == len(saves) >= 2
    assert found["ray_kdsr_train_checkpoint_bytes_total"] == sum(save.num_bytes for save in saves) > 0
    assert found["ray_kdsr_train_seconds_total"] >= found["ray_kdsr_train_waiting_seconds_total"] > 0
