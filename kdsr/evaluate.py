"""Measure models on benchmarks with the field's protocol: luma PSNR and SSIM, and what each model costs.

Every pixel that is measured comes from `Upscaler`, rounded to uint8. Luma, border and window are those of
`kdsr.metrics`, with a border of `scale` pixels; a score of a set is the mean over its images. Bicubic
always takes part. Knows nothing of tables and pictures: see `kdsr.report`.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdsr.benchmark import Benchmark, Pair, benchmark_names, open_benchmark
from kdsr.checkpoint import load_model
from kdsr.config import EvaluateConfig, StoreConfig
from kdsr.engine import Engine, Precision
from kdsr.errors import RequestError
from kdsr.image import Image
from kdsr.metrics import Pixels, Plane, luma, psnr_y, ssim_y
from kdsr.models import build_model, fold, num_parameters
from kdsr.models.contract import SrModel
from kdsr.progress import progress_bar
from kdsr.spec import BicubicSpec
from kdsr.upscale import Upscaler

Upscale = Callable[[Image], Image]

BICUBIC = "bicubic"
"""Name of the row that is always there. As a model it asks for that row alone."""


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """How close one output is to HR. `psnr_y` in dB, infinite for an exact copy."""

    name: str
    psnr_y: float
    ssim_y: float


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % interval that the bootstrap gives it."""

    mean: float
    low: float
    high: float


def evaluate_pairs(upscale: Upscale, pairs: Iterable[Pair], border: int) -> list[Score]:
    """Scores of `upscale` on each of `pairs`, in order; the outer `border` pixels are left out."""
    return [score(upscale(pair.lr), pair, border) for pair in pairs]


def score(sr: Image, pair: Pair, border: int) -> Score:
    """Score of `sr` against the HR of `pair`."""
    sr_pixels, hr_pixels = sr.rgb8().pixels, pair.hr.rgb8().pixels
    return Score(pair.name, psnr_y(sr_pixels, hr_pixels, border), ssim_y(sr_pixels, hr_pixels, border))


def psnr_differences(scores: Sequence[Score], reference: Sequence[Score]) -> list[float]:
    """PSNR of each image minus that of the same image in `reference`; two exact copies differ by 0."""
    pairs = zip(scores, reference, strict=True)
    return [0.0 if a.psnr_y == b.psnr_y else a.psnr_y - b.psnr_y for a, b in pairs]


