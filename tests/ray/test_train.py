"""Training over Ray's workers: the same result as without them, and errors that reach the person."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.shard import shard
from cluster.train import run
from kdsr.checkpoint import StateStore, load_model, save_model
from kdsr.config import (
    ClusterConfig,
    DataConfig,
    DistillConfig,
    MemoryConfig,
    OptimizerConfig,
    ShardConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from kdsr.errors import NonFiniteLoss, RequestError
from kdsr.models import build_model
from kdsr.spec import Card, EdsrSpec, EspcnSpec, PatchDiscriminatorSpec
from kdsr.store import open_store
from kdsr.terms import AdversarialTerm, GradientBalance, PixelTerm, TapPair, VariationalTerm
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


def test_as_many_workers_as_there_is_room_for_take_the_steps_of_one(shards: str, tmp_path: Path) -> None:
    cluster = ClusterConfig(num_workers=(1, 2), max_failures=0)
    card = run(config_for(shards, tmp_path / "two", cluster=cluster))
    list(train(config_for(shards, tmp_path / "one")))
    two, one = (load_model(f"file://{tmp_path}/{name}/run/model").model for name in ("two", "one"))
    for ours, theirs in zip(two.parameters(), one.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert card.metrics["heldout_psnr_y"] > 0 and "default_worker" not in card.command
    rows = [json.loads(line) for line in (tmp_path / "two/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 6]


def test_what_learns_beside_the_student_learns_alike_on_two_workers(shards: str, tmp_path: Path) -> None:
    """Projections, balancer and discriminator take the steps of one worker, beside a teacher in parts too."""
    torch.manual_seed(0)
    spec = EdsrSpec(scale=2, num_features=4, num_blocks=1)
    card = Card(name="big", spec=spec, num_parameters=0, sha256="")
    save_model(open_store(f"file://{tmp_path}/big"), build_model(spec).eval(), card)
    terms = (
        PixelTerm(),
        VariationalTerm(weight=0.1, taps=(TapPair(student="body.1", teacher="trunk"),)),
        AdversarialTerm(weight=0.01, discriminator=PatchDiscriminatorSpec(num_features=4, num_levels=1)),
    )
    base = config_for(shards, tmp_path).model_dump(exclude={"model", "terms", "output", "cluster"})
    fields = {
        **base,
        "student": EspcnSpec(scale=2, num_features=8),
        "terms": terms,
        "num_validation_images": 0,
    }
    fields |= {
        "teacher": TeacherConfig(uri=f"file://{tmp_path}/big", force=True),
        "balance": GradientBalance(every_steps=2),
        "memory": MemoryConfig(shard_teacher=True),
    }
    two = DistillConfig(
        **fields, output=str(tmp_path / "two"), cluster=ClusterConfig(num_workers=2, max_failures=0)
    )
    one = DistillConfig(**fields, output=str(tmp_path / "one"))
    run(two)
    list(train(one))
    ours, theirs = (
        StateStore(open_store(f"file://{tmp_path}/{name}/run")).load("latest") for name in ("two", "one")
    )
    assert ours is not None and theirs is not None
    names = {name for name, value in theirs["auxiliary"].items() if isinstance(value, torch.Tensor)}
    assert any("variational" in name for name in names) and any("discriminator" in name for name in names)
    for part in ("model", "auxiliary"):
        for name, tensor in theirs[part].items():
            if isinstance(tensor, torch.Tensor):
                assert torch.allclose(ours[part][name], tensor, atol=1e-3), (part, name)


def test_an_error_of_the_run_itself_arrives_as_ours(shards: str, tmp_path: Path) -> None:
    config = config_for(shards, tmp_path, terms=(PixelTerm(loss="mse"),), optimizer=DIVERGING)
    with pytest.raises(NonFiniteLoss, match=r"step \d: .* is (nan|inf)"):
        run(config)
    assert not (tmp_path / "run/model/card.json").exists()


def test_more_workers_than_the_cluster_has_are_refused_before_they_start(shards: str, tmp_path: Path) -> None:
    config = config_for(
        shards, tmp_path, batch_size=64, cluster=ClusterConfig(num_workers=64, cpus_per_worker=1)
    )
    with pytest.raises(RequestError, match=r"room is for 4 of 64 workers of 1 CPU.* has 1 node with 4 CPU"):
        run(config)
    assert not (tmp_path / "run").exists()
