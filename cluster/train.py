"""Run a training over the workers of a cluster with Ray Train. Knows no pixels and no losses."""

import sys
import uuid
from typing import Any

import ray
import ray.train
import torch
from ray.experimental import tqdm_ray
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from ray.train.v2.api.exceptions import WorkerGroupError
from torch import nn

from cluster import session
from cluster.metrics import RunMetrics
from kdsr import provenance
from kdsr.config import DistillConfig, TeacherTrainingConfig
from kdsr.errors import KdsrError
from kdsr.spec import Card
from kdsr.store import open_store
from kdsr.training import Progress, RunConfig, Worker, check, exported_card, saved_step, train

KINDS: dict[str, type[RunConfig]] = {
    config.__name__: config for config in (TeacherTrainingConfig, DistillConfig)
}


def run(config: RunConfig) -> Card:
    """Train until done and return the card of the exported model. A finished run returns at once.

    Raises RequestError for what can never work, before any worker starts, and the worker's own KdsrError
    when the run itself is at fault; only lost workers are replaced, `cluster.max_failures` times. Between
    the two numbers of `cluster.num_workers` Ray takes as many workers as there is room for, looks again from
    time to time, and then begins with all of them at the last checkpoint.
    """
    check(config)
    if (card := exported_card(config)) is not None:
        return card
    # Ray Train asks the dashboard whether its controller lives, and logs a traceback without one.
    session.connect(config.cluster, dashboard=True)
    session.require_capacity(config.cluster, num_workers=config.cluster.least_workers)
    for attempt in range(config.cluster.max_failures + 1):
        try:
            _trainer(config).fit()
            break
        except WorkerGroupError as error:
            own = next((e for e in error.worker_failures.values() if isinstance(_cause(e), KdsrError)), None)
            if own is not None:
                raise _cause(own) from None
            if attempt == config.cluster.max_failures:
                raise KdsrError(
                    f"training stopped after {attempt + 1} starts: {session.last_line(error)}; the same "
                    f"command goes on from the last checkpoint"
                ) from error
            print(f"lost workers ({error}); going on from the last checkpoint", file=sys.stderr)
    card = exported_card(config)
    assert card is not None
    return card


def _trainer(config: RunConfig) -> TorchTrainer:
    cluster = config.cluster
    resources: dict[str, float] = {"CPU": session.worker_cpus(cluster)}
    if cluster.use_gpu:
        resources["GPU"] = 1
    filesystem, root = open_store(config.output, config.store).child(config.name).arrow()
    return TorchTrainer(
        _work,
        train_loop_config={
            "kind": type(config).__name__,
            "config": config.model_dump(mode="json"),
            "command": provenance.command(),
            "num_threads": session.worker_threads(cluster),
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers, use_gpu=cluster.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
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
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=get_device(),
        wrap=_data_parallel,
        command=arguments["command"],
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
