"""What a config refuses and what it makes of what it is given."""

import inspect
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

import kdsr.config
from kdsr.cli import parse
from kdsr.config import (
    CheckConfig,
    ClusterConfig,
    CompareConfig,
    Degradation,
    DistillConfig,
    EvaluateConfig,
    LabelConfig,
    ServeConfig,
    ShardConfig,
    StoreConfig,
    TeacherTrainingConfig,
    TrainingConfig,
    TuneConfig,
    UpscaleConfig,
)
from kdsr.space import Domain
from kdsr.spec import EdsrSpec, Frozen
from kdsr.terms import Schedule
from kdsr.uris import absolute_uri, endpoint_url, model_reference

ROOT = Path(__file__).parents[2]
YAML_FILES = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))

STUDENT = {"kind": "rep_chain", "scale": 4}
RUN = {"name": "a", "output": "runs", "data": {"shards": "shards"}}
SMALLEST = {
    ShardConfig: {"input": "a", "output": "b"},
    CheckConfig: {"check": "a"},
    TeacherTrainingConfig: {**RUN, "model": {"kind": "edsr", "scale": 2}},
    DistillConfig: {**RUN, "student": STUDENT, "teacher": {"uri": "edsr-x4"}},
    LabelConfig: {"shards": "a", "output": "b", "teacher": {"uri": "edsr-x4"}},
    CompareConfig: {
        "output": "a",
        "benchmark": ["Set5"],
        "data": {"shards": "shards"},
        "teacher": {"uri": "edsr-x4"},
        "students": {"small": STUDENT},
        "methods": {"alone": {}},
    },
    TuneConfig: {
        "base": {"data": {"shards": "shards"}, "student": STUDENT, "teacher": {"uri": "edsr-x4"}},
        "space": {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "output": "a",
    },
    EvaluateConfig: {"model": ["bicubic"], "benchmark": ["Set5"], "output": "c"},
    ServeConfig: {},
    UpscaleConfig: {"input": "a", "output": "b", "model": "photo-x4"},
}


# ---------------------------------------------------------------- every config


@pytest.mark.parametrize("config_class", SMALLEST)
def test_required_fields_are_enough(config_class):
    config_class.model_validate(SMALLEST[config_class])


@pytest.mark.parametrize("config_class", SMALLEST)
def test_what_is_saved_reads_back_the_same(config_class):
    config = config_class.model_validate(SMALLEST[config_class])
    assert config_class.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("config_class", SMALLEST)
def test_a_config_cannot_be_changed(config_class):
    config = config_class.model_validate(SMALLEST[config_class])
    with pytest.raises(ValidationError, match="frozen"):
        config.output = "elsewhere"


def test_every_default_passes_its_own_checks():
    members = inspect.getmembers(kdsr.config, inspect.isclass)
    # A domain is one of several, and none of them is the default.
    models = [member for _, member in members if issubclass(member, Frozen) and member is not Domain]
    assert len(models) > 10
    for model in models:
        if not any(field.is_required() for field in model.model_fields.values()):
            assert model.model_validate(model().model_dump()) == model()


CLASS_OF_PREFIX = {
    "shard": ShardConfig,
    "teacher": TeacherTrainingConfig,
    "train": TeacherTrainingConfig,
    "distill": DistillConfig,
    "label": LabelConfig,
    "compare": CompareConfig,
    "evaluate": EvaluateConfig,
    "upscale": UpscaleConfig,
    "serve": ServeConfig,
}


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_yaml_file_of_the_repository_is_accepted(path):
    first_line = path.read_text(encoding="utf-8").partition("\n")[0]
    named = re.fullmatch(r"# config: (\w+)", first_line)
    config_class = (
        getattr(kdsr.config, named[1]) if named else CLASS_OF_PREFIX[re.split(r"[_.]", path.name)[0]]
    )
    parse(config_class, ["--config", str(path)])


# ---------------------------------------------------------------- places


@given(st.text(st.characters(exclude_categories=("Cs",)).filter(lambda c: c not in "/~\0")))
def test_a_plain_path_becomes_absolute_and_stays_literal(name):
    uri = absolute_uri(f"photos/{name}x")
    assert uri == f"file://{Path.cwd()}/photos/{name}x"
    assert absolute_uri(uri) == uri


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/a b/+%20#é", "s3://bucket/a@b"])
def test_an_s3_uri_stays_as_it_is(uri):
    assert absolute_uri(uri) == uri


def test_a_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert absolute_uri("~/photos") == "file:///home/ada/photos"


@pytest.mark.parametrize(
    "uri", ["gs://bucket/x", "https://host/x", "s3:///x", "s3://", "s3://key:secret@bucket"]
)
def test_another_scheme_or_no_bucket_is_refused(uri):
    with pytest.raises(ValueError, match="://"):
        absolute_uri(uri)


@pytest.mark.parametrize("name", ["photo-x4", "edsr-demo-x4", "bicubic"])
def test_the_name_of_a_model_stays_a_name(name):
    assert model_reference(name) == name


@pytest.mark.parametrize(
    "place", ["runs/a/model", "./model", "teacher.pth", "x4.pt", "m.safetensors", "file:///m"]
)
def test_what_looks_like_a_place_becomes_a_uri(place):
    assert model_reference(place).startswith("file:///")


@pytest.mark.parametrize("url", ["localhost:8333", "s3://x", "http://", "http://key:secret@host", ""])
def test_an_endpoint_is_a_plain_http_address(url):
    with pytest.raises(ValueError, match="credentials|expected http") as caught:
        endpoint_url(url)
    assert "secret" not in str(caught.value)


def test_store_timeouts_are_positive():
    with pytest.raises(ValidationError):
        StoreConfig(read_timeout_seconds=0)


# ---------------------------------------------------------------- schedules


def test_a_weight_alone_is_constant():
    assert {Schedule(weight=0.3).at(progress) for progress in (0.0, 0.5, 1.0)} == {0.3}


def test_a_ramp_is_linear_between_its_ends():
    schedule = Schedule(weight=1.0, final_weight=0.0, ramp=(0.2, 0.6))
    assert [round(schedule.at(progress), 9) for progress in (0.0, 0.2, 0.4, 0.6, 1.0)] == [1, 1, 0.5, 0, 0]


def test_a_ramp_without_length_is_a_switch():
    schedule = Schedule(weight=1.0, final_weight=0.0, ramp=(0.5, 0.5))
    assert [schedule.at(progress) for progress in (0.0, 0.49, 0.5, 1.0)] == [1, 1, 0, 0]


@given(
    weight=st.floats(0, 10),
    final=st.floats(0, 10),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    at=st.floats(0, 1),
)
def test_a_weight_stays_between_its_ends(weight, final, ends, at):
    schedule = Schedule(weight=weight, final_weight=final, ramp=(min(ends), max(ends)))
    assert min(weight, final) - 1e-9 <= schedule.at(at) <= max(weight, final) + 1e-9


@pytest.mark.parametrize("ramp", [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1)])
def test_a_ramp_runs_forward_within_the_run(ramp):
    with pytest.raises(ValidationError, match=r"ramp must run forward within 0\.\.1"):
        Schedule(ramp=ramp)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("num_workers", [6, [2, 6]])