def paired_bootstrap(
    differences: Sequence[float], *, seed: int, num_resamples: int = 10_000
) -> Interval | None:
    """Mean of per-image `differences` and its 95 % percentile interval (Efron, 1979).

    Images are drawn with replacement, the same images for both sides of a difference. None when fewer than
    two images leave nothing to draw, or when an image that was reproduced exactly makes one infinite.
    """
    values = np.asarray(differences, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    draws = np.random.default_rng(seed).integers(0, len(values), (num_resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


# ---------------------------------------------------------------- cost

OUTPUT_720P = (720, 1280)
COUNTED_INPUT = 64
SPEED_INPUT = 256
SPEED_RUNS, SPEED_SECONDS = 5, (0.5, 10.0)
"""At least so many runs, and more until the first time is up; fewer where the second is up before."""


@dataclass(frozen=True)
class Cost:
    """What a model costs. `gmacs_720p` in 10^9 multiply-adds; speed in 10^6 output pixels a second."""

    num_parameters: int
    gmacs_720p: float
    megapixels_per_second: float


def count_macs(model: SrModel, output: tuple[int, int] = OUTPUT_720P) -> float:
    """Multiply-adds for one `output` (height, width), from an LR of that size over scale, rounded up.

    Counted are convolutions, transposed convolutions and linear layers, as the papers do. Not counted are
    biases, activations, normalisation, interpolation and attention's products of two activations. Counted
    on a 64x64 LR and scaled by area: exact for convolutions; what a network adds when it pads an image to
    a multiple of its window is left out.
    """
    macs = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        macs += _layer_macs(layer, inputs[0], output)

    handles = [layer.register_forward_hook(add) for layer in model.modules()]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, model.spec.channels, COUNTED_INPUT, COUNTED_INPUT))
    finally:
        for handle in handles:
            handle.remove()
    height, width = (math.ceil(side / model.spec.scale) for side in output)
    return macs * height * width / COUNTED_INPUT**2


def _layer_macs(layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Multiply-adds of one call of `layer`; 0 for what is not counted."""
    match layer:
        case nn.Conv2d():
            return output.numel() * (layer.in_channels // layer.groups) * math.prod(layer.kernel_size)
        case nn.ConvTranspose2d():
            return inputs.numel() * (layer.out_channels // layer.groups) * math.prod(layer.kernel_size)
        case nn.Linear():
            return output.numel() * layer.in_features
        case _:
            return 0


def measure_speed(upscale: Upscale) -> float:
    """Output megapixels a second: the median of a few runs on one 256x256 LR, after one to warm up."""
    shape = SPEED_INPUT, SPEED_INPUT, 3
    lr = Image(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    sr = upscale(lr)
    seconds: list[float] = []
    least, most = SPEED_SECONDS
    while (len(seconds) < SPEED_RUNS or sum(seconds) < least) and sum(seconds) < most:
        start = time.perf_counter()
        upscale(lr)
        seconds.append(time.perf_counter() - start)
    return sr.height * sr.width / 1e6 / statistics.median(seconds)


# ---------------------------------------------------------------- crops to look at

CROP_SIZE, CROP_STEP = 64, 4
"""Height and width of a crop, and the grid it is searched on, in HR pixels."""
CROPS_PER_ROUND = 4


@dataclass(frozen=True)
class Panel:
    """One version of a crop: (h, w, 3) uint8, and the luma PSNR of the crop; None for HR."""

    label: str
    pixels: Pixels
    psnr_y: float | None


@dataclass(frozen=True)
class Crop:
    """The same place in every version of one image. `contrast`: how much the models differ there."""

    image: str
    top: int
    left: int
    contrast: float
    panels: tuple[Panel, ...]


def most_different_crop(outputs: Mapping[str, Pixels], pair: Pair, *, border: int) -> Crop:
    """The place where the squared luma errors of `outputs`, name to (H, W, 3), are furthest apart.

    Bicubic is left out of the search, not of the crop, when two others can be compared.
    """
    hr = pair.hr.rgb8().pixels
    searched = [sr for name, sr in outputs.items() if name != BICUBIC]
    errors = [(luma(sr) - luma(hr)) ** 2 for sr in (searched if len(searched) > 1 else outputs.values())]
    spread = np.max(errors, axis=0) - (np.min(errors, axis=0) if len(errors) > 1 else 0)
    size = min(CROP_SIZE, *(side - 2 * border for side in hr.shape[:2]))
    top, left, contrast = _largest_box(spread, size=size, border=border)
    box = slice(top, top + size), slice(left, left + size)
    panels = [Panel(name, sr[box], psnr_y(sr[box], hr[box], 0)) for name, sr in outputs.items()]
    return Crop(pair.name, top, left, contrast, (*panels, Panel("HR", hr[box], None)))


def _largest_box(plane: Plane, *, size: int, border: int) -> tuple[int, int, float]:
    """Top, left and sum of the `size` x `size` box with the largest sum, on a grid inside the border."""
    sums = np.pad(plane.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    boxes = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    height, width = boxes.shape
    grid = boxes[border : height - border : CROP_STEP, border : width - border : CROP_STEP]
    row, column = np.unravel_index(int(grid.argmax()), grid.shape)
    return border + int(row) * CROP_STEP, border + int(column) * CROP_STEP, float(grid[row, column])


# ---------------------------------------------------------------- the evaluation


@dataclass(frozen=True)
class Contestant:
    """A model that takes part: how it upscales RGB, and what that costs."""

    name: str
    upscale: Upscale
    cost: Cost


@dataclass(frozen=True)
class Round:
    """One benchmark at one scale, and the models that take part beside bicubic."""

    benchmark: Benchmark
    scale: int
    models: tuple[str, ...]

    @property
    def reference(self) -> str:
        """Whom the others are compared with: the first model, bicubic when there is no other."""
        return self.models[0] if self.models else BICUBIC

    @property
    def num_images(self) -> int:
        """Images of the benchmark."""
        return len(self.benchmark.hr_keys)


@dataclass(frozen=True)
class Result:
    """One contestant in one round. `vs_first` is None for the reference, and see `paired_bootstrap`."""

    contestant: Contestant
    scores: list[Score]
    vs_first: Interval | None

    @property
    def psnr_y(self) -> float:
        """Mean over the images, in dB."""
        return statistics.fmean(score.psnr_y for score in self.scores)

    @property
    def ssim_y(self) -> float:
        """Mean over the images."""
        return statistics.fmean(score.ssim_y for score in self.scores)


@dataclass(frozen=True)
class RoundResult:
    """Results of a round, bicubic first, and the crops where its models differ most."""

    round: Round
    results: list[Result]
    crops: list[Crop]

    def of(self, name: str) -> Result:
        """The result of the contestant with this name."""
        return next(result for result in self.results if result.contestant.name == name)


def evaluate(config: EvaluateConfig) -> list[RoundResult]:
    """Measure every model on every benchmark: one result for each benchmark and scale.

    Refuses what can be refused before a network runs: RequestError for models that do not fit, DataError
    for benchmarks whose files do not match.
    """
    places = zip(config.benchmark, benchmark_names(config.benchmark), strict=True)
    benchmarks = [open_benchmark(uri, name, config.store) for uri, name in places]
    models = load_models(config.model, config.store)
    rounds = plan_rounds(benchmarks, {name: model.spec.scale for name, model in models.items()})
    contestants = enter_all(models, rounds, precision=config.precision)
    num_outputs = sum(each.num_images * (1 + len(each.models)) for each in rounds)
    with progress_bar(num_outputs, unit="image") as bar:
        return [
            run_round(
                each,
                [contestants[name, each.scale] for name in (BICUBIC, *each.models)],
                seed=config.seed,
                bar=bar,
            )
            for each in rounds
        ]


def load_models(references: Sequence[str], config: StoreConfig) -> dict[str, SrModel]:
    """Models, folded, by name: that of their card, or the reference itself where two cards have one name.

    Raises RequestError for a reference given twice.
    """
    wanted = [reference for reference in references if reference != BICUBIC]
    for reference in wanted:
        if wanted.count(reference) > 1:
            raise RequestError(f"model {reference} is given twice; leave one out")
    loaded = [load_model(reference, config) for reference in wanted]
    card_names = [each.card.name for each in loaded]
    names = [
        reference if name == BICUBIC or card_names.count(name) > 1 else name
        for reference, name in zip(wanted, card_names, strict=True)
    ]
    return {name: fold(each.model) for name, each in zip(names, loaded, strict=True)}


def plan_rounds(benchmarks: Sequence[Benchmark], scales: Mapping[str, int]) -> list[Round]:
    """Who is measured on what: `scales` are those of the models, by name.

    Raises RequestError for a model of another scale than a benchmark's LR, naming both, and when neither
    a model nor LR says at which scale bicubic is to be measured.
    """
    if not scales and any(benchmark.scale is None for benchmark in benchmarks):
        raise RequestError(
            "bicubic alone has no scale of its own: give a model, or a benchmark with LR/ beside HR/"
        )
    for benchmark in benchmarks:
        for name, scale in scales.items():
            if benchmark.scale not in (None, scale):
                raise RequestError(
                    f"model {name} has scale {scale}, but LR of benchmark {benchmark.store.uri} has scale "
                    f"{benchmark.scale}; leave one of them out, or give a benchmark without LR/"
                )
    return [
        Round(benchmark, scale, tuple(name for name in scales if scales[name] == scale))
        for benchmark in benchmarks
        for scale in ([benchmark.scale] if benchmark.scale else sorted(set(scales.values())))
    ]


def enter_all(
    models: Mapping[str, SrModel], rounds: Sequence[Round], *, precision: Precision
) -> dict[tuple[str, int], Contestant]:
    """A contestant for each model, and bicubic for each scale, by name and scale. Measures their cost."""
    entries: list[tuple[str, SrModel, Precision]] = [
        (BICUBIC, build_model(BicubicSpec(scale=scale)), "float32")
        for scale in sorted({each.scale for each in rounds})
    ]
    entries += [(name, model, precision) for name, model in models.items()]
    return {(name, model.spec.scale): enter(name, model, precision=kind) for name, model, kind in entries}


def enter(name: str, model: SrModel, *, precision: Precision) -> Contestant:
    """`model` on the fastest device of this machine, and what it costs there."""
    upscale = upscaling(model, device=device_name(), precision=precision)
    cost = Cost(num_parameters(model), count_macs(model) / 1e9, measure_speed(upscale))
    return Contestant(name, upscale, cost)


def upscaling(model: SrModel, *, device: str, precision: Precision = "float32") -> Upscale:
    """How `model` upscales RGB: a network for grey images is given luma, and measured on luma alone."""
    upscale = Upscaler(Engine(model, device=device, precision=precision)).upscale
    return upscale if model.spec.channels == 3 else _on_grey(upscale)


def _on_grey(upscale: Upscale) -> Upscale:
    def upscale_grey(image: Image) -> Image:
        full_range = (luma(image.rgb8().pixels) - 16) * 255 / 219
        return upscale(Image(full_range.round().astype(np.uint8)[:, :, None]))

    return upscale_grey


def device_name() -> str:
    """Where models are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_round(
    planned: Round, contestants: Sequence[Contestant], *, seed: int, bar: "tqdm[None]"
) -> RoundResult:
    """Run every contestant on every image, one image in memory at a time."""
    scores: dict[str, list[Score]] = {each.name: [] for each in contestants}
    crops: list[Crop] = []
    for pair in planned.benchmark.pairs(planned.scale):
        outputs: dict[str, Pixels] = {}
        for each in contestants:
            bar.set_description(f"{planned.benchmark.name} x{planned.scale} {each.name}")
            sr = each.upscale(pair.lr).rgb8()
            outputs[each.name] = sr.pixels
            scores[each.name].append(score(sr, pair, planned.scale))
            bar.update()
        crops.append(most_different_crop(outputs, pair, border=planned.scale))
        crops = sorted(crops, key=lambda crop: -crop.contrast)[:CROPS_PER_ROUND]
    results = [_result(each, scores, planned.reference, seed=seed) for each in contestants]
    return RoundResult(planned, results, crops)


def _result(
    contestant: Contestant, scores: Mapping[str, list[Score]], reference: str, *, seed: int
) -> Result:
    own = scores[contestant.name]
    if contestant.name == reference:
        return Result(contestant, own, None)
    differences = psnr_differences(own, scores[reference])
    return Result(contestant, own, paired_bootstrap(differences, seed=seed))
