"""One network on the CPU in torch, OpenVINO and ONNX Runtime: uint8 tiles in, uint8 tiles out, in turns.

    python bench/engines.py --tile 144x144 321x481 --at-once 1 2 --json engines.json

Speed is a ratio to kdsr's engine in bfloat16, each round against the same round. OpenVINO, and ONNX Runtime
with onnx, are measured where they are installed; kdsr itself does without them.
"""

import argparse
import importlib.util
import io
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr import provenance
from kdsr.checkpoint import load_model
from kdsr.engine import CACHED_PIXELS, Engine
from kdsr.models.contract import SrModel

Run = Callable[[np.ndarray], np.ndarray]

TITLE = "Inference engines on a CPU"
REMARKS = [
    "One network, a tile of height x width LR pixels, `at_once` calls in threads of their own, each on one "
    "core. `ratio` is the speed against kdsr's engine in bfloat16 (`torch bfloat16`) in the same round, the "
    "median of all. OpenVINO is compiled for the tile's shape (`seconds_to_prepare`, for the first tile of "
    "each shape), once for any shape, or for strips of the rows that kdsr's engine computes together, which "
    "overlap by the network's reach. `levels_from_float32` are grey levels at most."
]


class Whole(nn.Module):
    """uint8 (N, h, w, C) to uint8 (N, H, W, C) in plain operators that every engine knows."""

    def __init__(self, model: SrModel) -> None:
        super().__init__()
        self.chain = model.before_shuffle(torch.float32, torch.contiguous_format)
        assert self.chain is not None, "only chains are compared here"

    def forward(self, tiles: Tensor) -> Tensor:
        """Rounded before the shuffle, as kdsr's own engine does."""
        chain, lr = self.chain, tiles.permute(0, 3, 1, 2).float()
        features = lr / 256
        for index in range(chain._num_layers - 1):
            kernel, bias = chain.get_buffer(f"kernel{index}"), chain.get_buffer(f"bias{index}")
            features = F.leaky_relu(F.conv2d(features, kernel, bias, padding=1), chain._slope)
        tail = F.conv2d(features, chain.get_buffer("tail"), padding=1)
        around = F.pad(lr, (2, 2, 2, 2), mode="replicate")
        levels = F.conv2d(around, chain.get_buffer("bicubic"), chain.get_buffer("bias") + 0.5) + tail
        blocks = levels.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        batch, height, width, _ = blocks.shape
        scale = chain.scale
        pixels = blocks.reshape(batch, height, width, scale, -1).permute(0, 1, 3, 2, 4)
        return pixels.reshape(batch, height * scale, width * scale, -1)


def torch_engines(model: SrModel) -> Iterator[tuple[str, Run]]:
    """The engine of the jobs."""
    for precision in ("bfloat16", "float32"):
        engine = Engine(model, precision=precision)
        assert engine.precision == precision, engine.note
        yield f"torch {precision}", engine.run


def openvino_engines(whole: Whole, tile: np.ndarray, at_once: int) -> Iterator[tuple[str, Run]]:
    """OpenVINO's CPU plugin, one stream for each call at once."""
    import openvino as ov

    def compiled(shape: tuple[int, ...], precision: str) -> Run:
        converted = ov.convert_model(whole, example_input=torch.from_numpy(tile), input=[list(shape)])
        streams = {"NUM_STREAMS": at_once, "INFERENCE_NUM_THREADS": at_once}
        model = ov.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": precision, **streams})
        own = threading.local()

        def run(tiles: np.ndarray) -> np.ndarray:
            if not hasattr(own, "request"):
                own.request = model.create_infer_request()
            return np.array(own.request.infer([tiles], share_inputs=True, share_outputs=True)[0])

        return run

    yield "OpenVINO bf16", compiled(tile.shape, "bf16")
    yield "OpenVINO bf16, any shape", compiled((1, -1, -1, tile.shape[3]), "bf16")
    height, width = tile.shape[1:3]
    rows, reach = CACHED_PIXELS // width, whole.chain._num_layers
    if height > rows:
        by_height: dict[int, Run] = {}

        def strips(tiles: np.ndarray) -> np.ndarray:
            scale, parts = whole.chain.scale, []
            for top in range(0, height, rows):
                first, last = max(0, top - reach), min(height, top + rows + reach)
                sr = by_height[last - first](np.ascontiguousarray(tiles[:, first:last]))
                parts.append(sr[:, (top - first) * scale :][:, : rows * scale])
            return np.concatenate(parts, axis=1)

        for top in range(0, height, rows):
            taller = min(height, top + rows + reach) - max(0, top - reach)
            by_height[taller] = compiled((1, taller, width, tile.shape[3]), "bf16")
        yield "OpenVINO bf16, strips", strips
    yield "OpenVINO f32", compiled(tile.shape, "f32")


