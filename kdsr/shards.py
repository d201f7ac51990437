"""The format of shards: Parquet files of lossless sub-images, and the index that makes them a set.

One row is one sub-image. `index.json` is written last; a folder without it holds no set. Knows stores and
Parquet; nothing of photographs, no ray, no torch.
"""

import hashlib
import io
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from kdsr import codecs
from kdsr.errors import ImageCorrupt, KeyNotFound, RequestError, ShardCorrupt, StoreError
from kdsr.spec import ShardEntry, ShardIndex
from kdsr.store import Store
from kdsr.tiles import Box

INDEX_KEY = "index.json"
REJECTED_KEY = "rejected.jsonl"

INDEX_THREADS = 16
"""Shards that are asked at once for what the index does not have."""

_SMALL_COLUMNS: list[tuple[str, pa.DataType]] = [
    ("key", pa.string()),
    ("x", pa.int32()),
    ("y", pa.int32()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("sha256", pa.string()),
    ("licence", pa.dictionary(pa.int32(), pa.string())),
    ("domain", pa.dictionary(pa.int32(), pa.string())),
    ("heldout", pa.bool_()),
]
_CROP = pa.struct([("x", pa.int32()), ("y", pa.int32()), ("teacher_sr", pa.large_binary())])
_LARGE_COLUMNS: dict[str, pa.DataType] = {
    "image": pa.large_binary(),
    "teacher_sr": pa.large_binary(),
    "zoom": pa.list_(_CROP),
}
_FEATURES = "teacher_features/"


def features_column(tap: str) -> str:
    """Column that holds the teacher's features at `tap`."""
    return f"{_FEATURES}{tap}"


@dataclass(frozen=True)
class ZoomCrop:
    """A part of a sub-image that the teacher was given as its input, and what it made of it."""

    x: int
    """Left edge in the sub-image."""
    y: int
    """Top edge."""
    teacher_sr: bytes
    """PNG, `scale` times as large as the part."""


@dataclass(frozen=True)
class Row:
    """One sub-image of one photograph."""

    key: str
    """Of the photograph, relative to the prefix that was sharded."""
    x: int
    """Column of the sub-image's left edge in the upright photograph."""
    y: int
    """Row of its top edge."""
    height: int
    width: int
    image: bytes
    """PNG, RGB of 8 bits, (height, width); empty when it was not read."""
    sha256: str
    """Of `image`."""
    licence: str
    domain: str
    heldout: bool
    """Never trained on; the same for every sub-image of a photograph."""
    teacher_sr: bytes | None = None
    """The teacher's output for the degraded `image`: PNG of the same size. None when there is none."""
    teacher_features: Mapping[str, bytes] = field(default_factory=dict, hash=False)
    """The teacher's features for the degraded `image`, by tap; see `write_features`."""
    zoom: tuple[ZoomCrop, ...] = ()
    """The teacher's answers to parts of `image`."""

    @property
    def num_bytes(self) -> int:
        """Of all that was read."""
        features = sum(map(len, self.teacher_features.values()))
        answers = sum(len(crop.teacher_sr) for crop in self.zoom)
        return len(self.image) + len(self.teacher_sr or b"") + features + answers


def row_pixels(row: Row, png: bytes) -> np.ndarray:
    """`png`, the image or the teacher's output of `row`, as (H, W, 3) uint8.

    Raises ShardCorrupt naming the sub-image.
    """
    try:
        return codecs.decode_png(png)
    except ImageCorrupt as error:
        raise ShardCorrupt(
            f"sub-image at x {row.x}, y {row.y} of {row.key}: {error}; delete its shard with the .json "
            f"beside it and run the job that made it again"
        ) from error


def write_features(features: np.ndarray) -> bytes:
    """(rank, h', w') as an .npy file of float16."""
    file = io.BytesIO()
    np.save(file, features.astype(np.float16), allow_pickle=False)
    return file.getvalue()


def row_features(row: Row, tap: str) -> np.ndarray:
    """Features (rank, h', w') float16 of `row` at `tap`. Raises ShardCorrupt naming the sub-image."""
    try:
        found: np.ndarray = np.load(io.BytesIO(row.teacher_features[tap]), allow_pickle=False)
    except (KeyError, ValueError, EOFError) as error:
        raise ShardCorrupt(
            f"sub-image at x {row.x}, y {row.y} of {row.key}: no features of the teacher's tap {tap} "
            f"({error}); delete its shard with the .json beside it and label it again"
        ) from error
    return found


def cut(height: int, width: int, size: int) -> list[Box]:
    """Near-equal boxes that cover `height` x `width` once, row by row.

    As many as bring their sides nearest to `size`: between 2/3 and 3/2 of it, or the whole side when that
    is shorter.
    """
    rows, columns = _edges(height, size), _edges(width, size)
    return [
        Box(top, left, bottom, right) for top, bottom in pairwise(rows) for left, right in pairwise(columns)
    ]


def _edges(side: int, size: int) -> list[int]:
    count = max(1, (2 * side + size) // (2 * size))
    return [index * side // count for index in range(count + 1)]


def is_heldout(key: str, fraction: float) -> bool:
    """Whether the photograph is kept from training: the same answer on every machine and in every order."""
    digest = hashlib.sha256(f"heldout {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


# ---------------------------------------------------------------- one shard


def write_shard(store: Store, key: str, rows: Iterable[Row], row_group_bytes: int) -> ShardEntry:
    """Write `rows` as one Parquet object, holding one row group in memory at a time.

    The same rows give the same bytes. The teacher's columns are there when the first row has them; then
    every row must. Raises RequestError when there are no rows.
    """
    tally = _Tally()
    with tempfile.TemporaryDirectory(prefix="kdsr-shard-") as folder:
        path = Path(folder) / "shard.parquet"
        _write_parquet(path, tally.watch(rows), row_group_bytes, tally)
        entry = ShardEntry(
            key=key,
            sha256=_file_sha256(path),
            num_bytes=path.stat().st_size,
            row_groups=tally.row_groups,
            num_images=len(tally.keys),
            num_heldout_rows=tally.num_heldout_rows,
            trained_sides=tally.trained_sides,
        )
        store.put_file(key, path)
    return entry


class _Tally:
    """What is counted while rows pass."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.num_heldout_rows = 0
        self.row_groups: list[int] = []
        self.trained_sides: list[list[int]] = []

    def count(self, group: Collection[Row]) -> None:
        """One row group."""
        self.row_groups.append(len(group))
        self.trained_sides.append([_trained_side(row.height, row.width, row.heldout) for row in group])

    def watch(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.keys.add(row.key)
            self.num_heldout_rows += row.heldout
            yield row


def _write_parquet(path: Path, rows: Iterator[Row], row_group_bytes: int, tally: _Tally) -> None:
    first = next(rows, None)
    if first is None:
        raise RequestError("a shard needs at least one row")
    schema = _schema(first)
    # PNGs do not get smaller, and statistics of them would be kept beside them.
    repeated = ["key", "licence", "domain"]
    with pq.ParquetWriter(
        path, schema, compression="none", use_dictionary=repeated, write_statistics=False
    ) as writer:
        for group in _grouped(chain([first], rows), row_group_bytes):
            writer.write_table(_table(group, schema), row_group_size=len(group))
            tally.count(group)
            del group  # before the next one is collected


def _grouped(rows: Iterable[Row], row_group_bytes: int) -> Iterator[list[Row]]:
    """Lists of rows whose large columns together reach `row_group_bytes`; the last may be smaller."""
    group: list[Row] = []
    num_bytes = 0
    for row in rows:
        group.append(row)
        num_bytes += row.num_bytes
        if num_bytes >= row_group_bytes:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _schema(first: Row) -> pa.Schema:
    large = [column for column in _LARGE_COLUMNS.items() if getattr(first, column[0]) not in (None, ())]
    large += [(features_column(tap), pa.large_binary()) for tap in first.teacher_features]
    return pa.schema([pa.field(*column, nullable=False) for column in [*_SMALL_COLUMNS, *large]])


def _table(rows: list[Row], schema: pa.Schema) -> pa.Table:
    return pa.table(
        [pa.array([_value(row, column.name) for row in rows], type=column.type) for column in schema],
        schema=schema,
    )


def _value(row: Row, column: str) -> Any:
    if column == "zoom":
        return [asdict(crop) for crop in row.zoom]
    if column.startswith(_FEATURES):
        return row.teacher_features[column.removeprefix(_FEATURES)]
    return getattr(row, column)


def _row(values: dict[str, Any]) -> Row:
    """Of the columns that were read."""
    features = {name: values.pop(name) for name in list(values) if name.startswith(_FEATURES)}
    zoom = tuple(ZoomCrop(**crop) for crop in values.pop("zoom", ()))
    return Row(
        **{"image": b"", **values},
        teacher_features={name.removeprefix(_FEATURES): data for name, data in features.items()},
        zoom=zoom,
    )


def read_row_group(
    store: Store, entry: ShardEntry, row_group: int, *, columns: Collection[str] | None = None
) -> list[Row]:
    """The rows of one row group, in file order.

    The small columns always come; of the large ones, `image`, `teacher_sr`, `zoom` and `features_column`s,
    those in `columns`, or all.
    Raises ShardCorrupt when the shard is not what its index says, StoreError when it cannot be read.
    """
    with _shard_errors(entry.key), _open_parquet(store, entry.key) as file:
        wanted = [name for name in file.schema_arrow.names if _is_wanted(name, columns)]
        rows = [_row(values) for values in file.read_row_group(row_group, columns=wanted).to_pylist()]
    if len(rows) != entry.row_groups[row_group]:
        raise ShardCorrupt(
            f"{entry.key}: expected {entry.row_groups[row_group]} rows in row group {row_group}, found "
            f"{len(rows)}; {_REBUILD}"
        )
    return rows


def _trained_side(height: int, width: int, heldout: bool) -> int:
    return 0 if heldout else min(height, width)


def trained_sides(store: Store, index: ShardIndex) -> list[list[list[int]]]:
    """The shorter side of each row, by shard and row group; 0 for those that are held out.

    Read from the small columns where the index does not have it, several shards at a time. Raises what
    `read_row_group` raises.
    """
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        return list(pool.map(lambda entry: entry.trained_sides or _read_sides(store, entry), index.shards))


def _read_sides(store: Store, entry: ShardEntry) -> list[list[int]]:
    columns = ["height", "width", "heldout"]
    with _shard_errors(entry.key), _open_parquet(store, entry.key) as file:
        values = file.read(columns=columns).to_pydict()
    sides = [_trained_side(*row) for row in zip(*(values[name] for name in columns), strict=True)]
    if len(sides) != entry.num_rows:
        raise ShardCorrupt(f"{entry.key}: expected {entry.num_rows} rows, found {len(sides)}; {_REBUILD}")
    ends = accumulate(entry.row_groups)
    return [sides[end - rows : end] for rows, end in zip(entry.row_groups, ends, strict=True)]


def _is_wanted(name: str, columns: Collection[str] | None) -> bool:
    if name in _LARGE_COLUMNS or name.startswith(_FEATURES):
        return columns is None or name in columns
    return any(name == small for small, _ in _SMALL_COLUMNS)


_REBUILD = "delete the shard with its .json and run jobs/shard.py again"


def _open_parquet(store: Store, key: str) -> pq.ParquetFile:
    filesystem, root = store.arrow()
    return pq.ParquetFile(f"{root}/{key}", filesystem=filesystem)


@contextmanager
def _shard_errors(key: str) -> Iterator[None]:
    """What pyarrow raises, as ours."""
    try:
        yield
    except FileNotFoundError:
        raise ShardCorrupt(f"{key}: listed in {INDEX_KEY}, but not there; {_REBUILD}") from None
    except (pa.ArrowInvalid, pa.ArrowKeyError, TypeError) as error:
        raise ShardCorrupt(f"{key}: not a shard of this format: {error}; {_REBUILD}") from error
    except OSError as error:
        raise StoreError(f"{key}: could not be read: {error}") from error


def verify(store: Store, entry: ShardEntry) -> None:
    """Read the whole shard and compare it with the index. Raises ShardCorrupt."""
    digest, num_bytes = hashlib.sha256(), 0
    step = 8 * 2**20
    try:
        while data := store.get(entry.key, start=num_bytes, length=step):
            digest.update(data)
            num_bytes += len(data)
    except KeyNotFound:
        raise ShardCorrupt(f"{entry.key}: listed in {INDEX_KEY}, but not there; {_REBUILD}") from None
    if digest.hexdigest() != entry.sha256:
        raise ShardCorrupt(
            f"{entry.key}: expected sha256 {entry.sha256[:12]} of {entry.num_bytes} bytes, found "
            f"{digest.hexdigest()[:12]} of {num_bytes}; {_REBUILD}"
        )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- the set


def read_index(store: Store) -> ShardIndex:
    """The index of the set at `store`. Raises RequestError when there is no complete set."""
    try:
        data = store.get(INDEX_KEY)
    except KeyNotFound:
        raise RequestError(_why_no_index(store)) from None
    try:
        return ShardIndex.model_validate_json(data)
    except ValidationError as error:
        raise ShardCorrupt(
            f"{store.uri}/{INDEX_KEY}: not an index of version 1: {_first_line(error)}; "
            f"run jobs/shard.py again"
        ) from None


def digest(index: ShardIndex) -> str:
    """The sha256 of all that the shards of a set hold, labels too, in their order; wherever the set lies."""
    whole = hashlib.sha256()
    for entry in index.shards:
        whole.update(f"{entry.sha256}\n".encode())
    return whole.hexdigest()


def _why_no_index(store: Store) -> str:
    if next(iter(store.list()), None) is None:
        return f"{store.uri} is empty; make shards with jobs/shard.py --input PHOTOS --output {store.uri}"
    return f"{store.uri} has no {INDEX_KEY}: not complete, or no shards; run jobs/shard.py again"


def _first_line(error: ValidationError) -> str:
    first: Any = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'content'}: {first['msg']}"


def write_index(store: Store, index: ShardIndex) -> None:
    """Make the set exist. Everything it lists must be there."""
    store.put(INDEX_KEY, (index.model_dump_json(indent=1) + "\n").encode())
