"""When the client sends again what was not answered, and when not."""

import json
import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from kdsr.client import Client, Retries
from kdsr.client.calls import Ask, Pause, Reply, Unanswered, answered, retry_after
from kdsr.errors import (
    ImageRefused,
    JobFailed,
    RequestError,
    RequestRefused,
    ServerBusy,
    ServerError,
    ServerUnreachable,
)
from tests.scripted_server import IMPATIENT, answer
from tests.small_server import encoded


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def outcome_of(*outcomes, patience=100.0):
    """What a call comes to when its tries end like this, and its pauses."""
    clock, pauses = Clock(), []
    retries = Retries(patience_seconds=patience, now=clock, uniform=lambda _, longest: longest)
    steps, waiting = answered(Ask("GET", "v1/models"), retries), list(outcomes)
    step = next(steps)
    try:
        while True:
            if isinstance(step, Pause):
                pauses.append(step.seconds)
                clock.now += step.seconds
                step = steps.send(None)
            elif isinstance(waiting[0], Exception):
                step = steps.throw(waiting.pop(0))
            else:
                step = steps.send(waiting.pop(0))
    except StopIteration as stop:
        return stop.value, pauses
    except ServerError as error:
        return type(error), pauses


OK, BUSY, LOADING = Reply(200, {}), Reply(429, {"retry-after": "7"}), Reply(503, {})


def test_the_server_says_when_to_come_again():
    assert outcome_of(BUSY, BUSY, OK) == (OK, [7.0, 7.0])


def test_a_server_that_wants_to_be_asked_at_once_is_asked_after_pauses_all_the_same():
    at_once = Reply(503, {"retry-after": "0"})
    assert outcome_of(at_once, at_once, OK) == (OK, [0.5, 1])


def test_pauses_double_up_to_a_limit_when_the_server_names_none():
    assert outcome_of(*[LOADING] * 8, OK, patience=1000) == (OK, [0.5, 1, 2, 4, 8, 16, 20, 20])


def test_pauses_are_spread():
    pauses = [Retries().pause(2) for _ in range(50)]
    assert 1 <= min(pauses) < max(pauses) <= 2


def test_patience_ends_before_a_pause_that_would_be_longer():
    assert outcome_of(*[BUSY] * 9, patience=20) == (ServerBusy, [7.0, 7.0])
    assert outcome_of(Reply(429, {"retry-after": "3600"})) == (ServerBusy, [])


def test_a_connection_that_broke_is_tried_again():
    assert outcome_of(Unanswered("x"), OK) == (OK, [0.5])
    assert outcome_of(*[Unanswered("x")] * 20, patience=4)[0] is ServerUnreachable


def test_a_request_that_is_under_way_already_is_waited_for():
    assert outcome_of(Unanswered("x"), Reply(409, {"retry-after": "1"}), OK) == (OK, [0.5, 1.0])
    assert outcome_of(Reply(409, {})) == (RequestRefused, [])


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RequestRefused),
        (401, RequestRefused),
        (413, ImageRefused),
        (500, ServerError),
        (504, ServerError),
    ],
)
def test_what_another_try_does_not_help_is_raised_at_once(status, error):
    assert outcome_of(Reply(status, {})) == (error, [])


def test_retry_after_is_seconds_or_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert retry_after({"retry-after": " 12 "}) == 12
    assert 80 < retry_after({"retry-after": soon}) <= 90
    assert retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


GOOD = {
    "Kdsr_Model": "m",
    "Kdsr_Scale": "4",
    "Kdsr_Input_Size": "1x1",
    "Kdsr_Output_Size": "4x4",
    "Kdsr_Queue_Ms": "0",
    "Kdsr_Compute_Ms": "1",
    "Content_Type": "image/png",
}


def test_each_try_has_the_whole_body_and_the_same_key(scripted, tmp_path):
    source = tmp_path / "a.png"
    source.write_bytes(encoded())
    whole = answer(200, b"result", **GOOD)
    server = scripted(answer(503), answer(429, Retry_After="0"), b"", whole[:-3], whole)
    with Client(server.address, retries=IMPATIENT) as client:
        path = client.upscale(source)
    assert path.read_bytes() == b"result"
    assert server.bodies == [source.read_bytes()] * 5
    keys = {re.search("idempotency-key: (.+)", request)[1] for request in server.requests}
    assert len(keys) == 1


