"""Cells of a comparison: how they are resolved, refused, trained, kept and written down."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kdsr import codecs
from kdsr.checkpoint import load_model, save_model
from kdsr.cli import parse
from kdsr.compare import (
    BenchmarkScores,
    ImageScore,
    Ledger,
    Row,
    benchmarks_of,
    check,
    measure_cost,
    pending,
    run_cell,
    run_store,
)
from kdsr.compare_report import Comparison, write_comparison
from kdsr.config import Cell, CompareConfig
from kdsr.errors import RequestError
from kdsr.image import Image
from kdsr.models import build_model
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store
from kdsr.training import Worker, train
from tests.pictures import photograph
from tests.small_shards import row, write_set

ROOT = Path(__file__).parents[2]
STUDENT = {"kind": "espcn", "scale": 2, "num_features": 4}
OUTPUT = {"terms": [{"kind": "pixel"}, {"kind": "output", "weight": 0.5}]}


def config_of(folder: Path, **fields: Any) -> CompareConfig:
    given: dict[str, Any] = {
        "output": f"{folder}/out",
        "benchmark": [f"{folder}/bench"],
        "data": {"shards": f"{folder}/shards", "patch_size": 8, "patches_per_row": 4, "window_rows": 4},
        "teacher": {"uri": f"{folder}/teacher", "force": True},
        "students": {"tiny": STUDENT},
        "methods": {"alone": {}, "output": OUTPUT},
        "seeds": [0, 1],
        "num_steps": 4,
        "batch_size": 2,
        "precision": "float32",
        "log_every_steps": 1,
        "save_every_steps": 2,
        "validate_every_steps": 2,
        "num_validation_images": 1,
        "cost_steps": 2,
    }
    return CompareConfig.model_validate({**given, **fields})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards, a benchmark of two images and a teacher."""
    torch.manual_seed(0)
    write_set(
        open_store(f"file://{tmp_path}/shards"),
        [[row(f"{seed}", photograph(seed, height=48, width=48), heldout=seed == 0) for seed in range(3)]],
    )
    bench = open_store(f"file://{tmp_path}/bench")
    for seed in (7, 8):
        bench.put(f"HR/{seed}.png", codecs.encode(Image(photograph(seed, height=32, width=32)), format="png"))
    spec = EspcnSpec(scale=2, num_features=8)
    card = Card(name="teacher", spec=spec, num_parameters=0, sha256="")
    save_model(open_store(f"file://{tmp_path}/teacher"), build_model(spec).eval(), card)
    return tmp_path


def run(config: CompareConfig, cell: Cell) -> list[int]:
    return list(run_cell(cell, benchmarks_of(config), Worker()))


# ---------------------------------------------------------------- resolution


def test_a_cell_is_the_comparison_with_what_its_method_says(tmp_path: Path) -> None:
    methods = {
        "alone": {},
        "slow": {**OUTPUT, "optimizer": {"learning_rate": 1e-4}, "data": {"augment": False}},
    }
    config = config_of(tmp_path, methods=methods)
    alone, slow = (config.cell("tiny", method, 1).config for method in ("alone", "slow"))
    assert (slow.optimizer.learning_rate, slow.data.augment, len(slow.terms)) == (1e-4, False, 2)
    assert slow.data.patch_size == alone.data.patch_size == 8
    common = {"optimizer", "data", "terms", "name"}
    assert slow.model_dump(exclude=common) == alone.model_dump(exclude=common)
    assert slow.output == f"{config.output}/runs" and slow.seed == 1 and slow.cluster.num_workers == 1


def test_one_seed_of_everything_comes_before_the_next(tmp_path: Path) -> None:
    config = config_of(tmp_path, students={"a": STUDENT, "b": STUDENT})
    names = [cell.name for cell in config.cells()]
    assert names[:4] == ["a-alone-0", "a-output-0", "b-alone-0", "b-output-0"]
    assert len(names) == len(set(names)) == 8 and all(name.endswith("-1") for name in names[4:])


