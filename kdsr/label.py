"""What a teacher says, made once and stored beside every sub-image: distilling then waits for no teacher.

Its output for the sub-image's bicubic LR always; features at chosen taps for the same LR, and answers to
zoomed-in inputs, where that is asked for.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Literal

import numpy as np
from pydantic import ValidationError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from kdsr import codecs, shards
from kdsr.config import BicubicDegradation, StoredFeatures
from kdsr.degrade import build_degradation, degradation_name
from kdsr.errors import DataError, RequestError
from kdsr.image import Image
from kdsr.observe import Directions, Observer, fit_directions, reduced
from kdsr.shards import Row, ZoomCrop
from kdsr.spec import (
    OUTPUT_ALONE,
    Card,
    Frozen,
    Labels,
    ShardEntry,
    ShardIndex,
    StoredBasis,
    StoredTap,
    TeacherRef,
    ZoomConfig,
)
from kdsr.store import Store
from kdsr.tiles import Box
from kdsr.upscale import Upscaler
from kdsr.validation import make_pair

DEGRADATION = BicubicDegradation()
_FORMAT_VERSION = 1
"""Of what labels are made of; another one and all are made anew."""
NUM_SAMPLES = 16
"""Sub-images on which the directions of features are fitted."""

LabelPrecision = Literal["float32", "bfloat16"]
"""Type that the teacher is asked to compute in."""


class LabelledShard(Frozen):
    """What is written beside a labelled shard, after it."""

    source_sha256: str
    teacher_sha256: str
    labels: Labels
    precision: LabelPrecision
    entry: ShardEntry


@dataclass(frozen=True)
class Labeller:
    """A teacher, and what is wanted of it."""

    upscaler: Upscaler
    labels: Labels = OUTPUT_ALONE
    observer: Observer | None = None
    """Of the taps in `labels`, where there are any."""
    directions: Mapping[str, Directions] = field(default_factory=dict)
    precision: LabelPrecision = "float32"

    def label(self, row: Row) -> Row:
        """`row` with the teacher's columns, of the largest part that is a multiple of the scale."""
        hr = shards.row_pixels(row, row.image)
        lr = _lr(row, hr, self.upscaler.engine.scale)
        if self.observer is None:
            sr, features = self.upscaler.upscale(lr).rgb8().pixels, {}
        else:
            sr, found = self.observer.look(lr)
            features = {tap.tap: self._stored(tap, found, lr) for tap in self.labels.taps}
        answers = tuple(self._answer(crop, hr) for crop in zoom_places(row, self.labels.zoom))
        return replace(row, teacher_sr=codecs.encode_png(sr), teacher_features=features, zoom=answers)

    def _stored(self, tap: StoredTap, found: Mapping[str, Tensor], lr: Image) -> bytes:
        kept = reduced(found[tap.tap], tap, self.directions.get(tap.tap), lr)
        return shards.write_features(kept)

    def _answer(self, place: Box, hr: np.ndarray) -> ZoomCrop:
        part = np.ascontiguousarray(hr[place.top : place.bottom, place.left : place.right])
        sr = self.upscaler.upscale(Image(part)).rgb8().pixels
        return ZoomCrop(place.left, place.top, codecs.encode_png(sr))


