import numpy as np
import pytest

from kdsr import codecs
from kdsr.config import UpscaleConfig
from kdsr.forecast import forecast
from kdsr.image import Image
from kdsr.manifest import list_tasks
from kdsr.models import build_model
from kdsr.spec import BicubicSpec
from kdsr.store import open_store


@pytest.fixture
def config(tmp_path):
    return UpscaleConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), model="photo-x4")


def told(config, **changes):
    config = config.model_copy(update=changes)
    tasks = list_tasks(open_store(config.input), output_uri=open_store(config.output).uri, run="0" * 16)
    return forecast(config, tasks, build_model(BicubicSpec(scale=2)))


def test_pixels_follow_from_the_headers_and_nothing_is_written(config, tmp_path):
    source = open_store(config.input)
    for index in range(3):
        source.put(f"{index}.png", codecs.encode_png(np.zeros((100, 200, 3), np.uint8)))
    source.put("a.jpg", codecs.encode(Image(np.zeros((100, 200, 3), np.uint8)), format="jpeg"))
    found = told(config)
    assert found.images == {".png": 3, ".jpg": 1}
    assert found.output_megapixels == pytest.approx(4 * 0.08)
    assert found.seconds > 0 and found.output_bytes > 0
    assert "4 inputs" in found.sentence()
    assert not (tmp_path / "out").exists()


def test_another_size_is_reckoned_with(config):
    open_store(config.input).put("a.png", codecs.encode_png(np.zeros((100, 200, 3), np.uint8)))
    assert told(config, width=50).output_megapixels == pytest.approx(50 * 25 / 1e6)


def test_what_is_no_image_is_counted_as_such(config):
    source = open_store(config.input)
    source.put("a.png", codecs.encode_png(np.zeros((100, 200, 3), np.uint8)))
    source.put("b.png", b"not an image")
    found = told(config)
    assert (found.probed, found.unreadable) == (2, 1)
    assert found.output_megapixels == pytest.approx(0.08)
