"""The LR that training sees, held against MATLAB's files, slow float64 references and libjpeg."""

import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from kdsr.config import (
    BicubicDegradation,
    BlurStep,
    Degradation,
    JpegStep,
    NoiseStep,
    RealWorldDegradation,
    ResizeStep,
)
from kdsr.degrade import (
    bicubic_downscale,
    bicubic_lr,
    bicubic_upscale,
    build_degradation,
    context,
    jpeg,
    quantize,
)
from kdsr.errors import RequestError

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

SCALES = (2, 3, 4)
FROZEN_LR = [[112, 127, 114], [135, 125, 143]]
"""Of a synthetic 8 x 12 image, by `slow_resize` with rounding after rows and after columns."""
SMOOTH_STEPS = (BlurStep(), ResizeStep())
DEGRADATIONS: dict[str, Degradation] = {
    "bicubic": BicubicDegradation(),
    "real_world": RealWorldDegradation(),
    "blur": RealWorldDegradation(steps=(BlurStep(),), lr_steps=()),
    "resize": RealWorldDegradation(steps=(ResizeStep(),), lr_steps=()),
    "noise": RealWorldDegradation(steps=(NoiseStep(),), lr_steps=()),
    "jpeg": RealWorldDegradation(steps=(JpegStep(),), lr_steps=()),
    "twice": RealWorldDegradation(steps=SMOOTH_STEPS + SMOOTH_STEPS, lr_steps=(BlurStep(), JpegStep())),
}


def cubic(t: float) -> float:
    """Keys' kernel written out as in his paper."""
    t = abs(t)
    if t <= 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t <= 2 else 0.0


def slow_resize(line: Array, factor: float) -> Array:
    """One axis, one pixel at a time, in float64, as MATLAB documents `imresize`; edges repeated."""
    size = round(len(line) * factor)
    stretch = min(factor, 1.0)
    result = np.zeros(size)
    for i in range(size):
        centre = (i + 0.5) / factor - 0.5
        reach = math.ceil(2 / stretch) + 1
        taps = range(math.floor(centre) - reach, math.floor(centre) + reach + 1)
        weights = [cubic((tap - centre) * stretch) for tap in taps]
        pixels = [line[min(max(tap, 0), len(line) - 1)] for tap in taps]
        result[i] = np.dot(weights, pixels) / sum(weights)
    return result


def slow_imresize(image: Array, factor: float) -> Array:
    rows = np.stack([slow_resize(column, factor) for column in image.T], axis=1)
    return np.stack([slow_resize(row, factor) for row in rows])


def rounded(grey_levels: Array) -> Array:
    """As MATLAB stores them."""
    return np.clip(np.floor(grey_levels + 0.5), 0, 255)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(*shape: int, seed: int = 0) -> Tensor:
    """Random 8-bit images in [0, 1], flat in places and full of edges."""
    coarse = torch.rand(*shape[:2], shape[2] // 4 + 1, shape[3] // 4 + 1, generator=seeded(seed))
    fine = torch.rand(*shape, generator=seeded(seed + 1))
    blocks = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., : shape[2], : shape[3]]
    return quantize(torch.where(blocks > 0.5, blocks, (blocks + fine) / 2))


def photograph(height: int, width: int) -> Tensor:
    """(1, 3, height, width) 8 bit, smooth colours with edges: something a JPEG is meant for."""
    y, x = torch.meshgrid(torch.arange(height) / 40, torch.arange(width) / 40, indexing="ij")
    waves = torch.stack([torch.sin(3 * x + y), torch.cos(x * y / 2), torch.sin(2 * y - x)])
    edge = ((x - 2) ** 2 + (y - 2) ** 2 < 2).float()
    return quantize(0.5 + 0.25 * waves + 0.2 * edge)[None]


# ---------------------------------------------------------------- bicubic


