"""Jobs that are submitted to a cluster of two nodes behind a token, as a person submits them; data on S3."""

import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.local_s3.serve import LocalS3
from infra.two_nodes.serve import TwoNodes, two_nodes
from kdsr.checkpoint import save_model
from kdsr.cli import parse
from kdsr.config import DistillConfig
from kdsr.models import build_model
from kdsr.spec import Card, EdsrSpec
from kdsr.store import Store, open_store
from tests.conftest import BUCKET
from tests.pictures import write_photographs
from tests.processes import train_over_processes

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
PATIENCE, NUM_STEPS = 600, 800
# Four starts of jobs that a busy machine may take long for.
pytestmark = [pytest.mark.long, pytest.mark.timeout(4 * PATIENCE)]
TRAINING = """\
data: {patch_size: 12, patches_per_row: 4, window_rows: 8}
student: {kind: espcn, scale: 2, num_features: 8}
terms: [{kind: pixel}, {kind: output}]
precision: float32
batch_size: 4
log_every_steps: 1
save_every_steps: 50
validate_every_steps: 10000
num_validation_images: 0
"""


@pytest.fixture(scope="module")
def place(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An S3 prefix with photographs, a teacher of random weights."""
    store = open_store(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    for path in write_photographs(tmp_path_factory.mktemp("photos"), 4):
        store.put_file(f"photos/{path.name}", path)
    torch.manual_seed(0)
    spec = EdsrSpec(scale=2, num_features=4, num_blocks=1)
    save_model(
        store.child("teacher"), build_model(spec), Card(name="t", spec=spec, num_parameters=0, sha256="")
    )
    return store


@pytest.fixture(scope="module")
def cluster(place: Store) -> Iterator[TwoNodes]:
    # One CPU each, so that two workers fit on no node and compute with one thread.
    # Jobs of a machine that does other things as well must not be put behind all of these.
    with two_nodes(
        num_cpus=(1, 1), environment=os.environ | {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    ) as cluster:
        yield cluster


def ray_job(cluster: TwoNodes, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(RAY), "job", *arguments],
        cwd=ROOT,
        env=os.environ | cluster.environment | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def submit(cluster: TwoNodes, job: str, *flags: str) -> str:
    """What a job said that was sent with this checkout, and ended well."""
    sent = ray_job(cluster, "submit", "--working-dir", ".", "--", "python", f"jobs/{job}.py", *flags)
    assert sent.returncode == 0, sent.stdout[-3000:] + sent.stderr[-2000:]
    return sent.stdout


def ask(cluster: TwoNodes, path: str, *, method: str = "GET") -> Any:
    """An answer of the dashboard."""
    request = urllib.request.Request(
        f"{cluster.dashboard_url}{path}",
        headers={"Authorization": f"Bearer {cluster.token_path.read_text()}"},
        method=method,
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def nodes_of_workers(cluster: TwoNodes) -> set[str]:
    """Where workers of trainings ever were."""
    actors = ask(cluster, "/api/v0/actors?limit=1000")["data"]["result"]["result"]
    return {actor["node_id"] for actor in actors if actor["class_name"] == "RayTrainWorker"}


def distil_flags(place: Store, config: Path, name: str) -> list[str]:
    return [
        *("--config", str(config), "--name", name, "--output", f"{place.uri}/runs"),
        *("--data.shards", f"{place.uri}/shards", "--teacher.uri", f"{place.uri}/teacher"),
        *("--teacher.force", "--num_steps", str(NUM_STEPS), "--cluster.num_workers", "2"),
    ]


def losses(place: Store, name: str) -> list[tuple[float, float]]:
    lines = place.get(f"runs/{name}/metrics.jsonl").decode().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_who_has_not_the_token_is_refused(cluster: TwoNodes, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    refused = ray_job(cluster, "list", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode != 0 and "nvalid" in refused.stdout + refused.stderr
    refused = ray_job(cluster, "list", RAY_AUTH_MODE="disabled")
    assert refused.returncode != 0 and "token" in refused.stdout + refused.stderr
    assert not Path("~/.ray/auth_token").expanduser().exists() or (
        Path("~/.ray/auth_token").expanduser().read_text() != cluster.token_path.read_text()
    )


def test_shards_are_made_and_a_run_on_both_nodes_that_was_stopped_comes_to_what_it_would_have_come_to(
    cluster: TwoNodes, place: Store, tmp_path: Path
) -> None:
    """The model that comes of it upscales on the same cluster."""
    photos, shards = f"{place.uri}/photos", f"{place.uri}/shards"
    said = submit(cluster, "shard", "--input", photos, "--output", shards, "--heldout_fraction", "0.3")
    assert "sharded 4 images" in said

    config = tmp_path / "training.yaml"
    config.write_text(TRAINING)
    flags = distil_flags(place, config, "stopped")
    job = f"stopped-{uuid.uuid4().hex}"
    command = ("--", "python", "jobs/distill.py", *flags)
    begun = ray_job(cluster, "submit", "--submission-id", job, "--no-wait", "--working-dir", ".", *command)
    assert begun.returncode == 0, begun.stderr
    wait_until(lambda: place.exists("runs/stopped/checkpoints/latest.json"), cluster, job)
    ask(cluster, f"/api/jobs/{job}/stop", method="POST")
    wait_until(lambda: ask(cluster, f"/api/jobs/{job}")["status"] == "STOPPED", cluster, job)
    reached = json.loads(place.get("runs/stopped/checkpoints/latest.json"))["step"]
    assert 0 < reached < NUM_STEPS and not place.exists("runs/stopped/model/card.json")
    assert "stopped" in submit(cluster, "distill", *flags)
    assert len(nodes_of_workers(cluster)) == 2

    whole = parse(DistillConfig, distil_flags(place, config, "whole"))
    train_over_processes(whole, num_workers=2, folder=tmp_path / "whole")
    assert [step for step, _ in losses(place, "whole")] == list(range(1, NUM_STEPS + 1))
    assert losses(place, "stopped") == losses(place, "whole")

    target, model = f"{place.uri}/big", f"{place.uri}/runs/stopped/model"
    said = submit(cluster, "upscale", "--input", photos, "--output", target, "--model", model)
    assert "upscaled 4 images" in said and "failed 0" in said
    assert {info.key for info in place.list("big/") if info.key.endswith(".png")} == {
        f"big/photo-{number}.png" for number in range(4)
    }


def wait_until(is_so: Callable[[], bool], cluster: TwoNodes, job: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert ask(cluster, f"/api/jobs/{job}")["status"] not in {"FAILED", "SUCCEEDED"}
        assert time.monotonic() < deadline
        time.sleep(0.2)
