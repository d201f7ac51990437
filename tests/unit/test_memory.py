"""Networks in parts over workers, or with blocks that run twice, learn what whole ones learn."""

import copy
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kdsr.checkpoint import StateStore, save_model
from kdsr.config import (
    DataConfig,
    DistillConfig,
    MemoryConfig,
    OptimizerConfig,
    TeacherConfig,
    TeacherTrainingConfig,
)
from kdsr.fit import new_state
from kdsr.memory import blocks, recompute_blocks, shard
from kdsr.models import MODELS, build_model
from kdsr.spec import BicubicSpec, Card, EdsrSpec, EspcnSpec, PatchDiscriminatorSpec, RrdbnetSpec
from kdsr.store import open_store
from kdsr.terms import (
    AdversarialTerm,
    FeatureTerm,
    OutputTerm,
    PixelTerm,
    TapPair,
    UncertaintyBalance,
    UpcyclingTerm,
)
from kdsr.training import train
from tests.pictures import photograph
from tests.processes import over_processes
from tests.small_networks import SMALL
from tests.small_shards import row, write_set

pytestmark = pytest.mark.timeout(900)  # Two processes that wait for each other a thousand times.

PARTS = MemoryConfig(shard_teacher=True)
TEACHER = EdsrSpec(scale=2, num_features=6, num_blocks=2)
SECOND = RrdbnetSpec(scale=2, num_features=4, num_growth=2, num_blocks=1)
DISCRIMINATOR = PatchDiscriminatorSpec(num_features=4, num_levels=1, spectral_norm=False)
NUM_STEPS, HALFWAY = 20, 10


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with shards and two teachers."""
    folder = tmp_path_factory.mktemp("memory")
    rows = [row(f"photo-{i}.png", photograph(i, height=40, width=44), heldout=i == 2) for i in range(6)]
    write_set(open_store(f"file://{folder}/shards"), [rows[:4], rows[4:]])
    for seed, spec in enumerate((TEACHER, SECOND)):
        torch.manual_seed(seed)
        card = Card(name=spec.kind, spec=spec, num_parameters=0, sha256="")
        save_model(open_store(f"file://{folder}/{spec.kind}"), build_model(spec).eval(), card)
    return folder


def fields_for(places, name, fields):
    given = {
        "name": name,
        "output": f"{places}/runs",
        "data": DataConfig(shards=f"{places}/shards", patch_size=8, patches_per_row=2, window_rows=6),
        "optimizer": OptimizerConfig(kind="adamw", weight_decay=0.1, warmup_steps=2, clip_norm=0.5),
        "balance": UncertaintyBalance(),
        "num_steps": NUM_STEPS,
        "batch_size": 7,  # which workers share unequally
        "micro_batch": 2,
        "precision": "float32",
        "log_every_steps": HALFWAY,
        "save_every_steps": HALFWAY,
        "validate_every_steps": HALFWAY,
        "num_validation_images": 1,
    }
    return {**given, **fields}


def teacher_config(places, name, **fields):
    """Training of a teacher with a critic beside it."""
    terms = (PixelTerm(), AdversarialTerm(weight=0.01, discriminator=DISCRIMINATOR, r1=1.0))
    return TeacherTrainingConfig(**{"model": TEACHER, "terms": terms, **fields_for(places, name, fields)})


def distil_config(places, name, **fields):
    """Distillation that asks two teachers for all that can be asked of them."""
    first, second = (TeacherConfig(uri=f"{places}/{spec.kind}", force=True) for spec in (TEACHER, SECOND))
    taps = (TapPair(student="body.1", teacher="trunk"),)
    terms = (
        PixelTerm(),
        OutputTerm(weight=0.5),
        FeatureTerm(taps=taps, weight=0.1),
        UpcyclingTerm(weight=0.1),
    )
    given = {
        "student": EspcnSpec(scale=2, num_features=4),
        "teacher": first,
        "co_teachers": (second,),
        "terms": terms,
        "num_steps": 4,
        "log_every_steps": 1,
    }
    return DistillConfig(**fields_for(places, name, {**given, **fields}))


def state_of(places, name):
    """Every tensor of a run's last checkpoint, by its path."""
    return dict(tensors(StateStore(open_store(f"file://{places}/runs/{name}")).load("latest")))


def tensors(state, path=""):
    if isinstance(state, torch.Tensor):
        yield path, state.double()
    for name, value in state.items() if isinstance(state, dict) else ():
        yield from tensors(value, f"{path}/{name}")


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 60
    assert all(ours[path].shape == theirs[path].shape for path in ours)
    return max((ours[path] - theirs[path]).abs().max().item() for path in ours)


def halfway(config, *worker):
    """Stop a training as if the power had gone."""
    run = train(config, *worker)
    assert next(run).step == HALFWAY
    run.close()


