"""A whole training run on one worker: from a config to its parts, then train, log, validate, save, export.

Knows no cluster: `Worker` tells which part of the work is this process's, and how to wrap the network.
"""

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from kdsr import provenance, shards
from kdsr.background import Background
from kdsr.checkpoint import (
    POINTERS,
    Entry,
    StateStore,
    copied,
    is_imported,
    load_card,
    load_judge,
    load_model,
    require_teacher_spec,
    save_model,
)
from kdsr.config import (
    Degradation,
    DistillConfig,
    StoreConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from kdsr.degrade import build_degradation, degradation_name
from kdsr.engine import Engine, keep_freed_memory
from kdsr.errors import CheckpointCorrupt, DataError, KdsrError, KeyNotFound, RequestError
from kdsr.fit import StepReport, TrainState, fit, new_state, share_gradients
from kdsr.memory import is_sharded, recompute_blocks, shard
from kdsr.models import (
    build_model,
    drop_channels,
    fold,
    inherit_slice,
    inherit_weights,
    require_shareable,
    require_slice,
    share_extractor,
)
from kdsr.models.vgg import Vgg
from kdsr.objectives import (
    Ensemble,
    Objective,
    build_objective,
    label_columns,
    needs_live_teacher,
    needs_teacher,
    stored_ranks,
    why_live,
)
from kdsr.objectives.step import Taps, require_tap, tap_grids, tap_names
from kdsr.pairs import Cursor, PairBatch, PairMaker, PatchBatch, PatchReader, made_ahead, mixed_seed
from kdsr.spec import Card, Frozen, Goal, ModelSpec, ShardIndex, TeacherRef
from kdsr.store import Store, open_store
from kdsr.terms import (
    AdversarialTerm,
    AttendedTerm,
    CriticTerm,
    FusionTerm,
    GradientBalance,
    PerceptualTerm,
    TappedTerm,
    UncertaintyBalance,
    always_reach_output,
    falls_below_zero,
    moment_without,
)
from kdsr.tracking import MlflowRun, begin_mlflow
from kdsr.upscale import Upscaler
from kdsr.validation import (
    heldout_pairs,
    mean_psnr_y,
    require_better_than_bicubic,
    training_pairs,
    training_pictures,
)

log = logging.getLogger(__name__)

RunConfig = TeacherTrainingConfig | DistillConfig

# What may change between two starts of one run without making it another run.
FREE_FIELDS = {
    "cluster",
    "data.num_threads",
    "log_every_steps",
    "memory",
    "micro_batch",
    "save_every_steps",
    "store",
    "tracking",
    "validate_every_steps",
}

HELD_OUT = "heldout_psnr_y"
"""The metric that chooses among checkpoints, and among runs."""
BEGUN_KEY = "begun.json"
LOOKS = AdversarialTerm | PerceptualTerm
"""Terms that leave the mean of what HR may be, which PSNR asks for, for something that looks right."""
LEAST_PLACES = 9
"""What attention is told apart over, and what the convolutions of a fusion see at once."""


@dataclass(frozen=True)
class Worker:
    """This process's part in a run."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda model: model
    """Makes the network data-parallel."""
    batches: Callable[[PatchReader, Cursor], Iterator[PatchBatch]] = PatchReader.batches
    """Reads this process's part of every step from a cursor on."""
    command: str = field(default_factory=provenance.command)
    """What a person typed to start the run, for the model card."""
    total: Callable[[list[float]], list[float]] = lambda values: values
    """Sums over all workers, each of which gives as many numbers, and calls it as often, as the others."""
    is_told_to_leave: Callable[[], bool] = lambda: False
    """Whether somebody wants this worker's place; then all of them save once and leave."""


@dataclass(frozen=True)
class Save:
    """What one checkpoint took."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Progress:
    """What a run tells its caller every `log_every_steps`."""

    step: int
    metrics: dict[str, float]
    saves: tuple[Save, ...] = ()
    """Checkpoints since the last one."""


class Sources(Frozen):
    """Which data and teachers a run learns from, whatever lies at their places by now."""

    shards_sha256: str
    """See `kdsr.shards.digest`."""
    teacher_sha256: tuple[str, ...]
    """Of each teacher, in the order of the config; none where nothing is asked of any."""


class Begun(Frozen):
    """`begun.json` beside a run's config: what the config does not say of the run that began."""

    version: Literal[1] = 1
    sources: Sources
    precision: Literal["float32", "bfloat16"]
    """Of the forward pass of all workers."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads: all of it checked."""

    index: ShardIndex
    teachers: tuple[TeacherRef, ...]
    goals: tuple[Goal, ...] = ()
    """What each teacher was trained for."""

    @property
    def sources(self) -> Sources:
        """What identifies it."""
        teachers = tuple(teacher.sha256 for teacher in self.teachers)
        return Sources(shards_sha256=shards.digest(self.index), teacher_sha256=teachers)


def check(config: RunConfig) -> Inputs:
    """Refuse what cannot work, before any worker starts.

    Raises RequestError for shards that are not complete, for a teacher of another scale or other channels or
    none the better than bicubic, for an extractor that cannot be shared, for taps that do not exist or see
    too little, for stored outputs of another teacher or another LR, for a network that cannot begin from
    `init_from`, and for a run of this name with other settings, or begun on other shards or teachers.
    """
    index = shards.read_index(open_store(config.data.shards, config.store))
    if index.num_rows == index.num_heldout_rows:
        raise RequestError(
            f"{config.data.shards}: all {index.num_rows} rows are held out; make shards with a smaller "
            f"heldout_fraction"
        )
    _check_patches(config)
    _check_balance(config)
    _check_judges(config)
    inputs = _check_teachers(config, index) if _asks_teacher(config) else Inputs(index, teachers=())
    if config.init_from is not None:
        _check_first_weights(config, load_card(config.init_from, config.store))
    _require_same_run(run_store(config), config)
    _require_same_sources(config, inputs.sources)
    return inputs


class LastSave(NamedTuple):
    """A checkpoint, and which object it is: a damaged one that was made again is another."""

    step: int
    key: str
    etag: str


def last_save(config: RunConfig) -> LastSave | None:
    """What a start of this run goes on from, when that is whole; None for one that has saved nothing."""
    if (entry := _last_entry(config)) is None:
        return None
    try:
        return LastSave(entry.step, entry.key, run_store(config).stat(entry.key).etag)
    except KeyNotFound:
        return LastSave(entry.step, entry.key, "")


def saved_step(config: RunConfig) -> int:
    """The step that a start of this run goes on from, when what was saved there is whole."""
    entry = _last_entry(config)
    return 0 if entry is None else entry.step


def _last_entry(config: RunConfig) -> Entry | None:
    states = StateStore(run_store(config))
    for pointer in POINTERS:
        with contextlib.suppress(CheckpointCorrupt):
            if (entry := states.entry(pointer)) is not None:
                return entry
    return None


def logged(config: RunConfig) -> list[dict[str, float]]:
    """What the run has logged, a dict for each step that it logged."""
    try:
        lines = run_store(config).get("metrics.jsonl").decode().splitlines()
    except KeyNotFound:
        return []
    return [json.loads(line) for line in lines]


def discard_checkpoints(config: RunConfig) -> None:
    """Free what only a run that goes on would need."""
    store = run_store(config)
    for info in list(store.list("checkpoints/")):
        store.delete(info.key)


def exported_card(config: RunConfig) -> Card | None:
    """The card of the exported model when this run has nothing left to do."""
    if saved_step(config) < config.num_steps:
        return None
    try:
        return load_card(f"{run_store(config).uri}/model", config.store)
    except RequestError:
        return None


def train(config: RunConfig, worker: Worker = Worker()) -> Iterator[Progress]:
    """Run, or go on with, the training that `config` asks for; only rank 0 yields where it validates.

    Rank 0 writes `config.json`, `begun.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and at the end
    `model/` under the run's name, all but the model beside the steps. A worker that is told to leave ends the
    run of all of them after its step, with a checkpoint and before `num_steps`. Raises NonFiniteLoss with the
    last good checkpoint kept, and CheckpointCorrupt when there are checkpoints and all of them are damaged.
    """
    inputs = check(config)
    keep_freed_memory()
    state, objective = _begin(config, inputs, worker)
    states, history = StateStore(run_store(config)), History(run_store(config), _tracker(config, worker))
    unlogged: list[StepReport] = []
    if (saved := states.load(*POINTERS)) is not None:
        state.load_state_dict(saved)
        unlogged = [StepReport(**report) for report in saved.get("unlogged", [])]
    history.resume(state.step)
    precision = _precision(config, worker)
    if worker.rank == 0:
        _write_down(config, Begun(sources=inputs.sources, precision=precision))
    batches = _pairs(config, inputs, state.cursor, worker)
    reports = _fit(config, state, objective, batches, worker, autocast_type(precision, worker.device))
    validate = _validator(config, inputs.index, worker, state)
    saver = _Saver(states, history)
    try:
        yield from _consume(config, worker, state, reports, unlogged, saver, validate)
    except KdsrError:
        history.end("FAILED")
        raise
    finally:
        saver.close()
        history.close()
    if worker.rank == 0 and state.step == config.num_steps:
        _export(config, inputs, worker, states, history)
        history.end("FINISHED")


def rehearse(
    config: RunConfig, worker: Worker = Worker(), *, num_batches: int = 4
) -> tuple[TrainState, Iterator[StepReport]]:
    """A run that leaves nothing behind and never waits for data, to measure its steps.

    It takes a few batches, read before it begins, again and again. Raises what `check` raises.
    """
    inputs = check(config)
    keep_freed_memory()
    state, objective = _begin(config, inputs, worker)
    batches = list(islice(_pairs(config, inputs, state.cursor, worker), num_batches))
    autocast = autocast_type(config.precision, worker.device)
    return state, _fit(config, state, objective, cycle(batches), worker, autocast)


def _consume(
    config: RunConfig,
    worker: Worker,
    state: TrainState,
    reports: Iterator[StepReport],
    unlogged: list[StepReport],
    saver: "_Saver",
    validate: Callable[[TrainState], dict[str, float]] | None,
) -> Iterator[Progress]:
    """Log, validate and save at the steps that `config` names, at the last, and where workers leave."""
    history = saver.history
    saves: list[Save] = []
    in_parts = is_sharded(state.model)
    for own in reports:
        report, leaves = _of_all_workers(own, worker, config.batch_size)
        unlogged.append(report)
        last = report.step == config.num_steps
        metrics: dict[str, float] = {}
        if last or report.step % config.log_every_steps == 0:
            metrics = _summarise(unlogged, config.batch_size)
            unlogged.clear()
        measured = validate is not None and (last or report.step % config.validate_every_steps == 0)
        if validate is not None and measured:
            metrics |= validate(state)
        if metrics and worker.rank == 0:
            history.add(report.step, metrics)
        is_best = HELD_OUT in metrics and history.best_step() == report.step
        if in_parts and measured:
            is_best = worker.total([float(is_best)]) == [1.0]  # only the first worker knows
        due = last or leaves or is_best or report.step % config.save_every_steps == 0
        if due and in_parts and worker.rank > 0:
            state.state_dict()  # the first worker puts it together out of all parts
        if due and worker.rank == 0:
            # `latest` goes last: a run that is killed between the two finds its best step again.
            saver.start(state, unlogged, ("best", "latest") if is_best else ("latest",))
        saves += saver.finish() if last or leaves else saver.done()
        if metrics or leaves:
            yield Progress(report.step, metrics, tuple(saves))
            saves = []
        if leaves:
            return


def _of_all_workers(report: StepReport, worker: Worker, batch_size: int) -> tuple[StepReport, bool]:
    """The step with the losses of the whole batch, and whether any worker was told to leave."""
    share = report.num_patches / batch_size
    names = sorted(report.losses)
    leaves, *losses = worker.total(
        [float(worker.is_told_to_leave()), *(report.losses[name] * share for name in names)]
    )
    return replace(report, losses=dict(zip(names, losses, strict=True))), leaves > 0


class _Saver:
    """Writes history and checkpoints of a run while it goes on, one after the other."""

    def __init__(self, states: StateStore, history: "History") -> None:
        self.history = history
        self._states = states
        self._background = Background[Save]()

    def start(self, state: TrainState, unlogged: Sequence[StepReport], pointers: Sequence[str]) -> None:
        """Save `state` as it is now. Waits for the save before, and raises its StoreError."""
        self._background.settle()  # before the copy: there is memory for one of them
        whole = copied(state.state_dict()) | {"unlogged": [asdict(report) for report in unlogged]}
        put_history = self.history.as_it_is()
        self._background.start(partial(self._save, whole, put_history, pointers))

    def _save(self, state: dict[str, Any], put_history: Callable[[], None], pointers: Sequence[str]) -> Save:
        began = time.perf_counter()
        put_history()
        num_bytes = self._states.save(state, step=state["step"], pointers=pointers)
        return Save(time.perf_counter() - began, num_bytes)

    def done(self) -> list[Save]:
        """Saves that were finished since. Raises StoreError when one could not be."""
        return self._background.results()

    def finish(self) -> list[Save]:
        """The same, with the one that is under way."""
        return self._background.finish()

    def close(self) -> None:
        """Let the one that is under way come to its end."""
        self._background.close()


def _summarise(reports: Sequence[StepReport], batch_size: int) -> dict[str, float]:
    seconds = sum(report.seconds for report in reports)
    names = sorted({name for report in reports for name in report.losses})
    terms = {name: _mean([r.losses[name] for r in reports if name in r.losses]) for name in names}
    details = {name: value for report in reports for name, value in report.details.items()}
    return {
        "loss": _mean([report.loss for report in reports]),
        **terms,
        **details,
        "learning_rate": reports[-1].learning_rate,
        "gradient_norm": _mean([report.gradient_norm for report in reports]),
        "patches_per_second": batch_size * len(reports) / seconds,
        "waiting_share": sum(report.waiting_seconds for report in reports) / seconds,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---------------------------------------------------------------- parts


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 where asked, or with "auto" where the device multiplies it natively; else None."""
    if precision == "float32":
        return None
    if precision == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def _precision(config: RunConfig, worker: Worker) -> Literal["float32", "bfloat16"]:
    """What the forward pass has where the run began; with "auto" what suits its first worker, for all."""
    if config.precision != "auto":
        return config.precision
    begun = _begun(config)
    if begun is None:
        takes_bfloat16 = autocast_type("auto", worker.device) is not None
    else:
        takes_bfloat16 = begun.precision == "bfloat16"
    (counted,) = worker.total([float(worker.rank == 0 and takes_bfloat16)])
    return "bfloat16" if counted else "float32"


def _begin(config: RunConfig, inputs: Inputs, worker: Worker) -> tuple[TrainState, Objective]:
    """A run that has not begun, the same for the same seed."""
    torch.manual_seed(config.seed)
    state = _start(config, inputs.index, worker)
    objective = _objective(config, inputs, state, worker)
    state.train_too(objective)
    return state, objective


def _fit(
    config: RunConfig,
    state: TrainState,
    objective: Objective,
    batches: Iterator[tuple[PairBatch, Cursor]],
    worker: Worker,
    autocast: torch.dtype | None,
) -> Iterator[StepReport]:
    return fit(
        state,
        objective,
        batches,
        until_step=config.num_steps,
        seed=mixed_seed(config.seed, worker.rank),
        autocast=autocast,
        after_step=objective.after_step,
        micro_batch=config.micro_batch,
        apart=objective.apart,
        share=None if always_reach_output(config.terms) else share_gradients,
    )


def _start(config: RunConfig, index: ShardIndex, worker: Worker) -> TrainState:
    model = build_model(config.model)
    slices = config.init_from is not None and config.inherit == "slice"
    pictures = _pictures(config, index) if slices or _shares_extractor(config) else None
    if config.init_from is not None:
        source = load_model(config.init_from, config.store).model
        taken = inherit_slice(model, source, pictures) if slices else inherit_weights(model, source)
        if taken == 0:
            raise RequestError(
                f"init_from {config.init_from}: no layer has a name and shape of {config.model.kind}; "
                f"take a model of the same kind and width"
            )
        log.info("took %d layers from %s", taken, config.init_from)
    if _shares_extractor(config):
        assert isinstance(config, DistillConfig)
        share_extractor(model, load_model(config.teacher.uri, config.store).model, pictures)
    trains_teacher = isinstance(config, TeacherTrainingConfig)
    place = partial(_place, device=worker.device, in_parts=trains_teacher and _shards_teacher(config, worker))
    state = new_state(model.train(), config.optimizer, num_steps=config.num_steps, place=place)
    drop_channels(state.model, config.dropout)
    if config.memory.recompute_blocks:
        recompute_blocks(state.model)
    return state


def _shards_teacher(config: RunConfig, worker: Worker) -> bool:
    return config.memory.shard_teacher and worker.world_size > 1


def _place(network: nn.Module, *, device: torch.device, in_parts: bool) -> None:
    """Bring a network, or this worker's part of it, to its device."""
    if in_parts:
        shard(network, device)
    else:
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _pictures(config: RunConfig, index: ShardIndex) -> Tensor | None:
    """LR of the run's own images, as they come to the network."""
    return training_pictures(
        open_store(config.data.shards, config.store),
        index,
        degrade=build_degradation(config.data.degradation, config.model.scale),
        scale=config.model.scale,
        channels=config.model.channels,
        least_side=config.data.patch_size,
    )


def _objective(config: RunConfig, inputs: Inputs, state: TrainState, worker: Worker) -> Objective:
    objective = build_objective(
        state.model,
        config.terms,
        teacher=_live_teacher(config, inputs, worker),
        balance=config.balance,
        scale=config.model.scale,
        channels=config.model.channels,
        stored=stored_ranks(config.terms, inputs.index) if inputs.teachers else {},
        networks={uri: _judge(uri, config).to(worker.device) for uri in _judges(config)},
        # What is in parts shares gradients already.
        wrap=lambda module: module if is_sharded(module) else worker.wrap(module),
    )
    return objective.to(worker.device)


def patch_reader(config: RunConfig, index: ShardIndex, *, rank: int = 0, world_size: int = 1) -> PatchReader:
    """What reads the patches of a run for one worker."""
    labels = label_columns(config.terms, index) if _asks_teacher(config) else ()
    return PatchReader(
        store=open_store(config.data.shards, config.store),
        index=index,
        data=config.data,
        scale=config.model.scale,
        context=build_degradation(config.data.degradation, config.model.scale).context,
        batch_size=config.batch_size,
        seed=config.seed,
        columns=("image", *labels),
        rank=rank,
        world_size=world_size,
    )


def _pairs(
    config: RunConfig, inputs: Inputs, start: Cursor, worker: Worker
) -> Iterator[tuple[PairBatch, Cursor]]:
    if config.data.reader == "ray_data" and worker.batches is PatchReader.batches:
        raise RequestError(
            "data.reader ray_data feeds the workers of jobs/distill.py and jobs/train_teacher.py only, and "
            "this run is none of theirs; set it to lanes"
        )
    degradation = build_degradation(config.data.degradation, config.model.scale)
    reader = patch_reader(config, inputs.index, rank=worker.rank, world_size=worker.world_size)
    make = PairMaker(
        degradation, config.model.scale, degradation.context, config.model.channels, worker.device
    )
    return made_ahead(make, worker.batches(reader, start))


def _check_teachers(config: RunConfig, index: ShardIndex) -> Inputs:
    assert isinstance(config, DistillConfig)
    cards = [load_card(teacher.uri, config.store) for teacher in config.teachers]
    for card in cards:
        require_teacher_spec(card, scale=config.student.scale, channels=config.student.channels)
    goals = tuple(
        teacher.trained_for or card.trained_for for teacher, card in zip(config.teachers, cards, strict=True)
    )
    _check_goals(config, cards, goals)
    if index.teacher is not None:
        _check_labels(config, index, index.teacher, cards)
    if config.share_extractor:
        _check_extractor(config, cards[0])
    _check_taps(config, cards[0])
    _check_grids(config, _taught_places(config, index, cards[0]))
    if needs_live_teacher(config.terms, index):
        _check_networks(config)
    teachers = tuple(
        TeacherRef(name=card.name, sha256=card.sha256, licence=teacher.licence or card.licence)
        for teacher, card in zip(config.teachers, cards, strict=True)
    )
    return Inputs(index, teachers, goals)


def _check_networks(config: DistillConfig) -> None:
    """Raise RequestError for a teacher that teaches nothing, or whose features cannot be read where asked.

    Where only what is stored of it is used, labelling has tried it.
    """
    for teacher in config.teachers:
        _require_teaching(teacher, config.data.degradation, config.store)
    if names := list(_looked_at(config)):
        loaded = load_model(config.teacher.uri, config.store)
        taps = Taps(loaded.model, names, who=f"the teacher ({loaded.card.name})")
        taps.widths(config.student.channels)
        if is_imported(loaded.card) and _placed_terms(config):
            _check_grids(config, _places(taps, config))


def _looked_at(config: DistillConfig) -> Iterator[str]:
    """Taps of the teacher that terms name."""
    for term in config.terms:
        if isinstance(term, TappedTerm):
            yield from (pair.teacher for pair in term.taps)
        elif isinstance(term, PerceptualTerm) and term.network is None:
            yield from term.taps


@lru_cache(maxsize=8)
def _require_teaching(teacher: TeacherConfig, degradation: Degradation, store: StoreConfig) -> None:
    """Asked once a process: many runs may share a teacher, and a large one takes seconds to answer."""
    require_better_than_bicubic(
        load_model(teacher.uri, store),
        degradation=degradation,
        trained_for=teacher.trained_for,
        force=teacher.force,
    )


def _check_labels(
    config: DistillConfig, index: ShardIndex, stored: TeacherRef, cards: Sequence[Card]
) -> None:
    """Raise RequestError for labels that are not what the teachers of this run would say."""
    if stored.sha256 != cards[0].sha256:
        raise RequestError(
            f"{config.data.shards} carries outputs of teacher {stored.name} ({stored.sha256[:12]}), and the "
            f"run asks for {cards[0].name} ({cards[0].sha256[:12]}); label the shards with this teacher, or "
            f"use the shards without labels"
        )
    if len(cards) > 1:
        raise RequestError(
            f"{config.data.shards} carries outputs of {stored.name} alone, and the run has "
            f"{len(cards)} teachers; use the shards without labels"
        )
    labels = index.carried
    if degradation_name(config.data.degradation) != labels.degradation:
        raise RequestError(
            f"{config.data.shards} carries the teacher's outputs for {labels.degradation} LR, and "
            f"data.degradation {config.data.degradation.kind} makes another LR; use the shards without labels"
        )
    wanted = stored_ranks(config.terms, index)
    for tap in labels.taps:
        if tap.tap in wanted and config.data.patch_size % tap.stride:
            raise RequestError(
                f"{config.data.shards}: features of {tap.tap} have a place for each {tap.stride} x "
                f"{tap.stride} LR pixels, found data.patch_size {config.data.patch_size}; choose a multiple"
            )


def _check_goals(config: DistillConfig, cards: Sequence[Card], goals: Sequence[Goal]) -> None:
    """Raise RequestError for teachers that want different things, unless that is what was asked for."""
    if len(cards) == 1 or config.mix.force:
        return
    for teacher, card in zip(config.teachers, cards, strict=True):
        if is_imported(card) and teacher.trained_for is None:
            raise RequestError(
                f"teacher {card.name}: a public checkpoint does not say what it was trained for; set its "
                f"trained_for to fidelity (PSNR) or perception (GAN)"
            )
    if len(set(goals)) > 1:
        said = ", ".join(f"{card.name} for {goal}" for card, goal in zip(cards, goals, strict=True))
        raise RequestError(
            f"the teachers were trained for different goals ({said}): the mean of a sharp guess and a safe "
            f"one is neither; use teachers of one goal, or set mix.force true"
        )


def _check_taps(config: DistillConfig, teacher: Card) -> None:
    """Raise RequestError for a tap that does not exist. An imported teacher is asked when loaded."""
    for term in config.terms:
        for pair in term.taps if isinstance(term, TappedTerm) else ():
            require_tap(pair.student, config.student.taps, who=f"the student ({config.student.kind})")
            if not is_imported(teacher):
                require_tap(pair.teacher, teacher.spec.taps, who=f"the teacher ({teacher.name})")
        if isinstance(term, PerceptualTerm) and term.network is None and not is_imported(teacher):
            for tap in term.taps:
                require_tap(tap, teacher.spec.taps, who=f"the teacher ({teacher.name})")


def _placed_terms(config: DistillConfig) -> list[CriticTerm | AttendedTerm | FusionTerm]:
    """Those that look at places one by one."""
    return [term for term in config.terms if isinstance(term, CriticTerm | AttendedTerm | FusionTerm)]


def _taught_places(config: DistillConfig, index: ShardIndex, teacher: Card) -> dict[str, int]:
    """How many places a patch has at taps of the teacher, as far as that is known without its weights."""
    if is_imported(teacher):
        return {tap.tap: (config.data.patch_size // tap.stride) ** 2 for tap in index.carried.taps}
    names = [pair.teacher for term in _placed_terms(config) for pair in term.taps]
    return _places_of(teacher.spec, names, config) if names else {}


def _check_grids(config: DistillConfig, taught: Mapping[str, int]) -> None:
    """Raise RequestError for features of so few places that a term has nothing to work on."""
    terms = _placed_terms(config)
    if not terms:
        return
    student = _places_of(config.student, [pair.student for term in terms for pair in term.taps], config)
    for term in terms:
        for pair in term.taps:
            places = min(student[pair.student], taught.get(pair.teacher, student[pair.student]))
            least = term.positions if isinstance(term, CriticTerm) else LEAST_PLACES
            if places < least:
                raise RequestError(
                    f"the {term.kind} term looks at {least} places or more, and a patch of data.patch_size "
                    f"{config.data.patch_size} has {places} at {pair.student!r} and {pair.teacher!r}; raise "
                    f"data.patch_size, or choose taps with a finer grid"
                    + (", or lower its positions" if isinstance(term, CriticTerm) else "")
                )


def _places_of(spec: ModelSpec, taps: Sequence[str], config: RunConfig) -> dict[str, int]:
    """How many pixels a patch has at each tap."""
    grids = tap_grids(spec, taps, size=config.data.patch_size)
    return {tap: height * width for tap, (height, width) in grids.items()}


@torch.no_grad()
def _places(taps: Taps, config: RunConfig) -> dict[str, int]:
    """The same of a network that no spec can build."""
    size = config.data.patch_size
    read = taps.features(torch.zeros(1, config.model.channels, size, size))
    return {tap: features.shape[2] * features.shape[3] for tap, features in read.items()}


def _asks_teacher(config: RunConfig) -> bool:
    return needs_teacher(config.terms) or _shares_extractor(config)


def _shares_extractor(config: RunConfig) -> bool:
    return isinstance(config, DistillConfig) and config.share_extractor


def _check_extractor(config: DistillConfig, teacher: Card) -> None:
    """Raise RequestError for an extractor that cannot be shared, or that a term would like to move."""
    try:
        require_shareable(config.student, teacher.spec)
    except RequestError as error:
        raise RequestError(f"share_extractor with teacher {teacher.name}: {error}") from None
    for term in config.terms:
        for pair in term.taps if isinstance(term, TappedTerm) else ():
            if pair.student == config.student.extractor:
                raise RequestError(
                    f"the {term.kind} term looks at {pair.student!r}, which share_extractor keeps as it is; "
                    f"choose a tap behind it, or set share_extractor to false"
                )


def _judges(config: RunConfig) -> dict[str, list[PerceptualTerm]]:
    """The networks that perceptual terms name, each with its terms."""
    found: dict[str, list[PerceptualTerm]] = {}
    for term in config.terms:
        if isinstance(term, PerceptualTerm) and term.network is not None:
            found.setdefault(term.network, []).append(term)
    return found


def _judge(uri: str, config: RunConfig) -> nn.Module:
    judge = load_judge(uri, config.store)
    return (judge if isinstance(judge, Vgg) else judge.model).requires_grad_(False)


def _check_judges(config: RunConfig) -> None:
    """Raise RequestError for a network that cannot look at this run's images, or has no such taps."""
    side = config.data.patch_size * config.model.scale
    for uri, terms in _judges(config).items():
        judge = load_judge(uri, config.store)
        network = judge if isinstance(judge, Vgg) else judge.model
        taps = [tap for term in terms for tap in term.taps]
        for tap in taps:
            require_tap(tap, tap_names(network), who=f"the perceptual network {uri}")
        if isinstance(judge, Vgg):
            if side < judge.min_size(taps):
                raise RequestError(
                    f"the taps of {uri} look at no less than {judge.min_size(taps)} pixels a side, and HR "
                    f"patches have {side}; raise data.patch_size, or choose earlier taps"
                )
        elif judge.card.spec.channels != config.model.channels:
            raise RequestError(
                f"{uri} looks at images of channels {judge.card.spec.channels}, and the run makes "
                f"{config.model.channels}; take a network for the same images"
            )
        elif is_imported(judge.card):
            # Whatever it was trained for: this catches another value range or order of channels.
            require_better_than_bicubic(judge, trained_for="perception")


def _check_first_weights(config: RunConfig, card: Card) -> None:
    """Raise RequestError for a network that shares no more than a bias with the one that is trained."""
    if config.inherit == "slice":
        try:
            require_slice(config.model, card.spec)
        except RequestError as error:
            raise RequestError(f"init_from {config.init_from}: {error}") from None
        return
    for what in ("kind", "num_features"):
        expected, found = getattr(config.model, what), getattr(card.spec, what, None)
        if expected != found:
            raise RequestError(
                f"init_from {config.init_from}: expected a network of {what} {expected}, found {found}; "
                f"take a model of the same kind and width, of any scale, or set inherit to slice"
            )


def _live_teacher(config: RunConfig, inputs: Inputs, worker: Worker) -> nn.Module | None:
    """The teacher's network, unless the shards already carry all that the terms ask of it."""
    if not inputs.teachers:
        return None
    assert isinstance(config, DistillConfig)
    missing = list(why_live(config.terms, inputs.index))
    if not missing:
        return None
    if inputs.index.teacher is not None:
        log.warning("the teacher runs in each step; the labels lack %s", "; ".join(missing))
    models = [
        load_model(teacher.uri, config.store).model.requires_grad_(False) for teacher in config.teachers
    ]
    for model in models:
        if _shards_teacher(config, worker):
            shard(model, worker.device)
        else:
            model.to(worker.device)
    return models[0] if len(models) == 1 else Ensemble(models, temperature=config.mix.temperature)


def _validator(
    config: RunConfig, index: ShardIndex, worker: Worker, state: TrainState
) -> Callable[[TrainState], dict[str, float]] | None:
    """Measures the mean network on images that were held out, and on as many that are trained on.

    The first worker does; the others have a part in it where the network is in parts.
    """
    if config.num_validation_images == 0 or index.num_heldout_rows == 0:
        return None
    if worker.rank > 0:
        return _lend_parts if is_sharded(state.model) else None
    sets = {
        name: find(
            open_store(config.data.shards, config.store),
            index,
            degrade=build_degradation(config.data.degradation, config.model.scale),
            scale=config.model.scale,
            channels=config.model.channels,
            limit=config.num_validation_images,
        )
        for name, find in (("heldout_psnr_y", heldout_pairs), ("train_psnr_y", training_pairs))
    }

    def validate(state: TrainState) -> dict[str, float]:
        mean = state.mean()
        assert mean is not None
        upscale = Upscaler(Engine(fold(mean), device=str(worker.device))).upscale
        return {name: mean_psnr_y(upscale, pairs, border=config.model.scale) for name, pairs in sets.items()}

    return validate


def _lend_parts(state: TrainState) -> dict[str, float]:
    """What other workers do while the first one measures: give their parts of the mean network."""
    state.mean()
    return {}


# ---------------------------------------------------------------- what a run leaves


class History:
    """`metrics.jsonl` and TensorBoard events of a run; complete after any number of restarts.

    A `tracker` is told the same.
    """

    def __init__(self, store: Store, tracker: MlflowRun | None = None) -> None:
        self.store = store
        self.tracker = tracker
        self.rows: list[dict[str, Any]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="kdsr-tensorboard-")
        self._writer: SummaryWriter | None = None

    def resume(self, step: int) -> None:
        """Keep what an earlier start logged up to `step`; later rows will be made again."""
        try:
            lines = self.store.get("metrics.jsonl").decode().splitlines()
        except KeyNotFound:
            return
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """One row."""
        self.rows.append({"step": step, **metrics})
        if self._writer is None:
            self._writer = SummaryWriter(self._folder.name, purge_step=step, flush_secs=10)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.add(step, metrics)

    def end(self, status: Literal["FINISHED", "FAILED"]) -> None:
        """Tell the tracker how it ended; a run that is stopped from outside has not."""
        if self.tracker is not None:
            self.tracker.finish(status)

    def as_it_is(self) -> Callable[[], None]:
        """What puts all of it, as it is now, into the store."""
        if self._writer is not None:
            self._writer.flush()
        files = {"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in self.rows).encode()}
        for path in sorted(Path(self._folder.name).iterdir()):
            files[f"tensorboard/{path.name}"] = path.read_bytes()

        def put() -> None:
            for key, data in files.items():
                self.store.put(key, data)

        return put

    def close(self) -> None:
        """Remove the local copy of the events."""
        if self._writer is not None:
            self._writer.close()
        self._folder.cleanup()

    def best_step(self) -> int | None:
        """The step with the highest held-out PSNR; None without validation."""
        measured = [row for row in self.rows if "heldout_psnr_y" in row]
        return max(measured, key=lambda row: row["heldout_psnr_y"])["step"] if measured else None


def _tracker(config: RunConfig, worker: Worker) -> MlflowRun | None:
    """Where the first rank reports to beside its store. Raises RequestError when it does not answer."""
    if config.tracking.mlflow_uri is None or worker.rank != 0:
        return None
    return begin_mlflow(
        config.tracking.mlflow_uri,
        experiment=config.tracking.experiment,
        name=config.name,
        store=run_store(config),
        settings=dict(_settings(config.model_dump(mode="json"))),
        commit=provenance.commit(),
    )


def _export(config: RunConfig, inputs: Inputs, worker: Worker, states: StateStore, history: History) -> Card:
    """Write `model/`: the EMA weights of the best checkpoint, or of the last one without validation.

    The last one is also taken, with a warning, where the best one was damaged.
    """
    chosen = states.load("best", "latest", "previous")
    assert chosen is not None
    model = build_model(config.model)
    model.load_state_dict(chosen["ema"])
    rows = [row for row in history.rows if row["step"] == chosen["step"] and "heldout_psnr_y" in row]
    card = Card(
        name=config.name,
        spec=config.model,
        num_parameters=0,
        sha256="",
        colour="sRGB" if config.model.channels == 3 else "grey",
        trained_for=_goal(config, inputs.goals),
        teacher=inputs.teachers[0] if inputs.teachers else None,
        co_teachers=list(inputs.teachers[1:]),
        data=list(config.datasets) or [f"{config.data.shards} ({inputs.index.options.get('licence')})"],
        licence=config.licence,
        command=worker.command,
        commit=provenance.commit(),
        created=provenance.now(),
        num_steps=chosen["step"],
        metrics={"heldout_psnr_y": round(rows[-1]["heldout_psnr_y"], 3)} if rows else {},
    )
    return save_model(run_store(config).child("model"), fold(model), card)


def _goal(config: RunConfig, taught: Sequence[Goal]) -> Goal:
    """Whatever a run begins with, its last weights decide, however small they are.

    Who is still near to a teacher then, of those that were trained for `taught`, has its goal.
    """
    last = [term for term in config.terms if term.at(1.0) > 0]
    looks = any(isinstance(term, LOOKS) for term in last)
    return "perception" if looks or ("perception" in taught and needs_teacher(last)) else "fidelity"


def _check_patches(config: RunConfig) -> None:
    """Raise RequestError for a discriminator that needs larger patches."""
    side = config.data.patch_size * config.model.scale
    for term in config.terms:
        if isinstance(term, AdversarialTerm) and side < term.discriminator.min_size:
            raise RequestError(
                f"the {term.discriminator.kind} discriminator judges at least {term.discriminator.min_size} "
                f"pixels a side, and HR patches have {side}; raise data.patch_size, or choose another"
            )


def _check_balance(config: RunConfig) -> None:
    """Raise RequestError for a balance with nothing to measure the other terms against, or without an end."""
    balance = config.balance
    if isinstance(balance, GradientBalance):
        kinds = " or ".join(balance.reference)
        if all(term.kind not in balance.reference for term in config.terms):
            raise RequestError(
                f"balance gradient measures each term against those of kind {kinds}, and terms have none; "
                f"add one, or set balance.kind to fixed"
            )
        if (moment := moment_without(balance.reference, config.terms)) is not None:
            raise RequestError(
                f"balance gradient measures each term against those of kind {kinds}, and at {moment:g} of "
                f"the run others have a weight and none of these; give one of these a weight there, or set "
                f"balance.kind to fixed"
            )
    if isinstance(balance, UncertaintyBalance):
        for term in config.terms:
            if falls_below_zero(term):
                raise RequestError(
                    f"balance uncertainty lowers loss / b + log b, and the {term.kind} term, a bound or a "
                    f"verdict, can be less than 0, where b would go to 0 and the term's weight grow without "
                    f"end; set balance.kind to gradient or fixed"
                )


def run_store(config: RunConfig) -> Store:
    """Where a run lies."""
    return open_store(config.output, config.store).child(config.name)


def _require_same_run(store: Store, config: RunConfig) -> None:
    """Raise RequestError when a run of this name was asked for something else."""
    try:
        before = json.loads(store.get("config.json"))
    except KeyNotFound:
        return
    if changed := changed_settings(config, before):
        raise RequestError(
            f"run {config.name} in {config.output} was begun with other settings ({'; '.join(changed)}); "
            f"choose another name, or delete {store.uri}"
        )


def require_same_sources(configs: Iterable[RunConfig]) -> None:
    """Raise RequestError for a run that began on other shards, or with other teachers, than lie there now.

    `check` asks it of one run; this is for those that are compared, also where nothing of them is left to do.
    """
    found: dict[tuple[str, ...], Sources] = {}
    for config in configs:
        if _begun(config) is not None:
            places = (config.data.shards, *(teacher.uri for teacher in _teachers(config)))
            if places not in found:
                found[places] = _sources(config)
            _require_same_sources(config, found[places])


def _sources(config: RunConfig) -> Sources:
    index = shards.read_index(open_store(config.data.shards, config.store))
    cards = [load_card(teacher.uri, config.store) for teacher in _teachers(config)]
    return Sources(shards_sha256=shards.digest(index), teacher_sha256=tuple(card.sha256 for card in cards))


def _require_same_sources(config: RunConfig, found: Sources) -> None:
    """Raise RequestError when the run began on something else."""
    if (begun := _begun(config)) is None or begun.sources == found:
        return
    teachers = _teachers(config)
    pairs = zip(teachers, begun.sources.teacher_sha256, found.teacher_sha256, strict=False)
    others = [(f"with another teacher at {each.uri}", before, now) for each, before, now in pairs]
    data = (f"on other shards at {config.data.shards}", begun.sources.shards_sha256, found.shards_sha256)
    changed = [
        f"{what} (sha256 was {before[:12]}, now {now[:12]})"
        for what, before, now in (data, *others)
        if before != now
    ]
    if changed:
        raise RequestError(
            f"run {config.name} in {config.output} was begun {', and '.join(changed)}; put back what was "
            f"there, choose another name, or delete {run_store(config).uri}"
        )


def _teachers(config: RunConfig) -> tuple[TeacherConfig, ...]:
    """Those that something is asked of."""
    return config.teachers if isinstance(config, DistillConfig) and _asks_teacher(config) else ()


def _begun(config: RunConfig) -> Begun | None:
    """What the run began with; None for one that has not begun, or before this was written down."""
    store = run_store(config)
    try:
        return Begun.model_validate_json(store.get(BEGUN_KEY))
    except KeyNotFound:
        return None
    except ValidationError as error:
        raise DataError(f"{store.uri}/{BEGUN_KEY} is not what a run began with: {error}; delete it") from None


def _write_down(config: RunConfig, begun: Begun) -> None:
    """What was asked for now, and what the run began with, once."""
    store = run_store(config)
    store.put("config.json", config.model_dump_json(indent=2).encode())
    if not store.exists(BEGUN_KEY):
        store.put(BEGUN_KEY, begun.model_dump_json(indent=2).encode())


RowT = TypeVar("RowT", bound="RunRow")


class RunRow(Frozen):
    """What is written beside a run when it has ended, well or not."""

    config: dict[str, Any]
    """Everything the run was asked."""


def row_beside(store: Store, key: str, kind: type[RowT], config: RunConfig, *, who: str) -> RowT | None:
    """The row under `key` of a run's `store`; None where there is none yet.

    Raises DataError for what is no row, and RequestError, naming `who`, for one of a run with other settings.
    """
    try:
        row = kind.model_validate_json(store.get(key))
    except KeyNotFound:
        return None
    except ValidationError as error:
        raise DataError(f"{store.uri}/{key} is not a row: {error}; delete it") from None
    if changed := changed_settings(config, row.config):
        raise RequestError(
            f"{who} was trained with other settings ({'; '.join(changed)}); choose another output, or delete "
            f"{store.uri}"
        )
    return row


def changed_settings(config: RunConfig, before: Any) -> list[str]:
    """What makes `config` another run than the saved config `before`, a sentence for each field."""
    # Fields that are newer than the run had their default.
    with contextlib.suppress(ValidationError):
        before = type(config).model_validate(before).model_dump(mode="json")
    now = json.loads(config.model_dump_json())
    old, new = dict(_settings(before)), dict(_settings(now))
    return [
        f"{name}: was {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _settings(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of what makes a run the run that it is."""
    if path in FREE_FIELDS:
        return
    if not isinstance(config, dict | list):
        yield path, config
        return
    parts = config.items() if isinstance(config, dict) else enumerate(config)
    for name, value in parts:
        yield from _settings(value, f"{path}.{name}" if path else str(name))
