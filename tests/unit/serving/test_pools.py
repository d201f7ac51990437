"""What hangs takes its own kind of work with it and nothing else, with as few threads as an entrance has."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import httpx2
import pytest

from kdsr.serving.bodies import inspected
from kdsr.serving.entrance import FETCHES
from kdsr.serving.fetch import Fetcher
from kdsr.serving.pools import Pool
from kdsr.serving.problems import Problem
from kdsr.store import FileStore
from tests.small_server import encoded, problem

IMAGE = {"content": encoded(), "headers": {"Content-Type": "image/png"}}


@pytest.fixture
def hang():
    """Waits until the test is over."""
    over = threading.Event()
    yield lambda *_, **__: over.wait(60)
    over.set()


@asynccontextmanager
async def caller(server):
    """Calls the application within one loop that has few threads, as in Serve."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(5))
    transport = httpx2.ASGITransport(app=server.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
        yield client


async def beside(client, requests):
    """The status of an upscaled image while all `requests` are under way."""
    tasks = [asyncio.create_task(request) for request in requests]
    await asyncio.sleep(0.05)
    try:
        async with asyncio.timeout(60):
            return (await client.post("/v1/upscale", **IMAGE)).status_code
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def test_a_store_that_hangs_stops_no_request_that_needs_none(serve, tmp_path, monkeypatch, hang):
    server = serve(jobs={"records": str(tmp_path)})
    monkeypatch.setattr(FileStore, "get", hang)

    async def run():
        async with caller(server) as client:
            return await beside(client, [client.get(f"/v1/jobs/{'0' * 32}") for _ in range(30)])

    assert asyncio.run(run()) == 200


def test_hosts_that_hang_stop_no_request_that_brings_its_image(serve, monkeypatch, hang):
    server = serve(fetch_urls=True)
    monkeypatch.setattr(Fetcher, "get", hang)

    async def run():
        async with caller(server) as client:
            urls = [client.post("/v1/upscale", json={"url": "http://slow.example/"}) for _ in range(FETCHES)]
            return await beside(client, urls)

    assert asyncio.run(run()) == 200


def test_what_cannot_be_broken_off_ends_for_its_caller_and_takes_up_its_place(serve, monkeypatch, hang):
    server = serve(fetch_urls=True, limits={"body_seconds": 2})
    monkeypatch.setattr(Fetcher, "get", hang)

    async def run():
        async with caller(server) as client:
            urls = [client.post("/v1/upscale", json={"url": "http://slow.example/"}) for _ in range(FETCHES)]
            answers = await asyncio.gather(*urls)
            return answers, await client.post("/v1/upscale", json={"url": "http://slow.example/"})

    answers, another = asyncio.run(run())
    assert {problem(answer) for answer in answers} == {(422, "invalid-option")}
    assert problem(another) == (429, "busy")
    assert server.app.state.entrance.waiting_bytes == 0


def test_what_was_fetched_is_counted_among_the_bodies(serve, monkeypatch):
    server = serve(fetch_urls=True, limits={"max_body_bytes": 2**19, "max_waiting_bytes": 2**20})
    entrance, seen, data = server.app.state.entrance, [], encoded()

    def look(*arguments):
        seen.append(entrance.waiting_bytes)
        return inspected(*arguments)

    monkeypatch.setattr(Fetcher, "get", lambda *_: data)
    monkeypatch.setattr("kdsr.serving.app.inspected", look)
    url = json.dumps({"url": "http://example.org/"}).encode()
    headers = {"Content-Type": "application/json"}
    assert server.client.post("/v1/upscale", content=url, headers=headers).status_code == 200
    assert seen == [len(data)]
    entrance.waiting_bytes = taken = 2**20 - len(data) + 1
    assert problem(server.client.post("/v1/upscale", content=url, headers=headers)) == (429, "busy")
    assert (entrance.waiting_bytes, len(seen)) == (taken, 1)


def test_a_pool_takes_as_much_as_it_says_and_goes_on_when_there_is_room_again():
    pool, go = Pool("test", threads=1, most=2), threading.Event()

    async def run():
        first, second = (asyncio.create_task(pool.run(go.wait, 60)) for _ in range(2))
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="test"):
            await pool.run(int)
        second.cancel()  # It was not begun, so that its place is free again.
        await asyncio.gather(second, return_exceptions=True)
        third = asyncio.create_task(pool.run(int, "5"))
        await asyncio.sleep(0)
        go.set()
        return await first, await third

    assert asyncio.run(run()) == (True, 5)
