"""What callers hear while replicas start, are lost or have too much. Their handle is played, without Ray."""

import asyncio
import contextvars

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.testclient import TestClient

from cluster import serve as cluster_serve
from cluster.serve import ClusterBackend
from kdsr.serving.app import build_app
from tests.small_server import encoded, problem

LOST = (RayActorError(), RayServeException("no replica"))


class Method:
    """One method of a handle; `answer` makes what it answers."""

    def __init__(self, answer):
        self.answer = answer

    async def remote(self, *arguments):
        return await self.answer(*arguments)


class Replicas:
    """A handle. `then` is what comes of the next description: an error, or the description itself."""

    def __init__(self, host):
        self.host, self.then, self.asked = host, None, 0
        self.describe, self.upscale = Method(self._describe), Method(self._upscale)

    async def _describe(self):
        self.asked += 1
        return await self._come_to() or self.host.describe()

    async def _upscale(self, call):
        return await self._come_to() or await self.host.answer(call)

    async def _come_to(self):
        if isinstance(self.then, Exception):
            raise self.then
        if self.then == "nothing":
            await asyncio.sleep(3600)


@pytest.fixture
def replicas(server):
    return Replicas(server.host)


@pytest.fixture
def client(server, replicas):
    with TestClient(build_app(server.config, ClusterBackend(replicas), {})) as client:
        yield client


def upscaled(client):
    return client.post("/v1/upscale", content=encoded(), headers={"Content-Type": "image/png"})


@pytest.mark.parametrize("then", [*LOST, "nothing"])
def test_a_server_without_a_replica_is_not_ready_and_says_when_to_come(client, replicas, monkeypatch, then):
    monkeypatch.setattr(cluster_serve, "ANSWER_SECONDS", 0.05)
    replicas.then = then
    for answer in (client.get("/readyz"), client.get("/v1/models"), upscaled(client)):
        assert problem(answer) == (503, "loading")
        assert answer.headers["retry-after"] == "2"
    assert client.get("/healthz").status_code == 200
    assert "kdsr_ready 0" in client.get("/metrics").text
    replicas.then = None
    assert (client.get("/readyz").status_code, upscaled(client).status_code) == (200, 200)


def test_a_description_is_asked_for_once_while_it_is_fresh(client, replicas, monkeypatch):
    monkeypatch.setattr(cluster_serve, "FRESH_SECONDS", 3600.0)
    for _ in range(3):
        assert client.get("/readyz").status_code == 200
    assert replicas.asked == 1


def test_all_who_ask_at_once_wait_for_one_answer_and_whoever_leaves_takes_it_from_nobody(replicas):
    async def ask():
        backend = ClusterBackend(replicas)
        replicas.then = "nothing"
        asking = [asyncio.create_task(backend.describe()) for _ in range(5)]
        await asyncio.sleep(0.01)
        asking[0].cancel()
        await asyncio.sleep(0.01)
        found = [task.done() for task in asking], replicas.asked
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        return found

    assert asyncio.run(ask()) == ([True, False, False, False, False], 1)


def test_a_question_for_all_is_not_asked_in_the_name_of_the_first(replicas, monkeypatch):
    """Serve knows by the context who calls a handle, and breaks off what an ended request waits for."""
    caller = contextvars.ContextVar("caller", default=None)
    seen = []

    async def described():
        seen.append(caller.get())
        return replicas.host.describe()

    async def ask():
        caller.set("the first")
        await ClusterBackend(replicas).describe()

    monkeypatch.setattr(replicas, "describe", Method(described))
    asyncio.run(ask())
    assert seen == [None]


@pytest.mark.parametrize("then", LOST)
def test_an_old_description_is_better_than_none_until_it_is_stale(client, replicas, monkeypatch, then):
    monkeypatch.setattr(cluster_serve, "FRESH_SECONDS", 0.0)
    assert client.get("/readyz").status_code == 200
    replicas.then = then
    assert client.get("/readyz").status_code == 200
    monkeypatch.setattr(cluster_serve, "STALE_SECONDS", 0.0)
    assert problem(client.get("/readyz")) == (503, "loading")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RayActorError(), (503, "worker-lost")),
        (RayServeException("gone"), (503, "worker-lost")),
        (BackPressureError(9, 9), (429, "busy")),
    ],
)
def test_what_becomes_of_a_call_is_told_to_its_caller(client, replicas, monkeypatch, error, expected):
    monkeypatch.setattr(cluster_serve, "FRESH_SECONDS", 3600.0)
    assert upscaled(client).status_code == 200
    replicas.then = error
    answer = upscaled(client)
    assert problem(answer) == expected
    assert int(answer.headers["retry-after"]) >= 1
