"""Everything that is written of a comparison: table, JSON, per-image CSV, plots and a picture.

Works on whatever rows there are; what is missing is named. Trains and measures nothing.
"""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kdsr import codecs, plots, provenance
from kdsr.benchmark import open_benchmark
from kdsr.compare import Ledger, Row, StepCost, benchmarks_of, model_of
from kdsr.compare_summary import MEAN, Summary, mean_curve, steps_to_reach, summarise
from kdsr.config import Cell, CompareConfig
from kdsr.evaluate import BICUBIC, Crop, Round, RoundResult, most_different_crop, upscaling
from kdsr.models import build_model
from kdsr.plots import Line
from kdsr.report import Report, aligned, comparison, decibels, span
from kdsr.spec import BicubicSpec
from kdsr.store import open_store
from kdsr.terms import FixedBalance
from kdsr.training import HELD_OUT

CSV_COLUMNS = ("student", "method", "seed", "benchmark", "image", "psnr_y", "ssim_y")
COMPARED_IMAGES = 20
"""Of the first benchmark; the crops of the picture are chosen from them."""
NOTE = (
    "PSNR-Y in dB: mean over seeds of the mean over images; after ± the standard deviation over seeds. gain: "
    "over {reference}, with a 95 % bootstrap interval over seeds and images, drawn in pairs. steps: when "
    "the best held-out PSNR of {reference} was reached. s/step: computing alone, one method after the other "
    "and no other cell beside it, on {machine}; CPU s: of all threads. memory: peak while training."
)


