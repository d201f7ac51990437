"""Figures are made from plain numbers, without a display."""

import io

import numpy as np
import PIL.Image

from kdsr.plots import Line, _floor, latencies


def picture(saturation: float) -> np.ndarray:
    loads = np.array([1.0, 2.0, 4.0])
    lines = [Line(name, loads, loads[None] * factor) for name, factor in (("p50", 10), ("p99", 40))]
    data = latencies(lines, load="requests a second", quantity="ms", saturation=saturation)
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


def test_latencies_over_load_show_where_saturation_is() -> None:
    near, far = picture(4.5), picture(9.0)
    assert near.shape == far.shape
    assert (near != far).any()


def test_curves_hide_how_all_begin_and_not_how_one_falls() -> None:
    steps = np.arange(16.0)
    climbs, falls = 30 + np.minimum(steps, 8), np.where(steps < 8, 30 + steps, 45 - steps)
    assert _floor([Line("climbs", steps, climbs[None])]) > 31
    both = [Line("climbs", steps, climbs[None]), Line("falls", steps, falls[None])]
    assert _floor(both) < falls[-1]
