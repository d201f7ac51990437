"""The way through a network on an NVIDIA GPU: fixed shapes as CUDA graphs, pinned memory, overlapping copies.

Written from the documentation and not measured yet: `bench/gpu_upscale.py` is what measures it.
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Levels = Callable[[Tensor, float], Tensor]
"""Grey levels (B, C, h, w) and an offset to float32 levels (B, h', w', s, s*C); see `kdsr.engine.Network`."""
Shape = tuple[int, ...]

MOST_SHAPES = 16
"""Shapes that keep their buffers and graph; rarer ones, such as those at borders, are let go first."""
LANES = 2
"""Batches of one shape on the GPU at once: one is copied while the other is computed."""


class CudaNetwork:
    """8-bit tiles through a network on a GPU. Safe to share between threads, which is how copies overlap."""

    def __init__(self, network: Levels, *, scale: int, device: torch.device) -> None:
        self._network, self._scale, self._device = network, scale, device
        self._idle: dict[Shape, list[_Lane]] = defaultdict(list)
        self._uses = Counter[Shape]()
        self._lock = threading.Lock()
        self._room: dict[Shape, threading.Semaphore] = defaultdict(lambda: threading.Semaphore(LANES))

    def run(self, tiles: np.ndarray, into: np.ndarray) -> np.ndarray:
        """`tiles` (N, h, w, C) uint8 upscaled into `into` (N, H, W, C); which of the N are finite.

        Raises torch.OutOfMemoryError, after giving back what idle buffers held: the caller answers with
        fewer or smaller tiles.
        """
        with self._lock:
            room = self._room[tiles.shape]
        with room:
            try:
                lane = self._take(tiles.shape)
                finite = lane.run(tiles, into)
            except torch.OutOfMemoryError:
                self._let_go(0)
                torch.cuda.empty_cache()
                raise
            with self._lock:
                self._idle[tiles.shape].append(lane)
        return finite

    def _take(self, shape: Shape) -> "_Lane":
        with self._lock:
            self._uses[shape] += 1
            if self._idle[shape]:
                return self._idle[shape].pop()
        self._let_go(MOST_SHAPES - 1)
        return _Lane(self._network, shape, scale=self._scale, device=self._device)

    def _let_go(self, most_shapes: int) -> None:
        """Drop idle buffers of all but the `most_shapes` shapes that are used most."""
        with self._lock:
            kept = {shape for shape, _ in self._uses.most_common(most_shapes)}
            for shape in self._idle.keys() - kept:
                del self._idle[shape]


class _Lane:
    """Buffers, stream and graph for batches of one shape. One thread at a time."""

    def __init__(self, network: Levels, shape: Shape, *, scale: int, device: torch.device) -> None:
        number, height, width, channels = shape
        self._network = network
        self._stream = torch.cuda.Stream(device)
        self._tiles = torch.empty(shape, dtype=torch.uint8, device=device)
        self._tiles_host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        large = (number, height * scale, width * scale, channels)
        self._pixels_host = torch.empty(large, dtype=torch.uint8, pin_memory=True)
        self._finite_host = torch.empty(number, dtype=torch.bool, pin_memory=True)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None

    def run(self, tiles: np.ndarray, into: np.ndarray) -> np.ndarray:
        """See `CudaNetwork.run`."""
        np.copyto(self._tiles_host.numpy(), tiles)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._tiles.copy_(self._tiles_host, non_blocking=True)
            pixels, finite = self._draw()
            self._pixels_host.copy_(pixels, non_blocking=True)
            self._finite_host.copy_(finite, non_blocking=True)
            self._stream.synchronize()
        np.copyto(into, self._pixels_host.numpy())
        return self._finite_host.numpy().copy()

    def _draw(self) -> tuple[Tensor, Tensor]:
        """The first batch runs as it is, which also warms cuDNN up; the second is captured and replayed."""
        if self._graph is not None and self._drawn is not None:
            self._graph.replay()
            return self._drawn
        if self._drawn is None:
            self._drawn = self._forward()
            return self._drawn
        graph = torch.cuda.CUDAGraph()
        # Other threads go on using the GPU meanwhile, which only this mode allows.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._drawn = self._forward()
        self._graph = graph
        graph.replay()
        return self._drawn

    def _forward(self) -> tuple[Tensor, Tensor]:
        return pixels_of(self._network(self._tiles.permute(0, 3, 1, 2), 0.5))


def pixels_of(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (B, h, w, s, s*C), half a level added, to uint8 (B, h*s, w*s, C), and which are finite (B,)."""
    batch, height, width, scale, row = levels.shape
    finite = torch.isfinite(levels.sum(dim=(1, 2, 3, 4)))
    blocks = levels.clamp(0, 255).to(torch.uint8)
    pixels = blocks.permute(0, 1, 3, 2, 4).contiguous()
    return pixels.view(batch, height * scale, width * scale, row // scale), finite
