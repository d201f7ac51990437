"""Turn what was found in shards into what people read: tables, JSON, and a picture of samples.

Draws and formats; judges nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from kdsr import codecs
from kdsr.check import FINDINGS, CheckedSet, CheckReport, Found, read_rows
from kdsr.report import FAINT, GAP, INK, MARGIN, PAPER, aligned, fitted
from kdsr.shards import Row, row_pixels
from kdsr.spec import ShardIndex
from kdsr.store import Store

REPORT_KEY, FINDINGS_KEY, SHEET_KEY = "report.json", "findings.jsonl", "sheet.png"


def write(checked: CheckedSet, index: ShardIndex, store: Store, target: Store) -> None:
    """Everything below the root of `target`, report.json last; pictures come from the shards in `store`."""
    strips = choose(checked)
    rows = read_rows(store, index, checked.table, [shown.row for strip in strips for shown in strip.shown])
    target.put(FINDINGS_KEY, checked.lines())
    target.put(SHEET_KEY, codecs.encode_png(np.asarray(sheet(strips, rows))))
    target.put(REPORT_KEY, (checked.report.model_dump_json(indent=2) + "\n").encode())


# ---------------------------------------------------------------- text


def text(report: CheckReport, uri: str) -> str:
    """The report for a terminal; the last line says what to do."""
    parts = [_overview(report), _findings_table(report), _patch_table(report)]
    parts += [f"broken: {shard.key} (sha256 {shard.sha256}): {shard.reason}" for shard in report.broken]
    places = f"{SHEET_KEY}, {FINDINGS_KEY} and {REPORT_KEY} are in {uri.removeprefix('file://')}"
    return "\n\n".join([*parts, places, report.advice])


def _overview(report: CheckReport) -> str:
    heldout = report.num_heldout_rows / max(1, report.num_rows)
    return (
        f"{report.num_images:,} images, {report.num_rows:,} sub-images, {report.num_pixels / 1e6:,.1f} Mpx; "
        f"shards: {report.num_shards:,}; {heldout:.1%} of the sub-images held out\n"
        f"domains: {_listed(report.domains)}\nlicences: {_listed(report.licences)}"
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "none"


def _findings_table(report: CheckReport) -> str:
    total = max(1, report.num_rows)
    lines = [["finding", "sub-images", "share", "images", "what"]]
    lines += [
        [finding, f"{count:,}", f"{count / total:.1%}", f"{report.images_with[finding]:,}", FINDINGS[finding]]
        for finding, count in report.findings.items()
    ]
    return aligned(lines, left=(0, 4))


def _patch_table(report: CheckReport) -> str:
    lost = f"lost at patch_size {report.patch_size}"
    lines = [["scale", "least side", lost, "largest patch_size", "largest that loses 1 %"]]
    lines += [
        [
            f"x{fit.scale}",
            f"{fit.needed} px",
            f"{fit.lost_share:.1%}",
            f"{fit.largest}",
            f"{fit.largest_in_most}",
        ]
        for fit in report.patches
    ]
    return aligned(lines, left=(0,))


# ---------------------------------------------------------------- picture

COLUMNS = 8
"""Sub-images in one strip."""
CELL = 192
"""Side of a picture in the sheet, in pixels."""
TITLE_SIZE, LABEL_SIZE = 17, 13
TITLE_HEIGHT, LABEL_HEIGHT = 28, 40
WHOLE = ("sample", "leak", "duplicate", "near_duplicate", "small")
"""Strips whose sub-images are shown whole and not a part of them pixel by pixel."""


@dataclass(frozen=True)
class Shown:
    """One sub-image of a strip."""

    row: int
    name: str
    note: str


@dataclass(frozen=True)
class Strip:
    """Sub-images beside each other."""

    kind: str
    title: str
    shown: list[Shown]


def choose(checked: CheckedSet) -> list[Strip]:
    """Some sub-images by lot, the same on every run, and the worst of each finding."""
    table = checked.table
    chosen = np.random.default_rng(0).permutation(len(table))[:COLUMNS]
    sample = [Shown(int(row), _name(table, int(row)), _set_of(table, int(row))) for row in sorted(chosen)]
    strips = [Strip("sample", "by lot", sample)]
    for finding, meaning in FINDINGS.items():
        found = [each for each in checked.found if each.finding == finding]
        shown = [one for each in found for one in _shown(table, each)][:COLUMNS]
        zoomed = "" if finding in WHOLE else "; pixel by pixel"
        strips.append(Strip(finding, f"{finding}: {len(found)} ({meaning}){zoomed}", shown))
    return [strip for strip in strips if strip.shown]


def _shown(table: pa.Table, found: Found) -> list[Shown]:
    """One, or the two of a pair beside each other."""
    if found.other is None:
        return [Shown(found.row, _name(table, found.row), f"{found.value:.3g}")]
    bits = "same pixels" if found.value < 0 else f"{found.value:.0f} of 64 bits differ"
    pair = (found.row, found.other)
    return [Shown(row, _name(table, row), f"{_set_of(table, row)}, {bits}") for row in pair]


def _name(table: pa.Table, row: int) -> str:
    key, x, y = (table[name][row].as_py() for name in ("key", "x", "y"))
    return f"{key} {x},{y}"


def _set_of(table: pa.Table, row: int) -> str:
    return "held out" if table["heldout"][row].as_py() else "training"


def sheet(strips: Sequence[Strip], rows: Mapping[int, Row]) -> Pillow.Image:
    """All strips below each other, each with its title and each picture with name and value."""
    height = TITLE_HEIGHT + CELL + LABEL_HEIGHT + GAP
    width = 2 * MARGIN + COLUMNS * CELL + (COLUMNS - 1) * GAP
    canvas = Pillow.new("RGB", (width, 2 * MARGIN + max(1, len(strips)) * height), PAPER)
    for number, strip in enumerate(strips):
        _draw_strip(canvas, MARGIN + number * height, strip, rows)
    return canvas


def _draw_strip(canvas: Pillow.Image, top: int, strip: Strip, rows: Mapping[int, Row]) -> None:
    draw = ImageDraw.Draw(canvas)
    title = ImageFont.load_default(TITLE_SIZE)
    draw.text((MARGIN, top), fitted(strip.title, title, canvas.width - 2 * MARGIN), INK, title)
    label = ImageFont.load_default(LABEL_SIZE)
    for column, shown in enumerate(strip.shown):
        left = MARGIN + column * (CELL + GAP)
        pixels = row_pixels(rows[shown.row], rows[shown.row].image)
        picture = _whole(pixels) if strip.kind in WHOLE else _middle(pixels)
        canvas.paste(picture, (left, top + TITLE_HEIGHT))
        below = top + TITLE_HEIGHT + CELL + 4
        draw.text((left, below), fitted(shown.name, label, CELL), INK, label)
        draw.text((left, below + LABEL_SIZE + 4), fitted(shown.note, label, CELL), FAINT, label)


def _whole(pixels: np.ndarray) -> Pillow.Image:
    picture = Pillow.fromarray(pixels)
    picture.thumbnail((CELL, CELL), Pillow.Resampling.BOX)
    return picture


def _middle(pixels: np.ndarray) -> Pillow.Image:
    top, left = (max(0, (side - CELL) // 2) for side in pixels.shape[:2])
    return Pillow.fromarray(np.ascontiguousarray(pixels[top : top + CELL, left : left + CELL]))
