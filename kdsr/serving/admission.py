"""How much may be under way at once, and when there will be room. Knows numbers only."""

import threading
import time

from kdsr.serving.problems import Problem

MAX_CALLS = 64
"""Images that a replica has in hand at once, at most; their threads mostly wait for tiles."""
HALF_LIFE_SECONDS = 20.0
"""What was done so long ago counts half as much for the rate."""
LONGEST_WAIT_SECONDS = 60.0


class Admission:
    """Lets work in while all of it together costs at most `limit`. Safe to share between threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        """Cost of what is under way."""
        self._done = 0.0
        self._busy_seconds = 0.0
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def enter(self, cost: int) -> None:
        """Keep room for `cost` until it leaves. Raises Problem 429 when there is none.

        What costs more than `limit` is let in when it is alone.
        """
        with self._lock:
            self._advance()
            missing = self.taken + cost - self.limit
            if missing > 0 and self.taken > 0:
                raise Problem("busy", "too much is waiting already; try again later", self._wait(missing))
            self.taken += cost

    def leave(self, cost: int, *, was_done: bool) -> None:
        """Give the room back; what was not done does not count for the rate."""
        with self._lock:
            self._advance()
            self.taken -= cost
            self._done += cost if was_done else 0

    def _wait(self, missing: int) -> float:
        """Seconds until `missing` of it is done."""
        rate = self._rate()
        return min(max(missing / rate, 1.0), LONGEST_WAIT_SECONDS) if rate > 0 else 5.0

    def _rate(self) -> float:
        """Cost that is done in a second of being busy; 0 when nothing was done yet."""
        return self._done / self._busy_seconds if self._busy_seconds > 0 else 0.0

    def _advance(self) -> None:
        """Let the past count less, and the time since the last call as busy if anything was under way."""
        now = time.monotonic()
        elapsed, self._since = now - self._since, now
        if self.taken > 0:
            keep = 0.5 ** (elapsed / HALF_LIFE_SECONDS)
            self._done *= keep
            self._busy_seconds = self._busy_seconds * keep + elapsed
