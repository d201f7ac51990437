"""What is in a set of shards, and what is wrong with it, before anybody trains on it.

`inspect_shard` is all that happens to the pixels of one shard and can run on any machine; what it returns
has a thumbnail of 288 bytes and a few numbers for each sub-image. `check_set` judges all of them together.
Draws nothing; knows no ray, no torch.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from kdsr import shards
from kdsr.duplicates import Twin, equal_twins, near_twins
from kdsr.measures import THUMBNAIL_COLUMNS, THUMBNAIL_ROWS, measure
from kdsr.shards import Row, row_pixels
from kdsr.spec import Frozen, ShardEntry, ShardIndex
from kdsr.store import Store

Array = np.ndarray

SCALES = (2, 3, 4)

MIN_DETAIL = 1.0
"""RMS in levels below which a sub-image is flat: reducing it by 2 costs nothing above 48 dB."""
MIN_SHARPNESS = 20.0
"""Variance of the Laplacian below which a sub-image is blurred. Found on the demo's photographs: a Gaussian
blur of 2 pixels brings all of them below 19, and without it all are above 90 but a background that is
out of focus, at 8."""
MIN_SHARPNESS_OF_SET = 0.02
"""The same as a share of the set's median, where that is more: a set of fine textures is held to more."""
MIN_FINE_SHARE = 0.06
"""Share of fine detail below which a sub-image is `soft`. Found on the demo's photographs: 0.093 to 0.47 as
they are, 0.044 or less after bicubic reduction and enlargement by 2 or a Gaussian blur of 1 pixel."""
MAX_BLOCKINESS = 1.15
"""Blockiness above which JPEG has left its grid. Found on the demo's photographs: at most 1.11 as they are;
above it all but one at quality 20, three quarters at 60, half at 75; coarse textures hide the grid."""

FINDINGS = {
    "leak": "held out, and the same picture is trained on",
    "duplicate": "same pixels as another one",
    "near_duplicate": "nearly the same picture as one of another photograph, mirrored or not",
    "flat": "no detail, teaches nothing",
    "blurred": "out of focus or moved",
    "soft": "no fine detail: enlarged before, or smoothed",
    "jpeg": "grid of JPEG compression, which would be learnt",
    "small": "too small for the patch size at one of the scales",
}
"""Every kind of finding, the most important first, and what it means."""

_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("key", "domain", "licence")),
        *((name, pa.int32()) for name in ("x", "y", "height", "width", "row_group", "place")),
        ("heldout", pa.bool_()),
        *((name, pa.float32()) for name in ("sharpness", "detail", "blockiness", "fine_share")),
        ("content", pa.uint64()),
        ("thumbnail", pa.binary(THUMBNAIL_ROWS * THUMBNAIL_COLUMNS)),
    ]
)


class Finding(Frozen):
    """One thing that is wrong with one sub-image: a line of `findings.jsonl`."""

    key: str
    x: int
    y: int
    finding: str
    """One of FINDINGS."""
    value: float
    """What was measured; of duplicates the bits in which hashes differ, -1 for the same pixels."""
    other: str | None = None
    """Of duplicates the other sub-image: `KEY x X y Y`."""


class BrokenShard(Frozen):
    """A shard that is not what the index lists."""

    key: str
    sha256: str
    """As the index has it."""
    reason: str


class PatchFit(Frozen):
    """What a scale leaves of the training sub-images."""

    scale: int
    needed: int
    """Least height and width in pixels for the patch size that was asked for."""
    lost_share: float
    """Share of the training sub-images that are smaller."""
    largest: int
    """Largest patch size, in LR pixels, that fits into at least one of them; 0 when none does."""
    largest_in_most: int
    """Largest that loses at most one in a hundred."""


class Quantiles(Frozen):
    """Of one measure over the sub-images."""

    lowest: float
    tenth: float
    median: float
    highest: float


class CheckReport(Frozen):
    """`report.json`: written last."""

    version: Literal[1] = 1
    shards: str
    """Uri of the set."""
    usable: bool
    advice: str
    """What to do now."""
    num_shards: int
    num_images: int
    num_rows: int
    num_pixels: int
    num_heldout_rows: int
    domains: dict[str, int]
    """Sub-images of each."""
    licences: dict[str, int]
    patch_size: int
    patches: tuple[PatchFit, ...]
    findings: dict[str, int]
    """Sub-images with each."""
    images_with: dict[str, int]
    """Photographs with each."""
    thresholds: dict[str, float]
    measures: dict[str, Quantiles]
    broken: tuple[BrokenShard, ...]
    provenance: dict[str, str]


