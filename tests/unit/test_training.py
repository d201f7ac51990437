"""A whole run on one worker: what it leaves, how it goes on, and what it refuses before it begins."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors.torch import save_file

from kdsr import training
from kdsr.checkpoint import StateStore, load_model, save_model
from kdsr.config import (
    ClusterConfig,
    DataConfig,
    DistillConfig,
    MixConfig,
    OptimizerConfig,
    RealWorldDegradation,
    TeacherConfig,
    TeacherTrainingConfig,
)
from kdsr.degrade import bicubic_lr, build_degradation
from kdsr.errors import NonFiniteLoss, RequestError
from kdsr.models import build_model, fold, inherit_slice, share_extractor
from kdsr.shards import read_index, write_index
from kdsr.spec import (
    Card,
    DamSpec,
    EdsrSpec,
    EspcnSpec,
    FsrcnnSpec,
    Labels,
    PatchDiscriminatorSpec,
    RepChainSpec,
    RrdbnetSpec,
    SrganDiscriminatorSpec,
    StoredTap,
    TeacherRef,
    UnetDiscriminatorSpec,
    UnetSpec,
)
from kdsr.store import open_store
from kdsr.terms import (
    AdversarialTerm,
    AttendedTerm,
    AttentionTerm,
    CriticTerm,
    DistillTerm,
    DistillTerms,
    FusionTerm,
    GradientBalance,
    OutputTerm,
    PerceptualTerm,
    PixelTerm,
    TapPair,
    UncertaintyBalance,
    UpcyclingTerm,
)
from kdsr.training import Worker, autocast_type, check, exported_card, rehearse, train
from kdsr.validation import training_pictures
from tests.pictures import photograph
from tests.small_shards import row, write_set

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
CPU = torch.device("cpu")
STUDENT = RepChainSpec(scale=2, num_features=4, num_layers=3)
TEACHER = EdsrSpec(scale=2, num_features=4, num_blocks=1)
HELDOUT = {1, 4}


def photo(number):
    return photograph(number, height=52, width=56)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The uri of six photographs, two of them held out."""
    store = open_store(f"file://{tmp_path_factory.mktemp('set')}/shards")
    rows = [row(f"photo-{i}.png", photo(i), heldout=i in HELDOUT) for i in range(6)]
    write_set(store, [rows[:3], rows[3:]])
    return store.uri


def saved_model(uri, spec, *, seed=0, name="big"):
    """A model directory with random weights that do something."""
    torch.manual_seed(seed)
    model = build_model(spec).eval()
    card = Card(name=name, spec=spec, num_parameters=0, sha256="", licence="MIT")
    return save_model(open_store(uri), model, card)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    uri = f"file://{tmp_path_factory.mktemp('teacher')}/big"
    saved_model(uri, TEACHER)
    return uri


def fields_for(shards, output, fields):
    given = {
        "name": "run",
        "output": str(output),
        "data": DataConfig(shards=shards, patch_size=8, patches_per_row=3, window_rows=2),
        "optimizer": OptimizerConfig(warmup_steps=2),
        "num_steps": 6,
        "batch_size": 2,
        "precision": "float32",
        "log_every_steps": 2,
        "save_every_steps": 2,
        "validate_every_steps": 3,
        "num_validation_images": 2,
        "licence": "Apache-2.0",
    }
    return {**given, **fields}


def config_for(shards, output, **fields):
    return TeacherTrainingConfig(**{"model": STUDENT, **fields_for(shards, output, fields)})


def distil_config(shards, output, teacher, **fields):
    given = {"student": STUDENT, "teacher": TeacherConfig(uri=teacher, force=True)}
    return DistillConfig(**{**given, **fields_for(shards, output, fields)})


def store_of(config):
    return open_store(f"{config.output}/{config.name}")


def rows_of(config):
    return [json.loads(line) for line in store_of(config).get("metrics.jsonl").decode().splitlines()]


