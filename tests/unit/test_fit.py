"""The training step: what it does to weights, when it refuses, and that a saved state goes on exactly."""

import copy
import math
from dataclasses import replace
from itertools import count, islice

import pytest
import torch

from kdsr.checkpoint import StateStore
from kdsr.config import OptimizerConfig
from kdsr.errors import NonFiniteLoss
from kdsr.fit import fit, learning_rate_at, new_state
from kdsr.models import build_model
from kdsr.models.espcn import Espcn
from kdsr.objectives import build_objective
from kdsr.pairs import Cursor, PairBatch, ZoomPair
from kdsr.spec import EspcnSpec, MultiScaleSpec, RepChainSpec, SwinLightSpec
from kdsr.store import open_store
from kdsr.terms import PixelTerm
from tests.small_networks import SMALL

SPEC = RepChainSpec(scale=2, num_features=4, num_layers=3)


def state_of(*, num_steps=6, seed=0, spec=SPEC, **fields):
    torch.manual_seed(seed)
    config = OptimizerConfig(**{"warmup_steps": 2, "learning_rate": 1e-2, **fields})
    return new_state(build_model(spec), config, num_steps=num_steps)


def batches(start=Cursor()):
    """The same pairs from the same cursor on."""
    for number in count(start.step + 1):
        random = torch.Generator().manual_seed(number)
        hr = torch.rand(2, 3, 12, 12, generator=random)
        yield PairBatch(lr=torch.nn.functional.avg_pool2d(hr, 2), hr=hr), Cursor(number)


def objective_of(state):
    return build_objective(state.model, [PixelTerm()])


def run(state, *, until_step, pairs=None, objective=None, autocast=None):
    pairs = pairs or batches(state.cursor)
    return list(fit(state, objective or objective_of(state), pairs, until_step=until_step, autocast=autocast))


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- what a step does


def test_reports_say_what_was_done():
    state = state_of()
    reports = run(state, until_step=3)
    assert [report.step for report in reports] == [1, 2, 3]
    assert state.step == 3 and state.cursor == Cursor(3)
    for report in reports:
        assert report.losses.keys() == {"pixel_l1"} and report.loss == report.losses["pixel_l1"]
        assert report.num_patches == 2 and report.gradient_norm > 0
        assert 0 <= report.waiting_seconds <= report.seconds


def test_the_state_is_current_whenever_a_report_is_handed_over():
    state = state_of()
    for report in fit(state, objective_of(state), batches(), until_step=4):
        assert state.step == report.step == state.cursor.step


def test_a_run_that_is_done_takes_no_batch():
    state = state_of()
    run(state, until_step=2)
    assert run(state, until_step=2, pairs=iter(())) == []


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_the_loss_goes_down_on_a_toy_problem(kind):
    state = state_of(num_steps=60, kind=kind, spec=EspcnSpec(scale=2, num_features=8), ema_decay=0)
    pair = next(batches())
    reports = run(state, until_step=60, pairs=iter([pair] * 60))
    assert reports[-1].loss < 0.6 * reports[0].loss


def test_terms_see_how_much_of_the_run_is_done():
    state, seen = state_of(num_steps=5), []
    objective = objective_of(state)

    def watching(pair):
        seen.append(pair.progress)
        return objective(pair)

    run(state, until_step=5, objective=watching)
    assert seen == [0.0, 0.2, 0.4, 0.6, 0.8]


def test_the_same_seed_gives_the_same_weights_and_another_gives_others():
    states = [state_of(seed=seed) for seed in (0, 0, 1)]
    for state in states:
        run(state, until_step=4)
    one, again, other = (weights(state.model) for state in states)
    assert same(one, again) and not same(one, other)


