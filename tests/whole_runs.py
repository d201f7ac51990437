"""A small run in which whatever can draws at random, and all that it comes to: for tests that disturb it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter

from kdsr.checkpoint import StateStore, load_model, save_model
from kdsr.config import DataConfig, DistillConfig, OptimizerConfig, TeacherConfig
from kdsr.models import build_model
from kdsr.spec import Card, EdsrSpec, RepChainSpec
from kdsr.store import open_store
from kdsr.terms import DistillTerms
from kdsr.training import run_store
from tests.pictures import photograph
from tests.small_shards import row, write_set

TERMS: Any = TypeAdapter(DistillTerms).validate_python(
    (
        {"kind": "pixel"},
        {"kind": "output", "weight": 0.5, "final_weight": 0.1},
        {"kind": "critic", "weight": 0.1, "taps": [{"student": "layers.1", "teacher": "trunk"}]},
    )
)
SPEEDS = {"patches_per_second", "waiting_share"}


class Places(NamedTuple):
    """Uris of four photographs, the last of them perhaps held out, and of a teacher."""

    shards: str
    teacher: str


class Outcome(NamedTuple):
    """All that a run leaves, without the speeds that no two runs have in common."""

    history: list[dict[str, float]]
    latest: dict[str, Any]
    best: dict[str, Any]
    model: dict[str, Any]


def make_places(folder: Path, *, heldout: bool) -> Places:
    """What a run reads."""
    rows = [
        row(f"photo-{i}.png", photograph(i, height=36, width=40), heldout=heldout and i == 3)
        for i in range(4)
    ]
    write_set(open_store(f"file://{folder}/shards"), [rows])
    torch.manual_seed(0)
    model = build_model(EdsrSpec(scale=2, num_features=4, num_blocks=1)).eval()
    card = Card(name="big", spec=model.spec, num_parameters=0, sha256="")
    save_model(open_store(f"file://{folder}/big"), model, card)
    return Places(f"{folder}/shards", f"file://{folder}/big")


def config_of(places: Places, output: Path, **fields: Any) -> DistillConfig:
    """With dropout, a critic, schedules and a mean of the weights, and each step in the history."""
    given: dict[str, Any] = {
        "name": "run",
        "output": str(output),
        "data": DataConfig(shards=places.shards, patch_size=8, patches_per_row=2, window_rows=4),
        "optimizer": OptimizerConfig(warmup_steps=2),
        "student": RepChainSpec(scale=2, num_features=4, num_layers=3),
        "teacher": TeacherConfig(uri=places.teacher, force=True),
        "terms": TERMS,
        "dropout": 0.3,
        "precision": "float32",
        "log_every_steps": 1,
    }
    return DistillConfig(**{**given, **fields})


def history(config: DistillConfig) -> list[dict[str, float]]:
    """Its rows without speeds."""
    lines = run_store(config).get("metrics.jsonl").decode().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in SPEEDS} for line in lines]


def outcome(config: DistillConfig) -> Outcome:
    """What a run that has ended came to."""
    states = StateStore(run_store(config))
    model = load_model(f"{run_store(config).uri}/model").model.state_dict()
    return Outcome(
        history(config), _flat(states.load("latest")), _flat(states.load("best")), _flat(dict(model))
    )


def _flat(state: Any, path: str = "") -> dict[str, Any]:
    """Every number of a state by its path, tensors as bytes."""
    if isinstance(state, dict | list | tuple):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for name, part in pairs for key, leaf in _flat(part, f"{path}/{name}").items()}
    return {path: state.numpy().tobytes() if isinstance(state, torch.Tensor) else state}
