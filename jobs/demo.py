"""The main job in a few minutes, on photographs that come with kdsr.

    python jobs/demo.py

Shards the photographs, distils a small student from the bundled teacher, trains the same student without the
teacher for as many steps, measures both on photographs that were not trained on, and upscales a folder.
Leaves everything in out/demo; report.json there has the figures. The same command again does what is missing.
"""

import json
from typing import Any

from kdsr.cli import main
from kdsr.config import (
    DataConfig,
    DemoConfig,
    DistillConfig,
    EvaluateConfig,
    OptimizerConfig,
    OutputTerm,
    PixelTerm,
    ShardConfig,
    TeacherConfig,
    TeacherTrainingConfig,
    UpscaleConfig,
)
from kdsr.spec import RepChainSpec


def run(config: DemoConfig) -> int:
    """Run every step, then print the table and where the comparison picture is."""
    from cluster import session
    from cluster.bulk import upscale
    from cluster.shard import shard
    from cluster.train import run as train
    from kdsr.evaluate import evaluate
    from kdsr.report import COMPARISON_KEY, rows, write_report
    from kdsr.store import open_store

    store = open_store(config.output, config.store)
    # Training needs Ray's dashboard, and the first part of a process decides.
    session.connect(config.cluster, dashboard=True)
    print(shard(shard_config(config)).sentence())
    for each in (distil_config(config), alone_config(config)):
        print(f"trained {train(each).name} for {each.num_steps} steps")
    measured = evaluate(evaluate_config(config))
    table = write_report(measured, store.child("evaluation")).table
    upscaled = upscale(upscale_config(config))
    comparison = f"{store.uri}/evaluation/{COMPARISON_KEY}".removeprefix("file://")
    report = {
        "rows": rows(measured),
        "upscaled": upscaled.done + upscaled.skipped,
        "failed": upscaled.failed,
        "comparison": comparison,
    }
    store.put("report.json", (json.dumps(report, indent=2) + "\n").encode())
    print(upscaled.sentence(), table, sep="\n\n", end="\n\n")
    print(f"comparison picture: {comparison}")
    return 0 if upscaled.ok else 1


def shard_config(config: DemoConfig) -> ShardConfig:
    """A tenth of the photographs picks the best checkpoint."""
    return ShardConfig(
        input=config.photos,
        output=f"{config.output}/shards",
        licence="CC0-1.0 or public domain",
        heldout_fraction=0.1,
        store=config.store,
        cluster=config.cluster,
    )


def distil_config(config: DemoConfig) -> DistillConfig:
    """A chain of 10 K parameters, half of its loss on the teacher's output."""
    return DistillConfig(
        name="student-distilled",
        student=student(),
        teacher=TeacherConfig(uri=config.teacher),
        terms=(PixelTerm(weight=0.5), OutputTerm(weight=0.5)),
        **_training(config),
    )


def alone_config(config: DemoConfig) -> TeacherTrainingConfig:
    """The same student, data, steps and seed; HR is all it learns from."""
    return TeacherTrainingConfig(name="student-alone", model=student(), **_training(config))


def student() -> RepChainSpec:
    """Small enough to learn something in a minute."""
    return RepChainSpec(scale=4, num_features=16, num_layers=5)


def evaluate_config(config: DemoConfig) -> EvaluateConfig:
    """Both students and the teacher, beside bicubic."""
    runs = f"{config.output}/runs"
    students = (f"{runs}/student-alone/model", f"{runs}/student-distilled/model")
    return EvaluateConfig(
        model=(*students, config.teacher),
        benchmark=(config.test,),
        output=f"{config.output}/evaluation",
        store=config.store,
    )


def upscale_config(config: DemoConfig) -> UpscaleConfig:
    """The test photographs themselves, four times as large."""
    return UpscaleConfig(
        input=f"{config.test}/HR",
        output=f"{config.output}/upscaled",
        model=f"{config.output}/runs/student-distilled/model",
        store=config.store,
        cluster=config.cluster,
    )


def _training(config: DemoConfig) -> dict[str, Any]:
    return {
        "output": f"{config.output}/runs",
        "data": DataConfig(
            shards=f"{config.output}/shards", patch_size=32, patches_per_row=32, window_rows=32
        ),
        "optimizer": OptimizerConfig(learning_rate=2e-3),
        "num_steps": config.num_steps,
        "validate_every_steps": config.num_steps,
        "store": config.store,
        "cluster": config.cluster,
        "licence": "Apache-2.0",
        "datasets": ("kdsr demo photographs (CC0-1.0 or public domain)",),
    }


if __name__ == "__main__":
    main(DemoConfig, run)
