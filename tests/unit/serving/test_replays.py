"""A request that is sent again under its key is done once."""

import pytest

from kdsr.config import ServeConfig
from kdsr.serving.problems import Problem
from kdsr.serving.replays import Replays
from tests.small_server import encoded, problem


def test_the_same_request_under_its_key_is_answered_from_memory(server):
    answers = [server.upscale(encoded(), query="?scale=2", Idempotency_Key="k1") for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert server.backend.calls == 1
    assert "idempotency-replayed" not in answers[0].headers
    assert answers[1].headers["idempotency-replayed"] == "true"
    assert answers[1].headers["etag"] == answers[0].headers["etag"]


def test_another_request_under_the_key_is_refused(server):
    server.upscale(encoded(), query="?scale=2", Idempotency_Key="k1")
    assert problem(server.upscale(encoded(), query="?scale=4", Idempotency_Key="k1")) == (422, "reused-key")
    assert problem(server.upscale(encoded(9, 9), query="?scale=2", Idempotency_Key="k1"))[0] == 422


def test_a_request_is_the_same_when_its_model_was_replaced_meanwhile(server, tiny_models):
    first = server.upscale(encoded(), Idempotency_Key="k1")
    server.host.load(ServeConfig.model_validate({"models": {"tiny": [tiny_models[3]]}}).models)
    again = server.upscale(encoded(), Idempotency_Key="k1")
    assert (again.content, again.headers["etag"]) == (first.content, first.headers["etag"])
    assert again.headers["idempotency-replayed"] == "true"


def test_a_refusal_is_not_kept(serve):
    server = serve(limits={"timeout_seconds": 1e-9})
    for _ in range(2):
        assert problem(server.upscale(encoded(), Idempotency_Key="k1")) == (504, "deadline")


def test_while_it_is_under_way_the_same_request_is_told_so():
    replays = Replays(max_bytes=100, seconds=60)
    assert replays.begin("key", "a") is None
    with pytest.raises(Problem) as refused:
        replays.begin("key", "a")
    assert refused.value.kind == "conflict"
    replays.fail("key")
    assert replays.begin("key", "a") is None


def test_memory_and_time_are_bounded():
    time = 0.0
    replays = Replays(max_bytes=100, seconds=60, now=lambda: time)
    for number in range(5):
        assert replays.begin(number, "a") is None
        replays.finish(number, f"answer {number}", 40)
    assert replays.begin(4, "a") == "answer 4"
    assert replays.begin(0, "a") is None
    time = 61.0
    assert replays.begin(4, "a") is None
    replays.begin("huge", "a")
    replays.finish("huge", "answer", 101)
    assert replays.begin("huge", "a") is None


def test_a_result_that_is_there_already_costs_nothing(server):
    etag = server.upscale(encoded(), query="?scale=2").headers["etag"]
    again = server.upscale(encoded(), query="?scale=2", If_None_Match=f'"x", W/{etag}')
    assert problem(again) == (412, "same-result")
    assert again.headers["etag"] == etag
    assert server.backend.calls == 1
    others = {"?scale=4", "?scale=2&quality=80", "?scale=2&format=jpeg"}
    assert all(server.upscale(encoded(), query=query).headers["etag"] != etag for query in others)
    assert server.upscale(encoded(25, 32), query="?scale=2").headers["etag"] != etag