def weights_of(config):
    return load_model(f"{store_of(config).uri}/model").model.state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A run that was never interrupted, and what it told its caller."""
    config = config_for(shards, tmp_path_factory.mktemp("finished"), datasets=("photos (CC0)",))
    return config, list(train(config, Worker(command="python jobs/train_teacher.py --name run")))


# ---------------------------------------------------------------- what a run leaves


def test_a_run_tells_and_writes_the_same_at_the_steps_that_were_asked_for(finished):
    config, told = finished
    rows = rows_of(config)
    assert [progress.step for progress in told] == [logged["step"] for logged in rows] == [2, 3, 4, 6]
    for progress, logged in zip(told, rows, strict=True):
        assert {"step": progress.step, **progress.metrics} == logged
    names = {
        "loss",
        "pixel_l1",
        "weight/pixel_l1",
        "learning_rate",
        "gradient_norm",
        "patches_per_second",
        "waiting_share",
    }
    validated = {"heldout_psnr_y", "train_psnr_y"}
    assert [logged.keys() - {"step"} for logged in rows] == [names, validated, names, names | validated]
    assert all(0 <= row["waiting_share"] <= 1 and row["patches_per_second"] > 0 for row in (rows[0], rows[2]))


def test_a_run_leaves_its_config_its_events_and_the_states_it_may_need(finished):
    config, _ = finished
    store = store_of(config)
    keys = {info.key for info in store.list()}
    assert TeacherTrainingConfig.model_validate_json(store.get("config.json")) == config
    assert any(key.startswith("tensorboard/events.out.tfevents") for key in keys)
    states = StateStore(store)
    best = max((r for r in rows_of(config) if "heldout_psnr_y" in r), key=lambda r: r["heldout_psnr_y"])
    assert (states.step("latest"), states.step("best")) == (6, best["step"])
    expected = {states.step("previous"), 6, best["step"]}
    assert states.step("previous") in {3, 4}
    assert {int(key[12:21]) for key in keys if key.endswith(".pt")} == expected
    assert states.load("latest")["step"] == 6


def test_the_model_is_the_folded_mean_of_the_best_state_and_its_card_says_how_it_was_made(finished):
    config, _ = finished
    best = StateStore(store_of(config)).load("best")
    model = build_model(STUDENT)
    model.load_state_dict(best["ema"])
    assert same(weights_of(config), fold(model).state_dict())
    card = load_model(f"{store_of(config).uri}/model").card
    psnr = {row["step"]: row["heldout_psnr_y"] for row in rows_of(config) if "heldout_psnr_y" in row}
    assert card.spec == STUDENT.model_copy(update={"folded": True})
    assert card.metrics == {"heldout_psnr_y": round(psnr[best["step"]], 3)}
    assert (card.name, card.num_steps, card.licence) == ("run", best["step"], "Apache-2.0")
    assert card.data == ["photos (CC0)"] and card.teacher is None and card.created and card.commit
    assert card.command == "python jobs/train_teacher.py --name run"


def test_a_finished_run_has_a_card_and_another_none(finished, shards, tmp_path):
    config, _ = finished
    assert exported_card(config) == load_model(f"{store_of(config).uri}/model").card
    assert exported_card(config_for(shards, tmp_path)) is None


def test_a_run_killed_before_its_export_only_exports(shards, tmp_path, finished):
    config = config_for(shards, tmp_path)
    list(train(config))
    for key in ("card.json", "model.safetensors"):
        store_of(config).delete(f"model/{key}")
    assert exported_card(config) is None
    assert list(train(config)) == []
    assert same(weights_of(config), weights_of(finished[0])) and exported_card(config) is not None


def test_without_validation_the_last_state_is_exported(shards, tmp_path):
    config = config_for(shards, tmp_path, num_validation_images=0, num_steps=3)
    list(train(config))
    assert StateStore(store_of(config)).step("best") is None
    card = exported_card(config)
    assert card.metrics == {} and card.num_steps == 3
    assert card.data == [f"{shards} (CC0-1.0)"]


def test_only_the_first_rank_writes(shards, tmp_path):
    config = config_for(shards, tmp_path, num_steps=2)
    told = list(train(config, Worker(rank=1, world_size=2)))
    assert [progress.step for progress in told] == [2]
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("closed_after", [1, 2, 3])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(shards, tmp_path, finished, closed_after):
    config = config_for(shards, tmp_path)
    begun = train(config)
    for _ in range(closed_after):
        next(begun)
    begun.close()
    # Nothing of a later step may matter, not even what the process would have drawn.
    torch.manual_seed(999)
    list(train(config))
    assert same(weights_of(config), weights_of(finished[0]))
    assert [row["step"] for row in rows_of(config)] == [2, 3, 4, 6]
    for own, expected in zip(rows_of(config), rows_of(finished[0]), strict=True):
        assert own.get("heldout_psnr_y") == expected.get("heldout_psnr_y")
    assert rows_of(config)[0]["pixel_l1"] == rows_of(finished[0])[0]["pixel_l1"]


ALL_THAT_DRAWS = (
    {"kind": "pixel"},
    {"kind": "critic", "weight": 0.1, "taps": [{"student": "layers.1", "teacher": "trunk"}]},
    {"kind": "upcycling", "weight": 0.1},
    {"kind": "contrastive", "weight": 0.1, "refresh_steps": 2, "num_features": 4},
    {
        "kind": "adversarial",
        "weight": 0.01,
        "noise": 0.1,
        "discriminator": {"kind": "patch", "num_features": 4, "num_levels": 1},
    },
)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(shards, tmp_path, teacher):
    """Dropout, places, crops, changes, noise: all of them to the last bit, in what is exported too."""
    terms = TypeAdapter(DistillTerms).validate_python(ALL_THAT_DRAWS)
    chosen = {"terms": terms, "dropout": 0.5, "save_every_steps": 3, "num_validation_images": 0}
    whole = distil_config(shards, tmp_path / "whole", teacher, **chosen)
    list(train(whole))
    config = distil_config(shards, tmp_path, teacher, **chosen)
    begun = train(config)
    while next(begun).step < 4:
        torch.rand(3)  # by whoever watches
    begun.close()
    assert StateStore(store_of(config)).step("latest") == 3
    list(train(config))
    ours, theirs = (StateStore(store_of(each)).load("latest") for each in (config, whole))
    for part in ("model", "ema"):
        assert same(ours[part], theirs[part]), part
    tensors = {name for name, value in theirs["auxiliary"].items() if isinstance(value, torch.Tensor)}
    assert any("critic" in name for name in tensors) and any("discriminator" in name for name in tensors)
    assert all(torch.equal(ours["auxiliary"][name], theirs["auxiliary"][name]) for name in tensors)
    assert same(weights_of(config), weights_of(whole))


def test_dropout_changes_what_is_learned_and_nothing_of_what_is_exported(shards, tmp_path, finished):
    config = config_for(shards, tmp_path, dropout=0.5)
    list(train(config))
    own, plain = weights_of(config), weights_of(finished[0])
    assert own.keys() == plain.keys() and not same(own, plain)


def test_what_was_logged_after_the_last_state_is_made_again_once(shards, tmp_path):
    config = config_for(
        shards, tmp_path, log_every_steps=1, save_every_steps=4, num_steps=5, num_validation_images=0
    )
    begun = train(config)
    for _ in range(3):
        next(begun)
    begun.close()
    assert StateStore(store_of(config)).step("latest") is None
    # As if it had been killed between writing these rows and the state they belong to.
    store_of(config).put("metrics.jsonl", b'{"step": 2, "loss": 0.0}\n{"step": 4, "loss": 0.0}\n')
    list(train(config))
    assert all(logged["loss"] > 0 for logged in rows_of(config))
    assert [row["step"] for row in rows_of(config)] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(shards, tmp_path):
    config = config_for(
        shards,
        tmp_path,
        optimizer=OptimizerConfig(learning_rate=1e30, warmup_steps=0),
        save_every_steps=1,
        num_validation_images=0,
    )
    with pytest.raises(NonFiniteLoss, match=r"step \d: (term pixel_l1|the gradient) is (nan|inf)"):
        list(train(config))
    states = StateStore(store_of(config))
    reached = states.step("latest")
    assert reached is not None and states.load("latest")["step"] == reached
    assert exported_card(config) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"seed: was 0, now 1"),
        ({"num_steps": 7}, r"num_steps: was 6, now 7"),
        (
            {"optimizer": OptimizerConfig(warmup_steps=2, clip_norm=1)},
            r"optimizer\.clip_norm: was None, now 1.0",
        ),
        (
            {"model": RepChainSpec(scale=2, num_features=5, num_layers=3)},
            r"model\.num_features: was 4, now 5",
        ),
        ({"terms": (PixelTerm(loss="mse"),)}, r"terms\.0\.loss: was 'l1', now 'mse'"),
    ],
)
def test_another_run_of_the_same_name_is_refused_by_field(finished, change, named):
    config = finished[0].model_copy(update=change)
    with pytest.raises(RequestError, match=rf"run run in .* other settings \({named}\); choose another name"):
        check(config)


def begun_run(config, *, steps=2):
    """The run after its first words, with a checkpoint."""
    for progress in train(config):
        if progress.step >= steps:
            break
    assert store_of(config).exists("begun.json")


@pytest.mark.parametrize("labelled", [False, True])
def test_a_run_does_not_go_on_with_other_shards_at_the_place_of_its_own(tmp_path, teacher, labelled):
    def write(number):
        if labelled:
            return labelled_set(tmp_path, ref_of(teacher), value=number)
        store = open_store(f"file://{tmp_path}/plain")
        rows = [row(f"photo-{i}.png", photo(i + number), heldout=i in HELDOUT) for i in range(6)]
        write_set(store, [rows[:3], rows[3:]])
        return store.uri

    config = distil_config(write(0), tmp_path, teacher, terms=(PixelTerm(), OutputTerm()))
    begun_run(config)
    write(9)
    digests = r"\(sha256 was [0-9a-f]{12}, now [0-9a-f]{12}\)"
    words = rf"run run in .* was begun on other shards at {config.data.shards} {digests}; put back"
    with pytest.raises(RequestError, match=words):
        list(train(config))
    write(0)
    list(train(config))
    assert exported_card(config) is not None


@pytest.mark.parametrize("other", ["first", "second"])
def test_a_run_does_not_go_on_with_another_teacher_at_the_place_of_its_own(shards, tmp_path, other):
    uris = {name: f"file://{tmp_path}/{name}" for name in ("first", "second")}
    for seed, (name, uri) in enumerate(uris.items()):
        saved_model(uri, TEACHER, seed=seed, name=name)
    second = TeacherConfig(uri=uris["second"], force=True)
    config = distil_config(shards, tmp_path, uris["first"], co_teachers=(second,), terms=(OutputTerm(),))
    begun_run(config)
    saved_model(uris[other], TEACHER, seed=7, name=other)
    words = rf"run run in .* was begun with another teacher at {uris[other]} \(sha256 was .*; put back"
    with pytest.raises(RequestError, match=words):
        check(config)
    assert check(config.model_copy(update={"name": "another"})).sources.teacher_sha256


def test_a_run_that_did_not_write_down_what_it_began_on_goes_on_and_does_so(tmp_path, teacher):
    config = config_for(labelled_set(tmp_path, ref_of(teacher), value=0), tmp_path)
    begun_run(config)
    store_of(config).delete("begun.json")
    labelled_set(tmp_path, ref_of(teacher), value=9)
    begun_run(config, steps=3)
    labelled_set(tmp_path, ref_of(teacher), value=0)
    with pytest.raises(RequestError, match="was begun on other shards"):
        check(config)


@pytest.mark.parametrize("began_in", ["float32", "bfloat16"])
def test_a_run_keeps_the_type_that_its_first_worker_took_where_it_began(
    shards, tmp_path, monkeypatch, began_in
):
    config = config_for(shards, tmp_path, precision="auto")
    other = {"float32": torch.bfloat16, "bfloat16": None}[began_in]
    taken = {"float32": None, "bfloat16": torch.bfloat16}[began_in]

    def suits(device_takes):
        own = training.autocast_type
        monkeypatch.setattr(
            training,
            "autocast_type",
            lambda name, device: device_takes if name == "auto" else own(name, device),
        )

    suits(taken)
    begun_run(config)
    assert json.loads(store_of(config).get("begun.json"))["precision"] == began_in
    suits(other)
    list(train(config))
    asked = config_for(shards, tmp_path, name="asked", precision=began_in)
    list(train(asked))
    assert same(weights_of(config), weights_of(asked))


def test_what_suits_the_first_worker_is_taken_by_all(shards, tmp_path, monkeypatch):
    """The others hear it in a sum, to which they add nothing."""
    config = config_for(shards, tmp_path, precision="auto")
    told: list[float] = []

    def total(values):
        told.extend(values)
        return [1.0]

    monkeypatch.setattr(training, "autocast_type", lambda name, device: None)
    assert training._precision(config, Worker(rank=1, world_size=2, total=total)) == "bfloat16"
    monkeypatch.setattr(training, "autocast_type", lambda name, device: torch.bfloat16)
    assert training._precision(config, Worker(rank=1, world_size=2, total=total)) == "bfloat16"
    assert training._precision(config, Worker(rank=0, world_size=2, total=total)) == "bfloat16"
    assert told == [0.0, 0.0, 1.0]


def test_what_does_not_change_the_result_may_change(finished):
    config = finished[0]
    check(
        config.model_copy(
            update={
                "cluster": ClusterConfig(num_workers=2),
                "micro_batch": 1,
                "log_every_steps": 5,
                "save_every_steps": 7,
                "validate_every_steps": 9,
                "data": config.data.model_copy(update={"num_threads": 3}),
            }
        )
    )


# ---------------------------------------------------------------- refusals


def test_an_empty_prefix_and_an_incomplete_set_are_refused(shards, tmp_path):
    with pytest.raises(RequestError, match="nothing is empty; make shards"):
        check(config_for(f"file://{tmp_path}/nothing", tmp_path))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "shard-0.parquet").write_bytes(b"x")
    with pytest.raises(RequestError, match=r"half has no index\.json: not complete"):
        check(config_for(f"file://{tmp_path}/half", tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_set_without_training_rows_is_refused(tmp_path):
    store = open_store(f"file://{tmp_path}/shards")
    write_set(store, [[row("a", photo(0), heldout=True)]])
    with pytest.raises(RequestError, match="all 1 rows are held out; make shards with a smaller heldout"):
        check(config_for(store.uri, tmp_path))


def test_a_teacher_of_another_scale_or_other_channels_is_refused(shards, tmp_path):
    for spec, message in (
        (EdsrSpec(scale=4, num_features=4, num_blocks=1), "the student has scale 2, the teacher 4"),
        (
            EdsrSpec(scale=2, channels=1, num_features=4, num_blocks=1),
            "student has channels 3, the teacher 1",
        ),
    ):
        uri = f"file://{tmp_path}/{spec.scale}-{spec.channels}"
        saved_model(uri, spec)
        with pytest.raises(RequestError, match=message):
            check(distil_config(shards, tmp_path, uri))


def test_a_second_teacher_of_another_scale_is_refused(shards, tmp_path, teacher):
    uri = f"file://{tmp_path}/x4"
    saved_model(uri, EdsrSpec(scale=4, num_features=4, num_blocks=1), name="second")
    config = distil_config(shards, tmp_path, teacher, co_teachers=(TeacherConfig(uri=uri),))
    with pytest.raises(RequestError, match="teacher second: the student has scale 2, the teacher 4"):
        check(config)


@pytest.mark.parametrize("worse", ["first", "second"])
def test_a_teacher_that_loses_against_bicubic_is_refused_unless_that_is_wanted(
    shards, tmp_path, teacher, worse
):
    first, second = TeacherConfig(uri=teacher), second_teacher(tmp_path)
    if worse == "second":
        first, second = (each.model_copy(update={"force": not each.force}) for each in (first, second))
    config = distil_config(shards, tmp_path, teacher, co_teachers=(second,)).model_copy(
        update={"teacher": first}
    )
    name = {"first": "big", "second": "second"}[worse]
    with pytest.raises(RequestError, match=rf"teacher {name}: expected at least 0 dB over bicubic .*force"):
        check(config)
    assert not (tmp_path / "run").exists()


def test_a_teacher_whose_outputs_are_not_finite_is_refused_in_any_case(shards, tmp_path):
    uri = f"file://{tmp_path}/broken"
    model = build_model(TEACHER).eval()
    torch.nn.init.constant_(model.tail.bias, torch.nan)
    save_model(open_store(uri), model, Card(name="broken", spec=TEACHER, num_parameters=0, sha256=""))
    with pytest.raises(RequestError, match="teacher broken: its output for the test photograph is not fin"):
        check(distil_config(shards, tmp_path, uri))


@pytest.mark.parametrize(
    ("tap", "words"),
    [
        ("body.9", r"the teacher \(.*\) has no tap 'body.9'; it has .*body.0"),
        ("body.0", None),
    ],
)
@pytest.mark.parametrize("kind", ["attention", "perceptual"])
def test_taps_of_a_public_teacher_are_tried_before_anything_starts(shards, tmp_path, kind, tap, words):
    spec = RrdbnetSpec(scale=2, num_features=4, num_growth=4, num_blocks=1)
    torch.save(build_model(spec).state_dict(), tmp_path / "public.pth")
    taps = [tap] if kind == "perceptual" else [{"student": "layers.0", "teacher": tap}]
    term = TypeAdapter(DistillTerm).validate_python({"kind": kind, "taps": taps})
    config = distil_config(shards, tmp_path, str(tmp_path / "public.pth"), terms=(PixelTerm(), term))
    if words is None:
        assert check(config).teachers
        return
    with pytest.raises(RequestError, match=words):
        check(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("terms", "reference", "words"),
    [
        ((OutputTerm(),), ("pixel",), "kind pixel, and terms have none"),
        ((PixelTerm(),), ("output",), "kind output, and terms have none"),
        ((UpcyclingTerm(),), ("pixel", "output"), "kind pixel or output, and terms have none"),
        (
            (PixelTerm(weight=0, final_weight=1, ramp=(0.5, 0.5)), OutputTerm()),
            ("pixel",),
            "kind pixel, and at 0 of the run others have a weight and none of these",
        ),
        (
            (PixelTerm(final_weight=0, ramp=(0.2, 0.7)), OutputTerm()),
            ("pixel",),
            "kind pixel, and at 0.7 of the run others have a weight and none of these",
        ),
    ],
)
def test_a_balance_by_gradients_without_what_it_measures_by_is_refused(
    shards, tmp_path, teacher, terms, reference, words
):
    balance = GradientBalance(reference=reference)
    config = distil_config(shards, tmp_path, teacher, terms=terms, balance=balance)
    with pytest.raises(RequestError, match=words):
        check(config)


TAPS = [{"student": "layers.0", "teacher": "trunk"}]


@pytest.mark.parametrize(
    ("term", "refused"),
    [
        ({"kind": "variational", "taps": TAPS}, True),
        ({"kind": "critic", "positions": 2, "taps": TAPS}, True),
        ({"kind": "critic", "positions": 2, "bound": "jensen_shannon", "taps": TAPS}, False),
        ({"kind": "adversarial", "discriminator": {"kind": "patch", "num_levels": 1}, "loss": "hinge"}, True),
        ({"kind": "adversarial", "discriminator": {"kind": "patch", "num_levels": 1}}, False),
        ({"kind": "contrastive"}, False),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else str(value),
)
def test_uncertainty_is_refused_for_losses_that_can_be_negative(shards, tmp_path, teacher, term, refused):
    """There a weight would grow without end: loss / b + log b falls for ever as b goes to 0."""
    terms = (PixelTerm(), TypeAdapter(DistillTerm).validate_python(term))
    config = distil_config(shards, tmp_path, teacher, terms=terms, balance=UncertaintyBalance())
    if not refused:
        assert check(config)
        return
    with pytest.raises(RequestError, match=rf"uncertainty .* the {term['kind']} term.* grow without end"):
        check(config)


def test_a_teacher_that_no_term_looks_at_is_not_even_read(shards, tmp_path):
    config = distil_config(shards, tmp_path, "file:///nowhere/model", terms=(PixelTerm(),))
    assert check(config).teachers == ()


def labelled_set(tmp_path, teacher, *, value=None):
    """The photographs with a teacher's outputs, which are all `value`, or HR itself."""
    store = open_store(f"file://{tmp_path}/labelled")
    rows = [
        row(
            f"{i}",
            photo(i),
            heldout=i in HELDOUT,
            teacher_sr=photo(i) if value is None else photo(i) * 0 + value,
        )
        for i in range(6)
    ]
    write_set(store, [rows], teacher=teacher)
    return store.uri


