"""Training over Ray's workers: the same result as without them, and errors that reach the person."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.shard import shard
from cluster.train import run
from kdsr.checkpoint import load_model
from kdsr.config import (
    ClusterConfig,
    DataConfig,
    OptimizerConfig,
    PixelTerm,
    ShardConfig,
    TeacherTrainingConfig,
)
from kdsr.errors import NonFiniteLoss, RequestError
from kdsr.spec import EspcnSpec
from kdsr.training import train
from tests.pictures import write_photographs

DIVERGING = OptimizerConfig(learning_rate=1e25, warmup_steps=0)


@pytest.fixture(scope="module")
def shards(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("train")
    write_photographs(folder / "photos", 8)
    config = ShardConfig(input=str(folder / "photos"), output=str(folder / "shards"), heldout_fraction=0.3)
    assert shard(config).index.num_heldout_rows > 0
    return f"{folder}/shards"


def config_for(shards: str, output: Path, **fields: Any) -> TeacherTrainingConfig:
    given: dict[str, Any] = {
        "name": "run",
        "output": str(output),
        "data": DataConfig(shards=shards, patch_size=12),
        "model": EspcnSpec(scale=2, num_features=8),
        "num_steps": 6,
        "batch_size": 4,
        "precision": "float32",
        "log_every_steps": 2,
        "save_every_steps": 2,
        "validate_every_steps": 3,
        "cluster": ClusterConfig(max_failures=0),
    }
    return TeacherTrainingConfig(**{**given, **fields})


def test_two_workers_take_the_steps_of_one_with_all_patches(shards: str, tmp_path: Path) -> None:
    card = run(config_for(shards, tmp_path / "two", cluster=ClusterConfig(num_workers=2, max_failures=0)))
    list(train(config_for(shards, tmp_path / "one")))
    two, one = (load_model(f"file://{tmp_path}/{name}/run/model").model for name in ("two", "one"))
    for ours, theirs in zip(two.parameters(), one.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert card.metrics["heldout_psnr_y"] > 0 and "default_worker" not in card.command
    rows = [json.loads(line) for line in (tmp_path / "two/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]


def test_an_error_of_the_run_itself_arrives_as_ours(shards: str, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path, terms=(PixelTerm(loss="mse"),), optimizer=DIVERGING)
    with pytest.raises(NonFiniteLoss, match=r"step \d: .* is (nan|inf)"):
        run(config)
    assert not (tmp_path / "run/model/card.json").exists()


def test_more_workers_than_the_cluster_has_are_refused_before_they_start(shards: str, tmp_path: Path) -> None:
    config = config_for(
        shards, tmp_path, batch_size=64, cluster=ClusterConfig(num_workers=64, cpus_per_worker=1)
    )
    with pytest.raises(RequestError, match=r"64 need 64 CPU, and this cluster has 4"):
        run(config)
    assert not (tmp_path / "run").exists()
