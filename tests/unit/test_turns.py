"""Whose work is next: claims as properties over any order of putting and taking."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr.errors import Abandoned
from kdsr.turns import Claim, Turns

JOBS = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), min_size=1, max_size=6)


def filled(jobs):
    """Turns with one claim for each job, whose items are (job, number) of the given kinds."""
    turns, claims = Turns(), [Claim() for _ in jobs]
    for number, (claim, kinds) in enumerate(zip(claims, jobs, strict=True)):
        turns.put(claim, ((kind, (number, place)) for place, kind in enumerate(kinds)))
    return turns, claims


def taken_all(turns, most):
    batches = []
    while len(turns):
        items, dropped = turns.take(most=lambda _: most)
        assert dropped == []
        batches.append(items)
    return batches


@given(JOBS, st.integers(1, 5))
def test_every_item_is_taken_once_and_only_with_its_kind(jobs, most):
    turns, _ = filled(jobs)
    batches = taken_all(turns, most)
    items = [item for batch in batches for item in batch]
    assert sorted(items) == [(job, place) for job, kinds in enumerate(jobs) for place in range(len(kinds))]
    for batch in batches:
        assert 1 <= len(batch) <= most
        assert len({jobs[job][place] for job, place in batch}) == 1


@given(JOBS)
def test_nobody_waits_for_more_than_one_item_of_each_other(jobs):
    turns, _ = filled(jobs)
    order = [job for [(job, _)] in taken_all(turns, 1)]
    left = [len(kinds) for kinds in jobs]
    since = dict.fromkeys(range(len(jobs)), 0)
    for job in order:
        for other in since:
            since[other] += left[other] > 0
        assert since[job] <= len(jobs)
        since[job], left[job] = 0, left[job] - 1


@given(st.integers(1, 200), st.integers(1, 4))
def test_a_small_job_beside_a_huge_one_is_done_after_twice_its_own_items(huge, small):
    turns, _ = filled([["a"] * huge, ["b"] * small])
    order = [job for [(job, _)] in taken_all(turns, 1)]
    assert max(place for place, job in enumerate(order) if job == 1) <= 2 * small


@given(JOBS, st.integers(1, 5))
def test_one_claim_of_several_jobs_is_served_in_the_order_of_arrival_of_each_kind(jobs, most):
    turns, claim = Turns(), Claim()
    arrived = [(kind, (job, place)) for job, kinds in enumerate(jobs) for place, kind in enumerate(kinds)]
    turns.put(claim, arrived)
    taken = [item for batch in taken_all(turns, most) for item in batch]
    for wanted in "abc":
        expected = [item for kind, item in arrived if kind == wanted]
        assert [item for item in taken if jobs[item[0]][item[1]] == wanted] == expected


@given(JOBS, st.data())
def test_what_is_withdrawn_is_dropped_at_once_and_costs_nothing_more(jobs, data):
    turns, claims = filled(jobs)
    over = data.draw(st.sets(st.sampled_from(range(len(jobs)))))
    for job in over:
        claims[job].withdraw()
    _, dropped = turns.take(most=lambda _: 1)
    assert sorted(dropped) == [(job, place) for job in sorted(over) for place in range(len(jobs[job]))]
    assert all(job not in over for batch in taken_all(turns, 3) for job, _ in batch)


def test_a_batch_is_filled_from_all_claims_in_turn():
    turns, _ = filled([["a"] * 5, ["a"] * 2, ["b"], ["a"]])
    items, _ = turns.take(most=lambda _: 6)
    assert items == [(0, 0), (1, 0), (3, 0), (0, 1), (1, 1), (0, 2)]
    # The one that gave nothing is next.
    assert turns.take(most=lambda _: 6)[0] == [(2, 0)]


def test_what_is_past_its_deadline_is_over_and_says_so():
    late, early = Claim(deadline=time.monotonic() - 1), Claim(deadline=time.monotonic() + 3600)
    assert late.is_over and not early.is_over and not Claim().is_over
    early.require()
    with pytest.raises(Abandoned, match="deadline"):
        late.require()
    early.withdraw()
    with pytest.raises(Abandoned, match="left"):
        early.require()
