"""Turn results into what people read: a Markdown table, JSON, CSV and a comparison picture.

Draws and formats; measures nothing.
"""

import csv
import io
import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from kdsr import codecs, provenance
from kdsr.evaluate import BICUBIC, Crop, Interval, Panel, Result, RoundResult, device_name, psnr_differences
from kdsr.store import Store

RESULTS_KEY, PER_IMAGE_KEY = "results.json", "per_image.csv"
TABLE_KEY, COMPARISON_KEY = "table.md", "comparison.png"
PER_IMAGE_COLUMNS = (
    *("benchmark", "scale", "image", "model", "psnr_y", "ssim_y", "psnr_y_vs_first"),
    *("mean_vs_first", "mean_vs_first_low", "mean_vs_first_high"),
)

PROTOCOL = (
    "PSNR and SSIM on BT.601 luma of uint8 images, border = scale, mean over the images. vs first: mean PSNR "
    "difference to the first model and its 95 % paired bootstrap interval over the images. GMAC: 10^9 "
    "multiply-adds of convolutions and linear layers for a 1280x720 output. Mpx/s: 10^6 output pixels a "
    "second on {machine}."
)


@dataclass(frozen=True)
class Report:
    """What was written: the table as text, and a sentence for the last line of a terminal."""

    table: str
    sentence: str


def write_report(rounds: Sequence[RoundResult], store: Store, *, precision: str = "float32") -> Report:
    """Write everything about `rounds` below the root of `store`, results.json last."""
    table = markdown_table(rounds)
    note = PROTOCOL.format(
        machine=f"{provenance.machine()}, {torch.get_num_threads()} threads, {device_name()}"
    )
    store.put(TABLE_KEY, f"{table}\n\n{note}\n".encode())
    store.put(PER_IMAGE_KEY, per_image_csv(rounds).encode())
    store.put(COMPARISON_KEY, codecs.encode_png(np.asarray(comparison(rounds))))
    results = {"rows": rows(rounds), **origin(precision)}
    store.put(RESULTS_KEY, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())
    return Report(table, f"{summary(rounds)}: results in {store.uri}/{RESULTS_KEY}")


# ---------------------------------------------------------------- text


def rows(rounds: Sequence[RoundResult]) -> list[dict[str, Any]]:
    """One flat row for each model, benchmark and scale, ready for JSON: an infinite PSNR is None."""
    return [_row(each, result) for each in rounds for result in each.results]


def _row(measured: RoundResult, result: Result) -> dict[str, Any]:
    return {
        "model": result.contestant.name,
        "scale": measured.round.scale,
        "benchmark": measured.round.benchmark.name,
        "num_images": len(result.scores),
        "psnr_y": result.psnr_y if math.isfinite(result.psnr_y) else None,
        "ssim_y": result.ssim_y,
        **asdict(result.contestant.cost),
        "psnr_y_vs_first": asdict(result.vs_first) if result.vs_first else None,
    }


def origin(precision: str) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "machine": {
            "processor": provenance.machine(),
            "device": device_name(),
            "num_threads": torch.get_num_threads(),
            "precision": precision,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": provenance.command(),
        "commit": provenance.commit(),
        "date": provenance.now(),
    }


def markdown_table(rounds: Sequence[RoundResult]) -> str:
    """Every row of every round, bicubic first in each, columns aligned so that it reads as plain text too."""
    header = ["model", "scale", "benchmark", "images", "PSNR-Y", "SSIM-Y", "vs first (95 %)"]
    header += ["parameters", "GMAC (720p)", "Mpx/s"]
    lines = [header, *(_cells(each, result) for each in rounds for result in each.results)]
    return aligned(lines, left=(0, 2))


def aligned(lines: Sequence[Sequence[str]], *, left: Sequence[int]) -> str:
    """Cells as a Markdown table, the header first; columns in `left` begin together, others end together."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    padded = [
        [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])


def _cells(measured: RoundResult, result: Result) -> list[str]:
    cost = result.contestant.cost
    return [
        result.contestant.name.replace("|", "\\|"),
        f"x{measured.round.scale}",
        measured.round.benchmark.name.replace("|", "\\|"),
        str(len(result.scores)),
        decibels(result.psnr_y),
        f"{result.ssim_y:.4f}",
        _versus(result),
        f"{cost.num_parameters:,}",
        f"{cost.gmacs_720p:.2f}",
        f"{cost.megapixels_per_second:.2f}",
    ]


def _versus(result: Result) -> str:
    return "-" if result.vs_first is None else span(result.vs_first, digits=2)


def span(interval: Interval, *, digits: int) -> str:
    """A gain in dB and its interval, for people."""
    mean, low, high = (f"{value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def decibels(psnr: float) -> str:
    """A PSNR for people: two decimals, or that nothing differs."""
    return f"{psnr:.2f}" if math.isfinite(psnr) else "exact"


def summary(rounds: Sequence[RoundResult]) -> str:
    """The first model on the first benchmark, with bicubic beside it, and how many rows there are besides."""
    first = rounds[0]
    result, bicubic = first.of(first.round.reference), first.of(BICUBIC)
    text = f"{result.contestant.name} {decibels(result.psnr_y)} dB / {result.ssim_y:.4f}"
    text += f" on {first.round.benchmark.name}"
    if result is not bicubic:
        text += f" (bicubic {decibels(bicubic.psnr_y)})"
    rest = sum(len(each.results) for each in rounds) - len({result.contestant.name, BICUBIC})
    return f"{text} and {rest} more row{'s' if rest > 1 else ''}" if rest else text


def per_image_csv(rounds: Sequence[RoundResult]) -> str:
    """One line for each image and model; the last three columns repeat the model's interval on each line."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(PER_IMAGE_COLUMNS)
    for each in rounds:
        for result in each.results:
            writer.writerows(_image_lines(each, result))
    return file.getvalue()