def ref_of(teacher):
    card = load_model(teacher).card
    return TeacherRef(name=card.name, sha256=card.sha256)


def test_stored_outputs_of_another_teacher_are_refused(tmp_path, teacher):
    uri = labelled_set(tmp_path, TeacherRef(name="other", sha256="f" * 64))
    with pytest.raises(RequestError, match=r"carries outputs of teacher other \(f{12}\), .* asks for big"):
        check(distil_config(uri, tmp_path, teacher))


def test_stored_outputs_for_another_lr_are_refused(tmp_path, teacher):
    uri = labelled_set(tmp_path, ref_of(teacher))
    data = DataConfig(shards=uri, patch_size=8, degradation=RealWorldDegradation())
    with pytest.raises(RequestError, match="outputs for bicubic LR, and data.degradation real_world makes"):
        check(distil_config(uri, tmp_path, teacher, data=data))


def second_teacher(tmp_path, *, trained_for="fidelity"):
    torch.manual_seed(1)
    card = Card(name="second", spec=TEACHER, num_parameters=0, sha256="", trained_for=trained_for)
    uri = f"file://{tmp_path}/second"
    save_model(open_store(uri), build_model(TEACHER).eval(), card)
    return TeacherConfig(uri=uri, force=True)


def test_two_teachers_train_one_student_and_its_card_names_both(shards, tmp_path, teacher):
    config = distil_config(shards, tmp_path, teacher, co_teachers=(second_teacher(tmp_path),))
    list(train(config))
    card = load_model(f"file://{tmp_path}/run/model").card
    assert card.teacher is not None
    assert [card.teacher.name, *(ref.name for ref in card.co_teachers)] == ["big", "second"]


