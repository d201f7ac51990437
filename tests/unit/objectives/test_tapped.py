"""Terms that compare features: what they are zero for, where their gradients lead, and who learns."""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from kdsr.config import OptimizerConfig
from kdsr.errors import RequestError
from kdsr.fit import fit, new_state
from kdsr.models import build_model
from kdsr.objectives import build_objective
from kdsr.objectives.features import (
    STATISTICS,
    AttentionDistance,
    StatisticsDistance,
    channel_affinity,
    on_one_grid,
    spatial_affinity,
)
from kdsr.objectives.mutual_information import (
    LEAST_SPREAD,
    CriticBound,
    VariationalBound,
    info_nce,
    jensen_shannon,
)
from kdsr.objectives.step import Parts, Taps
from kdsr.pairs import Cursor, PairBatch
from kdsr.spec import EdsrSpec, EspcnSpec, RepChainSpec
from kdsr.terms import DistillTerm

STUDENT = RepChainSpec(scale=2, num_features=6, num_layers=4)
TEACHER = EdsrSpec(scale=2, num_features=8, num_blocks=2)
TAPS = [{"student": "layers.1", "teacher": "trunk.0"}, {"student": "layers.2", "teacher": "trunk"}]
KINDS = [
    {"kind": "features"},
    {"kind": "features", "loss": "mse"},
    *(
        {"kind": "statistics", "statistic": name}
        for name in ("mean_then_square", "square_then_mean", "max", "min")
    ),
    {"kind": "attention"},
    {"kind": "affinity", "pool": 4},
    {"kind": "affinity", "over": "channels"},
    {"kind": "variational", "density": "gaussian"},
    {"kind": "variational", "density": "laplace"},
    {"kind": "critic", "bound": "info_nce"},
    {"kind": "critic", "bound": "jensen_shannon"},
    {"kind": "attended"},
    {"kind": "attended", "by": "error", "temperature": 2.0},
    {"kind": "fusion", "num_hidden": 8},
]
# A fusion has an image to make first, and its value tells nothing meanwhile: it has a test of its own.
falling = pytest.mark.parametrize(
    "fields", KINDS[:-1], ids=lambda fields: "-".join(map(str, fields.values()))
)
each_kind = pytest.mark.parametrize("fields", KINDS, ids=lambda fields: "-".join(map(str, fields.values())))
TWINS = [fields for fields in KINDS if fields["kind"] in ("statistics", "attention", "affinity")]


def term(fields, taps=TAPS):
    return TypeAdapter(DistillTerm).validate_python({**fields, "taps": taps})


