"""HR to LR on the device, batched: MATLAB's bicubic, and seeded chains for photographs from the wild.

What MATLAB's `imresize` does to an 8-bit image was read off the field's LR files: rows first, then
columns, each pass rounded to a grey level, and the last pixel repeated beyond the border (not mirrored, as
its later versions do). `bicubic_lr` does exactly this; `bicubic_downscale` is the same without rounding,
linear and differentiable.

A patch needs real pixels around it (its context). Replicate-padding the whole HR image by that much
first makes patches at the image's border right as well.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kdsr.config import (
    BicubicDegradation,
    BlurStep,
    Degradation,
    DegradationStep,
    JpegStep,
    NoiseStep,
    RealWorldDegradation,
    ResizeStep,
)
from kdsr.errors import RequestError

BICUBIC_REACH = 2
"""Input pixels of the coarser grid that one bicubic pixel reads on each side."""


Random = Generator | Sequence[Generator]
"""One for all samples of a batch, or one for each, which then looks the same in whatever batch it is."""


def quantize(x: Tensor) -> Tensor:
    """`x` clamped to [0, 1] and rounded to multiples of 1/255, halves up as MATLAB does."""
    return _to_levels(x).div_(255)


def _to_levels(x: Tensor) -> Tensor:
    return _round_levels(x * 255)


def _round_levels(levels: Tensor) -> Tensor:
    """Whole grey levels 0..255. In place: `levels` is always a fresh tensor, and memory is the cost."""
    return levels.add_(0.5).floor_().clamp_(0, 255)


# ---------------------------------------------------------------- bicubic


def keys_cubic(t: Tensor) -> Tensor:
    """Cubic convolution kernel with a = -0.5, zero beyond 2. Source: Keys, IEEE TASSP 1981."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def bicubic_downscale(hr: Tensor, scale: int) -> Tensor:
    """HR (B, C, H, W) float to LR (B, C, H/scale, W/scale): antialiased bicubic, unclamped, not rounded.

    Linear and differentiable. Raises RequestError when a side is no multiple of `scale`.
    """
    _check_multiple(hr.shape[-2], hr.shape[-1], scale)
    with torch.autocast(hr.device.type, enabled=False):
        return _shrink_columns(_shrink_rows(hr, scale), scale)


def bicubic_lr(hr: Tensor, scale: int) -> Tensor:
    """8-bit HR (B, C, H, W) in [0, 1] to 8-bit LR in [0, 1], bit for bit as MATLAB's imresize on uint8.

    Not differentiable. Raises RequestError when a side is no multiple of `scale`.
    """
    _check_multiple(hr.shape[-2], hr.shape[-1], scale)
    with torch.no_grad(), torch.autocast(hr.device.type, enabled=False):
        rows = _round_levels(_shrink_rows(_to_levels(hr), scale))
        return _round_levels(_shrink_columns(rows, scale)).div_(255)


