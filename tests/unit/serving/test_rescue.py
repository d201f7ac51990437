"""What a proxy leaves unsaid is said, in problem JSON that tells when to try again."""

import json

import pytest
from starlette.testclient import TestClient

from kdsr.serving.access import SAFETY
from kdsr.serving.rescue import Rescue, middlewares


def proxy(*, status=None, headers=None, body=b"words of Serve", error=None, before=b""):
    """A client of a proxy whose application is as told."""

    async def application(scope, receive, send):
        if status is not None:
            raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
            await send({"type": "http.response.start", "status": status, "headers": raw})
            await send({"type": "http.response.body", "body": before, "more_body": True})
        if error is not None:
            raise error
        if status is not None:
            await send({"type": "http.response.body", "body": body})

    return TestClient(Rescue(application), raise_server_exceptions=error is not None and status is not None)


@pytest.mark.parametrize(
    ("said", "status", "kind"),
    [
        ({}, 503, "worker-lost"),  # As where a replica dies under a request.
        ({"error": RuntimeError("secret")}, 503, "worker-lost"),
        ({"status": 500}, 503, "worker-lost"),
        ({"status": 503}, 503, "loading"),
        ({"status": 404}, 503, "loading"),  # As where there is no application yet.
        ({"status": 408}, 504, "deadline"),
    ],
)
def test_what_no_application_answered_is_worth_sending_again(said, status, kind):
    answer = proxy(**said).post("/v1/upscale", headers={"X-Request-Id": "mine"})
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.headers["X-Request-Id"] == "mine"
    assert all(answer.headers[name] == value for name, value in SAFETY.items())
    content = json.loads(answer.content)
    assert content["type"] == f"urn:kdsr:problem:{kind}"
    assert content["instance"] == "urn:kdsr:request:mine"
    assert "secret" not in answer.text and "Serve" not in answer.text


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
def test_an_answer_of_the_application_stays_as_it_is(status):
    answer = proxy(status=status, headers={"X-Content-Type-Options": "nosniff"}, body=b"ours").get("/")
    assert (answer.status_code, answer.content) == (status, b"ours")


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_proxy_speaks_for_itself_below_its_own_path(status):
    answer = proxy(status=status).get("/-/healthz")
    assert (answer.status_code, answer.content) == (status, b"words of Serve")


def test_half_an_answer_is_broken_off():
    broken = proxy(
        status=200, headers={"X-Content-Type-Options": "nosniff"}, before=b"half", error=OSError("gone")
    )
    with pytest.raises(OSError, match="gone"):
        broken.get("/v1/upscale")


def test_whoever_answers_in_the_end_has_the_same_id():
    seen = []

    async def application(scope, receive, send):
        seen.append(dict(scope["headers"])[b"x-request-id"].decode())

    answer = TestClient(Rescue(application)).get("/", headers={"X-Request-Id": "no id!"})
    assert seen == [answer.headers["X-Request-Id"]]
    assert seen != ["no id!"]


def test_serve_takes_what_it_is_given():
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    (middleware,) = validate_http_proxy_callback_return(middlewares())
    assert middleware.cls is Rescue
