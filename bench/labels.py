"""What stored labels save: seconds of a training step with the live teacher and without, and what they take.

    python bench/labels.py --json labels.json
    python bench/labels.py --shards SHARDS --teacher TEACHER --taps TAP TAP --json labels.json

All numbers come from one process on one machine. Without flags, it labels the photographs of jobs/demo with
the bundled teacher.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdsr import provenance, shards
from kdsr.checkpoint import LoadedModel, load_model
from kdsr.config import DataConfig, OptimizerConfig, ShardConfig, StoredFeatures
from kdsr.degrade import build_degradation
from kdsr.engine import Engine
from kdsr.fit import fit, new_state
from kdsr.label import (
    DEGRADATION,
    Labeller,
    label_shard,
    labelled_index,
    plan_labels,
    read_directions,
)
from kdsr.models import build_model
from kdsr.objectives import build_objective, label_columns, stored_ranks
from kdsr.observe import Observer
from kdsr.pairs import Cursor, PairBatch, PairMaker, PatchReader
from kdsr.photos import build_shard, list_photos, make_index, plan_shards
from kdsr.spec import RepChainSpec, ShardIndex, ZoomConfig
from kdsr.store import Store, open_store
from kdsr.terms import AffinityTerm, DistillTerm, OutputTerm, PixelTerm, TapPair, UpcyclingTerm
from kdsr.upscale import Upscaler

ROOT = Path(__file__).parents[1]
TITLE = "A teacher that runs once"
REMARKS = [
    "Steps of a small student with the teacher live and with its stored answers, on the same shards; "
    "`ratio` is how many stored steps take as long as a live one. `bytes_per_hr_pixel` is what the columns "
    "that are read add to the shards, `share_of_shards` the same as a part of them."
]
STUDENT = {"num_features": 24, "num_layers": 5}


def arguments() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", default="", help="made by jobs/shard.py; the demo's photographs without it"
    )
    parser.add_argument("--teacher", default="edsr-small-x4")
    parser.add_argument("--taps", nargs="+", default=["head", "trunk"], help="of the teacher")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--crops", type=int, default=4, help="zoomed-in inputs of each sub-image")
    parser.add_argument("--side", type=int, default=64, help="of a zoomed-in input in pixels")
    parser.add_argument("--patch-size", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="timed, after two that are not")
    parser.add_argument("--most-shards", type=int, default=1, help="so many are labelled")
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args()


def demo_shards(folder: str) -> str:
    """Shards of the demo's photographs in `folder`."""
    config = ShardConfig(
        input=str(ROOT / "jobs" / "demo" / "photos"), output=f"{folder}/shards", heldout_fraction=0
    )
    source, target = open_store(config.input), open_store(config.output)
    plans = plan_shards(list_photos(source), config)
    shards.write_index(
        target, make_index([build_shard(source, target, each, config) for each in plans], config)
    )
    return config.output


def label(
    source: Store, index: ShardIndex, target: Store, teacher: LoadedModel, asked: argparse.Namespace
) -> tuple[ShardIndex, float]:
    """The index of the labelled set, and seconds without the fit of directions."""
    features = [StoredFeatures(tap=tap, rank=asked.rank) for tap in asked.taps]
    observer, zoom = Observer(teacher.model, asked.taps), ZoomConfig(num_crops=asked.crops, side=asked.side)
    labels = plan_labels(
        source, index, target, card=teacher.card, observer=observer, features=features, zoom=zoom
    )
    directions = read_directions(target, labels.basis)
    labeller = Labeller(Upscaler(Engine(teacher.model)), labels, observer, directions)
    began = time.perf_counter()
    entries = [
        label_shard(
            source,
            entry,
            target,
            labeller=labeller,
            teacher_sha256=teacher.card.sha256,
            row_group_bytes=2**24,
        )
        for entry in index.shards
    ]
    seconds = time.perf_counter() - began
    labelled = labelled_index(index, entries, teacher.card, labels)
    shards.write_index(target, labelled)
    return labelled, seconds


