import io
import json

import numpy as np
import PIL.Image
import pytest

from cluster.shard import shard
from kdsr.config import ShardConfig
from kdsr.errors import DataError, RequestError, StoreError
from kdsr.photos import list_photos, plan_shards
from kdsr.shards import read_index, read_row_group, verify
from kdsr.store import open_store

pytestmark = pytest.mark.usefixtures("ray_local")

NOISE = np.random.default_rng(0).integers(0, 256, (300, 320, 3), dtype=np.uint8)


def photo(number=0):
    file = io.BytesIO()
    PIL.Image.fromarray(np.roll(NOISE, number, axis=0)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def config(root, **options):
    uris = {"input": f"{root}/in", "output": f"{root}/out"}
    return ShardConfig(**uris | {"sub_image_size": 100, "shard_bytes": 2**20, **options})


def snapshot(uri):
    store = open_store(uri)
    return {info.key: (info.etag, store.get(info.key)) for info in store.list()}


def fill(root, count=12):
    source = open_store(f"{root}/in")
    for number in range(count):
        source.put(f"album {number % 3}/ü+{number}.png", photo(number))
    return source


@pytest.fixture(params=["file", "s3"])
def root(request, tmp_path):
    return f"file://{tmp_path}" if request.param == "file" else request.getfixturevalue("s3_uri")


@pytest.fixture
def folder(tmp_path):
    return f"file://{tmp_path}"


def test_photographs_become_a_set_of_shards(root):
    source = fill(root)
    source.put("broken.jpg", b"\xff\xd8\xff and no more")
    source.put(".DS_Store", b"junk")

    summary = shard(config(root))

    target = open_store(f"{root}/out")
    index = read_index(target)
    assert (index.num_images, index.num_rows, index.num_rejected) == (12, 12 * 9, 1)
    assert len(index.shards) > 1
    assert summary.num_built >= len(index.shards)
    keys = set()
    for entry in index.shards:
        verify(target, entry)
        for group in range(len(entry.row_groups)):
            keys |= {row.key for row in read_row_group(target, entry, group)}
    assert keys == {f"album {number % 3}/ü+{number}.png" for number in range(12)}
    [rejected] = [json.loads(line) for line in target.get("rejected.jsonl").splitlines()]
    assert (rejected["key"], rejected["error"]) == ("broken.jpg", "ImageCorrupt")
    assert summary.sentence().startswith("sharded 12 images into 108 sub-images in")
    assert "1 rejected, see rejected.jsonl" in summary.sentence()


def test_a_rerun_writes_no_shard_again(folder):
    fill(folder)
    shard(config(folder))
    before = snapshot(f"{folder}/out")

    summary = shard(config(folder))

    after = snapshot(f"{folder}/out")
    assert summary.num_built == 0
    assert {key: data for key, (_, data) in before.items()} == {key: data for key, (_, data) in after.items()}
    assert all(before[key][0] == after[key][0] for key in before if key.startswith("shard-"))


def test_what_is_lost_is_built_again_byte_for_byte(folder):
    fill(folder)
    shard(config(folder))
    before = snapshot(f"{folder}/out")
    target = open_store(f"{folder}/out")
    shards = sorted(key for key in before if key.endswith(".parquet"))
    target.delete(shards[0].replace(".parquet", ".json"))
    target.delete(shards[1])
    target.delete("index.json")

    assert shard(config(folder)).num_built == 2
    after = snapshot(f"{folder}/out")
    assert {key: data for key, (_, data) in before.items()} == {key: data for key, (_, data) in after.items()}


def test_one_more_photograph_rebuilds_one_shard_and_leaves_the_old_one(folder, capsys):
    source = fill(folder)
    first = shard(config(folder)).index
    source.put("new.png", photo(100))

    summary = shard(config(folder))

    assert summary.num_built == 1
    assert summary.index.num_images == 13
    assert len({entry.key for entry in first.shards} & {entry.key for entry in summary.index.shards}) >= 3
    assert "2 files of earlier runs" in capsys.readouterr().err


def test_an_output_inside_the_input_is_not_its_own_input(folder):
    fill(folder)
    options = config(folder, output=f"{folder}/in/shards")
    shard(options)

    assert shard(options).num_built == 0


def test_an_output_that_is_the_input_is_refused(folder):
    fill(folder)

    with pytest.raises(RequestError, match="choose another output"):
        shard(config(folder, output=f"{folder}/in"))


def test_an_empty_input_is_refused(folder):
    with pytest.raises(RequestError, match="no files under"):
        shard(config(folder))


def test_nothing_usable_is_an_error_and_leaves_no_index(folder):
    open_store(f"{folder}/in").put("notes.txt", b"only notes")

    with pytest.raises(DataError, match=r"none of the 1 files .* notes.txt: not an image"):
        shard(config(folder))
    target = open_store(f"{folder}/out")
    assert not target.exists("index.json")
    assert b"notes.txt" in target.get("rejected.jsonl")


def test_a_store_that_fails_ends_the_job_with_its_own_error(folder, tmp_path):
    fill(folder)
    (tmp_path / "out").write_text("a file where the folder should be")

    with pytest.raises(StoreError, match="out"):
        shard(config(folder))


def test_a_store_that_fails_on_a_worker_ends_the_job_with_its_own_error(folder, tmp_path):
    source = fill(folder)
    options = config(folder)
    [first, *_] = plan_shards(list_photos(source), options)
    (tmp_path / "out" / first.key / "a folder in the way").mkdir(parents=True)

    with pytest.raises(StoreError, match=first.key) as caught:
        shard(options)
    assert "ray" not in str(caught.value).lower()
    assert not open_store(options.output).exists("index.json")
