"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable


def wait_for(condition: Callable[[], object], *, seconds: float = 60.0, pause: float = 0.005) -> None:
    """Look every `pause` seconds; fails after `seconds`, which even a slow machine does not need."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s"
        time.sleep(pause)
