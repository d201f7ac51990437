"""What the rows of a comparison come to: means, spreads, and gains over a reference with intervals.

Arithmetic on scores; trains, measures and draws nothing.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdsr.compare import ImageScore, Row
from kdsr.errors import DataError
from kdsr.evaluate import Interval

MEAN = "mean"
"""Name of the row for the mean over all benchmarks."""
NUM_RESAMPLES = 10_000

Table = NDArray[np.float64]
"""(seeds, images): a number for each image that each of several runs made."""


@dataclass(frozen=True)
class Summary:
    """One student and method on one benchmark, or in the mean over all of them."""

    student: str
    method: str
    benchmark: str
    num_seeds: int
    psnr_y: float
    """Mean over seeds of the mean over images, in dB."""
    ssim_y: float
    spread: float | None
    """Standard deviation of `psnr_y` over the seeds; None for one."""
    gain: Interval | None
    """Over the reference, seeds and images in pairs; None for the reference itself, and without pairs."""


def summarise(
    rows: Sequence[Row], *, reference: str, benchmarks: Sequence[str], seed: int = 0
) -> list[Summary]:
    """A summary for each student, method and benchmark that has rows, then for the mean over benchmarks.

    Rows of failed cells, and of cells that were not measured on all `benchmarks`, are left out.
    """
    usable = [row for row in rows if not row.cause and set(benchmarks) <= row.benchmarks.keys()]
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in usable:
        groups.setdefault((row.student, row.method), {})[row.seed] = row
    found = []
    for (student, method), own in groups.items():
        other = {} if method == reference else groups.get((student, reference), {})
        names = [(name, (name,)) for name in benchmarks] + [(MEAN, tuple(benchmarks))]
        for name, members in names:
            found.append(_summary(name, own, gain(own, other, members, seed=seed), members))
    return found


def _summary(name: str, own: Mapping[int, Row], gained: Interval | None, members: Sequence[str]) -> Summary:
    some = next(iter(own.values()))
    psnr = [_mean([_psnr(row, member).mean() for member in members]) for row in own.values()]
    ssim = [_mean([_ssim(row, member).mean() for member in members]) for row in own.values()]
    return Summary(
        student=some.student,
        method=some.method,
        benchmark=name,
        num_seeds=len(own),
        psnr_y=_mean(psnr),
        ssim_y=_mean(ssim),
        spread=statistics.stdev(psnr) if len(psnr) > 1 else None,
        gain=gained,
    )


def gain(
    own: Mapping[int, Row], other: Mapping[int, Row], benchmarks: Sequence[str], *, seed: int
) -> Interval | None:
    """PSNR of `own` minus that of `other`, rows by seed, with a 95 % interval: see `bootstrap`."""
    shared = sorted(own.keys() & other.keys())
    if not shared:
        return None
    tables = [
        np.stack([_differences(own[each], other[each], name) for each in shared]) for name in benchmarks
    ]
    return bootstrap(tables, seed=seed)


def bootstrap(tables: Sequence[Table], *, seed: int, num_resamples: int = NUM_RESAMPLES) -> Interval | None:
    """Mean over `tables` of the means of their paired differences, and its 95 % percentile interval.

    Seeds and images are drawn with replacement together (Efron, 1979): the same seeds in every table, since
    the same runs were measured, and images in each table for itself. With few seeds an interval can only say
    what those few do. None when nothing can be drawn, or when an exact copy makes a difference infinite.
    """
    if all(table.size < 2 for table in tables) or not all(np.isfinite(table).all() for table in tables):
        return None
    random = np.random.default_rng(seed)
    seeds = _multiplicities(random, tables[0].shape[0], num_resamples)
    drawn = np.zeros(num_resamples)
    for table in tables:
        images = _multiplicities(random, table.shape[1], num_resamples)
        drawn += ((seeds @ table) * images).sum(axis=1) / len(tables)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(_mean([table.mean() for table in tables]), float(low), float(high))


def _differences(own: Row, other: Row, benchmark: str) -> Table:
    """Per image, in dB. Raises DataError for a benchmark that changed between the two."""
    if own.benchmarks[benchmark].images.keys() != other.benchmarks[benchmark].images.keys():
        raise DataError(
            f"{own.method} and {other.method} of {own.student} were measured on other images of {benchmark}; "
            f"delete the older row.json to measure again"
        )
    pairs = zip(_scores(own, benchmark), _scores(other, benchmark), strict=True)
    return np.array([0.0 if a == b else a.decibels - b.decibels for a, b in pairs])


def _multiplicities(random: np.random.Generator, count: int, num_resamples: int) -> Table:
    """(num_resamples, count): how often each of `count` is drawn in `count` draws, as a share."""
    return random.multinomial(count, np.full(count, 1 / count), num_resamples) / count


def _psnr(row: Row, benchmark: str) -> Table:
    return np.array([score.decibels for score in _scores(row, benchmark)])


def _ssim(row: Row, benchmark: str) -> Table:
    return np.array([score.ssim_y for score in _scores(row, benchmark)])


def _scores(row: Row, benchmark: str) -> list[ImageScore]:
    """By the names of the images."""
    return [score for _, score in sorted(row.benchmarks[benchmark].images.items())]


def _mean(values: Sequence[float]) -> float:
    return float(statistics.fmean(values))


# ---------------------------------------------------------------- curves


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]], name: str) -> tuple[Table, Table]:
    """Steps (n,) at which every run logged `name`, and its values (runs, n)."""
    logged = [{row["step"]: row[name] for row in curve if name in row} for curve in curves]
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    values = [[run[step] for step in steps] for run in logged]
    return np.array(steps, np.float64), np.array(values, np.float64).reshape(len(logged), len(steps))


def steps_to_reach(curve: tuple[Table, Table], level: float) -> int | None:
    """The first step at which the mean over the runs is at `level`; None when it never is."""
    steps, values = curve
    reached = steps[values.mean(axis=0) >= level] if steps.size else steps
    return int(reached[0]) if reached.size else None