# ---------------------------------------------------------------- one shard


def inspect_shard(store: Store, entry: ShardEntry) -> pa.Table:
    """Measures of every sub-image of a shard, whose sha256 is verified first. Raises ShardCorrupt."""
    shards.verify(store, entry)
    batches = [
        pa.RecordBatch.from_pylist(list(_inspect_group(store, entry, group)), schema=_SCHEMA)
        for group in range(len(entry.row_groups))
    ]
    return pa.Table.from_batches(batches, schema=_SCHEMA)


def _inspect_group(store: Store, entry: ShardEntry, group: int) -> Iterator[dict[str, object]]:
    for place, row in enumerate(shards.read_row_group(store, entry, group, columns=["image"])):
        measures = measure(row_pixels(row, row.image))
        values = {name: getattr(row, name) for name in _SCHEMA.names if hasattr(row, name)}
        thumbnail = measures.thumbnail.tobytes()
        yield values | measures._asdict() | {"thumbnail": thumbnail, "row_group": group, "place": place}


def join(tables: Mapping[str, pa.Table]) -> pa.Table:
    """All of them as one, with the `shard` that each row is in."""
    named = [
        table.append_column("shard", pa.array([key] * len(table), pa.string()))
        for key, table in sorted(tables.items())
    ]
    schema = _SCHEMA.append(pa.field("shard", pa.string()))
    return pa.concat_tables(named) if named else schema.empty_table()


# ---------------------------------------------------------------- findings


@dataclass(frozen=True)
class Found:
    """One finding, of a row of the table."""

    row: int
    finding: str
    value: float
    other: int | None = None
    """Row of the other one of a pair."""


def find_all(table: pa.Table, fits: Sequence[PatchFit]) -> list[Found]:
    """Everything that is wrong, the worst of each kind first, the kinds in the order of FINDINGS."""
    flat = _column(table, "detail") < MIN_DETAIL
    found = [*_pairs(table, flat), *_measured(table, flat), *_small(table, fits)]
    kinds = list(FINDINGS)

    def place(each: Found) -> tuple[int, float, int]:
        # Of blockiness more is worse, of everything else less.
        badness = -each.value if each.finding == "jpeg" else each.value
        return kinds.index(each.finding), badness, each.row

    return sorted(found, key=place)


def thresholds(table: pa.Table) -> dict[str, float]:
    """The limit of each measure for this set."""
    sharpness = _column(table, "sharpness")
    median = float(np.median(sharpness)) if len(sharpness) else 0.0
    return {
        "flat": MIN_DETAIL,
        "blurred": max(MIN_SHARPNESS, MIN_SHARPNESS_OF_SET * median),
        "soft": MIN_FINE_SHARE,
        "jpeg": MAX_BLOCKINESS,
    }


def _measured(table: pa.Table, flat: Array) -> Iterator[Found]:
    """What one measure tells. A flat one is nothing else, a blurred one is not called soft too."""
    limits = thresholds(table)
    blurred = ~flat & (_column(table, "sharpness") < limits["blurred"])
    soft = ~flat & ~blurred & (_column(table, "fine_share") < limits["soft"])
    jpeg = ~flat & (_column(table, "blockiness") > limits["jpeg"])
    for finding, rows, measure_name in (
        ("flat", flat, "detail"),
        ("blurred", blurred, "sharpness"),
        ("soft", soft, "fine_share"),
        ("jpeg", jpeg, "blockiness"),
    ):
        values = _column(table, measure_name)
        yield from (Found(int(row), finding, float(values[row])) for row in np.flatnonzero(rows))


def _small(table: pa.Table, fits: Sequence[PatchFit]) -> Iterator[Found]:
    sides = _sides(table)
    small = np.zeros(len(table), bool)
    for fit in fits:
        small |= _whole(sides, fit.scale) < fit.needed
    yield from (Found(int(row), "small", float(sides[row])) for row in np.flatnonzero(small))


