"""Run a teacher over shards with Ray Data: one task is one shard. Knows no pixels."""

from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.data import ActorPoolStrategy

from cluster import session
from kdsr.checkpoint import load_model, require_teacher_spec
from kdsr.config import LabelConfig
from kdsr.engine import Engine
from kdsr.errors import KdsrError
from kdsr.label import (
    Labeller,
    label_shard,
    labelled_index,
    plan_labels,
    read_directions,
    require_labelled,
    withdraw_index,
)
from kdsr.models import SrModel
from kdsr.observe import Observer
from kdsr.progress import progress_bar
from kdsr.shards import read_index, write_index
from kdsr.spec import Labels, ShardEntry, ShardIndex
from kdsr.store import open_store
from kdsr.upscale import Upscaler
from kdsr.validation import require_better_than_bicubic

ROW_GROUP_BYTES = 16 * 2**20


def label(config: LabelConfig) -> ShardIndex:
    """Label every shard of `config.shards` and return the index of the labelled set, written last."""
    source, target = open_store(config.shards, config.store), open_store(config.output, config.store)
    index = read_index(source)
    require_labelled(target)
    teacher = load_model(config.teacher.uri, config.store)
    require_teacher_spec(teacher.card, scale=teacher.card.spec.scale, channels=3)
    require_better_than_bicubic(teacher, trained_for=config.teacher.trained_for, force=config.teacher.force)
    session.connect(config.cluster)
    session.await_capacity(config.cluster, reader_cpus=session.READER_CPUS)
    session.leave_terminal_to_our_bar()
    labels = plan_labels(
        source,
        index,
        target,
        card=teacher.card,
        observer=_observer(config, teacher.model, "cpu"),
        features=config.features,
        zoom=config.zoom,
    )
    withdraw_index(
        index, target, teacher_sha256=teacher.card.sha256, labels=labels, precision=config.precision
    )
    try:
        entries = dict(_entries(config, index, teacher.card.sha256, labels))
    except ray.exceptions.RayError as error:
        raise KdsrError(
            f"labelling stopped: {session.last_line(error)}; the same command goes on from here"
        ) from error
    labelled = labelled_index(index, [entries[entry.key] for entry in index.shards], teacher.card, labels)
    write_index(target, labelled)
    return labelled


class _Labeller:
    """One actor: a teacher that waits for shards."""

    def __init__(self, config: LabelConfig, teacher_sha256: str, labels: Labels, num_threads: int) -> None:
        self.config, self.teacher_sha256 = config, teacher_sha256
        torch.set_num_threads(min(num_threads, session.cores()))
        model = load_model(config.teacher.uri, config.store).model
        device = "cuda" if config.cluster.use_gpu else "cpu"
        target = open_store(config.output, config.store)
        self.labeller = Labeller(
            Upscaler(Engine(model, device=device, precision=config.precision)),
            labels,
            _observer(config, model, device),
            read_directions(target, labels.basis),
            config.precision,
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        outcome = {"entry": row["entry"], "error": "", "reason": ""}
        try:
            entry = label_shard(
                open_store(self.config.shards, self.config.store),
                ShardEntry.model_validate_json(row["entry"]),
                open_store(self.config.output, self.config.store),
                labeller=self.labeller,
                teacher_sha256=self.teacher_sha256,
                row_group_bytes=ROW_GROUP_BYTES,
            )
        except KdsrError as error:
            return outcome | session.as_values(error)
        return outcome | {"entry": entry.model_dump_json()}


def _observer(config: LabelConfig, model: SrModel, device: str) -> Observer | None:
    taps = [stored.tap for stored in config.features]
    return Observer(model, taps, device=device, precision=config.precision) if taps else None


def _entries(
    config: LabelConfig, index: ShardIndex, teacher_sha256: str, labels: Labels
) -> Iterator[tuple[str, ShardEntry]]:
    plan = ray.data.from_items([{"entry": entry.model_dump_json()} for entry in index.shards])
    labelled = plan.repartition(len(index.shards)).map(
        _Labeller,
        fn_constructor_args=(config, teacher_sha256, labels, session.worker_threads(config.cluster)),
        compute=ActorPoolStrategy(size=config.cluster.most_workers),
        num_cpus=session.worker_cpus(config.cluster, reader_cpus=session.READER_CPUS),
        num_gpus=1 if config.cluster.use_gpu else 0,
    )
    with progress_bar(index.num_rows, unit="sub-image") as bar:
        for row in labelled.iter_rows():
            if row["error"]:
                raise session.error_of(row)
            entry = ShardEntry.model_validate_json(row["entry"])
            bar.update(entry.num_rows)
            yield entry.key, entry
