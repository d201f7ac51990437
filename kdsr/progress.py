"""The progress bar of all long work: a bar with ETA on a terminal, a line now and then in a log."""

import sys
from typing import Any

from tqdm import tqdm

TERMINAL_SECONDS, LOG_SECONDS = 0.1, 10.0


def progress_bar(total: int, *, unit: str, done: int = 0, leave: bool = True) -> "tqdm[Any]":
    """A bar on stderr for `total` units, `done` of them from an earlier start."""
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        file=sys.stderr,
        mininterval=TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS,
        leave=leave,
    )
