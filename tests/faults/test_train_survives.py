"""Training over Ray that is really hit, and comes to what an undisturbed one comes to, to the last bit."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.experimental.internal_kv import _initialize_internal_kv

from bench.bulk import processes
from cluster.train import run
from kdsr.checkpoint import StateStore
from kdsr.config import ClusterConfig, DistillConfig
from kdsr.training import run_store, saved_step, train
from tests.processes import train_over_processes
from tests.waiting import wait_for
from tests.whole_runs import TERMS, Places, config_of, history, make_places, outcome

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
NUM_STEPS = 150
LIMIT_SECONDS = 800.0
wait_until = partial(wait_for, seconds=LIMIT_SECONDS, pause=0.01)
BOTH = ClusterConfig(num_workers=2, cpus_per_worker=1)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    return make_places(tmp_path_factory.mktemp("survives"), heldout=False)


def config_for(places: Places, output: Path, **fields: Any) -> DistillConfig:
    """Checkpoints every few steps, and whatever is logged is logged for each."""
    given = {"num_steps": NUM_STEPS, "batch_size": 3, "save_every_steps": 4, "num_validation_images": 0}
    return config_of(places, output, **{**given, "cluster": BOTH, **fields})


@pytest.fixture(scope="module")
def whole(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two workers come to that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    config = config_for(places, folder / "runs")
    train_over_processes(config, num_workers=2, folder=folder)
    found = outcome(config)
    assert [row["step"] for row in found[0]] == list(range(1, NUM_STEPS + 1))
    assert {"critic", "output_l1", "loss"} <= found[0][0].keys()
    return found


def workers(root: int) -> set[int]:
    """Processes below `root` that train."""
    return {pid for pid, line, _ in processes(root) if "RayTrainWorker" in line}


def hit(config: DistillConfig, told: dict[int, int]) -> None:
    """Kill a worker in the first half of the run, and tell one of the next to leave in the second."""
    draw = random.Random(0)
    before: set[int] = set()
    for number, first in ((signal.SIGKILL, 20), (signal.SIGTERM, 80)):
        step = draw.randrange(first, first + 20)
        wait_until(lambda: saved_step(config) >= step)  # noqa: B023
        pid = draw.choice(sorted(workers(os.getpid()) - before))
        before = workers(os.getpid())
        os.kill(pid, number)
        told[number] = saved_step(config)


def test_a_run_goes_on_by_itself_when_a_worker_is_killed_and_when_one_is_told_to_leave(
    ray_local: None,
    places: Places,
    whole: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = config_for(places, tmp_path)
    told: dict[int, int] = {}
    thread = threading.Thread(target=hit, args=(config, told), daemon=True)
    thread.start()
    run(config)
    thread.join()
    said = capfd.readouterr().err
    assert 20 <= told[signal.SIGKILL] < told[signal.SIGTERM] < NUM_STEPS
    assert said.count("lost workers") == 1 and said.count("workers were told to leave and saved step") == 1
    assert outcome(config) == whole


# ---------------------------------------------------------------- nodes and drivers


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of one node, with room for one worker."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        # A node that is gone is missed after a second or two, and not after a quarter of a minute.
        for name, value in (("initial_delay_ms", 500), ("period_ms", 500), ("failure_threshold", 2)):
            patch.setenv(f"RAY_health_check_{name}", str(value))
        made = Cluster()
        add_node(made)
        yield made
        made.shutdown()
    if ray.is_initialized():
        # Ray's own helper cuts this process off from the key-value store of the cluster that other tests use.
        _initialize_internal_kv(ray._private.worker.global_worker.gcs_client)


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)


def job(cluster: Any, config: DistillConfig, folder: Path) -> "subprocess.Popen[str]":
    path = folder / "config.json"
    path.write_text(config.model_dump_json())
    flags = ["--config", str(path), "--cluster.address", cluster.address]
    return subprocess.Popen(
        [sys.executable, "jobs/distill.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def reaches(process: "subprocess.Popen[str]", config: DistillConfig, step: int) -> None:
    wait_until(lambda: saved_step(config) >= step or process.poll() is not None)
    assert process.poll() is None, process.communicate()[0]


def test_a_run_survives_its_node_and_its_driver(
    cluster: Any, places: Places, whole: Any, tmp_path: Path
) -> None:
    """The node is replaced; drivers are told to stop, interrupted and killed; the fourth ends the run."""
    lost = add_node(cluster)
    config = config_for(places, tmp_path / "runs")
    driver = job(cluster, config, tmp_path)
    reaches(driver, config, 24)
    cluster.remove_node(lost, allow_graceful=False)
    add_node(cluster)
    reaches(driver, config, 40)
    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 1, said
    assert "lost workers" in said
    step = saved_step(config)
    assert f"told to stop: run run is saved at step {step} of {NUM_STEPS}; the same command goes on" in said
    assert 40 < step < NUM_STEPS
    again = job(cluster, config, tmp_path)
    reaches(again, config, min(step + 8, NUM_STEPS - 24))
    again.send_signal(signal.SIGINT)
    said, _ = again.communicate(timeout=LIMIT_SECONDS)
    assert again.returncode == 130, said
    assert step < saved_step(config) < NUM_STEPS
    assert "save and leave; Ctrl-C once more" in said and f"saved at step {saved_step(config)} of" in said
    assert "stopped by the user; the same command goes on" in said
    third = job(cluster, config, tmp_path)
    reaches(third, config, min(saved_step(config) + 8, NUM_STEPS - 8))
    third.kill()
    third.communicate()
    fourth = job(cluster, config, tmp_path)
    said, _ = fourth.communicate(timeout=LIMIT_SECONDS)
    assert fourth.returncode == 0, said
    assert outcome(config) == whole


def test_a_run_of_any_number_of_workers_goes_on_with_those_that_are_left(
    cluster: Any, places: Places, tmp_path: Path
) -> None:
    """Nothing that is drawn for each worker: such things differ with their number."""
    lost = next(iter(cluster.worker_nodes), None) or add_node(cluster)
    either = ClusterConfig(num_workers=(1, 2), cpus_per_worker=1)
    config = config_for(places, tmp_path / "runs", cluster=either, terms=TERMS[:2], dropout=0)
    driver = job(cluster, config, tmp_path)
    reaches(driver, config, 24)
    cluster.remove_node(lost, allow_graceful=False)
    said, _ = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 0, said
    assert "lost workers" in said
    alone = config.model_copy(update={"output": str(tmp_path / "alone")})
    list(train(alone))
    assert [row["step"] for row in history(config)] == list(range(1, NUM_STEPS + 1))
    for ours, theirs in zip(history(config), history(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5), ours["step"]


def drain(cluster: Any, node: Any) -> None:
    """Say that the node is taken away in ten minutes, as a cloud does."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 600) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(node.node_id, reason, "", deadline)
    assert accepted, why


