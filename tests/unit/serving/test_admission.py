"""What is under way never costs more than was said, and whoever is sent away is told when to come again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr.serving import admission as admission_module
from kdsr.serving.admission import Admission
from kdsr.serving.problems import Problem


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(admission_module.time, "monotonic", lambda: Clock.now)
    return Clock


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=50))
def test_together_they_never_cost_more_than_the_limit(steps):
    admission, inside = Admission(100), []
    for enters, cost in steps:
        if not enters and inside:
            admission.leave(inside.pop(0), was_done=True)
            continue
        try:
            admission.enter(cost)
        except Problem:
            assert sum(inside) + cost > 100
        else:
            inside.append(cost)
        assert admission.taken == sum(inside) <= 100


def test_one_that_is_larger_than_all_goes_alone():
    admission = Admission(100)
    admission.enter(500)
    with pytest.raises(Problem):
        admission.enter(1)
    admission.leave(500, was_done=True)
    admission.enter(1)


def test_the_time_to_wait_follows_from_the_speed_that_was_measured(clock):
    admission = Admission(100)
    for _ in range(5):
        admission.enter(50)
        clock.now += 5
        admission.leave(50, was_done=True)
        clock.now += 100  # being idle is not being slow
    admission.enter(100)
    with pytest.raises(Problem) as refused:
        admission.enter(30)
    assert refused.value.retry_after == pytest.approx(3, rel=0.1)


def test_what_was_given_up_does_not_count_as_speed(clock):
    admission = Admission(100)
    admission.enter(50)
    clock.now += 1
    admission.leave(50, was_done=False)
    admission.enter(100)
    with pytest.raises(Problem) as refused:
        admission.enter(30)
    assert refused.value.retry_after == 5, "as long as no speed is known"
