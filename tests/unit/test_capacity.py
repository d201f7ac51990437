"""What fits into a cluster is decided node by node, and what does not is answered with what there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.capacity import Need, Node, describe, require, room, scales, share
from kdsr.errors import RequestError

GIB = 2**30
TWO_SMALL = [Node(2, memory_bytes=8 * GIB), Node(2, memory_bytes=8 * GIB)]
HEAD_AND_GPUS = [Node(0), Node(8, 1), Node(8, 1)]
nodes_of_any_size = st.lists(
    st.builds(Node, st.integers(0, 16).map(float), st.integers(0, 2).map(float)), min_size=1, max_size=5
)


def test_a_worker_that_fits_into_the_sum_but_on_no_node_is_refused() -> None:
    with pytest.raises(
        RequestError,
        match=r"cpus_per_worker 4 is more than any one node has.* 2 or less.*"
        r"2 nodes with 2 CPU, 8 GiB each$",
    ):
        require(TWO_SMALL, Need(1, 4))


def test_workers_that_fit_into_the_sum_but_not_onto_the_nodes_are_refused() -> None:
    require([Node(3), Node(3)], Need(2, 2))
    with pytest.raises(RequestError, match=r"num_workers 3 is too many: room is for 2 of 3 workers of 2 CPU"):
        require([Node(3), Node(3)], Need(3, 2))


def test_gpus_on_a_cluster_without_are_refused_with_what_it_has() -> None:
    with pytest.raises(
        RequestError, match=r"use_gpu .* asks for 2 GPU, and there are 0.* 2 nodes with 2 CPU"
    ):
        require(TWO_SMALL, Need(2, 1, gpus=1))


def test_a_gpu_and_the_cpus_of_a_worker_have_to_be_on_one_node() -> None:
    apart = [Node(8), Node(1, 1)]
    assert room(apart, Need(1, 4, gpus=1)) == 0
    with pytest.raises(RequestError, match=r"room is for 0 of 1 worker of 4 CPU and 1 GPU"):
        require(apart, Need(1, 4, gpus=1))


def test_reading_has_to_fit_beside_the_workers() -> None:
    assert room(TWO_SMALL, Need(4, 1)) == 4
    assert room(TWO_SMALL, Need(4, 1, reader_cpus=1)) == 3
    assert room([Node(0.5)], Need(1, 0.1, reader_cpus=1)) == 0


def test_reading_takes_the_node_that_no_worker_wants() -> None:
    assert room([Node(1), *HEAD_AND_GPUS], Need(2, 8, gpus=1, reader_cpus=1)) == 2


@pytest.mark.parametrize(
    ("nodes", "num_workers", "gpus", "reader_cpus", "expected"),
    [
        (TWO_SMALL, 1, 0, 0, 2),
        (TWO_SMALL, 2, 0, 0, 2),
        (TWO_SMALL, 2, 0, 1, 1),
        (TWO_SMALL, 4, 0, 0, 1),
        (TWO_SMALL, 8, 0, 0, 0.5),
        ([Node(3)], 1, 0, 1, 2),
        ([Node(3)], 4, 0, 1, 0.5),
        (HEAD_AND_GPUS, 2, 1, 0, 8),
        (HEAD_AND_GPUS, 2, 1, 1, 7),
        ([Node(2), Node(16)], 3, 0, 0, 5),
    ],
)
def test_a_share_uses_the_nodes_as_well_as_equal_parts_can(
    nodes: list[Node], num_workers: int, gpus: float, reader_cpus: float, expected: float
) -> None:
    assert share(nodes, num_workers=num_workers, gpus=gpus, reader_cpus=reader_cpus) == expected


@given(nodes_of_any_size, st.integers(1, 9), st.sampled_from([0.0, 1.0]))
def test_a_share_is_accepted_whenever_any_is(nodes: list[Node], num_workers: int, reader_cpus: float) -> None:
    if room(nodes, Need(num_workers, 0.01, 0, reader_cpus)) >= num_workers:
        require(nodes, Need(num_workers, share(nodes, num_workers=num_workers, reader_cpus=reader_cpus)))


@given(nodes_of_any_size, st.integers(1, 9), st.sampled_from([0.5, 1.0, 3.0]))
def test_what_is_asked_of_ray_is_what_was_counted(nodes: list[Node], num_workers: int, cpus: float) -> None:
    need = Need(num_workers, cpus, gpus=1, reader_cpus=1)
    bundles = need.bundles()
    assert sum(bundle["CPU"] for bundle in bundles) == num_workers * cpus + 1
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == num_workers
    assert room(nodes, need) <= sum(node.gpus for node in nodes)


def test_equal_nodes_are_told_together_and_the_largest_first() -> None:
    assert describe([Node(0), *TWO_SMALL, Node(8, 1, 32 * GIB)]) == (
        "1 node with 8 CPU, 1 GPU, 32 GiB; 2 nodes with 2 CPU, 8 GiB each; 1 node with 0 CPU, 0 GiB"
    )
    assert describe([]) == "no nodes"


def test_an_autoscaler_is_told_from_one_that_only_watches() -> None:
    assert not scales([], state_version=0)
    assert not scales(["node_2c2bdef185"], state_version=0)
    assert scales(["headgroup", "gpu"], state_version=0)
    assert scales([], state_version=3)
