"""Figures of numbers over steps and of gains: the only file that knows matplotlib.

What is drawn comes as plain arrays. Each function gives the bytes of a PNG.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdsr.evaluate import Interval

Numbers = NDArray[np.float64]

DOTS_PER_INCH = 110
PANEL = (5.2, 3.8)
"""Width and height of a panel in inches."""
COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f3c8d")
"""Told apart with most kinds of colour blindness, after Okabe and Ito (2008)."""
LEAST_DECADE = 1e-5
"""Below it a logarithmic axis goes on evenly, so that zero has a place."""
DASHES = ("-", "--", ":")
"""A second and a third round of colours."""


@dataclass(frozen=True)
class Line:
    """Values (runs, n) of several runs at the same `steps` (n,), drawn as their mean and their range."""

    label: str
    steps: Numbers
    values: Numbers


def curves(
    panels: Mapping[str, Sequence[Line]], *, quantity: str, scale: Literal["linear", "log"] = "linear"
) -> bytes:
    """One panel for each of `panels`, side by side.

    A linear panel shows the upper part of its curves, where they can be told apart. A logarithmic one shows
    all of them, down to zero.
    """
    figure, axes = _panels(len(panels))
    colour_of = _colours([line.label for lines in panels.values() for line in lines])
    for place, (title, lines) in zip(axes, panels.items(), strict=True):
        for line in lines:
            _draw(place, line, **colour_of(line.label))
        place.set_title(title, fontsize=10)
        place.set_xlabel("steps")
        if scale == "log":
            place.set_yscale("symlog", linthresh=LEAST_DECADE)
        place.set_ylim(bottom=0 if scale == "log" else _floor(lines))
    axes[0].set_ylabel(quantity)
    _legend(figure, axes)
    return _png(figure)


def gains(panels: Mapping[str, Mapping[str, Interval]], *, quantity: str) -> bytes:
    """A row for each label with its mean and interval, one panel for each of `panels`, side by side."""
    figure, axes = _panels(len(panels), height=1.0 + 0.32 * max(len(rows) for rows in panels.values()))
    for place, (title, rows) in zip(axes, panels.items(), strict=True):
        for row, each in enumerate(reversed(list(rows.values()))):
            span = [[each.mean - each.low], [each.high - each.mean]]
            colour = COLOURS[3] if each.low > 0 else COLOURS[2] if each.high < 0 else COLOURS[0]
            place.errorbar([each.mean], [row], xerr=span, fmt="o", color=colour, capsize=3, markersize=4)
        place.axvline(0, color="#999999", linewidth=0.8)
        place.set_yticks(range(len(rows)), list(reversed(list(rows))))
        place.set_ylim(-0.6, len(rows) - 0.4)
        place.set_title(title, fontsize=10)
        place.set_xlabel(quantity)
    return _png(figure)


@dataclass(frozen=True)
class Points:
    """What `values` (n,) came of each of `places`: numbers, or names of choices."""

    places: Sequence[float] | Sequence[str]
    values: Sequence[float]
    is_logarithmic: bool = False


def scatter(panels: Mapping[str, Points], *, quantity: str) -> bytes:
    """A point for each value, one panel for each of `panels`, side by side."""
    figure, axes = _panels(len(panels))
    for place, (title, points) in zip(axes, panels.items(), strict=True):
        place.scatter(points.places, points.values, s=18, color=COLOURS[1])
        if points.is_logarithmic:
            place.set_xscale("log")
        place.set_xlabel(title)
    axes[0].set_ylabel(quantity)
    return _png(figure)


def latencies(lines: Sequence[Line], *, load: str, quantity: str, saturation: float) -> bytes:
    """How long answers take over the offered load, up to `saturation`; `steps` of `lines` are loads."""
    figure, (place,) = _panels(1)
    colour_of = _colours([line.label for line in lines])
    for line in lines:
        _draw(place, line, marker=".", **colour_of(line.label))
    place.axvline(saturation, color="#999999", linewidth=0.8, linestyle="--")
    place.set_xlim(left=0)
    place.set_yscale("log")
    place.set_xlabel(load)
    place.set_ylabel(quantity)
    _legend(figure, [place])
    return _png(figure)


def levels(lines: Sequence[Line], *, time: str, quantity: str) -> bytes:
    """What is there over time, from zero upwards; `steps` of `lines` are times."""
    figure, (place,) = _panels(1)
    colour_of = _colours([line.label for line in lines])
    for line in lines:
        _draw(place, line, **colour_of(line.label))
    place.set_ylim(bottom=0)
    place.set_xlabel(time)
    place.set_ylabel(quantity)
    _legend(figure, [place])
    return _png(figure)


def _panels(count: int, *, height: float = PANEL[1]) -> tuple[Any, list[Any]]:
    # Agg needs no display. Nothing global is touched: pyplot would choose a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL[0] * count, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for place in axes:
        place.grid(color="#e5e5e5", linewidth=0.6)
        place.set_axisbelow(True)
        for side in ("top", "right"):
            place.spines[side].set_visible(False)
    return figure, list(axes)


def _draw(place: Any, line: Line, **style: Any) -> None:
    place.plot(line.steps, line.values.mean(axis=0), label=line.label, linewidth=1.4, **style)
    if len(line.values) > 1:
        low, high = line.values.min(axis=0), line.values.max(axis=0)
        place.fill_between(line.steps, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _colours(labels: Sequence[str]) -> Callable[[str], dict[str, Any]]:
    places = {label: number for number, label in enumerate(dict.fromkeys(labels))}

    def style(label: str) -> dict[str, Any]:
        round_number, place = divmod(places[label], len(COLOURS))
        return {"color": COLOURS[place], "linestyle": DASHES[round_number % len(DASHES)]}

    return style


def _floor(lines: Sequence[Line]) -> float | None:
    """Below the middle of how the curves begin, since all of them climb steeply, and below how they end."""
    means = [line.values.mean(axis=0) for line in lines if line.steps.size]
    if not means:
        return None
    early, high = np.median([mean[len(mean) // 8] for mean in means]), max(mean.max() for mean in means)
    low = min(early, *(mean[len(mean) // 2 :].min() for mean in means))
    return float(low - 0.05 * (high - low)) if high > low else None


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    found = {}
    for place in axes:
        handles, labels = place.get_legend_handles_labels()
        found.update(dict(zip(labels, handles, strict=True)))
    if found:
        figure.legend(found.values(), found.keys(), loc="outside right center", frameon=False, fontsize=9)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
