"""Models are added and replaced while others serve, and a bad one changes nothing."""

import pytest

from kdsr.config import ServeConfig
from kdsr.errors import KdsrError, RequestError
from kdsr.serving.host import check_table
from tests.small_server import encoded, picture_of, problem, save_tiny


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


def test_a_call_for_a_network_that_was_just_replaced_may_be_sent_again(server, tiny_models):
    description = server.host.describe()
    server.host.load(table(tiny=[tiny_models[3]]))

    async def stale():
        return description

    server.backend.describe = stale
    answer = server.upscale(encoded())
    assert problem(answer) == (503, "loading")
    assert answer.headers["retry-after"] == "1"


def test_a_table_is_checked_before_anything_starts(tiny_models):
    with pytest.raises(RequestError, match="one network for each scale"):
        check_table(ServeConfig(models={"tiny": [tiny_models[2], tiny_models[2]]}))
    with pytest.raises(KdsrError, match="expected sha256"):
        check_table(ServeConfig(models={"tiny": [{"uri": tiny_models[2], "sha256": "0" * 64}]}))
