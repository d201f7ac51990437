"""Photographs small enough for tests: smooth shapes with edges, the same for the same seed."""

from pathlib import Path

import numpy as np
from PIL import Image


def photograph(seed: int, *, height: int = 128, width: int = 144) -> np.ndarray:
    """(height, width, 3) uint8: waves of several directions and a few hard-edged boxes."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = []
    for _ in range(3):
        waves = sum(
            np.sin(x * random.uniform(0.02, 0.4) + y * random.uniform(0.02, 0.4) + random.uniform(0, 6))
            for _ in range(4)
        )
        channels.append(128 + 25 * np.asarray(waves))
    picture = np.stack(channels, axis=-1)
    for _ in range(6):
        top, left = int(random.integers(height - 20)), int(random.integers(width - 20))
        picture[top : top + 20, left : left + 14] = random.integers(0, 256, 3)
    return picture.clip(0, 255).astype(np.uint8)


def write_photographs(folder: Path, count: int) -> list[Path]:
    """PNG files photo-0.png, photo-1.png, ... in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo-{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(photograph(number)).save(path)
    return paths
