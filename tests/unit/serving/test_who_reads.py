"""Who reads requests: the replica itself where it is alone, entrances in front where there are several."""

import pytest
from pydantic import ValidationError

from cluster import serve
from kdsr.config import ServeConfig


def config(**fields):
    return ServeConfig.model_validate({"auth": "none", **fields})


def workers(number):
    return {"cluster": {"num_workers": number, "cpus_per_worker": 1}}


@pytest.mark.parametrize(
    ("given", "number", "expected"),
    [(None, 1, 0), (None, [1, 1], 0), (None, 2, 1), (None, [1, 4], 1), (1, 1, 1), (3, [1, 4], 3), (0, 1, 0)],
)
def test_one_replica_reads_its_requests_itself_unless_told_otherwise(given, number, expected):
    assert config(entrances=given, **workers(number)).num_entrances == expected


@pytest.mark.parametrize("number", [2, [1, 4]])
def test_several_replicas_need_somebody_in_front(number):
    with pytest.raises(ValidationError, match="entrances: 0 is for one replica.* set entrances to 1 or more"):
        config(entrances=0, **workers(number))


@pytest.mark.parametrize("entrances", [0, 1])
@pytest.mark.parametrize("jobs", [None, {"records": "file:///records"}], ids=["no jobs", "jobs"])
def test_what_is_deployed(entrances, jobs):
    """Names matter: `serve deploy` gives models to the deployment Replica."""
    application = serve.app(config(entrances=entrances, jobs=jobs, **workers(1)))
    below = [
        argument._bound_deployment.name
        for argument in application._bound_deployment.init_args
        if hasattr(argument, "_bound_deployment")
    ]
    assert application._bound_deployment.name == ("Replica" if entrances == 0 else "Entrance")
    assert below == ([] if entrances == 0 else ["Replica"]) + (["Jobs"] if jobs else [])
    assert application._bound_deployment._deployment_config.max_queued_requests == serve.MOST_REQUESTS