def _image_lines(measured: RoundResult, result: Result) -> Iterator[list[str]]:
    differences = psnr_differences(result.scores, measured.of(measured.round.reference).scores)
    interval = [f"{value:.4f}" for value in asdict(result.vs_first).values()] if result.vs_first else [""] * 3
    for score, difference in zip(result.scores, differences, strict=True):
        place = [measured.round.benchmark.name, str(measured.round.scale), score.name]
        numbers = [f"{score.psnr_y:.4f}", f"{score.ssim_y:.6f}", f"{difference:.4f}"]
        yield [*place, result.contestant.name, *numbers, *interval]


# ---------------------------------------------------------------- picture

MAX_ROWS = 8
"""Crops in one picture."""
CELL, GAP, ROW_GAP, MARGIN = 256, 12, 24, 24
"""Side of an enlarged crop, spaces between two columns and two rows, and around all, in pixels."""
TITLE_HEIGHT, LABEL_HEIGHT = 28, 52
TITLE_SIZE, LABEL_SIZE = 17, 18
MIN_WIDTH = 640
CAPTION = "Where the models differ most. dB: PSNR-Y of the crop, not of the image."
PAPER, INK, FAINT, BEST = "#ffffff", "#111111", "#555555", "#0a7a2f"


def comparison(rounds: Sequence[RoundResult]) -> Pillow.Image:
    """Crops enlarged without smoothing, one row a place, one column a version: bicubic, models, HR."""
    share = max(1, MAX_ROWS // len(rounds))
    chosen = [(each, crop) for each in rounds for crop in each.crops[:share]][:MAX_ROWS]
    columns = max(len(crop.panels) for _, crop in chosen)
    top = MARGIN + 2 * ROW_GAP
    row_height = TITLE_HEIGHT + CELL + LABEL_HEIGHT + ROW_GAP
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    canvas = Pillow.new("RGB", (max(width, MIN_WIDTH), top + len(chosen) * row_height), PAPER)
    ImageDraw.Draw(canvas).text((MARGIN, MARGIN), CAPTION, FAINT, ImageFont.load_default(TITLE_SIZE))
    for index, (each, crop) in enumerate(chosen):
        _draw_row(canvas, top + index * row_height, _title(each, crop), crop.panels)
    return canvas


def _title(measured: RoundResult, crop: Crop) -> str:
    size = crop.panels[0].pixels.shape[0]
    name = f"{measured.round.benchmark.name} x{measured.round.scale}"
    return f"{name}   {crop.image}   {size}x{size} at row {crop.top}, column {crop.left}"


def _draw_row(canvas: Pillow.Image, top: int, title: str, panels: Sequence[Panel]) -> None:
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(TITLE_SIZE)
    draw.text((MARGIN, top), fitted(title, font, canvas.width - 2 * MARGIN), FAINT, font)
    measured = [panel.psnr_y for panel in panels if panel.psnr_y is not None]
    best = max(measured) if len(set(measured)) > 1 else None
    for column, panel in enumerate(panels):
        left = MARGIN + column * (CELL + GAP)
        enlarged = Pillow.fromarray(panel.pixels).resize((CELL, CELL), Pillow.Resampling.NEAREST)
        canvas.paste(enlarged, (left, top + TITLE_HEIGHT))
        frame = left - 1, top + TITLE_HEIGHT - 1, left + CELL, top + TITLE_HEIGHT + CELL
        draw.rectangle(frame, outline=FAINT)
        _draw_label(draw, left, top + TITLE_HEIGHT + CELL + 4, panel, best=best)


def _draw_label(draw: ImageDraw.ImageDraw, left: int, top: int, panel: Panel, *, best: float | None) -> None:
    font = ImageFont.load_default(LABEL_SIZE)
    draw.text((left, top), fitted(panel.label, font, CELL), INK, font)
    if panel.psnr_y is not None:
        is_best = panel.psnr_y == best
        text = f"{decibels(panel.psnr_y)} dB" + (" (best)" if is_best else "")
        draw.text((left, top + LABEL_SIZE + 4), text, BEST if is_best else INK, font)


def fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, its middle left out when it is wider than `width` pixels."""
    kept = len(text)
    fitted = text
    while font.getlength(fitted) > width and kept > 2:
        kept -= 1
        fitted = text[: (kept + 1) // 2] + "..." + text[len(text) - kept // 2 :]
    return fitted