def _pairs(table: pa.Table, flat: Array) -> Iterator[Found]:
    """Each row that has a twin, once for each kind, with the nearest twin."""
    heldout = _column(table, "heldout")
    kinds: dict[int, set[str]] = {}
    # Those with the same pixels come first, so that they are what a leak is told of.
    for twin in _twins(table, np.flatnonzero(~flat), heldout):
        near = "duplicate" if twin.bits < 0 else "near_duplicate"
        finding = "leak" if heldout[twin.row] and not heldout[twin.other] else near
        before = kinds.setdefault(twin.row, set())
        if finding not in before:
            before.add(finding)
            yield Found(twin.row, finding, twin.bits, twin.other)


def _twins(table: pa.Table, rows: Array, heldout: Array) -> Iterator[Twin]:
    """Of `rows`; near twins are looked for among one of each picture."""
    copies = []
    for twin in equal_twins(_column(table, "content")[rows], heldout=heldout[rows]):
        copies.append(twin.row)
        yield _moved(twin, rows)
    ones = np.delete(rows, copies)
    groups = table["key"].combine_chunks().dictionary_encode().indices.to_numpy()
    for twin in near_twins(_thumbnails(table)[ones], groups=groups[ones], heldout=heldout[ones]):
        yield _moved(twin, ones)


def _moved(twin: Twin, rows: Array) -> Twin:
    return Twin(twin.bits, int(rows[twin.row]), int(rows[twin.other]))


def _thumbnails(table: pa.Table) -> Array:
    data = b"".join(table["thumbnail"].to_pylist())
    return np.frombuffer(data, np.uint8).reshape(-1, THUMBNAIL_ROWS, THUMBNAIL_COLUMNS)


def _column(table: pa.Table, name: str) -> Array:
    values: Array = table[name].to_numpy()
    return values


def _sides(table: pa.Table) -> Array:
    return np.minimum(_column(table, "height"), _column(table, "width"))


# ---------------------------------------------------------------- patches


