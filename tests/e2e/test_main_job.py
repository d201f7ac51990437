"""The main job as a person runs it: whole commands, on S3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from kdsr.store import Store, open_store
from tests.pictures import write_photographs

ROOT = Path(__file__).parents[2]
TRAINING = """\
data: {patch_size: 12, patches_per_row: 4, window_rows: 8}
terms: [{kind: pixel}]
num_steps: 40
batch_size: 4
log_every_steps: 10
save_every_steps: 10
validate_every_steps: 20
"""


@pytest.fixture(autouse=True)
def own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def place(s3_uri: str, tmp_path: Path) -> Store:
    """An S3 prefix with photographs and a benchmark below it."""
    store = open_store(s3_uri)
    for path in write_photographs(tmp_path / "photos", 6):
        store.put_file(f"photos/{path.name}", path)
        if path.stem in {"photo-1", "photo-2"}:
            store.put_file(f"bench/HR/{path.name}", path)
    store.put("photos/broken.jpg", b"\xff\xd8\xff\xe0 no picture")
    return store


def run(job: str, *flags: str, expected: int = 0) -> str:
    """The last line that the job printed."""
    command = [sys.executable, f"jobs/{job}.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == expected, done.stderr[-3000:]
    return (done.stdout or done.stderr).strip().splitlines()[-1]


@pytest.mark.timeout(2400)  # Six starts of jobs, each with a Ray of its own.
def test_shard_train_label_distil_evaluate_and_upscale_on_s3(place: Store, tmp_path: Path) -> None:
    uri = place.uri
    config = tmp_path / "training.yaml"
    config.write_text(TRAINING)
    said = run("shard", "--input", f"{uri}/photos", "--output", f"{uri}/shards", "--heldout_fraction", "0.3")
    assert "sharded 6 images" in said and "1 rejected" in said

    base = ["--config", str(config), "--output", f"{uri}/runs"]
    edsr = ["--model.kind", "edsr", "--model.scale", "2", "--model.num_features", "8"]
    edsr += ["--model.num_blocks", "1"]
    run("train_teacher", *base, "--name", "teacher", "--data.shards", f"{uri}/shards", *edsr)
    teacher = f"{uri}/runs/teacher/model"
    asked = ["--teacher.uri", teacher, "--teacher.force"]
    run("label", "--shards", f"{uri}/shards", *asked, "--output", f"{uri}/labelled")
    student = ["--student.kind", "rep_chain", "--student.scale", "2", "--student.num_features", "8"]
    flags = [*base, "--name", "student", "--data.shards", f"{uri}/labelled", "--teacher.uri", teacher]
    config.write_text(TRAINING.replace("{kind: pixel}", "{kind: pixel}, {kind: output}"))
    assert "student" in run("distill", *flags, *student)
    model = f"{uri}/runs/student/model"
    card = json.loads(place.get("runs/student/model/card.json"))
    assert card["teacher"]["name"] == "teacher" and card["spec"]["folded"]

    models = ["--model", model, "--model", teacher]
    run("evaluate", *models, "--benchmark", f"{uri}/bench", "--output", f"{uri}/report")
    rows = json.loads(place.get("report/results.json"))["rows"]
    assert [row["model"] for row in rows] == ["bicubic", "student", "teacher"]

    said = run("upscale", "--input", f"{uri}/photos", "--output", f"{uri}/big", "--model", model, expected=1)
    assert "upscaled 6 images" in said and "failed 1" in said
    (tmp_path / "big.png").write_bytes(place.get("big/photo-0.png"))
    assert Image.open(tmp_path / "big.png").size == (288, 256)


def test_refusals_name_what_is_wrong_before_ray_starts(tmp_path: Path) -> None:
    flags = ["--name", "x", "--output", f"{tmp_path}/runs", "--data.shards", f"{tmp_path}/nothing"]
    student = ["--student.kind", "espcn", "--student.scale", "2", "--teacher.uri", "edsr-small-x4"]
    assert "is empty" in run("distill", *flags, *student, expected=2)
    assert "did you mean --num_steps?" in run("distill", *flags, *student, "--num_stepz", "3", expected=2)
    places = ["--input", f"{tmp_path}", "--output", f"{tmp_path}/out"]
    assert "no bundled model 'nothing-x4'" in run("upscale", *places, "--model", "nothing-x4", expected=2)
    assert not (tmp_path / "runs").exists()
