"""What the entrance counted, as Prometheus reads it. Knows numbers and labels only."""

import bisect
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds; upper bounds of the histograms' buckets."""

Labels = tuple[tuple[str, str], ...]


class Telemetry:
    """Counters and histograms by name and labels. Safe to share between threads."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[Labels]] = defaultdict(Counter)
        self._buckets: dict[str, dict[Labels, list[int]]] = defaultdict(dict)
        self._sums: dict[str, Counter[Labels]] = defaultdict(Counter)
        self._lock = threading.Lock()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name][tuple(labels.items())] += amount  # type: ignore[assignment] # floats too

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add to a histogram of seconds."""
        key = tuple(labels.items())
        with self._lock:
            buckets = self._buckets[name].setdefault(key, [0] * (len(BOUNDS) + 1))
            buckets[bisect.bisect_left(BOUNDS, seconds)] += 1
            self._sums[name][key] += seconds  # type: ignore[assignment] # floats too

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of them and `gauges`, in the text format 0.0.4."""
        with self._lock:
            lines = [*self._counter_lines(), *self._histogram_lines()]
        for name, value in gauges.items():
            lines += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"

    def _counter_lines(self) -> Iterator[str]:
        for name, counts in sorted(self._counts.items()):
            yield f"# TYPE {name} counter"
            yield from (f"{name}{_shown(labels)} {amount:.12g}" for labels, amount in counts.items())

    def _histogram_lines(self) -> Iterator[str]:
        for name, by_labels in sorted(self._buckets.items()):
            yield f"# TYPE {name} histogram"
            for labels, buckets in by_labels.items():
                total = 0
                for bound, number in zip([*map(str, BOUNDS), "+Inf"], buckets, strict=True):
                    total += number
                    yield f"{name}_bucket{_shown((*labels, ('le', bound)))} {total}"
                yield f"{name}_sum{_shown(labels)} {self._sums[name][labels]:.12g}"
                yield f"{name}_count{_shown(labels)} {total}"


def _shown(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