def cases(asked: argparse.Namespace) -> dict[str, list[DistillTerm]]:
    """Terms to compare, by name."""
    taps = tuple(TapPair(student="layers.2", teacher=tap) for tap in asked.taps)
    return {
        "output": [PixelTerm(), OutputTerm()],
        "affinity": [PixelTerm(), AffinityTerm(taps=taps)],
        "zoom in": [PixelTerm(), UpcyclingTerm(zoom_out=False)],
    }


def pairs(
    store: Store, index: ShardIndex, columns: tuple[str, ...], scale: int, asked: argparse.Namespace
) -> Iterator[tuple[PairBatch, Cursor]]:
    """Batches with the columns that are asked for."""
    degradation = build_degradation(DEGRADATION, scale)
    data = DataConfig(shards=store.uri, patch_size=asked.patch_size)
    context, cpu = degradation.context, torch.device("cpu")
    reader = PatchReader(store, index, data, scale, context, asked.batch_size, 0, columns=("image", *columns))
    make = PairMaker(degradation, scale, context, 3, cpu)
    return ((make(batch), batch.cursor) for batch in reader.batches())


def step_seconds(
    store: Store,
    index: ShardIndex,
    terms: list[DistillTerm],
    teacher: nn.Module | None,
    scale: int,
    asked: argparse.Namespace,
) -> float:
    """Mean of a step, reading and all; with stored answers where there is no live `teacher`."""
    torch.manual_seed(0)
    student = build_model(RepChainSpec(scale=scale, **STUDENT))
    stored = {} if teacher else stored_ranks(terms, index)
    columns = () if teacher else label_columns(terms, index)
    objective = build_objective(student, terms, teacher=teacher, scale=scale, stored=stored)
    state = new_state(student, OptimizerConfig(), num_steps=asked.steps + 2)
    state.train_too(objective)
    batches = pairs(store, index, columns, scale, asked)
    began = 0.0
    for report in fit(state, objective, batches, until_step=asked.steps + 2, after_step=objective.after_step):
        if report.step == 2:
            began = time.perf_counter()
    return (time.perf_counter() - began) / asked.steps


def column_bytes(store: Store, index: ShardIndex, columns: tuple[str, ...]) -> int:
    """Of the encoded values in `columns`."""
    total = 0
    for entry in index.shards:
        for group in range(len(entry.row_groups)):
            rows = shards.read_row_group(store, entry, group, columns=columns)
            total += sum(row.num_bytes for row in rows)
    return total


def measure(asked: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Rows of the table."""
    source, target = open_store(asked.shards or demo_shards(folder)), open_store(f"file://{folder}/labelled")
    index = shards.read_index(source)
    index = index.model_copy(update={"shards": index.shards[: asked.most_shards]})
    teacher = load_model(asked.teacher)
    labelled, seconds = label(source, index, target, teacher, asked)
    rows = [row for e in index.shards for g in range(len(e.row_groups)) for row in sizes(source, e, g)]
    pixels, scale = sum(rows), teacher.card.spec.scale
    images = column_bytes(target, labelled, ("image",))
    table: list[dict[str, Any]] = []
    for name, terms in cases(asked).items():
        live = step_seconds(target, labelled, terms, teacher.model.requires_grad_(False), scale, asked)
        stored = step_seconds(target, labelled, terms, None, scale, asked)
        added = column_bytes(target, labelled, label_columns(terms, labelled))
        table.append(
            {
                "terms": name,
                "live_step_seconds": live,
                "stored_step_seconds": stored,
                "ratio": live / stored,
                "bytes_per_hr_pixel": added / pixels,
                "share_of_shards": added / images,
            }
        )
    table.append({"terms": "labelling all of it", "hr_mpx_s": pixels / 1e6 / seconds})
    return table


def sizes(store: Store, entry: Any, group: int) -> list[int]:
    """Pixels of each row."""
    return [row.height * row.width for row in shards.read_row_group(store, entry, group, columns=())]


if __name__ == "__main__":
    asked = arguments()
    with tempfile.TemporaryDirectory(prefix="kdsr-labels-") as folder:
        measured = measure(asked, folder)
    result = {
        "title": TITLE,
        "remarks": REMARKS,
        "teacher": asked.teacher,
        "rows": measured,
        **provenance.stamp(),
    }
    text = json.dumps(result, indent=1)
    if asked.json is not None:
        asked.json.write_text(text + "\n", encoding="utf-8")
    print(text)
