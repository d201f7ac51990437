import io
import json

import numpy as np
import PIL.Image
import pytest

from cluster.check import check
from cluster.shard import shard
from kdsr.config import CheckConfig, ShardConfig
from kdsr.errors import RequestError
from kdsr.shards import read_index
from kdsr.store import open_store

pytestmark = pytest.mark.usefixtures("ray_local")


def photo(seed):
    shapes = np.random.default_rng(seed).integers(0, 256, (16, 16, 3)).repeat(12, axis=0).repeat(12, axis=1)
    noisy = np.clip(shapes + np.random.default_rng(seed).normal(0, 9, shapes.shape), 0, 255)
    file = io.BytesIO()
    PIL.Image.fromarray(noisy.astype(np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


@pytest.fixture
def shards(tmp_path):
    source = open_store(f"file://{tmp_path}/in")
    for number in range(16):
        source.put(f"{number}.png", photo(number))
    source.put("copy.png", photo(3))
    uri = f"file://{tmp_path}/shards"
    shard(ShardConfig(input=source.uri, output=uri, shard_bytes=2**20, heldout_fraction=0.3))
    return uri


def test_what_is_in_the_shards_is_told_and_written_beside_them(shards):
    report = check(CheckConfig(check=shards, patch_size=24))

    store = open_store(shards)
    lines = [json.loads(line) for line in store.get("check/findings.jsonl").splitlines()]
    assert report.usable
    assert (report.num_images, report.num_rows) == (17, read_index(store).num_rows)
    assert len(lines) == 1
    assert lines[0]["finding"] in {"duplicate", "leak"}
    assert "copy.png" in lines[0]["key"] + lines[0]["other"]
    assert store.exists("check/sheet.png")
    assert store.exists("check/report.json")


def test_a_corrupt_shard_is_named_and_the_others_are_looked_at(shards, tmp_path):
    store = open_store(shards)
    [bad, *others] = read_index(store).shards
    store.put(bad.key, store.get(bad.key)[:-7])

    report = check(CheckConfig(check=shards, output=str(tmp_path / "report"), patch_size=24))

    assert not report.usable
    assert [(shard.key, shard.sha256) for shard in report.broken] == [(bad.key, bad.sha256)]
    assert report.num_rows == sum(entry.num_rows for entry in others)
    assert (tmp_path / "report" / "report.json").exists()


def test_photographs_without_shards_are_refused(tmp_path):
    open_store(f"file://{tmp_path}").put("a.png", photo(0))

    with pytest.raises(RequestError, match=r"no index.json"):
        check(CheckConfig(check=str(tmp_path)))
