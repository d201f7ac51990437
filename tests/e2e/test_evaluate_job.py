"""jobs/evaluate.py as a person runs it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdsr import codecs
from kdsr.checkpoint import save_model
from kdsr.image import Image
from kdsr.models import build_model
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store

ROOT = Path(__file__).parents[2]
SPEC = EspcnSpec(scale=2, num_features=4)


def evaluate(*arguments):
    command = [sys.executable, "jobs/evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path):
    store = open_store(f"file://{tmp_path}/tiny")
    save_model(store, build_model(SPEC), Card(name="tiny", spec=SPEC, num_parameters=0, sha256=""))
    return tmp_path / "tiny"


@pytest.fixture
def benchmark(tmp_path):
    store = open_store(f"file://{tmp_path}/Blocks/x2")
    for seed in range(2):
        blocks = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
        pixels = blocks.repeat(6, axis=0).repeat(6, axis=1)
        store.put(f"HR/{seed}.png", codecs.encode(Image(pixels), format="png"))
    return tmp_path / "Blocks/x2"


def test_a_model_is_measured_beside_bicubic(model, benchmark, tmp_path):
    done = evaluate("--model", model, "--benchmark", benchmark, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [(row["model"], row["benchmark"], row["scale"]) for row in results["rows"]] == [
        ("bicubic", "Blocks", 2),
        ("tiny", "Blocks", 2),
    ]
    *table, empty, last = done.stdout.splitlines()
    assert table[0].startswith("| model") and not empty
    assert last.startswith("tiny ") and last.endswith(f"results in file://{tmp_path}/out/results.json")
    assert results["command"].startswith("python jobs/evaluate.py --model ")


def test_what_cannot_be_measured_is_one_sentence_and_exit_code_2(model, benchmark, tmp_path):
    done = evaluate("--model", model, "--benchmark", benchmark / "HR", "--output", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: no images in file://{benchmark}/HR/HR; ")
    assert len(done.stderr.splitlines()) == 1
