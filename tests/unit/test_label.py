"""Teacher outputs in shards: those of the teacher for the LR that training makes, made once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdsr import codecs
from kdsr.config import BicubicDegradation, DataConfig
from kdsr.degrade import build_degradation
from kdsr.engine import Engine
from kdsr.errors import DataError, RequestError, StoreError
from kdsr.label import Labeller, label_shard, labelled_index, require_labelled
from kdsr.models import build_model
from kdsr.pairs import PairMaker, PatchReader
from kdsr.shards import read_index, read_row_group, verify, write_index
from kdsr.spec import Card, EspcnSpec
from kdsr.store import open_store
from kdsr.upscale import Upscaler
from kdsr.validation import make_pair
from tests.dying import Dying
from tests.pictures import photograph
from tests.small_shards import row, write_set

SIZES = [(40, 44), (41, 47), (33, 32)]
SPEC = EspcnSpec(scale=2, num_features=4)
CARD = Card(name="teacher", spec=SPEC, num_parameters=1, sha256="a" * 64, licence="MIT")
DEGRADE = build_degradation(BicubicDegradation(), 2)


@pytest.fixture(scope="module")
def upscaler():
    torch.manual_seed(0)
    model = build_model(SPEC)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return Upscaler(Engine(model))


@pytest.fixture
def place(tmp_path):
    """The source with its index, and an empty target."""
    source, target = (open_store(f"file://{tmp_path}/{name}") for name in ("shards", "labelled"))
    rows = [
        row(f"photo-{i}", photograph(i, height=height, width=width), heldout=i == 1)
        for i, (height, width) in enumerate(SIZES)
    ]
    return source, write_set(source, [rows[:2], rows[2:]]), target


def label(place, upscaler, *, sha256=CARD.sha256, precision="float32"):
    source, index, target = place
    labeller = Labeller(upscaler, precision=precision)
    return [
        label_shard(source, entry, target, labeller=labeller, teacher_sha256=sha256, row_group_bytes=1)
        for entry in index.shards
    ]


def rows_of(store, entries):
    return [
        r for entry in entries for g in range(len(entry.row_groups)) for r in read_row_group(store, entry, g)
    ]


def test_every_row_carries_the_teachers_output_for_its_bicubic_lr(place, upscaler):
    source, index, target = place
    entries = label(place, upscaler)
    before, after = rows_of(source, index.shards), rows_of(target, entries)
    assert [replace(r, teacher_sr=None) for r in after] == before
    for own in after:
        hr = codecs.decode_png(own.image)
        lr = make_pair("", hr, degrade=DEGRADE, scale=2, channels=3, seed=0).lr
        found = codecs.decode_png(own.teacher_sr)
        assert np.array_equal(found, upscaler.upscale(lr).pixels)
        assert found.shape == (own.height // 2 * 2, own.width // 2 * 2, 3)
        assert found.std() > 1


def test_entries_describe_what_was_written(place, upscaler):
    _, index, target = place
    for entry, source_entry in zip(label(place, upscaler), index.shards, strict=True):
        verify(target, entry)
        assert entry.sha256 != source_entry.sha256
        assert entry.key.startswith(source_entry.key.removesuffix(".parquet"))
        assert (entry.num_rows, entry.num_heldout_rows) == (
            source_entry.num_rows,
            source_entry.num_heldout_rows,
        )


def test_the_index_of_the_labelled_set_names_the_teacher(place, upscaler):
    _, index, target = place
    labelled = labelled_index(index, label(place, upscaler), CARD)
    write_index(target, labelled)
    found = read_index(target)
    assert found == labelled and found.num_rows == index.num_rows and found.options == index.options
    assert found.teacher.sha256 == CARD.sha256 and found.teacher.licence == "MIT" and found.teacher_scale == 2


def test_training_reads_what_the_teacher_says_of_its_own_lr(place, upscaler):
    """A stored output and a live teacher agree inside a patch, where no border matters."""
    _, index, target = place
    labelled = labelled_index(index, label(place, upscaler), CARD)
    reader = PatchReader(
        store=target,
        index=labelled,
        data=DataConfig(shards=target.uri, patch_size=12, patches_per_row=4, window_rows=4, augment=False),
        scale=2,
        context=2,
        batch_size=8,
        seed=0,
    )
    stream = reader.batches()
    pair = PairMaker(DEGRADE, 2, 2, 3, torch.device("cpu"))(next(stream))
    stream.close()
    lr = (pair.lr * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    live = upscaler.engine.run(lr)[:, 8:-8, 8:-8].astype(int)
    stored = (pair.teacher_sr * 255).round().int().permute(0, 2, 3, 1).numpy()[:, 8:-8, 8:-8]
    assert np.abs(live - stored).max() <= 1


def files(store):
    return {info.key: (info.etag, store.get(info.key)) for info in store.list()}


def test_a_rerun_leaves_every_byte_alone(place, upscaler):
    first = label(place, upscaler)
    before = files(place[2])
    assert label(place, upscaler) == first
    assert files(place[2]) == before


def test_a_rerun_makes_only_what_is_missing(place, upscaler):
    first = label(place, upscaler)
    _, _, target = place
    before = files(target)
    target.delete(first[0].key)
    target.delete(f"{first[1].key}.json")
    assert label(place, upscaler) == first
    after = files(target)
    assert {key: data for key, (_, data) in after.items()} == {key: data for key, (_, data) in before.items()}


def test_another_teacher_precision_or_source_is_labelled_beside_what_is_there(place, upscaler):
    """A training may read the older labels; its index goes on telling the truth."""
    source, index, target = place
    first = label(place, upscaler)
    write_index(target, labelled_index(index, first, CARD))
    before = files(target)
    other = Upscaler(Engine(build_model(SPEC)))
    second = label(place, other, sha256="b" * 64)
    third = label(place, upscaler, precision="bfloat16")
    assert all(a.sha256 != b.sha256 for a, b in zip(first, second, strict=True))
    changed = write_set(source, [[row("new", photograph(9, height=40, width=40))], []][:1])
    (fourth,) = label((source, changed, target), other, sha256="b" * 64)
    assert [r.key for r in rows_of(target, [fourth])] == ["new"]
    assert len({entry.key for entry in (*first, *second, *third, fourth)}) == 2 + 2 + 2 + 1
    assert files(target).items() >= before.items()
    for entry in (*first, *second, *third):
        verify(target, entry)


@pytest.mark.parametrize("writes", [0, 1])
def test_a_note_whose_shard_is_gone_does_not_vouch_for_one_that_was_cut_off(place, upscaler, writes):
    """Killed before it says goodbye to the old note, or when the new shard is there and its note is not."""
    source, index, target = place
    first = label(place, upscaler)
    target.delete(first[0].key)
    with pytest.raises(StoreError, match=r"died before it could .*\.json"):
        label((source, index, Dying(target, after=writes)), upscaler)
    assert label(place, upscaler) == first
    for entry in first:
        verify(target, entry)


def test_a_note_that_is_no_note_is_named(place, upscaler):
    first = label(place, upscaler)
    place[2].put(f"{first[1].key}.json", b"{}")
    with pytest.raises(DataError, match=rf"{first[1].key}\.json is not what .* delete it and label again"):
        label(place, upscaler)


def test_labels_can_be_labelled_again(place, upscaler):
    _, index, target = place
    labelled = labelled_index(index, label(place, upscaler), CARD)
    again = open_store(f"{target.uri}-again")
    other = Upscaler(Engine(build_model(SPEC)))
    entries = label((target, labelled, again), other, sha256="b" * 64)
    old, new = rows_of(target, labelled.shards), rows_of(again, entries)
    assert [r.image for r in old] == [r.image for r in new]
    assert all(a.teacher_sr != b.teacher_sr for a, b in zip(old, new, strict=True))


def test_shards_without_labels_are_not_overwritten(place):
    source, index, _ = place
    with pytest.raises(RequestError, match="holds shards without labels; choose another output"):
        require_labelled(source)
    assert read_index(source) == index


def test_a_grey_teacher_cannot_label_colours(place):
    grey = Upscaler(Engine(build_model(EspcnSpec(scale=2, channels=1, num_features=4))))
    with pytest.raises(RequestError, match="the network is for grey images"):
        label(place, grey)
