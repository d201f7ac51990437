"""How a training is told to leave: SIGTERM to a worker or the driver, Ctrl-C, or a node that is taken away.

The driver tells the workers through the cluster's own key-value store, which needs no process more.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from uuid import uuid4

import ray.train
import torch
import torch.distributed
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.train.torch import TorchConfig, TorchTrainer

LOOK_SECONDS = 5.0
"""How often a run asks Ray whether one of its nodes is taken away; Ray itself looks as often."""
POLL_SECONDS = 0.5
"""How often the first worker asks whether the driver was told to stop."""
LEAVE_SECONDS = 45.0
"""What workers have to save and leave when their driver was told to stop."""
SAVING = "\nworkers save and leave; Ctrl-C once more leaves at once, with what was saved before\n"
STDERR = 2
NAMESPACE = "kdsr"

_told = threading.Event()
"""Whether this worker process was told to leave."""


# ---------------------------------------------------------------- on a worker


def listen() -> None:
    """Let SIGTERM tell this process to leave, where it would end it. For a worker's main thread."""
    signal.signal(signal.SIGTERM, lambda *_: _told.set())


class ListeningBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Torch's process group on workers that listen: Ray trains in another thread than the main one."""

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """Let each worker listen before it begins."""
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(listen)


class ListeningTorchConfig(TorchConfig):  # type: ignore[misc]
    """Sets up what `TorchConfig` does, and workers that listen."""

    @property
    def backend_cls(self) -> type:
        """What Ray sets workers up with."""
        return ListeningBackend


class ListeningTrainer(TorchTrainer):  # type: ignore[misc]
    """Leaves Ctrl-C to `Stop`; with Ray's own handler a run ends without a checkpoint, and without a word."""

    def _register_sigint_handler(self, controller: Any) -> None:
        pass


class Team:
    """This worker among the others of its run, which take each step together."""

    def __init__(self, *, rank: int, world_size: int, device: torch.device, stop_key: str) -> None:
        self._rank, self._world_size, self._device = rank, world_size, device
        self._next_look = time.monotonic() + LOOK_SECONDS
        if rank == 0:
            threading.Thread(target=_watch_driver, args=(stop_key,), daemon=True).start()

    def is_told_to_leave(self) -> bool:
        """Whether this worker was told to, by anyone."""
        return _told.is_set()

    def total(self, values: list[float]) -> list[float]:
        """Sums over the workers. Looks for a node that goes whenever the first of them says that it is time.

        Ray's answer is a barrier: all must ask equally often, whatever their clocks say.
        """
        is_time = self._rank == 0 and time.monotonic() >= self._next_look
        *sums, look = self._sum([*values, float(is_time)])
        if look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            if ray.train.get_preemption_info() is not None:
                _told.set()
        return sums

    def _sum(self, values: list[float]) -> list[float]:
        if self._world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums


def _watch_driver(stop_key: str) -> None:
    while not _told.wait(POLL_SECONDS):
        if _internal_kv_get(stop_key, namespace=NAMESPACE) is not None:
            _told.set()


# ---------------------------------------------------------------- in the driver


@dataclass
class Stop:
    """Whether the driver was told to stop, and the key under which its workers hear of it."""

    key: str = field(default_factory=lambda: f"stop-{uuid4().hex}")
    reason: str = "told to stop"
    is_by_hand: bool = False
    """Whether it was Ctrl-C."""
    _told: threading.Event = field(default_factory=threading.Event)
    _over: threading.Event = field(default_factory=threading.Event)

    def is_told(self) -> bool:
        """Whether a signal came, or another reason."""
        return self._told.is_set()

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Take a SIGTERM or Ctrl-C; a second one ends at once what the main thread waits for."""
        if self._told.is_set():
            raise KeyboardInterrupt
        self.is_by_hand = number == signal.SIGINT
        if self.is_by_hand:
            os.write(STDERR, SAVING.encode())  # print may be what the signal came into
        self._told.set()

    def tell(self, reason: str) -> None:
        """Stop for another reason than a signal."""
        self.reason = reason
        self._told.set()

    def pass_on(self) -> None:
        """Wait for a signal and tell the workers. When they do not leave in time, send a second one."""
        self._told.wait()
        if self._over.is_set():
            return
        _internal_kv_put(self.key, b"1", namespace=NAMESPACE)
        if not self._over.wait(LEAVE_SECONDS):
            os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> None:
        """Nobody is to be told any more."""
        self._over.set()
        self._told.set()
        _internal_kv_del(self.key, namespace=NAMESPACE)


@contextmanager
def heard_by_workers() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C to this process, which is connected to a cluster, as something that workers hear."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.hear) for number in (signal.SIGTERM, signal.SIGINT)}
    threading.Thread(target=stop.pass_on, daemon=True).start()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.end()
