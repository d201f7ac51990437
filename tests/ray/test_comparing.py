"""A whole comparison over Ray: complete rows, killed workers, a second start, cells as runs of their own."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import cluster.compare
from cluster.compare import compare
from cluster.train import run as train_alone
from kdsr import codecs
from kdsr.checkpoint import load_model, save_model
from kdsr.compare import Ledger, pending
from kdsr.compare_report import write_comparison
from kdsr.config import CompareConfig
from kdsr.image import Image
from kdsr.models import build_model
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store
from tests.pictures import photograph
from tests.small_shards import row, write_set

train_cell = cluster.compare._train_cell
# Workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def dying_once(arguments: dict[str, Any]) -> Iterator[int]:
    """The work of a cell; the process of one of them is killed at its fourth step, the first time."""
    cell = arguments["cell"]
    died = Path(f"{cell.config.output.removeprefix('file://')}/died-{cell.name}")
    for step in train_cell(arguments):
        if step == 4 and cell.name == "tiny-alone-0" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield step


def broken(arguments: dict[str, Any]) -> Iterator[int]:
    """An error that nobody foresaw, in one of the cells."""
    if arguments["cell"].method == "output":
        raise ZeroDivisionError("nobody foresaw this")
    yield from train_cell(arguments)


@pytest.fixture
def config(ray_local: None, tmp_path: Path) -> CompareConfig:
    torch.manual_seed(0)
    rows = [row(f"{seed}", photograph(seed, height=48, width=48), heldout=seed == 0) for seed in range(3)]
    write_set(open_store(f"file://{tmp_path}/shards"), [rows])
    picture = codecs.encode(Image(photograph(7, height=32, width=32)), format="png")
    open_store(f"file://{tmp_path}/bench").put("HR/7.png", picture)
    spec = EspcnSpec(scale=2, num_features=8)
    card = Card(name="teacher", spec=spec, num_parameters=0, sha256="")
    save_model(open_store(f"file://{tmp_path}/teacher"), build_model(spec).eval(), card)
    content = {
        "output": f"{tmp_path}/out",
        "benchmark": [f"{tmp_path}/bench"],
        "data": {"shards": f"{tmp_path}/shards", "patch_size": 8, "patches_per_row": 4, "window_rows": 4},
        "teacher": {"uri": f"{tmp_path}/teacher", "force": True},
        "students": {"tiny": {"kind": "espcn", "scale": 2, "num_features": 4}},
        "methods": {"alone": {}, "output": {"terms": [{"kind": "pixel"}, {"kind": "output"}]}},
        "seeds": [0, 1],
        "num_steps": 6,
        "batch_size": 2,
        "precision": "float32",
        "log_every_steps": 1,
        "save_every_steps": 2,
        "validate_every_steps": 3,
        "num_validation_images": 1,
        "cost_steps": 2,
        "cluster": {"num_workers": 2, "cpus_per_worker": 1, "max_failures": 1},
    }
    return CompareConfig.model_validate(content)


@pytest.mark.long
@pytest.mark.timeout(900)  # It starts eight processes, one for each cell and cost.
def test_a_comparison_with_a_killed_worker_is_complete_and_its_cells_are_runs_of_their_own(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.compare, "_train_cell", dying_once)
    assert compare(config) == {}
    assert len(list((tmp_path / "out/runs").glob("died-*"))) == 1
    report = write_comparison(config)
    assert report.sentence.startswith("best method: output, ") and " missing" not in report.sentence
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [(each["method"], each["seed"]) for each in results["rows"]] == [
        (method, seed) for seed in (0, 1) for method in ("alone", "output")
    ]
    assert all(each["seconds_per_step"] > 0 for each in results["rows"])
    logged = Ledger(config).curve(config.cells()[0])
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]

    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if "runs" in path.parts
    }
    assert pending(config) == [] and compare(config) == {}
    assert before == {path: path.stat().st_mtime_ns for path in before}

    cell = config.cell("tiny", "output", 1)
    train_alone(cell.config.model_copy(update={"output": f"file://{tmp_path}/alone"}))
    ours, theirs = (
        load_model(f"{place}/{cell.name}/model").model
        for place in (cell.config.output, f"file://{tmp_path}/alone")
    )
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_an_error_that_nobody_foresaw_stops_its_cell_alone_and_is_tried_again(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"only_seed": (0,), "measure_cost": False})
    monkeypatch.setattr(cluster.compare, "_train_cell", broken)
    assert compare(config) == {"tiny-output-0": "ZeroDivisionError: nobody foresaw this"}
    assert [cell.name for cell in pending(config)] == ["tiny-output-0"]