@dataclass(frozen=True)
class Comparison:
    """What is known of a comparison when it is written down."""

    config: CompareConfig

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All that were asked for."""
        return self.config.cells()

    @cached_property
    def ledger(self) -> Ledger:
        """Where rows come from."""
        return Ledger(self.config)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """By the name of the cell; those that are there."""
        found = {cell.name: self.ledger.row(cell) for cell in self.cells}
        return {name: row for name, row in found.items() if row is not None}

    @cached_property
    def failed(self) -> dict[str, str]:
        """Name of a cell to the cause."""
        return {name: row.cause for name, row in self.rows.items() if row.cause}

    @cached_property
    def done(self) -> tuple[Cell, ...]:
        """Cells that were measured on every benchmark."""
        covered = benchmarks_of(self.config)
        return tuple(
            cell
            for cell in self.cells
            if (row := self.rows.get(cell.name)) and not row.cause and row.covers(covered)
        )

    @cached_property
    def missing(self) -> list[str]:
        """Cells that were neither measured nor failed."""
        done = {cell.name for cell in self.done}
        return [cell.name for cell in self.cells if cell.name not in done | self.failed.keys()]

    @cached_property
    def summaries(self) -> list[Summary]:
        """Of what is done."""
        return summarise(
            [self.rows[cell.name] for cell in self.done],
            reference=self.config.reference,
            benchmarks=list(benchmarks_of(self.config)),
        )

    def of(self, student: str, method: str) -> list[Cell]:
        """The cells that are done of a student and a method, one for each seed."""
        return [cell for cell in self.done if (cell.student, cell.method) == (student, method)]

    def cost(self, student: str, method: str) -> StepCost | None:
        """What a step costs, where it was measured."""
        return self.ledger.cost(self.config.cell(student, method, self.config.seeds[0]))

    def heldout(self, student: str, method: str) -> tuple[plots.Numbers, plots.Numbers]:
        """Held-out PSNR over steps, of every seed."""
        return mean_curve([self.ledger.curve(cell) for cell in self.of(student, method)], HELD_OUT)

    def steps_to_reference(self, student: str, method: str) -> int | None:
        """When the mean of the seeds reached what the reference reached at its best."""
        values = self.heldout(student, self.config.reference)[1]
        if not values.size:
            return None
        return steps_to_reach(self.heldout(student, method), float(values.mean(axis=0).max()))


def write_comparison(config: CompareConfig) -> Report:
    """Write everything below `config.output`, results.json last."""
    found, store = Comparison(config), open_store(config.output, config.store)
    table = markdown_table(found)
    machine = ", ".join(_over_costs(found, "machine")) or "a machine not yet measured"
    store.put("table.md", f"{table}\n\n{NOTE.format(reference=config.reference, machine=machine)}\n".encode())
    store.put("per_image.csv", per_image_csv(found).encode())
    for name, png in pictures(found).items():
        store.put(name, png)
    store.put("results.json", (json.dumps(results(found), indent=2, allow_nan=False) + "\n").encode())
    return Report(table, f"{sentence(found)}: results in {store.uri}/results.json")


# ---------------------------------------------------------------- numbers


def results(found: Comparison) -> dict[str, Any]:
    """What results.json holds."""
    rows = [row for cell in found.done for row in _rows(found, cell)]
    return {
        "title": "Ways of distilling",
        "budget": _budget(found),
        "summary": [_summary_row(found, summary) for summary in found.summaries],
        "rows": rows,
        "missing": found.missing,
        "failed": found.failed,
        **provenance.stamp(),
    }


def _rows(found: Comparison, cell: Cell) -> list[dict[str, Any]]:
    """One flat row for each benchmark of a cell."""
    row, cost = found.rows[cell.name], found.cost(cell.student, cell.method)
    fixed = {"student": cell.student, "num_parameters": row.num_parameters, "method": cell.method}
    return [
        {
            **fixed,
            "scale": row.scale,
            "seed": cell.seed,
            "benchmark": name,
            "psnr_y": _finite(statistics.fmean(each.decibels for each in scores.images.values())),
            "ssim_y": statistics.fmean(each.ssim_y for each in scores.images.values()),
            "seconds_per_step": cost.seconds_per_step if cost else None,
        }
        for name, scores in row.benchmarks.items()
    ]


def _summary_row(found: Comparison, summary: Summary) -> dict[str, Any]:
    cost = found.cost(summary.student, summary.method)
    row = found.rows[found.of(summary.student, summary.method)[0].name]
    return {
        "student": summary.student,
        "num_parameters": row.num_parameters,
        "method": summary.method,
        "scale": row.scale,
        "benchmark": summary.benchmark,
        "seeds": summary.num_seeds,
        "psnr_y": _finite(summary.psnr_y),
        "ssim_y": summary.ssim_y,
        "spread": _finite(summary.spread),
        "gain": asdict(summary.gain) if summary.gain else None,
        "steps_to_reference": found.steps_to_reference(summary.student, summary.method),
        **_cost_fields(cost),
    }


def _cost_fields(cost: StepCost | None) -> dict[str, float | None]:
    names = ("seconds_per_step", "median_seconds_per_step", "cpu_seconds_per_step")
    fields = {name: getattr(cost, name) if cost else None for name in names}
    return fields | {"peak_mb": cost.peak_bytes / 1e6 if cost else None}


def _budget(found: Comparison) -> dict[str, Any]:
    """What all runs had in common; places are told by their last part alone."""
    config = found.config
    return {
        "num_steps": config.num_steps,
        "batch_size": config.batch_size,
        "patch_size": config.data.patch_size,
        "data": list(config.datasets) or [_last_part(config.data.shards)],
        "degradation": config.data.degradation.kind,
        "teacher": [_last_part(each.uri) for each in (config.teacher, *config.co_teachers)],
        "optimizer": config.optimizer.model_dump(mode="json"),
        "precision": config.precision,
        "seeds": list(config.seeds),
        "reference": config.reference,
        "training": _conditions(list(found.rows.values())),
        "cost": {
            "measured": "one method after the other, no other cell beside it"
            if _costs(found)
            else "not measured",
            "num_steps": _over_costs(found, "num_steps"),
            **_conditions(_costs(found)),
        },
    }


def _conditions(measured: Sequence[Row | StepCost]) -> dict[str, Any]:
    names = ("num_threads", "device", "machine")
    return {name: sorted({getattr(each, name) for each in measured}) for name in names}


def _costs(found: Comparison) -> list[StepCost]:
    pairs = dict.fromkeys((cell.student, cell.method) for cell in found.done)
    return [cost for pair in pairs if (cost := found.cost(*pair))]


def _over_costs(found: Comparison, name: str) -> list[Any]:
    return sorted({getattr(cost, name) for cost in _costs(found)})


def _last_part(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2]


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


# ---------------------------------------------------------------- text


def markdown_table(found: Comparison) -> str:
    """A line for each student and method; a dash stands for what is missing."""
    names = list(benchmarks_of(found.config))
    names = [*names, MEAN] if len(names) > 1 else names
    header = ["student", "method", "seeds", *names, f"gain over {found.config.reference} (95 %)"]
    header += ["SSIM-Y", "steps", "s/step", "CPU s", "memory"]
    lines = [
        _cells(found, student, method, names)
        for student in found.config.students
        for method in found.config.methods
    ]
    return aligned([header, *lines], left=(0, 1))


def _cells(found: Comparison, student: str, method: str, names: Sequence[str]) -> list[str]:
    own = {
        each.benchmark: each for each in found.summaries if (each.student, each.method) == (student, method)
    }
    whole, cost = own.get(MEAN), found.cost(student, method)
    reached = found.steps_to_reference(student, method) if whole else None
    return [
        student,
        method,
        f"{len(found.of(student, method))} of {len(found.config.seeds)}",
        *(_with_spread(own.get(name)) for name in names),
        span(whole.gain, digits=3) if whole and whole.gain else "-",
        f"{whole.ssim_y:.4f}" if whole else "-",
        f"{reached:,}" if reached else "-",
        f"{cost.seconds_per_step:.3f}" if cost else "-",
        f"{cost.cpu_seconds_per_step:.3f}" if cost and cost.cpu_seconds_per_step is not None else "-",
        f"{cost.peak_bytes / 1e6:,.0f} MB" if cost else "-",
    ]


def _with_spread(summary: Summary | None) -> str:
    if summary is None:
        return "missing"
    return decibels(summary.psnr_y) + (f" ± {summary.spread:.3f}" if summary.spread is not None else "")


def sentence(found: Comparison) -> str:
    """The method that gained most in the mean over the students, and what is missing."""
    left = [f"{len(found.missing)} missing"] if found.missing else []
    left += [f"{len(found.failed)} failed"] if found.failed else []
    rest = f"; {' and '.join(left)} of {len(found.cells)} cells" if left else ""
    gains: dict[str, list[float]] = {}
    for each in found.summaries:
        if each.benchmark == MEAN and each.gain:
            gains.setdefault(each.method, []).append(each.gain.mean)
    if not gains:
        return f"nothing to compare with {found.config.reference} yet{rest}"
    whole = {
        method: values for method, values in gains.items() if len(values) == max(map(len, gains.values()))
    }
    best = max(whole, key=lambda method: statistics.fmean(whole[method]))
    count = len(whole[best])
    over = f"over {found.config.reference} in the mean of {count} student{'s' if count > 1 else ''}"
    return f"best method: {best}, {statistics.fmean(whole[best]):+.3f} dB {over}{rest}"


def per_image_csv(found: Comparison) -> str:
    """A line for each image of each cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for cell in found.done:
        for name, scores in found.rows[cell.name].benchmarks.items():
            for image, score in scores.images.items():
                place = [cell.student, cell.method, cell.seed, name, image]
                writer.writerow([*place, f"{score.decibels:.4f}", f"{score.ssim_y:.6f}"])
    return file.getvalue()


