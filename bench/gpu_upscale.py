"""Upscaling on a GPU: the net against its floor, engine variants, and the whole path with its codecs.

    python bench/gpu_upscale.py --json gpu.json

The floor of a frame is the larger of two times, both from rates measured in this run: its arithmetic at the
speed of a large matrix product of the same type, and its bytes at the speed of a copy on the device. Bytes
are each layer's input and output once, as they are when layers are not fused with each other. Without a GPU
it runs on the CPU with tiny pictures, which measures nothing but shows that it works.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdsr import codecs
from kdsr.checkpoint import load_model
from kdsr.engine import DTYPES, Engine, Network
from kdsr.image import Image
from kdsr.models import SrModel, fold
from kdsr.upscale import Upscaler

MAX_PIXELS = 10**8


@dataclass(frozen=True)
class Case:
    """Frames of one size through one model."""

    name: str
    model: str
    height: int
    width: int


CASES = [Case("1080p to 4K", "photo-x2", 1080, 1920), Case("540p to 4K", "photo-x4", 540, 960)]
TINY_CASES = [Case("tiny x2", "photo-x2", 48, 64), Case("tiny x4", "photo-x4", 32, 48)]


def synchronize(device: torch.device) -> None:
    """Wait for the device; CPUs do not run ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls of `work` in a second, in runs of several so that a GPU is not waited for after each."""
    work(), synchronize(device)
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(4):
            work()
        synchronize(device)
        calls += 4
    return calls / (time.perf_counter() - began)


def matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Floating-point operations in a second of a large square product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return rate(lambda: a @ b, device, seconds) * 2 * side**3


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes read and written in a second by a large copy."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return rate(lambda: target.copy_(source), device, seconds) * 2 * source.numel() * 4


def work_of(model: SrModel, height: int, width: int, element_bytes: int) -> dict[str, float]:
    """Operations and bytes of one frame: 8-bit pixels in and out, and each convolution's input and output."""
    folded = fold(model)
    operations, moved = 0.0, height * width * folded.spec.channels * (1.0 + folded.spec.scale**2)

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal operations, moved
        assert isinstance(layer, nn.Conv2d)
        share = height * width / (inputs[0].shape[2] * inputs[0].shape[3])  # the probe is 32 x 32
        operations += 2 * layer.weight.numel() * output.shape[2] * output.shape[3] * share
        moved += (inputs[0].numel() + output.numel()) * element_bytes * share

    layers = [layer for layer in folded.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.inference_mode():
        folded(torch.zeros(1, folded.spec.channels, 32, 32))
    for hook in hooks:
        hook.remove()
    return {"operations": operations, "bytes": moved}


def net_variants(case: Case, device: torch.device, seconds: float, batch: int) -> list[dict[str, Any]]:
    """Each number type and layout: pixels on the device already, with copies, and the floor."""
    model = load_model(case.model).model
    frame = np.random.default_rng(0).integers(0, 256, (batch, case.height, case.width, 3), dtype=np.uint8)
    output_mpx = case.height * case.width * model.spec.scale**2 / 1e6
    bandwidth = copy_rate(device, seconds)
    types = ["float32", "bfloat16"] + (["float16"] if device.type == "cuda" else [])
    rows = []
    for precision in types:
        dtype = DTYPES[precision]
        matrix = matrix_rate(dtype, device, seconds)
        work = work_of(model, case.height, case.width, dtype.itemsize)
        floor = max(work["operations"] / matrix, work["bytes"] / bandwidth)
        for channels_last in (True, False):
            row = {"precision": precision, "channels_last": channels_last}
            row |= {"matrix_tflops": matrix / 1e12, "copy_gb_s": bandwidth / 1e9, "floor_ms": floor * 1e3}
            row |= timed(model, frame, row, device, seconds)
            row["of_floor"] = floor / row["net_seconds"] if row.get("net_seconds") else None
            row["net_mpx_s"] = output_mpx / row["net_seconds"] if row.get("net_seconds") else None
            row["engine_mpx_s"] = output_mpx / row["engine_seconds"] if row.get("engine_seconds") else None
            rows.append(row)
    return rows


def timed(
    model: SrModel, frame: np.ndarray, variant: dict[str, Any], device: torch.device, seconds: float
) -> dict[str, Any]:
    """Seconds a frame takes in the network and in the engine, copies included; or why it has none."""
    layout = torch.channels_last if variant["channels_last"] else torch.contiguous_format
    try:
        network = Network(
            fold(model).eval().requires_grad_(False),
            dtype=DTYPES[variant["precision"]],
            device=device,
            layout=layout,
        )
        lr = torch.from_numpy(frame).to(device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            net_seconds = 1 / rate(lambda: network(lr, 0.5), device, seconds) / len(frame)
        engine = Engine(
            model,
            device=str(device),
            precision=variant["precision"],
            channels_last=variant["channels_last"],
        )
        engine_seconds = 1 / rate(lambda: engine.run(frame), device, seconds) / len(frame)
        return {"net_seconds": net_seconds, "engine_seconds": engine_seconds, "note": engine.note}
    except torch.OutOfMemoryError as error:
        return {"note": f"out of memory: {str(error).splitlines()[0]}"}


def whole_path(case: Case, device: torch.device, seconds: float, threads: int) -> dict[str, Any]:
    """JPEG to JPEG, several images in flight: frames and output megapixels in a second."""
    model = load_model(case.model).model
    engine = Engine(model, device=str(device), precision="auto")
    upscaler = Upscaler(engine, tile_size=max(case.height, case.width), batch_size=1)
    columns, rows = np.meshgrid(np.arange(case.width), np.arange(case.height))
    waves = 128 + 60 * np.sin(rows / 7) + 60 * np.cos(columns / 11)
    noise = np.random.default_rng(0).normal(0, 5, (case.height, case.width, 3))
    data = codecs.encode(Image((waves[:, :, None] + noise).clip(0, 255).astype(np.uint8)), format="jpeg")
    finished, began = 0, time.perf_counter()

    def one(_: int) -> None:
        codecs.encode(upscaler.upscale(codecs.decode(data, max_pixels=MAX_PIXELS)), format="jpeg")

    one(0)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() - began < seconds:
            finished += len(list(pool.map(one, range(2 * threads))))
    fps = finished / (time.perf_counter() - began)
    output_mpx = case.height * case.width * engine.scale**2 / 1e6
    return {"precision": engine.precision, "fps": fps, "output_mpx_s": fps * output_mpx, "threads": threads}


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "cpus": os.cpu_count(), "torch": torch.__version__, "cuda": torch.version.cuda}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1, help="frames in one call of the engine")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="images in flight")
    parser.add_argument(
        "--tiny", action="store_true", default=not torch.cuda.is_available(), help="pictures of a few pixels"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    seconds = min(arguments.seconds, 0.05) if arguments.tiny else arguments.seconds
    cases = []
    for case in TINY_CASES if arguments.tiny else CASES:
        variants = net_variants(case, device, seconds, arguments.batch)
        path = whole_path(case, device, seconds, arguments.threads)
        cases.append({"case": case.name, "model": case.model, "whole_path": path, "variants": variants})
    text = json.dumps({"machine": machine(device), "cases": cases}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
