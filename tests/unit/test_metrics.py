"""PSNR and SSIM against definitions written out slowly, and against values from scikit-image."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdsr.errors import ImageTooSmall, RequestError
from kdsr.metrics import gaussian_window, luma, psnr_y, ssim_y


def noise(height, width, *, seed, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def waves():
    """A smooth (40, 44, 3) picture and a coarser copy of it, from arithmetic alone."""
    y, x, c = np.meshgrid(np.arange(40), np.arange(44), np.arange(3), indexing="ij")
    picture = 127.5 + 80 * np.sin(x / 5 + c) + 47 * np.cos(y / 3 - c / 2)
    hr = np.floor(picture).astype(np.uint8)
    return (hr // 12 * 12).astype(np.uint8), hr


def slow_ssim(x, y):
    """Wang et al. 2004, equation 13, one window at a time with the full 2-D kernel."""
    distance = [(i - 5) ** 2 for i in range(11)]
    kernel = np.array([[math.exp(-(a + b) / (2 * 1.5**2)) for b in distance] for a in distance])
    kernel /= kernel.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            mean_a, mean_b = (kernel * a).sum(), (kernel * b).sum()
            var_a, var_b = (kernel * (a - mean_a) ** 2).sum(), (kernel * (b - mean_b) ** 2).sum()
            covariance = (kernel * (a - mean_a) * (b - mean_b)).sum()
            similar = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
            values.append(similar / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return float(np.mean(values))


def slow_luma(pixel):
    r, g, b = (float(value) / 255 for value in pixel)
    return 65.481 * r + 128.553 * g + 24.966 * b + 16


def test_black_is_16_and_white_is_235():
    black, white = np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)
    assert luma(black).item() == 16
    assert luma(white).item() == pytest.approx(235, abs=1e-12)


def test_luma_is_the_sum_of_the_standard_and_is_not_rounded():
    picture = noise(5, 4, seed=0)
    expected = [[slow_luma(pixel) for pixel in row] for row in picture]
    np.testing.assert_allclose(luma(picture), expected, rtol=0, atol=1e-12)


def test_grey_reads_as_three_equal_channels():
    grey = noise(6, 7, seed=1, channels=1)
    np.testing.assert_allclose(luma(grey), luma(grey.repeat(3, axis=2)), rtol=0, atol=1e-12)


def test_psnr_is_the_mean_square_written_out():
    sr, hr = noise(9, 8, seed=2), noise(9, 8, seed=3)
    total = sum((slow_luma(sr[y, x]) - slow_luma(hr[y, x])) ** 2 for y in range(2, 7) for x in range(2, 6))
    assert psnr_y(sr, hr, 2) == pytest.approx(10 * math.log10(255**2 / (total / 20)), abs=1e-9)


@settings(deadline=None, max_examples=15)
@given(st.integers(11, 15), st.integers(11, 15), st.integers(0, 2), st.integers(0, 2**31))
def test_ssim_is_the_definition_written_out(height, width, border, seed):
    hr = noise(height + 2 * border, width + 2 * border, seed=seed)
    sr = (hr // 2 + noise(*hr.shape[:2], seed=seed + 1) // 2).astype(np.uint8)
    inner = slice(border, border + height), slice(border, border + width)
    assert ssim_y(sr, hr, border) == pytest.approx(slow_ssim(luma(sr[inner]), luma(hr[inner])), abs=1e-9)


def test_values_of_scikit_image_are_reproduced():
    """Frozen from scikit-image 0.26: Gaussian weights, sigma 1.5, population covariance, 5 px trimmed."""
    sr, hr = waves()
    assert psnr_y(sr, hr, 4) == pytest.approx(33.984015, abs=2e-6)
    assert ssim_y(sr, hr, 4) == pytest.approx(0.991342, abs=2e-6)


def test_the_border_is_left_out_and_nothing_more():
    _, hr = waves()
    spoiled = hr.copy()
    spoiled[:4], spoiled[-4:], spoiled[:, :4], spoiled[:, -4:] = 0, 0, 0, 0
    assert psnr_y(spoiled, hr, 4) == math.inf
    assert psnr_y(spoiled, hr, 3) < math.inf


def test_an_exact_copy_scores_infinite_and_one():
    _, hr = waves()
    assert psnr_y(hr, hr, 2) == math.inf
    assert ssim_y(hr, hr, 2) == pytest.approx(1.0, abs=1e-12)


def test_the_window_sums_to_one_and_is_symmetric():
    window = gaussian_window()
    assert window.sum() == pytest.approx(1.0, abs=1e-15)
    np.testing.assert_array_equal(window, window[::-1])


def test_different_sizes_are_refused_with_both_sizes():
    with pytest.raises(RequestError, match=r"SR is 20x22, HR is 20x24"):
        psnr_y(noise(20, 22, seed=0), noise(20, 24, seed=0), 2)


def test_an_image_below_the_window_is_refused_with_its_size():
    small = noise(18, 30, seed=0)
    assert psnr_y(small, small, 4) == math.inf
    with pytest.raises(ImageTooSmall, match=r"18x30.*border of 4.*11x11"):
        ssim_y(small, small, 4)


def test_floats_are_refused():
    with pytest.raises(RequestError, match="float32"):
        luma(np.zeros((4, 4, 3), np.float32))
