"""Who works on what lies in a store: an object that its holder renews, so that a second one is refused.

Leases have numbers, and the highest one holds: of several that want the next number the store lets one create
it. Knows nothing of the work. A holder that was frozen for long and wakes up learns within moments that it
lost the lease; until then two may write.
"""

import _thread
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from kdsr.errors import KdsrError, KeyExists, KeyNotFound, RequestError, StoreError
from kdsr.spec import Frozen
from kdsr.store import ObjectInfo, Store

log = logging.getLogger(__name__)

RENEW_SECONDS = 10.0
DEAD_SECONDS = 45.0
"""Who has not renewed for so long is dead. Measured by whoever waits: clocks of machines differ."""
LOOK_SECONDS = 1.0
INTERRUPT = signal.SIGUSR1
"""Not SIGINT, which programs in the background of a script ignore."""
PREFIX = "lease-"


class Holder(Frozen):
    """What a lease says of who holds it."""

    host: str
    pid: int
    process: str
    """Tells this process from every other; empty where the system does not say."""
    renewed: int = 0

    def __str__(self) -> str:
        """For a person who looks for it."""
        return f"process {self.pid} on {self.host}"


@dataclass
class Lease:
    """A lease that this process holds."""

    store: Store
    key: str
    holder: Holder
    when_lost: Callable[[], None] = lambda: None
    """Called once, in another thread, when somebody else took it."""
    _over: threading.Event = field(default_factory=threading.Event)

    def renew_until_over(self) -> None:
        """Show every few seconds that this process lives."""
        while not self._over.wait(RENEW_SECONDS):
            try:
                if self._is_lost():
                    self.when_lost()
                    return
                self.holder = self.holder.model_copy(update={"renewed": self.holder.renewed + 1})
                self.store.put(self.key, _packed(self.holder))
            except StoreError as error:
                log.warning("the lease could not be renewed: %s", error)

    def give_back(self, renewing: threading.Thread) -> None:
        """Let others have it. A renewal under way ends first: it would write the key again."""
        self._over.set()
        try:
            renewing.join()
        finally:
            with suppress(StoreError):
                self.store.delete(self.key)

    def _is_lost(self) -> bool:
        last = _last(self.store)
        return last is None or last.key != self.key


@contextmanager
def held(store: Store, *, what: str) -> Iterator[Lease]:
    """The lease on `store` for as long as the block runs.

    Raises RequestError when another process has it and lives. Waits for one that cannot be asked.
    """
    lease = _take(store, what)
    thread = threading.Thread(target=lease.renew_until_over, daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.give_back(thread)


@contextmanager
def held_throughout(store: Store, *, what: str) -> Iterator[None]:
    """The same for a main thread that waits for others: it is interrupted where it loses the lease.

    Raises KdsrError then, and what `held` raises.
    """
    lost = threading.Event()

    def interrupt() -> None:
        lost.set()
        _thread.interrupt_main(INTERRUPT)

    with held(store, what=what) as lease, _interrupted_by(INTERRUPT):
        lease.when_lost = interrupt
        try:
            yield
        except KeyboardInterrupt:
            if not lost.is_set():
                raise
            raise KdsrError(f"another process has taken over {what} while this one was away") from None


@contextmanager
def _interrupted_by(number: int) -> Iterator[None]:
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _take(store: Store, what: str) -> Lease:
    holder = Holder(host=platform.node(), pid=os.getpid(), process=_process(os.getpid()))
    while True:
        last = _last(store)
        if last is not None:
            _wait_until_dead(store, last, what)
        key = f"{PREFIX}{1 + (0 if last is None else _number(last)):09}.json"
        with suppress(KeyExists):
            store.create(key, _packed(holder))
            # A folder that changes while it is listed may hide a lease that is higher.
            if (now := _last(store)) is not None and now.key == key:
                break
            store.delete(key)
    if last is not None:
        store.delete(last.key)
    return Lease(store, key, holder)


def _wait_until_dead(store: Store, last: ObjectInfo, what: str) -> None:
    """Return when the holder of `last` is gone. Raises RequestError when it is not."""
    holder = _holder(store, last.key)
    if holder is None or _is_dead_here(holder):
        return
    refusal = RequestError(
        f"{what} is worked on by {holder}; stop that first, or choose another name or output"
    )
    if _process(holder.pid) == holder.process != "":
        raise refusal
    log.warning(
        "%s was worked on by %s, which did not say that it ended; waiting up to %.0f s for a sign of life",
        *(what, holder, DEAD_SECONDS),
    )
    end = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
        try:
            if store.stat(last.key).etag != last.etag:
                raise refusal
        except KeyNotFound:
            return


def _is_dead_here(holder: Holder) -> bool:
    """Whether it was a process that this one would see, and is no more."""
    space, _, _ = holder.process.partition(" ")
    return bool(space) and space == _space() and _process(holder.pid) != holder.process


def _process(pid: int) -> str:
    """Which process has this number here and now: space of numbers, number, and when it began."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" or not _space() else f"{_space()} {pid} {fields[18]}"


def _space() -> str:
    """Where numbers of processes mean what they mean here: this start of this machine, this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _last(store: Store) -> ObjectInfo | None:
    return max(store.list(PREFIX), key=_number, default=None)


def _number(info: ObjectInfo) -> int:
    digits = info.key.removeprefix(PREFIX).removesuffix(".json")
    return int(digits) if digits.isdecimal() else 0


def _packed(holder: Holder) -> bytes:
    return holder.model_dump_json().encode()


def _holder(store: Store, key: str) -> Holder | None:
    """None for a lease that was given back meanwhile."""
    try:
        return Holder.model_validate_json(store.get(key))
    except KeyNotFound:
        return None
    except ValidationError:
        return Holder(host="an unknown machine", pid=0, process="")