@pytest.mark.parametrize(("kind", "plain"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_steps_are_those_of_the_plain_optimizer(kind, plain):
    betas = (0.5, 0.6)
    state = state_of(warmup_steps=0, final_learning_rate=1e-2, kind=kind, betas=betas, weight_decay=0.1)
    model = copy.deepcopy(state.model)
    kernels = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": kernels, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0}]
    optimizer = plain(groups, lr=1e-2, betas=betas)
    for pair, _ in islice(batches(), 3):
        optimizer.zero_grad()
        torch.nn.functional.l1_loss(model(pair.lr), pair.hr).backward()
        optimizer.step()
    run(state, until_step=3)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, state.model.state_dict()[name], atol=1e-6), name


def test_a_gradient_is_clipped_to_the_norm_that_was_asked_for():
    free, clipped, loose = state_of(), state_of(clip_norm=1e-3), state_of(clip_norm=1e6)
    gradients = {}
    for name, state in (("free", free), ("clipped", clipped), ("loose", loose)):
        original = state.optimizer.step

        def step(state=state, name=name, original=original):
            norms = [p.grad.norm() for p in state.model.parameters()]
            gradients[name] = torch.stack(norms).norm().item()
            original()

        state.optimizer.step = step
        (report,) = run(state, until_step=1)
        # What is reported is the norm before clipping.
        assert report.gradient_norm == pytest.approx(gradients["free"], rel=1e-4)
    assert gradients["clipped"] == pytest.approx(1e-3, rel=1e-3)
    assert gradients["loose"] == gradients["free"] > 1e-2


def test_autocast_computes_the_forward_pass_in_bfloat16_and_keeps_weights_in_float32():
    state, seen = state_of(), []
    handle = state.model.layers[1].register_forward_hook(lambda *hook: seen.append(hook[2].dtype))
    run(state, until_step=1, autocast=torch.bfloat16)
    run(state, until_step=2)
    handle.remove()
    assert seen == [torch.bfloat16, torch.float32]
    assert {tensor.dtype for tensor in state.model.state_dict().values()} == {torch.float32}


# ---------------------------------------------------------------- schedules and means


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-3),
        (4, 5e-3),
        (9, 1e-2),
        (10, 1e-2),
        (60, (1e-2 + 1e-4) / 2),
        (35, 1e-4 + (1e-2 - 1e-4) * (0.5 + math.sqrt(0.125))),
        (110, 1e-4),
        (500, 1e-4),
    ],
)
def test_the_learning_rate_warms_up_and_falls_as_a_cosine(step, expected):
    config = OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-4, warmup_steps=10)
    assert learning_rate_at(config, step=step, num_steps=110) == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate_at(OptimizerConfig(warmup_steps=0), step=0, num_steps=1) == 1e-3


def test_a_run_shorter_than_its_warm_up_never_divides_by_zero():
    config = OptimizerConfig(warmup_steps=100)
    rates = [learning_rate_at(config, step=step, num_steps=10) for step in range(10)]
    assert rates == pytest.approx([1e-5 * (step + 1) for step in range(10)])


