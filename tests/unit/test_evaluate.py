"""What is measured, on what, against whom; and the field's own numbers where its images are at hand."""

import math
import os
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr import codecs
from kdsr.benchmark import Pair, open_benchmark, reduce
from kdsr.checkpoint import save_model
from kdsr.config import EvaluateConfig, StoreConfig
from kdsr.engine import Engine
from kdsr.errors import RequestError
from kdsr.evaluate import (
    BICUBIC,
    Score,
    count_macs,
    evaluate,
    evaluate_pairs,
    load_models,
    most_different_crop,
    paired_bootstrap,
    plan_rounds,
    psnr_differences,
)
from kdsr.image import Image
from kdsr.metrics import psnr_y, ssim_y
from kdsr.models import build_model, num_parameters
from kdsr.spec import BicubicSpec, Card, EdsrSpec, EspcnSpec, FsrcnnSpec, RepChainSpec
from kdsr.store import open_store
from kdsr.upscale import Upscaler

DATA = os.environ.get("KDSR_DATA")
STORE = StoreConfig()
TINY_X2 = EspcnSpec(scale=2, num_features=4)
TINY_X3 = EspcnSpec(scale=3, num_features=4)


def photo(height, width, *, seed=0):
    """Something with edges: coarse random blocks."""
    blocks = np.random.default_rng(seed).integers(
        0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8
    )
    return blocks.repeat(6, axis=0).repeat(6, axis=1)[:height, :width]


def make_pair(name="a", *, scale=2, seed=0):
    hr = Image(photo(48, 60, seed=seed))
    return Pair(name, reduce(hr, scale), hr)


def make_benchmark(folder, *, num_images=2, lr_scale=None):
    store = open_store(f"file://{folder}")
    for index in range(num_images):
        hr = Image(photo(48, 60, seed=index))
        store.put(f"HR/{index}.png", codecs.encode(hr, format="png"))
        if lr_scale:
            store.put(f"LR/{index}.png", codecs.encode(reduce(hr, lr_scale), format="png"))
    return store.uri


def save(folder, spec, *, name):
    store = open_store(f"file://{folder}")
    save_model(store, build_model(spec), Card(name=name, spec=spec, num_parameters=0, sha256=""))
    return store.uri


def bicubic(scale):
    return Upscaler(Engine(build_model(BicubicSpec(scale=scale)))).upscale


def test_pairs_are_scored_in_order_by_the_metrics():
    pairs = [make_pair("a", seed=1), make_pair("b", seed=2)]
    scores = evaluate_pairs(bicubic(2), pairs, 2)
    for pair, score in zip(pairs, scores, strict=True):
        sr = bicubic(2)(pair.lr).pixels
        expected = Score(pair.name, psnr_y(sr, pair.hr.pixels, 2), ssim_y(sr, pair.hr.pixels, 2))
        assert score == expected


@pytest.mark.parametrize(
    ("benchmark", "scale", "psnr"),
    [
        *(("Set5", 2, 33.68), ("Set5", 3, 30.41), ("Set5", 4, 28.43)),
        *(("Set14", 2, 30.33), ("Set14", 3, 27.64), ("Set14", 4, 26.09)),
        *(("B100", 2, 29.56), ("B100", 4, 25.96)),
    ],
)
@pytest.mark.skipif(not DATA, reason="needs KDSR_DATA, a folder with bench/Set5/x2/HR and so on")
def test_bicubic_reads_what_the_field_reads(benchmark, scale, psnr):
    uri = f"file://{Path(DATA, 'bench', benchmark, f'x{scale}').absolute()}"
    opened = open_benchmark(uri, benchmark, STORE)
    assert opened.scale == scale
    scores = evaluate_pairs(bicubic(scale), opened.pairs(scale), scale)
    assert statistics.fmean(score.psnr_y for score in scores) == pytest.approx(psnr, abs=0.05)


# ---------------------------------------------------------------- multiply-adds


def test_a_convolution_costs_its_kernel_for_each_output_pixel():
    model = build_model(EspcnSpec(scale=2, num_features=8))
    each_pixel = 3 * 8 * 25 + 8 * 4 * 9 + 4 * 12 * 9
    assert count_macs(model) == each_pixel * 360 * 640


