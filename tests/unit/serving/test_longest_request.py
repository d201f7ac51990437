"""What is around the application gives every request the time that the application itself gives it."""

import pytest

from cluster import serve
from kdsr.config import ServeConfig

LIMITS = {"max_body_bytes": 1000, "body_seconds": 30, "timeout_seconds": 60}


@pytest.fixture(params=[None, 500, 32_000], ids=["no jobs", "small uploads", "large uploads"])
def config(request):
    """With the largest upload in bytes."""
    jobs = request.param and {"records": "file:///records", "max_upload_bytes": request.param}
    fields = {"auth": "none", "limits": LIMITS, "jobs": jobs, "cluster": {"cpus_per_worker": 1}}
    return ServeConfig.model_validate(fields)


def longest(config):
    """Seconds: an upload may come as slowly as the body of a plain request, and is answered after that."""
    return (30 * 32 if config.jobs and config.jobs.max_upload_bytes == 32_000 else 30) + 60


def test_the_proxies_wait_for_the_longest_upload(config):
    assert longest(config) < serve.http_options(config).request_timeout_s < longest(config) + 60


@pytest.mark.parametrize(("entrances", "reader"), [(1, "Entrance"), (0, "Replica"), (None, "Replica")])
def test_what_reads_requests_waits_for_it_too_before_it_ends(config, entrances, reader):
    deployment = serve.app(config.model_copy(update={"entrances": entrances}))._bound_deployment
    assert deployment.name == reader
    assert deployment._deployment_config.graceful_shutdown_timeout_s > longest(config)
