"""Models behind a real port: the bytes of a bulk run, new models without a restart, a replica that dies."""

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from functools import partial

import pytest
from ray import serve as ray_serve

from cluster import bulk, serve
from infra.local import free_port
from kdsr.config import ServeConfig, UpscaleConfig
from kdsr.store import open_store
from tests import waiting
from tests.small_server import encoded, save_tiny

wait_for = partial(waiting.wait_for, seconds=200, pause=0.1)


@pytest.fixture(scope="module", params=[0, 1], ids=["a replica alone", "an entrance in front"])
def config(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("served")
    uris = [save_tiny(folder / f"x{scale}", scale=scale)[0] for scale in (2, 4)]
    return ServeConfig.model_validate(
        {
            "models": {"tiny": uris},
            "auth": "none",
            "precision": "float32",
            "port": free_port(),
            "cluster": {"cpus_per_worker": 1},
            "limits": {"timeout_seconds": 120},
            "entrances": request.param,
        }
    )


@pytest.fixture(scope="module")
def address(ray_local, config):
    place = serve.start(config)
    wait_for(lambda: send(place, "/readyz")[0] == 200)
    yield place
    ray_serve.shutdown()


def send(address, path, data=None, **headers):
    """Status, headers and body of an answer."""
    request = urllib.request.Request(
        f"{address}{path}", data, headers={"Content-Type": "image/png"} | headers
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_an_answer_has_the_bytes_of_a_bulk_run(address, config, tmp_path):
    data = encoded(40, 56, mode="RGBA")
    source = open_store(str(tmp_path / "in"))
    source.put("a.png", data)
    model = config.models["tiny"][1].uri
    wanted = UpscaleConfig(
        input=source.uri,
        output=str(tmp_path / "out"),
        model=model,
        precision="float32",
        cluster=config.cluster,
    )
    assert bulk.upscale(wanted).ok
    status, headers, body = send(address, "/v1/upscale", data)
    assert status == 200, body
    assert body == open_store(wanted.output).get("a.png")
    assert headers["Kdsr-Output-Size"] == "224x160"
    assert len(headers.get_all("X-Request-Id")) == 1


@pytest.mark.parametrize(("given", "stays"), [("mine-1", True), ("no id!", False)])
def test_a_request_has_one_id_and_a_harmless_one(address, given, stays):
    status, headers, body = send(address, "/v1/nothing", **{"X-Request-Id": given})
    (found,) = headers.get_all("X-Request-Id")
    assert status == 404
    assert (found == given) == stays
    assert json.loads(body)["instance"] == f"urn:kdsr:request:{found}"


def test_other_models_are_served_without_a_new_replica(address, config, tmp_path):
    before = replica_pid(address)
    uri, _ = save_tiny(tmp_path / "x3", scale=3)
    models = config.models | {"other": ServeConfig(models={"x": [uri]}).models["x"]}
    serve.start(config.model_copy(update={"models": models}))
    wait_for(lambda: send(address, "/v1/upscale?model=other", encoded(24, 32))[0] == 200)
    assert send(address, "/v1/upscale?model=tiny", encoded(24, 32))[0] == 200
    assert replica_pid(address) == before


def test_a_replica_that_dies_fails_its_own_requests_with_a_status_to_try_again(address):
    answers, stop = [], threading.Event()

    def load():
        while not stop.is_set():
            answers.append(send(address, "/v1/upscale?model=tiny", encoded(64, 64)))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answers) > 10)
    os.kill(replica_pid(address), signal.SIGKILL)
    died = len(answers)
    wait_for(lambda: any(status == 200 for status, _, _ in answers[died + 3 :]))
    stop.set()
    for thread in threads:
        thread.join(300)
    assert len(answers) > died
    failed = [(status, headers) for status, headers, _ in answers if status != 200]
    assert {status for status, _ in failed} <= {503}
    assert all(headers["Retry-After"] for _, headers in failed)
    assert {headers.get_content_type() for _, headers in failed} <= {"application/problem+json"}
    assert [status for status, _, _ in answers[:10]] == [200] * 10


def replica_pid(address):
    """The process that holds the networks."""
    details = ray_serve.context._get_global_client().get_serve_details()
    [replica] = details["applications"][serve.APP_NAME]["deployments"]["Replica"]["replicas"]
    return replica["pid"]