@pytest.fixture(scope="module")
def done(places):
    """What one worker does, what two do with a teacher in parts, and what either began and other ended."""
    list(train(teacher_config(places, "alone", memory=PARTS)))
    halfway(teacher_config(places, "begun-whole"))
    over_processes(_in_parts, places, num_workers=2, folder=places / "workers")
    list(train(teacher_config(places, "begun-in-parts")))
    return places


def _in_parts(worker, places):
    both = MemoryConfig(shard_teacher=True, recompute_blocks=True)
    list(train(teacher_config(places, "parts", memory=PARTS), worker))
    list(train(teacher_config(places, "begun-whole", memory=PARTS, micro_batch=None), worker))
    halfway(teacher_config(places, "begun-in-parts", memory=both, micro_batch=None), worker)
    list(train(distil_config(places, "whole-teacher"), worker))
    list(train(distil_config(places, "teacher-in-parts", memory=PARTS), worker))
    (places / f"held-{worker.rank}.json").write_text(json.dumps(_held(worker.device)))


def _held(device):
    """How many numbers this worker keeps of each thing that a training keeps of a teacher."""
    model = build_model(EdsrSpec(scale=2, num_features=8, num_blocks=2))
    state = new_state(model, OptimizerConfig(), num_steps=1, place=partial(shard, device=device))
    state.model(torch.zeros(1, 3, 8, 8)).sum().backward()
    gradients = [parameter.grad for parameter in state.model.parameters()]
    state.optimizer.step()
    moments = [kept["exp_avg"] for kept in state.optimizer.state.values()]
    kinds = {"model": state.model.parameters(), "mean": state.ema.parameters()}
    kinds |= {"gradients": gradients, "moments": moments}
    return {kind: sum(tensor.to_local().numel() for tensor in kept) for kind, kept in kinds.items()}


@pytest.mark.parametrize("run", ["parts", "begun-whole", "begun-in-parts"])
def test_a_teacher_in_parts_takes_the_steps_of_a_whole_one(done, run):
    """With micro-batches, clipping, decay, a critic, a learned balance; also when the workers change."""
    assert furthest(state_of(done, run), state_of(done, "alone")) < 1e-5


def test_a_teacher_in_parts_is_measured_and_exported_like_a_whole_one(done):
    ours, theirs = (
        json.loads((done / f"runs/{run}/model/card.json").read_text()) for run in ("parts", "alone")
    )
    assert ours["metrics"] == pytest.approx(theirs["metrics"], abs=0.002)  # rounded to 0.001 dB
    assert ours["num_steps"] == theirs["num_steps"]


def test_each_of_two_workers_keeps_half(done):
    total = sum(p.numel() for p in build_model(EdsrSpec(scale=2, num_features=8, num_blocks=2)).parameters())
    held = [json.loads((done / f"held-{rank}.json").read_text()) for rank in range(2)]
    for kind in ("model", "mean", "gradients", "moments"):
        assert held[0][kind] + held[1][kind] == total
        assert held[0][kind] == pytest.approx(total / 2, rel=0.1)


def test_a_teacher_in_parts_teaches_what_a_whole_one_does(done):
    logs = [(done / f"runs/{run}/metrics.jsonl").read_text() for run in ("whole-teacher", "teacher-in-parts")]
    whole, parts = ([json.loads(line) for line in log.splitlines()] for log in logs)
    terms = ["pixel_l1", "output_l1", "features_l1", "upcycling"]
    assert len(whole) == len(parts) == 4
    for one, other in zip(whole, parts, strict=True):
        assert [one[term] for term in terms] == pytest.approx([other[term] for term in terms], abs=1e-6)


# ---------------------------------------------------------------- blocks that run twice


@pytest.mark.parametrize(
    "kind", [kind for kind in MODELS if kind is not BicubicSpec], ids=lambda k: k.__name__
)
def test_blocks_that_run_twice_give_the_same_gradients_to_the_last_bit(kind):
    torch.manual_seed(0)
    once = build_model(kind(scale=2, **SMALL[kind.model_fields["kind"].default])).train()
    for parameter in once.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # tails that begin at zero let no gradient through
    for block in blocks(once):
        for layer in block.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_pre_hook(drop_some)
    twice = copy.deepcopy(once)
    recompute_blocks(twice)
    (kept, expected), (kept_twice, found) = gradients(once), gradients(twice)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert kept_twice < kept if blocks(once) else kept_twice == kept


def drop_some(_layer, inputs):
    return F.dropout(inputs[0], 0.2)


def gradients(model):
    """Bytes that the forward pass keeps, and the gradient of each parameter."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sr = model(torch.rand(2, model.spec.channels, 16, 16))
    sr.square().mean().backward()
    return sum(kept.values()), [parameter.grad for parameter in model.parameters()]


def test_blocks_are_what_a_network_repeats():
    assert len(blocks(build_model(TEACHER))) == TEACHER.num_blocks
    assert len(blocks(build_model(RrdbnetSpec(scale=2, num_features=4, num_growth=2, num_blocks=3)))) == 3
    assert blocks(build_model(EspcnSpec(scale=2, num_features=4))) == []
