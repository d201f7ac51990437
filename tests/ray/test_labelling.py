"""Labelling over Ray's workers: errors reach the person as they are, and nothing half-made is left."""

from pathlib import Path

import pytest

from cluster.label import label
from cluster.shard import shard
from kdsr.config import LabelConfig, ShardConfig, StoredFeatures, TeacherConfig
from kdsr.errors import DataError
from kdsr.shards import read_index, verify
from kdsr.spec import ZoomConfig
from kdsr.store import open_store
from tests.pictures import write_photographs


def sharded(folder: Path) -> LabelConfig:
    """Three photographs as shards, to be labelled by the bundled teacher."""
    write_photographs(folder / "photos", 3)
    shard(ShardConfig(input=str(folder / "photos"), output=str(folder / "shards"), heldout_fraction=0))
    return LabelConfig(
        shards=str(folder / "shards"),
        teacher=TeacherConfig(uri="edsr-small-x4"),
        output=str(folder / "labelled"),
    )


def test_a_broken_shard_is_named_and_no_index_is_left(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = sharded(tmp_path)
    more = {"features": (StoredFeatures(tap="head", rank=4),), "zoom": ZoomConfig(num_crops=2, side=16)}
    config = plain.model_copy(update=more)
    key = read_index(open_store(config.shards)).shards[0].key
    whole = (tmp_path / "shards" / key).read_bytes()
    (tmp_path / "shards" / key).write_bytes(whole[:2000] + bytes(3000) + whole[5000:])
    with pytest.raises(DataError, match=r"shard|photo-"):
        label(config)
    assert not (tmp_path / "labelled/index.json").exists()
    (tmp_path / "shards" / key).write_bytes(whole)
    capsys.readouterr()
    labelled = label(config)
    assert "3/3" in capsys.readouterr().err
    assert labelled.teacher_scale == 4 and labelled.labels is not None
    assert [tap.rank for tap in labelled.labels.taps] == [4] and labelled.labels.zoom == config.zoom
    assert label(config) == labelled


def test_labels_of_another_teacher_replace_the_index_and_leave_what_a_training_may_read(
    ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = sharded(tmp_path)
    first = label(config)
    assert "in no index" not in capsys.readouterr().err
    second = label(config.model_copy(update={"teacher": TeacherConfig(uri="photo-tiny-x4")}))
    assert "2 files of earlier runs" in capsys.readouterr().err
    target = open_store(config.output)
    assert read_index(target) == second
    assert {entry.key for entry in first.shards}.isdisjoint(entry.key for entry in second.shards)
    for entry in (*first.shards, *second.shards):
        verify(target, entry)
