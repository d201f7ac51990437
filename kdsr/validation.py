"""Quick measures for a run: sub-images held out and not, and whether a teacher is worth learning from."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib import resources
from itertools import groupby, islice, zip_longest
from typing import NamedTuple

import numpy as np
import torch

from kdsr import codecs, shards
from kdsr.checkpoint import LoadedModel, is_imported
from kdsr.config import BicubicDegradation, Degradation
from kdsr.degrade import Degrade, build_degradation
from kdsr.errors import RequestError
from kdsr.evaluate import Pair, evaluate_pairs
from kdsr.image import Image
from kdsr.models import SrModel, build_model
from kdsr.pairs import grey
from kdsr.spec import BicubicSpec, Channels, Goal, ShardIndex
from kdsr.store import Store

log = logging.getLogger(__name__)

BICUBIC = BicubicDegradation()

LEAST_GAIN_DB = 1.0
"""What a public teacher must have over bicubic on the fixture. A wrong range or channel order costs more."""
LARGEST_LOSS_DB = 3.0
"""What a teacher that was trained for looks may be short of bicubic: its details are invented."""


NUM_PICTURES, PICTURE_SIDE = 48, 40
"""How many pictures an inherited network is fitted on, and their height and width in LR pixels."""


def mean_psnr_y(upscale: Callable[[Image], Image], pairs: Sequence[Pair], *, border: int) -> float:
    """Mean PSNR in dB on luma over `pairs`."""
    return float(np.mean([score.psnr_y for score in evaluate_pairs(upscale, pairs, border)]))


def heldout_pairs(
    store: Store, index: ShardIndex, *, degrade: Degrade, scale: int, channels: Channels, limit: int
) -> list[Pair]:
    """`limit` held-out sub-images, or all, with the LR that training would make; always the same ones.

    One of each photograph in turn: those beside each other show the same.
    """
    rows = _heldout_rows(store, index, limit)
    return _pairs(rows, degrade=degrade, scale=scale, channels=channels)


def training_pairs(
    store: Store, index: ShardIndex, *, degrade: Degrade, scale: int, channels: Channels, limit: int
) -> list[Pair]:
    """As many sub-images that are trained on, from all over the set, and always the same ones."""
    rows = islice(_training_rows(store, index, limit), limit)
    return _pairs(rows, degrade=degrade, scale=scale, channels=channels)


def training_pictures(
    store: Store, index: ShardIndex, *, degrade: Degrade, scale: int, channels: Channels, least_side: int
) -> torch.Tensor | None:
    """LR (B, C, h, w) in [0, 1] from the middles of sub-images that are trained on, always the same ones.

    `least_side` is the least h and w, at most `PICTURE_SIDE`; None where no sub-image is as large.
    """
    pairs = training_pairs(store, index, degrade=degrade, scale=scale, channels=channels, limit=NUM_PICTURES)
    sides = [min(pair.lr.height, pair.lr.width) for pair in pairs]
    least = min(least_side, PICTURE_SIDE)
    side = min((side for side in sides if side >= least), default=0)
    if side == 0:
        return None
    side = min(side, PICTURE_SIDE)
    return torch.stack(
        [_middle(pair.lr, side) for pair in pairs if min(pair.lr.height, pair.lr.width) >= side]
    )


def _middle(image: Image, side: int) -> torch.Tensor:
    """(C, side, side) in [0, 1]."""
    top, left = (image.height - side) // 2, (image.width - side) // 2
    pixels = torch.from_numpy(image.pixels[top : top + side, left : left + side].copy())
    return pixels.view(side, side, -1).permute(2, 0, 1).float() / 255


def _pairs(rows: Iterable[shards.Row], *, degrade: Degrade, scale: int, channels: Channels) -> list[Pair]:
    return [
        make_pair(
            row.key,
            shards.row_pixels(row, row.image),
            degrade=degrade,
            scale=scale,
            channels=channels,
            seed=number,
        )
        for number, row in enumerate(rows)
    ]


def make_pair(
    name: str, hr: np.ndarray, *, degrade: Degrade, scale: int, channels: Channels, seed: int
) -> Pair:
    """`hr` (H, W, 3) uint8, cropped to a multiple of `scale`, and its LR."""
    height, width = (side // scale * scale for side in hr.shape[:2])
    tensor = torch.from_numpy(hr[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255
    tensor = tensor if channels == 3 else grey(tensor)
    lr = degrade(tensor, torch.Generator().manual_seed(seed))
    return Pair(name, _image(lr), _image(tensor).rgb8())


def require_better_than_bicubic(
    teacher: LoadedModel,
    *,
    degradation: Degradation = BICUBIC,
    trained_for: Goal | None = None,
    force: bool = False,
) -> None:
    """Raise RequestError unless a teacher is worth learning from on the bundled photograph.

    A public one must beat bicubic by 1 dB, which catches weights whose value range or channel order is not
    the assumed one; any other must not lose against it, and below 1 dB is warned about. One that was trained
    for looks (`trained_for`, or its card) may be 3 dB short. LR comes from `degradation`, that of the run.
    With `force` only outputs that are not finite are refused.
    """
    usual, reached = _tried(teacher, degradation)
    needed = _least_gain(teacher, trained_for or teacher.card.trained_for)
    found = f"({usual:.2f} dB) on the test photograph, found {reached:.2f} dB"
    if reached < usual + needed and not force:
        raise RequestError(
            f"teacher {teacher.card.name}: expected at least {needed:g} dB over bicubic {found}; its value "
            f"range is probably not 0..1, its channels not RGB, or it was trained for another degradation or "
            f"not enough; take another teacher, set trained_for to perception for one that was trained for "
            f"looks, or force to true"
        )
    if reached < usual + LEAST_GAIN_DB:
        log.warning("teacher %s: less than %g dB over bicubic %s", teacher.card.name, LEAST_GAIN_DB, found)


def _tried(teacher: LoadedModel, degradation: Degradation) -> tuple[float, float]:
    """PSNR on luma in dB of bicubic and of the teacher on the bundled photograph."""
    spec = teacher.model.spec
    photo = codecs.decode_png(resources.files("kdsr").joinpath("weights/fixture.png").read_bytes())
    degrade: Degrade = build_degradation(degradation, spec.scale)
    pair = make_pair("fixture", photo, degrade=degrade, scale=spec.scale, channels=spec.channels, seed=0)
    bicubic = build_model(BicubicSpec(scale=spec.scale, channels=spec.channels))
    usual, reached = (
        mean_psnr_y(partial(_answer, model, name=teacher.card.name), [pair], border=spec.scale)
        for model in (bicubic, teacher.model)
    )
    return usual, reached


def _least_gain(teacher: LoadedModel, goal: Goal) -> float:
    """In dB over bicubic."""
    if goal == "perception":
        return -LARGEST_LOSS_DB
    return LEAST_GAIN_DB if is_imported(teacher.card) else 0.0


@torch.inference_mode()
def _answer(model: SrModel, image: Image, *, name: str) -> Image:
    """What `model`, on the CPU, makes of a whole image. Raises RequestError where that is not finite."""
    lr = torch.from_numpy(image.pixels.copy()).permute(2, 0, 1)[None].float() / 255
    sr = model(lr)
    if not sr.isfinite().all():
        raise RequestError(
            f"teacher {name}: its output for the test photograph is not finite; its weights are broken, or "
            f"were saved from a run that went astray; take another checkpoint"
        )
    return _image(sr)


class _Place(NamedTuple):
    """Where one row lies."""

    shard: int
    group: int
    number: int


def _heldout_rows(store: Store, index: ShardIndex, limit: int) -> list[shards.Row]:
    chosen = _heldout_places(store, index, limit)
    found: dict[_Place, shards.Row] = {}
    for (shard, group), places in groupby(sorted(chosen), key=lambda place: place[:2]):
        rows = shards.read_row_group(store, index.shards[shard], group, columns=("image",))
        found.update((place, rows[place.number]) for place in places)
    return [found[place] for place in chosen]


def _heldout_places(store: Store, index: ShardIndex, limit: int) -> list[_Place]:
    """The first row of as many photographs, then the second of each, and so on.

    Photographs are drawn by a hash of their keys. Rows lie in the order of keys, so that the first ones may
    all be of one folder, and of one kind; shards are each a sample of the set, and few are looked into.
    """
    photographs: dict[str, list[_Place]] = {}
    for shard, entry in enumerate(index.shards):
        if len(photographs) >= limit:
            break
        for group in range(len(entry.row_groups)) if entry.num_heldout_rows else ():
            # The small columns alone: most rows are trained on, and their images are large.
            for number, row in enumerate(shards.read_row_group(store, entry, group, columns=())):
                if row.heldout:
                    photographs.setdefault(row.key, []).append(_Place(shard, group, number))
    turns = zip_longest(*(photographs[key] for key in sorted(photographs, key=_lot)))
    return [place for turn in turns for place in turn if place is not None][:limit]


def _lot(key: str) -> bytes:
    return hashlib.sha256(f"validation {key}".encode()).digest()


def _training_rows(store: Store, index: ShardIndex, limit: int) -> Iterator[shards.Row]:
    """Few of each row group, because those beside each other may be of one photograph."""
    groups = [(entry, group) for entry in index.shards for group in range(len(entry.row_groups))]
    few = math.ceil(limit / len(groups))
    for number in np.random.default_rng(0).permutation(len(groups)):
        entry, group = groups[number]
        rows = [
            row for row in shards.read_row_group(store, entry, group, columns=("image",)) if not row.heldout
        ]
        yield from rows[:: max(1, len(rows) // few)][:few]


def _image(tensor: torch.Tensor) -> Image:
    """(1, C, H, W) in [0, 1] to an 8-bit image."""
    pixels = (tensor[0].permute(1, 2, 0) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return Image(pixels)
