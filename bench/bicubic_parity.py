"""How far our LR is from the LR files that MATLAB made, as JSON on stdout.

    KDSR_DATA=FOLDER python bench/bicubic_parity.py

FOLDER holds bench/{Set5,Set14,B100}/x{2,3,4}/{HR,LR}. Differences are in grey levels of 255. `rounded_once`
is the same arithmetic without MATLAB's rounding between the two passes, for comparison.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kdsr import codecs, provenance
from kdsr.degrade import bicubic_downscale, bicubic_lr, quantize

SETS = ("Set5", "Set14", "B100")
SCALES = (2, 3, 4)


def rounded_once(hr: Tensor, scale: int) -> Tensor:
    """Bicubic in floating point, rounded at the end."""
    return quantize(bicubic_downscale(hr, scale))


METHODS: dict[str, tuple[Callable[[Tensor, int], Tensor], torch.dtype]] = {
    "bicubic_lr float32": (bicubic_lr, torch.float32),
    "bicubic_lr float64": (bicubic_lr, torch.float64),
    "rounded_once float32": (rounded_once, torch.float32),
    "rounded_once float64": (rounded_once, torch.float64),
}


def read(path: Path, dtype: torch.dtype) -> Tensor:
    """(1, C, H, W) in [0, 1]; a grey file has one channel."""
    pixels = codecs.decode(path.read_bytes(), max_pixels=10**8).pixels
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(dtype) / 255


def compare(folder: Path, scale: int, method: str) -> dict[str, float | int]:
    """Mean, maximum and share of differences over all values of a set."""
    make, dtype = METHODS[method]
    differences = torch.cat(
        [
            ((make(read(path, dtype), scale) - read(folder / "LR" / path.name, dtype)) * 255).abs().flatten()
            for path in sorted((folder / "HR").iterdir())
        ]
    ).round()
    return {
        "num_values": differences.numel(),
        "mean_levels": differences.double().mean().item(),
        "max_levels": differences.max().item(),
        "share_differing": (differences > 0).double().mean().item(),
    }


def rows(root: Path) -> Iterator[dict[str, str | float | int]]:
    """One row per set, scale and method; a set that is missing is left out."""
    for name in SETS:
        for scale in SCALES:
            folder = root / "bench" / name / f"x{scale}"
            if folder.is_dir():
                for method in METHODS:
                    yield {"set": name, "scale": scale, "method": method, **compare(folder, scale, method)}


if __name__ == "__main__":
    if "KDSR_DATA" not in os.environ:
        print(json.dumps({"rows": [], "skipped": "KDSR_DATA is not set"}))
        sys.exit()
    print(json.dumps({"rows": list(rows(Path(os.environ["KDSR_DATA"]))), **provenance.stamp()}, indent=1))