def net(spec, seed=0):
    torch.manual_seed(seed)
    model = build_model(spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture
def pair():
    torch.manual_seed(7)
    return PairBatch(lr=torch.rand(3, 3, 12, 10), hr=torch.rand(3, 3, 24, 20))


@each_kind
def test_gradients_reach_the_student_and_what_learns_with_it_and_not_the_teacher(fields, pair):
    student, teacher = net(STUDENT), net(TEACHER, 1).requires_grad_(False)
    objective = build_objective(student, [term(fields)], teacher=teacher, scale=2)
    loss = sum(objective(pair).values())
    loss.backward()
    reached = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
    assert any(name.startswith("layers.1") for name in reached)
    assert loss.dtype == torch.float32 and loss.isfinite()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("fields", TWINS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_student_with_the_teachers_features_has_nothing_to_learn(fields, pair):
    same = [{"student": tap, "teacher": tap} for tap in ("trunk.0", "trunk")]
    objective = build_objective(net(TEACHER), [term(fields, same)], teacher=net(TEACHER))
    assert sum(objective(pair).values()).item() == pytest.approx(0, abs=1e-6)


@falling
def test_training_brings_the_features_nearer_and_the_state_goes_on(fields, pair):
    teacher = net(TEACHER, 1).requires_grad_(False)

    def start():
        student = net(STUDENT)
        torch.manual_seed(2)
        objective = build_objective(student, [term(fields)], teacher=teacher, scale=2)
        state = new_state(student, OptimizerConfig(learning_rate=3e-3, warmup_steps=0), num_steps=60)
        state.train_too(objective)
        return state, objective

    def train(state, objective, until_step):
        torch.manual_seed(3)
        pairs = iter([(pair, Cursor())] * until_step)
        return list(fit(state, objective, pairs, until_step=until_step, after_step=objective.after_step))

    state, objective = start()
    reports = train(state, objective, 60)
    begin, end = (sum(r.loss for r in part) / 10 for part in (reports[:10], reports[-10:]))
    assert end < begin - 0.05 * abs(begin)
    again, its_objective = start()
    again.load_state_dict(state.state_dict())
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, its_objective.state_dict()[name]), name


def test_the_critic_tells_its_bound_in_nats_and_never_more_than_its_negatives_allow(pair):
    student, teacher = net(STUDENT), net(TEACHER, 1)
    objective = build_objective(student, [term({"kind": "critic", "positions": 4})], teacher=teacher)
    objective(pair)
    told = objective.after_step()
    assert told["critic/negatives"] == 3 * 4 - 1
    assert told["critic/nats"] <= math.log(12) + 1e-6
    assert told["weight/critic"] == 1


def test_a_pair_is_the_same_place_of_the_same_image_in_both_networks():
    torch.manual_seed(0)
    config = term({"kind": "critic", "positions": 6, "temperature": 0.05}, ONE)
    critic = CriticBound(config, Parts(nn.Identity(), student_widths={"a": 16}, teacher_widths={"b": 16}))
    critic.students[0], critic.teachers[0] = nn.Identity(), nn.Identity()
    features = torch.randn(3, 16, 4, 5)
    assert -critic.compare(features, features, 0).item() > 0.95 * math.log(18)
    for moved in (features.roll(1, dims=3), features.roll(1, dims=0)):
        assert -critic.compare(features, moved, 0).item() < 0.5 * math.log(18)


@pytest.mark.parametrize("kind", ["variational", "critic"])
def test_a_bound_is_told_in_nats_whatever_its_weight(kind, pair):
    bound = term({"kind": kind, "weight": 0.25})
    objective = build_objective(net(STUDENT), [bound], teacher=net(TEACHER, 1))
    minimised = objective(pair)[kind].item()
    assert objective.after_step()[f"{kind}/nats"] == pytest.approx(-4 * minimised, rel=1e-5)


def test_info_nce_is_log_n_for_certainty_and_zero_for_ignorance():
    assert info_nce(1e3 * torch.eye(8)).item() == pytest.approx(math.log(8), rel=1e-5)
    assert info_nce(torch.zeros(8, 8)).item() == pytest.approx(0, abs=1e-6)


def test_the_jensen_shannon_bound_is_best_when_pairs_and_strangers_are_told_apart():
    certain = 1e3 * (2 * torch.eye(8) - 1)
    assert jensen_shannon(certain).item() == pytest.approx(0, abs=1e-6)
    assert jensen_shannon(torch.zeros(8, 8)).item() == pytest.approx(-2 * math.log(2), rel=1e-5)


def test_affinities_are_cosines():
    features = torch.randn(2, 5, 3, 4)
    space, channels = spatial_affinity(features), channel_affinity(features)
    assert space.shape == (2, 12, 12) and channels.shape == (2, 5, 5)
    one, other = features[0, :, 0, 1], features[0, :, 2, 3]
    assert space[0, 1, 11].item() == pytest.approx(
        torch.cosine_similarity(one, other, dim=0).item(), abs=1e-5
    )
    assert channels[1, 2, 2].item() == pytest.approx(1, abs=1e-5)


ONE = [{"student": "a", "teacher": "b"}]


@pytest.mark.parametrize(
    ("density", "distribution"),
    [("gaussian", torch.distributions.Normal), ("laplace", torch.distributions.Laplace)],
)
def test_the_variational_term_is_the_log_density_with_its_sign_turned(density, distribution):
    torch.manual_seed(0)
    widths = {"student_widths": {"a": 3}, "teacher_widths": {"b": 2}}
    config = term({"kind": "variational", "density": density}, ONE)
    bound = VariationalBound(config, Parts(nn.Identity(), **widths))
    raw = torch.tensor([-1.0, 2.0]).view(1, 2, 1, 1)
    with torch.no_grad():
        bound.spreads[0].copy_(raw)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 4, 5)
    expected = distribution(bound.means[0](student), torch.log1p(raw.exp()) + LEAST_SPREAD)
    pattern = teacher / teacher.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    nats = -expected.log_prob(pattern).mean().item()
    assert bound.compare(student, teacher, 0).item() == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize(
    ("statistic", "student_map", "teacher_map"),
    [
        ("mean_then_square", [4, 1], [1, 4]),
        ("square_then_mean", [5, 5], [1, 4]),
        ("max", [3, 3], [1, 2]),
        ("min", [1, -1], [1, 2]),
    ],
)
def test_statistics_are_one_number_a_pixel_over_all_channels(statistic, student_map, teacher_map):
    student = torch.tensor([[1.0, 3.0], [3.0, -1.0]]).view(1, 2, 1, 2)  # two channels at two places
    teacher = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    for features, expected in ((student, student_map), (teacher, teacher_map)):
        assert STATISTICS[statistic](features).flatten().tolist() == expected
    distance = StatisticsDistance(
        term({"kind": "statistics", "statistic": statistic}, ONE), Parts(nn.Identity())
    )
    sizes = [math.hypot(*values) / math.sqrt(2) for values in (student_map, teacher_map)]
    places = zip(student_map, teacher_map, strict=True)
    expected = sum((mine / sizes[0] - theirs / sizes[1]) ** 2 for mine, theirs in places) / 2
    assert distance.compare(student, teacher, 0).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_attention_is_the_direction_of_the_summed_powers_of_all_channels(power):
    # Sums over channels of 3 and 4 against 4 and 3: (0.6, 0.8) against (0.8, 0.6). The other image is alike.
    student = torch.tensor([[[1.0, -4.0], [-2.0, 0.0]], [[5.0, 5.0], [0.0, 0.0]]])
    teacher = torch.tensor([[[4.0, -3.0]], [[-1.0, 1.0]]])
    student, teacher = (
        (features.abs() ** (1 / power) * features.sign()).unsqueeze(2) for features in (student, teacher)
    )
    distance = AttentionDistance(term({"kind": "attention", "power": power}, ONE), Parts(nn.Identity()))
    assert distance.compare(student, teacher, 0).item() == pytest.approx((0.04 + 0.04) / 2, rel=1e-4)


