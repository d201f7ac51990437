"""Models are added and replaced while others serve, and a bad one changes nothing."""

import asyncio
import json
import threading

import pytest

from cluster.serve import Replica
from kdsr.config import ServeConfig
from kdsr.engine import Engine
from kdsr.errors import KdsrError, RequestError
from kdsr.serving import host
from kdsr.serving.contract import Description
from kdsr.serving.host import check_table
from tests.small_server import encoded, picture_of, problem, save_tiny
from tests.waiting import wait_for


def table(**models):
    return ServeConfig.model_validate({"models": models}).models


def test_a_new_model_is_served_and_one_that_is_left_out_is_not(server, tiny_models):
    assert server.host.load(table(other=[tiny_models[3]])) == {}
    assert picture_of(server.upscale(encoded(24, 32), query="?model=other")).shape == (72, 96, 3)
    assert problem(server.upscale(encoded(), query="?model=tiny")) == (422, "invalid-option")


def test_a_network_that_is_held_already_is_kept(server, tiny_models):
    before = dict(server.host._networks)
    server.host.load(table(tiny=[tiny_models[2], tiny_models[3]]))
    assert len(before.keys() & server.host._networks.keys()) == 1
    for sha256 in before.keys() & server.host._networks.keys():
        assert server.host._networks[sha256] is before[sha256]


def test_a_network_that_is_held_already_is_told_with_the_place_where_it_is_now(server, tmp_path):
    old, _ = save_tiny(tmp_path / "old", scale=2)
    server.host.load(table(tiny=[old]))
    new, _ = save_tiny(tmp_path / "new", scale=2)
    server.host.load(table(tiny=[new]))
    assert len(server.host._networks) == 1
    [network] = server.host.describe().models[0].networks
    assert network.uri == new


def test_another_content_at_the_same_place_is_loaded(server, tmp_path):
    uri, _ = save_tiny(tmp_path / "model", scale=2, seed=1)
    server.host.load(table(tiny=[uri]))
    first = server.upscale(encoded()).content
    save_tiny(tmp_path / "model", scale=2, seed=2)
    server.host.load(table(tiny=[uri]))
    assert server.upscale(encoded()).content != first


