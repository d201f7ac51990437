"""A run takes the same steps on any number of workers, and in whatever parts its batches pass."""

import json

import pytest
import torch

from kdsr.checkpoint import StateStore, save_model
from kdsr.config import DataConfig, DistillConfig, OptimizerConfig, TeacherConfig
from kdsr.models import build_model
from kdsr.objectives import build_objective
from kdsr.pairs import PairBatch
from kdsr.spec import Card, EdsrSpec, EspcnSpec, PatchDiscriminatorSpec
from kdsr.store import open_store
from kdsr.terms import (
    AdversarialTerm,
    AttendedTerm,
    FeatureTerm,
    FusionTerm,
    OutputTerm,
    PixelTerm,
    TapPair,
    UncertaintyBalance,
    always_reach_output,
)
from kdsr.training import train
from tests.pictures import photograph
from tests.processes import over_processes
from tests.small_shards import row, write_set

TAPS = (TapPair(student="body.1", teacher="trunk"),)
LEARNING = (PixelTerm(), OutputTerm(weight=0.5), FeatureTerm(taps=TAPS, weight=0.1))
# Spectral norms are found a little better with every pass, so that parts are not quite the whole with them.
DISCRIMINATOR = PatchDiscriminatorSpec(num_features=4, num_levels=1, spectral_norm=False)
AGAINST = AdversarialTerm(weight=0.01, discriminator=DISCRIMINATOR, r1=1.0)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Uris of six photographs, and of a teacher."""
    folder = tmp_path_factory.mktemp("workers")
    rows = [row(f"photo-{i}.png", photograph(i, height=40, width=44)) for i in range(6)]
    write_set(open_store(f"file://{folder}/shards"), [rows[:4], rows[4:]])
    torch.manual_seed(0)
    model = build_model(EdsrSpec(scale=2, num_features=4, num_blocks=1)).eval()
    card = Card(name="big", spec=model.spec, num_parameters=0, sha256="")
    save_model(open_store(f"file://{folder}/big"), model, card)
    return f"{folder}/shards", f"file://{folder}/big"


def config_for(places, output, *, num_steps, **fields):
    shards, teacher = places
    given = {
        "name": "run",
        "output": str(output),
        "data": DataConfig(shards=shards, patch_size=8, patches_per_row=2, window_rows=6),
        "optimizer": OptimizerConfig(warmup_steps=2),
        "student": EspcnSpec(scale=2, num_features=4),
        "teacher": TeacherConfig(uri=teacher, force=True),
        "terms": LEARNING,
        "balance": UncertaintyBalance(),
        "num_steps": num_steps,
        "batch_size": 6,
        "precision": "float32",
        "num_validation_images": 0,
    }
    return DistillConfig(**{**given, **fields})


def learned(output):
    """Every tensor that a run has trained."""
    state = StateStore(open_store(f"file://{output}/run")).load("latest")
    tensors = state["model"] | state["auxiliary"]
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def logged_losses(output):
    """What the history says of the last steps: the mean over all workers."""
    lines = open_store(f"file://{output}/run").get("metrics.jsonl").decode().splitlines()
    (row,) = map(json.loads, lines)
    return [row[name] for name in ("loss", "pixel_l1", "output_l1", "features_l1") if name in row]


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 8
    return max((ours[name].float() - theirs[name].float()).abs().max().item() for name in ours)


@pytest.fixture(scope="module")
def alone(places, tmp_path_factory):
    """What one worker learns in fifty steps, and tells."""
    output = tmp_path_factory.mktemp("alone")
    list(train(config_for(places, output, num_steps=50)))
    return learned(output), logged_losses(output)


LATE = (PixelTerm(weight=0.0, final_weight=1.0, ramp=(0.5, 0.5)), FeatureTerm(taps=TAPS, weight=0.1))
"""For half of the run the features alone are compared, and the layers behind them have no gradient."""


def work(worker, folder, *configs):
    """Whole runs, and then a step of a discriminator alone: in the same processes, which start slowly."""
    for config in configs:
        list(train(config, worker))
    pass_unequally(worker, folder)


def pass_unequally(worker, folder):
    """Each worker passes a micro-batch more than the one before it."""
    torch.manual_seed(0)
    normed = AdversarialTerm(discriminator=DISCRIMINATOR.model_copy(update={"spectral_norm": True}))
    objective = build_objective(build_model(EspcnSpec(scale=2, num_features=4)), [normed], scale=2)
    pair = PairBatch(lr=torch.rand(1, 3, 8, 8), hr=torch.rand(1, 3, 16, 16))
    for _ in range(1 + worker.rank):
        objective(pair)
    objective.after_step()
    (term,) = objective.terms.values()
    torch.save(term.discriminator.state_dict(), folder / f"{worker.rank}.pt")


@pytest.fixture(scope="module", params=[(2, 2), (4, 1)], ids=["two", "four"])
def together(request, places, tmp_path_factory):
    """What workers leave. Four share six lanes unequally, and pass unequal numbers of micro-batches."""
    folder, (num_workers, micro_batch) = tmp_path_factory.mktemp("together"), request.param
    whole = config_for(places, folder / "whole", num_steps=50, micro_batch=micro_batch)
    late = config_for(places, folder / "late", num_steps=8, micro_batch=micro_batch, terms=LATE)
    over_processes(work, folder, whole, late, num_workers=num_workers, folder=folder)
    return folder


def test_workers_take_the_steps_of_one_with_all_patches(alone, together):
    state, losses = alone
    assert furthest(learned(together / "whole"), state) < 1e-5
    assert len(losses) >= 3 and logged_losses(together / "whole") == pytest.approx(losses, abs=1e-5)


def test_workers_that_pass_unequally_often_keep_the_spectral_norms_that_the_first_one_saves(together):
    first, *others = (torch.load(path) for path in sorted(together.glob("*.pt")))
    assert others and any(name.endswith("._u") for name in first)
    for other in others:
        assert first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)


def test_workers_take_the_steps_of_one_where_the_loss_does_not_reach_the_output(places, together, tmp_path):
    list(train(config_for(places, tmp_path, num_steps=8, terms=LATE)))
    assert furthest(learned(together / "late"), learned(tmp_path)) < 1e-5


FEATURES = FeatureTerm(taps=TAPS)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ((PixelTerm(), FEATURES), True),
        ((PixelTerm(weight=1.0, final_weight=0.0), FEATURES), True),
        ((PixelTerm(weight=1.0, final_weight=0.0, ramp=(0.2, 0.8)), FEATURES), False),
        ((PixelTerm(weight=0.0, final_weight=1.0), FEATURES), False),
        ((PixelTerm(weight=0.0, final_weight=1.0, ramp=(0.0, 0.0)), FEATURES), True),
        ((PixelTerm(weight=0.0, final_weight=1.0, ramp=(0.0, 0.5)), OutputTerm(), FEATURES), True),
        ((FusionTerm(taps=TAPS),), True),
        ((AttendedTerm(taps=TAPS, by="error"),), False),
    ],
)
def test_it_is_known_whether_each_step_has_a_loss_that_reaches_the_output(terms, expected):
    assert always_reach_output(terms) == expected


@pytest.mark.parametrize("more", [{}, {"terms": (*LEARNING, AGAINST)}])
def test_parts_of_a_batch_add_up_to_the_whole(places, tmp_path, more):
    for name, micro_batch in (("whole", None), ("parts", 2), ("uneven", 4)):
        list(train(config_for(places, tmp_path / name, num_steps=20, micro_batch=micro_batch, **more)))
    whole, parts, uneven = (learned(tmp_path / name) for name in ("whole", "parts", "uneven"))
    assert furthest(parts, whole) < 1e-5 and furthest(uneven, whole) < 1e-5