def test_teachers_of_different_goals_are_mixed_only_when_that_is_wanted(shards, tmp_path, teacher):
    second = second_teacher(tmp_path, trained_for="perception")
    config = distil_config(shards, tmp_path, teacher, co_teachers=(second,))
    with pytest.raises(RequestError, match=r"big for fidelity, second for perception.*mix\.force"):
        check(config)
    forced = config.model_copy(update={"mix": MixConfig(force=True)})
    assert [ref.name for ref in check(forced).teachers] == ["big", "second"]


def test_teachers_of_different_goals_are_told_apart_when_their_names_are_the_same(shards, tmp_path, teacher):
    same = saved_model(f"file://{tmp_path}/same", TEACHER, seed=1).name
    second = TeacherConfig(uri=f"file://{tmp_path}/same", force=True, trained_for="perception")
    config = distil_config(shards, tmp_path, teacher, co_teachers=(second,))
    with pytest.raises(RequestError, match=f"{same} for fidelity, {same} for perception"):
        check(config)


def test_stored_outputs_of_one_teacher_do_not_do_for_two(tmp_path, teacher):
    uri = labelled_set(tmp_path, ref_of(teacher))
    config = distil_config(uri, tmp_path, teacher, co_teachers=(second_teacher(tmp_path),))
    with pytest.raises(RequestError, match=r"outputs of big alone, and the run has 2 teachers"):
        check(config)


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        (
            ("layers.7", "trunk"),
            r"the student \(rep_chain\) has no tap 'layers.7'; it has layers.0",
        ),
        (("layers.0", "tail"), r"the teacher \(big\) has no tap 'tail'; it has head, trunk.0, trunk"),
    ],
)
def test_a_tap_that_does_not_exist_is_refused_before_anything_starts(shards, tmp_path, teacher, taps, words):
    term = AttentionTerm(taps=(TapPair(student=taps[0], teacher=taps[1]),))
    with pytest.raises(RequestError, match=words):
        check(distil_config(shards, tmp_path, teacher, terms=(PixelTerm(), term)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "term",
    [
        {"kind": "variational", "taps": [{"student": "layers.1", "teacher": "trunk"}]},
        {"kind": "contrastive", "refresh_steps": 2},
        {"kind": "upcycling"},
    ],
    ids=lambda term: term["kind"],
)
def test_what_learns_beside_the_student_goes_on_and_never_reaches_the_model(shards, tmp_path, teacher, term):
    terms = (PixelTerm(), TypeAdapter(DistillTerm).validate_python(term))
    chosen = {"terms": terms, "balance": GradientBalance(every_steps=2)}
    whole = distil_config(shards, tmp_path / "whole", teacher, **chosen)
    list(train(whole))
    config = distil_config(shards, tmp_path, teacher, **chosen)
    for progress in train(config):
        if progress.step >= 4:
            break
    list(train(config))
    assert set(weights_of(config)) == set(fold(build_model(STUDENT)).state_dict())
    names = StateStore(store_of(config)).load("latest")["auxiliary"]
    assert any("variational" in name or "contrastive" in name or "peaks" in name for name in names)
    row = rows_of(config)[-1]
    assert f"weight/{term['kind']}" in row
    assert same(weights_of(config), weights_of(whole))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EspcnSpec(scale=2, num_features=4), "expected a network of kind rep_chain, found espcn"),
        (RepChainSpec(scale=2, num_features=8, num_layers=3), "of num_features 4, found 8"),
    ],
)
def test_weights_of_another_kind_or_width_are_no_beginning(shards, tmp_path, spec, message):
    uri = f"file://{tmp_path}/first"
    saved_model(uri, spec)
    with pytest.raises(RequestError, match=f"init_from {uri}: .*{message}; take a model of the same kind"):
        check(config_for(shards, tmp_path, init_from=uri))