def test_grids_that_differ_meet_on_the_smaller_one():
    one, other = on_one_grid(torch.ones(1, 2, 8, 6), torch.ones(1, 3, 4, 12))
    assert one.shape == (1, 2, 4, 6) and other.shape == (1, 3, 4, 6)


def test_the_scale_of_the_teachers_features_does_not_matter(pair):
    class Louder(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.net, self.by = net(TEACHER, 1), by
            self.spec = TEACHER
            self.trunk = nn.Sequential(nn.Identity())

        def forward(self, lr):
            self.trunk(self.by * self.net.head(lr))
            return self.net(lr)

    values = []
    for by in (1.0, 100.0):
        taps = [{"student": "layers.1", "teacher": "trunk"}]
        torch.manual_seed(5)
        objective = build_objective(net(STUDENT), [term({"kind": "features"}, taps)], teacher=Louder(by))
        values.append(sum(objective(pair).values()).item())
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize(
    ("taps", "words"),
    [
        (
            {"student": "layers.9", "teacher": "trunk"},
            "the student has no tap 'layers.9'; it has layers.0, layers.1",
        ),
        (
            {"student": "layers.0", "teacher": "body"},
            "the teacher has no tap 'body'; it has head, trunk.0, trunk.1",
        ),
    ],
)
def test_a_tap_that_does_not_exist_is_answered_with_those_that_do(taps, words):
    with pytest.raises(RequestError, match=words):
        build_objective(net(STUDENT), [term({"kind": "attention"}, [taps])], teacher=net(TEACHER))


def test_of_hundreds_of_submodules_the_outer_ones_are_listed():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(3, 3, 1)
            self.trunk = nn.Sequential(*(nn.Sequential(nn.ReLU(), nn.ReLU()) for _ in range(50)))

    with pytest.raises(
        RequestError, match=r"has no tap 'tail'; it has head, trunk, and 150 more inside these$"
    ):
        Taps(Deep(), ["tail"], who="the teacher")


def test_features_of_no_teacher_are_refused():
    with pytest.raises(RequestError, match="live teacher; found none"):
        build_objective(net(STUDENT), [term({"kind": "attention"})])


def test_a_tap_that_gives_no_map_is_refused_by_name(pair):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat = nn.Flatten(2)
            self.net = net(EspcnSpec(scale=2, num_features=4))

        def forward(self, lr):
            self.flat(lr)
            return self.net(lr)

    with pytest.raises(RequestError, match=r"tap 'flat' of the teacher gives \(1, 3, 256\).*\(B, F, h, w\)"):
        build_objective(
            net(STUDENT),
            [term({"kind": "attention"}, [{"student": "layers.0", "teacher": "flat"}])],
            teacher=Tokens(),
        )


def test_a_teacher_with_a_stored_output_still_runs_for_its_features(pair):
    stored = replace(pair, teacher_sr=torch.rand_like(pair.hr))
    objective = build_objective(net(STUDENT), [term({"kind": "attention"})], teacher=net(TEACHER))
    assert sum(objective(stored).values()).item() == pytest.approx(sum(objective(pair).values()).item())