def bicubic_lr_of_pixels(pixels: Tensor, scale: int) -> Tensor:
    """What `bicubic_lr` makes of pixels (B, H, W, C) uint8: LR (B, C, H/scale, W/scale), channels last.

    Pixels stay as they are stored: colours are columns beside each other, and HR is passed over once.
    Raises RequestError when a side is no multiple of `scale`.
    """
    batch, height, width, channels = pixels.shape
    _check_multiple(height, width, scale)
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        levels = pixels.flatten(2).float()
        down = _shrink_weights(height, scale, levels.dtype, levels.device)
        across = _colour_weights(width, scale, channels, levels.device)
        rows = _round_levels((down @ levels).div_(_denominator(scale)))
        lr = _round_levels((rows @ across).div_(_denominator(scale))).div_(255)
    return lr.view(batch, height // scale, width // scale, channels).permute(0, 3, 1, 2)


def _check_multiple(height: int, width: int, scale: int) -> None:
    if height % scale or width % scale or not height or not width:
        raise RequestError(
            f"HR of {height} x {width} pixels: expected multiples of scale {scale}; "
            f"mod-crop it to {height - height % scale} x {width - width % scale} first"
        )


def _shrink_rows(x: Tensor, scale: int) -> Tensor:
    weights = _shrink_weights(x.shape[-2], scale, x.dtype, x.device)
    return (weights @ x).div_(_denominator(scale))


def _shrink_columns(x: Tensor, scale: int) -> Tensor:
    weights = _shrink_weights(x.shape[-1], scale, x.dtype, x.device)
    return (x @ weights.mT).div_(_denominator(scale))


def _denominator(scale: int) -> int:
    """What makes every weight a whole number: 1.5 * (m / (2 * scale))**3 / scale = 3 * m**3 / this."""
    return 16 * scale**4


@lru_cache(maxsize=64)
def _shrink_weights(size: int, scale: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size/scale, size) whole-numbered weights; taps beyond the border fall on the border pixel.

    Whole numbers below 2048 make products with grey levels exact in float32 and in TF32, so that halves
    round the same way on every machine. Dense, because a small matmul beats a strided convolution.
    """
    with torch.inference_mode(False):  # a cached inference tensor could never take part in a backward
        centre = (torch.arange(size // scale, dtype=torch.float64) + 0.5) * scale - 0.5
        taps = (centre - 2 * scale).floor()[:, None] + torch.arange(4 * scale + 2)
        weights = keys_cubic((taps - centre[:, None]) / scale) / scale * _denominator(scale)
        dense = torch.zeros(size // scale, size, dtype=torch.float64)
        dense.scatter_add_(1, taps.long().clamp(0, size - 1), weights.round())
        return dense.to(device, dtype)


@lru_cache(maxsize=64)
def _colour_weights(width: int, scale: int, channels: int, device: torch.device) -> Tensor:
    """(width * C, width/scale * C): `_shrink_weights` for columns, each colour apart."""
    with torch.inference_mode(False):
        weights = _shrink_weights(width, scale, torch.float32, device)
        return torch.kron(weights.mT.contiguous(), torch.eye(channels, device=device))


def bicubic_upscale(lr: Tensor, scale: int) -> Tensor:
    """LR (B, C, h, w) to (B, C, h*scale, w*scale) as MATLAB's imresize enlarges, unclamped, not rounded.

    In the type of `lr` also within autocast: bfloat16 does not hold the 8 bits of a picture.
    """
    batch, channels = lr.shape[:2]
    padded = F.pad(lr, (BICUBIC_REACH,) * 4, mode="replicate")
    with torch.autocast(lr.device.type, enabled=False):
        phases = F.conv2d(padded.flatten(0, 1).unsqueeze(1), upscale_kernel(scale).to(lr))
    return F.pixel_shuffle(phases, scale).view(batch, channels, lr.shape[2] * scale, lr.shape[3] * scale)


def upscale_kernel(scale: int) -> Tensor:
    """(scale**2, 1, 5, 5) weights: one 5x5 filter for each output pixel of an LR pixel, rows first."""
    offset = (torch.arange(scale, dtype=torch.float64) + 0.5) / scale - 0.5
    taps = torch.arange(-BICUBIC_REACH, BICUBIC_REACH + 1)
    one_axis = keys_cubic(taps - offset[:, None])
    return torch.einsum("ik,jl->ijkl", one_axis, one_axis).reshape(scale**2, 1, 5, 5)


# ---------------------------------------------------------------- what a run calls


def degradation_name(degradation: Degradation) -> str:
    """`bicubic`, or a kind with a digest of its settings: the same name means the same LR."""
    if isinstance(degradation, BicubicDegradation):
        return degradation.kind
    digest = hashlib.sha256(degradation.model_dump_json().encode()).hexdigest()
    return f"{degradation.kind}-{digest[:12]}"


@dataclass(frozen=True)
class Degrade:
    """From HR (B, C, H, W) in [0, 1] to the LR (B, C, H/scale, W/scale) that a file would hold: 8 bit.

    The same HR and the same state of the generator give the same LR; with a generator for each sample, in
    whatever batch the sample comes. Generators may live on the CPU or on HR's device; their numbers, and so
    the LR, differ between the two. Bicubic draws nothing from it.
    Raises RequestError when a side is no multiple of `scale`.
    """

    degradation: Degradation
    scale: int

    @property
    def context(self) -> int:
        """See `context`."""
        return context(self.degradation, self.scale)

    def __call__(self, hr: Tensor, random: Random) -> Tensor:
        """Nothing is dropped: the caller cuts `context` LR pixels off each side of a patch's LR."""
        if isinstance(self.degradation, BicubicDegradation):
            return bicubic_lr(hr, self.scale)
        return real_world_lr(hr, self.degradation, self.scale, random)

    def of_pixels(self, pixels: Tensor, random: Random) -> Tensor:
        """The same of pixels (B, H, W, C) uint8, which with bicubic is less work."""
        if isinstance(self.degradation, BicubicDegradation):
            return bicubic_lr_of_pixels(pixels, self.scale)
        return self(pixels.permute(0, 3, 1, 2).float().div_(255), random)


def build_degradation(degradation: Degradation, scale: int) -> Degrade:
    """The degradation that the config asks for."""
    return Degrade(degradation, scale)


def context(degradation: Degradation, scale: int) -> int:
    """LR pixels around a patch that its LR depends on.

    With bicubic, the LR of a patch with this context equals that part of the whole image's LR bit for bit.
    With a real-world chain nothing equals: parameters are drawn per patch, a resized size is rounded, and
    JPEG's 8x8 grid begins at the patch's own corner. There, context keeps pixels invented beyond the border
    out of blur and resizing. They may still share a JPEG block with the patch, which is left at that.
    """
    if isinstance(degradation, BicubicDegradation):
        return BICUBIC_REACH
    reach, factor = 0.0, 1.0
    for step in degradation.steps:
        reach += _reach(step) / factor
        factor *= _smallest_factor(step)
    reach += BICUBIC_REACH * max(scale, 1 / factor) + 1 / factor
    return math.ceil(reach / scale) + sum(math.ceil(_reach(step)) for step in degradation.lr_steps)


def _reach(step: DegradationStep) -> float:
    """Pixels on each side that one pixel after `step` reads, in pixels before it. JPEG: see `context`."""
    match step:
        case BlurStep():
            return _blur_radius(step)
        case ResizeStep():
            return BICUBIC_REACH * max(1.0, 1 / step.factor[0]) + 1
        case NoiseStep() | JpegStep():
            return 0


def _smallest_factor(step: DegradationStep) -> float:
    return step.factor[0] if isinstance(step, ResizeStep) else 1.0


# ---------------------------------------------------------------- real world


@dataclass(frozen=True)
class Samples:
    """Images of different sizes on one canvas: pixels (B, C, H, W), each image at the top left.

    What lies right of and below an image is never read when it is resized.
    """

    pixels: Tensor
    heights: Tensor
    """(B,) whole numbers, on the device of the pixels; so are `widths`."""
    widths: Tensor

    @property
    def count(self) -> int:
        """B."""
        return self.pixels.shape[0]


@torch.no_grad()
def real_world_lr(hr: Tensor, degradation: RealWorldDegradation, scale: int, random: Random) -> Tensor:
    """HR (B, C, H, W) in [0, 1] to 8-bit LR: steps on HR, bicubic, steps on LR. Parameters per sample."""
    _check_multiple(hr.shape[-2], hr.shape[-1], scale)
    height, width = hr.shape[-2] // scale, hr.shape[-1] // scale
    with torch.autocast(hr.device.type, enabled=False):
        samples = _alone(quantize(hr))
        for step in degradation.steps:
            samples = apply_step(samples, step, random)
        samples = _alone(_fit_to(samples, height, width).clamp(0, 1))
        for lr_step in degradation.lr_steps:
            samples = apply_step(samples, lr_step, random)
        return quantize(samples.pixels)


def apply_step(samples: Samples, step: DegradationStep, random: Random) -> Samples:
    """One step; what it draws, it draws for each sample."""
    match step:
        case BlurStep():
            return replace(samples, pixels=blur(samples.pixels, step, random))
        case ResizeStep():
            return resize(samples, step, random)
        case NoiseStep():
            return replace(samples, pixels=add_noise(samples.pixels, step, random))
        case JpegStep():
            return replace(samples, pixels=compress(samples.pixels, step, random))


def _alone(pixels: Tensor) -> Samples:
    """Samples that fill their canvas."""
    batch, _, height, width = pixels.shape
    size = torch.tensor([height, width], device=pixels.device)
    return Samples(pixels, heights=size[0].expand(batch), widths=size[1].expand(batch))


def _uniform(samples: Tensor, bounds: tuple[float, float], random: Random) -> Tensor:
    """(B,) one number for each sample, on its device whatever the generator's."""
    drawn = _drawn(torch.rand, samples.shape[:1], random)
    return bounds[0] + (bounds[1] - bounds[0]) * drawn.to(samples)


def _drawn(draw: Callable[..., Tensor], shape: Sequence[int], random: Random) -> Tensor:
    """Numbers of `shape`, samples first, on the device of the generators."""
    if isinstance(random, Generator):
        return draw(shape, generator=random, device=random.device)
    return torch.stack([draw(shape[1:], generator=each, device=each.device) for each in random])


def blur(x: Tensor, step: BlurStep, random: Random) -> Tensor:
    """(B, C, H, W) blurred by a Gaussian of random width, ratio of axes and direction."""
    sigma = _uniform(x, step.sigma, random)
    ratio = _uniform(x, (1.0, step.anisotropy), random)
    angle = _uniform(x, (0.0, math.pi), random)
    radius = _blur_radius(step)
    kernels = gaussian_kernels(sigma, sigma / ratio, angle, radius).unsqueeze(1)
    padded = F.pad(x, (radius,) * 4, mode="replicate").transpose(0, 1)  # a sample is a channel, with a kernel
    padded = padded.contiguous(memory_format=torch.channels_last)  # twice as fast on CPUs
    return F.conv2d(padded, kernels, groups=x.shape[0]).transpose(0, 1).contiguous()


def _blur_radius(step: BlurStep) -> int:
    return math.ceil(3 * step.sigma[1])


def gaussian_kernels(along: Tensor, across: Tensor, angle: Tensor, radius: int) -> Tensor:
    """(B,) standard deviations of two axes and the first one's angle to (B, 2r+1, 2r+1) of sum 1."""
    line = torch.arange(-radius, radius + 1, device=angle.device, dtype=angle.dtype)
    y, x = torch.meshgrid(line, line, indexing="ij")
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    u = (x * cos + y * sin) / along.view(-1, 1, 1)
    v = (y * cos - x * sin) / across.clamp_min(0.05).view(-1, 1, 1)
    weights = torch.exp(-(u * u + v * v) / 2)
    return weights / weights.sum(dim=(1, 2), keepdim=True)


def add_noise(x: Tensor, step: NoiseStep, random: Random) -> Tensor:
    """(B, C, H, W) with Gaussian noise of random strength, the same in all channels where grey is drawn."""
    sigma = _uniform(x, step.sigma, random).view(-1, 1, 1, 1) / 255
    is_grey = _uniform(x, (0.0, 1.0), random).view(-1, 1, 1, 1) < step.grey_probability
    noise = _drawn(torch.randn, x.shape, random).to(x)
    return (x + sigma * torch.where(is_grey, noise[:, :1], noise)).clamp(0, 1)


# ---------------------------------------------------------------- resizing by a factor of its own


Kernel = Callable[[Tensor], Tensor]


def box(t: Tensor) -> Tensor:
    """1 within half a pixel, zero beyond."""
    return ((t >= -0.5) & (t < 0.5)).to(t)


def linear(t: Tensor) -> Tensor:
    """Triangle, zero beyond 1."""
    return (1 - t.abs()).clamp_min(0)


def resize(samples: Samples, step: ResizeStep, random: Random) -> Samples:
    """Each sample by a factor and with a kernel (box, linear or cubic, antialiased) of its own."""
    factor = _uniform(samples.pixels, step.factor, random)
    choice = (_uniform(samples.pixels, (0.0, 3.0), random)).floor().view(-1, 1, 1)

    def kernel(t: Tensor) -> Tensor:
        return torch.where(choice == 0, box(t), torch.where(choice == 1, linear(t), keys_cubic(t)))

    def target(sizes: Tensor) -> Tensor:
        return (sizes * factor).round().clamp_min(1).long()

    canvas = [max(1, math.ceil(side * step.factor[1])) for side in samples.pixels.shape[-2:]]
    heights, widths = target(samples.heights), target(samples.widths)
    return Samples(_resample(samples, heights, widths, canvas, kernel), heights, widths)


def _fit_to(samples: Samples, height: int, width: int) -> Tensor:
    """(B, C, height, width): every sample antialiased-bicubic to this size."""
    heights, widths = torch.full_like(samples.heights, height), torch.full_like(samples.widths, width)
    return _resample(samples, heights, widths, [height, width], keys_cubic)


def _resample(samples: Samples, heights: Tensor, widths: Tensor, canvas: list[int], kernel: Kernel) -> Tensor:
    """Pixels on a new canvas, each sample resized to its own height and width."""
    x = samples.pixels
    rows = _resize_weights(samples.heights, heights, x.shape[-2], canvas[0], kernel).to(x.dtype)
    columns = _resize_weights(samples.widths, widths, x.shape[-1], canvas[1], kernel).to(x.dtype)
    return rows.unsqueeze(1) @ x @ columns.mT.unsqueeze(1)


def _resize_weights(before: Tensor, after: Tensor, size: int, new_size: int, kernel: Kernel) -> Tensor:
    """(B, new_size, size) weights that bring samples from `before` to `after` pixels, each row of sum 1.

    Taps beyond a sample's border are left out and the others weigh more. Pixels beyond the new size repeat
    the last one. Both keep what is not image out of it.
    """
    ratio = (before / after).view(-1, 1, 1)
    pixel = torch.arange(new_size, device=before.device).clamp(max=after.view(-1, 1) - 1).unsqueeze(-1)
    centre = (pixel + 0.5) * ratio - 0.5
    tap = torch.arange(size, device=before.device)
    weights = kernel((tap - centre) / ratio.clamp_min(1)) * (tap < before.view(-1, 1, 1))
    return weights / weights.sum(dim=-1, keepdim=True)


# ---------------------------------------------------------------- JPEG


BLOCK = 8
LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""Steps of quality 50 by vertical and horizontal frequency. Source: ITU-T T.81, annex K."""
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
RGB_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
YCC_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))
Table = tuple[tuple[float, ...], ...]


def compress(x: Tensor, step: JpegStep, random: Random) -> Tensor:
    """(B, C, H, W) in [0, 1] after JPEG of a random quality, colour at half the size where that is drawn."""
    low, high = step.quality
    quality = _uniform(x, (low, high + 1), random).floor().clamp_max(high)
    is_subsampled = _uniform(x, (0.0, 1.0), random) < step.subsampling_probability
    return jpeg(x, quality, is_subsampled)


def jpeg(x: Tensor, quality: Tensor, is_subsampled: Tensor) -> Tensor:
    """What a JPEG of `x` (B, 1 or 3, H, W) decodes to, 8 bit in [0, 1].

    `quality` (B,) 1..100 as libjpeg counts it, `is_subsampled` (B,) bool: 4:2:0 or 4:4:4. libjpeg's tables,
    rounding between the stages and smooth colour upsampling, without its bytes: Pillow's pixels differ by
    a fraction of a grey level on average.
    """
    height, width = x.shape[-2:]
    levels = F.pad(_to_levels(x), (0, -width % (2 * BLOCK), 0, -height % (2 * BLOCK)), mode="replicate")
    decoded = _jpeg_colour(levels, quality, is_subsampled) if x.shape[1] == 3 else _jpeg_luma(levels, quality)
    return decoded[..., :height, :width] / 255


def _jpeg_luma(levels: Tensor, quality: Tensor) -> Tensor:
    return _code_blocks(levels, _quantisation_steps(LUMA_TABLE, quality))


def _jpeg_colour(levels: Tensor, quality: Tensor, is_subsampled: Tensor) -> Tensor:
    neutral = torch.tensor([0.0, 128.0, 128.0]).view(3, 1, 1).to(levels)
    ycc = _round_levels(_mix_channels(levels, RGB_TO_YCC) + neutral)
    luma, chroma = ycc[:, :1], ycc[:, 1:]
    steps = _quantisation_steps(CHROMA_TABLE, quality)
    halved = F.avg_pool2d(chroma, 2)
    halved[..., ::2] -= 0.25  # libjpeg rounds halves down in every other column, so that no colour drifts
    halved = _code_blocks(_round_levels(halved), steps)
    smooth = _round_levels(F.interpolate(halved, scale_factor=2, mode="bilinear"))
    chroma = torch.where(is_subsampled.view(-1, 1, 1, 1), smooth, _code_blocks(chroma, steps))
    decoded = torch.cat([_jpeg_luma(luma, quality), chroma], dim=1)
    return _round_levels(_mix_channels(decoded - neutral, YCC_TO_RGB))


def _mix_channels(x: Tensor, matrix: Table) -> Tensor:
    return torch.einsum("ij,bjhw->bihw", torch.tensor(matrix).to(x), x)


def _quantisation_steps(table: Table, quality: Tensor) -> Tensor:
    """(B, 8, 8) whole-numbered steps, as libjpeg scales its tables."""
    percent = torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)
    scaled = torch.tensor(table).to(quality) * percent.view(-1, 1, 1)
    return ((scaled + 50) / 100).floor().clamp(1, 255)


def _code_blocks(levels: Tensor, steps: Tensor) -> Tensor:
    """(B, C, H, W) levels, whole blocks, through DCT, rounding to `steps` (B, 8, 8), and back."""
    dct = _dct_matrix().to(levels)
    blocks = (levels - 128).unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    steps = steps[:, None, None, :, None, :]
    coefficients = (_transform(blocks, dct) / steps).round() * steps
    back = _transform(coefficients, dct.mT)
    return _round_levels(back.flatten(4, 5).flatten(2, 3) + 128)


def _transform(blocks: Tensor, matrix: Tensor) -> Tensor:
    """(B, C, rows, 8, columns, 8) blocks, `matrix` applied along both of their axes."""
    across = blocks @ matrix.mT
    return (matrix @ across.flatten(4, 5)).unflatten(4, (-1, BLOCK))


def _dct_matrix() -> Tensor:
    """(8, 8) orthonormal DCT-II, one frequency per row."""
    position = torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos((2 * position + 1) * position[:, None] * math.pi / (2 * BLOCK)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
