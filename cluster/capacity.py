"""Whether what is asked for fits into a cluster, and how much of it each worker gets. Knows no Ray.

A sum says little: four CPUs for a worker fit into two nodes of two CPUs each by the sum and on neither of
them, and Ray would wait for ever. So all of this is about nodes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdsr.errors import RequestError

EPSILON = 1e-6


@dataclass(frozen=True)
class Node:
    """What one machine of a cluster announces, or has left."""

    cpus: float
    gpus: float = 0.0
    memory_bytes: float = 0.0

    def sentence(self) -> str:
        """For the person who reads what a cluster has."""
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{gpus}, {self.memory_bytes / 2**30:.0f} GiB"


@dataclass(frozen=True)
class Need:
    """Workers that have to run side by side, each on one node, and what the tasks that feed them take."""

    num_workers: int
    cpus: float
    """Of one worker."""
    gpus: float = 0.0
    """Of one worker."""
    reader_cpus: float = 0.0
    """Beside all workers, on any one node; without it nothing would ever reach them."""

    def sentence(self) -> str:
        """For the person who reads what a run waits for."""
        workers = f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''} of {self.cpus:g} CPU"
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        reading = f", and {self.reader_cpus:g} CPU for reading" if self.reader_cpus else ""
        return f"{workers}{gpus}{reading}"

    def bundles(self) -> list[dict[str, float]]:
        """The same as Ray asks for it."""
        worker = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [worker] * self.num_workers + ([{"CPU": self.reader_cpus}] if self.reader_cpus else [])


def room(nodes: Sequence[Node], need: Need) -> int:
    """How many workers of `need` can run at once on `nodes`, any number of them."""
    if not need.reader_cpus:
        return sum(_room_on(node, need) for node in nodes)
    # Reading goes where it costs the fewest workers.
    return max((_room_beside_reader(nodes, number, need) for number in range(len(nodes))), default=0)


def _room_beside_reader(nodes: Sequence[Node], number: int, need: Need) -> int:
    """The same when reading takes its share of node `number`."""
    left = [node.cpus - need.reader_cpus * (index == number) for index, node in enumerate(nodes)]
    if left[number] < -EPSILON:
        return 0
    return sum(_room_on(Node(cpus, node.gpus), need) for cpus, node in zip(left, nodes, strict=True))


def _room_on(node: Node, need: Need) -> int:
    by_cpus = int((node.cpus + EPSILON) / need.cpus)
    return min(by_cpus, int((node.gpus + EPSILON) / need.gpus)) if need.gpus else by_cpus


def share(nodes: Sequence[Node], *, num_workers: int, gpus: float = 0.0, reader_cpus: float = 0.0) -> float:
    """CPUs of one worker so that all of them run at once and the nodes are used as well as equal parts can.

    Whole CPUs where there are enough, hundredths otherwise; 1.0 where they fit with no share at all, for
    whoever refuses that to have a number to name.
    """
    most = int(max((node.cpus for node in nodes), default=0.0))
    candidates = [float(whole) for whole in range(most, 0, -1)] + [part / 100 for part in range(99, 0, -1)]
    for cpus in candidates:
        if room(nodes, Need(num_workers, cpus, gpus, reader_cpus)) >= num_workers:
            return cpus
    return 1.0


def require(nodes: Sequence[Node], need: Need) -> None:
    """Raise RequestError, with what the cluster has, when `need` will never fit onto `nodes`."""
    fitting = room(nodes, need)
    if fitting >= need.num_workers:
        return
    raise RequestError(f"{_why_not(nodes, need, fitting)}. This cluster has {describe(nodes)}")


def _why_not(nodes: Sequence[Node], need: Need, fitting: int) -> str:
    gpus, most = sum(node.gpus for node in nodes), max((node.cpus for node in nodes), default=0.0)
    if need.gpus * need.num_workers > gpus + EPSILON:
        return (
            f"cluster.use_gpu with cluster.num_workers {need.num_workers} asks for "
            f"{need.gpus * need.num_workers:g} GPU, and there are {gpus:g}: leave cluster.use_gpu out, ask "
            f"for fewer workers, or join a cluster with GPUs"
        )
    if need.cpus > most + EPSILON:
        return (
            f"cluster.cpus_per_worker {need.cpus:g} is more than any one node has, and a worker runs on one "
            f"node: set it to {most:g} or less"
        )
    return (
        f"cluster.num_workers {need.num_workers} is too many: room is for {fitting} of {need.sentence()}; "
        f"ask for fewer workers, set cluster.cpus_per_worker lower, or join a larger cluster"
    )


def describe(nodes: Sequence[Node]) -> str:
    """Its nodes, equal ones together, the largest first."""
    if not nodes:
        return "no nodes"
    sentences = [node.sentence() for node in sorted(nodes, key=lambda node: (-node.gpus, -node.cpus))]
    return "; ".join(_counted(sentences.count(text), text) for text in dict.fromkeys(sentences))


def _counted(number: int, text: str) -> str:
    return f"{number} node{'s' if number > 1 else ''} with {text}{' each' if number > 1 else ''}"


def scales(node_types: Iterable[str], *, state_version: int) -> bool:
    """Whether an autoscaler may add nodes, from what it tells of itself.

    The one of a cluster that cannot grow only watches, and calls each node a type of its own, `node_ID`; or
    it tells nothing.
    """
    return state_version > 0 or any(not name.startswith("node_") for name in node_types)