def test_first_weights_may_differ_by_student(tmp_path: Path) -> None:
    methods = {"alone": {}, "warm": {"init_from": {"a": "x/model", "b": "photo-x2"}, "inherit": "slice"}}
    config = config_of(tmp_path, students={"a": STUDENT, "b": STUDENT}, methods=methods)
    found = [config.cell(student, "warm", 0).config.init_from for student in ("a", "b")]
    assert found[0] is not None and found[0].endswith("/x/model") and found[1] == "photo-x2"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"methods": {"a": {}}}, "reference alone is not one of a"),
        ({"only_method": ["fake"]}, "only_method fake is not one of alone, output"),
        ({"only_student": ["large"]}, "only_student large is not one of tiny"),
        ({"only_seed": [5]}, "only_seed 5 is not one of 0, 1"),
        ({"seeds": [1, 1]}, "one is given twice"),
        ({"methods": {"alone": {}, "b": {"optimizer": {"lr": 1}}}}, "tiny-b-0: optimizer.lr: Extra inputs"),
        ({"methods": {"alone": {}, "b": {"init_from": {"c": "x"}}}}, "init_from c is not one of tiny"),
        ({"methods": {"alone": {"init_from": {}}}}, "tiny-alone-0: init_from names"),
        ({"methods": {"alone": {"terms": [{"kind": "pixel", "weight": 0}]}}}, "no term has a weight"),
        ({"students": {"a-b": STUDENT}}, "students"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_by_name(
    tmp_path: Path, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of(tmp_path, **fields)
    assert sentence in str(caught.value)


def test_a_misspelt_field_of_a_method_is_answered_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    methods = {"alone": {}, "output": {"terms": [{"kind": "output", "finalweight": 0}]}}
    students = {"edsr": {"kind": "espcn", "scale": 2, "num_feature": 8}}
    content = {"output": "o", "benchmark": ["b"], "data": {"shards": "s"}, "teacher": {"uri": "t"}}
    path.write_text(json.dumps({**content, "students": students, "methods": methods}))
    with pytest.raises(RequestError) as caught:
        parse(CompareConfig, ["--config", str(path)])
    assert "students.edsr.num_feature: no such field; did you mean num_features?" in str(caught.value)
    assert "methods.output.terms.0.finalweight: no such field; did you mean final_weight?" in str(
        caught.value
    )


def test_what_cannot_work_is_refused_before_anything_runs_and_names_its_cells(folder: Path) -> None:
    taps = [{"student": "nowhere", "teacher": "body.1"}]
    methods = {"alone": {}, "felt": {"terms": [{"kind": "pixel"}, {"kind": "attention", "taps": taps}]}}
    config = config_of(folder, methods=methods)
    with pytest.raises(RequestError, match=r"^tiny-felt-0: the student .* has no tap 'nowhere'"):
        check(config, pending(config))
    other = config_of(folder, students={"tiny": STUDENT, "x3": {**STUDENT, "scale": 3}})
    with pytest.raises(RequestError, match="x3-output-0: teacher teacher: the student has scale 3"):
        check(other, pending(other))


# ---------------------------------------------------------------- a cell and its row


def test_a_cell_is_trained_as_alone_measured_and_kept_in_one_row(folder: Path) -> None:
    config = config_of(folder, only_seed=[0], only_method=["output"])
    (cell,) = pending(config)
    assert run(config, cell) == [1, 2, 3, 4]
    found = Ledger(config).row(cell)
    assert found is not None and not found.cause and list(found.benchmarks["bench"].images) == ["7", "8"]
    assert list(run_store(cell).list("checkpoints/")) == []
    by_itself = cell.config.model_copy(update={"output": f"file://{folder}/elsewhere"})
    list(train(by_itself))
    ours, theirs = (
        load_model(f"{place}/{cell.name}/model").model for place in (cell.config.output, by_itself.output)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert pending(config) == [] and run(config, cell) == []


def test_a_cell_that_was_stopped_goes_on_from_its_checkpoint(folder: Path) -> None:
    config = config_of(folder)
    cell = config.cells()[0]
    for step in run_cell(cell, benchmarks_of(config), Worker()):
        if step == 3:
            break
    assert Ledger(config).row(cell) is None and cell in pending(config)
    assert run(config, cell) == [3, 4]


def test_another_benchmark_is_measured_without_training_again(folder: Path) -> None:
    config = config_of(folder)
    cell = config.cells()[0]
    run(config, cell)
    more = config_of(folder, benchmark=[f"{folder}/bench", f"{folder}/more"])
    open_store(f"file://{folder}/more").put("HR/7.png", (folder / "bench/HR/7.png").read_bytes())
    assert cell.name in [each.name for each in pending(more)]
    assert run(more, cell) == []
    found = Ledger(more).row(cell)
    assert found is not None and set(found.benchmarks) == {"bench", "more"}


def test_a_cell_that_fails_is_a_row_with_its_cause_and_is_not_tried_again(folder: Path) -> None:
    wild = {
        "terms": [{"kind": "pixel", "loss": "mse"}],
        "optimizer": {"learning_rate": 1e25, "warmup_steps": 0},
    }
    config = config_of(folder, methods={"alone": {}, "wild": wild}, only_method=["wild"], seeds=[0])
    (cell,) = pending(config)
    run(config, cell)
    found = Ledger(config).row(cell)
    assert found is not None and found.cause.startswith("NonFiniteLoss: step")
    assert pending(config) == []
    assert pending(config.model_copy(update={"retry_failed": True})) == [cell]
    assert Comparison(config).failed == {"tiny-wild-0": found.cause}


def test_a_row_of_other_settings_is_refused_by_name(folder: Path) -> None:
    config = config_of(folder)
    run(config, config.cells()[0])
    other = config_of(folder, batch_size=3)
    with pytest.raises(RequestError, match=r"cell tiny-alone-0 .* \(batch_size: was 2, now 3\)"):
        pending(other)


def test_cells_of_other_shards_or_of_another_teacher_do_not_stand_in_one_table(folder: Path) -> None:
    """Those that are done too."""
    config = config_of(folder, seeds=[0])
    alone, output = pending(config)
    run(config, alone)
    check(config, pending(config))
    next(run_cell(output, benchmarks_of(config), Worker()))
    spec = EspcnSpec(scale=2, num_features=8)
    card = Card(name="teacher", spec=spec, num_parameters=0, sha256="")
    save_model(open_store(f"file://{folder}/teacher"), build_model(spec).eval(), card)
    with pytest.raises(RequestError, match=r"tiny-output-0: run tiny-output-0 .* with another teacher at"):
        check(config, pending(config))
    run_store(output).delete("begun.json")
    check(config, pending(config))
    rows = [row(f"{seed}", photograph(seed + 9, height=48, width=48), heldout=seed == 0) for seed in range(3)]
    write_set(open_store(f"file://{folder}/shards"), [rows])
    assert pending(config) == [output]
    with pytest.raises(RequestError, match=r"^run tiny-alone-0 in .* was begun on other shards at"):
        check(config, pending(config))
    check(config, [])


def test_the_cost_of_a_step_is_measured_once_and_leaves_no_run(folder: Path) -> None:
    config = config_of(folder)
    ledger, cell = Ledger(config), config.cells()[1]
    assert ledger.cost(cell) is None
    ledger.put_cost(cell, measure_cost(cell, num_steps=2, worker=Worker()))
    cost = ledger.cost(cell)
    assert cost is not None and cost.num_steps == 2 and cost.seconds_per_step > 0 and cost.peak_bytes >= 0
    assert ledger.cost(config.cell("tiny", "output", 1)) == cost
    assert ledger.cost(cell, num_threads=cost.num_threads + 1) is None
    assert ledger.cost(config_of(folder, batch_size=4).cells()[1]) is None
    assert not (folder / "out/runs").exists()


# ---------------------------------------------------------------- what is written


def made_up(config: CompareConfig, cell: Cell, psnr: tuple[float, float]) -> None:
    """A row, a curve and a model, as if the cell had been trained."""
    model = build_model(cell.config.student).eval()
    card = Card(name=cell.name, spec=cell.config.student, num_parameters=0, sha256="")
    store = run_store(cell)
    save_model(store.child("model"), model, card)
    curve = [{"step": step, "heldout_psnr_y": psnr[0] + step, "weight/pixel_l1": 1.0} for step in (2, 4)]
    store.put("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in curve).encode())
    images = {name: ImageScore(psnr_y=value, ssim_y=0.5) for name, value in zip("78", psnr, strict=True)}
    names = {"student": cell.student, "method": cell.method, "seed": cell.seed, "scale": 2}
    own = {"num_parameters": 9, "num_threads": 1, "device": "cpu", "machine": "here"}
    scores = {"bench": BenchmarkScores(uri=config.benchmark[0], images=images)}
    made = Row(**names, **own, benchmarks=scores, config=cell.config.model_dump(mode="json"))
    store.put("row.json", made.model_dump_json().encode())


def test_a_partial_matrix_is_written_with_what_is_missing(folder: Path) -> None:
    config = config_of(
        folder,
        students={"tiny": STUDENT, "other": STUDENT},
        methods={"alone": {}, "output": {**OUTPUT, "balance": {"kind": "gradient"}}},
    )
    for method, psnr in (("alone", (30.0, 32.0)), ("output", (31.0, 32.5))):
        made_up(config, config.cell("tiny", method, 0), psnr)
    report = write_comparison(config)
    results = json.loads((folder / "out/results.json").read_text())
    assert [(each["method"], each["psnr_y"]) for each in results["rows"]] == [
        ("alone", 31.0),
        ("output", 31.75),
    ]
    output = results["summary"][-1]
    assert (output["benchmark"], output["seeds"], output["spread"]) == ("mean", 1, None)
    assert output["gain"]["mean"] == pytest.approx(0.75) and 0.5 <= output["gain"]["low"] <= 0.75
    assert output["steps_to_reference"] == 4 and output["seconds_per_step"] is None
    assert len(results["missing"]) == 6 and results["failed"] == {}
    lines = report.table.splitlines()
    assert len(lines) == 2 + 4 and "missing" in lines[-1] and "1 of 2" in lines[2]
    assert report.sentence.startswith(
        "best method: output, +0.750 dB over alone in the mean of 1 student; 6 miss"
    )
    for name in ("curves.png", "gains.png", "weights.png", "comparison.png"):
        assert codecs.decode((folder / "out" / name).read_bytes(), max_pixels=10**7).width > 100
    assert len((folder / "out/per_image.csv").read_text().splitlines()) == 1 + 4
    assert str(folder) not in json.dumps(results["budget"])
    section = runpy.run_path(str(ROOT / "bench/render_results.py"))["section"]
    page = section(folder / "out/results.json")
    assert "| tiny | " in page and "+0.750 (" in page and page.count("| tiny | ") == 2


def test_nothing_at_all_can_be_written_down(folder: Path) -> None:
    report = write_comparison(config_of(folder))
    assert report.sentence.startswith("nothing to compare with alone yet; 4 missing of 4 cells")
    assert report.table.count("missing") == 2
