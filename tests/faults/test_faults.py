"""A few trials of bench/faults.py: whole jobs that are hit while they run. `lab` runs one undisturbed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.faults import SHARE, Lab, Trial, end_all, run_trial
from infra.local_s3.serve import LocalS3
from infra.local_s3.unreliable import UnreliableS3

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def lab(s3_server: LocalS3) -> Iterator[Lab]:
    # Ray's sockets need a short path.
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="kf-", dir="/tmp") as folder,
    ):
        patch.delenv("RAY_ADDRESS", raising=False)
        yield Lab(s3_server, Path(folder), images=20, quick=True)


def tried(lab: Lab, kind: str, *, store: str, number: int) -> Trial:
    trial, scene = run_trial(lab, number, kind, store=store, seed=0)
    # Ray's agents look for their dead node for a minute; bench/faults.py waits for that.
    for _, family in scene.killed:
        end_all(family)
    return trial


def test_a_killed_driver_leaves_nothing_behind_and_the_same_command_ends_the_run(lab: Lab):
    trial = tried(lab, "driver", store="file", number=1)
    assert trial.wrong == []
    assert trial.exits[0] == -9
    assert trial.results == 18


def test_a_job_whose_actor_is_killed_over_a_store_that_fails_ends_well_by_itself(
    lab: Lab, s3_server: LocalS3
):
    with UnreliableS3(s3_server.endpoint_url, share=SHARE, seed=0, stall_seconds=1) as proxy:
        lab.environment = {"AWS_ENDPOINT_URL": proxy.endpoint_url}
        trial = tried(lab, "actor", store="s3", number=2)
    assert trial.wrong == []
    assert trial.finished_itself
    assert trial.exits == [0]
    assert trial.results == 18
    assert proxy.counts.total() > 0
