"""One piece of work at a time beside the caller. Knows nothing of what the work is."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Does in a thread what it is given, one thing after the other, and hands over results and errors."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdsr-background")
        self._running: Future[Result] | None = None
        self._results: list[Result] = []

    def start(self, work: Callable[[], Result]) -> None:
        """Begin with `work`, after waiting for the work before it, whose error is raised."""
        self.settle()
        self._running = self._thread.submit(work)

    def settle(self) -> None:
        """Wait for what is under way, and keep its result. Raises its error."""
        running, self._running = self._running, None
        if running is not None:
            self._results.append(running.result())

    def results(self) -> list[Result]:
        """What was finished since the last call, without waiting. Raises the error of work that failed."""
        if self._running is not None and self._running.done():
            self.settle()
        found, self._results = self._results, []
        return found

    def finish(self) -> list[Result]:
        """The same after waiting for what is under way."""
        self.settle()
        return self.results()

    def close(self) -> None:
        """Wait for what is under way. Whoever closes has another error, or none: one of the work is told."""
        if self._running is not None:
            wait([self._running])
            if (error := self._running.exception()) is not None:
                log.error("%s: %s", type(error).__name__, error)
        self._thread.shutdown()
