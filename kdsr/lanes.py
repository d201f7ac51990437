"""Which sub-image each place of a batch takes its patches from, at every step of a run, by arithmetic alone.

A run has `batch_size` lanes, and each gives one patch to every step. Knows numbers of rows only: no images,
no stores, no workers but the numbers of their lanes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

ROWS, PATCHES = 1, 2
"""Tell apart what is drawn for one epoch."""


class LaneRow(NamedTuple):
    """A row that a lane takes patches from."""

    group: int
    """Number of the row group."""
    row: int
    """Which of the rows of that group that are trained on."""


class Mix(NamedTuple):
    """Rows of a lane whose patches come in random order, before any of the next rows."""

    epoch: int
    rows: tuple[LaneRow, ...]
    patches: tuple[tuple[int, int], ...]
    """What is left of them: place in `rows`, and which of the patches of that row."""


class _Order(NamedTuple):
    groups: np.ndarray
    """Numbers of the row groups, in the order of an epoch."""
    ends: np.ndarray
    """How many rows come up to and with each of them."""


def own_lanes(batch_size: int, *, rank: int, world_size: int) -> range:
    """Lanes of one worker; their numbers differ by one at most over the workers."""
    return range(rank, batch_size, world_size)


@dataclass(frozen=True)
class Lanes:
    """The lanes of a run. What they give depends on neither the number of workers nor where a run began.

    In each epoch the row groups are put in another order, and so are the rows within each; the lanes take
    neighbouring spans of them that are equal to one row. So every row is in one lane once an epoch, and a row
    group in few. The spans' lengths change places over the epochs, which keeps all lanes within one row of
    each other for ever, also where there are more lanes than rows.
    """

    group_rows: tuple[int, ...]
    """Rows of each row group that are trained on; at least one in all."""
    batch_size: int
    patches_per_row: int
    mix_rows: int
    """Rows, at most, of one lane whose patches are mixed."""
    seed: int

    @cached_property
    def num_rows(self) -> int:
        """Of an epoch."""
        return sum(self.group_rows)

    def span(self, lane: int, epoch: int) -> tuple[int, int]:
        """First row of `lane`, and the one behind its last, in the order of `epoch`."""
        return self._begin(lane, epoch), self._begin(lane + 1, epoch)

    def _begin(self, lane: int, epoch: int) -> int:
        return self._given(lane, epoch + 1) - self._given(lane, epoch)

    def _given(self, lane: int, epoch: int) -> int:
        """Rows of all lanes before `lane`, in all epochs before `epoch`.

        Lane l has given floor((epochs * rows + l) / lanes), which is all rows when summed over the lanes.
        """
        whole, rest = divmod(epoch * self.num_rows, self.batch_size)
        return lane * whole + max(0, lane - (self.batch_size - rest))

    def group_at(self, epoch: int, place: int) -> int:
        """Number of the row group that comes at `place` in the order of `epoch`."""
        return int(self._order(epoch).groups[place])

    def position(self, lane: int, step: int) -> tuple[int, int]:
        """Epoch of `lane` at `step`, and how many patches of its span come before."""
        row = step // self.patches_per_row
        epoch = ((row + 1) * self.batch_size - lane - 1) // self.num_rows
        before = (epoch * self.num_rows + lane) // self.batch_size
        return epoch, step - before * self.patches_per_row

    def mixes(self, lane: int, step: int) -> Iterator[Mix]:
        """What `lane` gives from `step` on, without end."""
        epoch, done = self.position(lane, step)
        while True:
            begin, end = self.span(lane, epoch)
            bounds = _bounds(begin, end, self.mix_rows)
            rows_done, _ = divmod(done, self.patches_per_row)
            first = bisect_right(bounds, begin + rows_done) - 1
            for low, high in pairwise(bounds[max(0, first) :]):
                skipped = max(0, done - (low - begin) * self.patches_per_row)
                yield self._mix(epoch, low, high, skipped)
            epoch, done = epoch + 1, 0

    def _mix(self, epoch: int, low: int, high: int, skipped: int) -> Mix:
        rows = tuple(self._row(epoch, place) for place in range(low, high))
        order = self._random(epoch, low, PATCHES).permutation(len(rows) * self.patches_per_row)
        patches = tuple(divmod(int(patch), self.patches_per_row) for patch in order[skipped:])
        return Mix(epoch, rows, patches)

    def _row(self, epoch: int, place: int) -> LaneRow:
        order = self._order(epoch)
        number = int(np.searchsorted(order.ends, place, side="right"))
        group = int(order.groups[number])
        inside = place - int(order.ends[number]) + self.group_rows[group]
        return LaneRow(group, int(self._rows_of(epoch, group)[inside]))

    @cached_property
    def _order(self) -> Callable[[int], _Order]:
        return lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> _Order:
        groups = self._random(epoch).permutation(len(self.group_rows))
        return _Order(groups, np.cumsum(np.asarray(self.group_rows)[groups]))

    @cached_property
    def _rows_of(self) -> Callable[[int, int], np.ndarray]:
        return lru_cache(maxsize=2 * self.batch_size)(self._shuffled_rows)

    def _shuffled_rows(self, epoch: int, group: int) -> np.ndarray:
        return self._random(epoch, group, ROWS).permutation(self.group_rows[group])

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *numbers])


def _bounds(begin: int, end: int, most: int) -> list[int]:
    """Where near-equal parts of `begin`..`end` of at most `most` begin, and `end`."""
    count = -(-(end - begin) // most)
    return [begin + part * (end - begin) // count for part in range(count)] + [end]
