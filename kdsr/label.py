"""Teacher outputs, made once and stored beside every sub-image: distilling then waits for no teacher."""

from collections.abc import Iterator
from dataclasses import replace

from kdsr import codecs, shards
from kdsr.config import BicubicDegradation
from kdsr.degrade import build_degradation
from kdsr.errors import RequestError
from kdsr.shards import Row
from kdsr.spec import Card, Frozen, ShardEntry, ShardIndex, TeacherRef
from kdsr.store import Store
from kdsr.upscale import Upscaler
from kdsr.validation import make_pair


class LabelledShard(Frozen):
    """What is written beside a labelled shard, after it."""

    source_sha256: str
    teacher_sha256: str
    entry: ShardEntry


def label_shard(
    source: Store,
    entry: ShardEntry,
    target: Store,
    *,
    upscaler: Upscaler,
    teacher_sha256: str,
    row_group_bytes: int,
) -> ShardEntry:
    """Copy one shard with the column `teacher_sr`: the teacher's SR of every sub-image's bicubic LR.

    The sub-image's largest part that is a multiple of the scale is what the teacher sees. A shard that is
    already there for the same teacher and source is left as it is.
    """
    done = _done(target, entry, teacher_sha256)
    if done is not None:
        return done
    rows = (_labelled(row, upscaler) for row in _rows(source, entry))
    written = shards.write_shard(target, entry.key, rows, row_group_bytes=row_group_bytes)
    note = LabelledShard(source_sha256=entry.sha256, teacher_sha256=teacher_sha256, entry=written)
    target.put(_note_key(entry), note.model_dump_json(indent=1).encode())
    return written


def withdraw_index(index: ShardIndex, target: Store, *, teacher_sha256: str) -> None:
    """Let the set at `target` not exist while shards of it are missing, or are another teacher's.

    Raises RequestError when there is a set without labels: shards of jobs/shard.py are not overwritten.
    """
    if not target.exists(shards.INDEX_KEY):
        return
    if shards.read_index(target).teacher is None:
        raise RequestError(f"{target.uri} holds shards without labels; choose another output")
    if any(_done(target, entry, teacher_sha256) is None for entry in index.shards):
        target.delete(shards.INDEX_KEY)


def labelled_index(index: ShardIndex, entries: list[ShardEntry], card: Card) -> ShardIndex:
    """The index of the labelled set: the same rows, and whose outputs they carry."""
    teacher = TeacherRef(name=card.name, sha256=card.sha256, licence=card.licence)
    return index.model_copy(update={"shards": entries, "teacher": teacher, "teacher_scale": card.spec.scale})


def _done(target: Store, entry: ShardEntry, teacher_sha256: str) -> ShardEntry | None:
    if not (target.exists(_note_key(entry)) and target.exists(entry.key)):
        return None
    note = LabelledShard.model_validate_json(target.get(_note_key(entry)))
    same = note.source_sha256 == entry.sha256 and note.teacher_sha256 == teacher_sha256
    return note.entry if same else None


def _note_key(entry: ShardEntry) -> str:
    return f"{entry.key}.json"


def _rows(store: Store, entry: ShardEntry) -> Iterator[Row]:
    for group in range(len(entry.row_groups)):
        yield from shards.read_row_group(store, entry, group)


def _labelled(row: Row, upscaler: Upscaler) -> Row:
    scale = upscaler.engine.scale
    degrade = build_degradation(BicubicDegradation(), scale)
    pair = make_pair(
        row.key, shards.row_pixels(row, row.image), degrade=degrade, scale=scale, channels=3, seed=0
    )
    return replace(row, teacher_sr=codecs.encode_png(upscaler.upscale(pair.lr).rgb8().pixels))
