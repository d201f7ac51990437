"""What one process at the entrance knows and remembers, and what all its paths read from a request."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request

from kdsr.config import LimitsConfig, ServeConfig
from kdsr.serving.contract import Call, Description, Refusal, Result
from kdsr.serving.keys import Keys, Quotas
from kdsr.serving.pools import Pool
from kdsr.serving.problems import Problem
from kdsr.serving.replays import Replays
from kdsr.serving.telemetry import Telemetry

INSPECTIONS, FETCHES, STORE_THREADS = 4, 8, 8
"""Threads of each kind."""
MAX_STORE_CALLS = 200
"""That wait or are under way; beyond it says 429."""


class Backend(Protocol):
    """What the application asks of whoever holds the networks. Both raise Problem."""

    async def describe(self) -> Description:
        """What is served now."""

    async def upscale(self, call: Call) -> Result | Refusal:
        """The result, or why there is none. Being cancelled means that the caller left."""


@dataclass
class Entrance:
    """What one process at the entrance knows and remembers."""

    config: ServeConfig
    backend: Backend
    keys: Keys
    quotas: Quotas
    replays: Replays[tuple[Result, dict[str, str]]]
    telemetry: Telemetry = field(default_factory=Telemetry)
    waiting_bytes: int = 0
    """Of bodies, and of what is fetched."""
    # How many bodies there are is bounded by their bytes already, and by those who may call at once.
    inspections: Pool = field(default_factory=lambda: Pool("inspection", threads=INSPECTIONS, most=10**6))
    fetches: Pool = field(default_factory=lambda: Pool("fetching", threads=FETCHES, most=FETCHES))
    store_calls: Pool = field(
        default_factory=lambda: Pool("the store", threads=STORE_THREADS, most=MAX_STORE_CALLS)
    )

    @contextmanager
    def holding(self, num_bytes: int) -> Iterator[None]:
        """Count so many bytes until the block ends. Raises Problem 429 without room beside others."""
        if self.waiting_bytes and self.waiting_bytes + num_bytes > self.limits.max_waiting_bytes:
            raise Problem("busy", "too many bodies are on their way already; try again later", retry_after=1)
        self.waiting_bytes += num_bytes
        try:
            yield
        finally:
            self.waiting_bytes -= num_bytes

    @property
    def limits(self) -> LimitsConfig:
        """Those of the configuration."""
        return self.config.limits


def query_of(request: Request) -> dict[str, str]:
    """The query's parameters. Raises Problem for one that is given twice."""
    pairs = request.query_params.multi_items()
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Problem("invalid-option", f"{twice[:40]!r} is given twice")
    return dict(pairs)


def idempotency_key(request: Request) -> str | None:
    """The key of a request that may be sent again. Raises Problem 400."""
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[\x21-\x7e]{1,128}", key):
        raise Problem("bad-request", "Idempotency-Key: expected 1 to 128 visible ASCII characters")
    return key