@pytest.mark.parametrize("scale", SCALES)
def test_downscaling_equals_a_slow_float64_reference(scale: int) -> None:
    image = np.random.default_rng(scale).random((7 * scale, 5 * scale))
    expected = slow_imresize(image, 1 / scale)
    found = bicubic_downscale(torch.from_numpy(image)[None, None], scale)[0, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_upscaling_equals_a_slow_float64_reference(scale: int) -> None:
    image = np.random.default_rng(scale).random((7, 5))
    expected = slow_imresize(image, scale)
    found = bicubic_upscale(torch.from_numpy(image)[None, None], scale)[0, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_eight_bit_lr_rounds_after_rows_and_after_columns(scale: int) -> None:
    hr = levels(1, 1, 8 * scale, 6 * scale)
    image = (hr[0, 0].double() * 255).round().numpy()
    rows = rounded(np.stack([slow_resize(column, 1 / scale) for column in image.T], axis=1))
    expected = rounded(np.stack([slow_resize(row, 1 / scale) for row in rows]))
    found = (bicubic_lr(hr, scale)[0, 0] * 255).round().numpy()
    assert np.abs(found - expected).max() <= 1  # a half may round either way in the reference
    assert (found != expected).mean() < 0.05


def test_a_frozen_image_keeps_its_lr() -> None:
    hr = (torch.arange(8 * 12) * 37 % 256).reshape(1, 1, 8, 12) / 255
    lr = (bicubic_lr(hr, 4) * 255).round().int()[0, 0].tolist()
    assert lr == FROZEN_LR


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("resample", [bicubic_downscale, bicubic_lr, bicubic_upscale])
def test_a_flat_image_stays_flat(scale: int, resample: object) -> None:
    assert callable(resample)
    flat = torch.full((2, 3, 4 * scale, 3 * scale), 77 / 255)
    result = resample(flat, scale)
    torch.testing.assert_close(result, torch.full_like(result, 77 / 255), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=30)
@given(
    scale=st.sampled_from(SCALES),
    top=st.integers(0, 9),
    left=st.integers(0, 6),
    size=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_lr_of_a_patch_is_that_patch_of_the_lr(scale: int, top: int, left: int, size: int, seed: int) -> None:
    """Also at the border of the image, when its edge is repeated outwards by the context first."""
    hr = levels(2, 3, 15 * scale, 12 * scale, seed=seed)
    around = context(BicubicDegradation(), scale)
    padded = torch.nn.functional.pad(hr, (around * scale,) * 4, mode="replicate")
    side = (size + 2 * around) * scale
    patch = padded[..., top * scale : top * scale + side, left * scale : left * scale + side]
    of_patch = bicubic_downscale(patch, scale)[..., around:-around, around:-around]
    of_whole = bicubic_downscale(hr, scale)[..., top : top + size, left : left + size]
    torch.testing.assert_close(of_patch, of_whole, atol=1e-6, rtol=0)
    exact = bicubic_lr(patch, scale)[..., around:-around, around:-around]
    assert torch.equal(exact, bicubic_lr(hr, scale)[..., top : top + size, left : left + size])


def test_a_size_that_is_no_multiple_is_refused_with_the_right_one() -> None:
    with pytest.raises(RequestError, match=r"10 x 13 pixels: expected multiples of scale 4.*8 x 12"):
        bicubic_downscale(torch.zeros(1, 3, 10, 13), 4)


def test_downscaling_is_linear_and_differentiable_even_after_inference_mode() -> None:
    with torch.inference_mode():
        bicubic_downscale(torch.rand(1, 1, 22, 22), 2)
    hr = torch.rand(1, 1, 22, 22, requires_grad=True)
    bicubic_downscale(hr, 2).sum().backward()
    assert hr.grad is not None
    assert hr.grad.sum().item() == pytest.approx(11 * 11, rel=1e-5)


def test_autocast_does_not_change_the_lr() -> None:
    hr = levels(1, 3, 24, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bicubic_lr(hr, 4), BICUBIC_X4(hr, seeded()))
        mixed = RealWorldDegradation()
        inside = build_degradation(mixed, 2)(hr, seeded())
    assert torch.equal(inside, build_degradation(mixed, 2)(hr, seeded()))


def test_channels_last_and_batching_do_not_change_the_lr() -> None:
    hr = levels(3, 3, 24, 36)
    one_by_one = torch.cat([bicubic_lr(image[None], 3) for image in hr])
    assert torch.equal(bicubic_lr(hr.contiguous(memory_format=torch.channels_last), 3), one_by_one)


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_lr_of_stored_pixels_is_that_of_the_image(scale, channels):
    pixels = torch.randint(256, (2, 5 * scale, 7 * scale, channels), dtype=torch.uint8)
    hr = pixels.permute(0, 3, 1, 2).float() / 255
    degrade = build_degradation(BicubicDegradation(), scale)
    assert torch.equal(degrade.of_pixels(pixels, seeded()), bicubic_lr(hr, scale))
    chain = build_degradation(RealWorldDegradation(), scale)
    assert torch.equal(chain.of_pixels(pixels, seeded()), chain(hr, seeded()))
    with pytest.raises(RequestError, match="mod-crop"):
        degrade.of_pixels(pixels[:, 1:], seeded())


def test_quantize_rounds_halves_up_and_clamps() -> None:
    found = quantize(torch.tensor([-0.2, 0.5 / 255, 1.49 / 255, 1.3])) * 255
    assert found.round().tolist() == [0, 1, 1, 255]


def _oracle_cases() -> list[tuple[str, int]]:
    return [(name, scale) for name in ("Set5", "Set14", "B100") for scale in SCALES]


@pytest.mark.skipif("KDSR_DATA" not in os.environ, reason="KDSR_DATA: folder of benchmark data")
@pytest.mark.parametrize(("name", "scale"), _oracle_cases())
def test_lr_equals_the_files_that_matlab_made(name: str, scale: int) -> None:
    folder = Path(os.environ["KDSR_DATA"]) / "bench" / name / f"x{scale}"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    for path in sorted((folder / "HR").iterdir())[:20]:
        expected = _read(folder / "LR" / path.name)
        assert torch.equal(bicubic_lr(_read(path), scale), expected), path.name


def _read(path: Path) -> Tensor:
    with Image.open(path) as image:
        pixels = np.atleast_3d(np.array(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


# ---------------------------------------------------------------- every degradation

BICUBIC_X4 = build_degradation(BicubicDegradation(), 4)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_lr_is_eight_bit_of_the_right_size(name: str, channels: int, scale: int) -> None:
    hr = levels(2, channels, 13 * scale, 9 * scale)
    lr = build_degradation(DEGRADATIONS[name], scale)(hr, seeded())
    assert lr.shape == (2, channels, 13, 9)
    assert lr.dtype == torch.float32
    assert torch.equal(lr, quantize(lr))


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_same_seed_gives_the_same_lr(name: str) -> None:
    hr = levels(3, 3, 48, 48)
    degrade = build_degradation(DEGRADATIONS[name], 4)
    assert torch.equal(degrade(hr, seeded(5)), degrade(hr.clone(), seeded(5)))


@pytest.mark.parametrize("name", [name for name in DEGRADATIONS if name != "bicubic"])
def test_seeds_and_samples_of_a_batch_differ(name: str) -> None:
    hr = levels(1, 3, 48, 48).expand(3, -1, -1, -1)
    degrade = build_degradation(DEGRADATIONS[name], 2)
    lr = degrade(hr, seeded(5))
    assert not torch.equal(lr[0], lr[1])
    assert not torch.equal(lr, degrade(hr, seeded(6)))


@settings(deadline=None, max_examples=10)
@given(scale=st.sampled_from(SCALES), seed=st.integers(0, 10_000), factor=st.floats(0.3, 1.5))
def test_nothing_beyond_the_context_reaches_a_patch(scale: int, seed: int, factor: float) -> None:
    """JPEG apart, as `context` says."""
    chain = RealWorldDegradation(
        steps=(BlurStep(sigma=(0.2, 1.5)), ResizeStep(factor=(factor, 1.5)), NoiseStep()),
        lr_steps=(BlurStep(sigma=(0.2, 0.6)),),
    )
    degrade = build_degradation(chain, scale)
    around = degrade.context
    hr = levels(2, 3, (4 + 2 * around) * scale, (4 + 2 * around) * scale, seed=seed)
    grown = torch.nn.functional.pad(hr, (scale * 3,) * 4, value=1.0)
    changed = torch.nn.functional.pad(hr, (scale * 3,) * 4, value=0.0)
    inner = slice(around + 3, -around - 3)
    first, second = (degrade(image, seeded(seed))[..., inner, inner] for image in (grown, changed))
    assert torch.equal(first, second)


@pytest.mark.parametrize("scale", SCALES)
def test_a_chain_without_steps_is_bicubic(scale: int) -> None:
    hr = photograph(30 * scale, 20 * scale)
    lr = build_degradation(RealWorldDegradation(steps=(), lr_steps=()), scale)(hr, seeded())
    difference = (lr - bicubic_lr(hr, scale))[..., 2:-2, 2:-2].abs() * 255
    assert difference.max() <= 1.01  # rounded once instead of twice


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.2])
def test_resizing_and_coming_back_does_not_shift_the_image(factor: float) -> None:
    ramp = torch.linspace(0.1, 0.9, 96).expand(1, 1, 96, 96)
    chain = RealWorldDegradation(steps=(ResizeStep(factor=(factor, factor)),), lr_steps=())
    lr = build_degradation(chain, 2)(ramp, seeded())
    inner = (lr - bicubic_lr(ramp, 2))[..., 8:-8, 8:-8]
    assert inner.abs().max() * 255 <= 2


def test_blur_keeps_the_mean_and_takes_detail() -> None:
    hr = levels(2, 3, 64, 64)
    chain = RealWorldDegradation(steps=(BlurStep(sigma=(2, 2)),), lr_steps=())
    lr, sharp = build_degradation(chain, 2)(hr, seeded()), bicubic_lr(hr, 2)
    assert lr.mean().item() == pytest.approx(sharp.mean().item(), abs=0.01)
    assert lr.var() < 0.7 * sharp.var()


def test_noise_has_the_strength_and_the_colour_that_were_asked() -> None:
    flat = torch.full((4, 3, 128, 128), 0.5)
    for probability, is_grey in ((1.0, True), (0.0, False)):
        step = NoiseStep(sigma=(10, 10), grey_probability=probability)
        chain = RealWorldDegradation(steps=(), lr_steps=(step,))
        lr = build_degradation(chain, 2)(flat, seeded())
        assert (lr * 255).std().item() == pytest.approx(10, rel=0.05)
        assert torch.equal(lr[:, 0], lr[:, 1]) == is_grey


@pytest.mark.parametrize("quality", [10, 40, 75, 95])
@pytest.mark.parametrize("subsampled", [False, True])
def test_jpeg_is_what_libjpeg_decodes_to(quality: int, *, subsampled: bool) -> None:
    image = photograph(75, 101)
    pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2 if subsampled else 0)
    expected = _read_bytes(file)
    found = jpeg(image, torch.tensor([float(quality)]), torch.tensor([subsampled]))
    damage = (expected - image).abs().mean()
    difference = (found - expected).abs().mean()
    assert difference * 255 < 0.5
    assert difference < 0.5 * damage


def _read_bytes(file: io.BytesIO) -> Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def test_one_batch_mixes_qualities_and_subsampling() -> None:
    image = photograph(48, 48)
    qualities, subsampled = torch.tensor([20.0, 90.0]), torch.tensor([True, False])
    together = jpeg(image.expand(2, -1, -1, -1), qualities, subsampled)
    for i in range(2):
        alone = jpeg(image, qualities[i : i + 1], subsampled[i : i + 1])
        # Matrix products of other sizes add up in another order, which can turn a tie of one coefficient.
        assert ((together[i : i + 1] - alone).abs() > 1e-5).float().mean() < 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BlurStep(sigma=(2, 1)),
        lambda: BlurStep(sigma=(0, 1)),
        lambda: ResizeStep(factor=(0, 1)),
        lambda: NoiseStep(sigma=(-1, 1)),
        lambda: JpegStep(quality=(0, 50)),
        lambda: JpegStep(quality=(90, 101)),
        lambda: RealWorldDegradation.model_validate({"lr_steps": [{"kind": "resize"}]}),
    ],
)
def test_impossible_ranges_are_refused_by_the_config(wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(ValidationError):
        wrong()