def test_a_bias_alone_is_no_beginning(shards, tmp_path):
    """EDSRs of any width share the three numbers of the last bias."""
    uri = f"file://{tmp_path}/first"
    saved_model(uri, EdsrSpec(scale=2, num_features=8, num_blocks=1))
    with pytest.raises(RequestError, match="num_features 4, found 8"):
        check(config_for(shards, tmp_path, init_from=uri, model=TEACHER))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (EspcnSpec(scale=2, num_features=4), "expected a network of kind rep_chain, found espcn"),
        (RepChainSpec(scale=2, num_features=4, num_layers=2), "num_layers 3 or more, found 2"),
    ],
)
def test_a_slice_of_a_smaller_network_is_no_beginning(shards, tmp_path, spec, message):
    uri = f"file://{tmp_path}/first"
    saved_model(uri, spec)
    with pytest.raises(RequestError, match=f"init_from {uri}: .*{message}"):
        check(config_for(shards, tmp_path, init_from=uri, inherit="slice"))


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (
            CriticTerm(positions=5, taps=(TapPair(student="bottom", teacher="trunk"),)),
            "critic .* at 5 places",
        ),
        (AttendedTerm(taps=(TapPair(student="bottom", teacher="trunk"),)), "attended .* at 9 places"),
        (FusionTerm(taps=(TapPair(student="bottom", teacher="trunk"),)), "fusion .* at 9 places"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_features_of_too_few_places_are_refused_before_anything_starts(
    shards, tmp_path, teacher, term, words
):
    student = UnetSpec(scale=2, num_features=4, num_levels=2)
    config = distil_config(shards, tmp_path, teacher, student=student, terms=(PixelTerm(), term))
    with pytest.raises(RequestError, match=f"{words} or more, .*patch_size 8 has 4 at 'bottom' and 'trunk'"):
        check(config)
    fine = term.model_copy(update={"taps": (TapPair(student="decoder.0", teacher="trunk"),)})
    check(config.model_copy(update={"terms": (PixelTerm(), fine)}))


SEVENTEEN = CriticTerm(positions=17, taps=(TapPair(student="layers.0", teacher="body.0"),))


def halved_network(path):
    """A public network whose trunk has a place for each four pixels of LR."""
    spec = RrdbnetSpec(scale=2, num_features=4, num_growth=4, num_blocks=1, unshuffle=True)
    torch.save(build_model(spec).state_dict(), path)
    return str(path)


def test_features_of_too_few_places_of_a_public_teacher_are_refused_too(shards, tmp_path):
    uri = halved_network(tmp_path / "public.pth")
    config = distil_config(shards, tmp_path, uri, terms=(PixelTerm(), SEVENTEEN))
    words = "critic term looks at 17 places or more, .* has 16 at 'layers.0' and 'body.0'"
    with pytest.raises(RequestError, match=words):
        check(config)
    data = config.data.model_copy(update={"patch_size": 10})
    assert check(config.model_copy(update={"data": data})).teachers


def test_stored_features_of_too_few_places_of_a_public_teacher_are_refused(tmp_path):
    uri = halved_network(tmp_path / "public.pth")
    plain = labelled_set(tmp_path, ref_of(uri))
    index = read_index(open_store(plain))
    labels = Labels(taps=(StoredTap(tap="body.0", width=4, rank=4, stride=2),))
    write_index(open_store(plain), index.model_copy(update={"labels": labels}))
    config = distil_config(plain, tmp_path, uri, terms=(PixelTerm(), SEVENTEEN))
    with pytest.raises(RequestError, match="critic term looks at 17 places or more, .* has 16 at"):
        check(config)
    data = config.data.model_copy(update={"patch_size": 10})
    assert check(config.model_copy(update={"data": data})).teachers


@pytest.mark.parametrize(
    "judge",
    [PatchDiscriminatorSpec(), SrganDiscriminatorSpec(), UnetDiscriminatorSpec()],
    ids=lambda j: j.kind,
)
def test_patches_that_a_discriminator_cannot_judge_are_refused(shards, tmp_path, teacher, judge):
    terms = (PixelTerm(), AdversarialTerm(discriminator=judge))
    small, fine = judge.min_size // 2 - 1, judge.min_size // 2
    for config in (
        distil_config(shards, tmp_path, teacher, terms=terms),
        config_for(shards, tmp_path, terms=terms),
    ):
        data = config.data.model_copy(update={"patch_size": small})
        words = f"the {judge.kind} .* judges at least {judge.min_size} pixels a side, .* have {2 * small};"
        with pytest.raises(RequestError, match=words):
            check(config.model_copy(update={"data": data}))
        data = config.data.model_copy(update={"patch_size": fine})
        check(config.model_copy(update={"data": data}))


@pytest.mark.parametrize(
    ("taps", "patch_size", "words"),
    [
        (("conv6_1",), 8, "vgg.safetensors has no tap 'conv6_1'; it has conv1_1, relu1_1"),
        (("conv2_1", "conv5_1"), 7, "look at no less than 16 pixels a side, and HR patches have 14"),
    ],
)
def test_a_network_that_cannot_look_at_the_patches_is_refused(shards, tmp_path, taps, patch_size, words):
    uri = f"file://{tmp_path}/vgg.safetensors"
    save_vgg(tmp_path / "vgg.safetensors")
    term = PerceptualTerm(network=uri, taps=taps)
    config = config_for(shards, tmp_path, terms=(PixelTerm(), term))
    data = config.data.model_copy(update={"patch_size": patch_size})
    with pytest.raises(RequestError, match=words):
        check(config.model_copy(update={"data": data}))


def test_a_network_for_other_images_and_taps_of_the_teacher_that_do_not_exist_are_refused(
    shards, tmp_path, teacher
):
    saved_model(f"file://{tmp_path}/grey", EspcnSpec(scale=2, channels=1, num_features=4))
    term = PerceptualTerm(network=f"file://{tmp_path}/grey", taps=("body.1",))
    with pytest.raises(RequestError, match="looks at images of channels 1, and the run makes 3"):
        check(config_for(shards, tmp_path, terms=(PixelTerm(), term)))
    own = PerceptualTerm(taps=("body.1",))
    with pytest.raises(RequestError, match=r"the teacher \(big\) has no tap 'body.1'; it has head"):
        check(distil_config(shards, tmp_path, teacher, terms=(PixelTerm(), own)))


def test_an_extractor_of_another_kind_is_refused_also_where_no_term_asks_for_a_teacher(
    shards, tmp_path, teacher
):
    config = distil_config(shards, tmp_path, teacher, share_extractor=True, terms=(PixelTerm(),))
    with pytest.raises(RequestError, match="share_extractor with teacher big: .* kind rep_chain, found edsr"):
        check(config)
    student = EdsrSpec(scale=2, num_features=4, num_blocks=1)
    term = AttentionTerm(taps=(TapPair(student="head", teacher="head"),))
    config = config.model_copy(update={"student": student, "terms": (PixelTerm(), term)})
    with pytest.raises(RequestError, match="attention term looks at 'head', which share_extractor keeps"):
        check(config)


# ---------------------------------------------------------------- beginnings and teachers


SHARING = {
    "rep_chain": (
        RepChainSpec(scale=2, num_features=4, num_layers=3),
        RepChainSpec(scale=2, num_features=6, num_layers=4, folded=True),
        ("layers.1", "layers.2"),
    ),
    "dam": (
        DamSpec(scale=2, num_features=4, num_blocks=1),
        DamSpec(scale=2, num_features=4, num_blocks=2),
        ("blocks.0", "blocks.1"),
    ),
}


@pytest.mark.parametrize("kind", SHARING)
def test_a_shared_extractor_stays_what_it_is_and_the_student_leaves_alone(shards, tmp_path, kind):
    """With every part of the method, a stop and a start in between, and no teacher at the end."""
    student, spec, taps = SHARING[kind]
    uri = f"file://{tmp_path}/teacher"
    saved_model(uri, spec, seed=4)
    pair = (TapPair(student=taps[0], teacher=taps[1]),)
    config = distil_config(
        shards,
        tmp_path,
        uri,
        student=student,
        share_extractor=True,
        terms=(
            PixelTerm(),
            AttendedTerm(weight=0.1, final_weight=0, taps=pair),
            FusionTerm(weight=0.1, final_weight=0, num_hidden=4, taps=pair),
            CriticTerm(weight=0.1, final_weight=0, positions=4, taps=pair),
            AdversarialTerm(
                weight=0.01,
                final_weight=0,
                real="teacher",
                discriminator=PatchDiscriminatorSpec(num_features=4, num_levels=1),
            ),
        ),
        balance=GradientBalance(every_steps=2),
        save_every_steps=3,
    )
    begun = train(config)
    next(progress for progress in begun if progress.step >= 3)
    begun.close()
    list(train(config))
    expected = build_model(student)
    share_extractor(expected, load_model(uri).model)
    shared = shared_weights(expected)
    assert shared and same(shared, {name: weights_of(config)[name] for name in shared})
    latest = StateStore(store_of(config)).load("latest")
    for state in ("model", "ema"):
        network = build_model(student)
        network.load_state_dict(latest[state])
        assert same(shared, shared_weights(network))
    open_store(uri).delete("model.safetensors")
    exported = load_model(f"{store_of(config).uri}/model")
    assert set(exported.model.state_dict()) == set(fold(build_model(student)).state_dict())
    assert exported.model(torch.rand(1, 3, 5, 6)).shape == (1, 3, 10, 12)
    assert exported.card.teacher.name == "big" and exported.card.trained_for == "fidelity"


def test_a_sliced_student_shares_the_channels_that_its_other_layers_were_cut_for(shards, tmp_path):
    uri = f"file://{tmp_path}/teacher"
    saved_model(uri, RepChainSpec(scale=2, num_features=16, num_layers=4, folded=True), seed=4)
    student = RepChainSpec(scale=2, num_features=6, num_layers=4)
    given = {"student": student, "terms": (PixelTerm(),), "init_from": uri, "inherit": "slice"}
    sliced, sharing = (
        fold(rehearse(distil_config(shards, tmp_path, uri, share_extractor=share, **given))[0].model)
        for share in (False, True)
    )
    assert torch.allclose(sliced.layers[0].weight, sharing.layers[0].weight, atol=1e-3)
    own = build_model(student)
    share_extractor(own, load_model(uri).model)  # by drawn pictures, which are not those of the run
    assert not torch.allclose(fold(own).layers[0].weight, sharing.layers[0].weight, atol=1e-3)


def test_the_preset_of_the_dam_method_fits_its_teacher_and_ends_with_pixels_alone(shards, tmp_path):
    given = {
        name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("teacher_dam_x4", "dam_x4")
    }
    taught = TeacherTrainingConfig.model_validate(given["teacher_dam_x4"])
    saved_model(f"file://{tmp_path}/teacher", taught.model)
    config = DistillConfig.model_validate(
        {
            **given["dam_x4"],
            "output": str(tmp_path),
            "data": {"shards": shards, "patch_size": 8, "patches_per_row": 1},
            "teacher": {"uri": f"{tmp_path}/teacher"},
            "num_steps": 1,
            "batch_size": 2,
            "num_validation_images": 0,
        }
    )
    list(train(config))
    (row,) = rows_of(config)
    assert row.keys() >= {"attended", "fusion", "critic", "adversarial_hinge", "output_l1", "critic/nats"}
    assert {term.kind for term in config.terms if term.at(1.0) > 0} == {"pixel"}
    assert load_model(f"{store_of(config).uri}/model").card.trained_for == "fidelity"


def shared_weights(model):
    name = model.spec.extractor
    return {key: weight for key, weight in fold(model).state_dict().items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize(("final_weight", "goal"), [(0.0, "fidelity"), (1e-3, "perception")])
def test_who_looks_with_another_network_until_the_end_is_trained_for_perception(
    shards, tmp_path, final_weight, goal
):
    uri = f"file://{tmp_path}/vgg.safetensors"
    save_vgg(tmp_path / "vgg.safetensors")
    term = PerceptualTerm(network=uri, taps=("conv2_2",), weight=0.1, final_weight=final_weight)
    config = config_for(shards, tmp_path, terms=(PixelTerm(), term), num_steps=2)
    list(train(config))
    assert rows_of(config)[-1]["perceptual_l1"] > 0
    assert load_model(f"{store_of(config).uri}/model").card.trained_for == goal
    assert StateStore(store_of(config)).load("latest")["auxiliary"] == {}


@pytest.mark.parametrize(("final_weight", "goal"), [(0.0, "fidelity"), (1e-3, "perception")])
def test_who_follows_a_teacher_for_looks_until_the_end_is_trained_for_perception_too(
    shards, tmp_path, final_weight, goal
):
    second = second_teacher(tmp_path, trained_for="perception")
    terms = (PixelTerm(), OutputTerm(weight=0.5, final_weight=final_weight))
    config = distil_config(shards, tmp_path, second.uri, terms=terms, num_steps=2)
    list(train(config))
    assert load_model(f"{store_of(config).uri}/model").card.trained_for == goal


def test_what_a_teacher_is_said_to_be_trained_for_counts_before_its_card(shards, tmp_path, teacher):
    said = TeacherConfig(uri=teacher, force=True, trained_for="perception")
    config = distil_config(shards, tmp_path, teacher, num_steps=2).model_copy(update={"teacher": said})
    list(train(config))
    assert load_model(f"{store_of(config).uri}/model").card.trained_for == "perception"


def save_vgg(path):
    """A VGG16 as torchvision stores it, with two channels a layer."""
    places = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    torch.manual_seed(0)
    state = {f"features.{n}.weight": torch.randn(2, 2 if n else 3, 3, 3) for n in places}
    save_file({**state, **{f"features.{n}.bias": torch.zeros(2) for n in places}}, path)


def test_a_network_begins_with_a_slice_of_a_larger_one(shards, tmp_path):
    uri = f"file://{tmp_path}/large"
    saved_model(uri, RepChainSpec(scale=2, num_features=8, num_layers=4), seed=5)
    # With hardly any learning rate, what is exported is what the run began with.
    config = config_for(
        shards,
        tmp_path,
        init_from=uri,
        inherit="slice",
        num_steps=1,
        num_validation_images=0,
        optimizer=OptimizerConfig(learning_rate=1e-9, final_learning_rate=0, warmup_steps=0),
    )
    list(train(config))
    expected = build_model(config.model)
    store = open_store(config.data.shards)
    degrade = build_degradation(config.data.degradation, 2)
    pictures = training_pictures(
        store, read_index(store), degrade=degrade, scale=2, channels=3, least_side=config.data.patch_size
    )
    assert pictures.shape[1:] == (3, *pictures.shape[2:]) and 0 <= pictures.min() < pictures.max() <= 1
    inherit_slice(expected, load_model(uri).model, pictures)
    for name, weight in fold(expected).state_dict().items():
        assert torch.allclose(weights_of(config)[name], weight, atol=1e-5), name


@pytest.mark.parametrize("kind", ["rep_chain", "edsr", "fsrcnn"])
def test_an_x4_network_begins_with_the_trunk_of_an_x2_one(shards, tmp_path, kind):
    shape = {
        "rep_chain": {"num_layers": 3},
        "edsr": {"num_blocks": 1},
        "fsrcnn": {"num_shrunk_features": 2, "num_mapping_layers": 1},
    }[kind]
    spec = {"rep_chain": RepChainSpec, "edsr": EdsrSpec, "fsrcnn": FsrcnnSpec}[kind]
    uri = f"file://{tmp_path}/x2"
    saved_model(uri, spec(scale=2, num_features=4, **shape), seed=5)
    # With hardly any learning rate, what is exported is what the run began with.
    config = config_for(
        shards,
        tmp_path,
        model=spec(scale=4, num_features=4, **shape),
        init_from=uri,
        num_steps=1,
        num_validation_images=0,
        optimizer=OptimizerConfig(learning_rate=1e-9, final_learning_rate=0, warmup_steps=0),
    )
    list(train(config))
    first, own = fold(load_model(uri).model).state_dict(), weights_of(config)
    torch.manual_seed(config.seed)
    fresh = fold(build_model(config.model)).state_dict()
    trunk = [name for name in first if first[name].dim() == 4 and first[name].shape == own[name].shape]
    assert len(trunk) >= 2
    for name in trunk:
        assert torch.allclose(own[name], first[name], atol=1e-6), name
        assert not torch.allclose(own[name], fresh[name], atol=1e-3), name


def distance_to_teacher(student, teacher):
    hr = torch.from_numpy(photo(min(HELDOUT)).copy()).permute(2, 0, 1)[None] / 255
    lr = bicubic_lr(hr, 2)
    with torch.no_grad():
        return (student(lr) - load_model(teacher).model(lr).clamp(0, 1)).abs().mean().item()


def test_distilling_brings_the_student_nearer_to_a_live_teacher(shards, tmp_path, teacher):
    config = distil_config(
        shards,
        tmp_path,
        teacher,
        terms=(PixelTerm(weight=0, final_weight=0.1), OutputTerm()),
        num_steps=40,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, ema_decay=0),
        save_every_steps=40,
        num_validation_images=0,
    )
    list(train(config))
    student = load_model(f"{store_of(config).uri}/model")
    before = distance_to_teacher(build_model(STUDENT), teacher)
    assert distance_to_teacher(student.model, teacher) < 0.7 * before
    assert student.card.teacher == ref_of(teacher).model_copy(update={"licence": "MIT"})
    rows = rows_of(config)
    assert rows[0].keys() >= {"pixel_l1", "output_l1"}
    assert rows[0]["loss"] == pytest.approx(rows[0]["output_l1"] + rows[0]["pixel_l1"] / 2, rel=1e-3)


def test_stored_outputs_are_enough_to_distil(tmp_path):
    """The teacher's weights are gone; its card says whose outputs the shards carry."""
    uri = f"file://{tmp_path}/gone"
    card = saved_model(uri, TEACHER)
    open_store(uri).delete("model.safetensors")
    labelled = labelled_set(tmp_path, TeacherRef(name=card.name, sha256=card.sha256), value=255)
    config = distil_config(
        labelled, tmp_path, uri, terms=(OutputTerm(),), num_steps=2, num_validation_images=0
    )
    list(train(config))
    (only,) = rows_of(config)
    # Before it learns anything, the student is bicubic, and the teacher says white.
    mean = np.mean([photo(i).mean() for i in range(6) if i not in HELDOUT]) / 255
    assert only["output_l1"] == pytest.approx(1 - mean, abs=0.2)
    assert load_model(f"{store_of(config).uri}/model").card.teacher.sha256 == card.sha256


def test_labels_change_nothing_for_a_run_without_a_teacher(tmp_path, teacher):
    plain = open_store(f"file://{tmp_path}/plain")
    write_set(plain, [[row(f"{i}", photo(i), heldout=i in HELDOUT) for i in range(6)]])
    found = []
    for name, uri in (("plain", plain.uri), ("labelled", labelled_set(tmp_path, ref_of(teacher), value=0))):
        config = config_for(uri, tmp_path, name=name, num_steps=3, num_validation_images=0)
        list(train(config))
        found.append(weights_of(config))
    assert same(*found)


def test_shards_labelled_at_x2_train_an_x3_network_alone(tmp_path, teacher):
    """17 LR pixels at x3 need all 51 rows, of which the x2 teacher saw 50."""
    store = open_store(f"file://{tmp_path}/odd")
    hr = photo(0)[:51]
    write_set(store, [[row("a", hr, teacher_sr=hr[:50])]], teacher=ref_of(teacher))
    data = DataConfig(shards=store.uri, patch_size=13, patches_per_row=2)
    model = EspcnSpec(scale=3, num_features=4)
    config = config_for(store.uri, tmp_path, model=model, data=data, num_steps=1)
    assert [progress.step for progress in train(config)] == [1]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", {None}), ("bfloat16", {torch.bfloat16}), ("auto", {None, torch.bfloat16})],
)
def test_the_type_of_the_forward_pass_is_what_was_asked(precision, expected):
    assert autocast_type(precision, CPU) in expected
