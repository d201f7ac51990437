"""From photographs to shards: what is a photograph, which shard it belongs to, and the making of one shard.

Planning is arithmetic over a listing. `build_shard` is all that happens to one shard and can run on any
machine. Knows no ray.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdsr import codecs
from kdsr.config import ShardConfig
from kdsr.errors import DataError, ImageTooSmall, RequestError
from kdsr.shards import Row, cut, is_heldout, write_shard
from kdsr.spec import Frozen, ShardEntry, ShardIndex
from kdsr.store import ObjectInfo, Store

# Bytes of the PNGs for each byte of the photograph; 3.7 for JPEGs of high quality, more for lower.
_GROWTH = {"jpeg": 6.0, "webp": 10.0}

# Part of the digest of every shard: a change of how rows are made must change it.
_FORMAT_VERSION = 1

_JUNK_NAMES = {"thumbs.db", "desktop.ini"}

# Downloads in flight while an image is cut: hides the latency of a store, and holds few files in memory.
_NUM_DOWNLOADS = 4


class Rejected(Frozen):
    """A file that gave no rows, and why."""

    key: str
    error: str
    """Name of the error class: ImageCorrupt, ImageTooSmall, ..."""
    reason: str


class Receipt(Frozen):
    """What became of one shard: stored beside it, after it. A shard without one does not exist."""

    entry: ShardEntry | None
    """None when every file was rejected; then there is no Parquet object either."""
    num_pixels: int
    rejected: list[Rejected]


@dataclass(frozen=True)
class ShardPlan:
    """One shard that is to be there: its name says what it is made of."""

    key: str
    photos: tuple[str, ...]
    """Keys of the photographs, sorted."""

    @property
    def receipt_key(self) -> str:
        """Where its `Receipt` is stored."""
        return f"{self.key.removesuffix('.parquet')}.json"


def is_junk(key: str) -> bool:
    """Whether the key is a hidden file, a folder marker, or what desktops leave behind."""
    parts = key.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return hidden or not parts[-1] or parts[-1].lower() in _JUNK_NAMES


def row_options(config: ShardConfig) -> dict[str, str | int | float]:
    """The options that change what the rows are; kept in the index."""
    names = ("sub_image_size", "min_size", "max_pixels", "heldout_fraction", "domain", "licence")
    return {name: getattr(config, name) for name in (*names, "row_group_bytes")}


# ---------------------------------------------------------------- planning


def list_photos(source: Store, *, without: str | None = None) -> pa.Table:
    """All files that could be photographs: key, etag, size, expected_bytes; in the order of their place.

    `without` is a folder that is left out: an output that lies inside the input. Listed by page and kept
    in columns: about 100 bytes for each file. Raises RequestError when there are none.
    """
    infos = (
        info
        for info in source.list()
        if not is_junk(info.key) and not (without and info.key.startswith(f"{without}/"))
    )
    batches = [_listing_batch(chunk) for chunk in _chunks(infos, 10_000)]
    if not batches:
        raise RequestError(f"no files under {source.uri}; expected JPEG, PNG, WebP or TIFF photographs")
    return pa.Table.from_batches(batches).sort_by([("place", "ascending"), ("key", "ascending")])


def _chunks(infos: Iterable[ObjectInfo], size: int) -> Iterator[list[ObjectInfo]]:
    chunk: list[ObjectInfo] = []
    for info in infos:
        chunk.append(info)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _listing_batch(infos: list[ObjectInfo]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "key": pa.array([info.key for info in infos], pa.string()),
            "etag": pa.array([info.etag for info in infos], pa.string()),
            "size": pa.array([info.size for info in infos], pa.int64()),
            "expected_bytes": pa.array([_expected_bytes(info) for info in infos], pa.float64()),
            "place": pa.array([_place(info.key) for info in infos], pa.uint64()),
        }
    )


def _place(key: str) -> int:
    """Where a key lies in 0..2**64, whatever else is there; shards are equal parts of this range."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def num_shards(photos: pa.Table, shard_bytes: int) -> int:
    """The power of two that keeps shards at `shard_bytes` or less, from the sizes of the photographs.

    A power of two, so that adding pictures moves the others only when their bytes have doubled.
    """
    expected = pc.sum(photos["expected_bytes"]).as_py()
    return 2 ** math.ceil(math.log2(max(1.0, expected / shard_bytes)))


def _expected_bytes(info: ObjectInfo) -> float:
    """Size of its sub-images, roughly."""
    return info.size * _GROWTH.get(_promised_format(info.key) or "", 1.0)


def _promised_format(key: str) -> str | None:
    return codecs.SUFFIXES.get(PurePosixPath(key).suffix.lower())