def zoom_places(row: Row, zoom: ZoomConfig | None) -> list[Box]:
    """Parts of `row` for zoomed-in inputs: drawn from its key and position, not larger than it is."""
    if zoom is None:
        return []
    digest = hashlib.sha256(f"zoom {row.key} {row.x} {row.y}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    height, width = min(zoom.side, row.height), min(zoom.side, row.width)
    corners = [
        (int(random.integers(row.height - height + 1)), int(random.integers(row.width - width + 1)))
        for _ in range(zoom.num_crops)
    ]
    return [Box(top, left, top + height, left + width) for top, left in corners]


# ---------------------------------------------------------------- what is asked for


def plan_labels(
    source: Store,
    index: ShardIndex,
    target: Store,
    *,
    card: Card,
    observer: Observer | None,
    features: Sequence[StoredFeatures] = (),
    zoom: ZoomConfig | None = None,
) -> Labels:
    """What shards at `target` will carry; writes the directions of their features, unless they are there.

    Directions once fitted stay, also when photographs are added later. Raises RequestError for a tap whose
    features cannot be stored and for a `target` that holds shards without labels.
    """
    require_labelled(target)
    taps = () if observer is None else observer.describe(features)
    labels = Labels(degradation=degradation_name(DEGRADATION), taps=taps, zoom=zoom)
    if observer is None or all(tap.rank == tap.width for tap in taps):
        return labels
    key = f"directions-{_digest(card, labels)}.safetensors"
    if not target.exists(key):
        target.put(key, _fitted(source, index, taps, observer=observer, scale=card.spec.scale))
    basis = StoredBasis(key=key, sha256=hashlib.sha256(target.get(key)).hexdigest())
    directions = read_directions(target, basis)
    kept = [
        tap.model_copy(update={"kept": directions[tap.tap].kept(tap.rank)}) if tap.tap in directions else tap
        for tap in taps
    ]
    return labels.model_copy(update={"basis": basis, "taps": tuple(kept)})


def read_directions(store: Store, basis: StoredBasis | None) -> dict[str, Directions]:
    """Directions by tap. Raises DataError when the object is not the one that the labels name."""
    if basis is None:
        return {}
    data = store.get(basis.key)
    if hashlib.sha256(data).hexdigest() != basis.sha256:
        raise DataError(f"{store.uri}/{basis.key}: not the directions that the labels name; label again")
    tensors = load_safetensors(data)
    taps = [name.removesuffix("/vectors") for name in tensors if name.endswith("/vectors")]
    return {tap: Directions(tensors[f"{tap}/vectors"], tensors[f"{tap}/energies"]) for tap in taps}


def _fitted(
    source: Store, index: ShardIndex, taps: Sequence[StoredTap], *, observer: Observer, scale: int
) -> bytes:
    """Directions of the taps that are reduced, as safetensors."""
    samples = (
        observer.look(_lr(row, shards.row_pixels(row, row.image), scale))[1]
        for row in _samples(source, index)
    )
    found = fit_directions(samples)
    tensors: dict[str, Tensor] = {}
    for tap in taps:
        if tap.rank < tap.width:
            tensors[f"{tap.tap}/vectors"] = found[tap.tap].vectors.contiguous()
            tensors[f"{tap.tap}/energies"] = found[tap.tap].energies
    return save_safetensors(tensors)


def _samples(source: Store, index: ShardIndex) -> Iterator[Row]:
    """The same sub-images each time: some of evenly spaced row groups, none of them held out."""
    groups = [(entry, group) for entry in index.shards for group in range(len(entry.row_groups))]
    step = max(1, len(groups) // NUM_SAMPLES)
    each = -(-NUM_SAMPLES // len(groups[::step]))
    rows = (
        row for entry, group in groups[::step] for row in islice(_training_rows(source, entry, group), each)
    )
    first = next(rows, None)
    if first is None:
        raise RequestError(f"{source.uri}: all sub-images of the sample are held out; nothing to fit on")
    yield from islice(chain([first], rows), NUM_SAMPLES)


def _training_rows(source: Store, entry: ShardEntry, group: int) -> Iterator[Row]:
    rows = shards.read_row_group(source, entry, group, columns=("image",))
    return (row for row in rows if not row.heldout)


def _digest(card: Card, labels: Labels) -> str:
    """Of what directions depend on beside the sample."""
    what = f"{card.sha256} {labels.degradation} {[tap.tap for tap in labels.taps if tap.rank < tap.width]}"
    return hashlib.sha256(what.encode()).hexdigest()[:12]


# ---------------------------------------------------------------- shards


def labelled_key(entry: ShardEntry, *, teacher_sha256: str, labels: Labels, precision: LabelPrecision) -> str:
    """Name of the labelled copy of a shard.

    It holds a digest of all that the labels depend on (the shard, the teacher, the degradation, what was
    asked for), so what is there under the name is right, and two teachers never share one.
    """
    made_of = [_FORMAT_VERSION, entry.sha256, teacher_sha256, labels.model_dump(mode="json"), precision]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    return f"{entry.key.removesuffix('.parquet')}-{digest}.parquet"


def label_shard(
    source: Store,
    entry: ShardEntry,
    target: Store,
    *,
    labeller: Labeller,
    teacher_sha256: str,
    row_group_bytes: int,
    tell: Callable[[int], object] = lambda _: None,
) -> ShardEntry:
    """Copy one shard with the teacher's columns; one that is whole already is left as it is.

    `tell` is called with the number of rows that are done, after each.
    """
    labels, precision = labeller.labels, labeller.precision
    key = labelled_key(entry, teacher_sha256=teacher_sha256, labels=labels, precision=precision)
    if target.exists(note_key(key)):
        if target.exists(key):
            return _noted(target, key)
        # Killed behind the shard and before its new note, the old note would vouch for what it does not know.
        target.delete(note_key(key))
    rows = _told((labeller.label(row) for row in _rows(source, entry)), tell)
    written = shards.write_shard(target, key, rows, row_group_bytes=row_group_bytes)
    note = LabelledShard(
        source_sha256=entry.sha256,
        teacher_sha256=teacher_sha256,
        labels=labels,
        precision=precision,
        entry=written,
    )
    target.put(note_key(key), note.model_dump_json(indent=1).encode())
    return written


def _noted(target: Store, key: str) -> ShardEntry:
    try:
        return LabelledShard.model_validate_json(target.get(note_key(key))).entry
    except ValidationError:
        raise DataError(
            f"{target.uri}/{note_key(key)} is not what jobs/label.py wrote; delete it and label again"
        ) from None


def _told(rows: Iterable[Row], tell: Callable[[int], object]) -> Iterator[Row]:
    for number, row in enumerate(rows, 1):
        tell(number)
        yield row


def note_key(key: str) -> str:
    """Of the note beside the labelled shard `key`."""
    return f"{key}.json"


def require_labelled(target: Store) -> None:
    """Raise RequestError when there is a set without labels: its index is not replaced by one with them."""
    if target.exists(shards.INDEX_KEY) and shards.read_index(target).teacher is None:
        raise RequestError(f"{target.uri} holds shards without labels; choose another output")


def labelled_index(
    index: ShardIndex, entries: list[ShardEntry], card: Card, labels: Labels = OUTPUT_ALONE
) -> ShardIndex:
    """The index of the labelled set: the same rows, whose labels they carry, and what those are."""
    teacher = TeacherRef(name=card.name, sha256=card.sha256, licence=card.licence)
    found = {"shards": entries, "teacher": teacher, "teacher_scale": card.spec.scale, "labels": labels}
    return index.model_copy(update=found)


def _rows(store: Store, entry: ShardEntry) -> Iterator[Row]:
    for group in range(len(entry.row_groups)):
        yield from shards.read_row_group(store, entry, group, columns=("image",))


def _lr(row: Row, hr: np.ndarray, scale: int) -> Image:
    """The LR that training makes of the sub-image."""
    degrade = build_degradation(DEGRADATION, scale)
    return make_pair(row.key, hr, degrade=degrade, scale=scale, channels=3, seed=0).lr
