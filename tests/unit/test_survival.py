"""Whatever ends a run in the middle, the same config brings it to the same end, to the last bit."""

import itertools
import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.train import _require_progress
from kdsr import training
from kdsr.checkpoint import StateStore
from kdsr.errors import CheckpointCorrupt, KdsrError, StoreError
from kdsr.training import Worker, last_save, run_store, saved_step, train
from tests.dying import Dying
from tests.whole_runs import config_of, history, make_places, outcome


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("survival"), heldout=True)


def config_for(places, output, **fields):
    """A run of seven steps."""
    given = {"num_steps": 7, "batch_size": 2, "save_every_steps": 2, "validate_every_steps": 3}
    return config_of(places, output, **{**given, "num_validation_images": 1, **fields})


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """What a run comes to that nothing disturbs."""
    config = config_for(places, tmp_path_factory.mktemp("whole"))
    list(train(config))
    assert [row["step"] for row in history(config)] == list(range(1, 8))
    assert {"critic", "output_l1", "loss"} <= history(config)[0].keys()
    return outcome(config)


def run_until_it_dies(config, *, writes):
    """Whether the run came to its end before its process was killed at a write."""
    store = Dying(run_store(config), after=writes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_store", lambda _: store)
        with suppress(StoreError):
            torch.manual_seed(writes)  # what a process has drawn before must not matter
            list(train(config))
            return True
    return False


def test_a_run_that_dies_at_each_of_its_writes_comes_to_the_same(places, whole, tmp_path):
    config = config_for(places, tmp_path)
    reached, writes = [], 0
    while not run_until_it_dies(config, writes=writes):
        reached.append(saved_step(config))
        writes += 1
    assert reached == sorted(reached) and writes > 8
    assert outcome(config) == whole


@settings(max_examples=6)
@given(deaths=st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_the_history_is_complete_after_any_number_of_deaths(places, whole, tmp_path_factory, deaths):
    config = config_for(places, tmp_path_factory.mktemp("deaths"))
    for writes in deaths:
        run_until_it_dies(config, writes=writes)
    list(train(config))
    assert outcome(config) == whole


@pytest.mark.parametrize("left_after", [1, 3, 4, 6])
def test_who_is_told_to_leave_saves_once_at_that_step_and_the_run_goes_on_from_there(
    places, whole, tmp_path, left_after
):
    config = config_for(places, tmp_path)
    steps = itertools.count(1)
    told = list(train(config, Worker(is_told_to_leave=lambda: next(steps) >= left_after)))
    assert [progress.step for progress in told] == list(range(1, left_after + 1))
    states = StateStore(run_store(config))
    assert states.step("latest") == left_after
    assert states.step("previous") in {None, *range(left_after)}
    # Every second step, the first that was validated, and once where it left.
    saved = {step for step in (2, 3, 4, 6) if step <= left_after} | {left_after}
    assert sum(len(progress.saves) for progress in told) == len(saved)
    assert not run_store(config).exists("model/card.json")
    list(train(config))
    assert outcome(config) == whole


def test_who_leaves_between_two_rows_of_the_history_takes_the_half_row_along(places, tmp_path):
    """A row is a mean over steps, some of which another process may have taken."""
    fields = {"log_every_steps": 3, "validate_every_steps": 7}
    undisturbed = config_for(places, tmp_path / "whole", **fields)
    list(train(undisturbed))
    config = config_for(places, tmp_path, **fields)
    for left_after in (1, 5):
        steps = iter(range(saved_step(config) + 1, 8))
        list(train(config, Worker(is_told_to_leave=lambda: next(steps) >= left_after)))  # noqa: B023
        assert saved_step(config) == left_after
    list(train(config))
    assert outcome(config) == outcome(undisturbed)
    assert [row["step"] for row in history(config)] == [3, 6, 7]


def test_a_run_goes_on_from_the_state_before_when_its_last_one_is_damaged(places, whole, tmp_path, caplog):
    config = config_for(places, tmp_path)
    list(train(config, Worker(is_told_to_leave=lambda: saved_step(config) >= 4)))
    store = run_store(config)
    key = json.loads(store.get("checkpoints/latest.json"))["key"]
    store.put(key, store.get(key)[:-100])
    list(train(config))
    assert any("expected sha256" in message and "Taken instead" in message for message in caplog.messages)
    assert outcome(config) == whole


@pytest.mark.parametrize("again", [1, 2])
def test_workers_that_leave_before_a_damaged_step_or_at_it_have_taken_a_step(places, tmp_path, capsys, again):
    """The one at that step is made again to the last bit."""
    config = config_for(places, tmp_path, num_validation_images=0, save_every_steps=100)

    def leave_after(count):
        steps = itertools.count(1)
        list(train(config, Worker(is_told_to_leave=lambda: next(steps) >= count)))

    leave_after(2)
    leave_after(2)
    store, damaged_key = run_store(config), StateStore(run_store(config)).entry("latest").key
    store.put(damaged_key, store.get(damaged_key)[:-100])
    damaged = last_save(config)
    with pytest.raises(KdsrError, match="left at step 4 without taking a step"):
        _require_progress(config, since=damaged)
    leave_after(again)
    assert saved_step(config) == 2 + again
    _require_progress(config, since=damaged)
    assert f"saved step {2 + again}; going on" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_leaves_them_alone(places, tmp_path):
    config = config_for(places, tmp_path)
    list(train(config, Worker(is_told_to_leave=lambda: saved_step(config) >= 4)))
    store = run_store(config)
    keys = [info.key for info in store.list("checkpoints/") if info.key.endswith(".pt")]
    for key in keys:
        store.put(key, b"")
    with pytest.raises(CheckpointCorrupt, match="No checkpoint is left to go on from"):
        list(train(config))
    assert [store.get(key) for key in keys] == [b""] * len(keys) and len(history(config)) >= 4


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_reason(places, tmp_path):
    """Training goes on beside the write, but not for long without one."""
    config = config_for(places, tmp_path, num_steps=50, num_validation_images=0)
    store = Dying(run_store(config), after=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "run_store", lambda _: store)
        with pytest.raises(StoreError, match=r"died before it could write metrics\.jsonl"):
            list(train(config))
    assert saved_step(config) == 0
