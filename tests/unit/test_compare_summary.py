"""Means, spreads and gains of a comparison against a slow computation of the same."""

import random
import statistics

import numpy as np
import pytest

from kdsr.compare import BenchmarkScores, ImageScore, Row
from kdsr.compare_summary import MEAN, bootstrap, mean_curve, steps_to_reach, summarise
from kdsr.errors import DataError


def made_up(method: str, seed: int, scores: dict[str, list[float | None]], **fields: object) -> Row:
    benchmarks = {
        name: BenchmarkScores(
            uri=name, images={f"{n}": ImageScore(psnr_y=v, ssim_y=0.5) for n, v in enumerate(values)}
        )
        for name, values in scores.items()
    }
    given = {"student": "s", "method": method, "seed": seed, "scale": 2, "num_parameters": 1}
    where = {"num_threads": 1, "device": "cpu", "machine": "m", "config": {}}
    return Row(**{**given, **where, "benchmarks": benchmarks, **fields})


@pytest.fixture
def scores() -> dict[str, list[dict[str, list[float]]]]:
    """By method, for each of three seeds, two benchmarks of 4 and 6 images."""
    draw = np.random.default_rng(0)
    return {
        method: [
            {"A": list(draw.normal(30 + lead, 1, 4)), "B": list(draw.normal(27 + lead, 1, 6))}
            for _ in range(3)
        ]
        for method, lead in (("alone", 0.0), ("output", 0.5))
    }


def slow_gains(scores: dict[str, list[dict[str, list[float]]]], *, draws: int) -> list[float]:
    """One gain for each draw of seeds, and of images in each benchmark, with loops."""
    rng, found = random.Random(1), []
    for _ in range(draws):
        seeds = [rng.randrange(3) for _ in range(3)]
        means = []
        for name, count in (("A", 4), ("B", 6)):
            images = [rng.randrange(count) for _ in range(count)]
            pairs = [(s, i) for s in seeds for i in images]
            means.append(
                statistics.fmean(scores["output"][s][name][i] - scores["alone"][s][name][i] for s, i in pairs)
            )
        found.append(statistics.fmean(means))
    return sorted(found)


def test_summaries_are_those_of_a_slow_computation(scores: dict[str, list[dict[str, list[float]]]]) -> None:
    rows = [made_up(m, seed, each) for m, runs in scores.items() for seed, each in enumerate(runs)]
    found = {(s.method, s.benchmark): s for s in summarise(rows, reference="alone", benchmarks=["A", "B"])}
    assert list(found) == [(m, name) for m in ("alone", "output") for name in ("A", "B", MEAN)]
    for method, runs in scores.items():
        of_a = [statistics.fmean(run["A"]) for run in runs]
        whole = [statistics.fmean([statistics.fmean(run["A"]), statistics.fmean(run["B"])]) for run in runs]
        assert found[method, "A"].psnr_y == pytest.approx(statistics.fmean(of_a))
        assert found[method, "A"].spread == pytest.approx(statistics.stdev(of_a))
        assert found[method, MEAN].psnr_y == pytest.approx(statistics.fmean(whole))
        assert found[method, MEAN].spread == pytest.approx(statistics.stdev(whole))
    slow = slow_gains(scores, draws=4000)
    gain = found["output", MEAN].gain
    assert gain is not None and found["alone", MEAN].gain is None
    assert gain.mean == pytest.approx(found["output", MEAN].psnr_y - found["alone", MEAN].psnr_y)
    assert gain.low == pytest.approx(slow[100], abs=0.06) and gain.high == pytest.approx(slow[3900], abs=0.06)


def test_pairs_of_one_seed_and_image_take_what_both_share_out_of_the_interval() -> None:
    """Runs and images that differ by decibels: a gain that is the same in all of them is certain."""
    hard = [20.0, 30.0, 40.0]
    rows = [made_up("alone", seed, {"A": [value + seed for value in hard]}) for seed in range(3)]
    rows += [made_up("output", seed, {"A": [value + seed + 0.1 for value in hard]}) for seed in range(3)]
    gain = summarise(rows, reference="alone", benchmarks=["A"])[-1].gain
    assert gain is not None and gain.low == pytest.approx(0.1) and gain.high == pytest.approx(0.1)


def test_only_pairs_count_and_failed_rows_do_not() -> None:
    rows = [made_up("alone", 0, {"A": [30.0, 31.0]}), made_up("alone", 1, {"A": [10.0, 11.0]})]
    rows += [made_up("output", 0, {"A": [30.5, 31.5]}), made_up("output", 2, {}, cause="NonFiniteLoss: ...")]
    found = summarise(rows, reference="alone", benchmarks=["A"])[-1]
    assert found.num_seeds == 1 and found.gain is not None and found.gain.mean == pytest.approx(0.5)
    assert summarise(rows[2:], reference="alone", benchmarks=["A"])[-1].gain is None


def test_exact_copies_on_both_sides_differ_by_nothing_and_on_one_side_give_no_interval() -> None:
    rows = [made_up("alone", 0, {"A": [None, 31.0]}), made_up("output", 0, {"A": [None, 32.0]})]
    gain = summarise(rows, reference="alone", benchmarks=["A"])[-1].gain
    assert gain is not None and gain.mean == pytest.approx(0.5)
    rows[1] = made_up("output", 0, {"A": [40.0, 32.0]})
    assert summarise(rows, reference="alone", benchmarks=["A"])[-1].gain is None


def test_a_benchmark_that_changed_between_two_rows_is_refused() -> None:
    rows = [made_up("alone", 0, {"A": [30.0, 31.0]}), made_up("output", 0, {"A": [30.0, 31.0, 32.0]})]
    with pytest.raises(DataError, match="output and alone of s were measured on other images of A"):
        summarise(rows, reference="alone", benchmarks=["A"])


def test_one_number_has_no_interval() -> None:
    assert bootstrap([np.array([[0.5]])], seed=0) is None


def test_a_curve_is_of_the_steps_that_all_runs_have_and_tells_when_a_level_is_reached() -> None:
    runs = [
        [{"step": 1.0, "p": 1.0}, {"step": 2.0, "p": 3.0}, {"step": 3.0, "p": 5.0}],
        [{"step": 2.0, "p": 5.0}],
    ]
    steps, values = mean_curve([*runs, [{"step": 2.0, "p": 4.0}, {"step": 3.0}]], "p")
    assert steps.tolist() == [2.0] and values.tolist() == [[3.0], [5.0], [4.0]]
    assert steps_to_reach((steps, values), 4.0) == 2
    assert steps_to_reach((steps, values), 4.1) is None
    assert steps_to_reach(mean_curve([], "p"), 0.0) is None
