"""The picture of degradations in the docs: photographs down, degradations across.

python bench/degradation_samples.py jobs/demo/photos --output docs/images/degradations.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont
from torch import Tensor

from kdsr import codecs
from kdsr.config import (
    BicubicDegradation,
    BlurStep,
    Degradation,
    JpegStep,
    NoiseStep,
    RealWorldDegradation,
    ResizeStep,
)
from kdsr.degrade import build_degradation

CELL = 240
"""Height and width of an HR crop, and of an LR image enlarged to it."""
HEADER = 30
GAP = 4


COLUMNS: dict[str, tuple[Degradation, int]] = {
    "bicubic": (BicubicDegradation(), 0),
    "blur": (RealWorldDegradation(steps=(BlurStep(sigma=(6, 6), anisotropy=4),), lr_steps=()), 0),
    "resize": (RealWorldDegradation(steps=(ResizeStep(factor=(0.15, 0.2)),), lr_steps=()), 0),
    "noise": (RealWorldDegradation(steps=(), lr_steps=(NoiseStep(sigma=(15, 15)),)), 0),
    "JPEG": (RealWorldDegradation(steps=(), lr_steps=(JpegStep(quality=(20, 20)),)), 0),
    "real_world, seed 1": (RealWorldDegradation(), 1),
    "real_world, seed 2": (RealWorldDegradation(), 2),
}
"""Degradation and seed. Single steps are strong enough to see; real_world has its default options."""


def read(path: Path) -> Tensor:
    """The middle of a photograph, (1, 3, CELL, CELL) in [0, 1]."""
    pixels = codecs.decode(path.read_bytes(), max_pixels=10**9).rgb8().pixels
    top, left = (pixels.shape[0] - CELL) // 2, (pixels.shape[1] - CELL) // 2
    crop = pixels[top : top + CELL, left : left + CELL].copy()
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255


def cells(hr: Tensor, scale: int) -> list[Tensor]:
    """HR and, enlarged pixel by pixel, its LR by every degradation; each (1, 3, CELL, CELL)."""
    made = [hr]
    for degradation, seed in COLUMNS.values():
        lr = build_degradation(degradation, scale)(hr, torch.Generator().manual_seed(seed))
        made.append(lr.repeat_interleave(scale, -1).repeat_interleave(scale, -2))
    return made


def draw(photos: list[Path], scale: int) -> PillowImage.Image:
    """The whole picture with a title over every column."""
    titles = ["HR", *COLUMNS]
    step = CELL + GAP
    picture = PillowImage.new("RGB", (step * len(titles) - GAP, HEADER + step * len(photos) - GAP), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(18)
    for column, title in enumerate(titles):
        pen.text((column * step + CELL / 2, HEADER / 2), title, fill="black", font=font, anchor="mm")
    for row, photo in enumerate(photos):
        for column, cell in enumerate(cells(read(photo), scale)):
            pixels = (cell[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
            picture.paste(PillowImage.fromarray(pixels), (column * step, HEADER + row * step))
    return picture


def main() -> None:
    """Read the arguments, write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("jobs/demo/photos"),
        help="folder with photographs of at least 240 x 240 pixels",
    )
    parser.add_argument("--output", type=Path, default=Path("docs/images/degradations.png"))
    parser.add_argument("--names", nargs="+", help="file names in the folder; the first three when not given")
    parser.add_argument("--scale", type=int, default=4, choices=(2, 3, 4))
    options = parser.parse_args()
    every = sorted(path for path in options.folder.iterdir() if path.suffix.lower() in codecs.SUFFIXES)
    photos = [options.folder / name for name in options.names] if options.names else every[:3]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(photos, options.scale).save(options.output, optimize=True)
    columns = {title: degradation.model_dump() for title, (degradation, _) in COLUMNS.items()}
    print(json.dumps({"picture": str(options.output), "scale": options.scale, "columns": columns}))


if __name__ == "__main__":
    main()