def test_a_transposed_convolution_costs_its_kernel_for_each_input_pixel():
    model = build_model(FsrcnnSpec(scale=4, num_features=8, num_shrunk_features=4, num_mapping_layers=1))
    each_pixel = 3 * 8 * 25 + 8 * 4 + 4 * 4 * 9 + 4 * 8 + 8 * 3 * 81
    assert count_macs(model) == each_pixel * 180 * 320


def test_the_lr_of_720p_is_rounded_up_where_the_scale_does_not_divide():
    model = build_model(EspcnSpec(scale=3, num_features=8))
    each_pixel = 3 * 8 * 25 + 8 * 4 * 9 + 4 * 27 * 9
    assert count_macs(model) == each_pixel * 240 * 427


@pytest.mark.parametrize(("scale", "quoted"), [(2, 316), (3, 160), (4, 114)])
def test_edsr_baseline_costs_what_the_papers_quote(scale, quoted):
    assert count_macs(build_model(EdsrSpec(scale=scale))) / 1e9 == pytest.approx(quoted, abs=0.5)


def test_bicubic_costs_no_counted_layer_and_leaves_no_hook():
    model = build_model(BicubicSpec(scale=2))
    assert count_macs(model) == 0
    assert not any(module._forward_hooks for module in model.modules())


# ---------------------------------------------------------------- bootstrap


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=30), st.integers(0, 99))
def test_the_interval_holds_its_mean_and_depends_on_the_seed_alone(differences, seed):
    interval = paired_bootstrap(differences, seed=seed, num_resamples=400)
    assert interval == paired_bootstrap(differences, seed=seed, num_resamples=400)
    assert min(differences) - 1e-9 <= interval.low <= interval.high <= max(differences) + 1e-9
    assert interval.mean == pytest.approx(statistics.fmean(differences), abs=1e-9)


def test_the_interval_of_many_images_is_that_of_a_normal_mean():
    differences = np.random.default_rng(0).normal(0.1, 0.5, 400).tolist()
    interval = paired_bootstrap(differences, seed=0)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(400)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.005)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.005)


def test_one_image_or_an_exact_copy_has_no_interval():
    assert paired_bootstrap([0.3], seed=0) is None
    assert paired_bootstrap([0.3, math.inf], seed=0) is None


def test_two_exact_copies_do_not_differ():
    exact, near = Score("a", math.inf, 1.0), Score("a", 40.0, 0.9)
    assert psnr_differences([exact, exact, near], [exact, near, near]) == [0.0, math.inf, 0.0]


# ---------------------------------------------------------------- who meets whom


def test_lr_sets_the_scale_and_without_lr_the_models_do(tmp_path):
    with_lr = open_benchmark(make_benchmark(tmp_path / "a", lr_scale=2), "a", STORE)
    without = open_benchmark(make_benchmark(tmp_path / "b"), "b", STORE)
    rounds = plan_rounds([with_lr, without], {"one": 2, "two": 2})
    assert [(each.scale, each.models) for each in rounds] == [(2, ("one", "two")), (2, ("one", "two"))]
    rounds = plan_rounds([without], {"big": 4, "small": 2, "other": 4})
    assert [(each.scale, each.models) for each in rounds] == [(2, ("small",)), (4, ("big", "other"))]


def test_a_model_of_another_scale_than_lr_is_refused_by_name(tmp_path):
    benchmark = open_benchmark(make_benchmark(tmp_path / "a", lr_scale=2), "a", STORE)
    with pytest.raises(
        RequestError, match=r"model big has scale 4, but LR of benchmark file://.*/a has scale 2"
    ):
        plan_rounds([benchmark], {"small": 2, "big": 4})


def test_bicubic_alone_needs_lr_to_know_its_scale(tmp_path):
    with pytest.raises(RequestError, match="bicubic alone has no scale"):
        plan_rounds([open_benchmark(make_benchmark(tmp_path), "a", STORE)], {})


