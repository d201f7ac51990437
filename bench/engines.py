"""One network on the CPU in torch, OpenVINO and ONNX Runtime: uint8 tiles in, uint8 tiles out, in turns.

    python bench/engines.py --json engines.json

Speed is a ratio to torch in bfloat16, each round against the same round. OpenVINO, and ONNX Runtime with
onnx, are measured where they are installed; kdsr itself does without them.
"""

import argparse
import importlib.util
import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdsr.checkpoint import load_model
from kdsr.engine import Engine
from kdsr.models.contract import SrModel

Run = Callable[[np.ndarray], np.ndarray]


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
    """kdsr's own engine."""
    for precision in ("bfloat16", "float32"):
        engine = Engine(model, precision=precision)
        if engine.precision == precision:
            yield f"torch {precision}", engine.run


def openvino_engines(whole: Whole, tile: np.ndarray, threads: int) -> Iterator[tuple[str, Run]]:
    """OpenVINO's CPU plugin at a fixed shape."""
    import openvino as ov

    converted = ov.convert_model(whole, example_input=torch.from_numpy(tile), input=[tile.shape])
    for precision in ("bf16", "f32"):
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        compiled = ov.Core().compile_model(converted, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
        request = compiled.create_infer_request()

        def run(tiles: np.ndarray, request=request) -> np.ndarray:
            return np.array(request.infer([tiles])[0])

        yield f"OpenVINO {precision}", run


def onnx_engines(whole: Whole, tile: np.ndarray, threads: int) -> Iterator[tuple[str, Run]]:
    """ONNX Runtime, which computes convolutions in float32 on CPUs."""
    import onnxruntime

    stream = io.BytesIO()
    torch.onnx.export(whole, (torch.from_numpy(tile),), stream, dynamo=False, opset_version=18)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(stream.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    yield "ONNX Runtime f32", lambda tiles: session.run(None, {name: tiles})[0]


def engines(model: SrModel, tile: np.ndarray, threads: int) -> dict[str, Run]:
    """All that can be had here, by name."""
    whole = Whole(model).eval()
    found = dict(torch_engines(model))
    if importlib.util.find_spec("openvino"):
        found |= openvino_engines(whole, tile, threads)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found |= onnx_engines(whole, tile, threads)
    return found


def seconds(run: Run, tile: np.ndarray, for_seconds: float) -> float:
    """Median of single passes."""
    passes, end = [], time.perf_counter() + for_seconds
    while time.perf_counter() < end or not passes:
        began = time.perf_counter()
        run(tile)
        passes.append(time.perf_counter() - began)
    return statistics.median(passes)


def compare(
    model: SrModel, tile: np.ndarray, *, threads: int, rounds: int, for_seconds: float
) -> list[dict[str, object]]:
    """A row for each engine: speed, its ratio to torch in bfloat16, and how far it is from float32."""
    runs = engines(model, tile, threads)
    exact = runs["torch float32"](tile).astype(int)
    first = next(iter(runs))
    found = {name: run(tile) for name, run in runs.items()}
    times = [{name: seconds(run, tile, for_seconds) for name, run in runs.items()} for _ in range(rounds)]
    megapixels = exact.size / exact.shape[3] / 1e6
    return [
        {
            "engine": name,
            "output_mpx_s": round(statistics.median(megapixels / row[name] for row in times), 2),
            f"ratio_to_{first.replace(' ', '_')}": round(
                statistics.median(row[first] / row[name] for row in times), 3
            ),
            "levels_from_float32": int(np.abs(found[name] - exact).max()),
            "pixels_that_differ": round(float((found[name] != exact).mean()), 5),
        }
        for name in runs
    ]


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="photo-x4")
    parser.add_argument("--side", type=int, default=144, help="height and width of the LR tile")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each engine in each round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model).model
    # Smooth with some noise, as photographs are: how far types are apart depends on it.
    waves = np.sin(np.arange(arguments.side) / 9)
    grey = (
        128 + 90 * waves[:, None] * waves[None] + np.random.default_rng(0).normal(0, 4, (arguments.side,) * 2)
    )
    tile = grey.clip(0, 255).astype(np.uint8)[None, :, :, None].repeat(model.spec.channels, axis=3)
    with torch.inference_mode():
        rows = compare(
            model, tile, threads=arguments.threads, rounds=arguments.rounds, for_seconds=arguments.seconds
        )
    result = {
        "model": arguments.model,
        "tile": arguments.side,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "engines": rows,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
