"""Held-out pairs, their PSNR, and the teacher that must beat bicubic."""

from importlib import resources

import numpy as np
import pytest
import torch

from kdsr import codecs
from kdsr.benchmark import Pair
from kdsr.checkpoint import LoadedModel
from kdsr.config import BicubicDegradation, JpegStep, RealWorldDegradation
from kdsr.degrade import bicubic_lr, build_degradation
from kdsr.engine import Engine
from kdsr.errors import RequestError
from kdsr.image import Image
from kdsr.metrics import psnr_y
from kdsr.models import build_model
from kdsr.models.contract import SrModel
from kdsr.spec import BicubicSpec, Card, EdsrSpec, EspcnSpec
from kdsr.store import open_store
from kdsr.upscale import Upscaler
from kdsr.validation import (
    heldout_pairs,
    make_pair,
    mean_psnr_y,
    require_better_than_bicubic,
    training_pairs,
)
from tests.pictures import photograph
from tests.small_shards import row, write_set

BICUBIC = build_degradation(BicubicDegradation(), 2)


def pair_of(pixels, *, degrade=BICUBIC, scale=2, channels=3, seed=0):
    return make_pair("a", pixels, degrade=degrade, scale=scale, channels=channels, seed=seed)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_pair_is_hr_cut_to_the_scale_and_its_lr(scale):
    photo = photograph(0, height=50, width=67)
    pair = pair_of(photo, degrade=build_degradation(BicubicDegradation(), scale), scale=scale)
    height, width = 50 // scale * scale, 67 // scale * scale
    assert np.array_equal(pair.hr.pixels, photo[:height, :width])
    hr = torch.from_numpy(photo[:height, :width].copy()).permute(2, 0, 1)[None] / 255
    expected = (bicubic_lr(hr, scale)[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.array_equal(pair.lr.pixels, expected)


def test_a_grey_pair_is_grey_on_both_sides():
    pair = pair_of(photograph(0, height=40, width=40), channels=1)
    assert pair.lr.pixels.shape == (20, 20, 1)
    assert pair.hr.pixels.shape == (40, 40, 3) and (np.ptp(pair.hr.pixels, axis=2) == 0).all()


def test_a_random_degradation_depends_on_the_seed_alone():
    degrade = build_degradation(RealWorldDegradation(steps=(), lr_steps=(JpegStep(quality=(5, 90)),)), 2)
    photo = photograph(0, height=40, width=40)
    one, again, other = (pair_of(photo, degrade=degrade, seed=seed).lr.pixels for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_pairs_are_held_out_photographs_and_no_others_and_always_the_same(tmp_path):
    store = open_store(f"file://{tmp_path}")
    rows = [row(f"{i}", photograph(i, height=24, width=28), heldout=i in {1, 2, 5, 6}) for i in range(8)]
    index = write_set(store, [rows[:4], rows[4:5], rows[5:]])

    def names(limit):
        pairs = heldout_pairs(store, index, degrade=BICUBIC, scale=2, channels=3, limit=limit)
        assert all(pair.lr.pixels.shape == (12, 14, 3) for pair in pairs)
        return [pair.name for pair in pairs]

    assert set(names(2)) == {"1", "2"}  # those of the first shard are enough
    assert names(3) == names(3) == names(100)[:3]
    assert sorted(names(100)) == ["1", "2", "5", "6"]


def test_few_held_out_photographs_are_not_all_of_the_folder_that_comes_first(tmp_path):
    store = open_store(f"file://{tmp_path}")
    keys = [f"{folder}/{number:02}" for folder in "ab" for number in range(20)]
    rows = [row(key, photograph(0, height=24, width=28), heldout=True) for key in keys]
    index = write_set(store, [rows], row_group_bytes=1)
    pairs = heldout_pairs(store, index, degrade=BICUBIC, scale=2, channels=3, limit=10)
    assert 2 <= sum(pair.name.startswith("a/") for pair in pairs) <= 8


@pytest.mark.parametrize("row_group_bytes", [1, 2**30])
def test_held_out_pairs_are_of_as_many_photographs_as_there_are(tmp_path, row_group_bytes):
    """Two photographs are cut into three sub-images each; of a third one there is one, in another shard."""
    store = open_store(f"file://{tmp_path}")
    cut = {"a": (0, 1, 2), "trained": (3, 4), "b": (5, 6, 7), "c": (8,)}
    rows = [
        row(key, photograph(number, height=24, width=28), heldout=key != "trained")
        for key, numbers in cut.items()
        for number in numbers
    ]
    index = write_set(store, [rows[:8], rows[8:]], row_group_bytes=row_group_bytes)

    def found(limit):
        pairs = heldout_pairs(store, index, degrade=BICUBIC, scale=2, channels=3, limit=limit)
        pictures = {photograph(n, height=24, width=28).tobytes(): n for n in range(9)}
        return [(pair.name, pictures[pair.hr.pixels.tobytes()]) for pair in pairs]

    assert set(found(2)) == {("a", 0), ("b", 5)}
    assert set(found(3)) == {("a", 0), ("b", 5), ("c", 8)}
    assert found(5)[:3] == found(3) and set(found(5)[3:]) == {("a", 1), ("b", 6)}
    assert found(100)[:5] == found(5) and set(found(100)[5:]) == {("a", 2), ("b", 7)}


def test_what_is_trained_on_is_measured_on_sub_images_from_all_over_the_set(tmp_path):
    store = open_store(f"file://{tmp_path}")
    heldout = {1, 2, 4, 5}
    rows = [row(f"{i}", photograph(i, height=24, width=28), heldout=i in heldout) for i in range(12)]
    index = write_set(store, [rows[:4], rows[4:8], rows[8:]], row_group_bytes=2**20)

    def names(limit):
        pairs = training_pairs(store, index, degrade=BICUBIC, scale=2, channels=3, limit=limit)
        return [pair.name for pair in pairs]

    assert names(3) == names(3)
    assert sorted(int(name) // 4 for name in names(3)) == [0, 1, 2]
    assert len(names(2)) == 2
    assert set(names(100)) == {f"{i}" for i in range(12)} - {f"{i}" for i in heldout}


def test_the_mean_is_over_images_and_leaves_the_border_out():
    hr = np.full((20, 20, 3), 100, np.uint8)
    near, far = hr + 2, hr + 9
    near[:4] = far[:, -4:] = 0
    pairs = [Pair(name, Image(hr), Image(hr)) for name in ("near", "far")]
    outputs = iter([Image(near), Image(far)])
    expected = np.mean([psnr_y(sr, hr, 4) for sr in (near, far)])
    assert mean_psnr_y(lambda _: next(outputs), pairs, border=4) == pytest.approx(expected)
    assert expected > 30


def test_bicubic_measures_as_in_an_evaluation():
    pair = pair_of(photograph(3, height=64, width=64))
    upscaler = Upscaler(Engine(build_model(BicubicSpec(scale=2))))
    sr = upscaler.upscale(pair.lr).pixels
    assert mean_psnr_y(upscaler.upscale, [pair], border=2) == pytest.approx(psnr_y(sr, pair.hr.pixels, 2))


# ---------------------------------------------------------------- teachers


def loaded(model, **fields):
    card = Card(name="public", spec=model.spec, num_parameters=0, sha256="", **{"imported": True, **fields})
    return LoadedModel(model.eval(), card)


class Shifted(SrModel):
    """Bicubic whose output is moved away from the truth."""

    def __init__(self, factor):
        super().__init__()
        self.spec = EspcnSpec(scale=4)
        self.inner, self.factor = build_model(BicubicSpec(scale=4)), factor

    @property
    def receptive_radius(self):
        return self.inner.receptive_radius

    def forward(self, lr):
        return self.inner(lr) * self.factor


def fixture_photo():
    return codecs.decode_png(resources.files("kdsr").joinpath("weights/fixture.png").read_bytes()).copy()


def test_the_photograph_that_teachers_are_tried_on_comes_with_kdsr():
    photo = fixture_photo()
    assert photo.ndim == 3 and photo.shape[2] == 3 and min(photo.shape[:2]) >= 96
    assert all(side % 12 == 0 for side in photo.shape[:2])


@pytest.mark.parametrize("factor", [255, 0.5, 1.0])
def test_a_teacher_of_another_range_or_no_better_than_bicubic_is_refused(factor):
    with pytest.raises(
        RequestError, match=r"teacher public: expected at least 1 dB over bicubic \(\d+\.\d+ dB"
    ):
        require_better_than_bicubic(loaded(Shifted(factor)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_learned_nothing_is_refused(channels):
    torch.manual_seed(0)
    model = build_model(EdsrSpec(scale=2, channels=channels, num_features=4, num_blocks=1))
    with pytest.raises(RequestError, match="value range is probably not 0..1"):
        require_better_than_bicubic(loaded(model))


class Knowing(SrModel):
    """Knows the photograph by heart, but for a share of bicubic's error."""

    def __init__(self, error):
        super().__init__()
        self.spec = EspcnSpec(scale=2)
        self.inner, self.error = build_model(BicubicSpec(scale=2)), error

    @property
    def receptive_radius(self):
        return 10_000  # so that the photograph is one tile

    def forward(self, lr):
        sr = self.inner(lr)
        photo = torch.from_numpy(fixture_photo()).permute(2, 0, 1)[None] / 255
        return photo + self.error * (sr - photo) if sr.shape == photo.shape else sr


def test_one_decibel_over_bicubic_is_what_it_takes():
    """A decibel is 0.891 of the error."""
    require_better_than_bicubic(loaded(Knowing(0.87)))
    with pytest.raises(RequestError, match="expected at least 1 dB"):
        require_better_than_bicubic(loaded(Knowing(0.92)))


def test_one_of_kdsr_must_not_lose_and_is_warned_about_when_it_hardly_wins(caplog):
    for error, hardly in ((0.87, False), (0.92, True), (0.99, True)):
        caplog.clear()
        require_better_than_bicubic(loaded(Knowing(error), imported=False))
        assert ("less than 1 dB over bicubic" in caplog.text) == hardly
    with pytest.raises(RequestError, match="expected at least 0 dB over bicubic"):
        require_better_than_bicubic(loaded(Knowing(1.02), imported=False))
    require_better_than_bicubic(loaded(Knowing(1.02), imported=False), force=True)


@pytest.mark.parametrize("imported", [True, False])
def test_one_for_looks_may_be_three_decibels_short(imported):
    """Three decibels are 1.41 of the error."""
    for error, said in ((1.3, {}), (1.3, {"trained_for": "perception"})):
        goal = {} if said else {"trained_for": "perception"}
        require_better_than_bicubic(loaded(Knowing(error), imported=imported, **goal), **said)
    with pytest.raises(RequestError, match="expected at least -3 dB over bicubic"):
        require_better_than_bicubic(loaded(Knowing(1.5), imported=imported, trained_for="perception"))
