"""Images compared by what another network sees in them."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from kdsr.checkpoint import load_judge
from kdsr.errors import CheckpointCorrupt, RequestError
from kdsr.models import build_model
from kdsr.models.vgg import DEPTHS, Vgg
from kdsr.objectives import build_objective, label_columns, needs_live_teacher, needs_teacher
from kdsr.pairs import PairBatch
from kdsr.spec import EdsrSpec, EspcnSpec, ShardIndex, TeacherRef
from kdsr.terms import PerceptualTerm, TeacherTerms

SPEC = EspcnSpec(scale=2, num_features=4)
TEACHER = EdsrSpec(scale=2, num_features=6, num_blocks=2)
FIRST_LAYERS = {"VGG16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]}
FIRST_LAYERS["VGG19"] = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
"""Of torchvision's `features`, where the convolutions are."""


def state_of(name, width=3):
    """What torchvision's file of a VGG holds, with a few channels instead of hundreds."""
    torch.manual_seed(0)
    state, before = {"classifier.0.weight": torch.rand(2, 2)}, 3
    for place in FIRST_LAYERS[name]:
        state[f"features.{place}.weight"] = torch.randn(width, before, 3, 3)
        state[f"features.{place}.bias"] = torch.randn(width)
        before = width
    return state


def term(**fields):
    return TypeAdapter(PerceptualTerm).validate_python(fields)


def net(spec, seed=0):
    torch.manual_seed(seed)
    return build_model(spec)


@pytest.fixture
def pair():
    torch.manual_seed(7)
    return PairBatch(lr=torch.rand(2, 3, 16, 16), hr=torch.rand(2, 3, 32, 32))


@pytest.fixture
def vgg(tmp_path):
    torch.save(state_of("VGG19"), tmp_path / "vgg19.pth")
    return f"file://{tmp_path}/vgg19.pth"


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_torchvision_gives_its_layers_under_the_names_of_the_paper(tmp_path, name, suffix):
    path, state = tmp_path / f"vgg{suffix}", state_of(name)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    judge = load_judge(f"file://{path}")
    assert isinstance(judge, Vgg) and not any(p.requires_grad for p in judge.parameters())
    last = f"conv5_{DEPTHS[name][-1]}"
    place = FIRST_LAYERS[name][-1]
    assert torch.equal(judge.get_submodule(last).weight, state[f"features.{place}.weight"])
    assert judge.min_size(["relu2_2"]) == 2 and judge.min_size(["conv1_1", last]) == 16


def test_images_are_normalised_as_imagenet_was_and_grey_is_three_equal_colours(vgg):
    judge = load_judge(vgg)
    seen = []
    judge.conv1_1.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    judge(mean)
    judge(torch.full((1, 1, 32, 32), 0.5))
    assert seen[0].abs().max() < 1e-6
    assert torch.allclose(seen[1][0, :, 0, 0], torch.tensor([0.015 / 0.229, 0.044 / 0.224, 0.094 / 0.225]))


def test_batch_normalisation_and_code_are_refused(tmp_path):
    torch.save({f"features.{n}.weight": torch.rand(3, 3, 3, 3) for n in (0, 3, 7)}, tmp_path / "bn.pth")
    with pytest.raises(RequestError, match="without batch normalisation, found weights at features 0, 3, 7"):
        load_judge(f"file://{tmp_path}/bn.pth")
    torch.save({"features.0.weight": print}, tmp_path / "code.pth")
    with pytest.raises(CheckpointCorrupt, match="code.pth: not a checkpoint of plain tensors"):
        load_judge(f"file://{tmp_path}/code.pth")


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_the_student_is_pulled_and_the_judge_neither_learns_nor_is_saved(loss, vgg, pair):
    judge, student = load_judge(vgg), net(SPEC)
    config = term(network=vgg, taps=["conv5_4", "relu2_2"], tap_weights=[0.5, 2.0], loss=loss)
    objective = build_objective(student, [config], scale=2, networks={vgg: judge})
    sum(objective(pair).values()).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert list(objective.parameters()) == [] and objective.state_dict() == {}
    assert all(parameter.grad is None for parameter in judge.parameters())


