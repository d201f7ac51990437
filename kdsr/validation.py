"""Quick measures for a run in progress: held-out sub-images, and whether a teacher is worth learning from."""

from collections.abc import Callable, Iterator, Sequence
from importlib import resources

import numpy as np
import torch

from kdsr import codecs, shards
from kdsr.checkpoint import LoadedModel
from kdsr.config import BicubicDegradation
from kdsr.degrade import Degrade, build_degradation
from kdsr.engine import Engine
from kdsr.errors import RequestError
from kdsr.evaluate import Pair, evaluate_pairs
from kdsr.image import Image
from kdsr.models import build_model
from kdsr.pairs import grey
from kdsr.spec import BicubicSpec, Channels, ShardIndex
from kdsr.store import Store
from kdsr.upscale import Upscaler

LEAST_GAIN_DB = 1.0
"""What a public teacher must have over bicubic on the fixture. A wrong range or channel order costs more."""


def mean_psnr_y(upscale: Callable[[Image], Image], pairs: Sequence[Pair], *, border: int) -> float:
    """Mean PSNR in dB on luma over `pairs`."""
    return float(np.mean([score.psnr_y for score in evaluate_pairs(upscale, pairs, border)]))


def heldout_pairs(
    store: Store, index: ShardIndex, *, degrade: Degrade, scale: int, channels: Channels, limit: int
) -> list[Pair]:
    """The first `limit` held-out sub-images of the index, with the LR that training would make of them."""
    pairs: list[Pair] = []
    for row in _heldout_rows(store, index):
        hr = shards.row_pixels(row, row.image)
        pairs.append(make_pair(row.key, hr, degrade=degrade, scale=scale, channels=channels, seed=len(pairs)))
        if len(pairs) == limit:
            break
    return pairs


def make_pair(
    name: str, hr: np.ndarray, *, degrade: Degrade, scale: int, channels: Channels, seed: int
) -> Pair:
    """`hr` (H, W, 3) uint8, cropped to a multiple of `scale`, and its LR."""
    height, width = (side // scale * scale for side in hr.shape[:2])
    tensor = torch.from_numpy(hr[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255
    tensor = tensor if channels == 3 else grey(tensor)
    lr = degrade(tensor, torch.Generator().manual_seed(seed))
    return Pair(name, _image(lr), _image(tensor).rgb8())


def require_better_than_bicubic(teacher: LoadedModel) -> None:
    """Raise RequestError unless an imported teacher beats bicubic by 1 dB on the bundled photograph.

    It catches weights whose value range or channel order is not the assumed one.
    """
    spec = teacher.model.spec
    photo = codecs.decode_png(resources.files("kdsr").joinpath("weights/fixture.png").read_bytes())
    degrade: Degrade = build_degradation(BicubicDegradation(), spec.scale)
    pair = make_pair("fixture", photo, degrade=degrade, scale=spec.scale, channels=spec.channels, seed=0)
    bicubic = build_model(BicubicSpec(scale=spec.scale, channels=spec.channels))
    psnr = {
        name: mean_psnr_y(Upscaler(Engine(model)).upscale, [pair], border=spec.scale)
        for name, model in (("bicubic", bicubic), ("teacher", teacher.model))
    }
    if psnr["teacher"] < psnr["bicubic"] + LEAST_GAIN_DB:
        raise RequestError(
            f"teacher {teacher.card.name}: expected at least {LEAST_GAIN_DB:g} dB over bicubic "
            f"({psnr['bicubic']:.2f} dB) on the test photograph, found {psnr['teacher']:.2f} dB; its value "
            f"range is probably not 0..1, its channels not RGB, or it was trained for another degradation"
        )


def _heldout_rows(store: Store, index: ShardIndex) -> Iterator[shards.Row]:
    for entry in index.shards:
        if entry.num_heldout_rows == 0:
            continue
        for group in range(len(entry.row_groups)):
            yield from (row for row in shards.read_row_group(store, entry, group) if row.heldout)


def _image(tensor: torch.Tensor) -> Image:
    """(1, C, H, W) in [0, 1] to an 8-bit image."""
    pixels = (tensor[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return Image(pixels)