# ---------------------------------------------------------------- pictures


def pictures(found: Comparison) -> dict[str, bytes]:
    """PNGs by file name: those that there is something to draw for."""
    drawn: dict[str, bytes] = {}
    students = [student for student in found.config.students if any(c.student == student for c in found.done)]
    if not students:
        return drawn
    if panels := {name: lines for name in students if (lines := _heldout_lines(found, name))}:
        drawn["curves.png"] = plots.curves(panels, quantity="held-out PSNR-Y (dB)")
    if gains := {name: rows for name in students if (rows := _gains(found, name))}:
        quantity = f"gain over {found.config.reference} (dB)"
        drawn["gains.png"] = plots.gains(gains, quantity=quantity)
    if weights := _weight_panels(found):
        drawn["weights.png"] = plots.curves(weights, quantity="weight that was used", scale="log")
    drawn["comparison.png"] = codecs.encode_png(np.asarray(comparison(_rounds(found, students))))
    return drawn


def _heldout_lines(found: Comparison, student: str) -> list[Line]:
    curves = [(method, *found.heldout(student, method)) for method in found.config.methods]
    return [Line(method, steps, values) for method, steps, values in curves if steps.size]


def _gains(found: Comparison, student: str) -> dict[str, Any]:
    return {
        each.method: each.gain
        for each in found.summaries
        if each.student == student and each.benchmark == MEAN and each.gain
    }


def _weight_panels(found: Comparison) -> dict[str, list[Line]]:
    """For each method whose weights are found as it runs: those of the first student that is there."""
    panels: dict[str, list[Line]] = {}
    for method, own in found.config.methods.items():
        cells = [cell for cell in found.done if cell.method == method]
        if not cells or isinstance(own.balance, FixedBalance):
            continue
        same = [found.ledger.curve(cell) for cell in cells if cell.student == cells[0].student]
        names = sorted(
            {name for curve in same for row in curve for name in row if name.startswith("weight/")}
        )
        lines = [Line(name.removeprefix("weight/"), *mean_curve(same, name)) for name in names]
        panels[f"{method}, {cells[0].student}"] = [line for line in lines if line.steps.size]
    return panels


def _rounds(found: Comparison, students: Sequence[str]) -> list[RoundResult]:
    """Crops of the first benchmark, where the models of the first seed that is done differ most."""
    name, uri = next(iter(benchmarks_of(found.config).items()))
    benchmark = open_benchmark(uri, name, found.config.store)
    rounds = []
    for student in students:
        firsts = [cells[0] for method in found.config.methods if (cells := found.of(student, method))]
        scale = firsts[0].config.student.scale
        crops = _crops(firsts, list(zip(range(COMPARED_IMAGES), benchmark.pairs(scale), strict=False)))
        rounds.append(RoundResult(Round(benchmark, scale, tuple(c.method for c in firsts)), [], crops))
    return rounds


def _crops(cells: Sequence[Cell], pairs: Sequence[tuple[int, Any]]) -> list[Crop]:
    scale = cells[0].config.student.scale
    upscales = {BICUBIC: upscaling(build_model(BicubicSpec(scale=scale)), device="cpu")}
    upscales |= {f"{cell.student} {cell.method}": model_of(cell) for cell in cells}
    crops = [
        most_different_crop(
            {name: upscale(pair.lr).rgb8().pixels for name, upscale in upscales.items()}, pair, border=scale
        )
        for _, pair in pairs
    ]
    return sorted(crops, key=lambda crop: -crop.contrast)