def test_an_output_that_is_the_target_has_no_distance(vgg, pair):
    student = net(SPEC)
    same = PairBatch(lr=pair.lr, hr=student(pair.lr).detach())
    config = term(network=vgg, taps=["conv3_1"])
    objective = build_objective(student, [config], scale=2, networks={vgg: load_judge(vgg)})
    assert sum(objective(same).values()).item() == pytest.approx(0, abs=1e-6)
    assert sum(objective(pair).values()).item() > 0.01


def test_without_a_network_the_teacher_looks_and_no_farther_than_its_last_tap(pair):
    teacher, ran = net(TEACHER, 1).requires_grad_(False), []
    teacher.tail.register_forward_hook(lambda *_: ran.append("tail"))
    teacher.head.register_forward_hook(lambda _, given, __: ran.append(tuple(given[0].shape)))
    config = term(taps=["head", "trunk.1"])
    objective = build_objective(net(SPEC), [config], scale=2, teacher=teacher)
    sum(objective(pair).values()).backward()
    assert ran == [(2, 3, 32, 32)] * 2
    ran.clear()
    toward = build_objective(net(SPEC), [term(taps=["trunk"], target="teacher")], scale=2, teacher=teacher)
    assert sum(toward(pair).values()).isfinite()
    assert ran == [(2, 3, 16, 16), "tail", (2, 3, 32, 32), (2, 3, 32, 32)]


def test_what_a_perceptual_term_asks_of_the_teacher():
    own, other = term(taps=["trunk"]), term(network="photo-x4", taps=["layers.0"])
    taught = term(network="photo-x4", taps=["layers.0"], target="teacher")
    assert [needs_teacher([t]) for t in (own, other, taught)] == [True, False, True]
    terms, labelled = (own, other, taught), index(TeacherRef(name="big", sha256="0" * 64))
    assert [needs_live_teacher([t], index(None)) for t in terms] == [True, False, True]
    assert [needs_live_teacher([t], labelled) for t in terms] == [True, False, False]
    assert [label_columns([t], labelled) for t in terms] == [(), (), ("teacher_sr",)]


def index(teacher):
    """Of shards with the outputs of `teacher`, or without any."""
    sizes = dict.fromkeys(("num_images", "num_rows", "num_heldout_rows", "num_pixels", "num_rejected"), 0)
    return ShardIndex(shards=[], options={}, teacher=teacher, **sizes)


def test_a_tap_that_does_not_exist_is_answered_with_those_that_do(vgg):
    config, judges = term(network=vgg, taps=["conv6_1"]), {vgg: load_judge(vgg)}
    with pytest.raises(RequestError, match="network has no tap 'conv6_1'; it has conv1_1, relu1_1"):
        build_objective(net(SPEC), [config], scale=2, networks=judges)
    with pytest.raises(RequestError, match="looks with the teacher; found none"):
        build_objective(net(SPEC), [term(taps=["trunk"])], scale=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"taps": ["trunk"]}, "looks with the teacher, and there is none; set its network"),
        (
            {"network": "photo-x4", "taps": ["layers.0"], "target": "teacher"},
            "target is teacher, and there is",
        ),
        (
            {"network": "photo-x4", "taps": ["layers.0"], "tap_weights": [1, 2]},
            "expected 1 tap_weights, found 2",
        ),
    ],
)
def test_a_teacher_has_no_teacher_to_look_with(fields, words):
    terms = [{"kind": "pixel"}, {"kind": "perceptual", **fields}]
    with pytest.raises(ValidationError, match=words):
        TypeAdapter(TeacherTerms).validate_python(terms)