def test_a_batch_has_a_patch_for_every_worker(num_workers):
    run = {**SMALLEST[DistillConfig], "batch_size": 5, "cluster": {"num_workers": num_workers}}
    with pytest.raises(ValidationError, match="batch_size 5 is less than cluster.num_workers 6"):
        DistillConfig.model_validate(run)


def test_workers_may_be_so_many_or_between_two_numbers():
    fixed, between = ClusterConfig(num_workers=3), ClusterConfig(num_workers=(2, 4))
    assert (fixed.least_workers, fixed.most_workers) == (3, 3)
    assert (between.least_workers, between.most_workers) == (2, 4)
    assert ClusterConfig.model_validate_json(between.model_dump_json()) == between
    with pytest.raises(ValidationError, match=r"a range must run upwards, found 4\.\.2"):
        ClusterConfig(num_workers=(4, 2))


@pytest.mark.parametrize(
    ("num_workers", "micro_batch", "fewest"),
    [(1, None, 16), (3, None, 5), (3, 2, 1), (3, 4, 2), ((1, 16), 8, 1)],
)
def test_the_fewest_patches_that_pass_at_once_are_known(num_workers, micro_batch, fewest):
    run = {**SMALLEST[DistillConfig], "batch_size": 16, "micro_batch": micro_batch}
    config = DistillConfig.model_validate(run | {"cluster": {"num_workers": num_workers}})
    assert config.fewest_patches == fewest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"micro_batch": 2}, "of batch_size 7 on 3 workers in parts of 2 they have 1 or 2"),
        ({"terms": [{"kind": "pixel"}, {"kind": "perceptual", "taps": ["trunk"]}]}, "name a network for it"),
    ],
)
def test_what_a_teacher_in_parts_cannot_do_is_refused(changes, words):
    run = {**SMALLEST[DistillConfig], "batch_size": 7, "cluster": {"num_workers": [1, 3]}, **changes}
    DistillConfig.model_validate(run)
    with pytest.raises(ValidationError, match=words):
        DistillConfig.model_validate(run | {"memory": {"shard_teacher": True}})


