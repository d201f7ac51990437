"""What bench/soak.py takes for a finding."""

import pytest

from bench.serving.load import Answers
from bench.soak import Memory


def memory(*, minutes, slope):
    """Of a replica that grew by `slope` MB an hour after a jump at the beginning."""
    seen = []
    for second in range(0, int(60 * minutes), 2):
        warm = min(second / (6 * minutes), 1.0)
        seen.append((float(second), {"replica": warm * 500 + slope * second / 3600, "proxy": 100.0}))
    return Memory(server=None, seen=seen)


@pytest.mark.parametrize(
    ("minutes", "slope", "is_leak"),
    [(20, 600, True), (20, 400, False), (20, 0, False), (5, 5000, False), (0.05, 5000, False)],
)
def test_only_what_clearly_grows_is_a_leak(minutes, slope, is_leak):
    assert (memory(minutes=minutes, slope=slope).leak() is not None) == is_leak


def test_a_slope_is_that_of_what_comes_after_the_beginning():
    found = memory(minutes=20, slope=600).slopes()
    assert {part: slope.mb_per_hour for part, slope in found.items()} == pytest.approx(
        {"replica": 600, "proxy": 0, "all": 600}, abs=1e-6
    )
    assert [slope.error for slope in found.values()] == pytest.approx([0, 0, 0], abs=1e-6)


def test_what_goes_up_and_down_from_minute_to_minute_is_no_leak():
    steady = memory(minutes=20, slope=1200)
    rows = [(at, row | {"replica": row["replica"] + 400 * (int(at / 60) % 3)}) for at, row in steady.seen]
    uneven = Memory(server=None, seen=rows)
    slope = uneven.slopes()["all"]
    assert slope.mb_per_hour > 500
    assert slope.error > slope.mb_per_hour / 2
    assert uneven.leak() is None


def test_the_memory_is_drawn():
    assert memory(minutes=3, slope=10).figure().startswith(b"\x89PNG")


def test_a_worker_that_was_lost_is_no_refusal_where_nobody_killed_one():
    answers = Answers({"200": 5, "429": 3, "503": 2, "504": 1}, 1, 1.0, 1.0, None, None, None, None)
    row = answers.row()
    assert (row["answered"], row["refused"], row["failed"]) == (5, 4, 3)