def onnx_engines(whole: Whole, tile: np.ndarray) -> Iterator[tuple[str, Run]]:
    """ONNX Runtime, which computes convolutions in float32 on CPUs."""
    import onnxruntime

    stream = io.BytesIO()
    torch.onnx.export(whole, (torch.from_numpy(tile),), stream, dynamo=False, opset_version=18)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(stream.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    yield "ONNX Runtime f32", lambda tiles: session.run(None, {name: tiles})[0]


def engines(model: SrModel, tile: np.ndarray, at_once: int) -> tuple[dict[str, Run], dict[str, float]]:
    """All that can be had here by name, and the seconds until each was ready."""
    whole = Whole(model).eval()
    families = [torch_engines(model)]
    if importlib.util.find_spec("openvino"):
        families.append(openvino_engines(whole, tile, at_once))
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        families.append(onnx_engines(whole, tile))
    runs, ready = {}, {}
    for family in families:
        began = time.perf_counter()
        for name, run in family:
            run(tile)
            runs[name], ready[name] = run, time.perf_counter() - began
            began = time.perf_counter()
    return runs, ready


def seconds(run: Run, tile: np.ndarray, at_once: int, for_seconds: float) -> float:
    """Median of passes, each `at_once` calls together, for one of these calls."""
    passes = []
    with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(1,)) as threads:
        list(threads.map(run, [tile] * at_once))
        end = time.perf_counter() + for_seconds
        while time.perf_counter() < end or not passes:
            began = time.perf_counter()
            list(threads.map(run, [tile] * at_once))
            passes.append(time.perf_counter() - began)
    return statistics.median(passes) / at_once


def compare(
    model: SrModel, tile: np.ndarray, *, at_once: int, rounds: int, for_seconds: float
) -> list[dict[str, object]]:
    """A row for each engine: speed, its ratio to torch in bfloat16, and how far it is from float32."""
    runs, ready = engines(model, tile, at_once)
    found = {name: run(tile) for name, run in runs.items()}
    exact = found["torch float32"].astype(int)
    times = [
        {name: seconds(run, tile, at_once, for_seconds) for name, run in runs.items()} for _ in range(rounds)
    ]
    megapixels = exact.size / exact.shape[3] / 1e6
    return [
        {
            "engine": name,
            "tile": f"{tile.shape[1]}x{tile.shape[2]}",
            "at_once": at_once,
            "output_mpx_s": round(statistics.median(megapixels / row[name] for row in times), 2),
            "ratio": round(statistics.median(row["torch bfloat16"] / row[name] for row in times), 3),
            "seconds_to_prepare": round(ready[name], 2),
            "levels_from_float32": int(np.abs(found[name] - exact).max()),
            "share_that_differs": round(float((found[name] != exact).mean()), 5),
        }
        for name in runs
    ]


def photo_like(height: int, width: int, channels: int) -> np.ndarray:
    """(1, h, w, C), smooth with some noise as photographs are: how far types are apart depends on it."""
    waves = np.sin(np.arange(height) / 9)[:, None] * np.sin(np.arange(width) / 9)
    grey = 128 + 90 * waves + np.random.default_rng(0).normal(0, 4, waves.shape)
    return grey.clip(0, 255).astype(np.uint8)[None, :, :, None].repeat(channels, axis=3)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="photo-x4")
    parser.add_argument("--tile", nargs="+", default=["144x144", "321x481"], help="LR height x width")
    parser.add_argument("--at-once", nargs="+", type=int, default=[1], help="calls in threads of their own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each engine in each round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model).model
    rows: list[dict[str, object]] = []
    for shape in arguments.tile:
        height, width = (int(side) for side in shape.split("x"))
        tile = photo_like(height, width, model.spec.channels)
        for at_once in arguments.at_once:
            with torch.inference_mode():
                rows += compare(
                    model,
                    tile,
                    at_once=at_once,
                    rounds=arguments.rounds,
                    for_seconds=arguments.seconds,
                )
    rows = [{"model": arguments.model, **row} for row in rows]
    report = {"title": TITLE, "remarks": REMARKS, "rows": rows} | provenance.stamp()
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
