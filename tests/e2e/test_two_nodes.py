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
from kdsr.models import build_model
from kdsr.spec import Card, EdsrSpec
from kdsr.store import Store, open_store
from tests.conftest import BUCKET
from tests.pictures import write_photographs

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
PATIENCE, NUM_STEPS = 600, 1200
# Six starts of jobs that a busy machine may take long for.
pytestmark = pytest.mark.timeout(4 * PATIENCE)
TRAINING = """\
data: {patch_size: 12, patches_per_row: 4, window_rows: 8}
student: {kind: espcn, scale: 2, num_features: 8}
terms: [{kind: pixel}, {kind: output}]
precision: float32
batch_size: 4
log_every_steps: 1
save_every_steps: 100
validate_every_steps: 10000
num_validation_images: 0
"""


@pytest.fixture(scope="module")
def place(s3_server: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An S3 prefix with photographs, a teacher of random weights and, after the first test, shards."""
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


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "training.yaml"
    path.write_text(TRAINING)
    return path


@pytest.fixture(scope="module")
def shards(cluster: TwoNodes, place: Store) -> str:
    """What the job of that name said."""
    flags = ("--input", f"{place.uri}/photos", "--output", f"{place.uri}/shards", "--heldout_fraction", "0.3")
    return submit(cluster, "shard", *flags)


@pytest.fixture(scope="module")
def whole(cluster: TwoNodes, place: Store, config: Path, shards: str) -> str:
    """The model of a run on both nodes that nobody stopped."""
    assert "sharded 4 images" in shards
    assert "whole" in submit(cluster, "distill", *distil_flags(place, config, "whole"))
    return f"{place.uri}/runs/whole/model"


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


def test_shards_are_made_trained_on_by_both_nodes_and_the_model_upscales(
    cluster: TwoNodes, place: Store, whole: str
) -> None:
    assert len(nodes_of_workers(cluster)) == 2
    assert [step for step, _ in losses(place, "whole")] == list(range(1, NUM_STEPS + 1))
    said = submit(
        cluster, "upscale", "--input", f"{place.uri}/photos", "--output", f"{place.uri}/big", "--model", whole
    )
    assert "upscaled 4 images" in said and "failed 0" in said
    assert {info.key for info in place.list("big/") if info.key.endswith(".png")} == {
        f"big/photo-{number}.png" for number in range(4)
    }


def test_a_stopped_job_that_is_submitted_again_takes_the_steps_of_one_that_was_not(
    cluster: TwoNodes, place: Store, config: Path, whole: str
) -> None:
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
    assert losses(place, "stopped") == losses(place, "whole")


def wait_until(is_so: Callable[[], bool], cluster: TwoNodes, job: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert ask(cluster, f"/api/jobs/{job}")["status"] not in {"FAILED", "SUCCEEDED"}
        assert time.monotonic() < deadline
        time.sleep(0.2)