def test_a_balance_that_looks_at_whole_gradients_is_refused_for_a_teacher_trained_in_parts():
    run = {**SMALLEST[TeacherTrainingConfig], "balance": {"kind": "gradient"}}
    TeacherTrainingConfig.model_validate(run)
    with pytest.raises(ValidationError, match="fixed or uncertainty"):
        TeacherTrainingConfig.model_validate(run | {"memory": {"shard_teacher": True}})


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", ".hidden", "-flag"])
def test_the_name_of_a_run_is_one_plain_part_of_a_key(name):
    with pytest.raises(ValidationError, match="name"):
        TrainingConfig.model_validate({**RUN, "name": name})


def test_what_is_trained_is_the_student_when_distilling_and_the_model_otherwise():
    distill = DistillConfig.model_validate(SMALLEST[DistillConfig])
    teacher = TeacherTrainingConfig.model_validate(SMALLEST[TeacherTrainingConfig])
    assert distill.model is distill.student
    assert teacher.model == EdsrSpec(scale=2)


def test_a_teacher_is_trained_on_pixels_alone():
    run = {**SMALLEST[TeacherTrainingConfig], "terms": [{"kind": "output"}]}
    with pytest.raises(ValidationError, match="terms"):
        TeacherTrainingConfig.model_validate(run)


def test_degradation_steps_keep_their_order_and_kinds():
    chain = {"kind": "real_world", "steps": [{"kind": "jpeg", "quality": [30, 60]}, {"kind": "blur"}]}
    degradation = TypeAdapter(Degradation).validate_python(chain)
    assert [step.kind for step in degradation.steps] == ["jpeg", "blur"]


# ---------------------------------------------------------------- terms and labels


@pytest.mark.parametrize(
    ("terms", "moment"),
    [
        ([], "0"),
        ([{"weight": 0}], "0"),
        ([{"weight": 0, "final_weight": 1}], "0"),
        ([{"weight": 1, "final_weight": 0, "ramp": [0.2, 0.5]}], "0.5"),
        ([{"weight": 1, "final_weight": 0, "ramp": [0, 0.5]}, {"weight": 0, "final_weight": 1}], None),
        ([{"weight": 1, "final_weight": 0}], None),
    ],
)
def test_a_run_that_would_have_nothing_to_minimise_is_refused(terms, moment):
    config = {**SMALLEST[TeacherTrainingConfig], "terms": [{"kind": "pixel", **term} for term in terms]}
    if moment is None:
        TeacherTrainingConfig.model_validate(config)
        return
    with pytest.raises(ValidationError, match=f"no term has a weight at {moment} of the run"):
        TeacherTrainingConfig.model_validate(config)
    distil = {**SMALLEST[DistillConfig], "terms": [{"kind": "output", **term} for term in terms]}
    with pytest.raises(ValidationError, match="no term has a weight"):
        DistillConfig.model_validate(distil)


@pytest.mark.parametrize(
    ("term", "words"),
    [
        ({"kind": "output", "ramp": [0.2, 0.5]}, "a ramp leads to final_weight, which is not set"),
        ({"kind": "upcycling", "zoom_in": False, "zoom_out": False}, "neither zoom_in nor zoom_out"),
        ({"kind": "contrastive", "noise": [30, 1]}, "noise must run upwards from 0 or more, found 30..1"),
        ({"kind": "attention", "taps": []}, "taps"),
        (
            {"kind": "critic", "positions": 1, "taps": [{"student": "layers.0", "teacher": "trunk"}]},
            "1 position in 1 patch at a time leaves no other",
        ),
    ],
    ids=lambda value: value.get("kind") if isinstance(value, dict) else "",
)
def test_a_term_that_could_teach_nothing_is_refused(term, words):
    run = {**SMALLEST[DistillConfig], "terms": [{"kind": "pixel"}, term]}
    run |= {"batch_size": 2, "cluster": {"num_workers": 2}}
    with pytest.raises(ValidationError, match=words):
        DistillConfig.model_validate(run)


@pytest.mark.parametrize(
    ("betas", "place"), [((1.0, 0.99), 0), ((0.9, 1.0), 1), ((-0.1, 0.99), 0), ((0.9, float("nan")), 1)]
)
def test_the_means_of_an_optimizer_forget(betas, place):
    TrainingConfig.model_validate({**RUN, "optimizer": {"betas": (0.0, 0.0)}})
    with pytest.raises(ValidationError, match=rf"optimizer\.betas\.{place}\n"):
        TrainingConfig.model_validate({**RUN, "optimizer": {"betas": betas}})


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_some_channels_are_left(dropout):
    with pytest.raises(ValidationError, match="dropout"):
        TrainingConfig.model_validate({**RUN, "dropout": dropout})


@pytest.mark.parametrize(("shards", "output"), [("a", "a/"), ("s3://b/x", "s3://b/x/"), ("a", "./a")])
def test_labels_never_go_where_the_shards_are(shards, output):
    config = {**SMALLEST[LabelConfig], "shards": shards, "output": output}
    with pytest.raises(ValidationError, match="holds the shards themselves; choose another place"):
        LabelConfig.model_validate(config)
