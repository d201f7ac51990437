"""Answers that are kept for a while, so that a request that is sent again under its key costs nothing."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kdsr.serving.problems import Problem

Answer = TypeVar("Answer")


@dataclass
class _Entry(Generic[Answer]):
    fingerprint: str
    since: float
    answer: Answer | None = None
    num_bytes: int = 0


class Replays(Generic[Answer]):
    """Answers by key, up to `max_bytes` of them and `seconds` old; the oldest goes first. For one loop."""

    def __init__(self, *, max_bytes: int, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes, self._seconds, self._now = max_bytes, seconds, now
        self._entries: OrderedDict[Hashable, _Entry[Answer]] = OrderedDict()
        self._num_bytes = 0

    def begin(self, key: Hashable, fingerprint: str) -> Answer | None:
        """The answer that was given under `key`, or None for whoever has to make it.

        Raises Problem 422 for a key of another request, 409 while the same one is still under way.
        """
        self._forget()
        entry = self._entries.get(key)
        if entry is None:
            self._entries[key] = _Entry(fingerprint, self._now())
            return None
        if entry.fingerprint != fingerprint:
            raise Problem("reused-key", "this Idempotency-Key was used for another request; make a new one")
        if entry.answer is None:
            raise Problem("conflict", "the same request is still under way", retry_after=1)
        return entry.answer

    def finish(self, key: Hashable, answer: Answer, num_bytes: int) -> None:
        """Keep the answer that was made for `key`."""
        entry = self._entries.get(key)
        if entry is not None and num_bytes <= self._max_bytes:
            entry.answer, entry.num_bytes = answer, num_bytes
            self._num_bytes += num_bytes
            self._forget()
        else:
            self.fail(key)

    def fail(self, key: Hashable) -> None:
        """There is no answer; the next request under `key` begins anew."""
        entry = self._entries.pop(key, None)
        self._num_bytes -= entry.num_bytes if entry else 0

    def _forget(self) -> None:
        """What is too old, and the oldest while there is too much; not what is under way."""
        limit = self._now() - self._seconds
        for key, entry in list(self._entries.items()):
            if entry.answer is not None and (entry.since < limit or self._num_bytes > self._max_bytes):
                self.fail(key)