def patch_fit(table: pa.Table, *, scale: int, patch_size: int, context: int) -> PatchFit:
    """How `patch_size` LR pixels with `context` around them fit into the training sub-images."""
    sides = np.sort(_sides(table)[~_column(table, "heldout")])
    largest = np.maximum(0, sides // scale - 2 * context)
    needed = (patch_size + 2 * context) * scale
    return PatchFit(
        scale=scale,
        needed=needed,
        lost_share=float((_whole(sides, scale) < needed).mean()) if len(sides) else 1.0,
        largest=int(largest[-1]) if len(sides) else 0,
        largest_in_most=int(largest[len(sides) // 100]) if len(sides) else 0,
    )


def _whole(sides: Array, scale: int) -> Array:
    return sides // scale * scale


# ---------------------------------------------------------------- the set


@dataclass(frozen=True)
class CheckedSet:
    """The whole judgement."""

    report: CheckReport
    table: pa.Table
    found: list[Found]

    def lines(self) -> bytes:
        """The content of `findings.jsonl`."""
        return "".join(f"{_line(self.table, found)}\n" for found in self.found).encode()


def _line(table: pa.Table, found: Found) -> str:
    key, x, y = _place(table, found.row)
    other = None if found.other is None else "{} x {} y {}".format(*_place(table, found.other))
    finding = Finding(key=key, x=x, y=y, finding=found.finding, value=round(found.value, 4), other=other)
    return json.dumps(finding.model_dump(exclude_none=True), ensure_ascii=False)


def _place(table: pa.Table, row: int) -> tuple[str, int, int]:
    key, x, y = (table[name][row].as_py() for name in ("key", "x", "y"))
    return key, x, y


def check_set(
    index: ShardIndex,
    table: pa.Table,
    broken: Iterable[BrokenShard],
    *,
    uri: str,
    patch_size: int,
    contexts: Mapping[int, int],
    provenance: Mapping[str, str],
) -> CheckedSet:
    """Judge all sub-images together; `contexts` has what the LR of a patch depends on, by scale."""
    fits = [patch_fit(table, scale=scale, patch_size=patch_size, context=contexts[scale]) for scale in SCALES]
    found = find_all(table, fits)
    broken = tuple(broken)
    hindrance = _hindrance(table, broken, fits, patch_size)
    report = CheckReport(
        shards=uri,
        usable=hindrance is None,
        advice=_advice(hindrance, _remark(table, found), uri),
        num_shards=len(index.shards),
        num_images=len(table["key"].unique()),
        num_rows=len(table),
        num_pixels=int((_column(table, "height").astype(np.int64) * _column(table, "width")).sum()),
        num_heldout_rows=int(_column(table, "heldout").sum()),
        domains=_counted(table, "domain"),
        licences=_counted(table, "licence"),
        patch_size=patch_size,
        patches=tuple(fits),
        findings=_rows_with(found),
        images_with=_images_with(table, found),
        thresholds=thresholds(table),
        measures=_quantiles(table),
        broken=broken,
        provenance=dict(provenance),
    )
    return CheckedSet(report, table, found)


def _counted(table: pa.Table, column: str) -> dict[str, int]:
    return dict(Counter(table[column].to_pylist()).most_common())


def _rows_with(found: Iterable[Found]) -> dict[str, int]:
    counts = Counter(each.finding for each in found)
    return {finding: counts[finding] for finding in FINDINGS}


def _images_with(table: pa.Table, found: Iterable[Found]) -> dict[str, int]:
    keys = table["key"].to_pylist()
    images = {(each.finding, keys[each.row]) for each in found}
    counts = Counter(finding for finding, _ in images)
    return {finding: counts[finding] for finding in FINDINGS}


def _quantiles(table: pa.Table) -> dict[str, Quantiles]:
    names = ("detail", "sharpness", "fine_share", "blockiness") if len(table) else ()
    return {name: _quantiles_of(_column(table, name)) for name in names}


def _quantiles_of(values: Array) -> Quantiles:
    lowest, tenth, median, highest = map(float, np.quantile(values, [0, 0.1, 0.5, 1]))
    return Quantiles(lowest=lowest, tenth=tenth, median=median, highest=highest)


MANY = 0.1
"""Share of the sub-images with which something is worth a second look."""


def _hindrance(
    table: pa.Table, broken: Sequence[BrokenShard], fits: Sequence[PatchFit], patch_size: int
) -> str | None:
    """Why nobody can train on the set, and what to do about it."""
    if broken:
        return f"a shard is broken: delete {broken[0].key} with its .json and run the job that made it again"
    if _column(table, "heldout").all():
        return "every sub-image is held out: shard with a smaller --heldout_fraction"
    if any(fit.lost_share < 1 for fit in fits):
        return None
    sizes = ", ".join(f"{fit.largest} at x{fit.scale}" for fit in fits)
    return (
        f"no training sub-image fits patch_size {patch_size}, the largest that fit are {sizes}: choose one "
        f"of them, or shard larger photographs with a larger --sub_image_size"
    )


def _remark(table: pa.Table, found: Sequence[Found]) -> str | None:
    """What a person should look at first, although a training would run."""
    counts, num_heldout = _rows_with(found), int(_column(table, "heldout").sum())
    if counts["leak"]:
        return (
            f"{counts['leak']} of {num_heldout} held-out sub-images are trained on too, and validation "
            f"flatters: take one of each two photographs in findings.jsonl away, and shard again"
        )
    if not num_heldout:
        return "nothing is held out to choose the best checkpoint: shard with a larger --heldout_fraction"
    for finding, meaning in FINDINGS.items():
        if counts[finding] > MANY * len(table):
            return (
                f"{counts[finding]} of {len(table)} sub-images are {finding} ({meaning}): look at sheet.png, "
                f"take photographs in findings.jsonl away that you do not want, and shard again"
            )
    return None


def _advice(hindrance: str | None, remark: str | None, uri: str) -> str:
    """For the last line of a terminal."""
    if hindrance:
        return f"not usable: {hindrance}"
    train = f"train with --data.shards {uri.removeprefix('file://')}"
    return f"usable, but {remark}; or {train}" if remark else f"usable: {train}"


# ---------------------------------------------------------------- pictures


def read_rows(store: Store, index: ShardIndex, table: pa.Table, rows: Iterable[int]) -> dict[int, Row]:
    """These rows of the table with their pictures, still encoded; each row group is read once."""
    entries = {entry.key: entry for entry in index.shards}
    wanted: dict[tuple[str, int], list[int]] = {}
    for row in set(rows):
        wanted.setdefault((table["shard"][row].as_py(), table["row_group"][row].as_py()), []).append(row)
    read = {}
    for (key, group), members in wanted.items():
        there = shards.read_row_group(store, entries[key], group, columns=["image"])
        read.update({row: there[table["place"][row].as_py()] for row in members})
    return read