@pytest.mark.parametrize("fault", ["not there", "another sha256", "broken weights"])
def test_a_bad_model_leaves_the_old_one_serving(server, tmp_path, tiny_models, fault):
    before = server.upscale(encoded()).content
    uri, sha256 = save_tiny(tmp_path / "model", scale=2, seed=1)
    wanted = {"uri": uri, "sha256": sha256}
    if fault == "not there":
        wanted = {"uri": f"{uri}-none"}
    elif fault == "another sha256":
        wanted["sha256"] = "0" * 64
    else:
        (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    failures = server.host.load(table(tiny=[wanted], other=[tiny_models[3]]))
    assert list(failures) == ["tiny"]
    assert server.upscale(encoded()).content == before
    assert picture_of(server.upscale(encoded(24, 32), query="?model=other")).shape == (72, 96, 3)
    assert list(server.client.get("/v1/models").json()["failures"]) == ["tiny"]


def test_when_no_new_model_can_be_loaded_the_old_ones_stay(server, tiny_models):
    before = server.upscale(encoded()).content
    assert list(server.host.load(table(other=[f"{tiny_models[3]}-none"]))) == ["other"]
    assert server.upscale(encoded()).content == before
    content = server.client.get("/v1/models").json()
    assert ([model["name"] for model in content["models"]], list(content["failures"])) == (
        ["tiny"],
        ["other"],
    )


def test_callers_are_not_told_where_models_lie_and_the_log_is(server, tmp_path, caplog):
    cause = server.host.load(table(tiny=[f"{tmp_path}/a b/none"]))["tiny"]
    assert str(tmp_path) in cause and cause in caplog.text
    answer = server.client.get("/v1/models")
    assert "no card.json at ..." in answer.json()["failures"]["tiny"]
    assert str(tmp_path) not in answer.text and "a b" not in answer.text


def test_the_name_of_a_network_adds_no_header(server, tmp_path):
    uri, _ = save_tiny(tmp_path / "model", scale=2, seed=1)
    card = tmp_path / "model" / "card.json"
    content = json.loads(card.read_text(encoding="utf-8"))
    card.write_text(json.dumps(content | {"name": "a\r\nSet-Cookie: b=\u20ac"}), encoding="utf-8")
    assert server.host.load(table(tiny=[uri])) == {}
    answer = server.upscale(encoded())
    assert answer.headers["kdsr-network"] == "a__Set-Cookie:_b=_"
    assert "set-cookie" not in answer.headers


def test_without_any_model_there_is_a_reason_to_come_again(server):
    empty = Description((), {}, 0, 0)

    async def describe():
        return empty

    server.backend.describe = describe
    for answer in (server.upscale(encoded()), server.client.get("/readyz")):
        assert problem(answer) == (503, "loading")
        assert answer.headers["retry-after"] == "2"


def replica(*uris):
    """The config of a first load, and a replica that has none yet."""
    config = ServeConfig.model_validate({"models": {"tiny": uris[:1], "other": uris[1:]}, "auth": "none"})
    return Replica(config.model_dump(mode="json", exclude={"models"}), 1), config.model_dump(mode="json")


def test_a_replica_starts_with_all_of_its_models_or_not_at_all(tiny_models, monkeypatch):
    # A replica has its process for itself; this one belongs to other tests too.
    monkeypatch.setattr("cluster.serve._log_to_stderr", lambda: None)
    monkeypatch.setattr("kdsr.engine.expect_any_size", lambda: None)
    bad, config = replica(tiny_models[2], f"{tiny_models[3]}-none")
    with pytest.raises(KdsrError, match="model other"):
        asyncio.run(bad.reconfigure({"models": config["models"]}))
    good, whole = replica(tiny_models[2], tiny_models[3])
    asyncio.run(good.reconfigure({"models": whole["models"]}))
    asyncio.run(good.reconfigure({"models": config["models"]}))  # The next one leaves what was there.
    assert {model.name for model in asyncio.run(good.describe()).models} == {"tiny", "other"}
    bad._host.close()
    good._host.close()


def stale(server):
    """An entrance that has not heard of any replacement from now on."""
    description = server.host.describe()

    async def describe():
        return description

    server.backend.describe = describe


def test_a_network_that_was_just_replaced_answers_whoever_was_told_of_it(server, tiny_models):
    before = server.upscale(encoded()).content
    stale(server)
    server.host.load(table(tiny=[tiny_models[3]]))
    assert server.upscale(encoded()).content == before
    server.host.load(table(tiny=[tiny_models[3]]))
    assert server.upscale(encoded()).content == before


def test_a_network_that_was_replaced_long_ago_is_held_no_more(server, tiny_models, monkeypatch):
    monkeypatch.setattr("kdsr.serving.host.LEAVE_SECONDS", 0.01)
    stale(server)
    server.host.load(table(tiny=[tiny_models[3]]))
    wait_for(lambda: not server.host._leaving)
    answer = server.upscale(encoded())
    assert problem(answer) == (503, "loading")
    assert answer.headers["retry-after"] == "1"


def test_a_network_that_comes_back_stays(server, tiny_models):
    before = dict(server.host._networks)
    server.host.load(table(tiny=[tiny_models[3]]))
    server.host.load(table(tiny=[tiny_models[2], tiny_models[4]]))
    assert all(server.host._networks[sha256] is network for sha256, network in before.items())
    assert not before.keys() & server.host._leaving.keys()


def test_models_that_are_replaced_under_load_fail_no_request(server, tiny_models):
    statuses, stop = [], threading.Event()

    def call():
        while not stop.is_set():
            statuses.append(server.upscale(encoded()).status_code)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for scale in (3, 2, 4, 3):
            enough = len(statuses) + 3
            server.host.load(table(tiny=[tiny_models[scale]]))
            wait_for(lambda: len(statuses) >= enough)  # noqa: B023
    finally:
        stop.set()
        thread.join(60)
    assert len(statuses) >= 12 and set(statuses) == {200}


def test_a_table_is_checked_before_anything_starts(tiny_models):
    with pytest.raises(RequestError, match="one network for each scale"):
        check_table(ServeConfig(models={"tiny": [tiny_models[2], tiny_models[2]]}))
    with pytest.raises(KdsrError, match="expected sha256"):
        check_table(ServeConfig(models={"tiny": [{"uri": tiny_models[2], "sha256": "0" * 64}]}))


@pytest.mark.parametrize("is_same", [True, False])
def test_a_network_whose_bytes_depend_on_the_cores_keeps_each_tile_on_one(serve, monkeypatch, is_same):
    monkeypatch.setattr(Engine, "same_on_many_cores", lambda engine, num_threads: is_same)
    assert serve().host._compute.splits_lone_tiles == is_same


def test_memory_is_given_back_after_work_and_not_without(serve, monkeypatch):
    given = []
    monkeypatch.setattr(host, "TIDY_SECONDS", 0.005)
    monkeypatch.setattr(host, "give_back_memory", lambda: given.append(server.host._answered))
    server = serve()
    assert given == []
    picture_of(server.upscale(encoded()))
    wait_for(lambda: given)
    assert given == [1]
