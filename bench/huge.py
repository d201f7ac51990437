"""A huge picture in bounded memory: a synthetic tiled TIFF through the path of the bulk job.

    python bench/huge.py --side 20000 --json huge.json

Peak memory is that of this process, read after the picture was made by another one.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from kdsr import provenance

TILE = 512
TITLE = "A huge picture"
REMARKS = [
    "One picture of `side` x `side` pixels from a tiled TIFF to a tiled BigTIFF, some rows at a time. "
    "`peak_rss_mb` is all memory of the process, `rss_at_rest_mb` what it took before the picture."
]


def make_picture(path: Path, side: int) -> None:
    """A tiled TIFF of waves and noise, `side` x `side` x 3, written tile by tile."""
    import numpy as np
    import tifffile

    noise = np.random.default_rng(0).integers(0, 16, (TILE, TILE, 3), dtype=np.uint8)

    def tiles():
        for top in range(0, side, TILE):
            for left in range(0, side, TILE):
                rows = np.arange(top, top + TILE)[:, None, None]
                columns = np.arange(left, left + TILE)[None, :, None]
                waves = np.sin(rows / (9 + np.arange(3))) * np.cos(columns / (13 + np.arange(3)))
                yield (waves * 100 + 120).astype(np.uint8) + noise

    tifffile.imwrite(
        path,
        tiles(),
        shape=(side, side, 3),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb",
        compression="deflate",
        compressionargs={"level": 1},
        predictor=True,
        bigtiff=True,
    )


def upscale(
    folder: Path, model: str, format_: str, threads: int, windows_above: int | None
) -> dict[str, object]:
    """Upscale the picture in `folder`; what it cost."""
    from kdsr import windows
    from kdsr.checkpoint import load_model
    from kdsr.config import UpscaleConfig
    from kdsr.engine import Engine
    from kdsr.manifest import Task
    from kdsr.objects import ObjectUpscaler, PixelBudget
    from kdsr.store import open_store
    from kdsr.upscale import ComputeThreads, Upscaler

    if windows_above is not None:
        windows.IN_MEMORY_PIXELS = windows_above
    loaded = load_model(model)
    engine = Engine(loaded.model, precision="auto")
    config = UpscaleConfig(
        input=str(folder / "in"), output=str(folder / "out"), model=model, format=format_, max_pixels=10**10
    )
    source, target = open_store(config.input), open_store(config.output)
    with ComputeThreads(threads) as compute:
        objects = ObjectUpscaler(
            source, target, Upscaler(engine, compute=compute), config, PixelBudget(256_000_000)
        )
        info = source.stat("huge.tif")
        at_rest = resident_mb()
        began = time.perf_counter()
        status = objects.upscale(Task("0" * 32, info.key, info.etag, info.size, f"huge.{format_}"))
        seconds = time.perf_counter() - began
    if status.status != "done":
        raise SystemExit(f"{status.stage}: {status.error_class}: {status.message}")
    return {
        "output_megapixels": status.megapixels,
        "output_bytes": status.output_bytes,
        "seconds": round(seconds, 2),
        "mpx_s": round(status.megapixels / seconds, 2),
        "net_seconds": round(status.net_seconds, 2),
        "encode_seconds": round(status.encode_seconds, 2),
        "upload_seconds": round(status.upload_seconds, 2),
        "rss_at_rest_mb": at_rest,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "precision": engine.precision,
    }


def resident_mb() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--side", type=int, default=20_000, help="height and width of the input")
    parser.add_argument("--model", default="photo-x4")
    parser.add_argument("--format", default="tiff", choices=["tiff", "png"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--windows-above", type=int, help="output pixels; the library's limit when not set")
    parser.add_argument("--folder", help="where picture and result go; a temporary one when not set")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    if args.make:
        make_picture(Path(args.make), args.side)
        return
    with tempfile.TemporaryDirectory(prefix="kdsr-huge-", dir=args.folder) as name:
        folder = Path(name)
        (folder / "in").mkdir()
        picture = folder / "in" / "huge.tif"
        make = [sys.executable, __file__, "--side", str(args.side), "--make", str(picture)]
        subprocess.run(make, check=True)
        row = {
            "side": args.side,
            "model": args.model,
            "format": args.format,
            "threads": args.threads,
            "input_bytes": picture.stat().st_size,
            **upscale(folder, args.model, args.format, args.threads, args.windows_above),
        }
    report = {"title": TITLE, "remarks": REMARKS, "rows": [row]} | provenance.stamp()
    text = json.dumps(report, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
