"""Threads for work that blocks, a few for each kind: where all of one kind hang, the other kinds go on."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from kdsr.serving.problems import Problem

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Pool:
    """Threads of one kind; at most `most` pieces of work are there at once, waiting or begun."""

    def __init__(self, name: str, *, threads: int, most: int) -> None:
        self._name, self._most, self._taken = name, most, 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(
        self, work: Callable[Arguments, Answer], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Answer:
        """What `work` returns. Raises Problem 429 when there is too much already.

        Work that was begun is done to its end, and counts until then, though nobody may wait for it.
        """
        self._enter()
        future = self._threads.submit(work, *arguments, **named)
        future.add_done_callback(lambda _: self._leave())
        return await asyncio.wrap_future(future)

    def _enter(self) -> None:
        with self._lock:
            if self._taken >= self._most:
                raise Problem("busy", f"too much waits for {self._name}; try again later", retry_after=2)
            self._taken += 1

    def _leave(self) -> None:
        with self._lock:
            self._taken -= 1