def test_the_optimizer_uses_the_rate_that_is_reported():
    state = state_of(num_steps=5)
    for report in fit(state, objective_of(state), batches(), until_step=5):
        expected = learning_rate_at(state.config, step=report.step - 1, num_steps=5)
        assert report.learning_rate == expected
        assert {group["lr"] for group in state.optimizer.param_groups} == {expected}


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.999])
def test_the_ema_is_the_mean_that_a_slow_reference_keeps(decay):
    state = state_of(ema_decay=decay)
    reference = {name: tensor.double() for name, tensor in weights(state.model).items()}
    for report in fit(state, objective_of(state), batches(), until_step=6):
        kept = min(decay, (1 + report.step) / (10 + report.step))
        for name, tensor in state.model.state_dict().items():
            reference[name] = kept * reference[name] + (1 - kept) * tensor.double()
    for name, tensor in state.ema.state_dict().items():
        assert torch.allclose(tensor.double(), reference[name], atol=1e-6), name
    assert same(weights(state.ema), weights(state.model)) == (decay == 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_term_that_is_not_finite_stops_before_the_weights_are_touched(value):
    state = state_of()
    run(state, until_step=2)
    before, mean = weights(state.model), weights(state.ema)
    good = objective_of(state)

    def broken(pair):
        return good(pair) | {"output_mse": good(pair)["pixel_l1"] * value}

    with pytest.raises(
        NonFiniteLoss,
        match=rf"step 3: term output_mse is {value} .*batch 3 of the data; .*last good .* another name",
    ):
        run(state, until_step=5, objective=broken)
    assert same(before, weights(state.model)) and same(mean, weights(state.ema))
    assert state.step == 2 and state.cursor == Cursor(2)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(clip_norm):
    state = state_of(clip_norm=clip_norm)
    before = weights(state.model)

    def steep(pair):
        # sqrt is finite at 0 and its derivative is not.
        return {"pixel_l1": (state.model(pair.lr) - state.model(pair.lr).detach()).abs().sqrt().sum()}

    with pytest.raises(NonFiniteLoss, match=r"step 1: the gradient is (nan|inf) .*batch 1 of the data;"):
        run(state, until_step=1, objective=steep)
    assert same(before, weights(state.model)) and state.step == 0


def test_a_gradient_that_is_not_finite_beside_the_network_stops_before_anything_is_touched():
    state, critic = state_of(), torch.nn.Linear(2, 2)
    state.train_too(critic)
    before, good = weights(state.model) | weights(critic), objective_of(state)

    def steep(pair):
        return good(pair) | {"critic": (critic.weight - critic.weight.detach()).abs().sqrt().sum()}

    with pytest.raises(NonFiniteLoss, match=r"step 1: the gradient beside the network is nan .*batch 1"):
        run(state, until_step=1, objective=steep)
    assert same(before, weights(state.model) | weights(critic)) and state.step == 0


# ---------------------------------------------------------------- going on


def round_trip_through_a_store(state, tmp_path):
    states = StateStore(open_store(f"file://{tmp_path}"))
    states.save(state.state_dict(), step=state.step, pointers=("latest",))
    loaded = states.load("latest")
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("through", ["memory", "store"])
@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_a_saved_state_goes_on_bit_for_bit(tmp_path, through, kind):
    whole, first = state_of(kind=kind), state_of(kind=kind)
    whole_reports = run(whole, until_step=6)
    run(first, until_step=3)
    saved = round_trip_through_a_store(first, tmp_path) if through == "store" else first.state_dict()
    second = state_of(kind=kind, seed=1)
    second.load_state_dict(copy.deepcopy(saved))
    assert second.step == 3 and second.cursor == Cursor(3)
    reports = run(second, until_step=6)
    assert same(weights(second.model), weights(whole.model))
    assert same(weights(second.ema), weights(whole.ema))
    assert [r.losses for r in reports] == [r.losses for r in whole_reports[3:]]


def test_the_batches_of_these_tests_are_the_same_from_the_same_cursor():
    """Else the tests above would prove nothing."""
    late = next(batches(Cursor(3)))
    assert late[1] == Cursor(4)
    assert torch.equal(late[0].hr, next(islice(batches(), 3, None))[0].hr)


# ---------------------------------------------------------------- against over-fitting


def test_weight_decay_shrinks_kernels_and_leaves_biases_gains_and_what_learns_beside_alone():
    torch.manual_seed(0)
    model = build_model(MultiScaleSpec(scale=2, num_features=6, num_blocks=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1)
    config = OptimizerConfig(kind="adamw", learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    state, beside = new_state(model, config, num_steps=10), torch.nn.Linear(2, 2)
    state.train_too(beside)
    before = weights(model) | weights(beside)
    for parameter in (*model.parameters(), *beside.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    after = model.state_dict() | beside.state_dict()
    shrunk = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert shrunk == {name for name in weights(model) if name.endswith("weight") or ".kernels." in name}
    for name in shrunk:
        assert torch.allclose(after[name], 0.95 * before[name]), name


def test_the_biases_of_positions_in_attention_do_not_decay():
    model = build_model(SwinLightSpec(scale=2, **SMALL["swin_light"]))
    state = new_state(model, OptimizerConfig(weight_decay=0.1), num_steps=1)
    decaying, others = state.optimizer.param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0)
    kept = {id(parameter) for parameter in others["params"]}
    named = {name for name, parameter in model.named_parameters() if id(parameter) in kept}
    assert any(name.endswith("position_bias") for name in named)
    assert not any(name.endswith("qkv.weight") for name in named)


class Counting(Espcn):
    """Keeps statistics of what it sees, as batch normalisation does."""

    def __init__(self):
        super().__init__(EspcnSpec(scale=2, num_features=4))
        self.norm = torch.nn.BatchNorm2d(3)

    def forward(self, lr):
        return super().forward(self.norm(lr))


def test_the_mean_network_has_the_statistics_of_the_trained_one():
    state = new_state(Counting(), OptimizerConfig(), num_steps=3)
    run(state, until_step=3)
    own, mean = (dict(network.named_buffers()) for network in (state.model, state.ema))
    assert own["norm.num_batches_tracked"] == 3 and own["norm.running_mean"].abs().sum() > 0
    assert same(own, mean)


def test_what_a_step_draws_follows_from_the_seed_and_its_number_alone():
    def drawn(*, seed, burn=0):
        state, found = state_of(num_steps=3), []
        objective = objective_of(state)

        def drawing(pair):
            found.append(torch.rand(()).item())
            return objective(pair)

        for _ in fit(state, drawing, batches(), until_step=3, seed=seed):
            torch.rand(burn)
        return found

    assert drawn(seed=1) == drawn(seed=1, burn=5)
    assert len({*drawn(seed=1), *drawn(seed=2)}) == 6


def test_a_checkpoint_that_counts_its_data_otherwise_goes_on_with_a_new_epoch(caplog):
    state = state_of()
    run(state, until_step=2)
    older = state_of()
    older.load_state_dict(state.state_dict() | {"cursor": [3, 1, 17]})
    assert older.step == 2 and older.cursor == Cursor(0)
    assert "the epoch that it was in ends here" in caplog.text
    assert same(weights(older.model), weights(state.model))


def test_the_parts_of_a_batch_are_all_of_it_and_share_its_weight():
    pair = replace(
        next(batches())[0], lr=torch.arange(5.0).view(5, 1, 1, 1), hr=torch.rand(5, 3, 2, 2), weight=1.5
    )
    features, zoom = (
        {"trunk": torch.rand(5, 2, 1, 1)},
        ZoomPair(torch.rand(5, 3, 2, 2), torch.rand(5, 3, 4, 4)),
    )
    pair = replace(pair, teacher_features=features, zoom=zoom, progress=0.5)
    parts = pair.parts(2)
    assert [len(part) for part in parts] == [1, 2, 2] and pair.parts(None) == [pair] == pair.parts(5)
    assert [part.weight for part in parts] == pytest.approx([0.3, 0.6, 0.6])
    assert {part.progress for part in parts} == {0.5}
    for read in (
        lambda p: p.lr,
        lambda p: p.hr,
        lambda p: p.teacher_features["trunk"],
        lambda p: p.zoom.teacher_sr,
    ):
        assert torch.equal(torch.cat([read(part) for part in parts]), read(pair))
