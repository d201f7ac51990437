import io

import numpy as np
import PIL.Image
import pytest
import torch

from cluster.bulk import upscale
from kdsr.checkpoint import save_model
from kdsr.config import UpscaleConfig
from kdsr.errors import BucketNotFound
from kdsr.models import build_model
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store

KEYS = ["a.jpg", "with space/ü+%20#&?.png", "deep/er/c.webp"]
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def encoded(format_):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format_)
    return buffer.getvalue()


@pytest.fixture
def model(s3_uri):
    """The uri of a small random network in the store, x2."""
    torch.manual_seed(0)
    network = build_model(EspcnSpec(scale=2, num_features=4))
    card = Card(name="tiny", spec=network.spec, num_parameters=0, sha256="")
    save_model(open_store(f"{s3_uri}/model"), network, card)
    return f"{s3_uri}/model"


def test_from_s3_to_s3_with_the_output_inside_the_input(ray_local, s3_uri, model):
    source, output = open_store(f"{s3_uri}/in"), open_store(f"{s3_uri}/in/results")
    for key in KEYS:
        source.put(key, encoded(FORMATS[key.rpartition(".")[2]]))
    config = UpscaleConfig(input=source.uri, output=output.uri, model=model)
    report = upscale(config)
    assert (report.listed, report.done, report.skipped, report.failed) == (3, 3, 0, 0), report.failed_keys
    for key in KEYS:
        with PIL.Image.open(io.BytesIO(output.get(key))) as found:
            assert (found.format, found.size) == (FORMATS[key.rpartition(".")[2]], (64, 48))

    output.delete(KEYS[1])
    again = upscale(config)
    assert (again.listed, again.done, again.skipped, again.failed) == (3, 1, 2, 0)
    assert output.exists(KEYS[1])


def test_a_bucket_that_is_not_there_is_named(s3_server, s3_uri, model):
    with pytest.raises(BucketNotFound, match="no-such-bucket"):
        upscale(UpscaleConfig(input="s3://no-such-bucket/in", output=f"{s3_uri}/out", model=model))
