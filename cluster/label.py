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
from kdsr.label import label_shard, labelled_index, withdraw_index
from kdsr.progress import progress_bar
from kdsr.shards import read_index, write_index
from kdsr.spec import ShardEntry, ShardIndex
from kdsr.store import open_store
from kdsr.upscale import Upscaler
from kdsr.validation import require_better_than_bicubic

ROW_GROUP_BYTES = 16 * 2**20


def label(config: LabelConfig) -> ShardIndex:
    """Label every shard of `config.shards` and return the index of the labelled set, written last."""
    index = read_index(open_store(config.shards, config.store))
    teacher = load_model(config.teacher.uri, config.store)
    require_teacher_spec(teacher.card, scale=teacher.card.spec.scale, channels=3)
    require_better_than_bicubic(teacher, trained_for=config.teacher.trained_for, force=config.teacher.force)
    session.connect(config.cluster)
    session.require_capacity(config.cluster, reader_cpus=session.READER_CPUS)
    session.leave_terminal_to_our_bar()
    target = open_store(config.output, config.store)
    withdraw_index(index, target, teacher_sha256=teacher.card.sha256)
    try:
        entries = dict(_entries(config, index, teacher.card.sha256))
    except ray.exceptions.RayError as error:
        raise KdsrError(
            f"labelling stopped: {session.last_line(error)}; the same command goes on from here"
        ) from error
    labelled = labelled_index(index, [entries[entry.key] for entry in index.shards], teacher.card)
    write_index(target, labelled)
    return labelled


class _Labeller:
    """One actor: a teacher that waits for shards."""

    def __init__(self, config: LabelConfig, teacher_sha256: str, num_threads: int) -> None:
        self.config, self.teacher_sha256 = config, teacher_sha256
        torch.set_num_threads(min(num_threads, session.cores()))
        model = load_model(config.teacher.uri, config.store).model
        device = "cuda" if config.cluster.use_gpu else "cpu"
        self.upscaler = Upscaler(Engine(model, device=device, precision=config.precision))

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        outcome = {"entry": row["entry"], "error": "", "reason": ""}
        try:
            entry = label_shard(
                open_store(self.config.shards, self.config.store),
                ShardEntry.model_validate_json(row["entry"]),
                open_store(self.config.output, self.config.store),
                upscaler=self.upscaler,
                teacher_sha256=self.teacher_sha256,
                row_group_bytes=ROW_GROUP_BYTES,
            )
        except KdsrError as error:
            return outcome | session.as_values(error)
        return outcome | {"entry": entry.model_dump_json()}


def _entries(config: LabelConfig, index: ShardIndex, teacher_sha256: str) -> Iterator[tuple[str, ShardEntry]]:
    plan = ray.data.from_items([{"entry": entry.model_dump_json()} for entry in index.shards])
    labelled = plan.repartition(len(index.shards)).map(
        _Labeller,
        fn_constructor_args=(config, teacher_sha256, session.worker_threads(config.cluster)),
        compute=ActorPoolStrategy(size=config.cluster.num_workers),
        num_cpus=session.worker_cpus(config.cluster),
        num_gpus=1 if config.cluster.use_gpu else 0,
    )
    with progress_bar(index.num_rows, unit="sub-image") as bar:
        for row in labelled.iter_rows():
            if row["error"]:
                raise session.error_of(row)
            entry = ShardEntry.model_validate_json(row["entry"])
            bar.update(entry.num_rows)
            yield entry.key, entry
