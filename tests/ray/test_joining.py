"""What a person reads whose cluster cannot be joined, and what a run does whose cluster is in use."""

import re
import socket

import pytest
import ray

from cluster import session
from cluster.capacity import Need
from kdsr.config import ClusterConfig
from kdsr.errors import KdsrError, RequestError
from tests.waiting import wait_for


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (
            "Version mismatch: The cluster was started with: Ray: 2.59.0",
            r"runs other versions .* 2\.59\.0; use",
        ),
        ("Failed to connect to Ray cluster", "did not take this process.*RAY_AUTH_TOKEN_PATH"),
    ],
)
def test_a_cluster_that_takes_no_one_is_told_with_what_to_do(reason: str, said: str) -> None:
    assert re.search(said, session.why_not_joined("head:6379", reason))


def test_where_no_one_listens_is_told_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(RequestError, match=f"no Ray cluster answers at {address}: .*; start it"):
            session.require_answer(address)


@pytest.mark.parametrize(
    ("raised", "told", "said"),
    [
        ("The current node timed out during startup.", KdsrError, "did not come up on .* same command again"),
        ("anything else", ValueError, "anything else"),
    ],
)
def test_a_machine_too_busy_for_ray_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch, raised: str, told: type[Exception], said: str
) -> None:
    def init(**_: object) -> None:
        raise Exception(raised) if told is KdsrError else ValueError(raised)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(told, match=said):
        session.connect(ClusterConfig())


def test_a_run_waits_for_others_and_says_so(
    ray_local: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "QUIET_SECONDS", 1)
    monkeypatch.setattr(session, "TELL_SECONDS", 1)

    @ray.remote(num_cpus=3)
    class Other:
        def ready(self) -> None:
            pass

    other = Other.remote()
    ray.get(other.ready.remote())
    config = ClusterConfig(num_workers=2, cpus_per_worker=1)
    words = []

    def tell(need: Need) -> str:
        words.append(why(need))
        ray.kill(other)
        return words[-1]

    why = session.why_waiting
    monkeypatch.setattr(session, "why_waiting", tell)
    wait_for(lambda: session._free_nodes()[0].cpus == 1)  # A node tells the cluster what it has now and then.
    session.await_capacity(config, num_workers=2)
    assert re.fullmatch(
        r"the cluster has 1 node with 4 CPU, \d+ GiB, others use it, and free .* 1 CPU, .*", words[0]
    )
    assert "waiting for 2 workers of 1 CPU" in capsys.readouterr().err
