"""Who is let in, and for how much."""

import hashlib

import pytest

from kdsr.config import KeyConfig, ServeConfig
from kdsr.errors import RequestError
from kdsr.serving.keys import Caller, Keys, Quotas, new_key, read_keys
from kdsr.serving.problems import Problem
from tests.small_server import encoded, problem


def hashed(key):
    return {"sha256": hashlib.sha256(key.encode()).hexdigest()}


def test_no_server_starts_without_keys_unless_it_is_asked_to():
    with pytest.raises(RequestError, match="--new_key"):
        read_keys(ServeConfig())
    assert read_keys(ServeConfig(auth="none")) == {}


def test_a_new_key_is_let_in_by_the_lines_that_come_with_it(tmp_path):
    key, lines = new_key("anna")
    file = tmp_path / "keys.yaml"
    file.write_text(lines.partition("\n")[2])
    keys = Keys(read_keys(ServeConfig(keys_file=file)))
    assert keys.caller({"authorization": f"Bearer {key}"}) == Caller("anna")
    assert key not in lines
    assert new_key("anna")[0] != key


@pytest.mark.parametrize("content", ["anna: secret", "[", "anna: {sha256: abc}", "\xff"])
def test_a_file_that_holds_no_keys_is_refused_without_showing_it(tmp_path, content):
    file = tmp_path / "keys.yaml"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(RequestError, match="keys_file") as refused:
        read_keys(ServeConfig(keys_file=file))
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("path", ["/v1/upscale", "/v1/models", "/metrics"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic cmlnaHQ="},
        {"Authorization": "Bearer"},
        {"X-API-Key": "wrong"},
        {"X-API-Key": hashlib.sha256(b"right").hexdigest()},
        {"Authorization": "Bearer wrong", "X-API-Key": "right"},
    ],
)
def test_without_a_key_that_is_known_nothing_is_told(serve, path, headers):
    server = serve(auth="keys", keys={"anna": hashed("right")})
    call = server.client.post if path == "/v1/upscale" else server.client.get
    answer = call(path, headers=headers)
    assert problem(answer) == (401, "unauthorized")
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer right"}, {"Authorization": "bearer right"}, {"X-API-Key": "right"}]
)
def test_a_known_key_comes_in_either_header(serve, headers):
    server = serve(auth="keys", keys={"other": hashed("other"), "anna": hashed("right")})
    assert server.client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
def test_what_holds_no_secret_needs_no_key(serve, path):
    assert serve(auth="keys", keys={"anna": hashed("right")}).client.get(path).status_code == 200


def test_the_contract_says_what_needs_a_key_and_how_it_comes(serve):
    client = serve(auth="keys", keys={"anna": hashed("right")}).client
    document = client.get("/openapi.json").json()
    ways = {
        path: {name for way in operation.get("security", []) for name in way}
        for path, operations in document["paths"].items()
        for operation in operations.values()
    }
    assert {path for path, names in ways.items() if names} == {"/v1/upscale", "/v1/models", "/metrics"}
    assert ways["/v1/upscale"] == document["components"]["securitySchemes"].keys()
    assert client.get("/docs").text.count("Needs an API key") == 3
    assert "security" not in serve().client.get("/openapi.json").text


def test_a_quota_is_counted_in_output_pixels_for_each_key(serve):
    keys = {"anna": hashed("a") | {"pixels_per_minute": 5000}, "bert": hashed("b")}
    server = serve(auth="keys", keys=keys)
    answers = [server.upscale(encoded(24, 32), query="?scale=2", X_API_Key="a") for _ in range(2)]
    assert answers[0].status_code == 200
    assert problem(answers[1]) == (429, "quota")
    # 3072 pixels were taken, 1928 are left, and 1144 fill up in less than 14 seconds.
    assert 1 <= int(answers[1].headers["retry-after"]) <= 14
    assert server.upscale(encoded(24, 32), query="?scale=2", X_API_Key="b").status_code == 200


def test_a_quota_fills_up_again_and_never_beyond_a_minute():
    time = 0.0
    quotas = Quotas(now=lambda: time)
    anna = Caller("anna", 600)
    quotas.spend(anna, 600)
    with pytest.raises(Problem) as refused:
        quotas.spend(anna, 100)
    assert refused.value.retry_after == pytest.approx(10)
    time = 10.0
    quotas.spend(anna, 100)
    time = 10_000.0
    quotas.spend(anna, 600)
    with pytest.raises(Problem):
        quotas.spend(anna, 1)


def test_an_image_above_the_quota_is_done_with_a_full_one_and_paid_off_later():
    time = 0.0
    quotas = Quotas(now=lambda: time)
    anna = Caller("anna", 600)
    quotas.spend(anna, 1200)
    time = 60.0
    with pytest.raises(Problem):
        quotas.spend(anna, 1)
    time = 121.0
    quotas.spend(anna, 1)


def test_what_was_refused_after_all_is_given_back():
    quotas, anna = Quotas(now=lambda: 0.0), Caller("anna", 600)
    quotas.spend(anna, 600)
    quotas.give_back(anna, 600)
    quotas.spend(anna, 600)


def test_each_of_two_entrances_counts_half():
    quotas = Quotas(share=0.5)
    quotas.spend(Caller("anna", 600), 300)
    with pytest.raises(Problem):
        quotas.spend(Caller("anna", 600), 1)


def test_a_key_is_held_in_no_repr():
    assert "right" not in repr(ServeConfig(keys={"anna": KeyConfig.model_validate(hashed("right"))}))
