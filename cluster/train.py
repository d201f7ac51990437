"""Run a training over the workers of a cluster with Ray Train. Knows no pixels and no losses."""

import os
import sys
import uuid
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.experimental import tqdm_ray
from ray.train import FailureConfig, LoggingConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import get_device, prepare_model
from torch import nn

from cluster import data, leaving, session
from cluster.metrics import RunMetrics
from kdsr import lease, provenance
from kdsr.config import DistillConfig, TeacherTrainingConfig
from kdsr.errors import KdsrError
from kdsr.pairs import PatchReader
from kdsr.spec import Card
from kdsr.store import open_store
from kdsr.training import (
    LastSave,
    Progress,
    RunConfig,
    Worker,
    check,
    exported_card,
    last_save,
    run_store,
    saved_step,
    train,
)

KINDS: dict[str, type[RunConfig]] = {
    config.__name__: config for config in (TeacherTrainingConfig, DistillConfig)
}


def run(config: RunConfig) -> Card:
    """Train until done and return the card of the exported model. A finished run returns at once.

    Raises RequestError for what can never work, before any worker starts, and when another driver works on
    the run; and the worker's own KdsrError when the run itself is at fault. Only lost workers are replaced,
    `cluster.max_failures` times without a checkpoint in between; those that were told to leave, because
    their node is taken away, count for nothing. Between the two numbers of `cluster.num_workers` Ray takes as
    many workers as there is room for, looks again from time to time, and then begins with all of them at the
    last checkpoint. SIGTERM lets the workers save and leave, and ends in a KdsrError that says where; so
    does Ctrl-C, and ends in a KeyboardInterrupt.
    """
    check(config)
    if (card := exported_card(config)) is not None:
        return card
    # Ray Train asks the dashboard whether its controller lives, and logs a traceback without one.
    session.connect(config.cluster, dashboard=True)
    session.require_capacity(
        config.cluster, num_workers=config.cluster.least_workers, reader_cpus=_reader_cpus(config)
    )
    with lease.held(run_store(config), what=f"run {config.name}") as own, leaving.heard_by_workers() as stop:
        own.when_lost = partial(stop.tell, "another driver has taken over")
        return _train_until_done(config, stop)


def _train_until_done(config: RunConfig, stop: leaving.Stop) -> Card:
    """Start workers as often as it takes."""
    failures, failed_at = 0, -1
    while (card := exported_card(config)) is None:
        before = last_save(config)
        begun_at = 0 if before is None else before.step
        session.wait_for_room(
            config.cluster,
            num_workers=config.cluster.least_workers,
            reader_cpus=_reader_cpus(config),
            unless=stop.is_told,
        )
        if stop.is_told():
            raise _stopped(config, stop)
        try:
            _trainer(config, stop.key).fit()
        except TrainingFailedError as error:
            if (own := _own_error(error)) is not None:
                raise own from None
            failures, failed_at = (failures + 1 if begun_at == failed_at else 1), begun_at
            if failures > config.cluster.max_failures and not stop.is_told():
                raise KdsrError(
                    f"training stopped after {failures} starts: {session.last_line(error)}; the same "
                    f"command goes on from the last checkpoint"
                ) from error
            print(f"lost workers ({error}); going on from the last checkpoint", file=sys.stderr)
        except KeyboardInterrupt:
            if not stop.is_told():
                raise
        else:
            if not stop.is_told():
                _require_progress(config, since=before)
        if stop.is_told() and exported_card(config) is None:
            raise _stopped(config, stop)
    return card


def _stopped(config: RunConfig, stop: leaving.Stop) -> BaseException:
    saved = f"run {config.name} is saved at step {saved_step(config)} of {config.num_steps}"
    if stop.is_by_hand:
        print(saved, file=sys.stderr)
        return KeyboardInterrupt()
    return KdsrError(f"{stop.reason}: {saved}; the same command goes on from there")


def _own_error(error: TrainingFailedError) -> KdsrError | None:
    """What a worker raised on purpose, which another try would only raise again."""
    causes = map(_cause, getattr(error, "worker_failures", {}).values())
    return next((cause for cause in causes if isinstance(cause, KdsrError)), None)


