"""Run a teacher over shards with Ray Data: one task is one shard. Knows no pixels."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.actor import ActorHandle
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
    note_key,
    plan_labels,
    read_directions,
    require_labelled,
)
from kdsr.models import SrModel
from kdsr.observe import Observer
from kdsr.progress import progress_bar
from kdsr.shards import read_index, write_index
from kdsr.spec import Labels, ShardEntry, ShardIndex
from kdsr.store import open_store
from kdsr.upscale import Upscaler
from kdsr.validation import require_better_than_bicubic

if TYPE_CHECKING:
    from tqdm import tqdm

ROW_GROUP_BYTES = 16 * 2**20
TALLY_SECONDS, ANSWER_SECONDS = 1.0, 5.0


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
    try:
        entries = dict(_entries(config, index, teacher.card.sha256, labels))
    except ray.exceptions.RayError as error:
        raise KdsrError(
            f"labelling stopped: {session.last_line(error)}; the same command goes on from here"
        ) from error
    labelled = labelled_index(index, [entries[entry.key] for entry in index.shards], teacher.card, labels)
    write_index(target, labelled)
    keys = {entry.key for entry in labelled.shards}
    session.tell_leftovers(target, keep=keys | {note_key(key) for key in keys})
    return labelled


class _Tally:
    """How many sub-images of each shard are labelled. One actor for all, so that a large shard has an ETA."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def tell(self, key: str, num_rows: int) -> None:
        """So many of shard `key`: fewer than before where a lost worker's shard is begun again."""
        self._done[key] = num_rows

    def total(self) -> int:
        """Of all shards."""
        return sum(self._done.values())


class _Labeller:
    """One actor: a teacher that waits for shards."""

    def __init__(
        self,
        config: LabelConfig,
        teacher_sha256: str,
        labels: Labels,
        num_threads: int,
        tally: "ActorHandle[Any]",
    ) -> None:
        self.config, self.teacher_sha256, self.tally = config, teacher_sha256, tally
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
        outcome = {"key": row["key"], "entry": "", "error": "", "reason": ""}
        try:
            entry = label_shard(
                open_store(self.config.shards, self.config.store),
                ShardEntry.model_validate_json(row["entry"]),
                open_store(self.config.output, self.config.store),
                labeller=self.labeller,
                teacher_sha256=self.teacher_sha256,
                row_group_bytes=ROW_GROUP_BYTES,
                tell=partial(self.tally.tell.remote, row["key"]),
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
    plan = ray.data.from_items(
        [{"key": entry.key, "entry": entry.model_dump_json()} for entry in index.shards]
    )
    tally = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tally).remote()
    num_threads = session.worker_threads(config.cluster)
    labelled = plan.repartition(len(index.shards)).map(
        _Labeller,
        fn_constructor_args=(config, teacher_sha256, labels, num_threads, tally),
        compute=ActorPoolStrategy(size=config.cluster.most_workers),
        num_cpus=session.worker_cpus(config.cluster, reader_cpus=session.READER_CPUS),
        num_gpus=1 if config.cluster.use_gpu else 0,
    )
    with progress_bar(index.num_rows, unit="sub-image") as bar, _moved_by(tally, bar):
        for row in labelled.iter_rows():
            if row["error"]:
                raise session.error_of(row)
            entry = ShardEntry.model_validate_json(row["entry"])
            tally.tell.remote(row["key"], entry.num_rows)
            yield row["key"], entry


@contextmanager
def _moved_by(tally: "ActorHandle[Any]", bar: "tqdm[Any]") -> Iterator[None]:
    """Let `bar` show within the block, and once behind it, what is told to `tally`."""
    over = threading.Event()

    def show() -> None:
        # A bar that stands still is no reason to lose labels, or to hide why they stopped.
        with suppress(ray.exceptions.RayError):
            bar.update(ray.get(tally.total.remote(), timeout=ANSWER_SECONDS) - bar.n)

    def follow() -> None:
        while not over.wait(TALLY_SECONDS):
            show()

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join(2 * ANSWER_SECONDS)
    show()