def test_a_run_leaves_a_node_that_is_taken_away_with_one_checkpoint_and_takes_the_next_that_comes(
    cluster: Any, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a run has no other checkpoints than those with which it leaves."""
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    node = next(iter(cluster.worker_nodes), None) or add_node(cluster)
    either = ClusterConfig(num_workers=(1, 2), cpus_per_worker=1)
    never = {"num_steps": 10**6, "save_every_steps": 10**6, "log_every_steps": 10**6}
    config = config_for(places, tmp_path / "runs", cluster=either, dropout=0, **never)
    driver = job(cluster, config, tmp_path)
    wait_until(lambda: len(workers(os.getpid())) == 2)
    first = workers(os.getpid())
    drain(cluster, node)
    reaches(driver, config, 1)
    left_at = saved_step(config)
    wait_until(lambda: bool(workers(os.getpid()) - first))
    second = workers(os.getpid()) - first
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)
    wait_until(lambda: len(workers(os.getpid()) - first - second) == 2)
    driver.send_signal(signal.SIGTERM)
    said, _ = driver.communicate(timeout=LIMIT_SECONDS)
    assert driver.returncode == 1, said
    assert f"workers were told to leave and saved step {left_at}; going on with what is left" in said
    assert "lost workers" not in said
    states = StateStore(run_store(config))
    assert left_at == states.step("previous") < (states.step("latest") or 0)