def plan_shards(photos: pa.Table, config: ShardConfig) -> Iterator[ShardPlan]:
    """Every shard of the set, in order. `photos` comes from `list_photos`.

    A name holds a digest of all that its rows depend on, so what is there under the name is right.
    """
    count = num_shards(photos, config.shard_bytes)
    limits = [bucket * 2**64 // count for bucket in range(1, count)]
    inner = np.searchsorted(photos["place"].to_numpy(), np.array(limits, dtype=np.uint64))
    edges = [0, *(int(edge) for edge in inner), len(photos)]
    for bucket, (begin, end) in enumerate(pairwise(edges)):
        if begin < end:
            yield _plan_shard(photos.slice(begin, end - begin), bucket, count, config)


def _plan_shard(photos: pa.Table, bucket: int, count: int, config: ShardConfig) -> ShardPlan:
    members = sorted(zip(*(photos[name].to_pylist() for name in ("key", "etag", "size")), strict=True))
    made_of = [_FORMAT_VERSION, row_options(config), members]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return ShardPlan(
        f"shard-{bucket:05}-of-{count:05}-{digest}.parquet", tuple(str(member[0]) for member in members)
    )


# ---------------------------------------------------------------- building


def build_shard(source: Store, target: Store, plan: ShardPlan, config: ShardConfig) -> Receipt:
    """Download, decode, cut, encode and write one shard, then its receipt.

    A bad image is a rejected file in the receipt. Memory: one row group, one decoded photograph and a few
    encoded ones. Raises StoreError.
    """
    rejected: list[Rejected] = []
    rows = _Counted(_all_rows(source, plan, config, rejected))
    entry = None
    if rows.has_any():
        entry = write_shard(target, plan.key, rows, config.row_group_bytes)
    receipt = Receipt(entry=entry, num_pixels=rows.num_pixels, rejected=rejected)
    target.put(plan.receipt_key, receipt.model_dump_json(indent=1).encode())
    return receipt


class _Counted:
    """Rows that are counted as they pass."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._first: Row | None = None
        self.num_pixels = 0

    def has_any(self) -> bool:
        self._first = next(self._rows, None)
        return self._first is not None

    def __iter__(self) -> Iterator[Row]:
        row, self._first = self._first, None
        while row is not None:
            self.num_pixels += row.height * row.width
            yield row
            row = next(self._rows, None)


def _all_rows(source: Store, plan: ShardPlan, config: ShardConfig, rejected: list[Rejected]) -> Iterator[Row]:
    """Rows of the plan's photographs in order; a file that is no usable photograph joins `rejected`."""
    for key, download in _downloads(source, plan.photos):
        data = download.result()
        try:
            yield from photo_rows(key, data, config)
        except DataError as error:
            rejected.append(Rejected(key=key, error=type(error).__name__, reason=str(error)))


def _downloads(source: Store, keys: Iterable[str]) -> Iterator[tuple[str, Future[bytes]]]:
    """Each key with its coming content, in order, a few ahead."""
    with ThreadPoolExecutor(_NUM_DOWNLOADS) as pool:
        waiting: deque[tuple[str, Future[bytes]]] = deque()
        for key in keys:
            waiting.append((key, pool.submit(_fetch, source, key)))
            if len(waiting) > _NUM_DOWNLOADS:
                yield waiting.popleft()
        yield from waiting


def _fetch(source: Store, key: str) -> bytes:
    """The whole file when its name promises an image or its first bytes are one, else those bytes.

    A prefix can hold videos and archives; a few bytes are enough to reject them.
    """
    if _promised_format(key) is None:
        head = source.get(key, length=codecs.HEAD_BYTES)
        try:
            codecs.identify(head)
        except DataError:
            return head
    return source.get(key)


def photo_rows(key: str, data: bytes, config: ShardConfig) -> Iterator[Row]:
    """The sub-images of one photograph, row by row. Raises DataError, before the first row."""
    header = codecs.probe(data)
    if min(header.height, header.width) < config.min_size:
        raise ImageTooSmall(
            f"{header.width} x {header.height} pixels; the shorter side must have min_size {config.min_size}"
        )
    image = codecs.to_srgb(codecs.decode(data, max_pixels=config.max_pixels)).rgb8()
    heldout = is_heldout(key, config.heldout_fraction)
    for box in cut(image.height, image.width, config.sub_image_size):
        png = codecs.encode_png(image.pixels[box.slices])
        yield Row(
            key=key,
            x=box.left,
            y=box.top,
            height=box.height,
            width=box.width,
            image=png,
            sha256=hashlib.sha256(png).hexdigest(),
            licence=config.licence,
            domain=config.domain,
            heldout=heldout,
        )


# ---------------------------------------------------------------- the set


def make_index(receipts: Iterable[Receipt], config: ShardConfig) -> ShardIndex:
    """The index of all shards, in the order of `receipts`."""
    receipts = list(receipts)
    entries = [receipt.entry for receipt in receipts if receipt.entry is not None]
    return ShardIndex(
        shards=entries,
        num_images=sum(entry.num_images for entry in entries),
        num_rows=sum(entry.num_rows for entry in entries),
        num_heldout_rows=sum(entry.num_heldout_rows for entry in entries),
        num_pixels=sum(receipt.num_pixels for receipt in receipts),
        num_rejected=sum(len(receipt.rejected) for receipt in receipts),
        options=row_options(config),
    )


def rejected_lines(receipts: Iterable[Receipt]) -> bytes:
    """JSON lines of all rejected files, sorted by key: the content of `rejected.jsonl`."""
    rejected = sorted((each for receipt in receipts for each in receipt.rejected), key=lambda each: each.key)
    return "".join(f"{each.model_dump_json()}\n" for each in rejected).encode()
