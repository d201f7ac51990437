import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import ray
import torch

from cluster.bulk import MAX_DEATHS, UpscaleActor, _Ledger, upscale, verify
from cluster.deaths import DeathCount
from kdsr import codecs, manifest
from kdsr.checkpoint import save_model
from kdsr.config import UpscaleConfig
from kdsr.errors import RequestError, UnknownModel
from kdsr.image import Frame, Image
from kdsr.manifest import Status
from kdsr.models import build_model
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The uri of a small random network, x2."""
    torch.manual_seed(0)
    network = build_model(EspcnSpec(scale=2, num_features=4))
    store = open_store(str(tmp_path_factory.mktemp("model")))
    save_model(store, network, Card(name="tiny", spec=network.spec, num_parameters=0, sha256=""))
    return store.uri


def encoded(format_, seed=0, mode="RGB", size=(24, 32), **options):
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, format_, **options)
    return buffer.getvalue()


def orientation(value):
    exif = PIL.Image.Exif()
    exif[0x0112] = value
    return exif


GOOD = {
    "a.jpg": encoded("JPEG"),
    "b c/ü+%20#.png": encoded("PNG", mode="RGBA"),
    "b c/grey.png": encoded("PNG", mode="L"),
    "d.webp": encoded("WEBP"),
    "rotated.jpg": encoded("JPEG", exif=orientation(6)),
}
BAD = {"cut.jpg": encoded("JPEG", size=(200, 200))[:3000], "notes.txt": b"hello"}
JUNK = {".hidden.jpg": b"x", "b c/Thumbs.db": b"x", "__MACOSX/._a.jpg": b"x"}


def filled(uri, objects):
    store = open_store(uri)
    for key, data in objects.items():
        store.put(key, data)
    return store


def results(store):
    """Key to content of all that is no record."""
    return {info.key: store.get(info.key) for info in store.list() if not manifest.is_junk(info.key)}


def sums(report):
    return report.listed, report.done, report.skipped, report.failed


def test_a_mixed_folder_is_upscaled_and_reruns_do_what_is_missing(ray_local, model, tmp_path):
    source = filled(str(tmp_path / "in"), GOOD | BAD | JUNK)
    output = open_store(str(tmp_path / "out"))
    config = UpscaleConfig(input=source.uri, output=output.uri, model=model, scale=2)

    report = upscale(config)
    assert sums(report) == (7, 5, 0, 2)
    assert not report.ok
    assert report.failed_keys.keys() == BAD.keys()
    assert report.failed_keys["cut.jpg"].startswith("corrupt (decode): ")
    assert report.failed_keys["notes.txt"].startswith("unsupported (decode): ")
    assert report.output_megapixels == pytest.approx(5 * 48 * 64 / 1e6)
    first = results(output)
    assert first.keys() == GOOD.keys()
    sizes = {key: PIL.Image.open(io.BytesIO(data)).size for key, data in first.items()}
    assert sizes.pop("rotated.jpg") == (48, 64)
    assert set(sizes.values()) == {(64, 48)}
    stored = json.loads(output.get(f"_kdsr/runs/{report.run}/report.json"))
    assert (stored["listed"], stored["done"], stored["failed"]) == (7, 5, 2)

    # A result that went away, an input that changed, one that is bad still and one that is gone.
    output.delete("d.webp")
    source.put("a.jpg", encoded("JPEG", seed=1))
    source.delete("notes.txt")
    again = upscale(config)
    assert again.run == report.run
    assert sums(again) == (6, 2, 3, 1)
    second = results(output)
    assert second.pop("a.jpg") != first.pop("a.jpg")
    assert second == first

    source.delete("cut.jpg")
    last = upscale(config)
    assert sums(last) == (5, 0, 5, 0)
    assert last.ok


def test_depth_frames_names_and_checks_of_one_run(ray_local, model, tmp_path):
    deep = np.random.default_rng(0).integers(0, 65536, (24, 32, 3), dtype=np.uint16)
    moving = [Frame(Image(np.full((24, 32, 3), level, np.uint8)), 0.1) for level in (10, 200)]
    inputs = {
        "deep.tif": codecs.encode(Image(deep), format="tiff"),
        "moving.gif": codecs.encode_frames(moving, format="gif", loop=0),
        "same.jpg": encoded("JPEG"),
        "same.png": encoded("PNG"),
        "left.out.png": encoded("PNG"),
        "broken.png": encoded("PNG")[:90],
    }
    source = filled(str(tmp_path / "in"), inputs)
    output = open_store(str(tmp_path / "out"))
    config = UpscaleConfig(
        input=source.uri, output=output.uri, model=model, format="png", exclude=("left*",), scale=3
    )

    report = upscale(config, command="python jobs/upscale.py --config x.yaml")
    assert sums(report) == (5, 4, 0, 1)
    assert report.replay == "python jobs/upscale.py --config x.yaml --retry_failed"
    assert report.precision in ("float32", "bfloat16")
    headers = {key: codecs.probe(data) for key, data in results(output).items()}
    assert {key: (h.format, h.height, h.width, h.bits, h.frames) for key, h in headers.items()} == {
        "deep.png": ("png", 72, 96, 16, 1),
        "moving.png": ("png", 72, 96, 8, 2),
        "same.jpg.png": ("png", 72, 96, 8, 1),
        "same.png": ("png", 72, 96, 8, 1),
    }
    assert verify(config) == (4, {})

    output.put("same.png", b"replaced")
    assert verify(config) == (4, {"same.png": "changed since"})
    again = config.model_copy(update={"retry_failed": True})
    assert sums(upscale(again)) == (1, 0, 0, 1)
    source.put("broken.png", encoded("PNG"))
    with pytest.raises(RequestError, match="nothing failed"):
        upscale(again)
    assert sums(upscale(config)) == (5, 2, 3, 0)


def test_several_actors_share_the_work(ray_local, model, tmp_path):
    source = filled(str(tmp_path / "in"), {f"{n:03}.jpg": encoded("JPEG", seed=n) for n in range(60)})
    config = UpscaleConfig(
        input=source.uri, output=str(tmp_path / "out"), model=model, cluster={"num_workers": 2}
    )
    assert sums(upscale(config)) == (60, 60, 0, 0)


def test_what_cannot_work_is_refused_before_anything_is_written(model, tmp_path):
    source = filled(str(tmp_path / "in"), {"a.jpg": GOOD["a.jpg"]})
    good = UpscaleConfig(input=source.uri, output=str(tmp_path / "out"), model=model)
    refused = [
        (good.model_copy(update={"model": "no-such-model"}), UnknownModel, "no-such-model"),
        (good.model_copy(update={"retry_failed": True}), RequestError, "nothing failed"),
        (good.model_copy(update={"output": source.uri}), RequestError, "is the input itself"),
        (good.model_copy(update={"input": f"{source.uri}/none"}), RequestError, "nothing to upscale"),
    ]
    for config, error, message in refused:
        with pytest.raises(error, match=message):
            upscale(config)
    assert not (tmp_path / "out").exists()


def test_more_workers_than_there_is_room_for_are_refused(ray_local, model, tmp_path):
    source = filled(str(tmp_path / "in"), {"a.jpg": GOOD["a.jpg"]})
    config = UpscaleConfig(input=source.uri, output=str(tmp_path / "out"), model=model)
    for cluster in ({"num_workers": 4, "cpus_per_worker": 1}, {"use_gpu": True}):
        with pytest.raises(RequestError, match=r"cluster\.num_workers"):
            upscale(UpscaleConfig(**config.model_dump(exclude={"cluster"}), cluster=cluster))


# ---------------------------------------------------------------- a worker that dies


def deadly_actor():
    """An actor class that stands in for an image which crashes the decoder or takes all memory."""

    class Deadly(UpscaleActor):
        def __init__(self, *args):
            super().__init__(*args)
            outer = self._objects

            class Objects:
                def upscale(self, task):
                    if task.key == "deadly.jpg":
                        time.sleep(0.2)
                        os.kill(os.getpid(), signal.SIGKILL)
                    return outer.upscale(task)

            self._objects = Objects()

    return ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Deadly)


def test_an_image_that_kills_its_worker_is_given_up_and_the_rest_is_done(ray_local, model, tmp_path):
    names = [*(f"{n}.jpg" for n in range(6)), "deadly.jpg"]
    source = filled(str(tmp_path / "in"), {name: encoded("JPEG", seed=n) for n, name in enumerate(names)})
    config = UpscaleConfig(input=source.uri, output=str(tmp_path / "out"), model=model)
    tasks = list(manifest.list_tasks(source, output_uri=config.output, run="run"))
    deaths = ray.remote(num_cpus=0)(DeathCount).remote()
    sha256 = json.loads(open_store(model).get("card.json"))["sha256"]
    actor = deadly_actor().remote(config, sha256, 1, deaths)
    answer = ray.get(actor.__call__.remote(manifest.tasks_to_table(tasks)), timeout=600)
    by_key = {status.key: status for status in manifest.table_to_statuses(answer)}
    assert by_key.keys() == set(names)
    assert by_key.pop("deadly.jpg").error_class == "internal"
    assert all(status.status == "done" for status in by_key.values())


def test_only_images_in_hand_when_a_worker_dies_are_suspects():
    deaths = DeathCount()
    assert deaths.begin_all(["a", "b"]) == [0, 0]
    deaths.end(["a", "b"])
    assert deaths.begin_all(["a", "c"]) == [0, 0]
    # The worker dies here; a and c come again, one by one, and c kills it again and again.
    assert deaths.begin_all(["a", "c"]) == [1, 1]
    deaths.begin("a")
    deaths.end(["a"])
    for count in range(1, MAX_DEATHS):
        assert deaths.begin_all(["a", "c"])[1] == count
        deaths.begin("c")
    assert deaths.begin_all(["a", "c"]) == [0, MAX_DEATHS]


# ---------------------------------------------------------------- a driver that dies


def test_rows_reach_the_ledger_at_once_at_first_and_also_when_the_run_breaks(tmp_path):
    output = open_store(str(tmp_path))
    rows = [Status(f"{n:032x}", f"{n}.jpg", f"{n}.jpg", "done") for n in range(5)]

    def break_off():
        with _Ledger(manifest.Records(output, "run")) as ledger:
            ledger.add(rows[0])
            assert status_rows(output) == 1
            for row in rows[1:]:
                ledger.add(row)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        break_off()
    assert status_rows(output) == 5


def job(config, *flags):
    given = [f"--{name}={getattr(config, name)}" for name in ("input", "output", "model")]
    return subprocess.Popen(
        [sys.executable, "jobs/upscale.py", *given, *flags],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def status_rows(output):
    keys = [info.key for info in output.list("_kdsr/runs/") if "/status/" in info.key]
    return sum(pq.read_metadata(io.BytesIO(output.get(key))).num_rows for key in keys)


@pytest.mark.long
def test_a_killed_driver_loses_little_and_the_same_command_goes_on(model, tmp_path):
    # Large enough, and on one core slow enough, that the driver is killed in the middle and not at an end.
    objects = {f"{n:03}.png": encoded("PNG", seed=n, size=(300, 400)) for n in range(100)}
    source, output = filled(str(tmp_path / "in"), objects), open_store(str(tmp_path / "out"))
    config = UpscaleConfig(input=source.uri, output=output.uri, model=model)
    killed = job(config, "--cluster.cpus_per_worker", "1")
    deadline = time.monotonic() + 600
    while not status_rows(output) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    saved = status_rows(output)
    assert 0 < saved < 100
    assert not any(info.key.endswith("report.json") for info in output.list("_kdsr/"))

    second = job(config)
    stdout, stderr = second.communicate(timeout=600)
    assert second.returncode == 0, stderr
    last_line = stdout.strip().splitlines()[-1]
    assert last_line.startswith(f"upscaled {100 - saved} images")
    assert f"skipped {saved}, failed 0" in last_line
    assert results(output).keys() == objects.keys()
    for data in results(output).values():
        PIL.Image.open(io.BytesIO(data)).load()


def test_the_job_says_what_failed_and_leaves_with_1(model, tmp_path):
    source = filled(str(tmp_path / "in"), {"a.jpg": GOOD["a.jpg"], **BAD})
    process = job(UpscaleConfig(input=source.uri, output=str(tmp_path / "out"), model=model))
    stdout, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "upscaled 1 image (0.0 Mpx), skipped 0, failed 2 (see " in stdout.strip().splitlines()[-1]
