"""Jobs over HTTP to their end, as a client sees them, through a restart of everything that serves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve as ray_serve

from cluster import serve
from infra.local import free_port
from kdsr.client import Client
from kdsr.config import ServeConfig
from kdsr.store import Store, open_store
from tests.ray.test_serving import wait_for
from tests.small_server import encoded, save_tiny

NUM_IMAGES = 60
pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    folder = tmp_path_factory.mktemp("jobs")
    uri, _ = save_tiny(folder / "x2", scale=2)
    return ServeConfig.model_validate(
        {
            "models": {"tiny": [uri]},
            "auth": "none",
            "precision": "float32",
            "port": free_port(),
            "cluster": {"cpus_per_worker": 1},
            "jobs": {
                "records": f"{folder}/records",
                "inputs": [f"{folder}/in"],
                "outputs": [f"{folder}/out"],
                "cluster": {"cpus_per_worker": 0.5},
            },
        }
    )


@pytest.fixture
def client(ray_local: None, config: ServeConfig) -> Iterator[Client]:
    with Client(serve.start(config)) as client:
        yield client
    ray_serve.shutdown()


def test_jobs_come_to_their_end_and_a_restart_goes_on_with_what_is_left(
    client: Client, config: ServeConfig, tmp_path: Path
) -> None:
    assert config.jobs is not None
    photo = tmp_path / "one.png"
    photo.write_bytes(encoded(60, 80))
    sent = client.submit(photo)
    assert client.wait(sent.id).state == "done"
    made = client.result(sent.id, tmp_path / "large.png")
    assert made.read_bytes() == client.upscale(photo.read_bytes())

    source, target = (open_store(place[0]) for place in (config.jobs.inputs, config.jobs.outputs))
    picture = encoded(1400, 1400)
    for number in range(NUM_IMAGES):
        source.put(f"{number:02}.png", picture)
    many = client.submit_places(source.uri, target.uri)
    # Images of which the ledger knows nothing yet are done again, as after any end of a bulk run.
    wait_for(lambda: client.job(many.id).done > 0)
    ray_serve.shutdown()
    before = etags(target)
    assert 0 < len(before) < NUM_IMAGES

    serve.start(config)
    found = client.wait(many.id)
    assert (found.state, found.listed, found.done, found.failed) == ("done", NUM_IMAGES, NUM_IMAGES, 0)
    after = etags(target)
    assert len(after) == NUM_IMAGES and before.items() & after.items()

    again = client.submit_places(source.uri, f"{target.uri}/again")
    wait_for(lambda: client.job(again.id).state == "running")
    assert client.cancel(again.id).state == "cancelled"
    wait_for(lambda: not unfinished(config))


def etags(target: Store) -> dict[str, str]:
    """Of results, by key."""
    return {info.key: info.etag for info in target.list() if info.key.endswith(".png")}


def unfinished(config: ServeConfig) -> list[str]:
    """Marks of jobs that are not finished."""
    assert config.jobs is not None
    return [info.key for info in open_store(config.jobs.records).list("open/")]