def test_two_calls_have_keys_of_their_own(scripted):
    server = scripted(answer(200, b"1", **GOOD), answer(200, b"2", **GOOD))
    with Client(server.address) as client:
        assert [client.upscale(b"x"), client.upscale(b"x")] == [b"1", b"2"]
    keys = {re.search("idempotency-key: (.+)", request)[1] for request in server.requests}
    assert len(keys) == 2


def test_nobody_there_is_an_error_when_patience_is_over():
    with (
        Client("http://127.0.0.1:9", retries=Retries(patience_seconds=0)) as client,
        pytest.raises(ServerUnreachable, match="GET v1/models: expected an answer"),
    ):
        client.models()


def test_a_silent_server_is_given_up(scripted):
    server = scripted()
    with (
        Client(server.address, retries=Retries(patience_seconds=0), timeout_seconds=0.3) as client,
        pytest.raises(ServerUnreachable),
    ):
        client.models()


def test_a_key_does_not_follow_a_redirect(scripted):
    server = scripted(answer(302, Location="http://127.0.0.1:9/v1/models"))
    with (
        Client(server.address, api_key="secret") as client,
        pytest.raises(RequestRefused, match="found status 302 to 'http://127.0.0.1:9"),
    ):
        client.models()


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"models": 3}'])
def test_what_is_no_server_of_kdsr_is_noticed(scripted, body):
    server = scripted(answer(200, body), answer(200, body, Content_Type="image/png"))
    with Client(server.address) as client:
        with pytest.raises(ServerError, match="expected Offer as JSON"):
            client.models()
        with pytest.raises(ServerError, match="without a proxy"):
            client.upscale(b"x")


def job(state, **fields):
    return answer(200, json.dumps({"id": "a1", "state": state, "listed": 2} | fields).encode())


def test_a_job_is_waited_for_and_its_result_fetched(scripted, tmp_path):
    server = scripted(
        answer(202, json.dumps({"id": "a1", "state": "queued"}).encode(), Location="/v1/jobs/a1"),
        job("running", done=1),
        job("done", done=2),
        answer(200, b"result"),
        job("cancelled"),
    )
    seen = []
    with Client(server.address) as client:
        begun = client.submit(encoded(), scale=4)
        done = client.wait(begun.id, every_seconds=0, on_progress=lambda found: seen.append(found.done))
        path = client.result(begun.id, tmp_path / "big.png")
        assert client.cancel(begun.id).state == "cancelled"
    assert seen == [1, 2] and done.is_finished and path.read_bytes() == b"result"
    assert [request.split(" http")[0] for request in server.requests] == [
        "post /v1/jobs?scale=4",
        "get /v1/jobs/a1",
        "get /v1/jobs/a1",
        "get /v1/jobs/a1/result",
        "delete /v1/jobs/a1",
    ]


def test_places_become_a_job(scripted):
    server = scripted(answer(202, json.dumps({"id": "a1", "state": "queued"}).encode()))
    with Client(server.address) as client:
        client.submit_places("s3://a/in", "s3://a/out", include=["*.png"], model="photo")
    assert json.loads(server.bodies[0]) == {
        "input": "s3://a/in",
        "output": "s3://a/out",
        "include": ["*.png"],
        "model": "photo",
    }


def test_a_job_that_failed_or_lasts_is_an_error(scripted):
    server = scripted(job("failed", failed=1, failures={"b.png": "cut off"}), job("running"))
    with Client(server.address) as client:
        with pytest.raises(
            JobFailed, match=r"found it failed with 0 of 2 images done and 1 failed.*b.png: cut off"
        ):
            client.wait("a1")
        with pytest.raises(TimeoutError, match="job a1 is running"):
            client.wait("a1", timeout_seconds=0, every_seconds=1)


def test_a_missing_folder_is_noticed_before_anything_is_sent(scripted, tmp_path):
    server = scripted()
    with Client(server.address) as client, pytest.raises(RequestError, match="expected a folder"):
        client.result("a1", tmp_path / "none" / "big.png")
    assert server.requests == []
