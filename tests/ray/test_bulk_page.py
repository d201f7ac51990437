"""What a person finds when a bulk run ended: one image or many, done or failed."""

import json

import numpy as np
import pytest
import torch

from cluster.bulk import upscale, with_folder
from kdsr import codecs
from kdsr.checkpoint import save_model
from kdsr.config import UpscaleConfig
from kdsr.errors import RequestError
from kdsr.image import Image
from kdsr.models import build_model
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store


@pytest.fixture
def config(tmp_path):
    """Two good images and a broken one, upscaled by a small random network."""
    torch.manual_seed(0)
    network = build_model(EspcnSpec(scale=2, num_features=4))
    model = open_store(str(tmp_path / "model"))
    save_model(model, network, Card(name="tiny", spec=network.spec, num_parameters=0, sha256=""))
    source = open_store(str(tmp_path / "in"))
    for seed, key in enumerate(("a[1].png", "<b>.jpg")):
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        source.put(key, codecs.encode(Image(pixels), format="png"))
    source.put("broken.png", codecs.encode(Image(pixels), format="png")[:500])
    return UpscaleConfig(input=source.uri, output=str(tmp_path / "out"), model=model.uri)


def test_a_run_leaves_a_page_that_its_last_words_name(ray_local, config):
    output = open_store(config.output)
    report = upscale(config, command="python jobs/upscale.py -i in")
    assert report.page == f"{output.uri}/_kdsr/runs/{report.run}/report.html"
    assert report.sentence().endswith(f"failed 1 (see {report.page})")
    page = output.get(report.page.removeprefix(f"{output.uri}/")).decode()
    assert "1 of 3 images failed" in page
    assert "python jobs/upscale.py -i in --retry_failed" in page
    assert page.count("<img ") == 4
    stored = json.loads(output.get(f"_kdsr/runs/{report.run}/report.json"))
    assert stored["page"] == report.page

    # The replay of the replay is the same command, and a rerun's page still shows what was done before.
    again = upscale(config.model_copy(update={"retry_failed": True}), command=stored["replay"])
    assert again.replay == stored["replay"]
    page = output.get(again.page.removeprefix(f"{output.uri}/")).decode()
    assert "All starts of this run together: 2 results" in page
    assert page.count("<img ") == 4


def test_a_page_that_cannot_be_written_fails_no_run(ray_local, config):
    output = open_store(config.output)
    first = upscale(config.model_copy(update={"exclude": ("broken*",)}))
    output.delete(f"_kdsr/runs/{first.run}/report.html")
    for name in ("source", "x"):
        output.put(f"_kdsr/runs/{first.run}/report.html/{name}", b"")
    second = upscale(config.model_copy(update={"exclude": ("broken*",)}))
    assert second.ok
    assert second.page == ""
    assert second.sentence().endswith("/report.json)")


def test_one_image_is_its_folder_with_nothing_else_included(ray_local, config):
    one = with_folder(config.model_copy(update={"input": f"{config.input}/a[1].png"}))
    assert one.input == config.input
    report = upscale(one)
    assert (report.listed, report.done) == (1, 1)
    assert open_store(config.output).exists("a[1].png")


def test_a_folder_named_like_an_image_is_a_folder(tmp_path, config):
    open_store(str(tmp_path / "trip.png")).put("a.png", b"x")
    folder = config.model_copy(update={"input": f"file://{tmp_path}/trip.png"})
    assert with_folder(folder) == folder
    assert with_folder(config) == config


def test_the_result_of_one_image_goes_to_a_folder(config):
    changes = {"input": f"{config.input}/broken.png", "output": f"{config.output}.png"}
    with pytest.raises(RequestError, match="give the folder of the results"):
        with_folder(config.model_copy(update=changes))
