"""What `serve deploy` is given: a new version fails no request, and replicas come and go with the load."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from cluster import serve
from infra.local import free_port
from kdsr.config import ServeConfig
from tests.ray.test_serving import send, wait_for
from tests.small_server import encoded, save_tiny

FILE = Path(__file__).parents[2] / "infra" / "serve" / "serve.yaml"
SOON = {"metrics_interval_s": 0.5, "look_back_period_s": 1, "upscale_delay_s": 0, "downscale_delay_s": 2}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file, with a tiny network, one worker's share of this machine, and nobody shut out."""
    content: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    uri, _ = save_tiny(tmp_path_factory.mktemp("deployed") / "x2", scale=2)
    content["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    (application,) = content["applications"]
    del application["args"]["keys_file"]
    application["args"] |= {"auth": "none", "precision": "float32", "entrances": 1}
    application["args"] |= {"cluster": {"cpus_per_worker": 1}}
    for deployment in application["deployments"]:
        if deployment["name"] == "Replica":
            deployment["user_config"] = {"models": {"tiny": [uri]}}
    return content


@pytest.fixture(scope="module")
def address(ray_local: None, content: dict[str, Any]) -> Iterator[str]:
    args = ServeConfig.model_validate(content["applications"][0]["args"])
    options = serve.http_options(args).model_copy(update={"port": content["http_options"]["port"]})
    ray_serve.start(proxy_location="EveryNode", http_options=options)
    yield f"http://127.0.0.1:{content['http_options']['port']}"
    ray_serve.shutdown()


def deploy(content: dict[str, Any]) -> None:
    """As `serve deploy` does, until it is done."""
    client = ray_serve.context._get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate(content), _blocking=True)


def replicas() -> set[int]:
    """Processes that hold networks and answer."""
    details = ray_serve.context._get_global_client().get_serve_details()
    found = details["applications"][serve.APP_NAME]["deployments"]["Replica"]["replicas"]
    return {replica["pid"] for replica in found if replica["state"] == "RUNNING"}


@contextmanager
def callers(address: str, number: int, data: bytes) -> Iterator[list[int]]:
    """So many send `data` without a pause; the statuses of what they got so far."""
    statuses: list[int] = []
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            statuses.append(send(address, "/v1/upscale", data)[0])

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        for thread in threads:
            thread.join(300)


@pytest.mark.long
def test_a_new_version_under_load_fails_no_request(address: str, content: dict[str, Any]) -> None:
    deploy(content)
    before = replicas()
    with callers(address, 2, encoded(24, 32)) as statuses:
        wait_for(lambda: len(statuses) >= 4)
        content["applications"][0]["args"]["tile_size"] = 32
        deploy(content)
        wait_for(lambda: replicas() and not replicas() & before)
        updated = len(statuses)
        wait_for(lambda: len(statuses) >= updated + 4)
    assert set(statuses) == {200}


@pytest.mark.long
def test_replicas_come_with_the_load_and_go_with_it(address: str, content: dict[str, Any]) -> None:
    (application,) = content["applications"]
    # Tiles of 16 pixels: a small image is many of them, so that some always wait.
    application["args"] |= {"tile_size": 16, "target_waiting_tiles": 1}
    policy = {"policy_function": "cluster.serve:tiles_policy"}
    bounds = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    scaling = SOON | bounds | {"policy": policy}
    for deployment in application["deployments"]:
        if deployment["name"] == "Replica":
            deployment |= {"num_replicas": "auto", "autoscaling_config": scaling}
    deploy(content)
    wait_for(lambda: len(replicas()) == 1)
    with callers(address, 4, encoded(256, 256)) as statuses:
        wait_for(lambda: len(replicas()) == 2)
    assert set(statuses) == {200}
    wait_for(lambda: len(replicas()) == 1)
    assert send(address, "/v1/upscale", encoded(24, 32))[0] == 200