def _require_progress(config: RunConfig, *, since: LastSave | None) -> None:
    """Workers that leave have taken a step; say so, because new ones may have to wait for a machine.

    It may be an earlier one than that of `since`, the last save before they began, which was damaged then.
    """
    if exported_card(config) is not None:
        return
    reached = last_save(config)
    if reached is None or reached == since:
        raise KdsrError(
            f"the workers of run {config.name} left at step {saved_step(config)} without taking a step; see "
            f"their logs"
        )
    print(
        f"workers were told to leave and saved step {reached.step}; going on with what is left",
        file=sys.stderr,
    )


def _trainer(config: RunConfig, stop_key: str) -> leaving.ListeningTrainer:
    cluster = config.cluster
    if cluster.least_workers < cluster.most_workers:
        # Ray looks at its nodes every 20 s, and before that may plan a worker on one that is gone.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    resources: dict[str, float] = {"CPU": session.worker_cpus(cluster, reader_cpus=_reader_cpus(config))}
    if cluster.use_gpu:
        resources["GPU"] = 1
    filesystem, root = open_store(config.output, config.store).child(config.name).arrow()
    return leaving.ListeningTrainer(
        _work,
        train_loop_config={
            "kind": type(config).__name__,
            "config": config.model_dump(mode="json"),
            "command": provenance.command(),
            "num_threads": session.worker_threads(cluster),
            "stop_key": stop_key,
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        datasets={data.NAME: partial(data.source, config)} if _by_ray_data(config) else None,
        dataset_config=data.WholeSplit(),
        torch_config=leaving.ListeningTorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        # Checkpoints go to our own store; Ray only wants a place that all nodes see.
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=f"{root}/ray",
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=0),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def _work(arguments: dict[str, Any]) -> None:
    """What one worker does."""
    config = KINDS[arguments["kind"]].model_validate(arguments["config"])
    context = ray.train.get_context()
    torch.set_num_threads(min(arguments["num_threads"], session.cores()))
    rank, world_size, device = context.get_world_rank(), context.get_world_size(), get_device()
    team = leaving.Team(rank=rank, world_size=world_size, device=device, stop_key=arguments["stop_key"])
    worker = Worker(
        rank=rank,
        world_size=world_size,
        device=device,
        wrap=_data_parallel,
        batches=data.batches if _by_ray_data(config) else PatchReader.batches,
        command=arguments["command"],
        total=team.total,
        is_told_to_leave=team.is_told_to_leave,
    )
    done = saved_step(config)
    # Only the steps of this start are on the bar: those of an earlier one would make its rate and ETA lie.
    bar = tqdm_ray.tqdm(total=config.num_steps - done, desc=config.name) if worker.rank == 0 else None
    metrics = RunMetrics(config, worker, done=done)
    for progress in train(config, worker):
        metrics.observe(progress)
        if bar is not None:
            bar.set_description(_describe(config.name, progress))
            bar.update(progress.step - done)
            done = progress.step
    if bar is not None:
        bar.close()


def _by_ray_data(config: RunConfig) -> bool:
    return config.data.reader == "ray_data"


def _reader_cpus(config: RunConfig) -> float:
    return session.READER_CPUS if _by_ray_data(config) else 0.0


def _data_parallel(model: nn.Module) -> nn.Module:
    # Buffers are the same everywhere without it, and workers may pass unequal numbers of micro-batches.
    wrapped: nn.Module = prepare_model(model, parallel_strategy_kwargs={"broadcast_buffers": False})
    return wrapped


def _describe(name: str, progress: Progress) -> str:
    metrics = progress.metrics
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    if "patches_per_second" in metrics:
        parts.append(f"{metrics['patches_per_second']:.0f} patches/s, waiting {metrics['waiting_share']:.1%}")
    if "heldout_psnr_y" in metrics:
        parts.append(f"held-out {metrics['heldout_psnr_y']:.2f} dB")
    return f"{name}: {', '.join(parts)}"


def _cause(error: BaseException) -> BaseException:
    """The worker's own error inside Ray's wrappers."""
    inner = getattr(error, "cause", None) or error.__cause__
    return error if isinstance(error, KdsrError) or inner is None else _cause(inner)
