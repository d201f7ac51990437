"""The progress of all long work: a bar with ETA on a terminal, lines in a log, or JSON lines."""

import json
import sys
import time
from typing import Any, TextIO

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


class JsonProgress:
    """One JSON object per interval on stderr, the first when it begins and the last when it ends.

    `eta_seconds` is null until there is something to reckon with.
    """

    def __init__(
        self, total: int, *, done: int = 0, interval_seconds: float = 5.0, file: TextIO | None = None
    ) -> None:
        self._total, self._earlier, self._images = total, done, done
        self._interval, self._file = interval_seconds, file or sys.stderr
        self._megapixels, self._failed = 0.0, 0
        self._began = time.monotonic()
        self._print()

    def update(self, *, megapixels: float, failed: int) -> None:
        """One more image is answered for; the sums so far."""
        self._images, self._megapixels, self._failed = self._images + 1, megapixels, failed
        if time.monotonic() - self._printed >= self._interval:
            self._print()

    def __enter__(self) -> "JsonProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._began
        here = self._images - self._earlier
        line = {
            "images": self._images,
            "total": self._total,
            "megapixels": round(self._megapixels, 3),
            "mpx_per_second": round(self._megapixels / elapsed, 3) if elapsed > 0 else 0.0,
            "failed": self._failed,
            "elapsed_seconds": round(elapsed, 3),
            "eta_seconds": round(elapsed / here * (self._total - self._images), 1) if here else None,
        }
        print(json.dumps(line), file=self._file, flush=True)