def test_models_are_named_after_their_cards_or_apart_where_cards_agree(tmp_path):
    one, two = (save(tmp_path / name, TINY_X2, name="same") for name in ("one", "two"))
    other = save(tmp_path / "other", TINY_X2, name="other")
    assert list(load_models([one, other], STORE)) == ["same", "other"]
    assert list(load_models([one, two, other, "bicubic"], STORE)) == [one, two, "other"]
    with pytest.raises(RequestError, match="given twice"):
        load_models([one, one], STORE)


def test_branches_of_training_are_folded_before_anything_is_counted(tmp_path):
    spec = RepChainSpec(scale=2, num_features=4, num_layers=3)
    model = load_models([save(tmp_path, spec, name="m")], STORE)["m"]
    assert num_parameters(model) == (3 * 4 + 4 * 4 + 4 * 12) * 9 + 4 + 4 + 12
    assert count_macs(model) == (3 * 4 + 4 * 4 + 4 * 12) * 9 * 360 * 640


# ---------------------------------------------------------------- crops


def test_the_crop_is_where_the_models_differ_and_not_where_bicubic_fails():
    hr = np.full((160, 200, 3), 128, np.uint8)
    far, near, bad = hr.copy(), hr.copy(), hr.copy()
    far[100:130, 20:50] = 0
    bad[10:60, 120:180] = 255
    pair = Pair("a", Image(hr[::2, ::2]), Image(hr))
    crop = most_different_crop({BICUBIC: bad, "far": far, "near": near}, pair, border=2)
    assert 130 - 64 <= crop.top <= 100
    assert 0 <= crop.left <= 20
    assert [panel.label for panel in crop.panels] == [BICUBIC, "far", "near", "HR"]
    assert [panel.psnr_y for panel in crop.panels][2:] == [math.inf, None]


@given(st.integers(15, 80), st.integers(15, 80), st.integers(2, 4))
def test_a_crop_lies_inside_the_border_of_any_image(height, width, border):
    hr = photo(max(height, 11 + 2 * border), max(width, 11 + 2 * border))
    pair = Pair("a", Image(hr), Image(hr))
    crop = most_different_crop({BICUBIC: 255 - hr}, pair, border=border)
    size_y, size_x, _ = crop.panels[0].pixels.shape
    assert size_y == size_x == min(64, hr.shape[0] - 2 * border, hr.shape[1] - 2 * border)
    assert border <= crop.top <= hr.shape[0] - border - size_y
    assert border <= crop.left <= hr.shape[1] - border - size_x


# ---------------------------------------------------------------- all of it


def test_bicubic_leads_every_round_and_the_first_model_is_the_reference(tmp_path):
    config = EvaluateConfig(
        model=(save(tmp_path / "m2", TINY_X2, name="two"), save(tmp_path / "m3", TINY_X3, name="three")),
        benchmark=(make_benchmark(tmp_path / "set"),),
        output=f"{tmp_path}/out",
    )
    small, large = evaluate(config)
    assert [result.contestant.name for result in small.results] == [BICUBIC, "two"]
    assert [result.contestant.name for result in large.results] == [BICUBIC, "three"]
    reference = small.of("two")
    assert reference.vs_first is None
    assert small.of(BICUBIC).vs_first.mean == pytest.approx(small.of(BICUBIC).psnr_y - reference.psnr_y)
    assert [score.name for score in reference.scores] == ["0", "1"]
    assert reference.contestant.cost.num_parameters == num_parameters(build_model(TINY_X2))
    assert reference.contestant.cost.megapixels_per_second > 0


def test_a_network_for_grey_images_is_measured_on_luma(tmp_path):
    spec = RepChainSpec(scale=2, channels=1, num_features=4, num_layers=2)
    config = EvaluateConfig(
        model=(save(tmp_path / "m", spec, name="grey"),),
        benchmark=(make_benchmark(tmp_path / "set"),),
        output=f"{tmp_path}/out",
    )
    (measured,) = evaluate(config)
    model = load_models(config.model, STORE)["grey"]
    pair = next(iter(measured.round.benchmark.pairs(2)))
    grey = (pair.lr.pixels @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    sr = Upscaler(Engine(model)).upscale(Image(grey[:, :, None])).pixels
    assert measured.of("grey").scores[0].psnr_y == pytest.approx(psnr_y(sr, pair.hr.pixels, 2), abs=0.02)
