"""Whose work is next: turn by turn between claims, in the order of arrival within one. Knows no pixels.

A small request that comes beside a huge one waits for one piece of it and not for all of it. Who shares a
claim is served in the order of arrival.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from kdsr.errors import Abandoned

Item = TypeVar("Item")


class Claim:
    """One caller's turn beside those of others, until it is withdrawn or `deadline` has passed.

    `deadline` is a time of `time.monotonic`.
    """

    def __init__(self, *, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.began: float | None = None
        """Time of `time.perf_counter` at which its first item was begun."""
        self.seconds = 0.0
        """Spent on its items; its share where others' went together with them."""
        self.largest_batch = 0
        """Most items, its own and others', that went together with one of its own."""
        self._is_withdrawn = False
        self._lock = threading.Lock()

    def note(self, *, began: float, seconds: float, batch: int) -> None:
        """Count one of its items, which was begun at `began` among `batch`."""
        with self._lock:
            self.began = began if self.began is None else min(began, self.began)
            self.seconds += seconds
            self.largest_batch = max(batch, self.largest_batch)

    def was_passed(self, seconds: float) -> None:
        """Do not count what others' items took while one of its own was under way."""
        with self._lock:
            self.seconds -= seconds

    def withdraw(self) -> None:
        """Nobody waits for the result any more."""
        self._is_withdrawn = True

    @property
    def is_over(self) -> bool:
        """Whether further work on it would be in vain."""
        return self._is_withdrawn or (self.deadline < math.inf and time.monotonic() >= self.deadline)

    def require(self) -> None:
        """Raise Abandoned when it is over."""
        if self.is_over:
            raise self.abandoned()

    def abandoned(self) -> Abandoned:
        """The error that says why it is over."""
        if self._is_withdrawn:
            return Abandoned("the caller left before the result was there")
        return Abandoned("the deadline passed before the result was there; send less at once, or allow more")


class Turns(Generic[Item]):
    """Items that wait, by claim and by kind; those of one kind can go together. Safe to share."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Claim, OrderedDict[Hashable, deque[Item]]] = OrderedDict()
        self._number = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many items wait."""
        return self._number

    def put(self, claim: Claim, items: Iterable[tuple[Hashable, Item]]) -> None:
        """Add pairs of kind and item to what waits for `claim`."""
        with self._lock:
            for kind, item in items:
                kinds = self._waiting.setdefault(claim, OrderedDict())
                kinds.setdefault(kind, deque()).append(item)
                self._number += 1

    def take(
        self, *, most: Callable[[Item], int], only: Callable[[Item], bool] = lambda _: True
    ) -> tuple[list[Item], list[Item]]:
        """Some items of the kind whose turn it is, and all items of claims that are over.

        `most` says how many may go together with an item. At least one goes unless none is left for which
        `only` holds; the claims that have the kind give one each in turn until there are enough, the one
        whose turn it is first. `only` is asked of the first item of a kind.
        """
        with self._lock:
            dropped = self._drop_over()
            turn = self._turn(only)
            if turn is None:
                return [], dropped
            first, kind = turn
            number = most(self._waiting[first][kind][0])
            givers = [first]
            if number > 1:
                others = (claim for claim in self._waiting if claim is not first)
                givers += [claim for claim in others if kind in self._waiting[claim]]
            taken = self._take_in_turn(givers, kind, number)
            self._number -= len(taken)
            return taken, dropped

    def _turn(self, only: Callable[[Item], bool]) -> tuple[Claim, Hashable] | None:
        for claim, kinds in self._waiting.items():
            for kind, items in kinds.items():
                if only(items[0]):
                    return claim, kind
        return None

    def _take_in_turn(self, givers: list[Claim], kind: Hashable, number: int) -> list[Item]:
        taken: list[Item] = []
        while givers and len(taken) < number:
            claim = givers.pop(0)
            kinds = self._waiting[claim]
            taken.append(kinds[kind].popleft())
            self._waiting.move_to_end(claim)
            if kinds[kind]:
                kinds.move_to_end(kind)
                givers.append(claim)
                continue
            del kinds[kind]
            if not kinds:
                del self._waiting[claim]
        return taken

    def _drop_over(self) -> list[Item]:
        over = [claim for claim in self._waiting if claim.is_over]
        dropped = [item for claim in over for items in self._waiting.pop(claim).values() for item in items]
        self._number -= len(dropped)
        return dropped
