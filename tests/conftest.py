"""What tests share: a real S3 server, a local Ray cluster, and a marker for each folder."""

import os
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Tests share the cores: threads that spin while they wait for each other would take them all. For the
# processes that tests start, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

from infra.local_s3.serve import LocalS3, local_s3  # noqa: E402
from kdsr.store import Store, open_store  # noqa: E402

BUCKET = "kdsr-tests"
FOLDERS = {"unit", "ray", "s3", "e2e"}
SHARES = {"e2e": "jobs", "faults": "jobs", "ray": "clusters", "s3": "clusters"}

# No proxy stands between this machine and itself.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"
# Ray's workers are very polite to the other tests, and would starve beside them.
os.environ.setdefault("RAY_worker_niceness", "0")

# For fixtures of modules and sessions.
torch.set_num_threads(1)

# A machine that runs other things as well must not fail a test for being slow.
settings.register_profile("kdsr", deadline=None)
settings.load_profile("kdsr")


@pytest.hookimpl(tryfirst=True)  # Before the one that reads the groups.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the name of its folder below tests/.

    What starts Ray, servers and jobs mostly waits. Of several processes that share the tests one has those
    with a cluster of the tests' own, and one has the rest, so that no more than two run at once.
    """
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in FOLDERS:
            item.add_marker(folder)
        if folder in SHARES:
            item.add_marker(pytest.mark.xdist_group(SHARES[folder]))


@pytest.fixture(autouse=True)
def repeatable() -> None:
    """What a test draws without a seed of its own does not depend on the tests before it.

    Nor does what it computes: results of several threads may differ in the last bit.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[LocalS3]:
    """A SeaweedFS that is gone at the end; AWS_* lead to it, and to nothing else, from now on."""
    with local_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # Whoever runs the tests may have credentials for a real bucket.
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture
def s3_uri(s3_server: LocalS3) -> str:
    """An `s3://` prefix that nothing is below."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "file":
        return open_store(f"file://{tmp_path}/root")
    return open_store(request.getfixturevalue("s3_uri"))


@pytest.fixture(scope="session")
def ray_local(s3_server: LocalS3) -> Iterator[None]:
    """A Ray cluster of this process's own; its workers reach the S3 server as well."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", "/tmp")  # Its sockets need a short path.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
        _start_ray()
        yield
        ray.shutdown()


def _start_ray() -> None:
    """Ray waits 30 seconds for its own node and no longer, which a machine that does much else may take."""
    import ray

    for tries_left in (2, 1, 0):
        try:
            ray.init(
                address="local",
                num_cpus=4,
                num_gpus=0,
                object_store_memory=200_000_000,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="warning",
            )
            return
        except Exception as error:
            if not tries_left or "timed out" not in str(error):
                raise
            ray.shutdown()
