"""Numbers reach table, JSON, CSV and picture unchanged, and readable."""

import csv
import io
import json
import math

import numpy as np
import pytest

from kdsr.benchmark import Benchmark
from kdsr.codecs import decode_png
from kdsr.evaluate import BICUBIC, Contestant, Cost, Crop, Interval, Panel, Result, Round, RoundResult, Score
from kdsr.report import CELL, comparison, markdown_table, per_image_csv, rows, summary, write_report
from kdsr.store import open_store


def contestant(name, *, num_parameters=0):
    return Contestant(name, lambda image: image, Cost(num_parameters, 1.5, 12.25))


def crop(labels, *, size=64):
    pixels = [np.full((size, size, 3), 20 * index, np.uint8) for index in range(len(labels) + 1)]
    panels = [Panel(label, pixels[index], 20.0 + index) for index, label in enumerate(labels)]
    return Crop("butterfly", 8, 12, 1.0, (*panels, Panel("HR", pixels[-1], None)))


@pytest.fixture
def measured(tmp_path):
    """Bicubic, a first and a second model on two images; the second reproduces one image exactly."""
    store = open_store(f"file://{tmp_path}/Set5")
    benchmark = Benchmark("Set5", store, {"a": "HR/a.png", "b": "HR/b.png"}, {}, None)
    scores = {
        BICUBIC: [Score("a", 28.0, 0.80), Score("b", 30.0, 0.82)],
        "first": [Score("a", 31.0, 0.90), Score("b", 32.0, 0.91)],
        "second": [Score("a", 31.5, 0.92), Score("b", math.inf, 1.0)],
    }
    results = [
        Result(contestant(BICUBIC), scores[BICUBIC], Interval(-2.5, -3.0, -2.0)),
        Result(contestant("first", num_parameters=154_321), scores["first"], None),
        Result(contestant("second"), scores["second"], None),
    ]
    return RoundResult(Round(benchmark, 4, ("first", "second")), results, [crop(list(scores))])


def test_rows_are_what_was_measured(measured):
    bicubic, first, second = rows([measured])
    assert first == {
        "model": "first",
        "scale": 4,
        "benchmark": "Set5",
        "num_images": 2,
        "psnr_y": 31.5,
        "ssim_y": pytest.approx(0.905),
        "num_parameters": 154_321,
        "gmacs_720p": 1.5,
        "megapixels_per_second": 12.25,
        "psnr_y_vs_first": None,
    }
    assert bicubic["psnr_y_vs_first"] == {"mean": -2.5, "low": -3.0, "high": -2.0}
    assert second["psnr_y"] is None


def test_the_table_reads_as_plain_text_and_as_markdown(measured):
    lines = markdown_table([measured]).splitlines()
    assert len(lines) == 2 + 3
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2][:7] == ["bicubic", "x4", "Set5", "2", "29.00", "0.8100", "-2.50 (-3.00 to -2.00)"]
    assert cells[3][4:8] == ["31.50", "0.9050", "-", "154,321"]
    assert cells[4][4] == "exact"


def test_a_name_cannot_break_the_table(measured):
    measured.results[1] = Result(contestant("a|b"), measured.results[1].scores, None)
    assert "| a\\|b " in markdown_table([measured])


def test_the_csv_holds_every_image_of_every_model_and_its_interval(measured):
    lines = list(csv.DictReader(io.StringIO(per_image_csv([measured]))))
    assert [(line["model"], line["image"]) for line in lines] == [
        (model, image) for model in (BICUBIC, "first", "second") for image in ("a", "b")
    ]
    assert float(lines[0]["psnr_y_vs_first"]) == -3.0
    assert [lines[1][f"mean_vs_first{part}"] for part in ("", "_low", "_high")] == [
        "-2.5000",
        "-3.0000",
        "-2.0000",
    ]
    assert float(lines[5]["psnr_y"]) == math.inf


def test_the_summary_names_the_first_model_and_bicubic(measured):
    assert summary([measured]) == "first 31.50 dB / 0.9050 on Set5 (bicubic 29.00) and 1 more row"
    measured.results.pop()
    assert summary([measured]) == "first 31.50 dB / 0.9050 on Set5 (bicubic 29.00)"


def test_the_picture_has_a_cell_for_every_version_with_its_own_pixels(measured):
    picture = np.asarray(comparison([measured]))
    grey = (picture == picture[:, :, :1]).all(axis=2)
    for index in range(4):
        assert (grey & (picture[:, :, 0] == 20 * index)).sum() >= 0.99 * CELL**2


def test_small_crops_many_models_and_long_names_fit(measured):
    names = [f"{'a very long name of a model ' * 3}{index}" for index in range(9)]
    wide = RoundResult(measured.round, measured.results, [crop(names, size=24), crop([BICUBIC])])
    assert comparison([wide]).width > 10 * CELL


def test_everything_is_written_and_the_json_has_no_infinity(measured, tmp_path):
    out = open_store(f"file://{tmp_path}/out")
    report = write_report([measured], out)
    assert sorted(info.key for info in out.list()) == [
        "comparison.png",
        "per_image.csv",
        "results.json",
        "table.md",
    ]

    def refuse(token):
        raise AssertionError(token)

    results = json.loads(out.get("results.json"), parse_constant=refuse)
    assert [row["model"] for row in results["rows"]] == [BICUBIC, "first", "second"]
    assert {"machine", "command", "commit", "date"} < set(results)
    assert out.get("table.md").decode().startswith(report.table)
    assert report.sentence.endswith(f": results in {out.uri}/results.json")
    assert decode_png(out.get("comparison.png")).ndim == 3
