"""Two starts of one comparison, or of one search, do not overlap: the second is refused before it runs."""

import os

import pytest

from cluster.compare import compare
from cluster.tune import tune
from kdsr import lease
from kdsr.errors import RequestError
from kdsr.store import open_store
from tests.unit import test_compare, test_tune


@pytest.mark.parametrize(
    ("start", "config_of", "what"),
    [(compare, test_compare.config_of, "comparison"), (tune, test_tune.config_of, "search")],
    ids=["comparison", "search"],
)
def test_a_second_start_is_refused_by_name(tmp_path, start, config_of, what):
    config = config_of(tmp_path)
    output = open_store(config.output)
    words = rf"the {what} in .*/out is worked on by process {os.getpid()} on .*; stop that first"
    with lease.held(output, what="the first"), pytest.raises(RequestError, match=words):
        start(config)
    # Without the first it comes to what it needs, which is not there.
    with pytest.raises(RequestError, match=r"no images in .*bench|shards is empty"):
        start(config)
    assert list(output.list()) == []
